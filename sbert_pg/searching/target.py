"""What is searched: a vector column, its table or mapped class, and the index that serves it."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import InstrumentedAttribute, aliased
from sqlalchemy.sql.operators import sub

from sbert_pg.distance import Metric
from sbert_pg.errors import DeclarationError
from sbert_pg.searching.statement import NearestSelect
from sbert_pg.types.comparator import metric_for, operand
from sbert_pg.types.indexed import IndexDescription, index_on
from sbert_pg.types.vector import VectorType


class Target:
    """The searched column, and what to select of its table or mapped class.

    Attributes:
        column: the column in expressions.
        metric: metric of its encoder.
        index: the index that serves it, or ``None``.
        selected: the entity, or the columns that hold no vectors.
        key: primary key of the rows.
        rows: a select of the rows that have a vector.
    """

    def __init__(self, column: Any) -> None:
        clause = column.__clause_element__() if hasattr(column, "__clause_element__") else column
        if not isinstance(clause, sa.ColumnElement) or not isinstance(clause.type, VectorType):
            raise DeclarationError(
                f"nearest() was given {column!r}, which is no vector column. Give an attribute "
                "made with embedding_column(), or a column of type Vector, HalfVector or Embedding."
            )
        self.column: sa.ColumnElement[Any] = clause
        self.metric: Metric = metric_for(clause)
        self.index: IndexDescription | None = index_on(clause)
        self.key: list[Any]
        parent = getattr(column, "parent", None)
        self.entity: Any = None if parent is None else parent.entity
        if self.entity is not None:
            self.mapper = mapper = sa.inspect(self.entity).mapper
            self.selected: list[Any] = [self.entity]
            self.key = [
                getattr(self.entity, mapper.get_property_by_column(c).key)
                for c in mapper.primary_key
            ]
        else:
            table = getattr(clause, "table", None)
            if table is None:
                raise DeclarationError(
                    f"nearest() was given {column!r}, which belongs to no table."
                )
            self.mapper = None
            self.selected = [c for c in table.c if not isinstance(c.type, VectorType)]
            self.key = list(table.primary_key)
        self._offset = sa.literal_column(str(int(self.metric.offset)), sa.Float(53))
        #: The rows that have a vector, by key; what all searches of this target begin with.
        self.rows = NearestSelect(*self.selected).where(clause.is_not(None)).order_by(*self.key)

    def similarity_from(self, distance: sa.ColumnElement[float]) -> sa.Label[float]:
        """The similarity that belongs to a distance."""
        difference = sa.BinaryExpression(self._offset, distance, sub, type_=self._offset.type)
        return difference.label("similarity")

    def operand(self, query: Any) -> sa.ColumnElement[Any]:
        """The query as the right-hand side of a distance operator."""
        if not self._is_row(query):
            return operand(self.column, query)
        identity = sa.inspect(query).identity
        if identity is None:
            raise DeclarationError(
                f"nearest() was given {query!r}, which is not in the database yet. Flush it first, "
                "or search with its text."
            )
        # Its vector never leaves the server.
        other = aliased(self.mapper.class_)
        base = next(c for c in self.column.base_columns if isinstance(c, sa.Column))
        vector = getattr(other, self.mapper.get_property_by_column(base).key)
        return sa.select(vector).where(*self._is_identity(other, identity)).scalar_subquery()

    def criteria_for(
        self, query: Any, right: sa.ColumnElement[Any]
    ) -> list[sa.ColumnElement[bool]]:
        """What the kind of query asks of a row, besides that it has a vector."""
        if not self._is_row(query):
            return []
        itself = sa.and_(*self._is_identity(self.entity, sa.inspect(query).identity))
        return [right.is_not(None), sa.not_(itself)]

    def _is_row(self, query: Any) -> bool:
        return self.mapper is not None and isinstance(query, self.mapper.class_)

    def _is_identity(self, entity: Any, identity: Any) -> list[sa.ColumnElement[bool]]:
        keys = [self.mapper.get_property_by_column(c).key for c in self.mapper.primary_key]
        return [getattr(entity, key) == value for key, value in zip(keys, identity, strict=True)]


#: Where a mapped property keeps the targets of its attributes.
_KEPT = "sbert_pg.targets"


def target_of(column: Any) -> Target:
    """The target of an attribute or column; that of a mapped class's own attribute is kept.

    Raises:
        DeclarationError: it is no vector column.
    """
    if not isinstance(column, InstrumentedAttribute):
        return Target(column)
    table = getattr(column.parent, "local_table", None)
    if not isinstance(table, sa.Table):
        return Target(column)
    # An index that is declared later counts from then on.
    key = (column.class_, len(table.indexes))
    known: dict[tuple[Any, int], Target] = column.property.info.setdefault(_KEPT, {})
    found = known.get(key)
    if found is None:
        found = known[key] = Target(column)
    return found
