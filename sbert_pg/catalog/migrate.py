"""Apply the library's own Alembic history to a database.

The revisions take their ``Operations`` as an argument and no module-level proxy is touched, so the
history can be applied from inside a revision of the application's own.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg import system
from sbert_pg.catalog.record import lacking
from sbert_pg.catalog.tables import SCHEMA, failure
from sbert_pg.errors import CatalogMissingError, CatalogVersionError

if TYPE_CHECKING:
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

# Alembic is imported where it is used: declaring a column needs none of it.
VERSION_TABLE = "alembic_version"

#: Held while migrating, so that two processes that start together do not both. "sbert_pg" in ASCII.
ADVISORY_LOCK = 0x73626572745F7067

Direction = Literal["upgrade", "downgrade"]


def script_location() -> Path:
    """The directory of the history: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the schema ``sbert`` to a revision; nothing happens where it is there already.

    The extension ``vector`` is created where it is missing. Runs in the connection's transaction
    and does not commit. Two processes that do it at once take turns.

    Args:
        connection: a connection of a role that may create the schema, or owns it.
        revision: a revision of the history, ``"head"`` for the newest.

    Raises:
        CatalogVersionError: the database is newer than this code, or there is no such revision.
        CatalogMissingError: the extension ``vector`` is missing, and cannot be created.
    """
    _require_postgresql(connection)
    _lock(connection)
    _refuse_unknown(connection)
    _create_vector(connection)
    # CREATE SCHEMA IF NOT EXISTS asks for the right to create one even where it exists.
    if not connection.scalar(sa.select(sa.func.to_regnamespace(SCHEMA).is_not(None))):
        connection.execute(sa.schema.CreateSchema(SCHEMA))
    _run(connection, "upgrade", revision)


def downgrade(connection: Connection, revision: str) -> None:
    """Take the schema ``sbert`` back to a revision; ``"base"`` removes it.

    Removing it unbinds every column: the triggers go, the columns and their vectors stay. Runs in
    the connection's transaction and does not commit.

    Raises:
        CatalogVersionError: the database is newer than this code, or there is no such revision.
    """
    _lock(connection)
    _refuse_unknown(connection)
    if current(connection) is None:
        return
    _run(connection, "downgrade", revision)
    if revision == "base":
        connection.execute(sa.schema.DropTable(_version_table()))
        connection.execute(sa.schema.DropSchema(SCHEMA))


def upgrade_sql(
    revision: str = "head", *, start: str | None = None, transaction: bool = True
) -> str:
    """The statements of ``upgrade``, for someone else to run; needs no database.

    Args:
        revision: where to go.
        start: the revision to start from; an empty database by default.
        transaction: begin and commit one; not inside a script that has its own.

    Raises:
        CatalogVersionError: there is no such revision.
    """
    buffer = io.StringIO()
    if start is None:
        buffer.write(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA};\n\n")
    _run(None, "upgrade", revision, buffer=buffer, start=start, transaction=transaction)
    return buffer.getvalue()


def current(connection: Connection) -> str | None:
    """The revision of the schema ``sbert``, or ``None`` where it is not installed."""
    if not sa.inspect(connection).has_table(VERSION_TABLE, schema=SCHEMA):
        return None
    table = _version_table()
    return connection.execute(sa.select(table.c.version_num)).scalar_one_or_none()


def head() -> str:
    """The newest revision that this code knows."""
    return str(_script().get_current_head())


def require_current(connection: Connection) -> None:
    """Refuse a database whose catalog this code was not made for.

    For commands and long-running processes. Reading and writing vectors does not ask: during a
    deploy old code works on a newer catalog, whose functions keep their versions.

    Raises:
        CatalogMissingError: the schema ``sbert`` is not installed.
        CatalogVersionError: it is older or newer than this code.
    """
    revision = current(connection)
    if revision is None:
        raise CatalogMissingError(
            f"The schema {SCHEMA!r} is not installed in database {_database(connection)!r}. Run "
            "'sbert-pg migrate', or call sbert_pg.catalog.upgrade(connection) in a migration of "
            "your own."
        )
    _refuse_unknown(connection)
    if revision != head():
        raise CatalogVersionError(
            f"The catalog in database {_database(connection)!r} is at revision {revision} and this "
            f"code needs {head()}. Run 'sbert-pg migrate'."
        )


def require_worker(connection: Connection) -> None:
    """Refuse a role that may not do a worker's work, where the catalog is in the database.

    Raises:
        CatalogError: the role may not.
    """
    of_class = system.CLASS.c
    statement = sa.select(sa.func.has_table_privilege(of_class.oid, "DELETE")).where(
        of_class.relname == failure.name,
        of_class.relnamespace == system.NAMESPACE.c.oid,
        system.NAMESPACE.c.nspname == SCHEMA,
    )
    if connection.execute(statement).scalar_one_or_none() is False:
        raise lacking(connection, "worker", "do a worker's work")


def _script() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(script_location()))


def _version_table() -> sa.Table:
    return sa.Table(
        VERSION_TABLE, sa.MetaData(), sa.Column("version_num", sa.String(32)), schema=SCHEMA
    )


def _database(connection: Connection) -> str:
    return str(connection.engine.url.database)


def _require_postgresql(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        raise CatalogMissingError(
            "Columns are bound, and their rows kept fresh, in PostgreSQL with pgvector; this "
            f"engine is of {connection.dialect.name!r}, where vectors can only be stored and read."
        )


def _create_vector(connection: Connection) -> None:
    name = system.EXTENSION.c.extname
    if connection.execute(sa.select(name).where(name == "vector")).first() is not None:
        return
    try:
        with connection.begin_nested():
            connection.execute(sa.text("CREATE EXTENSION vector"))
    except sa.exc.DBAPIError as error:
        raise CatalogMissingError(
            f"The extension 'vector' is missing in database {_database(connection)!r} and cannot "
            f"be created: {str(error.orig).strip()}. Install pgvector on the server, and run "
            "CREATE EXTENSION vector there; managed services allow it to the database's owner."
        ) from error


def _lock(connection: Connection) -> None:
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))


def _refuse_unknown(connection: Connection) -> None:
    revision = current(connection)
    known = {script.revision for script in _script().walk_revisions()}
    if revision is not None and revision not in known:
        raise CatalogVersionError(
            f"The catalog in database {_database(connection)!r} is at revision {revision}, which "
            f"this version of sbert-pg does not know; it knows up to {head()}. Use a newer one "
            f"here; or, where the catalog is older than any release, run DROP SCHEMA {SCHEMA} "
            "CASCADE in the database, which keeps your tables and their vectors, and 'sbert-pg "
            "migrate'."
        )


def _run(
    connection: Connection | None,
    direction: Direction,
    revision: str,
    *,
    buffer: io.StringIO | None = None,
    start: str | None = None,
    transaction: bool = True,
) -> None:
    from alembic.migration import MigrationContext
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationStep
    from alembic.script.revision import RevisionError
    from alembic.util import CommandError

    script = _script()

    def steps(heads: Any, context: MigrationContext) -> Iterable[Any]:
        history = script.revision_map
        if direction == "upgrade":
            up = script.iterate_revisions(revision, heads, implicit_base=True)
            return [MigrationStep.upgrade_from_script(history, step) for step in reversed([*up])]
        down = script.iterate_revisions(heads, revision, select_for_downgrade=True)
        return [MigrationStep.downgrade_from_script(history, step) for step in down]

    options: dict[str, Any] = {
        "fn": steps,
        "version_table": VERSION_TABLE,
        "version_table_schema": SCHEMA,
        "transactional_ddl": transaction,
    }
    if connection is None:
        options |= {"as_sql": True, "output_buffer": buffer, "starting_rev": start}
        context = MigrationContext.configure(
            dialect_name="postgresql", dialect_opts={"paramstyle": "named"}, opts=options
        )
    else:
        context = MigrationContext.configure(connection, opts=options)
    try:
        with context.begin_transaction():
            context.run_migrations(op=Operations(context))
    except (CommandError, RevisionError) as error:
        raise CatalogVersionError(
            f"The catalog cannot {direction} to {revision!r}: {error}. The revisions are "
            f"{', '.join(sorted(s.revision for s in script.walk_revisions()))}."
        ) from error
