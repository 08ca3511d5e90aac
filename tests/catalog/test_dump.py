"""Dumps and restores with the server's own programs: what rows say of themselves comes along."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, registry
from sbert_pg.catalog.holding import hold_encoder
from sbert_pg.errors import EncoderMismatchError
from sbert_pg.freshness import WorkerSettings, audit, counts, refresh
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

NOTE = ColumnIdentity("public", "note", "embedding")
PART = ColumnIdentity("public", "part", "embedding")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Finds a program of the server of this run, so that the versions agree."""

    def find(name: str) -> str:
        if "SBERT_PG_TEST_DSN" in os.environ:
            found = shutil.which(name)
            if found is None:
                pytest.skip(f"{name} is not installed")
            with request.getfixturevalue("engine").connect() as connection:
                server: Any = connection.dialect.server_version_info
            said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            if int(re.findall(r"\d+", said)[0]) < server[0]:
                pytest.skip(f"{said.strip()} is older than the server, {server[0]}")
            return found
        return str(Path(request.getfixturevalue("embedded")._server.bin_path) / name)

    return find


@pytest.fixture
def run(program: Callable[[str], str]) -> Run:
    def run(name: str, url: sa.URL, *options: str, text: str = "", **env: str) -> Any:
        dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        return subprocess.run(
            [program(name), "-d", dsn, *options],
            input=text,
            capture_output=True,
            text=True,
            env={**os.environ, **env},
        )

    return run


@pytest.fixture
def encoder() -> DeterministicEncoder:
    made = DeterministicEncoder(dimensions=16, refuse="poison")
    registry.use_encoder(made)
    return made


@pytest.fixture
def filled(engine: sa.Engine, encoder: DeterministicEncoder) -> sa.Engine:
    """Two bound tables with rows that are embedded, pending and failed."""
    with engine.begin() as connection:
        for ddl in (
            "CREATE TABLE note (id bigint PRIMARY KEY, body text, embedding vector(16))",
            (
                "CREATE TABLE part (region text, id int, body text, embedding vector(16), "
                "PRIMARY KEY (region, id)) PARTITION BY LIST (region)"
            ),
            "CREATE TABLE part_eu PARTITION OF part FOR VALUES IN ('eu')",
        ):
            connection.exec_driver_sql(ddl)
        spec = EncoderSpec(name="deterministic", dimensions=16)
        for identity in (NOTE, PART):
            catalog.bind(connection, identity, spec, Source.of("body"))
        connection.exec_driver_sql(
            "INSERT INTO note (id, body) SELECT i, 'n' || i FROM generate_series(1, 50) AS i"
        )
        connection.exec_driver_sql("UPDATE note SET body = 'poison' WHERE id = 8")
        connection.exec_driver_sql("INSERT INTO part (region, id, body) VALUES ('eu', 1, 'one')")
    refresh(engine, WorkerSettings(max_attempts=1))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE note SET body = 'changed' WHERE id = 7")
    assert states(engine) == ["7"]
    return engine


def states(engine: sa.Engine) -> list[str]:
    """Keys of the rows of both tables that are pending."""
    pending = []
    with engine.connect() as connection:
        for identity in (NOTE, PART):
            binding = catalog.require_binding(connection, identity)
            t = binding.clause()
            pending += connection.scalars(sa.select(t.c.id).where(binding.is_stale(t))).all()
    return sorted(str(key) for key in pending)


@pytest.fixture
def target(databases: Any) -> Iterator[sa.Engine]:
    """An empty database; ``vector`` is in it, as on a managed server."""
    url = databases.clone("bare")
    made = sa.create_engine(url)
    yield made
    made.dispose()
    databases.drop(str(url.database))


def contents(engine: sa.Engine) -> dict[str, list[Any]]:
    with engine.begin() as connection:
        return {
            name: [tuple(row) for row in connection.exec_driver_sql(statement)]
            for name, statement in {
                "note": "SELECT id, body, embedding::text, embedding_of FROM note ORDER BY id",
                "part": "SELECT region, id, body, embedding::text, embedding_of FROM part",
                "failures": "SELECT binding_id, key FROM sbert.failure ORDER BY key",
                "bindings": "SELECT id, relation::text, column_name, source::text, encoder_id "
                "FROM sbert.binding ORDER BY id",
                "encoders": "SELECT id, fingerprint, probes FROM sbert.encoder",
                "version": "SELECT version_num FROM sbert.alembic_version",
            }.items()
        }


