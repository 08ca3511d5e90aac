"""The statements behind the operations; they compile online and for ``--sql`` alike."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, REGCLASS
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import DDLElement
from sqlalchemy.sql.elements import ColumnElement

from sbert_pg.alembic.declaration import Declaration, IndexDefinition
from sbert_pg.errors import DeclarationError
from sbert_pg.types.guard import ColumnIdentity
from sbert_pg.types.vector import VectorType

_OPCLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_$.]*\Z")
_OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_VALUE = re.compile(r"[A-Za-z0-9_.+-]+\Z")


class Json(ColumnElement[Any]):
    """A ``jsonb`` constant.

    Not a parameter, which SQLAlchemy 2.0 would render for ``--sql`` with its backslashes doubled.
    """

    inherit_cache = False
    type = JSONB()

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data


@compiles(Json)
def _json(element: Json, compiler: Any, **_: Any) -> str:
    text = json.dumps(element.data, ensure_ascii=False).replace("'", "''")
    if compiler.preparer._double_percents:
        text = text.replace("%", "%%")
    return f"'{text}'::jsonb"


def relation(table: str, schema: str | None) -> str:
    """A table as text that ``regclass`` reads."""
    parts = (part for part in (schema, table) if part is not None)
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts)


def as_regclass(table: str, schema: str | None) -> ColumnElement[Any]:
    """A table as ``regclass``."""
    return sa.cast(sa.literal(relation(table, schema), sa.Text()), REGCLASS)


def bind(identity: ColumnIdentity, declaration: Declaration) -> sa.Select[Any]:
    """``SELECT sbert.bind_v1(...)``."""
    replaces: Any = declaration.replaces if declaration.replaces is not None else sa.null()
    return sa.select(
        sa.func.sbert.bind_v1(
            as_regclass(identity.table, identity.schema),
            identity.column,
            Json(declaration.encoder.to_json()),
            Json(declaration.source.to_json()),
            replaces,
            sa.false(),
        )
    )


def mark_pending(identity: ColumnIdentity) -> sa.Select[Any]:
    """Mark the rows that have a text and no vector."""
    column = sa.table(
        "embedding_column",
        sa.column("id"),
        sa.column("relation"),
        sa.column("column_name"),
        schema="sbert",
    )
    return sa.select(sa.func.sbert.mark_pending_v1(column.c.id, sa.false())).where(
        column.c.relation == as_regclass(identity.table, identity.schema),
        column.c.column_name == identity.column,
    )


def unbind(identity: ColumnIdentity) -> sa.Select[Any]:
    """``SELECT sbert.unbind_v1(...)``; does nothing where the column is not bound."""
    return sa.select(
        sa.func.sbert.unbind_v1(as_regclass(identity.table, identity.schema), identity.column)
    )


def follow_rename(identity: ColumnIdentity, new_name: str) -> sa.Select[Any]:
    """``SELECT sbert.rename_v1(...)``."""
    table = as_regclass(identity.table, identity.schema)
    return sa.select(sa.func.sbert.rename_v1(table, identity.column, new_name))


class AddColumn(DDLElement):
    """``ALTER TABLE ... ADD COLUMN IF NOT EXISTS`` of a column that takes ``NULL``."""

    def __init__(self, identity: ColumnIdentity, type_: VectorType) -> None:
        self.identity = identity
        self.type_ = type_


@compiles(AddColumn)
def _add_column(element: AddColumn, compiler: Any, **_: Any) -> str:
    identity, quote = element.identity, compiler.preparer.quote
    return (
        f"ALTER TABLE {_quoted(compiler, identity.schema, identity.table)} "
        f"ADD COLUMN IF NOT EXISTS {quote(identity.column)} {element.type_.get_col_spec()}"
    )


class DropColumn(DDLElement):
    """``ALTER TABLE ... DROP COLUMN IF EXISTS``."""

    def __init__(self, identity: ColumnIdentity) -> None:
        self.identity = identity


@compiles(DropColumn)
def _drop_column(element: DropColumn, compiler: Any, **_: Any) -> str:
    identity, quote = element.identity, compiler.preparer.quote
    return (
        f"ALTER TABLE {_quoted(compiler, identity.schema, identity.table)} "
        f"DROP COLUMN IF EXISTS {quote(identity.column)}"
    )


class CreateIndex(DDLElement):
    """``CREATE INDEX`` of a definition, under its own name or another, on its table or another."""

    def __init__(
        self,
        definition: IndexDefinition,
        *,
        concurrently: bool,
        if_not_exists: bool = False,
        name: str | None = None,
        table: tuple[str | None, str] | None = None,
    ) -> None:
        self.definition = definition
        self.concurrently = concurrently
        self.if_not_exists = if_not_exists
        self.name = name or definition.name
        self.table = table or (definition.schema, definition.table)


@compiles(CreateIndex)
def _create_index(element: CreateIndex, compiler: Any, **_: Any) -> str:
    definition, quote = element.definition, compiler.preparer.quote
    text = "CREATE INDEX " + ("CONCURRENTLY " if element.concurrently else "")
    text += "IF NOT EXISTS " if element.if_not_exists else ""
    text += f"{quote(element.name)} ON {_quoted(compiler, *element.table)} USING {definition.using}"
    if definition.expression is None:
        indexed = quote(definition.column)
    else:
        indexed = f"({definition.expression})"
    if definition.opclass is not None:
        _require(_OPCLASS, definition.opclass, "operator class", definition)
        indexed += f" {definition.opclass}"
    text += f" ({indexed})"
    if definition.options:
        for key, value in definition.options.items():
            _require(_OPTION, key, "option", definition)
            _require(_VALUE, value, "value", definition)
        options = ", ".join(f"{key} = {value}" for key, value in definition.options.items())
        text += f" WITH ({options})"
    if definition.tablespace is not None:
        text += f" TABLESPACE {quote(definition.tablespace)}"
    if definition.where is not None:
        text += f" WHERE {definition.where}"
    # Expressions are SQL as it is; the driver reads a percent sign as the start of a parameter.
    return text.replace("%", "%%") if compiler.preparer._double_percents else text


def _require(pattern: re.Pattern[str], value: str, what: str, definition: IndexDefinition) -> None:
    if not pattern.match(value):
        raise DeclarationError(f"Index {definition.name!r}: {value!r} is no {what}.")


class DropIndex(DDLElement):
    """``DROP INDEX IF EXISTS``."""

    def __init__(self, name: str, schema: str | None, *, concurrently: bool) -> None:
        self.name = name
        self.schema = schema
        self.concurrently = concurrently


@compiles(DropIndex)
def _drop_index(element: DropIndex, compiler: Any, **_: Any) -> str:
    text = "DROP INDEX " + ("CONCURRENTLY " if element.concurrently else "")
    return f"{text}IF EXISTS {_quoted(compiler, element.schema, element.name)}"


class RenameIndex(DDLElement):
    """``ALTER INDEX ... RENAME TO``."""

    def __init__(self, name: str, schema: str | None, new_name: str) -> None:
        self.name = name
        self.schema = schema
        self.new_name = new_name


@compiles(RenameIndex)
def _rename_index(element: RenameIndex, compiler: Any, **_: Any) -> str:
    old = _quoted(compiler, element.schema, element.name)
    return f"ALTER INDEX {old} RENAME TO {compiler.preparer.quote(element.new_name)}"


class RequireRows(DDLElement):
    """A block that fails while more rows than allowed have a text and no vector; for ``--sql``."""

    def __init__(
        self, identity: ColumnIdentity, sources: tuple[str, ...] | None, max_missing: int
    ) -> None:
        self.identity = identity
        self.sources = sources
        self.max_missing = max_missing


@compiles(RequireRows)
def _require_rows(element: RequireRows, compiler: Any, **_: Any) -> str:
    identity = element.identity
    name = relation(identity.table, identity.schema).replace("'", "''")
    column = identity.column.replace("'", "''")
    return _REQUIRE_ROWS % {"relation": name, "column": column, "allowed": element.max_missing}


#: The sources are read from the catalog, so the block needs to know the column alone.
_REQUIRE_ROWS = """\
DO $sbert$ DECLARE
    v_no_text text;
    v_count bigint;
