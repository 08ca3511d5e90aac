"""The history in migrations/: applied, taken back, compared with the tables, raced, refused."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import alembic
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from sbert_pg import catalog
from sbert_pg.catalog import migrate, tables
from sbert_pg.errors import CatalogMissingError, CatalogVersionError
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.sql import load
from sbert_pg.system import ColumnIdentity

ALEMBIC = tuple(int(part) for part in alembic.__version__.split(".")[:2])


@pytest.fixture
def bare(bare_database_url: sa.URL) -> Iterator[sa.Engine]:
    engine = sa.create_engine(bare_database_url)
    yield engine
    engine.dispose()


def objects(connection: sa.Connection) -> list[str]:
    """Everything in the schema, spelt out, so that two states can be compared."""
    queries = """
        SELECT 'function ' || pg_get_functiondef(oid) || coalesce(proacl::text, '') FROM pg_proc
         WHERE pronamespace = 'sbert'::regnamespace;
        SELECT 'column ' || attrelid::regclass || ' ' || attname || ' ' || attnotnull || ' '
               || format_type(atttypid, atttypmod) || coalesce(pg_get_expr(d.adbin, d.adrelid), '')
          FROM pg_attribute a
          LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
          JOIN pg_class c ON c.oid = attrelid
         WHERE relnamespace = 'sbert'::regnamespace AND attnum > 0 AND relkind IN ('r', 'v', 'S');
        SELECT 'constraint ' || conrelid::regclass || pg_get_constraintdef(oid) FROM pg_constraint
         WHERE connamespace = 'sbert'::regnamespace;
        SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'sbert';
        SELECT 'trigger ' || pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal;
        SELECT 'view ' || pg_get_viewdef('sbert.status'::regclass)
    """
    return sorted(
        row[0] for query in queries.split(";") for row in connection.exec_driver_sql(query)
    )  # fmt: skip


def test_a_fresh_database_is_brought_to_the_newest_revision(bare: sa.Engine) -> None:
    with bare.begin() as connection:
        assert catalog.current(connection) is None
        with pytest.raises(CatalogMissingError, match=r"sbert-pg migrate"):
            catalog.require_current(connection)
        catalog.upgrade(connection)
        assert catalog.current(connection) == catalog.head()
        catalog.require_current(connection)


def test_upgrade_is_idempotent_and_part_of_the_transaction(bare: sa.Engine) -> None:
    with bare.connect() as connection:
        catalog.upgrade(connection)
        connection.rollback()
        assert catalog.current(connection) is None
        catalog.upgrade(connection)
        connection.commit()
        before = objects(connection)
        catalog.upgrade(connection)
        assert objects(connection) == before


def test_the_history_gives_the_tables_that_the_code_knows(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "include_name": lambda name, kind, parents: kind != "schema" or name == "sbert",
                "version_table_schema": "sbert",
                "compare_type": True,
                # Before 1.14, Alembic takes one default for two where a function has a schema.
                "compare_server_default": ALEMBIC >= (1, 14),
            },
        )
        assert compare_metadata(context, tables.metadata) == []
        found = sa.inspect(connection)
        for table in tables.metadata.tables.values():
            checks = found.get_check_constraints(table.name, schema="sbert")
            declared = [c for c in table.constraints if isinstance(c, sa.CheckConstraint)]
            assert {c["name"] for c in checks} == {c.name for c in declared}
            assert found.get_pk_constraint(table.name, schema="sbert")["name"] == (
                f"{table.name}_pkey"
            )
        columns = connection.execute(sa.select(tables.status).limit(0)).keys()
        real = [c["name"] for c in found.get_columns("status", schema="sbert")]
        assert list(columns) == real


def test_up_down_up(bare: sa.Engine) -> None:
    with bare.begin() as connection:
        catalog.upgrade(connection)
        before = objects(connection)
        catalog.downgrade(connection, "base")
        assert catalog.current(connection) is None
        assert connection.scalar(sa.text("SELECT to_regnamespace('sbert')")) is None
        catalog.downgrade(connection, "base")
        catalog.upgrade(connection)
        assert objects(connection) == before


def test_going_down_frees_the_applications_tables(bare: sa.Engine) -> None:
    with bare.begin() as connection:
        catalog.upgrade(connection)
        connection.execute(sa.text("CREATE TABLE n (id int PRIMARY KEY, t text, e vector(3))"))
        catalog.bind(
            connection,
            ColumnIdentity(None, "n", "e"),
            EncoderSpec(name="x", dimensions=3),
            Source.of("t"),
        )
        catalog.downgrade(connection, "base")
        connection.execute(sa.text("INSERT INTO n VALUES (1, 'a', '[1,0,0]')"))
        triggers = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'n'::regclass"
        assert connection.scalar(sa.text(triggers)) == 0


def test_a_catalog_of_the_future_is_refused(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.execute(sa.text("UPDATE sbert.alembic_version SET version_num = '9999'"))
        for action in (
            lambda: catalog.upgrade(connection),
            lambda: catalog.downgrade(connection, "base"),
            lambda: catalog.require_current(connection),
        ):
            with pytest.raises(CatalogVersionError, match="9999, which this version"):
                action()


def test_a_revision_that_does_not_exist(engine: sa.Engine) -> None:
    with engine.connect() as connection, pytest.raises(CatalogVersionError, match="nonsense"):
        catalog.upgrade(connection, "nonsense")


def test_a_database_without_pgvector(server_url: sa.URL, databases: object) -> None:
    name = f"no_vector_{os.getpid()}"
    admin = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE template0")
    engine = sa.create_engine(server_url.set(database=name), poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("SET ROLE pg_read_all_data")
            with pytest.raises(CatalogMissingError, match="CREATE EXT"):
                catalog.upgrade(connection)
        with engine.begin() as connection:
            catalog.upgrade(connection)
            vector = "SELECT count(*) FROM pg_extension WHERE extname = 'vector'"
            assert connection.exec_driver_sql(vector).scalar() == 1
    finally:
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        admin.dispose()


def test_two_processes_that_start_together(bare: sa.Engine) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def migrate_() -> None:
        try:
            with bare.begin() as connection:
                barrier.wait()
                catalog.upgrade(connection)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=migrate_) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with bare.connect() as connection:
        assert connection.scalars(sa.text("SELECT * FROM sbert.alembic_version")).all() == [
            catalog.head()
        ]


def test_the_printed_statements_do_the_same(bare: sa.Engine, engine: sa.Engine) -> None:
    script = catalog.upgrade_sql()
    with bare.begin() as connection:
        connection.connection.driver_connection.execute(script)
        assert catalog.current(connection) == catalog.head()
        printed = objects(connection)
    with engine.connect() as connection:
        assert printed == objects(connection)


def test_from_a_migration_of_the_applications_own(bare: sa.Engine, tmp_path: Path) -> None:
    """Alembic's proxies, which belong to the outer migration, still work afterwards."""
    (tmp_path / "env" / "versions").mkdir(parents=True)
    (tmp_path / "env" / "env.py").write_text(
        "from alembic import context\n"
        "connection = context.config.attributes['connection']\n"
        "context.configure(connection=connection)\n"
        "with context.begin_transaction():\n"
        "    context.run_migrations()\n"
        "assert context.get_context() is not None\n"
    )
    (tmp_path / "env" / "versions" / "one.py").write_text(
        "revision = 'one'\ndown_revision = None\n"
        "from alembic import op\nfrom sbert_pg import catalog\n"
        "def upgrade():\n    catalog.upgrade(op.get_bind())\n    op.execute('CREATE TABLE a ()')\n"
        "def downgrade():\n    op.execute('DROP TABLE a')\n"
        "    catalog.downgrade(op.get_bind(), 'base')\n    op.execute('SELECT 1')\n"
    )
    config = Config()
    config.set_main_option("script_location", str(tmp_path / "env"))
    config.set_main_option("path_separator", "os")
    with bare.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        assert catalog.current(connection) == catalog.head()
        assert sa.inspect(connection).has_table("a")
        command.downgrade(config, "base")
        assert catalog.current(connection) is None


