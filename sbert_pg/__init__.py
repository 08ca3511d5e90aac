"""Embeddings in Postgres as naturally as any other column."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sbert_pg import registry
from sbert_pg.registry import get_encoder, use_encoder
from sbert_pg.spec import EncoderSpec, TextEncoder

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

#: Exports that are imported when they are first asked for: name and module.
_LAZY = {
    "Encoder": "sbert_pg.encoder",
}

__all__ = ["Encoder", "EncoderSpec", "TextEncoder", "get_encoder", "use_encoder"]


def _load_encoder(spec: EncoderSpec) -> TextEncoder:
    """Load the encoder that a declaration names; onnxruntime is imported here and not before."""
    from sbert_pg.encoder import Encoder

    return Encoder.load(
        spec.name, precision=spec.precision, dimensions=spec.dimensions, revision=spec.revision
    )


registry.set_loader(_load_encoder)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