BEGIN
    SELECT string_agg(format('r.%%I IS NULL', s.name), ' AND ') INTO v_no_text
      FROM sbert.embedding_column c CROSS JOIN unnest(c.source_columns) AS s (name)
     WHERE c.relation = '%(relation)s'::regclass AND c.column_name = '%(column)s';
    EXECUTE format('SELECT count(*) FROM %%s AS r WHERE r.%%I IS NULL AND NOT (%%s)',
                   '%(relation)s'::regclass, '%(column)s', v_no_text) INTO v_count;
    IF v_count > %(allowed)d THEN
        RAISE EXCEPTION '%% rows of %(relation)s have no vector in %(column)s', v_count
            USING HINT = 'Run ''sbert-pg backfill'', or a worker, and run this script again.';
    END IF;
END $sbert$"""


class Resume(DDLElement):
    """A block that makes one bound column the replacement of another again."""

    def __init__(self, identity: ColumnIdentity, replaces: str) -> None:
        self.identity = identity
        self.replaces = replaces


@compiles(Resume)
def _resume(element: Resume, compiler: Any, **_: Any) -> str:
    identity = element.identity
    parts = (relation(identity.table, identity.schema), identity.column, element.replaces)
    name, new, old = (part.replace("'", "''") for part in parts)
    text = _RESUME % {"relation": name, "new": new, "old": old}
    return text.replace("%", "%%") if compiler.preparer._double_percents else text


_RESUME = """\
DO $sbert$ DECLARE
    v_new integer;
    v_old integer;
