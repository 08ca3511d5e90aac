"""``hnsw_index`` and ``ivfflat_index``: plain SQLAlchemy indexes with pgvector's options.

They are ordinary ``Index`` objects: given in ``__table_args__`` they are created with the table and
Alembic sees them. ``distance`` and ``nearest`` read off them which expression they serve.
"""

from __future__ import annotations

from typing import Any, cast, get_args

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import MappedColumn
from sqlalchemy.sql.elements import ColumnElement

from sbert_pg.distance import (
    MAX_INDEXED_DIMENSIONS,
    IndexMethod,
    Metric,
    Similarity,
    metric_of,
)
from sbert_pg.errors import DeclarationError
from sbert_pg.types.indexed import Form, signs
from sbert_pg.types.vector import HalfVector, VectorType

VectorColumn = sa.Column[Any] | MappedColumn[Any] | str


def hnsw_index(
    name: str | None,
    column: VectorColumn,
    *,
    form: Form = "column",
    similarity: Similarity | None = None,
    m: int = 16,
    ef_construction: int = 128,
    where: ColumnElement[bool] | None = None,
) -> sa.Index:
    """An HNSW index on a vector column.

    Args:
        name: name of the index, or ``None`` for the metadata's naming convention.
        column: the column: its name, a ``Column``, or the result of ``embedding_column``.
        form: ``"column"`` as it is; ``"halfvec"`` cast to half precision, half the size at almost
            the same recall; ``"binary"`` one bit a dimension, for two-stage search.
        similarity: similarity function that the index orders by; the encoder's by default.
        m: connections a node, 2 to 100 (pgvector's default is 16).
        ef_construction: candidates while building, at least ``2 * m``. pgvector's default is 64;
            128 builds about a third slower and is worth a point of recall.
        where: predicate of a partial index.

    Raises:
        DeclarationError: a parameter is out of its range; or, when the index meets its table, the
            column is not a vector column or is too wide for the form.
    """
    if not 2 <= m <= 100:
        raise DeclarationError(f"hnsw_index: m is {m}; pgvector takes 2 to 100.")
    if not 2 * m <= ef_construction <= 1000:
        raise DeclarationError(
            f"hnsw_index: ef_construction is {ef_construction}; pgvector takes {2 * m} (twice m) "
            "to 1000."
        )
    options = {"m": m, "ef_construction": ef_construction}
    return _index("hnsw", name, column, form, similarity, options, where)


def ivfflat_index(
    name: str | None,
    column: VectorColumn,
    *,
    lists: int,
    form: Form = "column",
    similarity: Similarity | None = None,
    where: ColumnElement[bool] | None = None,
) -> sa.Index:
    """An IVFFlat index on a vector column; build it after the table has its rows.

    Args:
        name: name of the index, or ``None`` for the metadata's naming convention.
        column: the column: its name, a ``Column``, or the result of ``embedding_column``.
        lists: inverted lists, 1 to 32768; pgvector advises ``rows / 1000`` up to a million rows and
            ``sqrt(rows)`` beyond.
        form: see ``hnsw_index``.
        similarity: see ``hnsw_index``.
        where: predicate of a partial index.

    Raises:
        DeclarationError: as ``hnsw_index``; or for manhattan distance, which IVFFlat lacks.
    """
    if not 1 <= lists <= 32_768:
        raise DeclarationError(f"ivfflat_index: lists is {lists}; pgvector takes 1 to 32768.")
    return _index("ivfflat", name, column, form, similarity, {"lists": lists}, where)


def _index(
    method: IndexMethod,
    name: str | None,
    column: VectorColumn,
    form: Form,
    similarity: Similarity | None,
    options: dict[str, int],
    where: ColumnElement[bool] | None,
) -> sa.Index:
    if form not in get_args(Form):
        raise DeclarationError(
            f"{method}_index: form is {form!r}; use one of {', '.join(get_args(Form))}."
        )
    index = sa.Index(
        name,
        column.column if isinstance(column, MappedColumn) else column,
        postgresql_using=method,
        postgresql_with=options,
        postgresql_where=where,
    )

    def complete(index: sa.Index, table: sa.Table) -> None:
        # A column of a mapped class gets its name, and a name its column, when the table is made.
        real = next(iter(index.columns))
        expression, opclass = _indexed(method, table, real, form, similarity)
        if form != "column":
            expression = expression.label(f"{real.key}_{form}")
            # In place, since copies to other metadata are made from a second name of the list.
            cast("list[Any]", index.expressions)[:] = [expression]
        index.dialect_options["postgresql"]["ops"] = {expression.key: opclass}

    event.listen(index, "after_parent_attach", complete)
    if index.table is not None:
        complete(index, index.table)
    return index


def _indexed(
    method: IndexMethod,
    table: sa.Table,
    column: sa.Column[Any],
    form: Form,
    similarity: Similarity | None,
) -> tuple[Any, str]:
    """The expression to index, and the operator class for it."""
    type_, where = column.type, f"{method}_index on {table.name}.{column.name}"
    if not isinstance(type_, VectorType) or type_.dimensions is None:
        raise DeclarationError(
            f"{where}: the column has type {type_!r}; an index needs a vector column of known "
            "width, as embedding_column() or Vector(384) make it."
        )
    kinds = {"column": type_.storage, "halfvec": "halfvec", "binary": "bit"}
    width, limit = type_.dimensions, MAX_INDEXED_DIMENSIONS[kinds[form]]
    if width > limit:
        raise DeclarationError(
            f"{where}: {width} dimensions are too many for an index on {kinds[form]}, which takes "
            f"{limit}. Use form='halfvec' (up to 4000) or form='binary' (up to 64000)."
        )
    metric = _metric(where, method, type_, similarity)
    if form == "binary":
        return signs(column, width), "bit_hamming_ops"
    if form == "halfvec":
        return sa.cast(column, HalfVector(width)), metric.opclass("halfvec")
    return column, metric.opclass(type_.storage)


def _metric(
    where: str, method: IndexMethod, type_: VectorType, similarity: Similarity | None
) -> Metric:
    spec = getattr(type_, "encoder", None)
    name = similarity or (spec.similarity if spec is not None else "cosine")
    metric = metric_of(name)
    if method not in metric.index_methods:
        raise DeclarationError(
            f"{where}: pgvector has no {method} operator class for {name} distance; use "
            f"{' or '.join(f'{other}_index' for other in metric.index_methods)}."
        )
    return metric


__all__ = ["hnsw_index", "ivfflat_index"]
