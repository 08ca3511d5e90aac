"""Near-duplicates: all pairs of rows above a similarity, the groups that they form, and both as a
table of the application.

A long module, since the exact comparison, the one through the index and the table share one form
of keys.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from sbert_pg import distance as d
from sbert_pg.clustering.kmeans import normalize, worker_threads
from sbert_pg.clustering.placing import insert_referring
from sbert_pg.clustering.rows import (
    Criteria,
    RowSet,
    criteria_list,
    is_integer,
    mapped_vector,
    read_rows,
    vector_column,
    wire_key,
)
from sbert_pg.clustering.tables import identifier, map_beside, table_of
from sbert_pg.errors import ClusteringError, DeclarationError
from sbert_pg.system import configure
from sbert_pg.types.comparator import apply_operator, served_distance
from sbert_pg.types.indexed import index_on

Key = Any
DuplicateMethod = Literal["exact", "index"]

#: Elements of one block's matrix of similarities.
_BLOCK_ELEMENTS = 1 << 23
#: Nearest rows that the index is asked for, for each row.
NEIGHBOURS = 20
#: Candidates of an HNSW scan.
_EF_SEARCH = 200
#: Rows whose pairs are compared with an exact search, to measure the index's recall.
RECALL_ROWS = 200
#: Pairs that are compared for that, at most: of equal rows there are squares of them.
_RECALL_PAIRS = 20_000
#: Pairs that are stored, at most.
MAX_PAIRS = 5_000_000


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows that are nearly the same.

    Attributes:
        similarity: their cosine similarity.
        a: key of the one, smaller than ``b``; a tuple where the key has several columns.
        b: key of the other.
    """

    similarity: float
    a: Key
    b: Key


class Duplicate:
    """A pair of rows that are nearly the same. Subclasses are mapped by ``duplicates_of``.

    Attributes:
        similarity: cosine similarity.
        group_number: number of the group that both rows belong to, numbered from the largest;
            ``None`` where they are in different ones.
        a: the one row.
        b: the other row.
    """

    similarity: Mapped[float] = mapped_column(sa.REAL)
    group_number: Mapped[int | None] = mapped_column(sa.Integer)
    if TYPE_CHECKING:
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
        return table_of(self.Duplicate)


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


def duplicate_pairs(
    connection: sa.Connection,
    column: Any,
    *,
    threshold: float = 0.9,
    where: Criteria | None = None,
    method: DuplicateMethod = "exact",
    neighbours: int = NEIGHBOURS,
) -> Iterator[Pair]:
    """All pairs of rows whose cosine similarity is at least a threshold.

    ``exact`` reads the vectors into this process (4 bytes a dimension and row) and compares all
    with all by blocks; it finds every pair, at a cost that grows with the square of the rows.
    ``index`` asks the column's index for the nearest rows of each row: no vector leaves the server
    and the cost grows almost linearly, but it misses pairs, namely beyond ``neighbours`` and where
    the index does; ``index_recall`` measures how many.

    Args:
        connection: a connection in a transaction.
        column: a vector attribute or column.
        threshold: least similarity.
        where: criteria that both rows have to meet.
        method: ``"exact"`` or ``"index"``.
        neighbours: for ``"index"``, rows that are compared with each row.

    Yields:
        Each pair once, in no particular order.

    Raises:
        DeclarationError: the threshold is not a cosine, or the column is not a vector column.
        ClusteringError: ``"index"`` was asked for and no suitable index is declared.
        MissingExtraError: the extra ``clustering`` is not installed.
    """
    rows = rows_of(column, threshold, where)
    pairs = pairs_of(connection, rows, threshold, method, neighbours)
    return _with_application_keys(connection, rows, pairs)


