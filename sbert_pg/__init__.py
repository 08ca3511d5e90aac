"""Embeddings in Postgres as naturally as any other column."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sbert_pg import registry
from sbert_pg.registry import get_encoder, use_encoder
from sbert_pg.spec import EncoderSpec, TextEncoder

if TYPE_CHECKING:
    from sbert_pg.catalog import bind, bind_all
    from sbert_pg.encoder import Encoder
    from sbert_pg.filling import embed_rows
    from sbert_pg.indexes import hnsw_index, ivfflat_index
    from sbert_pg.loading import load
    from sbert_pg.orm import embed_on_flush, embedding_column
    from sbert_pg.pending.backfill import backfill
    from sbert_pg.reembedding import assert_ready
    from sbert_pg.search import nearest
    from sbert_pg.source import Source
    from sbert_pg.types import Embedding, HalfVector, Vector
    from sbert_pg.worker import WorkerSettings, refresh, worker_thread

#: Exports that are imported when they are first asked for: name and module.
_LAZY = {
    "Embedding": "sbert_pg.types",
    "Encoder": "sbert_pg.encoder",
    "HalfVector": "sbert_pg.types",
    "Source": "sbert_pg.source",
    "Vector": "sbert_pg.types",
    "WorkerSettings": "sbert_pg.worker",
    "assert_ready": "sbert_pg.reembedding",
    "backfill": "sbert_pg.pending.backfill",
    "bind": "sbert_pg.catalog",
    "bind_all": "sbert_pg.catalog",
    "embed_on_flush": "sbert_pg.orm",
    "embed_rows": "sbert_pg.filling",
    "embedding_column": "sbert_pg.orm",
    "hnsw_index": "sbert_pg.indexes",
    "ivfflat_index": "sbert_pg.indexes",
    "load": "sbert_pg.loading",
    "nearest": "sbert_pg.search",
    "refresh": "sbert_pg.worker",
    "worker_thread": "sbert_pg.worker",
}

__all__ = [
    "Embedding",
    "Encoder",
    "EncoderSpec",
    "HalfVector",
    "Source",
    "TextEncoder",
    "Vector",
    "WorkerSettings",
    "assert_ready",
    "backfill",
    "bind",
    "bind_all",
    "embed_on_flush",
    "embed_rows",
    "embedding_column",
    "get_encoder",
    "hnsw_index",
    "ivfflat_index",
    "load",
    "nearest",
    "refresh",
    "use_encoder",
    "worker_thread",
]


def _load_encoder(spec: EncoderSpec) -> TextEncoder:
    """Load the encoder that a declaration names; onnxruntime is imported here and not before."""
    from sbert_pg.encoder.declared import load_declared

    return load_declared(spec)


def _check_column(connection: Any, identity: Any, spec: EncoderSpec) -> bool | None:
    """Hold a declared encoder against a column's; the catalog is imported at the first use."""
    from sbert_pg.catalog import joining

    return joining.check_column(connection, identity, spec)


def _attest_column(connection: Any, identity: Any, spec: EncoderSpec) -> int:
    """Vouch for a declared encoder in the running transaction."""
    from sbert_pg.catalog import joining

    return joining.attest_column(connection, identity, spec)


registry.set_loader(_load_encoder)
registry.set_guards(_check_column, _attest_column)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
