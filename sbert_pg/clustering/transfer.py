"""Vectors out of the server and assignments into it, in binary, in blocks.

Format: PostgreSQL's ``COPY ... (FORMAT binary)``: an 11-byte signature, two 32-bit integers, then
for each row a 16-bit count of fields and each field as a 32-bit length and its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from sbert_pg.distance import Storage
from sbert_pg.errors import ClusteringError
from sbert_pg.types.wire import ELEMENT, HEADER_BYTES

Vectors = npt.NDArray[np.float32]
KeyColumn = npt.NDArray[np.int64] | list[str]

#: Bytes that are gathered before they are turned into an array.
BLOCK_BYTES = 8 << 20
#: Columns that are put in the order of the keys at a time.
_SORT_COLUMNS = 32
_PSYCOPG = postgresql.psycopg.dialect()  # type: ignore[no-untyped-call]
_HEADER = 19
_LENGTH = struct.Struct(">i")
_COPIED = {
    "SMALLINT": "int2",
    "INTEGER": "int4",
    "BIGINT": "int8",
    "TEXT": "text",
    "VARCHAR": "text",
    "REAL": "float4",
    "BOOLEAN": "bool",
}


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of rows, column by column: integers as an array, everything else as its text.

    Attributes:
        columns: one entry for each key column, all of one length.
    """

    columns: tuple[KeyColumn, ...]

    def __len__(self) -> int:
        return len(self.columns[0])

    def order(self) -> npt.NDArray[np.int64]:
        """Positions in the order of the keys; text is ordered by its code points."""
        if all(isinstance(column, np.ndarray) for column in self.columns):
            arrays = cast("tuple[npt.NDArray[np.int64], ...]", self.columns)
            return np.lexsort(arrays[::-1])
        rows = list(self.tuples())
        return np.array(sorted(range(len(rows)), key=rows.__getitem__), dtype=np.int64)

    def tuples(self) -> Iterator[tuple[Any, ...]]:
        """One tuple for each row, of Python integers and texts."""
        lists = [c.tolist() if isinstance(c, np.ndarray) else c for c in self.columns]
        return zip(*lists, strict=True)

    def take(self, positions: npt.NDArray[np.int64]) -> Keys:
        """The keys at some positions."""
        return Keys(
            tuple(
                column[positions]
                if isinstance(column, np.ndarray)
                else [column[position] for position in positions]
                for column in self.columns
            )
        )

    def at(self, position: int) -> tuple[Any, ...]:
        """The key of one row."""
        return tuple(
            int(column[position]) if isinstance(column, np.ndarray) else column[position]
            for column in self.columns
        )

    @classmethod
    def joined(cls, parts: Sequence[Keys], width: int) -> Keys:
        """Several blocks as one."""
        columns: list[KeyColumn] = []
        for number in range(width):
            blocks = [part.columns[number] for part in parts]
            if blocks and isinstance(blocks[0], list):
                columns.append([key for block in blocks for key in block])
            else:
                arrays = [np.asarray(block, dtype=np.int64) for block in blocks]
                columns.append(np.concatenate([np.empty(0, np.int64), *arrays]))
        return cls(tuple(columns))


@dataclass(frozen=True, slots=True)
class Rows:
    """Keys and vectors of rows, in one order.

    Attributes:
        keys: their keys.
        vectors: float32 array of shape ``(n, dimensions)``.
    """

    keys: Keys
    vectors: Vectors


def is_integer(column: sa.ColumnElement[Any]) -> bool:
    """Whether a key column travels as a 64-bit integer."""
    return isinstance(column.type, sa.Integer)