def duplicates_of(column: Any, *, name: str | None = None) -> DuplicateTable:
    """Declare a table for the near-duplicates of a vector column, beside its class.

    Args:
        column: the attribute of a mapped class, as in ``duplicates_of(Article.embedding)``.
        name: name of the table; the table's name and ``_duplicate`` by default.

    Raises:
        DeclarationError: the column is not an attribute of a mapped class, or the name is too long.
    """
    rows, mapper = mapped_vector("duplicates_of", column).table, column.parent
    name = name or f"{rows.name}_duplicate"
    a, b = ([f"{end}_{key.name}" for key in rows.primary_key] for end in "ab")
    key, index = sa.PrimaryKeyConstraint(*a, *b), sa.Index(identifier(f"ix_{name}_b"), *b)
    ends = {"a": "CASCADE", "b": "CASCADE"}
    mapped = map_beside(Duplicate, mapper, rows, name, key, index, references=ends)
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

    Readers see the old pairs until the caller commits. Arguments are those of ``duplicate_pairs``
    and ``groups_of``.

    Raises:
        DeclarationError: the threshold is not a cosine.
        ClusteringError: there are more than five million pairs; or ``"index"`` was asked for and no
            suitable index is declared.
        MissingExtraError: the extra ``clustering`` is not installed.
    """
    began = time.perf_counter()
    rows = rows_of(duplicates.column, threshold, where)
    pairs: list[Pair] = []
    for pair in pairs_of(connection, rows, threshold, method, neighbours):
        pairs.append(pair)
        if len(pairs) > MAX_PAIRS:
            raise ClusteringError(
                f"There are more than {MAX_PAIRS:,} pairs above {threshold}, as many equal rows "
                "make. Raise the threshold, or leave equal rows out with where=."
            )
    recall: float | None = 1.0
    if method == "index":
        recall = index_recall(
            connection, duplicates.column, threshold=threshold, where=where, neighbours=neighbours
        )
    groups = groups_of(pairs)
    number = {key: number for number, group in enumerate(groups, 1) for key in group}
    connection.execute(sa.delete(duplicates.table))
    stored = _store(connection, duplicates.table, rows, pairs, number) if pairs else 0
    seconds = time.perf_counter() - began
    return DuplicateReport(stored, len(groups), len(number), recall, seconds)


def _store(
    connection: sa.Connection,
    table: sa.Table,
    rows: RowSet,
    pairs: list[Pair],
    number: dict[Key, int],
) -> int:
    ends = [[table.c[f"{end}_{key.name}"] for key in rows.keys] for end in "ab"]
    parts = zip(*(key_parts(pair.a) + key_parts(pair.b) for pair in pairs), strict=True)
    keys = [
        np.array(part, dtype=np.int64 if is_integer(column) else object)
        for column, part in zip([*ends[0], *ends[1]], parts, strict=True)
    ]
    both = ((number.get(pair.a), number.get(pair.b)) for pair in pairs)
    values: Any = [[pair.similarity for pair in pairs], [a if a == b else None for a, b in both]]
    columns = [table.c.similarity, table.c.group_number]
    return insert_referring(connection, rows, ends, keys, columns, values)


def groups_of(pairs: Iterable[Pair]) -> list[list[Key]]:
    """Groups of rows that are nearly the same, as sorted lists of keys, largest group first.

    A group is a row and those that it makes a pair with, so that each is above the threshold to it,
    beginning with the row that has the most; a row goes to the first that has it, and one whose
    partners are all taken is in no group.
    """
    partners: dict[Any, list[Any]] = {}
    for pair in pairs:
        partners.setdefault(pair.a, []).append(pair.b)
        partners.setdefault(pair.b, []).append(pair.a)
    groups, taken = [], set()
    for centre in sorted(partners, key=lambda key: (-len(partners[key]), key)):
        if centre in taken:
            continue
        free = [partner for partner in dict.fromkeys(partners[centre]) if partner not in taken]
        if free:
            taken.update([centre, *free])
            groups.append(sorted([centre, *free]))
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def index_recall(
    connection: sa.Connection,
    column: Any,
    *,
    threshold: float = 0.9,
    where: Criteria | None = None,
    neighbours: int = NEIGHBOURS,
    rows: int = RECALL_ROWS,
) -> float | None:
    """Share of the pairs above a threshold that the index finds, measured on a sample of rows.

    Each row of the sample is compared with every row, and with those that the index gives for it;
    a pair also counts as found where the index gives it from its other side.

    Returns:
        Recall between 0 and 1, or ``None`` where the sample is in no pair.
    """
    every = rows_of(column, threshold, where)
    sampled = every.sample(rows, every.count(connection))
    exact = {
        pair[:2] for pair in _read_pairs(connection, _exact_statement(every, sampled, threshold))
    }
    if not exact:
        return None
    _set_up_index(connection, every, neighbours)
    # The other way round too: from the rows that the exact search has in a pair.
    ends = {key_parts(key) for pair in exact for key in pair}
    paired = every.only(sa.tuple_(*every.wire_keys).in_(list(ends)))
    both = (_index_statement(every, some, threshold, neighbours) for some in (sampled, paired))
    through_index = {pair[:2] for one in both for pair in _read_pairs(connection, one)}
    return len(exact & through_index) / len(exact)


def rows_of(column: Any, threshold: float = 1.0, where: Criteria | None = None) -> RowSet:
    """The rows of an attribute or a column, after a look at the arguments."""
    if not -1 <= threshold <= 1:
        raise DeclarationError(
            f"The threshold is {threshold}; a cosine similarity lies between -1 and 1."
        )
    return RowSet(vector_column(column), criteria_list(where))


def pairs_of(
    connection: sa.Connection,
    rows: RowSet,
    threshold: float,
    method: DuplicateMethod,
    neighbours: int,
) -> Iterator[Pair]:
    """Pairs of keys as they travel: integers and texts."""
    if method == "exact":
        return _exact(connection, rows, threshold)
    if method != "index":
        raise DeclarationError(f"duplicate_pairs: method is {method!r}; use 'exact' or 'index'.")
    if neighbours < 1:
        raise DeclarationError(f"duplicate_pairs: neighbours is {neighbours}; it starts at 1.")
    return _through_index(connection, rows, threshold, neighbours)


def _exact(connection: sa.Connection, rows: RowSet, threshold: float) -> Iterator[Pair]:
    read, vectors = read_rows(connection, rows)
    keys = [_key(key) for key in read.tuples()]
    normalize(vectors)
    for arrays in similar_pairs(vectors, threshold):
        for one, other, similarity in zip(*(a.tolist() for a in arrays), strict=True):
            yield Pair(similarity, keys[one], keys[other])


def similar_pairs(vectors: Any, threshold: float) -> Iterator[tuple[Any, Any, Any]]:
    """Positions of unit vectors whose product is at least a threshold, and the products, by blocks.

    The first position of a pair is the smaller one.
    """
    step = max(16, min(1024, _BLOCK_ELEMENTS // max(len(vectors), 1)))

    def block(start: int) -> tuple[Any, Any, Any]:
        products = vectors[start : start + step] @ vectors[start:].T
        # A product of equal unit vectors can round to just below one.
        ones, others = np.divmod(np.flatnonzero(products >= threshold - 1e-6), products.shape[1])
        upper = others > ones
        ones, others = ones[upper], others[upper]
        return ones + start, others + start, products[ones, others]

    with worker_threads("compare rows") as pool:
        yield from pool.map(block, range(0, len(vectors), step))


def _through_index(
    connection: sa.Connection, rows: RowSet, threshold: float, neighbours: int
) -> Iterator[Pair]:
    _set_up_index(connection, rows, neighbours)
    statement = _index_statement(rows, rows, threshold, neighbours)
    seen: set[tuple[Key, Key]] = set()
    for a, b, similarity in _read_pairs(connection, statement):
        if (a, b) not in seen:
            seen.add((a, b))
            yield Pair(similarity, a, b)


def _read_pairs(
    connection: sa.Connection, statement: sa.Select[Any]
) -> Iterator[tuple[Key, Key, float]]:
    for *parts, similarity in connection.execute(statement.execution_options(yield_per=5_000)):
        width = len(parts) // 2
        a, b = sorted([_key(parts[:width]), _key(parts[width:])])
        yield a, b, float(similarity)


def _key(parts: Iterable[Any]) -> Key:
    """A key as a pair has it: one value, or a tuple."""
    values = tuple(parts)
    return values[0] if len(values) == 1 else values


def key_parts(key: Key) -> tuple[Any, ...]:
    """The values of a key, one for each key column."""
    return key if isinstance(key, tuple) else (key,)


def _with_application_keys(
    connection: sa.Connection, rows: RowSet, pairs: Iterator[Pair]
) -> Iterator[Pair]:
    """Pairs with keys as the application knows them, from keys as they travel."""
    if all(
        isinstance(key.type, (sa.Integer, sa.String)) and not isinstance(key.type, sa.Enum)
        for key in rows.keys
    ):
        return pairs
    # What such a text means is the type's affair: the server is asked for both forms.
    pairs = iter(list(pairs))
    width = len(rows.keys)
    result = connection.execute(sa.select(*rows.wire_keys, *rows.keys).where(*rows.criteria))
    known = {_key(row[:width]): _key(row[width:]) for row in result}
    return (
        Pair(pair.similarity, known[pair.a], known[pair.b])
        for pair in pairs
        if pair.a in known and pair.b in known
    )


def _exact_statement(rows: RowSet, sampled: RowSet, threshold: float) -> sa.Select[Any]:
    """Keys and similarity of pairs with a row of the sample, compared with every row."""
    one, other = _vectors(sampled).subquery("one"), _vectors(rows).subquery("other")
    statement, distance = _pairs_between(rows, one, other)
    # Adding zero keeps an index away, and the comparison exact.
    return statement.where(distance + 0 <= 1 - threshold).limit(_RECALL_PAIRS)


def _index_statement(
    rows: RowSet, some: RowSet, threshold: float, neighbours: int
) -> sa.Select[Any]:
    """Keys and similarity of pairs that the index finds from some of the rows."""
    one = _vectors(some).subquery("one")
    order = served_distance(rows.column, one.corresponding_column(rows.column))
    # The row itself is the nearest of all.
    near = _vectors(rows).order_by(order).limit(neighbours + 1).correlate(one).lateral("near")
    statement, distance = _pairs_between(rows, one, near)
    return statement.where(distance <= 1 - threshold)


def _vectors(rows: RowSet) -> sa.Select[Any]:
    """Keys and vectors; criteria stay inside, where a name written in SQL means one thing."""
    return sa.select(*rows.keys, rows.column).where(*rows.criteria)


def _pairs_between(
    rows: RowSet, one: sa.FromClause, other: sa.FromClause
) -> tuple[sa.Select[Any], sa.ColumnElement[float]]:
    """Keys and similarity of every two different rows; and their distance."""

    def of(part: sa.FromClause, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        return cast("sa.ColumnElement[Any]", part.corresponding_column(column))

    distance = apply_operator(of(other, rows.column), d.COSINE, of(one, rows.column))
    keys = [wire_key(of(part, key)) for part in (one, other) for key in rows.keys]
    is_same = sa.and_(*(of(one, key) == of(other, key) for key in rows.keys))
    statement = sa.select(*keys, 1 - distance).select_from(sa.join(one, other, sa.true()))
    return statement.where(sa.not_(is_same)), distance


def _set_up_index(connection: sa.Connection, rows: RowSet, neighbours: int) -> None:
    index = index_on(rows.column)
    if index is None or index.quantized:
        raise ClusteringError(
            f"Column {rows.column} has no declared index that ranks by the vectors themselves. "
            "Declare one with hnsw_index(), or use method='exact'."
        )
    values = {
        "hnsw.ef_search": str(min(1000, max(_EF_SEARCH, 2 * neighbours))),
        "hnsw.iterative_scan": "strict_order",
        "ivfflat.probes": str(max(1, int((index.lists or 1) ** 0.5))),
        "jit": "off",
    }
    configure(connection, values)
