"""Look bindings up: a binding with what its rows say, as SQL that the server has written.

``sbert.expressions_v1`` is the one place where the text of a row, its digest and what follows from
them are spelt in SQL. Python asks for them once for each binding and puts them into statements as
they are, over bare column names or over the columns of a table or alias.
"""

from __future__ import annotations

import re
import secrets
import uuid
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection
from sqlalchemy.sql.expression import ClauseList, Grouping
from sqlalchemy.types import UserDefinedType

from sbert_pg import system
from sbert_pg.catalog import tables
from sbert_pg.distance import Storage
from sbert_pg.errors import CatalogError, NotBoundError
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.sqlstates import translated
from sbert_pg.system import ColumnIdentity, identity_of

Name = Literal["text", "proof", "of", "digest", "stale", "proven", "requeue", "failed"]

#: What stands before every column name in what the server is asked for; it cannot be guessed, so no
#: separator, template or name holds it.
_QUALIFIER = f"q{secrets.token_hex(12)}."
_COLUMN = re.compile(re.escape(_QUALIFIER) + r'("(?:[^"]|"")+"|[a-z_][a-z0-9_]*)')
_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "text": sa.Text(), "proof": sa.Text(), "of": sa.Text(), "digest": sa.Uuid(),
    "stale": sa.Boolean(), "proven": sa.Boolean(), "requeue": sa.Uuid(), "failed": sa.Boolean(),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Expressions:
    """What rows say of themselves, as SQL over the columns of a bound table.

    - ``text``: the text of the row; ``NULL`` where it has none.
    - ``proof``: the half of the digest that proves the row's vector, 16 hexadecimal digits.
    - ``of``: the half of the digest that names the row's text, as many digits, or ``NULL``.
    - ``digest``: what the companion of a fresh row holds, a ``uuid``.
    - ``stale``: whether the row is pending; the predicate of the queue's index, to the letter.
    - ``proven``: whether the row's vector is proven by its companion, or missing.
    - ``requeue``: a value for the companion that makes a row pending and its vector stay proven.
    - ``failed``: whether the row has failed for its text; the predicate of the other index.
    """

    _texts: tuple[tuple[str, str], ...]

    def on(self, table: sa.FromClause, name: Name) -> sa.ColumnElement[Any]:
        """One of the expressions over the columns of a table, alias or subquery.

        Args:
            table: has the columns of the bound table, under their names.
            name: which expression.

        Raises:
            KeyError: the table lacks a column.
        """
        columns = {column.name: column for column in table.c}
        parts: list[sa.ColumnElement[Any]] = []
        nothing: Any = None  # what stands between the parts
        for i, part in enumerate(_COLUMN.split(dict(self._texts)[name])):
            if i % 2:
                parts.append(
                    columns[system.PLAIN.identifier_preparer.unformat_identifiers(part)[0]]
                )
            elif part:
                parts.append(sa.literal_column(part))
        return sa.type_coerce(
            Grouping(ClauseList(*parts, operator=nothing, group=False)), _TYPES[name]
        )

    def bare(self, name: Name) -> str:
        """One of them as text over bare column names, for statements that name the table alone."""
        return dict(self._texts)[name].replace(_QUALIFIER, "")


def _expressions_of(binding_id: sa.ColumnElement[Any]) -> sa.ScalarSelect[Any]:
    """A subquery with the expressions of a binding, in the order of ``_TYPES``."""
    names = [sa.column("of_text" if name == "of" else name, sa.Text) for name in _TYPES]
    row = sa.func.sbert.expressions_v1(
        binding_id, sa.literal(_QUALIFIER, sa.Text), type_=sa.Text()
    ).table_valued(*names, name="written")
    return sa.select(pg.array([row.c[column.name] for column in names])).scalar_subquery()


