"""What a vector is for a driver: pgvector's binary form, its text, or bytes. The place that knows.

psycopg 3 sends the binary form, once a connection knows ``WireVector``. That is done for
each connection of an engine that uses a vector type, when it executes its first statement; nothing
is registered with psycopg itself. Other drivers of PostgreSQL, known or not, get pgvector's text.
On other databases a vector is a blob, so that models can be declared, created, written and read
there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy as sa
from psycopg.adapt import AdaptersMap
from psycopg.types import TypeInfo
from psycopg.types.array import register_array
from sqlalchemy import event
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import DontWrapMixin

from sbert_pg.distance import Storage
from sbert_pg.errors import SbertPgError
from sbert_pg.process import ProcessLock
from sbert_pg.types.wire import Array, WireDumper, WireVector, to_text

Form = Literal["binary", "text", "blob"]

#: Remembered of a connection: that it knows ``WireVector``, and that it knows arrays of vectors.
_TAUGHT = "sbert_pg.taught"
_TAUGHT_ARRAYS = "sbert_pg.taught.arrays"
_lock = ProcessLock()
_prepared: WeakSet[Dialect] = WeakSet()
#: Of compiled statements, whether arrays of vectors are among their results.
_arrays: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def form_for(dialect: Dialect) -> Form:
    """How a vector goes to the driver of a dialect."""
    if dialect.name != "postgresql":
        return "blob"
    return "binary" if dialect.driver == "psycopg" else "text"


def prepare(dialect: Dialect) -> None:
    """Let the connections of a dialect send vectors in binary from their next statement on."""
    if dialect in _prepared or form_for(dialect) != "binary":
        return
    with _lock:
        if dialect in _prepared:
            return
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(dialect, name, _teach)
        # Last: a thread that sees it continues to execute, and must not find half of the listeners.
        _prepared.add(dialect)


def _teach(cursor: Any, statement: str, *rest: Any) -> None:
    """Tell a connection of ``WireVector``, and the cursor that it has made already."""
    context = rest[-1]
    connection = context.root_connection.connection
    if _TAUGHT not in connection.info:
        connection.info[_TAUGHT] = True
        for place in _places(connection, cursor):
            place.adapters.register_dumper(WireVector, WireDumper)
    if context.compiled is not None and _returns_arrays(context.compiled):
        _teach_arrays(context.root_connection, cursor)


def _places(connection: Any, cursor: Any) -> list[Any]:
    """What keeps adapters; the driver's own cursor of an asynchronous one is out of reach."""
    both = (connection.driver_connection, cursor)
    return [place for place in both if isinstance(getattr(place, "adapters", None), AdaptersMap)]


def _returns_arrays(compiled: Any) -> bool:
    """Whether a statement returns arrays of vectors, such as ``func.array_agg(column)``."""
    known = _arrays.get(compiled)
    if known is None:
        try:
            columns = tuple(compiled.statement.exported_columns)
        except (AttributeError, NotImplementedError):  # it returns no rows, or is a text
            columns = ()
        known = _arrays[compiled] = any(
            isinstance(column.type, sa.ARRAY) and hasattr(column.type.item_type, "storage")
            for column in columns
        )
    return known


def _teach_arrays(connection: Connection, cursor: Any) -> None:
    """Let a connection take arrays of vectors apart, into the texts of their elements."""
    if _TAUGHT_ARRAYS in connection.connection.info:
        return
    connection.connection.info[_TAUGHT_ARRAYS] = True
    catalog = sa.table("pg_type", *map(sa.column, ("typname", "oid", "typarray")))
    rows = connection.execute(
        sa.select(
            catalog.c.typname, *(sa.cast(catalog.c[n], sa.BigInteger) for n in ("oid", "typarray"))
        ).where(catalog.c.typname.in_(("vector", "halfvec")))
    )
    for name, oid, array_oid in rows:
        for place in _places(connection.connection, cursor):
            register_array(TypeInfo(name, oid, array_oid), place)


def sending(dialect: Dialect) -> Callable[[WireVector], Any]:
    """From a checked vector to what the driver of a dialect is given."""
    form = form_for(dialect)
    if form == "binary":
        return lambda vector: vector
    if form == "text":
        return lambda vector: to_text(vector.array)
    return lambda vector: vector.payload


def parameter(
    dialect: Dialect, storage: Storage, checked: Callable[[Any], Array]
) -> Callable[[Any], Any]:
    """A bind processor: check a value, and turn it into what the driver takes."""
    prepare(dialect)
    send = sending(dialect)

    def process(value: Any) -> Any:
        if value is None or isinstance(value, WireVector):
            return None if value is None else send(value)
        try:
            return send(WireVector(checked(value), storage))
        except SbertPgError as error:
            unwrapped(error)
            raise

    return process


def unwrapped(error: SbertPgError) -> SbertPgError:
    """The same error, in the form that SQLAlchemy lets through.

    SQLAlchemy wraps what is raised inside a statement in ``StatementError``, so that ``except
    VectorError`` around a flush would catch nothing. It leaves alone what derives from its
    ``DontWrapMixin``. The error tree itself cannot: encoding needs no SQLAlchemy, and importing it
    takes a tenth of a second. So the class is given the mixin here, at the moment of raising.
    """
    kind: Any = type(error)  # a class is hashable, which mypy does not see
    error.__class__ = _not_wrapped(kind)
    return error


@cache
def _not_wrapped(kind: Any) -> Any:
    """The class itself with the mixin; same name, and pickled as the class that it stands for."""
    if issubclass(kind, DontWrapMixin):
        return kind

    def as_declared(self: SbertPgError) -> tuple[Any, ...]:
        return _restored_error, (kind, self.args, vars(self))

    return type(
        kind.__name__,
        (kind, DontWrapMixin),
        {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce__": as_declared},
    )


def _restored_error(
    kind: type[SbertPgError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> SbertPgError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(attributes)
    return error
