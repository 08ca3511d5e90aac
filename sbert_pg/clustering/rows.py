"""Some rows of a table: which they are, how the server compares them, and their vectors out of it.

Vectors travel in PostgreSQL's ``COPY ... (FORMAT binary)``: an 11-byte signature, two 32-bit
integers, then for each row a 16-bit count of fields and each field as a 32-bit length and its
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import psycopg
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.orm import Mapper

from sbert_pg import distance as d
from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.errors import ClusteringError, DeclarationError
from sbert_pg.spec import Vectors
from sbert_pg.types import Vector
from sbert_pg.types.comparator import base_of, clause_of
from sbert_pg.types.vector import VectorType
from sbert_pg.types.wire import from_wire_block

Criteria = sa.ColumnElement[bool] | Sequence[sa.ColumnElement[bool]]

#: Bytes that are gathered before they are turned into an array.
BLOCK_BYTES = 8 << 20
#: Columns that are put in the order of the keys at a time.
_SORT_COLUMNS = 32
_HEADER = 19
_COPY_OUT = sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)")


def criteria_list(where: Criteria | None) -> list[sa.ColumnElement[bool]]:
    """Criteria as a list, however they were given."""
    if where is None:
        return []
    return [where] if isinstance(where, sa.ClauseElement) else list(where)


def vector_column(column: Any) -> sa.Column[Any]:
    """The column of a vector attribute, or of a column that is given as it is."""
    clause = clause_of(column)
    if not isinstance(getattr(clause, "type", None), VectorType):
        raise DeclarationError(
            f"{column!r} is not a vector column. Give a vector attribute, as in Article.embedding, "
            "or a column of type Vector or HalfVector."
        )
    base: Any = base_of(clause)
    return base  # type: ignore[no-any-return]


def mapped_vector(function: str, column: Any) -> sa.Column[Any]:
    """The column of a mapped class's vector attribute, which a function was given."""
    if not isinstance(getattr(column, "parent", None), Mapper):
        raise DeclarationError(
            f"{function}() was given {column!r}; it takes the vector attribute of a mapped class, "
            f"as in {function}(Article.embedding)."
        )
    return vector_column(column)


