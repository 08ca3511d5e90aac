"""Near-duplicates: all pairs of rows above a similarity, as a generator."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.sql.selectable import NamedFromClause

from sbert_pg import distance as d
from sbert_pg.clustering.declaration import Criteria
from sbert_pg.clustering.extras import need
from sbert_pg.clustering.kmeans import cores, normalize
from sbert_pg.clustering.transfer import read_rows
from sbert_pg.errors import ClusteringError, DeclarationError
from sbert_pg.types.comparator import apply_operator, served_distance
from sbert_pg.types.indexed import index_on
from sbert_pg.types.vector import VectorType

Vectors = npt.NDArray[np.float32]
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
_BUCKETS = 1_000_000


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
        DeclarationError: the threshold is no cosine, or the column is no vector column.
        ClusteringError: ``"index"`` was asked for and no suitable index is declared.
        MissingExtraError: the extra ``clustering`` is not installed.
    """
    target = Target.of(column, threshold, where)
    if method == "exact":
        return _exact(connection, target)
    if method == "index":
        return _through_index(connection, target, neighbours)
    raise DeclarationError(f"duplicate_pairs: method is {method!r}; use 'exact' or 'index'.")


def groups_of(pairs: Iterable[Pair]) -> list[list[Key]]:
    """Rows that hang together by pairs, as sorted lists of keys, largest group first."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for pair in pairs:
        parent.setdefault(pair.a, pair.a)
        parent.setdefault(pair.b, pair.b)
        parent[root(pair.b)] = root(pair.a)
    groups: dict[Hashable, list[Key]] = {}
    for key in parent:
        groups.setdefault(root(key), []).append(key)
    found = [sorted(group) for group in groups.values()]
    return sorted(found, key=lambda group: (-len(group), group[0]))


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
    target = Target.of(column, threshold, where)
    sampled = target.sample(connection, rows)
    exact = set(_keys(target, connection.execute(target.exact_pairs(sampled))))
    if not exact:
        return None
    target.set_up_index(connection, neighbours)
    forward = target.index_pairs(neighbours, sampled)
    found = set(_keys(target, connection.execute(forward)))
    # The other way round: from the rows that the exact search found to be in a pair.
    partners = [key for pair in exact for key in pair]
    backward = target.index_pairs(neighbours, target.is_among(partners))
    found |= set(_keys(target, connection.execute(backward)))
    return len(exact & found) / len(exact)


@dataclass(frozen=True)
class Target:
    """The column whose rows are compared."""

    table: sa.Table
    column: sa.Column[Any]
    threshold: float
    criteria: Sequence[sa.ColumnElement[bool]]

    @classmethod
    def of(cls, column: Any, threshold: float, where: Criteria | None) -> Target:
        """Take an attribute or a column apart."""
        clause = column.__clause_element__() if hasattr(column, "__clause_element__") else column
        if not isinstance(getattr(clause, "type", None), VectorType):
            raise DeclarationError(
                f"Duplicates were asked of {column!r}, which is no vector column. Give an "
                "attribute made with embedding_column(), or a column of type Vector or HalfVector."
            )
        if not -1 <= threshold <= 1:
            raise DeclarationError(
                f"The threshold is {threshold}; a cosine similarity lies between -1 and 1."
            )
        base = next(c for c in clause.base_columns if isinstance(c, sa.Column))
        criteria: list[sa.ColumnElement[bool]] = [base.is_not(None)]
        if isinstance(where, sa.ClauseElement):
            criteria.append(where)
        elif where is not None:
            criteria += list(where)
        return cls(base.table, base, threshold, criteria)

    @property
    def keys(self) -> tuple[sa.Column[Any], ...]:
        """Key columns of the rows."""
        return tuple(self.table.primary_key)

    def key(self, values: Sequence[Any]) -> Key:
        """A key as a pair has it."""
        converted = [
            _converter(column)(value) for column, value in zip(self.keys, values, strict=True)
        ]
        return converted[0] if len(converted) == 1 else tuple(converted)

    def sample(self, connection: sa.Connection, rows: int) -> sa.ColumnElement[bool]:
        """A criterion that some rows meet, spread over the table by a hash of their keys."""
        total = connection.scalar(
            sa.select(sa.func.count()).select_from(self.table).where(*self.criteria)
        )
        share = min(1.0, rows / max(total or 0, 1))
        bucket = sa.func.hashtextextended(sa.func.concat_ws(" ", *self.keys), 0) % _BUCKETS
        return sa.func.abs(bucket) < int(share * _BUCKETS)

    def is_among(self, keys: Sequence[Key]) -> sa.ColumnElement[bool]:
        """Whether a row is one of these."""
        if len(self.keys) == 1:
            return self.keys[0].in_(set(keys))
        return sa.tuple_(*self.keys).in_(list(set(keys)))

    def exact_pairs(self, sampled: sa.ColumnElement[bool]) -> sa.Select[Any]:
        """Keys and similarity of pairs with a row of the sample, compared with every row."""
        other = self.table.alias("other")
        distance = apply_operator(other.c[self.column.name], d.COSINE, self.column)
        return (
            sa.select(*self.keys, *self._keys_of(other), (1 - distance).label("similarity"))
            .join_from(self.table, other, self._differs(other))
            .where(*self.criteria, *self._criteria_of(other), sampled)
            # Adding zero keeps an index away, and the comparison exact.
            .where(distance + 0 <= 1 - self.threshold)
        )

    def index_pairs(
        self, neighbours: int, among: sa.ColumnElement[bool] | None = None
    ) -> sa.Select[Any]:
        """Keys and similarity of pairs that the index finds, from either side."""
        other = self.table.alias("other")
        vector = other.c[self.column.name]
        order = served_distance(vector, self.column)
        near = (
            sa.select(*self._keys_of(other), vector)
            .where(*self._criteria_of(other))
            .order_by(order)
            # The row itself is the nearest of all.
            .limit(neighbours + 1)
            .correlate(self.table)
            .lateral("near")
        )
        distance = apply_operator(near.c[vector.name], d.COSINE, self.column)
        statement = (
            sa.select(*self.keys, *(near.c[key.name] for key in self.keys), (1 - distance))
            .select_from(sa.join(self.table, near, sa.true()))
            .where(*self.criteria, self._differs(near), distance <= 1 - self.threshold)
        )
        return statement if among is None else statement.where(among)

    def set_up_index(self, connection: sa.Connection, neighbours: int) -> None:
        """Set what the index scan needs, for the transaction.

        Raises:
            ClusteringError: no index that can rank by itself is declared.
        """
        index = index_on(self.column)
        if index is None or index.quantized:
            raise ClusteringError(
                f"Column {self.column} has no declared index that ranks by the vectors themselves. "
                "Declare one with hnsw_index(), or use method='exact'."
            )
        values = {
            "hnsw.ef_search": str(min(1000, max(_EF_SEARCH, 2 * neighbours))),
            "hnsw.iterative_scan": "strict_order",
            "ivfflat.probes": str(max(1, int((index.lists or 1) ** 0.5))),
            "jit": "off",
        }
        for name, value in values.items():
            connection.execute(sa.select(sa.func.set_config(name, value, True)))

    def _keys_of(self, other: NamedFromClause) -> list[sa.ColumnElement[Any]]:
        return [other.c[key.name] for key in self.keys]

    def _differs(self, other: sa.FromClause) -> sa.ColumnElement[bool]:
        return sa.not_(sa.and_(*(key == other.c[key.name] for key in self.keys)))

    def _criteria_of(self, other: sa.FromClause) -> list[sa.ColumnElement[bool]]:
        adapter = sa.sql.util.ClauseAdapter(other)
        return [adapter.traverse(criterion) for criterion in self.criteria]


def _exact(connection: sa.Connection, target: Target) -> Iterator[Pair]:
    found = read_rows(connection, target.keys, target.column, target.criteria)
    vectors = normalize(found.vectors)
    for rows, others, similarities in similar_pairs(vectors, target.threshold):
        for row, other, similarity in zip(
            rows.tolist(), others.tolist(), similarities.tolist(), strict=True
        ):
            yield Pair(similarity, target.key(found.keys.at(row)), target.key(found.keys.at(other)))


def similar_pairs(
    vectors: Vectors, threshold: float
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Vectors]]:
    """Positions of unit vectors whose product is at least a threshold, block by block.

    Yields:
        Two arrays of positions, the first smaller than the second, and their similarities.
    """
    n = len(vectors)
    step = max(16, min(1024, _BLOCK_ELEMENTS // max(n, 1)))
    limits = need("threadpoolctl", "compare rows").threadpool_limits

    def work(start: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Vectors]:
        block = vectors[start : start + step]
        products = block @ vectors[start:].T
        # A product of equal unit vectors can round to just below one.
        flat = np.flatnonzero(products >= threshold - 1e-6)
        rows, others = np.divmod(flat, products.shape[1])
        upper = others > rows
        rows, others = rows[upper], others[upper]
        return rows + start, others + start, products[rows, others]

    with limits(1, "blas"), ThreadPoolExecutor(cores()) as pool:
        yield from pool.map(work, range(0, n, step))


def _through_index(connection: sa.Connection, target: Target, neighbours: int) -> Iterator[Pair]:
    if neighbours < 1:
        raise DeclarationError(f"duplicate_pairs: neighbours is {neighbours}; it starts at 1.")
    target.set_up_index(connection, neighbours)
    statement = target.index_pairs(neighbours).execution_options(yield_per=5_000)
    width = len(target.keys)
    seen: set[tuple[Key, Key]] = set()
    for row in connection.execute(statement):
        a, b = sorted([target.key(row[:width]), target.key(row[width : 2 * width])])
        if (a, b) not in seen:
            seen.add((a, b))
            yield Pair(float(row[2 * width]), a, b)


def _keys(target: Target, rows: Iterable[Any]) -> Iterator[tuple[Key, Key]]:
    width = len(target.keys)
    for row in rows:
        a, b = sorted([target.key(row[:width]), target.key(row[width : 2 * width])])
        yield a, b


def _converter(column: sa.Column[Any]) -> Callable[[Any], Any]:
    """What turns a key's text into the type that the application knows."""
    if isinstance(column.type, sa.Uuid) and column.type.as_uuid:
        return lambda value: value if isinstance(value, uuid.UUID) else uuid.UUID(value)
    return lambda value: value
