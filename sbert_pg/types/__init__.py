"""Column types: one file per type, and the binary wire format they share."""

from sbert_pg.types.embedding import Embedding
from sbert_pg.types.vector import HalfVector, Vector, register_reflection
from sbert_pg.types.wire import from_wire_block, to_wire_rows

__all__ = [
    "Embedding",
    "HalfVector",
    "Vector",
    "from_wire_block",
    "register_reflection",
    "to_wire_rows",
]
