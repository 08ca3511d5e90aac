"""Operators of vector columns, under pgvector's names, and two that choose among them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.types import NullType, UserDefinedType

from sbert_pg import distance as d
from sbert_pg.errors import DeclarationError, EncoderMismatchError
from sbert_pg.spec import same_encoder_name
from sbert_pg.types import wire
from sbert_pg.types.indexed import index_on, signs

#: pgvector's operators of two vectors.
_OPERATORS = frozenset({d.L2, d.COSINE, d.INNER_PRODUCT, d.L1})


class VectorComparator(UserDefinedType.Comparator[Any]):
    """Methods of a ``Vector``, ``HalfVector`` or ``Embedding`` column in an expression.

    Each takes a vector (any sequence of numbers), another vector column or expression, or, on an
    embedding column, a text, which is encoded as a query when the statement is executed. Each gives
    a ``double precision`` expression.
    """

    def l2_distance(self, other: Any) -> sa.ColumnElement[float]:
        """Euclidean distance, ``<->``."""
        return apply_operator(self.expr, d.L2, other)

    def cosine_distance(self, other: Any) -> sa.ColumnElement[float]:
        """Cosine distance, ``<=>``: one minus the cosine."""
        return apply_operator(self.expr, d.COSINE, other)

    def max_inner_product(self, other: Any) -> sa.ColumnElement[float]:
        """Negative inner product, ``<#>``."""
        return apply_operator(self.expr, d.INNER_PRODUCT, other)

    def l1_distance(self, other: Any) -> sa.ColumnElement[float]:
        """Manhattan distance, ``<+>``."""
        return apply_operator(self.expr, d.L1, other)

    def hamming_distance(self, other: Any) -> sa.ColumnElement[float]:
        """Hamming distance of the signs, ``<~>``: dimensions in which one is positive alone."""
        return self._of_signs("<~>", other)

    def jaccard_distance(self, other: Any) -> sa.ColumnElement[float]:
        """Jaccard distance of the sets of positive dimensions, ``<%>``."""
        return self._of_signs("<%>", other)

    def distance(self, other: Any) -> sa.ColumnElement[float]:
        """Distance under the encoder's similarity function, in the form that the index serves.

        On a plain vector column it is the distance that the column's index has, else cosine.
        """
        return served_distance(self.expr, other)

    def similarity(self, other: Any) -> sa.ColumnElement[float]:
        """Similarity under the encoder's similarity function, larger for nearer.

        As in sentence-transformers: cosine and inner product as they are, the negative of euclidean
        and manhattan distance.
        """
        metric = metric_for(self.expr)
        value = apply_operator(self.expr, metric.operator, other)
        # Not "-value", which SQLAlchemy 2.0 gives the type of its left-hand column.
        return sa.literal(metric.offset, sa.Float()) - value

    def avg(self) -> sa.Function[Any]:
        """The mean of a group's vectors, as an array.

        ``func.avg(column)`` gives pgvector's text, since SQLAlchemy knows no type for it, and a
        library that gave it one would do so for all of the process.
        """
        return sa.func.avg(self.expr, type_=self.expr.type)

    def sum(self) -> sa.Function[Any]:
        """The sum of a group's vectors, as an array; the same as ``func.sum(column)``."""
        return sa.func.sum(self.expr)

    def operate(self, op: Any, *other: Any, **options: Any) -> Any:
        """``column.op("<=>")(vector)`` as the method of that operator: checked, typed, fenced."""
        if isinstance(op, custom_op) and op.opstring in _OPERATORS and len(other) == 1:
            return apply_operator(self.expr, op.opstring, other[0])
        return super().operate(op, *other, **options)

    def _of_signs(self, operator: str, other: Any) -> sa.ColumnElement[float]:
        width: int | None = self.expr.type.dimensions  # type: ignore[attr-defined]
        if width is None:
            raise DeclarationError(
                f"Column {self.expr} is declared without dimensions, and its signs cannot be "
                "compared without. Give them, as in Vector(384)."
            )
        operation = _operator(operator)
        right = signs(operand(self.expr, other), width)
        return sa.BinaryExpression(
            signs(self.expr, width), right, operation, type_=operation.return_type
        )


class _DistanceOperator(custom_op[float]):
    """An operator that compares quickly.

    An expression is asked a dozen times whether its operator is one of SQLAlchemy's, and the
    general form asks each of those for its protocol: a fifth of the time that a search is built in.
    """

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(other) is _DistanceOperator and self.opstring == other.opstring

    def __hash__(self) -> int:
        return hash(self.opstring)


def clause_of(column: Any) -> Any:
    """The column that a mapped attribute stands for; what is none is given back as it is."""
    return column.__clause_element__() if hasattr(column, "__clause_element__") else column


