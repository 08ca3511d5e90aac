"""Which types are vectors': this library's, and those of pgvector-python."""

from __future__ import annotations

import sys
from typing import Any

from sbert_pg.distance import Storage

_THEIRS: dict[str, Storage] = {"VECTOR": "vector", "HALFVEC": "halfvec"}


def shape_of(type_: Any) -> tuple[Storage, int | None] | None:
    """How a type stores vectors, and of which width; ``None`` of one that stores none.

    pgvector-python's types are asked as well, where they are imported.
    """
    if hasattr(type_, "storage") and hasattr(type_, "dimensions"):
        return type_.storage, type_.dimensions
    theirs = sys.modules.get("pgvector.sqlalchemy")
    for name, storage in _THEIRS.items():
        kind: Any = getattr(theirs, name, ())
        if isinstance(type_, kind):
            return storage, type_.dim
    return None


__all__ = ["shape_of"]
