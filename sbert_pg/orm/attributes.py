"""The embedding columns of a mapped class, as its attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.exc import UnmappedColumnError

from sbert_pg.filling import Filling, fillings_of


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingAttribute:
    """An embedding column as an attribute of a mapped class.

    Attributes:
        key: its name as an attribute.
        filling: its column, and what the text is made of.
        source_keys: names of the source's columns as attributes, in order.
        row_keys: names of the table's primary key columns as attributes, in order.
    """

    key: str
    filling: Filling
    source_keys: tuple[str, ...]
    row_keys: tuple[str, ...]

    @property
    def table(self) -> sa.Table:
        """The table that holds the column; of a joined hierarchy the class's own part."""
        table: sa.Table = self.filling.column.table
        return table

    @property
    def row_columns(self) -> tuple[sa.Column[Any], ...]:
        """The table's primary key."""
        return tuple(self.table.primary_key)


_attributes: WeakKeyDictionary[Mapper[Any], tuple[EmbeddingAttribute, ...]] = WeakKeyDictionary()


def attributes_of(mapper: Mapper[Any]) -> tuple[EmbeddingAttribute, ...]:
    """The embedding columns that a mapper knows, with a source that it knows as well.

    Raises:
        SourceError: a source names a column that the table does not have, or one that is not text.
    """
    found = _attributes.get(mapper)
    if found is None:
        found = _attributes[mapper] = tuple(
            attribute
            for table in mapper.tables
            if isinstance(table, sa.Table)
            for filling in fillings_of(table)
            if (attribute := _attribute(mapper, filling)) is not None
        )
    return found


def _attribute(mapper: Mapper[Any], filling: Filling) -> EmbeddingAttribute | None:
    """``None`` where a column is not mapped: a sibling's in a single table, or an excluded one."""
    try:
        return EmbeddingAttribute(
            mapper.get_property_by_column(filling.column).key,
            filling,
            tuple(mapper.get_property_by_column(c).key for c in filling.source_columns),
            tuple(mapper.get_property_by_column(c).key for c in filling.column.table.primary_key),
        )
    except UnmappedColumnError:
        return None
