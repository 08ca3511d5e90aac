"""``nearest``: the statement that an expert would write for a k-nearest-neighbour search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, RelationshipProperty

from sbert_pg.distance import Metric
from sbert_pg.errors import DeclarationError
from sbert_pg.passages import declared_passages
from sbert_pg.passages.declaring import Declared
from sbert_pg.search.looks import MAX_EF_SEARCH
from sbert_pg.search.passages import (
    Asked,
    Score,
    nearest_documents,
    nearest_passages,
)
from sbert_pg.search.statement import (
    Nearest,
    Search,
    criteria_of,
    is_number,
    require_page,
)
from sbert_pg.search.target import Target, target_of

Criteria = sa.ColumnElement[bool] | Sequence[sa.ColumnElement[bool]]


def nearest(
    column: Any,
    query: Any,
    *,
    limit: int | None = 10,
    offset: int = 0,
    where: Criteria = (),
    max_distance: float | None = None,
    min_similarity: float | None = None,
    ef_search: int | None = None,
    probes: int | None = None,
    overfetch: int | None = None,
    exact: bool = False,
    of: Literal["document", "passage"] = "document",
    per_document: int = 1,
    score: Score = "auto",
) -> Nearest:
    """A select of the rows nearest to a query, each with its similarity, nearest first.

    Works on a mapped attribute (rows are ``(entity, similarity)``) and on a ``Table`` column (rows
    are the table's columns without its vectors, and ``similarity``). Where the class or table has a
    column of that name, the search's is ``nearest_similarity``; so with ``query``. Run it with any
    session or connection. Criteria, joins, ``limit`` and ``offset`` that are added to it belong to
    the *search*, not to what it has found: the rows that come back are the nearest of those that
    pass, as many as were asked for where there are as many. Columns, loader options and
    ``with_for_update`` shape those rows. What would work on a page that was found already
    (``order_by``, ``group_by``, ``distinct``, ``having``) is refused; take the search as a
    subquery.

    Whether the declared index answers or the rows that pass are compared one by one is decided in
    the database, by what the index finds near the query; ``explain_search`` says which it was, and
    docs/search.md how. Index settings are made with ``set_config(..., true)`` in a one-time filter
    and set back behind the index scan: they reach neither later statements nor the next user of a
    pooled connection. Rows without a vector, or without a similarity (zeros under cosine), are
    never found.

    Of an attribute made with ``passages_of`` the rows are ``(document, passage, similarity,
    score)``: each document once, with its nearest passage and that one's similarity, best score
    first; criteria and joins may be on documents and on passages. See docs/passages.md.

    Args:
        column: an embedding or vector column, or an attribute of passages.
        query: a text, encoded as a query when the statement runs (embedding columns only); a
            vector; an expression; a persistent object of the mapped class, for "more like this",
            which is itself left out; a column of another table or alias, for the nearest of each of
            its rows by ``.lateral()``; or a list of texts or of vectors: then each query has its
            ``limit`` rows, and a last column ``query`` has its number, from 0.
        limit: rows to return; ``None`` for all, which are compared one by one.
        offset: rows to skip. Pages of one ``limit`` follow each other without repeating or missing
            a row, ties being broken by primary key, while the table does not change.
        where: criteria that a row has to meet; the same as ``.where()`` on the result.
        max_distance: largest distance, in the units of the encoder's distance.
        min_similarity: least similarity; another way to say the same.
        ef_search: HNSW candidates, or pgvectorscale's search list, 1 to 1000; by default 100, or as
            many as the filter needs.
        probes: IVFFlat lists to look into; by default ``lists ** 0.85`` of the index's,
            ``lists ** 0.9`` under a filter. Of VectorChord's last level; by default the index's.
        overfetch: rows fetched by a quantised index for each row wanted, and then ranked exactly;
            40 by default. Other indexes rank by themselves.
        exact: whether to leave indexes aside and compare with every row.
        of: of passages, whether to find documents, or ``"passage"`` for the passages themselves,
            as rows ``(passage, similarity)``.
        per_document: passages of each document, a row for each; ``limit`` counts documents.
        score: what ranks documents: the similarity of the ``"best"`` passage; ``"sum"``, the mean
            of it and the similarity of the document as a whole; ``"auto"``, a mean that leaves the
            whole out where whole documents answer the question far worse than passages do.

    Raises:
        DeclarationError: the column is not a vector column, or a number is out of its range.
        EncoderMismatchError: the query is a column of another encoder.
        VectorError: a query vector that cannot be compared with the column.
    """
    # Passages are a relationship; a column's attribute is none, and is not asked further.
    related = isinstance(getattr(column, "property", None), RelationshipProperty)
    declared = declared_passages(column) if related else None
    if declared is None:
        _only_of_passages(of, per_document, score)
        target = target_of(column)
    else:
        target = target_of(declared.passage.embedding)
    _check(limit, offset, ef_search, probes, overfetch)
    if declared is not None:
        entity: Any = column.parent.entity
        if entity is not declared.document:
            declared = replace(declared, document=entity)
        _require_no_document(declared, query)
    _require_no_other_object(target, query)
    criteria = criteria_of(where)
    furthest = _furthest(target.metric, max_distance, min_similarity)
    overrides = (ef_search, overfetch, probes)
    if declared is not None:
        asked = Asked(query, _are_many(query), furthest, overrides, exact, per_document, score)
        find = nearest_passages if of == "passage" else nearest_documents
        return find(declared, asked, limit, offset, criteria)
    itself: tuple[Any, ...] = ()
    right: Any
    if _are_many(query):
        right = [target.operand(one) for one in query]
    else:
        right = target.operand(query)
        itself = target.identity(query) if target.is_row(query) else ()
    search = Search(target, right, limit, offset, furthest, itself, overrides, exact)
    return search.narrowed("where", criteria, {})


def _require_no_document(declared: Declared, query: Any) -> None:
    """Refuse a document as the query, which has as many vectors as passages."""
    class_ = sa.inspect(declared.document).mapper.class_
    if isinstance(query, class_):
        name = class_.__name__
        raise DeclarationError(
            f"nearest({name}.{declared.name}, ...) was given an object of {name}, which has many "
            f"passages. Documents like it are nearest({name}.{declared.whole}, ...), by their "
            "wholes; or give one of its passages."
        )


def _require_no_other_object(target: Target, query: Any) -> None:
    one = query[0] if isinstance(query, (list, tuple)) and query else query
    if isinstance(sa.inspect(one, raiseerr=False), InstanceState) and not target.is_row(query):
        named = f"objects of {type(one).__name__}" if one is not query else type(one).__name__
        rows = "no class" if target.mapper is None else target.mapper.class_.__name__
        raise DeclarationError(
            f"nearest() was given {named} to search {target.column} with. It takes one object of "
            f"the class that is searched ({rows}), a text, a vector or an expression."
        )


def _only_of_passages(of: str, per_document: int, score: str) -> None:
    if (of, per_document, score) != ("document", 1, "auto"):
        raise DeclarationError(
            "nearest(): of, per_document and score are for an attribute made with passages_of(), "
            "such as Document.passages."
        )


def _are_many(query: Any) -> bool:
    """Whether a query is a list of queries, and not one vector."""
    if not isinstance(query, (list, tuple, np.ndarray)) or getattr(query, "ndim", 1) == 0:
        return False
    if not len(query):
        raise DeclarationError("nearest() was given an empty list of queries.")
    return isinstance(query[0], (str, list, tuple, np.ndarray))


def _check(
    limit: int | None,
    offset: int,
    ef_search: int | None,
    probes: int | None,
    overfetch: int | None,
) -> None:
    require_page("nearest", limit, offset)
    for name, number, most in (("ef_search", ef_search, MAX_EF_SEARCH), ("probes", probes, 32_768)):
        if number is not None and not (_is_whole(number) and 1 <= number <= most):
            raise DeclarationError(f"nearest(): {name} is {number!r}; pgvector takes 1 to {most}.")
    if overfetch is not None and not (_is_whole(overfetch) and overfetch >= 1):
        raise DeclarationError(f"nearest(): overfetch is {overfetch!r}; it starts at 1.")


def _is_whole(number: Any) -> bool:
    return isinstance(number, (int, np.integer))


def _furthest(
    metric: Metric, max_distance: float | None, min_similarity: float | None
) -> float | None:
    if max_distance is not None and min_similarity is not None:
        raise DeclarationError("nearest() takes max_distance or min_similarity, not both.")
    for name, number in (("max_distance", max_distance), ("min_similarity", min_similarity)):
        if number is not None and not is_number(number):
            raise DeclarationError(f"nearest() was given {name}={number!r}, which is no number.")
    if min_similarity is not None:
        return metric.offset - min_similarity
    return max_distance
