"""``nearest``: the statement that an expert would write for a k-nearest-neighbour search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from sbert_pg.distance import Metric
from sbert_pg.errors import DeclarationError
from sbert_pg.searching.settings import MAX_EF_SEARCH, index_settings
from sbert_pg.searching.stages import served
from sbert_pg.searching.statement import Search
from sbert_pg.searching.target import target_of
from sbert_pg.types.comparator import apply_operator

Criteria = sa.ColumnElement[bool] | Sequence[sa.ColumnElement[bool]]

#: Candidates that HNSW keeps. With pgvector's default of 40 recall@10 on real sentence embeddings
#: is a point or two lower; docs/search.md has the curve.
DEFAULT_EF_SEARCH = 100
#: Rows fetched by a quantised index for each row wanted, before the exact rerank.
DEFAULT_OVERFETCH = 40


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
    it with any session or connection; add criteria, joins, options and columns.

    What the declared index needs is part of the statement. Index settings (``hnsw.ef_search`` and
    the iterative scan, which keeps looking until filters have let enough rows through) are made
    with ``set_config(..., true)`` in a one-time filter: they end with the transaction and never
    reach the next user of a pooled connection. Under filters, with a quantised index, with a
    largest distance and on later pages the search has two stages: the index over-fetches, with the
    caller's criteria and joins, and what it finds is ranked. Rows without a vector are never found.

    Args:
        column: an embedding or vector column.
        query: a text, encoded as a query when the statement runs (embedding columns only); a
            vector; an expression; or a persistent object of the mapped class, for "more like
            this", which is itself left out.
        limit: rows to return.
        offset: rows to skip. Pages of one ``limit`` follow each other without repeating or missing
            a row, ties being broken by primary key, while neither the table nor the plan changes.
        where: criteria that a row has to meet; the same as ``.where()`` on the result.
        max_distance: largest distance, in the units of the encoder's distance.
        min_similarity: least similarity; another way to say the same.
        ef_search: HNSW candidates, 1 to 1000; by default 100, or as many as the index is to fetch
            where that is more.
        probes: IVFFlat lists to look into; the square root of the index's ``lists`` by default.
        overfetch: rows fetched by the index for each row wanted, and then ranked exactly; 40 by
            default where the index is quantised. Other indexes rank by themselves, and fetch twice
            as many as wanted under filters.
        exact: whether to leave indexes aside and compare with every row.

    Raises:
        DeclarationError: the column is no vector column, or a number is out of its range.
        EncoderMismatchError: the query is a column of another encoder.
        VectorError: a query vector that cannot be compared with the column.
    """
    target = target_of(column)
    _check(limit, offset, ef_search, probes, overfetch)
    right = target.operand(query)
    criteria = [where] if isinstance(where, sa.ClauseElement) else list(where)
    own = target.criteria_for(query, right)
    distance = apply_operator(target.column, target.metric.operator, right)
    similarity = target.similarity_from(distance)
    furthest = _furthest(target.metric, max_distance, min_similarity)
    within = None if furthest is None else distance <= furthest
    index = None if exact else target.index
    # A query that is a column of another row can only be looked up within that row's scope, which
    # the stages of a search do not reach into.
    correlated = bool(right._from_objects)
    if correlated and index is not None:
        own += [] if within is None else [within]
        index, within = (None if index.quantized else index), None
    if index is None:
        # Adding zero keeps an index from serving the order, whatever the planner thinks of it.
        order = distance + sa.literal_column("0") if exact else distance
        statement = sa.select(*target.selected, similarity)
        statement = statement.where(target.column.is_not(None), *own, *criteria)
        if within is not None:
            statement = statement.where(within)
        return _page(statement.order_by(order, *target.key), limit, offset)
    if index.quantized and not target.key:
        raise DeclarationError(
            f"nearest(): {target.column} has a quantised index, which finds candidates that are "
            "then ranked by primary key, and its table has none. Declare a primary key, or search "
            "with exact=True."
        )
    if overfetch is None:
        overfetch = DEFAULT_OVERFETCH if index.quantized else 1
    candidates = min(ef_search or max(DEFAULT_EF_SEARCH, limit * overfetch), MAX_EF_SEARCH)
    settings = index_settings(index.method, index.lists, candidates, probes)
    same = index.form == "column" and index.metric is target.metric
    by_index = distance if same else served(index, target.column, right)
    search = Search(similarity, by_index, tuple(target.key), settings, 2 + len(own), correlated)
    statement = target.rows.searched(
        search, [*own, *criteria], exact=distance, within=within, overfetch=overfetch
    )
    return _page(statement, limit, offset)


def _page(statement: sa.Select[Any], limit: int, offset: int) -> sa.Select[Any]:
    statement = statement.limit(limit)
    return statement.offset(offset) if offset else statement


def _check(
    limit: int, offset: int, ef_search: int | None, probes: int | None, overfetch: int | None
) -> None:
    if limit < 1 or offset < 0:
        raise DeclarationError(
            f"nearest() was given limit={limit} and offset={offset}; limit starts at 1, offset at "
            "0."
        )
    if ef_search is not None and not 1 <= ef_search <= MAX_EF_SEARCH:
        raise DeclarationError(f"nearest(): ef_search is {ef_search}; pgvector takes 1 to 1000.")
    if probes is not None and not 1 <= probes <= 32_768:
        raise DeclarationError(f"nearest(): probes is {probes}; pgvector takes 1 to 32768.")
    if overfetch is not None and overfetch < 1:
        raise DeclarationError(f"nearest(): overfetch is {overfetch}; it starts at 1.")


def _furthest(
    metric: Metric, max_distance: float | None, min_similarity: float | None
) -> float | None:
    if max_distance is not None and min_similarity is not None:
        raise DeclarationError("nearest() takes max_distance or min_similarity, not both.")
    if min_similarity is not None:
        return metric.offset - min_similarity
    return max_distance


__all__ = ["DEFAULT_EF_SEARCH", "DEFAULT_OVERFETCH", "nearest"]
