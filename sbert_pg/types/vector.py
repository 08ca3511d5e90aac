"""``VECTOR`` and ``HALFVEC`` columns: float32 arrays in Python, binary both ways on the wire."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.engine import Dialect
from sqlalchemy.types import UserDefinedType

from sbert_pg.distance import MAX_DIMENSIONS, Storage
from sbert_pg.errors import DeclarationError
from sbert_pg.types import guard, wire
from sbert_pg.types.comparator import VectorComparator
from sbert_pg.types.unwrapped import unwrapped

Array = npt.NDArray[np.float32]


class VectorType(UserDefinedType[Array]):
    """What ``Vector``, ``HalfVector`` and ``Embedding`` share.

    Values go out as psycopg parameters in pgvector's binary format. They come back as
    ``vector_send(column)``, since a cursor that SQLAlchemy opens returns text, and formatting and
    parsing hundreds of decimals is most of what a search through an ORM costs otherwise.
    """

    cache_ok = True
    render_bind_cast = True
    #: Arrays have no hash, so rows that hold them are told apart by identity.
    hashable = False
    storage: Storage
    dimensions: int | None
    comparator_factory = VectorComparator

    @property
    def _static_cache_key(self) -> tuple[Any, ...]:
        # What the generic form collects from the constructor's arguments, computed once: a
        # statement is looked up in the compiled cache by the keys of all its types.
        key: tuple[Any, ...] | None = self.__dict__.get("_cache_key")
        if key is None:
            key = self.__dict__["_cache_key"] = (type(self), repr(self._identity()))
        return key

    def _identity(self) -> tuple[Any, ...]:
        """What two types of one class must share to compile alike and check alike."""
        return (self.storage, self.dimensions)

    def adapt(self, cls: type[Any], **kw: Any) -> Any:
        """A copy for a dialect; SQLAlchemy's own form loses arguments that are keyword-only."""
        return copy.copy(self) if isinstance(self, cls) else super().adapt(cls, **kw)

    def __repr__(self) -> str:
        width = "" if self.dimensions is None else str(self.dimensions)
        return f"{type(self).__name__}({width})"

    def get_col_spec(self, **_: object) -> str:
        """The type as DDL spells it."""
        name = self.storage.upper()
        return name if self.dimensions is None else f"{name}({self.dimensions:d})"

    @property
    def python_type(self) -> type[Any]:
        """``numpy.ndarray``, of float32 and one axis."""
        return np.ndarray

    def checked(self, value: Any) -> Array:
        """The value as an array that this type can store.

        Raises:
            VectorError: one of its kinds; see ``wire.check_vector``.
        """
        array = wire.as_float32(value, what="the vector")
        wire.check_vector(array, self.dimensions, self.storage, "the vector")
        return array

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Check a value and turn it into its wire form; see also ``guard``."""
        guard.watch(dialect)
        _register_with(dialect)
        storage, checked, passed = self.storage, self.checked, wire.passing(dialect.driver)

        def process(value: Any) -> Any:
            if value is None or isinstance(value, wire.WireVector):
                return None if value is None else passed(value)
            return passed(wire.wire_vector(checked(value), storage))

        return unwrapped(process)

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str]:
        """Render a value as a cast literal."""

        def process(value: Any) -> str:
            return f"'{wire.to_text(self.checked(value))}'::{self.get_col_spec()}"

        return process

    def column_expression(self, colexpr: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Read the column in binary."""
        send = sa.func.vector_send if self.storage == "vector" else sa.func.halfvec_send
        return send(colexpr, type_=self)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        """Turn what the cursor returns into a float32 array of shape ``(dimensions,)``."""
        return wire.reader(self.storage)

    def compare_values(self, x: Any, y: Any) -> bool:
        """Whether two values are equal, for the ORM's change detection."""
        if x is None or y is None:
            return x is y
        return bool(np.array_equal(x, y))


class Vector(VectorType):
    """A ``VECTOR`` column: 4 bytes a dimension.

    Args:
        dimensions: width, or ``None`` for any.
    """

    # SQLAlchemy asks each class itself, not its bases.
    cache_ok = True
    # Where users find it, and what Alembic writes before the type's ``repr``.
    __module__ = "sbert_pg"
    storage: ClassVar[Storage] = "vector"  # type: ignore[misc]

    def __init__(self, dimensions: int | None = None) -> None:
        self.dimensions = _checked_dimensions(dimensions)
        wire.register()


class HalfVector(VectorType):
    """A ``HALFVEC`` column: 2 bytes a dimension, about three decimal digits.

    Args:
        dimensions: width, or ``None`` for any.
    """

    cache_ok = True
    # Where users find it, and what Alembic writes before the type's ``repr``.
    __module__ = "sbert_pg"
    storage: ClassVar[Storage] = "halfvec"  # type: ignore[misc]

    def __init__(self, dimensions: int | None = None) -> None:
        self.dimensions = _checked_dimensions(dimensions)
        wire.register()


def plain_type(storage: Storage, dimensions: int | None) -> VectorType:
    """The type that stores vectors without knowing of an encoder."""
    return Vector(dimensions) if storage == "vector" else HalfVector(dimensions)


def register_reflection() -> None:
    """Let SQLAlchemy reflect ``vector`` and ``halfvec`` columns as the types of this module.

    Reflection looks types up in one table per dialect class, so this is process-wide and therefore
    an explicit call. The first ``Embedding`` that is declared makes it as well.
    """
    ischema_names["vector"] = Vector
    ischema_names["halfvec"] = HalfVector


def _checked_dimensions(dimensions: int | None) -> int | None:
    # Reflection passes the type's argument as text.
    value = None if dimensions is None else int(dimensions)
    if value is not None and not 1 <= value <= MAX_DIMENSIONS:
        raise DeclarationError(
            f"A vector column cannot have {value} dimensions; pgvector stores 1 to "
            f"{MAX_DIMENSIONS}."
        )
    return value


def _register_with(dialect: Dialect) -> None:
    """Reach the connections of an engine that was created before any vector type was."""
    adapters = getattr(dialect, "_psycopg_adapters_map", None)
    wire.register(adapters)
