"""A binding as Python sees it, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from sbert_pg.catalog import keys, system, tables
from sbert_pg.distance import Storage
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.guard import ColumnIdentity


@dataclass(frozen=True, slots=True)
class Binding:
    """One row of ``sbert.embedding_column``, with its encoder where it has one.

    Attributes:
        id: number of the binding, used nowhere else and never again.
        relation: OID of the table.
        schema: schema of the table, as it is named now.
        table: name of the table, as it is named now.
        column: name of the vector column.
        declared: the encoder as the migration declared it.
        source: what the text of a row is made of.
        key_columns: the columns that name a row.
        key_types: their types as SQL spells them, domains resolved.
        storage: ``"vector"`` or ``"halfvec"``.
        state: ``"filling"``, ``"active"`` or ``"replaced"``.
        replaces: name of the column that this one is to replace.
        partitioned: whether the table is partitioned.
        sealed: spec of the encoder that the column belongs to, ``None`` before its first use.
        fingerprint: fingerprint of that encoder.
        sealed_here: whether it was given that encoder in the transaction that read it, which may
            still be rolled back.
    """

    id: int
    relation: int
    schema: str
    table: str
    column: str
    declared: EncoderSpec
    source: Source
    key_columns: tuple[str, ...]
    key_types: tuple[str, ...]
    storage: Storage
    state: str
    replaces: str | None
    partitioned: bool
    sealed: EncoderSpec | None
    fingerprint: str | None
    sealed_here: bool = False

    @property
    def identity(self) -> ColumnIdentity:
        """Schema, table and column."""
        return ColumnIdentity(self.schema, self.table, self.column)

    @property
    def dimensions(self) -> int:
        """Width of the vectors."""
        return self.declared.dimensions

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}.{self.column}"

    def clause(self, name: str | None = None) -> sa.TableClause:
        """The table with its key columns, source columns and the vector column, for statements.

        Source columns have the type ``Text``, key columns their own; the vector column has no type.
        """
        columns: dict[str, sa.ColumnClause[Any]] = {}
        for key, type_ in zip(self.key_columns, self.key_types, strict=True):
            columns[key] = sa.column(key, keys.Named(type_))
        for source in self.source.columns:
            columns[source] = sa.column(source, sa.Text)
        columns[self.column] = sa.column(self.column)
        return sa.table(self.table, *columns.values(), schema=self.schema)

    def key_text(self, table: sa.FromClause) -> sa.ColumnElement[str]:
        """The key of a row of the table as ``sbert.pending`` has it."""
        return keys.key_text([table.c[name] for name in self.key_columns], self.key_types)

    def unpacked(self, wanted: list[str] | sa.ColumnElement[str]) -> sa.Subquery:
        """Keys as rows: ``key``, and ``k0``, ``k1``... typed as the key columns are."""
        return keys.unpacked(wanted, self.key_columns, self.key_types)

    def matches(self, table: sa.FromClause, wanted: sa.Subquery) -> sa.ColumnElement[bool]:
        """Whether a row of the table is the one that a row of ``unpacked`` names."""
        return sa.and_(
            *(table.c[name] == wanted.c[f"k{i}"] for i, name in enumerate(self.key_columns))
        )


def select_bindings() -> sa.Select[Any]:
    """Bindings whose table exists; rows are read by ``from_row``."""
    column, encoder = tables.embedding_column, tables.encoder
    replaced = column.alias("replaced")
    return (
        sa.select(
            column.c.id,
            sa.cast(sa.cast(column.c.relation, pg.OID), sa.BigInteger).label("relation"),
            sa.cast(system.NAMESPACE.c.nspname, sa.Text).label("schema"),
            sa.cast(system.CLASS.c.relname, sa.Text).label("table"),
            column.c.column_name,
            column.c.declared,
            column.c.source,
            column.c.key_columns,
            _key_types(column).label("key_types"),
            column.c.storage,
            column.c.state,
            replaced.c.column_name.label("replaces"),
            (system.CLASS.c.relkind == "p").label("partitioned"),
            encoder.c.spec,
            encoder.c.fingerprint,
            # now() is the start of the transaction: a seal of its own can still be rolled back.
            sa.func.coalesce(column.c.sealed_at == sa.func.now(), sa.false()).label("sealed_here"),
        )
        .select_from(column)
        .join(system.CLASS, system.CLASS.c.oid == column.c.relation)
        .join(system.NAMESPACE, system.NAMESPACE.c.oid == system.CLASS.c.relnamespace)
        .outerjoin(encoder, encoder.c.id == column.c.encoder_id)
        .outerjoin(replaced, replaced.c.id == column.c.replaces_id)
    )


def _key_types(column: sa.FromClause) -> sa.ScalarSelect[Any]:
    """Types of the key columns, in order, domains resolved to what they are made of."""
    name = (
        sa.func.unnest(column.c.key_columns)
        .table_valued(sa.column("name", sa.Text), with_ordinality="position", name="key_column")
        .render_derived()
    )  # fmt: skip
    base = sa.case(
        (system.TYPE.c.typtype == "d", system.TYPE.c.typbasetype), else_=system.TYPE.c.oid
    )
    # -1 and not NULL, which would spell char(n) as a type of one character.
    spelt = sa.func.format_type(base, -1)
    return (
        sa.select(sa.func.array_agg(pg.aggregate_order_by(spelt, name.c.position)))
        .select_from(name)
        .join(
            system.ATTRIBUTE,
            sa.and_(
                system.ATTRIBUTE.c.attrelid == column.c.relation,
                system.ATTRIBUTE.c.attname == name.c.name,
            ),
        )
        .join(system.TYPE, system.TYPE.c.oid == system.ATTRIBUTE.c.atttypid)
        .correlate(column)
        .scalar_subquery()
    )


def from_row(row: sa.Row[Any]) -> Binding:
    """A row of ``select_bindings`` as a binding."""
    return Binding(
        id=row.id,
        relation=row.relation,
        schema=row.schema,
        table=row.table,
        column=row.column_name,
        declared=EncoderSpec.from_json(row.declared),
        source=Source.from_json(row.source),
        key_columns=tuple(row.key_columns),
        key_types=tuple(row.key_types or ()),
        storage=cast(Storage, row.storage),
        state=row.state,
        replaces=row.replaces,
        partitioned=row.partitioned,
        sealed=None if row.spec is None else EncoderSpec.from_json(row.spec),
        fingerprint=row.fingerprint,
        sealed_here=row.sealed_here,
    )