class Named(UserDefinedType[object]):
    """A column type by the name that ``format_type`` gives it, as the server spelt it."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: object) -> str:
        """The type as DDL spells it."""
        return self.name


@dataclass(frozen=True, slots=True)
class Binding:
    """One row of ``sbert.binding``, with its encoder where it has one.

    Attributes:
        id: identity of the binding, never used again.
        relation: OID of the table.
        schema: schema of the table, as it is named now.
        table: name of the table, as it is named now.
        column: name of the vector column.
        companion: name of the column beside it, which says what the vector was made from.
        declared: the encoder as the migration declared it.
        source: what the text of a row is made of.
        key_columns: the columns that name a row.
        key_types: their types as SQL spells them, domains resolved.
        null_text: whether a row whose source columns are all ``NULL`` has no text; else ``''``.
        storage: ``"vector"`` or ``"halfvec"``.
        state: ``"filling"``, ``"active"`` or ``"replaced"``.
        replaces: name of the column that this one is to replace.
        partitioned: whether the table is partitioned.
        sealed: spec of the encoder that the column belongs to, ``None`` before its first use.
        fingerprint: fingerprint of that encoder.
        sealed_here: whether it was given that encoder in the transaction that read it, which may
            still be rolled back.
        utf8: whether the server's encoding is UTF8, so that ``sbert_pg.source`` agrees with it.
        expressions: what its rows say, as SQL.
    """

    id: uuid.UUID
    relation: int
    schema: str
    table: str
    column: str
    companion: str
    declared: EncoderSpec
    source: Source
    key_columns: tuple[str, ...]
    key_types: tuple[str, ...]
    null_text: bool
    storage: Storage
    state: str
    replaces: str | None
    partitioned: bool
    sealed: EncoderSpec | None
    fingerprint: str | None
    sealed_here: bool
    utf8: bool
    expressions: Expressions

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

    def clause(self, *others: str) -> sa.TableClause:
        """The table with its key, source and vector columns and the companion, for statements.

        Source columns have the type ``Text``, key columns their own, others that are named none.
        """
        columns: dict[str, sa.ColumnClause[Any]] = {}
        for key, type_ in zip(self.key_columns, self.key_types, strict=True):
            columns[key] = sa.column(key, Named(type_))
        for source in self.source.columns:
            columns[source] = sa.column(source, sa.Text)
        for name in (*self.source.place, *others):
            columns.setdefault(name, sa.column(name))
        columns[self.column] = sa.column(self.column)
        columns[self.companion] = sa.column(self.companion, sa.Uuid)
        return sa.table(self.table, *columns.values(), schema=self.schema)

    def is_here(self) -> sa.ColumnElement[bool]:
        """Whether the table of this name is still the bound one; evaluated once in a statement."""
        name = sa.func.format("%I.%I", self.schema, self.table)
        oid = sa.cast(sa.func.to_regclass(name), pg.OID)
        return sa.cast(oid, sa.BigInteger) == sa.literal(self.relation, sa.BigInteger)

    def is_stale(self, table: sa.FromClause) -> sa.ColumnElement[bool]:
        """Whether a row of a table, alias or subquery is pending."""
        return self.expressions.on(table, "stale")

    def is_fresh(self, table: sa.FromClause) -> sa.ColumnElement[bool]:
        """Whether a row has the vector of its text, has none, or has failed for its text."""
        return sa.not_(self.is_stale(table))

    def is_proven(self, table: sa.FromClause) -> sa.ColumnElement[bool]:
        """Whether a row has a vector, and its companion proves it."""
        proven = self.expressions.on(table, "proven")
        return sa.and_(table.c[self.column].is_not(None), proven)

    def class_of(self, table: sa.FromClause) -> sa.ColumnElement[int]:
        """0 for new and changed rows, 1 for a backfill's: the first column of the queue's index."""
        return sa.cast(table.c[self.companion].is_(None), sa.Integer)


def called(connection: Connection, function: sa.ColumnElement[Any]) -> Any:
    """What a function of the schema returns; its errors are the library's own."""
    with translated():
        return connection.execute(sa.select(function)).scalar_one()