BEGIN
    SELECT c.id INTO v_new FROM sbert.embedding_column c
     WHERE c.relation = '%(relation)s'::regclass AND c.column_name = '%(new)s';
    SELECT c.id INTO v_old FROM sbert.embedding_column c
     WHERE c.relation = '%(relation)s'::regclass AND c.column_name = '%(old)s';
    IF v_new IS NULL OR v_old IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SB004',
            MESSAGE = 'a column of %(relation)s is not bound: %(new)s, or %(old)s that it replaces',
            HINT = 'Bind both before the change goes on.';
    END IF;
    PERFORM set_config('sbert.maintenance', 'on', true);
    UPDATE sbert.embedding_column SET replaces_id = v_old
     WHERE id = v_new AND replaces_id IS DISTINCT FROM v_old;
    PERFORM set_config('sbert.maintenance', 'off', true);
END $sbert$"""


class RequireValidIndex(DDLElement):
    """A block that fails where an index is invalid; for ``--sql``."""

    def __init__(self, name: str, schema: str | None) -> None:
        self.name = name
        self.schema = schema


@compiles(RequireValidIndex)
def _require_valid_index(element: RequireValidIndex, compiler: Any, **_: Any) -> str:
    return _REQUIRE_VALID % {"index": relation(element.name, element.schema).replace("'", "''")}


_REQUIRE_VALID = """\
DO $sbert$ BEGIN
    IF NOT (SELECT indisvalid FROM pg_index WHERE indexrelid = '%(index)s'::regclass) THEN
        RAISE EXCEPTION 'index %(index)s is invalid'
            USING HINT = 'An earlier build was interrupted. Drop the index and run this again.';
    END IF;
END $sbert$"""


def _quoted(compiler: Any, schema: str | None, name: str) -> str:
    quote = compiler.preparer.quote
    return quote(name) if schema is None else f"{quote(schema)}.{quote(name)}"
