"""Rows as the queue has them, what they are called, and many of them as one parameter.

One statement with ``unnest`` writes a batch as fast as COPY into a side table and an update from it
do, without the side table. Keys go the same way, in PostgreSQL's binary array format put together
in one go, since the driver's own arrays of text cost more time than the statements that take them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
import sqlalchemy as sa
from psycopg.abc import AdaptContext
from psycopg.adapt import Dumper
from psycopg.pq import Format
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.types import UserDefinedType

from sbert_pg import system
from sbert_pg.catalog.record import Binding
from sbert_pg.errors import DeclarationError, NotBoundError
from sbert_pg.types.wire import WireDumper

#: New and changed rows, and rows of the backfill. Claims take them in this order.
Class = Literal[0, 1]
CHANGED: Class = 0
BACKFILL: Class = 1

#: One value of a key: type and binary form.
Part = tuple[int, bytes]
Key = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pending row as the queue has it.

    Attributes:
        label: what the row is called: a JSON array of its key's parts as text.
        failed_before: whether there is a record of a failure under this label.
    """

    key: Key
    label: str
    failed_before: bool = False


@dataclass(frozen=True, slots=True)
class Row(Candidate):
    """A pending row as it was read.

    Attributes:
        text: what is to be embedded; ``None`` where the row has no text, and is to have no vector.
        of: the half of its digest that names the text, as the server computes it; ``None`` without
            a text.
    """

    text: str | None = None
    of: str | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What became of rows that were to be written.

    Attributes:
        rows: labels of the rows that are fresh now.
        changed: labels of rows that are gone or have another text; pending, or none of ours.
        busy: labels of rows that someone else held locked; they stay pending.
        again: labels of rows that were written and are pending again, by a trigger.
        left_out: labels of rows that a trigger left out of the write; they stay pending.
    """

    rows: tuple[str, ...]
    changed: tuple[str, ...]
    busy: tuple[str, ...]
    again: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __add__(self, other: Written) -> Written:
        return Written(
            self.rows + other.rows,
            self.changed + other.changed,
            self.busy + other.busy,
            self.again + other.again,
            self.left_out + other.left_out,
        )


def label_of(keys: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[str]:
    """What a row is called in leases and failures: a JSON array of its key's parts as text."""
    return sa.cast(sa.func.jsonb_build_array(*(sa.cast(k, sa.Text) for k in keys)), sa.Text)


def shown(label: str) -> str:
    """A label for people: the key itself where it has one part."""
    parts = json.loads(label)
    return str(parts[0]) if len(parts) == 1 else label


def label_from(text: str) -> str:
    """The label that a key stands for: ``17``, or ``["eu", "17"]`` where it has parts."""
    try:
        parts = json.loads(text)
    except ValueError:
        parts = text
    if not isinstance(parts, list):
        parts = [text]
    # As PostgreSQL writes jsonb.
    return "[" + ", ".join(json.dumps(str(part), ensure_ascii=False) for part in parts) + "]"


#: Types of elements that every server numbers alike.
TEXT_OID, UUID_OID = 25, 2950
#: ``array_send``: dimensions, whether there are NULLs, type of the elements; length, lower bound.
_HEADER = struct.Struct(">iiIii")
_LENGTH = struct.Struct(">i")
_NULL = _LENGTH.pack(-1)


class WireArray:
    """The bytes of one array on their way to the server."""

    __slots__ = ("payload",)

    def __init__(self, elements: Sequence[bytes | None], element_oid: int) -> None:
        pack = _LENGTH.pack
        parts = [_NULL if element is None else pack(len(element)) + element for element in elements]
        has_null = None in elements
        axes = 1 if elements else 0
        header = _HEADER.pack(axes, has_null, element_oid, len(elements), 1)
        self.payload = header if axes else header[:12]
        if axes:
            self.payload += b"".join(parts)