@pytest.mark.parametrize("form", ["plain", "custom"])
def test_a_dump_of_the_database_restores_as_it_is(
    filled: sa.Engine,
    target: sa.Engine,
    encoder: DeterministicEncoder,
    run: Run,
    tmp_path: Path,
    form: str,
) -> None:
    file = str(tmp_path / "dump")
    dumped = run("pg_dump", filled.url, "-F", form, "-f", file)
    assert dumped.returncode == 0, dumped.stderr
    if form == "plain":
        restored = run("psql", target.url, "-v", "ON_ERROR_STOP=1", "-f", file)
    else:
        restored = run("pg_restore", target.url, "--exit-on-error", file)
    assert restored.returncode == 0, restored.stderr
    assert contents(target) == contents(filled)
    with target.begin() as connection:
        catalog.require_current(connection)
        binding = catalog.require_binding(connection, NOTE)
        for bound in catalog.all_bindings(connection):
            assert catalog.health(connection, bound) == []
        connection.exec_driver_sql("UPDATE note SET body = 'after the restore' WHERE id = 9")
    assert states(target) == ["7", "9"]
    assert refresh(target).embedded == 2
    assert states(target) == []
    assert audit(target, binding, encoder, sample=None).wrong == 0
    with pytest.raises(sa.exc.DBAPIError) as refused, target.begin() as connection:
        connection.exec_driver_sql(f"UPDATE note SET embedding = '{[1.0] * 16}' WHERE id = 1")
    assert refused.value.orig.sqlstate == "SB001"
    other = DeterministicEncoder(dimensions=16, salt="x")
    with pytest.raises(EncoderMismatchError), target.begin() as connection:
        hold_encoder(connection, binding, other)


def test_a_restore_in_parallel(
    filled: sa.Engine, target: sa.Engine, run: Run, tmp_path: Path
) -> None:
    folder = str(tmp_path / "dump")
    dumped = run("pg_dump", filled.url, "-F", "directory", "-j", "2", "-f", folder)
    assert dumped.returncode == 0, dumped.stderr
    restored = run("pg_restore", target.url, "--exit-on-error", "-j", "3", folder)
    assert restored.returncode == 0, restored.stderr
    assert contents(target) == contents(filled)


@pytest.mark.parametrize("options", [(), ("--disable-triggers",)], ids=["plain", "no triggers"])
def test_data_alone_is_as_it_was(
    filled: sa.Engine, run: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Each row brings the proof of its vector, so nobody has to vouch for it."""
    file = str(tmp_path / "data.sql")
    dumped = run("pg_dump", filled.url, "--data-only", *options, "-t", "note", "-f", file)
    assert dumped.returncode == 0, dumped.stderr
    before = contents(filled)
    with filled.begin() as connection:
        connection.exec_driver_sql("DELETE FROM note")
    restored = run("psql", filled.url, "-v", "ON_ERROR_STOP=1", "-f", file)
    assert restored.returncode == 0, restored.stderr
    assert contents(filled)["note"] == before["note"]
    assert states(filled) == ["7"]


def test_data_of_another_database_is_pending(
    filled: sa.Engine, target: sa.Engine, encoder: DeterministicEncoder, run: Run, tmp_path: Path
) -> None:
    """A table alone, into a database whose catalog knows nothing of it."""
    file = str(tmp_path / "table.sql")
    assert run("pg_dump", filled.url, "-t", "note", "-f", file).returncode == 0
    with target.begin() as connection:
        catalog.upgrade(connection)
    restored = run("psql", target.url, "-v", "ON_ERROR_STOP=1", "-f", file)
    assert restored.returncode == 0, restored.stderr
    with target.begin() as connection:
        assert catalog.binding_of(connection, NOTE) is None
        connection.exec_driver_sql("UPDATE note SET body = 'changed' WHERE id = 1")
        spec = EncoderSpec(name="deterministic", dimensions=16)
        binding = catalog.bind(connection, NOTE, spec, Source.of("body"))
        assert catalog.health(connection, binding) == []
        # Those of the other database's binding are gone.
        left = connection.exec_driver_sql(
            "SELECT (SELECT count(*) FROM pg_index WHERE indrelid = note AND indpred IS NOT NULL), "
            "(SELECT count(*) FROM pg_trigger WHERE tgrelid = note) FROM to_regclass('note') note"
        )
        assert left.one() == (2, 3)
        assert counts(connection, binding).pending + counts(connection, binding).backfill == 50
        t = binding.clause()
        assert connection.scalars(sa.select(t.c.id).where(binding.is_proven(t))).all() == []
    refresh(target)
    assert audit(target, binding, encoder, sample=None).wrong == 0


def test_a_copy_of_the_binary_files_is_the_same(filled: sa.Engine) -> None:
    """A clone by ``CREATE DATABASE ... TEMPLATE`` is bound like its original."""
    name = f"{filled.url.database}_copy"
    before = contents(filled)
    filled.dispose()
    dsn = filled.url.set(drivername="postgresql", database="postgres")
    with psycopg.connect(dsn.render_as_string(hide_password=False), autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{filled.url.database}"')
        copy = sa.create_engine(filled.url.set(database=name))
        try:
            assert contents(copy) == before
            assert refresh(copy).embedded == 1
        finally:
            copy.dispose()
            admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