def wire_key(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """A key column as it travels, and as it is ordered."""
    return sa.cast(column, sa.BigInteger if is_integer(column) else sa.Text)


def read_rows(
    connection: sa.Connection,
    keys: Sequence[sa.ColumnElement[Any]],
    column: sa.ColumnElement[Any],
    criteria: Sequence[sa.ColumnElement[bool]],
) -> Rows:
    """Read keys and vectors of every row that meets the criteria, into one matrix.

    Takes ``4 * dimensions`` bytes a row, and its key; for a moment 4 bytes for each of
    ``_SORT_COLUMNS`` more, where the server gives the rows in another order than that of their
    keys. All rows are seen at one moment, whatever the isolation level. They come out in the order
    of their keys.

    Raises:
        ClusteringError: the connection is no psycopg connection.
    """
    count = connection.scalar(
        sa.select(sa.func.count()).select_from(*_froms(column)).where(*criteria)
    )
    dimensions = column.type.dimensions  # type: ignore[attr-defined]
    vectors = np.empty((int(count or 0), dimensions), dtype=np.float32)
    parts: list[Keys] = []
    read = 0
    for block in read_blocks(connection, keys, column, criteria):
        end = read + len(block.keys)
        if end > len(vectors):
            # Rows were inserted after they had been counted.
            vectors = np.concatenate(
                [vectors[:read], np.empty((end + len(block.keys) - read, dimensions), np.float32)]
            )
        vectors[read:end] = block.vectors
        parts.append(block.keys)
        read = end
    found = Keys.joined(parts, len(keys))
    order = found.order()
    if np.array_equal(order, np.arange(read)):
        return Rows(found, vectors[:read])
    vectors = vectors[:read]
    # A few columns at a time: all at once would take the matrix a second time.
    for start in range(0, dimensions, _SORT_COLUMNS):
        columns = slice(start, start + _SORT_COLUMNS)
        vectors[:, columns] = vectors[order, columns]
    return Rows(found.take(order), vectors)


def read_blocks(
    connection: sa.Connection,
    keys: Sequence[sa.ColumnElement[Any]],
    column: sa.ColumnElement[Any],
    criteria: Sequence[sa.ColumnElement[bool]],
) -> Iterator[Rows]:
    """As ``read_rows``, in blocks of some megabytes, in memory that does not grow with the
    table.
    """
    storage: Storage = column.type.storage  # type: ignore[attr-defined]
    dimensions = column.type.dimensions  # type: ignore[attr-defined]
    # Without its type the column goes out as it is, not through vector_send, which would copy it.
    raw = sa.type_coerce(column, sa.types.NullType())
    statement = sa.select(*(wire_key(key) for key in keys), raw).where(*criteria)
    layout = _Layout([is_integer(key) for key in keys], dimensions, storage)
    waiting: list[bytes] = []
    size, skip = 0, _HEADER
    with _cursor(connection).copy(_copy_out(statement)) as copy:
        for data in copy:
            waiting.append(bytes(data))
            size += len(data)
            if size >= BLOCK_BYTES:
                yield layout.parse(b"".join(waiting)[skip:])
                waiting, size, skip = [], 0, 0
    rest = b"".join(waiting)[skip:]
    if len(rest) > 2:
        yield layout.parse(rest)


def copy_type(connection: sa.Connection, column: sa.ColumnElement[Any]) -> str | None:
    """The type by which values of a column are copied into it, or ``None`` where there is none."""
    name = column.type.compile(connection.dialect)
    return _COPIED.get(name.partition("(")[0])


def write_block(
    connection: sa.Connection,
    table: sa.Table,
    columns: Sequence[sa.Column[Any]],
    values: Sequence[Iterable[Any]],
) -> None:
    """Copy values of equal length into columns of whole numbers, ``text``, ``real`` or
    ``boolean``.
    """
    names = ", ".join(connection.dialect.identifier_preparer.quote(c.name) for c in columns)
    statement = f"COPY {_quoted(connection, table)} ({names}) FROM STDIN (FORMAT binary)"
    lists = [part.tolist() if isinstance(part, np.ndarray) else part for part in values]
    with _cursor(connection).copy(statement) as copy:
        copy.set_types([copy_type(connection, column) for column in columns])
        write = copy.write_row
        for row in zip(*lists, strict=True):
            write(row)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How one row of the copy is laid out."""

    integers: list[bool]
    dimensions: int
    storage: Storage

    def parse(self, data: bytes) -> Rows:
        """Rows of a block that begins with a row; a trailer at its end is left out."""
        return self._fixed(data) if all(self.integers) else self._varying(data)

    def _fixed(self, data: bytes) -> Rows:
        fields: list[tuple[Any, ...]] = [("fields", ">i2")]
        for number in range(len(self.integers)):
            fields += [(f"length{number}", ">i4"), (f"key{number}", ">i8")]
        fields += [
            ("length", ">i4"),
            ("header", ">u2", (2,)),
            ("vector", ELEMENT[self.storage], (self.dimensions,)),
        ]
        row = np.dtype(fields)
        found = np.frombuffer(data, dtype=row, count=len(data) // row.itemsize)
        keys = tuple(found[f"key{number}"].astype(np.int64) for number in range(len(self.integers)))
        return Rows(Keys(keys), found["vector"].astype(np.float32))

    def _varying(self, data: bytes) -> Rows:
        """Keys of any length: walk over the rows, then view all vectors at once."""
        keys: list[list[bytes]] = [[] for _ in self.integers]
        width = self.dimensions * ELEMENT[self.storage].itemsize
        vectors: list[bytes] = []
        position, length_of = 2, _LENGTH.unpack_from
        while position < len(data):
            for column in keys:
                (length,) = length_of(data, position)
                column.append(data[position + 4 : position + 4 + length])
                position += 4 + length
            start = position + 4 + HEADER_BYTES
            vectors.append(data[start : start + width])
            position = start + width + 2
        matrix = np.frombuffer(b"".join(vectors), dtype=ELEMENT[self.storage])
        columns: list[KeyColumn] = []
        for integer, column in zip(self.integers, keys, strict=True):
            if integer:
                columns.append(np.frombuffer(b"".join(column), dtype=">i8").astype(np.int64))
            else:
                columns.append([key.decode() for key in column])
        return Rows(Keys(tuple(columns)), matrix.reshape(-1, self.dimensions).astype(np.float32))


def fetch_binary(connection: sa.Connection, statement: sa.Select[Any]) -> list[tuple[Any, ...]]:
    """Rows of a statement over a binary cursor: bytes arrive as they are, not as hexadecimal."""
    with _cursor(connection, binary=True) as cursor:
        cursor.execute(_literal(statement))
        return cast("list[tuple[Any, ...]]", cursor.fetchall())


def _copy_out(statement: sa.Select[Any]) -> str:
    return f"COPY ({_literal(statement)}) TO STDOUT (FORMAT binary)"


def _literal(statement: sa.Select[Any]) -> str:
    # COPY takes no parameters, so literals are rendered.
    compiled = statement.compile(dialect=_PSYCOPG, compile_kwargs={"literal_binds": True})
    # The dialect doubles percents for psycopg, which halves them only where there are parameters.
    return str(compiled).replace("%%", "%")


def _froms(column: sa.ColumnElement[Any]) -> list[Any]:
    return [column.table] if isinstance(column, sa.Column) else []


def _quoted(connection: sa.Connection, table: sa.Table) -> str:
    return str(connection.dialect.identifier_preparer.format_table(table))


def _cursor(connection: sa.Connection, *, binary: bool = False) -> Any:
    driver = connection.connection.driver_connection
    if not hasattr(driver, "pgconn") or not hasattr(driver, "info") or _is_async(driver):
        raise ClusteringError(
            f"Vectors are read through psycopg 3, and this engine uses {type(driver).__module__}. "
            "Create the engine with a URL that begins with postgresql+psycopg://; with an "
            "asynchronous engine, give a synchronous one of the same URL."
        )
    return cast("Any", driver).cursor(binary=binary)


def _is_async(driver: Any) -> bool:
    return "Async" in type(driver).__name__
