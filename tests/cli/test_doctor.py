"""Each finding, with its fault made for real, and none of them on a database that is well."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import sqlalchemy as sa
from command_line import sbert_pg
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import (
    WorkerSettings,
    catalog,
    create_all,
    embed_on_flush,
    embedding_column,
    hnsw_index,
    worker_thread,
)
from sbert_pg.cli.doctor import Finding, diagnose
from sbert_pg.freshness.listening import seen_workers
from sbert_pg.loading.aside import set_aside
from sbert_pg.testing import DeterministicEncoder


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    __table_args__ = (hnsw_index("note_embedding", "embedding"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    embedding = embedding_column("deterministic", source="text", dimensions=384, nullable=True)


@pytest.fixture
def well(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> sa.Engine:
    """A database with nothing to say about."""
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        session.add_all(Note(text=f"note {n}") for n in range(20))
        session.commit()
    run(engine, "ANALYZE note")
    return engine


def run(engine: sa.Engine, *statements: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def found(engine: sa.Engine, **options: Any) -> list[Finding]:
    with engine.connect() as connection:
        return list(diagnose(connection, **options))


def one(engine: sa.Engine, **options: Any) -> Finding:
    (finding,) = found(engine, **options)
    return finding


def test_nothing_is_found_where_nothing_is_wrong(well: sa.Engine) -> None:
    assert found(well) == []


def test_a_database_without_a_catalog(engine: sa.Engine) -> None:
    run(engine, "DROP SCHEMA IF EXISTS sbert CASCADE")
    said = sbert_pg("doctor", url=engine.url)
    assert "fault: schema sbert: The schema 'sbert' is not installed" in said.stdout
    assert said.stderr == ""
    assert json.loads(sbert_pg("doctor", "--json", url=engine.url).stdout)["workers"] is None
    with engine.connect() as connection:
        assert str(seen_workers(connection)) == "No worker listens"


def test_workers_that_listen_work_and_ended(well: sa.Engine) -> None:
    def lines() -> list[str]:
        return sbert_pg("doctor", url=well.url).stderr.splitlines()[-2:]

    alone, column = lines()
    assert alone == "Workers: No worker listens."
    assert column == "  public.note.embedding: caught up never."
    with worker_thread(well, WorkerSettings(name="haus:12:ab" + "x" * 60)) as worker:
        until = time.monotonic() + 60
        while not worker.tally.listening or "never" in lines()[1]:
            assert time.monotonic() < until
        listening, column = lines()
    assert listening.startswith("Workers: 1 listening: haus:12:abxxx")
    assert re.fullmatch(r"  public.note.embedding: caught up \d+ s ago\.", column)
    lease = (
        "INSERT INTO sbert.claim SELECT id, '{}', '{{[1],[2]}}', now() + '{} s' FROM sbert.binding"
    )
    run(well, lease.format("a:1/7", 60), lease.format("a:1/8", -9), lease.format("b:2/1", -90))
    stopped, column = lines()
    assert stopped == "Workers: No worker listens."
    assert "a:1 has 4 rows in hand; b:2 came to an end with 2; its lease did 9" in column
    data = json.loads(sbert_pg("doctor", "--json", url=well.url).stdout)["workers"]
    held = [(one["worker"], one["rows"]) for one in data["leases"]["public.note.embedding"]]
    assert sorted(held) == [("a:1", 2), ("a:1", 2), ("b:2", 2)]
    assert data["seconds_since_caught_up"]["public.note.embedding"] >= 0


def test_indexes_that_a_killed_backfill_set_aside(well: sa.Engine) -> None:
    with well.connect() as connection:
        (binding,) = catalog.all_bindings(connection)
    assert set_aside(well, binding) == ("note_embedding",)
    finding = one(well, large=10)
    assert (finding.level, finding.subject) == ("advice", "public.note.embedding")
    assert finding.what.startswith("note_embedding set aside")
    (command,) = re.findall(r"sbert-pg (.*) builds", finding.remedy)
    assert sbert_pg(*command.split(), url=well.url).returncode == 0
    assert found(well, large=10) == []


@pytest.mark.parametrize(("version", "faults"), [("0.8.0", 3), ("0.8.3", 1), ("0.8.4", 0)])
def test_pgvector_too_old(well: sa.Engine, version: str, faults: int) -> None:
    """What an extension says of itself is a row of the server's catalog."""
    run(well, f"UPDATE pg_extension SET extversion = '{version}' WHERE extname = 'vector'")
    findings = found(well)
    assert len(findings) == faults
    assert all(f.subject == f"pgvector {version}" and f.level == "fault" for f in findings)


def test_faults_of_ivfflat_concern_those_who_have_one(well: sa.Engine) -> None:
    run(
        well,
        "UPDATE pg_extension SET extversion = '0.8.6' WHERE extname = 'vector'",
        "CREATE INDEX other ON note USING ivfflat (embedding vector_cosine_ops) WITH (lists = 1)",
    )
    assert "IVFFlat" in one(well).what


