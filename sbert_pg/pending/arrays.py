"""Many vectors as one parameter: PostgreSQL's binary array format around pgvector's.

One statement with ``unnest`` writes a batch as fast as COPY into a side table and an update from it
do, without the side table.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.types import UserDefinedType

from sbert_pg.errors import ServerError

#: ``array_send``: dimensions, whether there are NULLs, type of the elements; length, lower bound.
_HEADER = struct.Struct(">iiIii")
_LENGTH = struct.Struct(">i")
_NULL = _LENGTH.pack(-1)


class WireArray:
    """The bytes of one array on their way to the server."""

    __slots__ = ("payload",)

    def __init__(self, elements: Sequence[bytes | None], element_oid: int) -> None:
        parts: list[bytes] = []
        for element in elements:
            if element is None:
                parts.append(_NULL)
            else:
                parts.append(_LENGTH.pack(len(element)))
                parts.append(element)
        has_null = any(element is None for element in elements)
        axes = 1 if elements else 0
        header = _HEADER.pack(axes, has_null, element_oid, len(elements), 1)
        self.payload = header if axes else header[:12]
        if axes:
            self.payload += b"".join(parts)


class WireArrayDumper(Dumper):
    """Send ``WireArray`` in binary; the cast around it names the type."""

    format = Format.BINARY
    oid = 0

    def dump(self, obj: Any) -> bytes:
        """Return the bytes that were prepared."""
        payload: bytes = obj.payload
        return payload


class VectorArray(UserDefinedType[WireArray]):
    """The type of a parameter that is an array of vectors.

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
        ServerError: the engine uses another driver.
    """
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise ServerError(
            f"The engine uses the driver {connection.dialect.driver!r}; the worker and the "
            "backfill need psycopg 3. Create the engine with a URL that begins with postgresql+psycopg://."
        )
    return driver


def register(connection: Connection) -> None:
    """Let this connection send ``WireArray``; nothing else about it changes."""
    driver_connection(connection).adapters.register_dumper(WireArray, WireArrayDumper)


__all__ = ["VectorArray", "WireArray", "driver_connection", "register"]