def relation_of(connection: Connection, identity: ColumnIdentity) -> sa.ColumnElement[Any]:
    """The table as ``regclass``; NULL where it is not there."""
    return sa.func.to_regclass(qualified(connection, identity))


def binding_id_of(connection: Connection, identity: ColumnIdentity) -> uuid.UUID | None:
    """Identity of a column's binding, where the catalog is installed and there is one."""
    known: uuid.UUID | None = connection.execute(_known_id(connection, identity)).scalar_one()
    return known


def _known_id(connection: Connection, identity: ColumnIdentity) -> sa.Select[Any]:
    relation = relation_of(connection, identity)
    return sa.select(sa.func.sbert.binding_id_v1(relation, identity.column, type_=sa.Uuid()))


def qualified(connection: Connection, identity: ColumnIdentity) -> str:
    """The table's name as ``regclass`` reads it, every part quoted."""
    return system.name_in(connection, identity.schema, identity.table)


def mapped(connection: Connection, identity: ColumnIdentity) -> ColumnIdentity:
    """The column that a connection's ``schema_translate_map`` makes of one."""
    return identity._replace(schema=system.schema_in(connection, identity.schema))


def binding_of(connection: Connection, column: ColumnIdentity | sa.Column[Any]) -> Binding | None:
    """The binding of a column, or ``None`` where it, or the whole catalog, is not there.

    Args:
        connection: a connection to the database.
        column: a column of a table, or its identity. A partition stands for its table, and a
            ``schema_translate_map`` of the connection is followed.

    Raises:
        CatalogError: this role may not use the catalog.
    """
    identity = identity_of(column)
    if not installed(connection):
        return None
    # In one statement: between two the column may change hands, and would seem not to be bound.
    known = _known_id(connection, identity).scalar_subquery()
    return _first(connection, tables.binding.c.id == known)


def require_binding(connection: Connection, column: ColumnIdentity | sa.Column[Any]) -> Binding:
    """As ``binding_of``, for columns that have to be bound.

    Raises:
        NotBoundError: it is not bound, or the catalog is not installed.
    """
    binding = binding_of(connection, column)
    if binding is None:
        raise NotBoundError(
            f"Column {identity_of(column)} is not bound to an encoder in this database. A "
            "migration binds it (alembic revision --autogenerate), or sbert_pg.catalog.bind(). A "
            "table in a tenant's schema needs the schema_translate_map or search path of that."
        )
    return binding


def binding_by_id(connection: Connection, binding_id: uuid.UUID) -> Binding | None:
    """The binding with an identity, or ``None``."""
    return _first(connection, tables.binding.c.id == binding_id)


def all_bindings(connection: Connection) -> list[Binding]:
    """Every binding whose table exists, oldest first; none where the catalog is not installed.

    Raises:
        CatalogError: this role may not use the catalog.
    """
    if not installed(connection):
        return []
    c = tables.binding.c
    return [
        _from_row(row) for row in connection.execute(_select().order_by(c.created_at, c.relation))
    ]


def installed(connection: Connection) -> bool:
    """Whether the catalog is in the database.

    Raises:
        CatalogError: it is, and this role may not use it.
    """
    if connection.dialect.name != "postgresql":
        return False
    row = connection.execute(
        sa.select(sa.func.has_schema_privilege(system.NAMESPACE.c.oid, "USAGE")).where(
            system.NAMESPACE.c.nspname == tables.SCHEMA,
            sa.exists().where(
                system.CLASS.c.relnamespace == system.NAMESPACE.c.oid,
                system.CLASS.c.relname == tables.binding.name,
            ),
        )
    ).first()
    if row is not None and not row[0]:
        raise lacking(connection, "writer", f"use the schema {tables.SCHEMA!r}")
    return row is not None


