"""Near-duplicates as a table of the application: pairs, and the groups that they form."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Mapper, foreign, relationship

from sbert_pg.clustering.declaration import Criteria
from sbert_pg.clustering.duplicates import (
    NEIGHBOURS,
    DuplicateMethod,
    Pair,
    duplicate_pairs,
    groups_of,
    index_recall,
)
from sbert_pg.clustering.storing import insert_or_retry
from sbert_pg.clustering.tables import identifier, references
from sbert_pg.clustering.transfer import is_integer, write_block
from sbert_pg.errors import DeclarationError

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapped


class Duplicate:
    """A pair of rows that are nearly the same. Subclasses are mapped by ``duplicates_of``.

    Attributes:
        similarity: cosine similarity.
        group_number: number of the group that the pair belongs to; groups are numbered from the
            largest.
        a: the one row.
        b: the other row.
    """

    similarity: Mapped[float]
    group_number: Mapped[int]
    a: Mapped[Any]
    b: Mapped[Any]


@dataclass(frozen=True, eq=False)
class DuplicateTable:
    """The near-duplicates of one column; made by ``duplicates_of``.

    Attributes:
        column: the vector attribute.
        Duplicate: mapped class of the pairs.
    """

    column: Any
    Duplicate: type[Duplicate]

    @property
    def table(self) -> sa.Table:
        """The table of pairs."""
        table = sa.inspect(self.Duplicate).local_table
        assert isinstance(table, sa.Table)
        return table


@dataclass(frozen=True, slots=True)
class DuplicateReport:
    """What ``find_duplicates`` found.

    Attributes:
        pairs: pairs that were stored.
        groups: groups that they form.
        rows: rows in a group.
        recall: share of all pairs that were found; 1 for ``exact``, measured on a sample of rows
            for ``index``, ``None`` where the sample is in no pair.
        seconds: time taken.
    """

    pairs: int
    groups: int
    rows: int
    recall: float | None
    seconds: float


def duplicates_of(column: Any, *, name: str | None = None) -> DuplicateTable:
    """Declare a table for the near-duplicates of a vector column, beside its class.

    Args:
        column: the attribute of a mapped class, as in ``duplicates_of(Article.embedding)``.
        name: name of the table; the table's name and ``_duplicate`` by default.

    Raises:
        DeclarationError: the column is no attribute of a mapped class, or the name is too long.
    """
    entity = getattr(column, "parent", None)
    if not isinstance(entity, Mapper):
        raise DeclarationError(
            f"duplicates_of() was given {column!r}; it takes the vector attribute of a mapped "
            "class, as in duplicates_of(Article.embedding)."
        )
    base = next(c for c in column.__clause_element__().base_columns if isinstance(c, sa.Column))
    rows = base.table
    table_name = identifier(name or f"{rows.name}_duplicate")
    a, b = references(rows, "a_", nullable=False), references(rows, "b_", nullable=False)
    keys = list(rows.primary_key)
    table = sa.Table(
        table_name,
        rows.metadata,
        *a,
        *b,
        sa.Column("similarity", sa.REAL, nullable=False),
        sa.Column("group_number", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint(*(c.name for c in (*a, *b))),
        sa.ForeignKeyConstraint([c.name for c in a], keys, ondelete="CASCADE"),
        sa.ForeignKeyConstraint([c.name for c in b], keys, ondelete="CASCADE"),
        sa.Index(identifier(f"ix_{table_name}_b"), *(c.name for c in b)),
        schema=rows.schema,
    )
    mapped = type(
        "".join(part[:1].upper() + part[1:] for part in table_name.split("_")),
        (Duplicate,),
        {"__module__": entity.class_.__module__, "__doc__": Duplicate.__doc__},
    )

    def row(prefix: str) -> Any:
        joined = sa.and_(*(foreign(table.c[prefix + key.name]) == key for key in keys))
        return relationship(entity, primaryjoin=joined, viewonly=True)

    entity.registry.map_imperatively(mapped, table, properties={"a": row("a_"), "b": row("b_")})
    return DuplicateTable(column, mapped)


def find_duplicates(
    connection: sa.Connection,
    duplicates: DuplicateTable,
    *,
    threshold: float = 0.9,
    where: Criteria | None = None,
    method: DuplicateMethod = "exact",
    neighbours: int = NEIGHBOURS,
) -> DuplicateReport:
    """Find near-duplicates and store them in place of those that were stored before.

    Readers see the old pairs until the caller commits. Arguments are those of ``duplicate_pairs``.

    Raises:
        DeclarationError: the threshold is no cosine.
        ClusteringError: ``"index"`` was asked for and no suitable index is declared.
        MissingExtraError: the extra ``clustering`` is not installed.
    """
    began = time.perf_counter()
    pairs = list(
        duplicate_pairs(
            connection,
            duplicates.column,
            threshold=threshold,
            where=where,
            method=method,
            neighbours=neighbours,
        )
    )
    recall: float | None = 1.0
    if method == "index":
        recall = index_recall(
            connection,
            duplicates.column,
            threshold=threshold,
            where=where,
            neighbours=neighbours,
        )
    groups = groups_of(pairs)
    number = {key: number for number, group in enumerate(groups, 1) for key in group}
    connection.execute(sa.delete(duplicates.table))
    stored = _store(connection, duplicates.table, pairs, [number[pair.a] for pair in pairs])
    return DuplicateReport(
        pairs=stored,
        groups=len(groups),
        rows=len(number),
        recall=recall,
        seconds=time.perf_counter() - began,
    )


def _store(connection: sa.Connection, table: sa.Table, pairs: list[Pair], groups: list[int]) -> int:
    """Store pairs whose rows are both there still."""
    rows = next(iter(table.foreign_key_constraints)).referred_table
    keys = list(rows.primary_key)
    width = len(keys)
    references = list(table.columns)[: 2 * width]
    staged = sa.Table(
        "sbert_pg_pair",
        sa.MetaData(),
        *(
            sa.Column(f"key_{i}", sa.BigInteger() if is_integer(column) else sa.Text())
            for i, column in enumerate(references)
        ),
        sa.Column("similarity", sa.REAL),
        sa.Column("group_number", sa.Integer),
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )
    staged.create(connection, checkfirst=False)
    columns: list[list[Any]] = [[] for _ in references]
    for pair in pairs:
        parts = (pair.a, pair.b) if width == 1 else (*pair.a, *pair.b)
        for column, reference, part in zip(columns, references, parts, strict=True):
            column.append(part if is_integer(reference) else str(part))
    similarities = np.array([pair.similarity for pair in pairs], dtype=np.float32)
    write_block(connection, staged, list(staged.columns), [*columns, similarities, groups])
    one, two = rows.alias("one"), rows.alias("two")
    own = [sa.cast(staged.c[f"key_{i}"], c.type) for i, c in enumerate(references)]
    statement = (
        sa.select(*own, staged.c.similarity, staged.c.group_number)
        .join_from(staged, one, sa.and_(*(own[i] == one.c[key.name] for i, key in enumerate(keys))))
        .join(two, sa.and_(*(own[width + i] == two.c[key.name] for i, key in enumerate(keys))))
    )
    locked = statement.with_for_update(key_share=True, read=True, of=[one, two])
    names = [column.name for column in table.columns]
    stored = insert_or_retry(
        connection,
        sa.insert(table).from_select(names, statement),
        sa.insert(table).from_select(names, locked),
    )
    staged.drop(connection)
    return stored
