"""Reading a table's vectors in bounded memory, block by block, all from one snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA

from sbert_pg.catalog import Binding
from sbert_pg.spec import Vectors
from sbert_pg.types import Embedding, wire

#: Rows of one block: at 384 dimensions it is 8 MB a column.
BLOCK = 5_000


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a table in the order of their key.

    Attributes:
        keys: the rows' keys, as ``sbert.pending`` has them.
        vectors: for each column a float32 array of shape ``(rows, dimensions)``, zeros where
            ``present`` says that there is none.
        present: for each column which rows have a vector, shape ``(rows,)``.
        flags: for each criterion which rows meet it, shape ``(rows,)``.
    """

    keys: list[str]
    vectors: tuple[Vectors, ...]
    present: tuple[npt.NDArray[np.bool_], ...]
    flags: tuple[npt.NDArray[np.bool_], ...]


def blocks(
    connection: sa.Connection,
    table: sa.Table,
    binding: Binding,
    columns: Sequence[sa.Column[Any]],
    flags: Sequence[sa.ColumnElement[bool]] = (),
    size: int = BLOCK,
) -> Iterator[Block]:
    """All rows that have a vector in the first of the columns, in the order of their key.

    Args:
        connection: where; in a transaction of isolation level ``REPEATABLE READ`` all blocks show
            the same moment.
        table: the table.
        binding: a binding of the table, for its key.
        columns: embedding columns to read.
        flags: criteria to evaluate for each row.
        size: rows a block.
    """
    last: Sequence[Any] | None = None
    while True:
        statement = _block(table, binding, columns, flags, size, last)
        row = connection.execute(statement).one()._mapping
        if not row["texts"]:
            return
        count = len(row["texts"])
        read = [_vectors(row, i, column, count) for i, column in enumerate(columns)]
        yield Block(
            keys=row["texts"],
            vectors=tuple(vectors for vectors, _ in read),
            present=tuple(present for _, present in read),
            flags=tuple(np.asarray(row[f"flag_{i}"], bool) for i in range(len(flags))),
        )
        if count < size:
            return
        last = [row[f"last_{i}"] for i in range(len(binding.key_columns))]


def _block(
    table: sa.Table,
    binding: Binding,
    columns: Sequence[sa.Column[Any]],
    flags: Sequence[sa.ColumnElement[bool]],
    size: int,
    last: Sequence[Any] | None,
) -> sa.Select[Any]:
    keys = [table.c[name] for name in binding.key_columns]
    inner = (
        sa.select(
            binding.key_text(table).label("text"),
            *(column.label(f"key_{i}") for i, column in enumerate(keys)),
            *(_sent(column).label(f"vector_{i}") for i, column in enumerate(columns)),
            *(sa.func.coalesce(flag, False).label(f"met_{i}") for i, flag in enumerate(flags)),
        )
        .where(columns[0].is_not(None))
        .order_by(*keys)
        .limit(size)
    )
    if last is not None:
        inner = inner.where(after(keys, last))
    # An aggregate takes its rows in the order of the subquery, which the key's index gives.
    rows = inner.subquery("rows")
    outer: list[sa.ColumnElement[Any]] = [sa.func.array_agg(rows.c.text).label("texts")]
    for i, key in enumerate(keys):
        ordered = sa.func.array_agg(rows.c[f"key_{i}"], type_=ARRAY(key.type))
        outer.append(ordered[sa.func.count()].label(f"last_{i}"))
    for i in range(len(columns)):
        vector, nothing = rows.c[f"vector_{i}"], sa.cast(b"", BYTEA)
        outer.append(sa.func.string_agg(vector, nothing, type_=BYTEA()).label(f"bytes_{i}"))
        outer.append(sa.func.array_agg(vector.is_not(None)).label(f"present_{i}"))
    for i in range(len(flags)):
        outer.append(sa.func.array_agg(rows.c[f"met_{i}"]).label(f"flag_{i}"))
    return sa.select(*outer)


def after(columns: Sequence[sa.ColumnElement[Any]], last: Sequence[Any]) -> Any:
    """Whether a row comes after a key, as one comparison that the key's index serves."""
    if len(columns) == 1:
        return columns[0] > sa.literal(last[0], columns[0].type)
    values = [sa.literal(value, c.type) for c, value in zip(columns, last, strict=True)]
    return sa.tuple_(*columns) > sa.tuple_(*values)


def _sent(column: sa.Column[Any]) -> sa.ColumnElement[bytes]:
    half = getattr(column.type, "storage", "vector") == "halfvec"
    return (sa.func.halfvec_send if half else sa.func.vector_send)(column, type_=BYTEA())


def _vectors(
    row: sa.RowMapping, position: int, column: sa.Column[Any], rows: int
) -> tuple[Vectors, npt.NDArray[np.bool_]]:
    type_ = column.type
    assert isinstance(type_, Embedding)
    present = np.asarray(row[f"present_{position}"], bool)
    vectors = np.zeros((rows, type_.encoder.dimensions), dtype=np.float32)
    payload = row[f"bytes_{position}"]
    if payload is not None:
        vectors[present] = wire.from_wire_block(payload, type_.encoder.dimensions, type_.storage)
    return vectors, present


def sample(
    connection: sa.Connection,
    table: sa.Table,
    binding: Binding,
    columns: Sequence[sa.ColumnElement[Any]],
    where: Sequence[sa.ColumnElement[bool]],
    size: int,
    rows: int,
    seed: int = 0,
) -> list[Any]:
    """Random rows: the key as text, followed by the columns asked for.

    Args:
        connection: where.
        table: the table.
        binding: a binding of the table, for its key.
        columns: what to read; every column has to be the table's.
        where: criteria of the rows to choose from.
        size: rows wanted; fewer come where fewer meet the criteria.
        rows: rows of the table, roughly, for the share to look at.
        seed: another seed gives other rows.
    """
    key = binding.key_text(table)
    order = sa.func.md5(sa.func.concat(sa.cast(sa.literal(seed), sa.Text()), key))
    statement = sa.select(key, *columns).where(*where).order_by(order).limit(size)
    share = min(100.0, 100.0 * size * 8 / max(rows, 1))
    if share < 50:
        # The keys of some pages' rows, so that a large table is not sorted for a small sample.
        lucky = table.tablesample(
            sa.func.bernoulli(sa.literal_column(f"{share:.6f}", sa.Float())),
            name="lucky",
            seed=sa.literal_column(str(int(seed)), sa.Integer()),
        )
        left = sa.tuple_(*(table.c[name] for name in binding.key_columns))
        chosen = sa.select(*(lucky.c[name] for name in binding.key_columns))
        narrowed = statement.where(left.in_(chosen))
        found = connection.execute(narrowed).all()
        if len(found) >= size:
            return list(found)
    return list(connection.execute(statement).all())
