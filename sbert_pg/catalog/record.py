"""A binding as Python sees it, with what its rows say, as SQL that the server has written.

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
from sbert_pg.distance import Storage
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.identity import ColumnIdentity

Name = Literal["text", "proof", "of", "digest", "stale", "proven", "requeue", "failed"]

#: What stands between the parts of an expression.
_NOTHING: Any = None
#: What stands before every column name in what the server is asked for; it cannot be guessed, so no
#: separator, template or name holds it.
_QUALIFIER = f"q{secrets.token_hex(12)}."
_COLUMN = re.compile(re.escape(_QUALIFIER) + r'("(?:[^"]|"")+"|[a-z_][a-z0-9_]*)')
_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "text": sa.Text(),
    "proof": sa.Text(),
    "of": sa.Text(),
    "digest": sa.Uuid(),
    "stale": sa.Boolean(),
    "proven": sa.Boolean(),
    "requeue": sa.Uuid(),
    "failed": sa.Boolean(),
}


@dataclass(frozen=True, slots=True)
class Expressions:
    """SQL over the columns of a bound table.

    The attributes are texts over bare column names, for statements that name the table alone;
    ``on`` gives expressions over the columns of a table, alias or subquery.
    """

    _texts: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The text of the row; ``NULL`` where it has none."""
        return self._bare("text")

    @property
    def proof(self) -> str:
        """The half of the digest that proves the row's vector: 16 hexadecimal digits."""
        return self._bare("proof")

    @property
    def of(self) -> str:
        """The half of the digest that names the row's text: 16 hexadecimal digits, or ``NULL``."""
        return self._bare("of")

    @property
    def digest(self) -> str:
        """What the companion of a fresh row holds, a ``uuid``."""
        return self._bare("digest")

    @property
    def stale(self) -> str:
        """Whether the row is pending; the predicate of the queue's index, to the letter."""
        return self._bare("stale")

    @property
    def proven(self) -> str:
        """Whether the row's vector is proven by its companion, or missing."""
        return self._bare("proven")

    @property
    def requeue(self) -> str:
        """A value for the companion that makes the row pending and leaves its vector proven."""
        return self._bare("requeue")

    @property
    def failed(self) -> str:
        """Whether the row has failed for its text; the predicate of the other index."""
        return self._bare("failed")

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
        for i, part in enumerate(_COLUMN.split(dict(self._texts)[name])):
            if i % 2:
                parts.append(columns[_unquoted(part)])
            elif part:
                parts.append(sa.literal_column(part))
        return sa.type_coerce(
            Grouping(ClauseList(*parts, operator=_NOTHING, group=False)), _TYPES[name]
        )

    def _bare(self, name: Name) -> str:
        return dict(self._texts)[name].replace(_QUALIFIER, "")


def expressions_of(binding_id: sa.ColumnElement[Any]) -> sa.ScalarSelect[Any]:
    """A subquery with the expressions of a binding, to be read by ``read``."""
    names = [sa.column("of_text" if name == "of" else name, sa.Text) for name in _TYPES]
    row = sa.func.sbert.expressions_v1(
        binding_id, sa.literal(_QUALIFIER, sa.Text), type_=sa.Text()
    ).table_valued(*names, name="written")
    return sa.select(pg.array([row.c[column.name] for column in names])).scalar_subquery()


def read_expressions(texts: list[str]) -> Expressions:
    """What ``expressions_of`` has selected."""
    return Expressions(tuple(zip(_TYPES, texts, strict=True)))


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


class Named(UserDefinedType[object]):
    """A column type by the name that ``format_type`` gives it.

    Args:
        name: SQL name of the type, quoted where it has to be, as the server spelt it.
    """

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
        utf8: whether the server's encoding is UTF8, so that ``sbert_pg.digest`` agrees with it.
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
        name = sa.literal(_quoted(self.schema, self.table), sa.Text)
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


def relation_of(connection: Connection, identity: ColumnIdentity) -> sa.ColumnElement[Any]:
    """The table as ``regclass``; NULL where it is not there."""
    return sa.func.to_regclass(qualified(connection, identity))


def binding_id_of(connection: Connection, identity: ColumnIdentity) -> uuid.UUID | None:
    """Identity of a column's binding, where the catalog is installed and there is one."""
    return connection.execute(sa.select(known_id(connection, identity))).scalar_one()


def known_id(connection: Connection, identity: ColumnIdentity) -> sa.ColumnElement[uuid.UUID]:
    """What ``binding_id_of`` gives, as an expression."""
    relation = relation_of(connection, identity)
    return sa.func.sbert.binding_id_v1(relation, identity.column, type_=sa.Uuid())


def qualified(connection: Connection, identity: ColumnIdentity) -> str:
    """The table's name as ``regclass`` reads it, every part quoted."""
    schema, table, _ = translated(connection, identity)
    return _quoted(schema, table)


def _quoted(*parts: str | None) -> str:
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts if part is not None)


def translated(connection: Connection, identity: ColumnIdentity) -> ColumnIdentity:
    """The column that a connection's ``schema_translate_map`` makes of one."""
    return identity._replace(schema=system.schema_in(connection, identity.schema))