@dataclass(frozen=True)
class RowSet:
    """Rows with a vector that meet filters; spherical where vectors count by their direction."""

    column: sa.Column[Any]
    filters: Sequence[sa.ColumnElement[bool]] = ()
    spherical: bool = True

    @property
    def table(self) -> sa.Table:
        """The table."""
        return self.column.table

    @property
    def keys(self) -> tuple[sa.Column[Any], ...]:
        """Its key columns."""
        return tuple(self.table.primary_key)

    @property
    def wire_keys(self) -> list[sa.ColumnElement[Any]]:
        """The key as it travels, and as it is ordered."""
        return [wire_key(key) for key in self.keys]

    @property
    def dimensions(self) -> int:
        """Width of the vectors."""
        return cast("int", self.column.type.dimensions)  # type: ignore[attr-defined]

    @property
    def storage(self) -> d.Storage:
        """How the column stores them."""
        return cast("VectorType", self.column.type).storage

    @property
    def vector(self) -> sa.ColumnElement[Any]:
        """The column as ``vector``, whatever its storage."""
        if self.storage == "vector":
            return self.column
        return sa.cast(self.column, Vector(self.dimensions))

    @property
    def unit(self) -> sa.ColumnElement[Any]:
        """A row's vector as it is compared: at length one where spherical."""
        encoder = getattr(self.column.type, "encoder", None)
        is_unit = encoder is not None and encoder.normalized and self.storage == "vector"
        if not self.spherical or is_unit:
            return self.vector
        return sa.func.l2_normalize(self.vector, type_=Vector(self.dimensions))

    @cached_property
    def criteria(self) -> list[sa.ColumnElement[bool]]:
        """What a row has to meet: a vector, with a direction where that counts; the filters."""
        criteria: list[sa.ColumnElement[bool]] = [self.column.is_not(None)]
        encoder = getattr(self.column.type, "encoder", None)
        if self.spherical and (encoder is None or encoder.similarity != "cosine"):
            # A vector of zeros has no direction; a column of a cosine encoder does not take any.
            criteria.append(sa.func.vector_norm(self.vector) > 0)
        return [*criteria, *self.filters]

    def only(self, *criteria: sa.ColumnElement[bool]) -> RowSet:
        """Those of the rows that meet further criteria."""
        return RowSet(self.column, [*self.filters, *criteria], self.spherical)

    def sample(self, rows: int, total: int, seed: int = 0) -> RowSet:
        """About so many of the rows, chosen by a hash of their keys: the same on every machine."""
        if total <= rows:
            return self
        return self.only(catalog_rows.drawn(catalog_rows.label(self.keys), rows, total, seed))

    def order(self, table: sa.FromClause) -> list[sa.ColumnElement[Any]]:
        """The order of the rows: as the client has it, whatever the database's collation."""
        keys = [table.c[key.name] for key in self.keys]
        return [
            wire_key(key) if is_integer(key) else sa.collate(wire_key(key), "C") for key in keys
        ]

    @cached_property
    def vectors(self) -> sa.Subquery:
        """Keys of the rows, and ``sbert_pg_unit``: their vectors as they are compared.

        They are computed once a row: the offset keeps the planner from moving the expression to
        where it is used, once for each centroid.
        """
        return (
            sa.select(*self.keys, self.unit.label("sbert_pg_unit"))
            .where(*self.criteria)
            .offset(0)
            .subquery("vectors")
        )

    def rank(self, centroid: sa.ColumnElement[Any]) -> sa.ColumnElement[float]:
        """What orders centroids by distance from a row, computed as cheaply as can be.

        Of vectors at length one the inner product ranks as the cosine does, at a third of the cost.
        """
        operator = d.INNER_PRODUCT if self.spherical else d.L2
        unit = self.vectors.c.sbert_pg_unit
        return centroid.op(operator, precedence=5, return_type=sa.Float(53))(unit)

    def distance(self, rank: sa.ColumnElement[float]) -> sa.ColumnElement[float]:
        """The distance, cosine where spherical and else euclidean, from what ``rank`` gave."""
        return 1.0 + rank if self.spherical else rank

    def nearest(self, centroids: sa.FromClause, value: sa.ColumnElement[Any]) -> sa.FromClause:
        """The nearest centroid of the row at hand: ``value`` of its row, and ``rank``."""
        rank = self.rank(centroids.c.centroid).label("rank")
        return (
            sa.select(value.label("value"), rank)
            .select_from(centroids)
            .order_by(rank)
            .limit(1)
            .correlate(self.vectors)
            .lateral("nearest")
        )

    def count(self, connection: sa.Connection) -> int:
        """How many rows there are."""
        statement = sa.select(sa.func.count()).select_from(self.table).where(*self.criteria)
        return int(connection.scalar(statement) or 0)


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of rows, an array a column: integers as int64, everything else as objects, its text."""

    columns: tuple[npt.NDArray[Any], ...]

    def __len__(self) -> int:
        return len(self.columns[0])

    def order(self) -> npt.NDArray[np.int64]:
        """Positions in the order of the keys; text is ordered by its code points."""
        return np.lexsort(self.columns[::-1])

    def tuples(self) -> list[tuple[Any, ...]]:
        """One tuple for each row, of Python integers and texts."""
        return list(zip(*(column.tolist() for column in self.columns), strict=True))

    def take(self, positions: npt.NDArray[np.int64]) -> Keys:
        """The keys at some positions."""
        return Keys(tuple(column[positions] for column in self.columns))

    @classmethod
    def joined(cls, blocks: Sequence[Keys], width: int) -> Keys:
        """Several blocks as one; of no block, ``width`` empty columns."""
        if not blocks:
            return cls((np.empty(0, dtype=np.int64),) * width)
        columns = zip(*(block.columns for block in blocks), strict=True)
        return cls(tuple(np.concatenate(parts) for parts in columns))


#: Keys and vectors of rows, in one order; vectors are float32 of shape ``(n, dimensions)``.
Block = tuple[Keys, Vectors]


def is_integer(column: sa.ColumnElement[Any]) -> bool:
    """Whether a key column travels as a 64-bit integer."""
    return isinstance(column.type, sa.Integer)


def wire_key(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """A key column as it travels, and as it is ordered."""
    return sa.cast(column, sa.BigInteger if is_integer(column) else sa.Text)


def read_rows(connection: sa.Connection, rows: RowSet) -> Block:
    """Read keys and vectors of all rows, in the order of their keys, into one matrix.

    Takes ``4 * dimensions`` bytes a row, and its key; for a moment 4 bytes for each of
    ``_SORT_COLUMNS`` more, where the server gives the rows in another order. All rows are seen at
    one moment, whatever the isolation level.
    """
    vectors = np.empty((rows.count(connection), rows.dimensions), dtype=np.float32)
    parts: list[Keys] = []
    read = 0
    for keys, part in read_blocks(connection, rows):
        end = read + len(keys)
        if end > len(vectors):
            # Rows were inserted after they had been counted.
            more = np.empty((end + len(keys) - read, rows.dimensions), np.float32)
            vectors = np.concatenate([vectors[:read], more])
        vectors[read:end] = part
        parts.append(keys)
        read = end
    keys, vectors = Keys.joined(parts, len(rows.keys)), vectors[:read]
    order = keys.order()
    if np.array_equal(order, np.arange(read)):
        return keys, vectors
    # A few columns at a time: all at once would take the matrix a second time.
    for start in range(0, rows.dimensions, _SORT_COLUMNS):
        columns = slice(start, start + _SORT_COLUMNS)
        vectors[:, columns] = vectors[order, columns]
    return keys.take(order), vectors


def read_blocks(connection: sa.Connection, rows: RowSet) -> Iterator[Block]:
    """As ``read_rows``, in blocks of some megabytes, in memory that does not grow with the
    table.
    """
    # Without its type the column goes out as it is, not through vector_send, which would copy it.
    raw = sa.type_coerce(rows.column, sa.types.NullType())
    statement = _literal(connection, sa.select(*rows.wire_keys, raw).where(*rows.criteria))
    integers = [is_integer(key) for key in rows.keys]
    together = max(1, BLOCK_BYTES // (4 * rows.dimensions))
    with binary_cursor(connection).copy(_COPY_OUT.format(sql.SQL(statement))) as copy:
        if all(integers):
            yield from _fixed_rows(copy, rows, together)
            return
        copy.set_types([*("int8" if integer else "text" for integer in integers), "bytea"])
        fields = copy.rows()
        while part := list(islice(fields, together)):
            *keys, vectors = zip(*part, strict=True)
            columns = tuple(
                np.array(key, dtype=np.int64 if integer else object)
                for key, integer in zip(keys, integers, strict=True)
            )
            matrix = from_wire_block(b"".join(vectors), rows.dimensions, rows.storage)
            yield Keys(columns), matrix


def _fixed_rows(copy: psycopg.Copy, rows: RowSet, together: int) -> Iterator[Block]:
    """Rows whose keys are whole numbers: all have one length, so that a block is one array."""
    fields: list[tuple[Any, ...]] = [("fields", ">i2")]
    for number in range(len(rows.keys)):
        fields += [(f"length{number}", ">i4"), (f"key{number}", ">i8")]
    vector = ("vector", d.ELEMENT[rows.storage], (rows.dimensions,))
    row = np.dtype([*fields, ("length", ">i4"), ("header", ">u2", (2,)), vector])
    # The server sends a row at a time, the signature with the first one, and a trailer.
    sent, skip = iter(copy), _HEADER
    while data := b"".join(map(bytes, islice(sent, together)))[skip:]:
        skip = 0
        table = np.frombuffer(data, dtype=row, count=len(data) // row.itemsize)
        keys = tuple(table[f"key{n}"].astype(np.int64) for n in range(len(rows.keys)))
        yield Keys(keys), table["vector"].astype(np.float32)


def fetch_binary(connection: sa.Connection, statement: sa.Select[Any]) -> list[tuple[Any, ...]]:
    """Rows of a statement over a binary cursor: bytes arrive as they are, not as hexadecimal."""
    with binary_cursor(connection) as cursor:
        cursor.execute(_literal(connection, statement))
        return cast("list[tuple[Any, ...]]", cursor.fetchall())


def _literal(connection: sa.Connection, statement: sa.Select[Any]) -> str:
    # COPY takes no parameters, so literals are rendered: by the connection's own dialect, which
    # knows how its server reads backslashes.
    schemas = connection.get_execution_options().get("schema_translate_map")
    compiled = statement.compile(
        dialect=connection.dialect,
        compile_kwargs={"literal_binds": True},
        schema_translate_map=schemas,
        render_schema_translate=schemas is not None,
    )
    # The dialect doubles percents for psycopg, which halves them only where there are parameters.
    return str(compiled).replace("%%", "%")


def binary_cursor(connection: sa.Connection) -> psycopg.Cursor[Any]:
    """A cursor of the driver's, psycopg 3, for COPY and for results in binary."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise ClusteringError(
            f"Vectors are read through psycopg 3, and this engine uses {type(driver).__module__}. "
            "Create the engine with a URL that begins with postgresql+psycopg://; with an "
            "asynchronous engine, give a synchronous one of the same URL."
        )
    return driver.cursor(binary=True)
