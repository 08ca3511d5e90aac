"""``nearest``: the statement that an expert would write for a k-nearest-neighbour search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import aliased

from sbert_pg.distance import HAMMING, Metric
from sbert_pg.errors import DeclarationError
from sbert_pg.types.comparator import apply_operator, metric_for, operand
from sbert_pg.types.indexed import IndexDescription, index_on, signs
from sbert_pg.types.vector import VectorType

Criteria = sa.ColumnElement[bool] | Sequence[sa.ColumnElement[bool]]

#: Candidates that HNSW keeps. pgvector's default of 40 loses a point or two of recall@10 on real
#: sentence embeddings; see docs/search.md for the curve.
DEFAULT_EF_SEARCH = 100
#: Rows fetched by a quantised index for each row wanted, before the exact rerank.
DEFAULT_OVERFETCH = 20
MAX_EF_SEARCH = 1000


def nearest(
    column: Any,
    query: Any,
    *,
    limit: int = 10,
    offset: int = 0,
    where: Criteria = (),
    max_distance: float | None = None,
    min_similarity: float | None = None,
    ef_search: int | None = None,
    probes: int | None = None,
    overfetch: int | None = None,
    exact: bool = False,
) -> sa.Select[Any]:
    """A select of the rows nearest to a query, each with its similarity, nearest first.

    Works on a mapped attribute (rows are ``(entity, similarity)``) and on a ``Table`` column (rows
    are the table's columns without its vectors, and ``similarity``). It is an ordinary select: run
    it with any session or connection, add joins, options and columns.

    What the declared index needs is part of the statement. Index settings (``hnsw.ef_search`` and
    the iterative scan, which keeps looking until filters have let enough rows through) are made with
    ``set_config(..., true)`` in a one-time filter: they end with the transaction and never reach the
    next user of a pooled connection. Through a quantised or IVFFlat index the search has two stages:
    the index over-fetches, and an exact distance ranks. Rows without a vector are never found.

    Args:
        column: an embedding or vector column.
        query: a text, encoded as a query when the statement runs (embedding columns only); a vector;
            an expression; or a persistent object of the mapped class, for "more like this", which is
            itself left out.
        limit: rows to return.
        offset: rows to skip. Ties are broken by primary key, so that pages do not repeat rows.
        where: criteria that a row has to meet. They are equal to ``.where()`` on the result except
            in a two-stage search, where only these reach the inner stage.
        max_distance: largest distance, in the units of the encoder's distance.
        min_similarity: least similarity; another way to say the same.
        ef_search: HNSW candidates, 1 to 1000; 100 by default, or more where ``limit`` asks for more.
        probes: IVFFlat lists to look into; the square root of the index's ``lists`` by default.
        overfetch: rows fetched for each row wanted in a two-stage search, 20 by default for a
            quantised index and 1 for IVFFlat.
        exact: whether to leave indexes aside and compare with every row.

    Raises:
        DeclarationError: the column is no vector column, or a number is out of its range.
        VectorError: a query vector that cannot be compared with the column.
    """
    target = _Target(column)
    _check(limit, offset, ef_search, probes, overfetch)
    criteria = [where] if isinstance(where, sa.ClauseElement) else list(where)
    right = target.operand(query)
    criteria += target.criteria_for(query, right)
    exact_distance = apply_operator(target.column, target.metric.operator, right)
    similarity = _similarity(target.metric, exact_distance)
    furthest = _furthest(target.metric, max_distance, min_similarity)
    if furthest is not None:
        criteria.append(exact_distance <= furthest)
    index = None if exact else index_on(target.column)
    statement = sa.select(*target.selected, similarity.label("similarity"))
    if index is None:
        # Adding zero keeps an index from serving the order, whatever the planner thinks of it.
        order = exact_distance + 0 if exact else exact_distance
        statement = statement.where(*criteria)
    elif index.quantized or index.method == "ivfflat":
        wanted = (limit + offset) * (overfetch or (DEFAULT_OVERFETCH if index.quantized else 1))
        candidates = _candidates(target, index, right, criteria, wanted, ef_search, probes)
        statement = statement.where(target.key_in(candidates))
        order = exact_distance + 0
    else:
        order = _served(index, target.column, right)
        settings = _settings(index, ef_search or max(DEFAULT_EF_SEARCH, limit + offset), probes)
        statement = statement.where(settings, *criteria)
    return statement.order_by(order, *target.key).limit(limit).offset(offset or None)


class _Target:
    """The searched column, and what to select of its table or mapped class."""

    def __init__(self, column: Any) -> None:
        clause = column.__clause_element__() if hasattr(column, "__clause_element__") else column
        if not isinstance(clause, sa.ColumnElement) or not isinstance(clause.type, VectorType):
            raise DeclarationError(
                f"nearest() was given {column!r}, which is no vector column. Give an attribute made "
                "with embedding_column(), or a column of type Vector, HalfVector or Embedding."
            )
        self.column: sa.ColumnElement[Any] = clause
        self.metric: Metric = metric_for(clause)
        self.entity: Any = getattr(column, "parent", None) and column.parent.entity
        if self.entity is not None:
            mapper = sa.inspect(self.entity).mapper
            self.mapper = mapper
            self.selected: list[Any] = [self.entity]
            self.key: list[Any] = [
                getattr(self.entity, mapper.get_property_by_column(c).key) for c in mapper.primary_key
            ]
        else:
            table = getattr(clause, "table", None)
            if table is None:
                raise DeclarationError(
                    f"nearest() was given {column!r}, which belongs to no table."
                )
            self.mapper = None
            self.selected = [c for c in table.columns if not isinstance(c.type, VectorType)]
            self.key = list(table.primary_key)

    def operand(self, query: Any) -> sa.ColumnElement[Any]:
        """The query as the right-hand side of a distance operator."""
        if not self._is_row(query):
            return operand(self.column, query)
        state = sa.inspect(query)
        if state.identity is None:
            raise DeclarationError(
                f"nearest() was given {query!r}, which is not in the database yet. Flush it first, "
                "or search with its text."
            )
        # Its vector never leaves the server.
        other = aliased(self.mapper.class_)
        attribute = self.mapper.get_property_by_column(self._base_column()).key
        return (
            sa.select(getattr(other, attribute))
            .where(*self._is_identity(other, state.identity))
            .scalar_subquery()
        )

    def criteria_for(
        self, query: Any, right: sa.ColumnElement[Any]
    ) -> list[sa.ColumnElement[bool]]:
        """What the kind of query asks of a row."""
        criteria: list[sa.ColumnElement[bool]] = [self.column.is_not(None)]
        if self._is_row(query):
            criteria.append(right.is_not(None))
            criteria.append(sa.not_(sa.and_(*self._is_identity(self.entity, sa.inspect(query).identity))))
        return criteria

    def key_in(self, candidates: sa.Select[Any]) -> sa.ColumnElement[bool]:
        """Whether a row is among the candidates of the first stage."""
        left = self.key[0] if len(self.key) == 1 else sa.tuple_(*self.key)
        return cast("sa.ColumnElement[bool]", left.in_(candidates))

    def _is_row(self, query: Any) -> bool:
        return self.mapper is not None and isinstance(query, self.mapper.class_)

    def _base_column(self) -> Any:
        return next(c for c in self.column.base_columns if isinstance(c, sa.Column))

    def _is_identity(self, entity: Any, identity: Any) -> list[sa.ColumnElement[bool]]:
        assert self.mapper is not None
        return [
            getattr(entity, self.mapper.get_property_by_column(column).key) == value
            for column, value in zip(self.mapper.primary_key, identity, strict=True)
        ]


def _check(
    limit: int, offset: int, ef_search: int | None, probes: int | None, overfetch: int | None
) -> None:
    if limit < 1 or offset < 0:
        raise DeclarationError(
            f"nearest() was given limit={limit} and offset={offset}; limit starts at 1, offset at 0."
        )
    if ef_search is not None and not 1 <= ef_search <= MAX_EF_SEARCH:
        raise DeclarationError(f"nearest(): ef_search is {ef_search}; pgvector takes 1 to 1000.")
    if probes is not None and not 1 <= probes <= 32_768:
        raise DeclarationError(f"nearest(): probes is {probes}; pgvector takes 1 to 32768.")
    if overfetch is not None and overfetch < 1:
        raise DeclarationError(f"nearest(): overfetch is {overfetch}; it starts at 1.")


def _similarity(metric: Metric, distance: sa.ColumnElement[float]) -> sa.ColumnElement[float]:
    return sa.literal_column(str(int(metric.offset)), sa.Float(53)) - distance


def _furthest(
    metric: Metric, max_distance: float | None, min_similarity: float | None
) -> float | None:
    if max_distance is not None and min_similarity is not None:
        raise DeclarationError("nearest() takes max_distance or min_similarity, not both.")
    if min_similarity is not None:
        return metric.offset - min_similarity
    return max_distance


def _served(
    index: IndexDescription, column: sa.ColumnElement[Any], right: sa.ColumnElement[Any]
) -> sa.ColumnElement[float]:
    """The distance that the index orders by."""
    if index.form == "binary":
        bits = signs(right, index.dimensions)
        return cast(
            "sa.ColumnElement[float]",
            signs(column, index.dimensions).op(HAMMING, precedence=5, return_type=sa.Float(53))(bits),
        )
    left = index.indexed(column)
    if left is not column:
        right = sa.cast(right, left.type)
    return apply_operator(left, index.metric.operator, right)


def _candidates(
    target: _Target,
    index: IndexDescription,
    right: sa.ColumnElement[Any],
    criteria: list[sa.ColumnElement[bool]],
    wanted: int,
    ef_search: int | None,
    probes: int | None,
) -> sa.Select[Any]:
    """The first stage: keys of the rows that the index finds nearest."""
    settings = _settings(index, ef_search or max(DEFAULT_EF_SEARCH, wanted), probes)
    return (
        sa.select(*target.key)
        .where(settings, *criteria)
        .order_by(_served(index, target.column, right))
        .limit(wanted)
    )


def _settings(
    index: IndexDescription, ef_search: int, probes: int | None
) -> sa.ColumnElement[bool]:
    """A criterion that is always true, and sets what the index reads before its scan begins."""
    if index.method == "hnsw":
        order = "relaxed_order" if index.quantized else "strict_order"
        values = {
            "hnsw.ef_search": str(min(ef_search, MAX_EF_SEARCH)),
            "hnsw.iterative_scan": order,
        }
    else:
        values = {"ivfflat.iterative_scan": "relaxed_order"}
        number = probes or (math.isqrt(index.lists) if index.lists else None)
        if number is not None:
            values["ivfflat.probes"] = str(number)
    calls = [sa.func.set_config(name, value, True) for name, value in values.items()]
    return sa.select(sa.func.concat(*calls)).scalar_subquery().is_not(None)


__all__ = ["DEFAULT_EF_SEARCH", "DEFAULT_OVERFETCH", "nearest"]