def test_alembic_itself_can_run_the_history(bare_database_url: sa.URL, tmp_path: Path) -> None:
    (tmp_path / "alembic.ini").write_text(
        f"[alembic]\nscript_location = {catalog.script_location()}\npath_separator = os\n"
    )
    environment = os.environ | {
        "SBERT_PG_DATABASE_URL": bare_database_url.render_as_string(hide_password=False)
    }
    engine = sa.create_engine(bare_database_url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA sbert"))
    for arguments in (["upgrade", "head"], ["check"], ["upgrade", "head", "--sql"]):
        subprocess.run(
            [sys.executable, "-m", "alembic", "-c", str(tmp_path / "alembic.ini"), *arguments],
            check=True,
            env=environment,
            capture_output=True,
        )
    with engine.connect() as connection:
        assert catalog.current(connection) == catalog.head()
    engine.dispose()


def test_a_revision_is_named_by_what_it_does() -> None:
    """A database whose catalog another form of a revision made is refused, not taken for current.

    Before a release a change gives the revision another name; after it, it is a new revision.
    """
    for path in catalog.script_location().glob("versions/*.py"):
        text = path.read_text()
        revision, functions = runpy.run_path(str(path))["revision"], re.findall(r'"(\w+)"', text)
        files = [Path(migrate.__file__).parents[1] / "sql" / f"{name}.sql" for name in functions]
        content = text.replace(revision, "") + "".join(f.read_text() for f in files if f.exists())
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        assert revision == f"{path.stem.partition('_')[0]}_{digest}"


def test_every_sql_file_is_used_and_says_what_it_is_for() -> None:
    files = {path.stem for path in Path(migrate.__file__).parents[1].glob("sql/*.sql")}
    history = "".join(p.read_text() for p in catalog.script_location().glob("versions/*.py"))
    for name in files:
        assert f'"{name}"' in history, f"sql/{name}.sql is not in the history"
        assert load(name).startswith("-- "), f"sql/{name}.sql does not say what it is for"
        if name != "status":
            kind = "PROCEDURE" if name == "embed" else "FUNCTION"
            assert f"{kind} sbert.{name}(" in load(name)
            # bm25_v1 runs SQL of its caller's, by the caller's rights and path; a procedure that
            # sets its path cannot commit.
            owns_path = "SET search_path = pg_catalog, pg_temp" in load(name)
            assert owns_path == (name not in ("bm25_v1", "embed"))
            assert owns_path or "SECURITY DEFINER" not in load(name)
