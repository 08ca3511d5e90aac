"""``VECTOR`` and ``HALFVEC`` columns: float32 arrays in Python, binary on the wire where it can be.

Arrays of vectors are here as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.base import SchemaEventTarget
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, UserDefinedType

from sbert_pg.distance import MAX_DIMENSIONS, Storage
from sbert_pg.errors import DeclarationError, SbertPgError
from sbert_pg.types import drivers, wire
from sbert_pg.types.comparator import VectorComparator
from sbert_pg.types.wire import Array, as_value, reader, shape_of


class VectorType(SchemaEventTarget, UserDefinedType[Array]):
    """What ``Vector``, ``HalfVector`` and ``Embedding`` share.

    Values come back as ``vector_send(column)``, since a cursor that SQLAlchemy opens returns text,
    and formatting and parsing hundreds of decimals is most of what a search through an ORM costs
    otherwise. How they go out is ``drivers``'s.
    """

    # SQLAlchemy asks each class itself, not its bases.
    cache_ok = True
    render_bind_cast = True
    #: Arrays have no hash, so rows that hold them are distinguished by identity.
    hashable = False
    storage: Storage
    dimensions: int | None
    comparator_factory = VectorComparator

    def __init__(self, dimensions: int | None = None) -> None:
        self.dimensions = _checked_dimensions(dimensions)
        self._listen()

    def copy(self, **_: object) -> VectorType:
        """A copy for the copy of a column, as mixins and ``Table.to_metadata`` make it."""
        return self.adapt(type(self))

    def __getstate__(self) -> dict[str, Any]:
        # Listeners are put on again, as SQLAlchemy does with those of its own types.
        return {key: value for key, value in vars(self).items() if key != "dispatch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._listen()

    def _listen(self) -> None:
        """Notice the column that the type is given to."""
        event.listen(self, "after_parent_attach", _hold_in_arrays)

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
        """The value as an array that this type can store."""
        array = wire.as_float32(value, what="the vector")
        wire.check_vector(array, self.dimensions, self.storage, "the vector")
        return array

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Check a value, and turn it into what the driver takes."""
        return drivers.parameter(dialect, self.storage, self.checked)

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str]:
        """Render a value as a cast literal."""

        def process(value: Any) -> str:
            return f"'{wire.to_text(self.checked(value))}'::{self.get_col_spec()}"

        return process

    def column_expression(self, colexpr: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Read the column in binary."""
        return _Sent(colexpr, self)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        """Turn what the cursor returns into a ``VectorValue`` of shape ``(dimensions,)``."""
        return reader(self.storage)

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

    cache_ok = True
    # Where users find it, and what Alembic writes before the type's ``repr``.
    __module__ = "sbert_pg"
    storage: ClassVar[Storage] = "vector"  # type: ignore[misc]


class HalfVector(VectorType):
    """A ``HALFVEC`` column: 2 bytes a dimension, about three decimal digits.

    Args:
        dimensions: width, or ``None`` for any.
    """

    cache_ok = True
    # Where users find it, and what Alembic writes before the type's ``repr``.
    __module__ = "sbert_pg"
    storage: ClassVar[Storage] = "halfvec"  # type: ignore[misc]


def plain_type(storage: Storage, dimensions: int | None) -> VectorType:
    """The type that stores vectors without knowing of an encoder."""
    return Vector(dimensions) if storage == "vector" else HalfVector(dimensions)


def shown(column: Any) -> str:
    """A column, or what was given in its place, as a message shows it: ``Article.title``."""
    return str(column) if hasattr(column, "__clause_element__") else repr(column)


def vector_type(type_: Any) -> VectorType | None:
    """A column's type as one of this library's; ``None`` where it is not a vector's.

    pgvector-python's ``VECTOR`` and ``HALFVEC`` stand for the same columns.
    """
    if isinstance(type_, VectorType):
        return type_
    shape = shape_of(type_)
    return None if shape is None else plain_type(*shape)


def register_reflection() -> None:
    """Let SQLAlchemy reflect ``vector`` and ``halfvec`` columns as the types of this module.

    Reflection looks types up in one table per dialect class, so this is process-wide, and nothing
    but this call does it.
    """
    # Its import enters its own types there: before this, not at some later moment.
    import pgvector.sqlalchemy  # noqa: F401

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


@compiles(VectorType, "sqlite")
def _stored_in_sqlite(type_: VectorType, compiler: Any, **_: Any) -> str:
    return "BLOB"


class _Sent(FunctionElement[Any]):
    """A vector in pgvector's binary form; on other databases the column, which holds it so."""

    inherit_cache = True
    name = "vector_send"

    def __init__(self, column: sa.ColumnElement[Any], type_: VectorType) -> None:
        self.type = type_
        self.name = "vector_send" if type_.storage == "vector" else "halfvec_send"
        super().__init__(column)


def sent(vector: sa.ColumnElement[Any], storage: Storage) -> sa.ColumnElement[bytes]:
    """A vector as the bytes of pgvector's binary form, which ``wire.from_wire`` reads."""
    return sa.type_coerce(_Sent(vector, plain_type(storage, None)), sa.LargeBinary())


@compiles(_Sent)
def _as_it_is(element: _Sent, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses.clauses[0], **options))


@compiles(_Sent, "postgresql")
def _sent(element: _Sent, compiler: Any, **options: Any) -> str:
    return f"{element.name}({_as_it_is(element, compiler, **options)})"


class VectorArray(postgresql.ARRAY[Array]):
    """An array of vectors: ``VECTOR(3)[]``, as ``sa.ARRAY(Vector(3))`` becomes on a column.

    Drivers know no arrays of a type that they do not know, so values travel as arrays of text.
    """

    def adapt(self, cls: Any, **options: Any) -> Any:
        """A copy; SQLAlchemy would make one of its own class for the driver, which sends lists."""
        return super().adapt(VectorArray, **options)

    def _travelling(self) -> postgresql.ARRAY[Any]:
        item = _AsText(cast("VectorType", self.item_type))
        return postgresql.ARRAY(item, dimensions=self.dimensions, as_tuple=self.as_tuple)

    def bind_expression(self, bindvalue: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        """Send an array of texts, and cast it."""
        return sa.cast(sa.type_coerce(bindvalue, self._travelling()), self)

    def column_expression(self, colexpr: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Read an array of texts."""
        return sa.cast(colexpr, self._travelling())


class _AsText(TypeDecorator[Array]):
    """A vector that travels as pgvector's text."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, vector: VectorType) -> None:
        super().__init__()
        self.vector = vector

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        try:
            return None if value is None else wire.to_text(self.vector.checked(value))
        except SbertPgError as error:
            drivers.unwrapped(error)
            raise

    def process_result_value(self, value: Any, dialect: Dialect) -> Array | None:
        return None if value is None else as_value(wire.from_text(value))


def _hold_in_arrays(type_: VectorType, column: Any) -> None:
    """Give a column the array type that can read and write vectors, where it holds an array."""
    declared = getattr(column, "type", None)
    if isinstance(declared, sa.ARRAY) and not isinstance(declared, VectorArray):
        column.type = VectorArray(
            type_,
            as_tuple=declared.as_tuple,
            dimensions=declared.dimensions,
            zero_indexes=declared.zero_indexes,
        )