def base_of(column: sa.ColumnElement[Any]) -> sa.Column[Any] | None:
    """The table's own column behind one of an alias or a mapped class, where there is one."""
    return next((base for base in column.base_columns if isinstance(base, sa.Column)), None)


def attributes_of(entity: Any, columns: Iterable[sa.Column[Any]]) -> list[Any]:
    """The attributes of a mapped class, or of an alias of it, that some columns stand behind."""
    mapper: Any = sa.inspect(entity).mapper
    return [getattr(entity, mapper.get_property_by_column(column).key) for column in columns]


@cache
def _operator(operator: str) -> _DistanceOperator:
    return _DistanceOperator(operator, precedence=5, return_type=sa.Float(53))


def apply_operator(
    left: sa.ColumnElement[Any], operator: str, other: Any
) -> sa.ColumnElement[float]:
    """``left operator other`` as ``double precision``, with ``other`` bound as a vector."""
    # What left.op(operator)(other) comes to, without asking what may stand on either side, which
    # costs a search as much again.
    operation = _operator(operator)
    return sa.BinaryExpression(left, operand(left, other), operation, type_=operation.return_type)


def operand(left: sa.ColumnElement[Any], other: Any, type_: Any = None) -> sa.ColumnElement[Any]:
    """The right-hand side of an operator: an expression as it is, anything else as a parameter."""
    other = clause_of(other)
    if isinstance(other, sa.BindParameter) and isinstance(other.type, NullType):
        return sa.type_coerce(other, type_ or query_type(left))
    if isinstance(other, sa.ClauseElement):
        if isinstance(other, (sa.Select, sa.CompoundSelect)):
            other = other.scalar_subquery()
        _check_same_space(left, other)
        return cast("sa.ColumnElement[Any]", other)
    if other is None:
        raise DeclarationError(
            "A vector column was compared with None. Give a text, a vector or an expression; "
            "a row without a vector is found with column.is_(None)."
        )
    type_ = type_ or query_type(left)
    return sa.literal(_value(left, other, type_), type_)


def _value(left: sa.ColumnElement[Any], other: Any, type_: Any) -> Any:
    """A vector in its finished form, or a text that is encoded when the statement runs."""
    vector = wire.vector_in(other, type_.dimensions or 0) if isinstance(other, str) else other
    if vector is not None:
        # Checked where the mistake is made; the bind processor takes the finished form as it is.
        return wire.WireVector(type_.checked(vector), type_.storage)
    if not hasattr(left.type, "query_type"):
        raise DeclarationError(
            f"Column {left} was compared with the text {other[:40]!r} and has no encoder. Declare "
            "it with embedding_column() or the type Embedding, or give a vector."
        )
    return other


def _check_same_space(left: sa.ColumnElement[Any], right: Any) -> None:
    """Refuse to compare columns of two encoders; what only the database knows is its guard's."""
    ours = getattr(left.type, "encoder", None)
    theirs = getattr(getattr(right, "type", None), "encoder", None)
    if ours is None or theirs is None:
        return
    if ours.dimensions != theirs.dimensions or not same_encoder_name(ours.name, theirs.name):
        raise EncoderMismatchError(
            f"{left} belongs to encoder {ours.name!r} ({ours.dimensions} dimensions) and {right} "
            f"to {theirs.name!r} ({theirs.dimensions}); distances between two vector spaces mean "
            "nothing. Compare columns of one encoder."
        )


def query_type(left: sa.ColumnElement[Any]) -> Any:
    """The type of a parameter that is compared with ``left``, one of the vector types."""
    for_query = getattr(left.type, "query_type", None)
    return left.type if for_query is None else for_query(left)


def metric_for(column: sa.ColumnElement[Any]) -> d.Metric:
    """The metric of the column's encoder; of its index where there is no encoder; else cosine."""
    spec = getattr(column.type, "encoder", None)
    if spec is not None:
        return d.metric_of(spec.similarity)
    index = index_on(column)
    return index.metric if index is not None else d.METRICS["cosine"]


def served_distance(column: sa.ColumnElement[Any], other: Any) -> sa.ColumnElement[float]:
    """The distance expression that an index declared on the column's table can order by."""
    metric = metric_for(column)
    index = index_on(column)
    if index is None or index.quantized:
        return apply_operator(column, metric.operator, other)
    if index.metric is not metric and not _rank_alike(column, index.metric, metric):
        return apply_operator(column, metric.operator, other)
    left = index.indexed(column)
    right = operand(column, other)
    if left is not column:
        right = sa.cast(right, left.type)
    return apply_operator(left, index.metric.operator, right)


def _rank_alike(column: sa.ColumnElement[Any], a: d.Metric, b: d.Metric) -> bool:
    spec = getattr(column.type, "encoder", None)
    return (
        spec is not None
        and bool(spec.normalized)
        and {a.similarity, b.similarity} <= d.RANK_UNIT_VECTORS_ALIKE
    )