class TextArray:
    """Texts on their way to the server, in the connection's encoding."""

    __slots__ = ("values",)

    def __init__(self, values: Iterable[str | None]) -> None:
        self.values = values if isinstance(values, (list, tuple)) else list(values)


class TextArrayDumper(Dumper):
    """Send ``TextArray`` in binary; the cast around it names the type."""

    format = Format.BINARY
    oid = 0

    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        connection = None if context is None else context.connection
        encoding = "utf-8" if connection is None else connection.info.encoding
        # A database without its own encoding takes bytes as they are.
        self._encoding = "utf-8" if encoding == "ascii" else encoding

    def dump(self, obj: Any) -> bytes:
        """Return the array of texts."""
        encoding = self._encoding
        elements = [None if value is None else value.encode(encoding) for value in obj.values]
        return WireArray(elements, TEXT_OID).payload


def element_of(sent: bytes) -> tuple[int, bytes]:
    """Type and bytes of the element of an array of one, as ``array_send`` gives it.

    So a value of any type comes and goes again exactly, whatever the session's formats are.
    """
    _, _, oid, _, _ = _HEADER.unpack_from(sent)
    return oid, sent[_HEADER.size + _LENGTH.size :]


class ArrayOf(UserDefinedType[Any]):
    """The type of a parameter that is a ``WireArray`` or ``TextArray``; see ``register``.

    Args:
        element: SQL name of the element's type, as ``format_type`` spells it on this server.
    """

    cache_ok = True
    render_bind_cast = True

    def __init__(self, element: str) -> None:
        self.element = element

    def get_col_spec(self, **_: object) -> str:
        """The type as a cast spells it."""
        return f"{self.element}[]"

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        """Leave the value alone."""
        return None


def driver_connection(connection: Connection) -> psycopg.Connection[Any]:
    """The psycopg connection beneath.

    Raises:
        DeclarationError: the engine uses another driver.
    """
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise _other_driver(connection.dialect)
    return driver


def require_psycopg(engine: sa.Engine) -> None:
    """Refuse an engine that a worker cannot use, before anything is started.

    Raises:
        DeclarationError: it is asynchronous, or uses another driver than psycopg 3.
    """
    if not isinstance(engine, sa.Engine):
        raise DeclarationError(
            f"A worker needs a synchronous engine, and got {type(engine).__name__}. Create one "
            "with sqlalchemy.create_engine('postgresql+psycopg://...')."
        )
    if (engine.dialect.name, engine.dialect.driver) != ("postgresql", "psycopg"):
        raise _other_driver(engine.dialect)


def _other_driver(dialect: Dialect) -> DeclarationError:
    return DeclarationError(
        f"The engine uses {dialect.name} with the driver {dialect.driver!r}; workers and backfills "
        "need psycopg 3, over which they listen and send vectors in binary. Create an engine for "
        "them with a URL that begins with postgresql+psycopg://; the application's own may stay."
    )


def vector_of(connection: Connection, binding: Binding) -> tuple[int, str, bool]:
    """OID and name of the type of a bound column, and whether it is ``NOT NULL``.

    Raises:
        NotBoundError: the column is gone.
    """
    a = system.ATTRIBUTE.c
    row = connection.execute(
        sa.select(a.atttypid, sa.func.format_type(a.atttypid, None), a.attnotnull).where(
            a.attrelid == binding.relation, a.attname == binding.column, ~a.attisdropped
        )
    ).first()
    if row is None:
        raise NotBoundError(
            f"Column {binding} does not exist any more. Run SELECT sbert.prune_v1() if its table "
            "was dropped; if it was renamed, bind it again under its new name."
        )
    oid, name, required = row
    return oid, name, required


def register(connection: Connection) -> None:
    """Let this connection send such arrays; nothing else about it changes."""
    adapters = driver_connection(connection).adapters
    adapters.register_dumper(WireArray, WireDumper)
    adapters.register_dumper(TextArray, TextArrayDumper)
