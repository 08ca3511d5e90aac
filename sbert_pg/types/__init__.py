"""Column types, and the forms in which vectors travel."""

from sbert_pg.types.vector import HalfVector, Vector, VectorArray, register_reflection
from sbert_pg.types.wire import VectorValue, from_wire_block, to_wire_rows

__all__ = [
    "HalfVector",
    "Vector",
    "VectorArray",
    "VectorValue",
    "from_wire_block",
    "register_reflection",
    "to_wire_rows",
]
