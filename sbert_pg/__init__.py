"""Embeddings in Postgres as naturally as any other column."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sbert_pg.registry import encoder_of, get_encoder, use_encoder
from sbert_pg.spec import EncoderSpec, TextEncoder

if TYPE_CHECKING:
    from sbert_pg.catalog import bind, create_all
    from sbert_pg.catalog.embedding import Embedding
    from sbert_pg.encoder import Encoder, Reranker
    from sbert_pg.freshness import WorkerSettings, backfill, refresh, worker_thread
    from sbert_pg.indexes import (
        diskann_index,
        hnsw_index,
        indexes_per,
        ivfflat_index,
        vchordrq_index,
    )
    from sbert_pg.loading import load
    from sbert_pg.orm import embed_on_flush, embedding_column, leave_to_workers
    from sbert_pg.passages import add_passages, passages_of, use_chunker
    from sbert_pg.reembed import require_ready
    from sbert_pg.reranking import diverse, rerank, rerank_async
    from sbert_pg.row_vectors import embed_rows
    from sbert_pg.search import explain_search, explain_words, hybrid, matching, nearest
    from sbert_pg.source import Source
    from sbert_pg.tuning import advise_index, evaluate, fit_weight, tune
    from sbert_pg.types import HalfVector, Vector
    from sbert_pg.types.text import TextSearch, text_column, text_index

#: Exports that are imported when they are first asked for, by their module.
_EXPORTS: dict[str, tuple[str, ...]] = {
    "catalog": ("bind", "create_all"),
    "catalog.embedding": ("Embedding",),
    "encoder": ("Encoder", "Reranker"),
    "freshness": ("WorkerSettings", "backfill", "refresh", "worker_thread"),
    "indexes": ("diskann_index", "hnsw_index", "indexes_per", "ivfflat_index", "vchordrq_index"),
    "loading": ("load",),
    "orm": ("embed_on_flush", "embedding_column", "leave_to_workers"),
    "passages": ("add_passages", "passages_of", "use_chunker"),
    "reembed": ("require_ready",),
    "reranking": ("diverse", "rerank", "rerank_async"),
    "row_vectors": ("embed_rows",),
    "search": ("explain_search", "explain_words", "hybrid", "matching", "nearest"),
    "source": ("Source",),
    "tuning": ("advise_index", "evaluate", "fit_weight", "tune"),
    "types": ("HalfVector", "Vector"),
    "types.text": ("TextSearch", "text_column", "text_index"),
}
_LAZY = {name: f"sbert_pg.{module}" for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "Embedding",
    "Encoder",
    "EncoderSpec",
    "HalfVector",
    "Reranker",
    "Source",
    "TextEncoder",
    "TextSearch",
    "Vector",
    "WorkerSettings",
    "add_passages",
    "advise_index",
    "backfill",
    "bind",
    "create_all",
    "diskann_index",
    "diverse",
    "embed_on_flush",
    "embed_rows",
    "embedding_column",
    "encoder_of",
    "evaluate",
    "explain_search",
    "explain_words",
    "fit_weight",
    "get_encoder",
    "hnsw_index",
    "hybrid",
    "indexes_per",
    "ivfflat_index",
    "leave_to_workers",
    "load",
    "matching",
    "nearest",
    "passages_of",
    "refresh",
    "require_ready",
    "rerank",
    "rerank_async",
    "text_column",
    "text_index",
    "tune",
    "use_chunker",
    "use_encoder",
    "vchordrq_index",
    "worker_thread",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
