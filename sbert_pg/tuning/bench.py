"""The temporary table on which forms of index are measured, with a sample of a table's rows."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TSVECTOR

from sbert_pg import system
from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.errors import DeclarationError
from sbert_pg.indexes.read import CopyTable
from sbert_pg.types.encoding import query_vectors
from sbert_pg.types.vector import VectorType, plain_type

#: Rows of a statement that copies the sample.
_CHUNK = 5000


class Bench:
    """The temporary table of the sample, and what is searched for in it."""

    def __init__(
        self,
        connection: sa.Connection,
        base: sa.Column[Any],
        sample: int,
        queries: int,
        seed: int,
    ) -> None:
        self.connection, self.base = connection, base
        table: Any = base.table
        self.name = f"sbert_advice_{uuid.uuid4().hex[:12]}"
        keys = [c.name for c in table.primary_key]
        if not keys:
            raise DeclarationError(
                f"{table.fullname} has no primary key, which a sample is drawn by."
            )
        key_columns = [table.c[name] for name in keys]
        drawn = catalog_rows.sample(
            connection,
            table,
            keys,
            [*key_columns, base],
            where=[base.is_not(None)],
            size=sample + queries,
            seed=seed,
        )
        self.vectors = [np.asarray(row[-1], dtype=np.float32) for row in drawn[:queries]]
        chosen = [tuple(row[:-1]) for row in drawn[queries:]]
        if not chosen:
            raise DeclarationError(f"{table.fullname}.{base.name} has too few vectors to measure.")
        self.rows = len(chosen)
        connection.execute(CopyTable(self.name, table.schema, table.name))
        copy = self.table()
        for i in range(0, len(chosen), _CHUNK):
            part = sa.select(*self.columns()).where(
                sa.tuple_(*key_columns).in_(chosen[i : i + _CHUNK])
            )
            connection.execute(sa.insert(copy).from_select([c.name for c in copy.c], part))
        connection.execute(system.ddl("ANALYZE %(fullname)s", copy))

    def take_queries(self, questions: Sequence[str]) -> None:
        """Search for texts in place of rows."""
        if questions:
            encoder = getattr(self.base.type, "encoder", None)
            if encoder is None:
                raise DeclarationError(
                    f"{self.base} has no encoder, so no question can be encoded."
                )
            self.vectors = query_vectors(encoder, list(questions))

    def table(self, make: Callable[[str], sa.Index] | None = None) -> sa.Table:
        """The temporary table, with one index declared."""
        type_: Any = self.base.type
        own = plain_type(type_.storage, type_.dimensions)
        columns = [
            sa.Column(c.name, own if c is self.base else c.type, primary_key=c.primary_key)
            for c in self.columns()
        ]
        extra = () if make is None else (make(f"{self.name}_index"),)
        return sa.Table(self.name, sa.MetaData(), *columns, *extra, schema="pg_temp")

    def columns(self) -> list[sa.Column[Any]]:
        """The table's columns without its other vectors."""
        table: Any = self.base.table
        return [c for c in table.c if c is self.base or not isinstance(c.type, VectorType)]

    def usual_filters(self) -> dict[str, sa.ColumnElement[bool]]:
        """Equality with common values of the column that an index of the table begins with."""
        table: Any = self.base.table
        for name in self._leading():
            column = table.c[name]
            if column.primary_key or isinstance(column.type, (sa.LargeBinary, sa.JSON)):
                continue
            values = self._common_values(name)
            if len(values) > 1:
                return {
                    f"{name} = {value}"[:40]: column == sa.literal(value, column.type)
                    for value in (values[0], values[-1])
                }
        return {}

    def _leading(self) -> list[str]:
        """Columns that an index begins with, but vectors and texts."""
        table: Any = self.base.table
        schema = system.schema_in(self.connection, table.schema)
        indexes = sa.inspect(self.connection).get_indexes(table.name, schema=schema)
        first = (index["column_names"][0] for index in indexes if index["column_names"])
        names = {c.name for c in table.c if not isinstance(c.type, (VectorType, TSVECTOR))}
        return [name for name in dict.fromkeys(first) if name is not None and name in names]

    def _common_values(self, name: str) -> list[Any]:
        """Values of a column that a thousandth of the rows have at least, the commonest first."""
        own = self.table().c[name]
        rows = self.connection.execute(
            sa.select(own)
            .where(own.is_not(None))
            .group_by(own)
            .having(sa.func.count() >= max(2, self.rows // 1000))
            .order_by(sa.func.count().desc(), own)
            .limit(50)
        )
        return list(rows.scalars())
