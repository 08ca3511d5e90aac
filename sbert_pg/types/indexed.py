"""What a vector index says about itself, for those who build queries that it is to serve.

Everything is read off the ``Index`` object (access method, expression, operator class), so an index
written by hand or copied with ``to_metadata`` is understood as well as one from
``sbert_pg.indexes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BIT
from sqlalchemy.sql.functions import FunctionElement

from sbert_pg.distance import INDEX_METHODS, METRICS, IndexMethod, Metric

Form = Literal["column", "halfvec", "binary"]
_PREFERENCE: tuple[Form, ...] = ("column", "halfvec", "binary")


@dataclass(frozen=True, slots=True)
class IndexDescription:
    """How a vector index was made.

    Attributes:
        column: name of the vector column.
        method: access method.
        form: what is indexed: the column, its cast to ``halfvec``, or its signs.
        metric: metric of the operator class; for ``binary`` that of the exact rerank.
        dimensions: width of the column.
        cast_to: type that the column is cast to, for the form ``halfvec``.
        lists: inverted lists of an IVFFlat index.
        partial: whether it holds a part of the rows, and serves queries of that part alone.
    """

    column: str
    method: IndexMethod
    form: Form
    metric: Metric
    dimensions: int
    cast_to: sa.types.TypeEngine[Any] | None = None
    lists: int | None = None
    partial: bool = False

    @property
    def quantized(self) -> bool:
        """Whether distances by the index are too coarse to rank by."""
        return self.form == "binary"

    def indexed(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """The expression that the index is on, for one column expression."""
        if self.cast_to is not None:
            return sa.cast(column, self.cast_to)
        if self.form == "binary":
            return signs(column, self.dimensions)
        return column


def signs(column: sa.ColumnElement[Any], dimensions: int) -> sa.ColumnElement[Any]:
    """One bit a dimension, set where the element is positive."""
    return sa.cast(sa.func.binary_quantize(column), BIT(dimensions))


def description_of(index: sa.Index) -> IndexDescription | None:
    """The description of an index, where it is an HNSW or IVFFlat index on one vector column."""
    options = index.dialect_options["postgresql"]
    method = options["using"]
    if method not in INDEX_METHODS or len(index.expressions) != 1:
        return None
    expression: Any = index.expressions[0]
    opclass = next(iter((options["ops"] or {}).values()), "vector_l2_ops")
    column, form, cast_to = _parts(expression)
    if column is None or getattr(column.type, "dimensions", None) is None:
        return None
    return IndexDescription(
        column=column.name,
        method=cast("IndexMethod", method),
        form=form,
        metric=_metric_of(opclass, column),
        dimensions=column.type.dimensions,  # type: ignore[attr-defined]
        cast_to=cast_to,
        lists=(options["with"] or {}).get("lists"),
        partial=options["where"] is not None,
    )


def index_on(column: sa.ColumnElement[Any]) -> IndexDescription | None:
    """The description of the index that serves a column best.

    That is one of the encoder's own metric before another's, one of all rows before a partial one,
    an exact form before a quantised one, HNSW before IVFFlat.
    """
    for base in column.base_columns:
        table = getattr(base, "table", None)
        if not isinstance(table, sa.Table):
            continue
        found = [
            description
            for index in sorted(table.indexes, key=lambda index: str(index.name))
            if (description := description_of(index)) is not None
            and description.column == getattr(base, "name", None)
        ]
        if found:
            return min(found, key=lambda description: _rank(description, base))
    return None


def _rank(index: IndexDescription, column: Any) -> tuple[Any, ...]:
    spec = getattr(column.type, "encoder", None)
    foreign = spec is not None and index.metric.similarity != spec.similarity
    return foreign, index.partial, _PREFERENCE.index(index.form), index.method != "hnsw"


def _parts(
    expression: Any,
) -> tuple[sa.Column[Any] | None, Form, sa.types.TypeEngine[Any] | None]:
    """The column under an index expression, the form it is indexed in, and the cast's type."""
    while isinstance(expression, (sa.Label, sa.sql.elements.Grouping)):
        expression = expression.element
    if isinstance(expression, sa.Column):
        return expression, "column", None
    if not isinstance(expression, sa.Cast):
        return None, "column", None
    inner: Any = expression.clause
    to = expression.type
    while isinstance(inner, sa.sql.elements.Grouping):
        inner = inner.element
    if isinstance(inner, sa.Column) and getattr(to, "storage", None) == "halfvec":
        return inner, "halfvec", to
    if isinstance(to, BIT) and isinstance(inner, FunctionElement):
        arguments = list(inner.clauses)
        if len(arguments) == 1 and isinstance(arguments[0], sa.Column):
            return arguments[0], "binary", None
    return None, "column", None


def _metric_of(opclass: str, column: sa.Column[Any]) -> Metric:
    for metric in METRICS.values():
        if opclass.endswith(metric.opclass_suffix):
            return metric
    # An index over bits ranks by Hamming distance; what it reranks by is the encoder's affair.
    spec = getattr(column.type, "encoder", None)
    return METRICS[spec.similarity] if spec is not None else METRICS["cosine"]