def lacking(connection: Connection, capability: str, what: str) -> CatalogError:
    """The error for a role without a capability."""
    role = connection.execute(sa.select(sa.func.current_user())).scalar_one()
    return CatalogError(
        f"The role {role!r} may not {what}. Let the owner of the schema {tables.SCHEMA!r} run: "
        f"SELECT sbert.grant_v1('{role}', '{capability}')"
    )


def _first(connection: Connection, *where: sa.ColumnElement[bool]) -> Binding | None:
    row = connection.execute(_select().where(*where)).first()
    return None if row is None else _from_row(row)


def _select() -> sa.Select[Any]:
    """Bindings whose table exists, by the names of ``Binding``; rows are read by ``_from_row``."""
    binding, encoder = tables.binding, tables.encoder
    replaced = binding.alias("replaced")
    return (
        sa.select(
            binding.c.id,
            sa.cast(sa.cast(binding.c.relation, pg.OID), sa.BigInteger).label("relation"),
            sa.cast(system.NAMESPACE.c.nspname, sa.Text).label("schema"),
            sa.cast(system.CLASS.c.relname, sa.Text).label("table"),
            binding.c.column_name.label("column"),
            binding.c.companion,
            binding.c.declared,
            binding.c.source,
            binding.c.key_columns,
            _key_types(binding).label("key_types"),
            binding.c.null_text,
            binding.c.storage,
            binding.c.state,
            replaced.c.column_name.label("replaces"),
            (system.CLASS.c.relkind == "p").label("partitioned"),
            encoder.c.spec.label("sealed"),
            encoder.c.fingerprint,
            # now() is the start of the transaction: its own seal can still be rolled back.
            sa.func.coalesce(binding.c.sealed_at == sa.func.now(), sa.false()).label("sealed_here"),
            (sa.func.current_setting("server_encoding") == "UTF8").label("utf8"),
            _expressions_of(binding.c.id).label("expressions"),
        )
        .select_from(binding)
        .join(system.CLASS, system.CLASS.c.oid == binding.c.relation)
        .join(system.NAMESPACE, system.NAMESPACE.c.oid == system.CLASS.c.relnamespace)
        .outerjoin(encoder, encoder.c.id == binding.c.encoder_id)
        .outerjoin(replaced, replaced.c.id == binding.c.replaces_id)
    )


def _key_types(binding: sa.FromClause) -> sa.ScalarSelect[Any]:
    """Types of the key columns, in order, domains resolved to what they are made of."""
    name = system.unnested("key_column", "position", name=binding.c.key_columns)
    # -1 and not NULL, which would spell char(n) as a type of one character.
    spelt = sa.func.format_type(sa.func.sbert.base_type_v1(system.ATTRIBUTE.c.atttypid), -1)
    return (
        sa.select(sa.func.array_agg(pg.aggregate_order_by(spelt, name.c.position)))
        .select_from(name)
        .join(
            system.ATTRIBUTE,
            sa.and_(
                system.ATTRIBUTE.c.attrelid == binding.c.relation,
                system.ATTRIBUTE.c.attname == name.c.name,
            ),
        )
        .correlate(binding)
        .scalar_subquery()
    )


def _from_row(row: sa.Row[Any]) -> Binding:
    read = {
        "declared": EncoderSpec.from_json(row.declared),
        "source": Source.from_json(row.source),
        "key_columns": tuple(row.key_columns),
        "key_types": tuple(row.key_types or ()),
        "sealed": None if row.sealed is None else EncoderSpec.from_json(row.sealed),
        "expressions": Expressions(tuple(zip(_TYPES, row.expressions, strict=True))),
    }
    return Binding(**{**row._mapping, **read})


def health(connection: Connection, binding: Binding) -> list[str]:
    """What is wrong with a binding, in words; empty where nothing is.

    Judged by what is there: indexes and triggers by their content, names by the columns that they
    mean today. Binding again mends what can be mended.
    """
    problem = sa.func.sbert.health_v1(binding.id).column_valued("problem")
    return list(connection.execute(sa.select(problem)).scalars())