def test_an_index_that_a_failed_build_left(well: sa.Engine) -> None:
    run(well, "DROP INDEX note_embedding")
    # A build that waits for another transaction, and is cancelled there.
    build = (
        "CREATE INDEX CONCURRENTLY note_embedding ON note USING hnsw (embedding vector_cosine_ops)"
    )
    with well.connect() as other:
        other.execute(sa.text("LOCK TABLE note IN ROW EXCLUSIVE MODE"))
        with pytest.raises(sa.exc.OperationalError):
            run(well, "SET lock_timeout = '200ms'", build)
    run(well, 'ALTER INDEX note_embedding RENAME TO "Of notes"')
    finding = one(well)
    assert finding.level == "fault"
    assert finding.remedy == 'REINDEX INDEX CONCURRENTLY public."Of notes";'
    run(well, "RESET lock_timeout", finding.remedy)
    assert found(well) == []


def test_a_large_table_without_an_index(well: sa.Engine) -> None:
    run(well, "DROP INDEX note_embedding")
    assert found(well) == [], "twenty rows need none"
    finding = one(well, large=20)
    assert (finding.level, finding.subject) == ("advice", "public.note.embedding")


def test_statistics_never_gathered(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> None:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    run(engine, "ALTER TABLE note SET (autovacuum_enabled = false)")
    assert found(engine) == [], "PostgreSQL gathers none of so few rows"
    run(engine, "INSERT INTO note (id, text) SELECT n, 'x' FROM generate_series(1, 51) AS n")
    run(engine, 'CREATE SCHEMA "My Shop"', 'ALTER TABLE note SET SCHEMA "My Shop"')
    finding = next(finding for finding in found(engine) if "never gathered" in finding.what)
    run(engine, finding.remedy.partition(";")[0])
    finding = one(engine)
    assert "wait for a vector" in finding.what
    assert finding.subject == "My Shop.note.embedding"


def test_rows_that_failed(well: sa.Engine) -> None:
    from sbert_pg import refresh, registry

    registry.forget_encoders()
    registry.use_encoder(DeterministicEncoder(refuse="poison"))
    run(well, "UPDATE note SET text = 'poison' WHERE id = 1")
    assert any("wait for a vector" in finding.what for finding in found(well))
    from sbert_pg.freshness import WorkerSettings

    refresh(well, WorkerSettings(max_attempts=1))
    assert "could not be embedded" in one(well).what


def test_a_trigger_that_does_not_fire(well: sa.Engine) -> None:
    run(well, "ALTER TABLE note DISABLE TRIGGER ALL")
    assert {finding.level for finding in found(well)} == {"fault"}


def test_precisions_that_stand_beside_each_other(well: sa.Engine) -> None:
    run(
        well,
        "INSERT INTO sbert.compatible_encoder (binding_id, fingerprint, spec, agreement)"
        " SELECT id, 'other', '{\"precision\": \"int8\"}', '{}' FROM sbert.binding",
    )
    assert "int8" in one(well).what


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW asked AS SELECT to_tsvector(text) @@ plainto_tsquery('a b') FROM note",
        "CREATE FUNCTION asked(q text) RETURNS tsquery AS 'SELECT plainto_tsquery(q)' LANGUAGE sql",
    ],
)
def test_questions_that_want_every_word(well: sa.Engine, statement: str) -> None:
    run(well, statement)
    assert "every one of its words" in one(well).what


@pytest.mark.parametrize(
    "setting",
    ["enable_indexscan = off", "enable_sort = off", "session_replication_role = replica"],
)
def test_settings_that_hurt(well: sa.Engine, setting: str) -> None:
    run(well, f'ALTER DATABASE "{well.url.database}" SET {setting}')
    well.dispose()
    finding = one(well)
    assert (finding.level, finding.subject) == ("fault", setting.partition(" ")[0])


def test_searches_that_are_compiled(well: sa.Engine) -> None:
    database = f'ALTER DATABASE "{well.url.database}" SET'
    # The server of the tests cannot compile, and is made to say that it can.
    run(
        well,
        "CREATE FUNCTION pg_jit_available() RETURNS boolean RETURN true",
        f"{database} search_path = public, pg_catalog",
        f"{database} jit_above_cost = 5",
        f"{database} jit = on",
    )
    well.dispose()
    assert one(well).subject == "jit"
    run(well, f"{database} jit_above_cost = 100000")
    well.dispose()
    assert found(well) == []


def test_no_catalog(bare_database_url: sa.URL) -> None:
    engine = sa.create_engine(bare_database_url)
    assert one(engine).subject == "schema sbert"
    engine.dispose()


def test_the_command_exits_by_what_it_finds(well: sa.Engine) -> None:
    done = sbert_pg("doctor", url=well.url)
    assert (done.returncode, done.stdout) == (0, "")
    run(well, "CREATE VIEW asked AS SELECT plainto_tsquery('a')")
    done = sbert_pg("doctor", "--json", url=well.url)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert [finding["level"] for finding in data["findings"]] == ["advice"]
    ages = {"public.note.embedding": None}
    assert data["workers"] == {"listening": [], "leases": {}, "seconds_since_caught_up": ages}
    run(well, "UPDATE pg_extension SET extversion = '0.8.3' WHERE extname = 'vector'")
    done = sbert_pg("doctor", url=well.url)
    assert done.returncode == 1, done.stderr
    assert "ALTER EXTENSION vector UPDATE" in done.stdout
