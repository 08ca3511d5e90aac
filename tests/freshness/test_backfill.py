"""Filling what was there before, on a real server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, registry
from sbert_pg.errors import BackfillError, CatalogError, DeclarationError, EncoderMismatchError
from sbert_pg.freshness import WorkerSettings, backfill, claims, refresh, running
from sbert_pg.freshness.settings import Database, Throttle, replica_lag
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.wire import from_text

IDENTITY = ColumnIdentity(None, "note", "embedding")
SMALL = WorkerSettings(batch_size=20)


@pytest.fixture
def encoder() -> DeterministicEncoder:
    made = DeterministicEncoder(dimensions=32)
    registry.use_encoder(made)
    return made


@pytest.fixture
def plain(engine: sa.Engine) -> Iterator[psycopg.Connection]:
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


def make(
    engine: sa.Engine,
    plain: psycopg.Connection,
    rows: str = "SELECT i, 'n' || i FROM generate_series(1, 1000) AS i",
    key: str = "id bigint PRIMARY KEY",
) -> None:
    plain.execute(f"CREATE TABLE note ({key}, body text, embedding vector(32))")
    plain.execute(f"INSERT INTO note {rows}")
    with engine.begin() as connection:
        spec = EncoderSpec(name="deterministic", dimensions=32)
        catalog.bind(connection, IDENTITY, spec, Source.of("body"))


def states(plain: psycopg.Connection) -> dict[str, str]:
    """What each row of ``note`` says of itself."""
    [(stale, failed)] = plain.execute(
        "SELECT x.stale, x.failed FROM sbert.binding b, sbert.expressions_v1(b.id) x"
    ).fetchall()
    return dict(
        plain.execute(
            f"SELECT id::text, CASE WHEN {stale} THEN 'pending' WHEN {failed} THEN 'failed' "
            "ELSE 'fresh' END FROM note"
        ).fetchall()
    )


def check(plain: psycopg.Connection, encoder: DeterministicEncoder) -> None:
    """Every row has the vector of its text, or says that it has not."""
    now = states(plain)
    rows = plain.execute("SELECT id::text, body, embedding::text FROM note").fetchall()
    fresh = [(body, vector) for key, body, vector in rows if now[key] == "fresh"]
    assert all((body is None) == (vector is None) for body, vector in fresh)
    embedded = [(body, from_text(vector)) for body, vector in fresh if body is not None]
    expected = encoder.encode_document([body for body, _ in embedded])
    vectors = np.array([vector for _, vector in embedded]).reshape(expected.shape)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def records(plain: psycopg.Connection) -> list[tuple]:
    return plain.execute("SELECT key, attempts, error FROM sbert.failure ORDER BY key").fetchall()


def test_a_table_is_filled(engine, plain, encoder):
    make(engine, plain)
    seen = []
    done = backfill(engine, IDENTITY, SMALL, on_progress=seen.append)
    assert (done.rows, done.failed, done.left, done.complete) == (1000, 0, 0, True)
    assert records(plain) == []
    assert plain.execute("SELECT FROM sbert.claim").fetchall() == []
    check(plain, encoder)
    assert set(states(plain).values()) == {"fresh"}
    assert (seen[0].rows, seen[0].total) == (0, 1000)
    assert (seen[-1].rows, seen[-1].complete, seen[-1].seconds_left) == (1000, True, 0.0)


def test_an_empty_table(engine, plain, encoder):
    make(engine, plain, "SELECT 1, 'x' WHERE false")
    assert backfill(engine, IDENTITY).complete


def test_again_does_nothing_and_finds_what_is_missing(engine, plain, encoder):
    make(engine, plain)
    backfill(engine, IDENTITY, SMALL)
    encoder.encoded.clear()
    done = backfill(engine, IDENTITY, SMALL)
    assert (done.rows, done.complete) == (0, True)
    plain.execute("SET session_replication_role = replica")
    plain.execute("UPDATE note SET embedding = NULL WHERE id IN (5, 500)")
    plain.execute("SET session_replication_role = DEFAULT")
    assert backfill(engine, IDENTITY, SMALL).rows == 2
    assert encoder.encoded == ["n5", "n500"]


def test_workers_drain_it_as_well(engine, plain, encoder):
    make(engine, plain)
    assert refresh(engine, SMALL).embedded == 1000
    assert set(states(plain).values()) == {"fresh"}


def test_new_rows_are_not_held_back_by_a_rate(engine, plain, encoder):
    make(engine, plain)
    plain.execute("INSERT INTO note VALUES (5000, 'new')")
    stop = threading.Event()
    slow = WorkerSettings(batch_size=10, rows_per_second=1)

    def on_progress(progress) -> None:
        if states(plain)["5000"] == "fresh":
            stop.set()

    done = backfill(engine, IDENTITY, slow, on_progress=on_progress, stop=stop)
    assert not done.complete
    assert states(plain)["5000"] == "fresh"


def test_rows_without_text_and_rows_with_vectors_are_left_alone(engine, plain, encoder):
    make(engine, plain, "VALUES (1, 'a'), (2, NULL), (3, '')")
    assert backfill(engine, IDENTITY, SMALL).rows == 2
    assert encoder.encoded == ["a", ""]
    check(plain, encoder)


def test_bad_texts_are_left_to_the_worker_with_their_reason(engine, plain):
    encoder = DeterministicEncoder(dimensions=32, refuse="n500")
    registry.use_encoder(encoder)
    make(engine, plain)
    done = backfill(engine, IDENTITY, SMALL)
    assert (done.rows, done.failed, done.left, done.complete) == (999, 1, 1, True)
    [(key, attempts, error)] = records(plain)
    assert (key, attempts) == ('["500"]', 1)
    assert "contains 'n500'" in error
    assert states(plain)["500"] == "pending"


def test_rows_that_the_database_refuses_are_recorded(engine, plain, encoder):
    make(engine, plain)
    plain.execute("ALTER TABLE note ADD CHECK (embedding IS NULL OR id NOT IN (7, 8))")
    done = backfill(engine, IDENTITY, SMALL)
    assert (done.rows, done.failed) == (998, 2)
    found = [(key, "23514" in error) for key, _, error in records(plain)]
    assert found == [('["7"]', True), ('["8"]', True)]


@pytest.mark.parametrize("indexed", [False, True], ids=["plain", "vector index"])
def test_a_table_that_takes_only_a_few_rows_at_a_time(engine, plain, encoder, indexed):
    """Batches are halved until they pass, and nothing is left to wait for."""
    make(engine, plain, "SELECT i, 'n' || i FROM generate_series(1, 102) AS i")
    if indexed:
        plain.execute("ALTER TABLE note ADD COLUMN old vector(3)")
        plain.execute("CREATE INDEX ON note USING hnsw (old vector_cosine_ops)")
    plain.execute(
        "CREATE FUNCTION few() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF (SELECT count(*) FROM new) > 7 THEN "
        "RAISE EXCEPTION 'too many' USING ERRCODE = 'check_violation'; "
        "END IF; RETURN NULL; END $$; "
        "CREATE TRIGGER few AFTER UPDATE ON note REFERENCING NEW TABLE AS new "
        "FOR EACH STATEMENT EXECUTE FUNCTION few()"
    )
    done = backfill(engine, IDENTITY, WorkerSettings(batch_size=50))
    assert (done.rows, done.failed, done.complete) == (102, 0, True)
    assert records(plain) == []
    check(plain, encoder)


@pytest.mark.parametrize("many", [1000, 1001])
def test_how_to_fill_first_is_said_where_many_rows_wait(
    engine, plain, encoder, caplog, monkeypatch, many
):
    monkeypatch.setattr(running, "MANY", many)
    make(engine, plain)
    plain.execute("CREATE INDEX note_embedding ON note USING hnsw (embedding vector_cosine_ops)")
    backfill(engine, IDENTITY)
    assert ("--index aside" in caplog.text) == (many == 1000)


def test_a_row_that_somebody_holds_is_left_pending(engine, plain, encoder):
    make(engine, plain)
    with plain.transaction():
        plain.execute("SELECT FROM note WHERE id = 42 FOR UPDATE")
        done = backfill(engine, IDENTITY, SMALL)
    assert (done.rows, done.left, done.complete) == (999, 1, True)
    assert states(plain)["42"] == "pending"
    assert records(plain) == [('["42"]', 0, None)], "it was not its fault"
    check(plain, encoder)


def test_a_wait_that_ends_in_the_last_look_is_not_the_end(engine, plain, encoder):
    """A row comes back into the queue after the look at the queue, and nothing else is left."""
    make(engine, plain, "VALUES (1, 'one')")
    with engine.begin() as connection:
        binding = catalog.require_binding(connection, IDENTITY)
        claims.put_off(connection, binding, ['["1"]'], timedelta(0))
    done = backfill(engine, IDENTITY, SMALL)
    assert (done.rows, done.left, done.complete) == (1, 0, True)
    check(plain, encoder)


class Meddling(DeterministicEncoder):
    """Does something between the reading of a text and the writing of its vector."""

    meddle = staticmethod(lambda: None)

    def encode_document(self, texts):
        vectors = super().encode_document(texts)
        self.meddle()
        return vectors


def test_changes_while_encoding_win(engine, plain):
    encoder = Meddling(dimensions=32)
    registry.use_encoder(encoder)
    make(engine, plain)

    def meddle() -> None:
        encoder.meddle = lambda: None
        plain.execute("UPDATE note SET body = 'changed' WHERE id % 10 = 0")
        plain.execute("DELETE FROM note WHERE id = 3")
        plain.execute("INSERT INTO note VALUES (2000, 'new')")

    encoder.meddle = meddle
    done = backfill(engine, IDENTITY, SMALL)
    assert done.complete
    check(plain, encoder)
    assert set(states(plain).values()) == {"fresh"}, "they were done as they came"


def test_keys_that_change_while_it_runs(engine, plain):
    """Rows that come to lie before what was claimed already."""
    encoder = Meddling(dimensions=32)
    registry.use_encoder(encoder)
    make(engine, plain)
    calls = []

    def meddle() -> None:
        calls.append(1)
        if len(calls) == 20:
            plain.execute("UPDATE note SET id = id - 100000 WHERE id > 900")
            plain.execute("UPDATE note SET id = id + 200000 WHERE id < 20 AND id > 0")

    encoder.meddle = meddle
    done = backfill(engine, IDENTITY, SMALL)
    assert len(calls) >= 20
    assert (done.left, done.complete) == (0, True)
    assert set(states(plain).values()) == {"fresh"}
    check(plain, encoder)


def test_several_share(engine, plain, encoder):
    make(engine, plain)
    done = []
    threads = [
        threading.Thread(
            target=lambda n=n: done.append(
                backfill(engine, IDENTITY, WorkerSettings(batch_size=10, name=f"p{n}"))
            )
        )
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.rows for one in done) == 1000
    assert all(one.complete for one in done)
    assert sorted(encoder.encoded) == sorted(f"n{i}" for i in range(1, 1001)), "each text once"
    check(plain, encoder)


def test_stopping_and_going_on(engine, plain, encoder):
    make(engine, plain)
    stop = threading.Event()

    def on_progress(progress) -> None:
        if progress.rows:
            stop.set()

    slow = WorkerSettings(batch_size=20, rows_per_second=50)
    done = backfill(engine, IDENTITY, slow, on_progress=on_progress, stop=stop)
    assert not done.complete
    assert 0 < done.rows < 1000
    assert backfill(engine, IDENTITY, SMALL).rows == 1000 - done.rows
    assert len(encoder.encoded) <= 1000 + slow.batch_size * 4
    check(plain, encoder)


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        (
            "a text, b int, PRIMARY KEY (b, a)",
            "SELECT 'k' || i % 7, i / 7, 'n' || i FROM generate_series(1, 500) AS i",
        ),
        (
            "a uuid PRIMARY KEY",
            "SELECT gen_random_uuid(), 'n' || i FROM generate_series(1, 500) AS i",
        ),
        (
            "a timestamptz PRIMARY KEY",
            "SELECT now() - i * interval '1.5 hour', 'n' || i FROM generate_series(1, 500) AS i",
        ),
    ],
)
def test_keys_of_every_kind(engine, plain, encoder, key, rows):
    make(engine, plain, rows, key)
    plain.execute(f"ALTER DATABASE {plain.info.dbname} SET DateStyle = 'German'")
    plain.execute(f"ALTER DATABASE {plain.info.dbname} SET TimeZone = 'Asia/Tokyo'")
    engine.dispose()
    assert backfill(engine, IDENTITY, SMALL).rows == 500
    assert plain.execute("SELECT count(*) FROM note WHERE embedding IS NULL").fetchone() == (0,)


def test_another_encoder_is_refused(engine, plain):
    registry.use_encoder(DeterministicEncoder(dimensions=32, salt="other"))
    make(engine, plain)
    with engine.begin() as connection:
        binding = catalog.require_binding(connection, IDENTITY)
        catalog.hold_encoder(connection, binding, DeterministicEncoder(dimensions=32))
    with pytest.raises(EncoderMismatchError):
        backfill(engine, IDENTITY)


def test_a_column_that_cannot_be_written(engine, plain, encoder):
    make(engine, plain)
    plain.execute(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege', MESSAGE = 'not you'; END $$"
    )
    plain.execute("CREATE TRIGGER no BEFORE UPDATE ON note FOR EACH ROW EXECUTE FUNCTION no()")
    with pytest.raises(BackfillError, match=r"Cannot write .*not you.*What was written stays"):
        backfill(engine, IDENTITY, SMALL)
    plain.execute("DROP TRIGGER no ON note")
    assert backfill(engine, IDENTITY, SMALL).rows == 1000, "nothing is left leased"


def test_dropped_connections_are_survived(engine, plain, encoder):
    make(engine, plain, "SELECT i, 'n' || i FROM generate_series(1, 3000) AS i")
    stop, begun = threading.Event(), threading.Event()

    def terminate() -> None:
        begun.wait()
        done = 0
        while not stop.wait(0.05):
            # Each time after some progress, or on a busy machine there would never be any.
            now = plain.execute("SELECT count(embedding) FROM note").fetchone()[0]
            if now < done + 100:
                continue
            done = now
            plain.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        done = backfill(
            engine,
            IDENTITY,
            WorkerSettings(batch_size=20, rows_per_second=1500),
            on_progress=lambda progress: begun.set(),
        )
    finally:
        stop.set()
        begun.set()
        thread.join()
    assert done.complete
    check(plain, encoder)


def test_the_rate_is_kept(engine, monkeypatch):
    """Claims wait until the rows before them have had their time; one second's worth is free."""
    now = 0.0
    monkeypatch.setattr("sbert_pg.freshness.settings.time", SimpleNamespace(monotonic=lambda: now))
    throttle = Throttle(Database(engine), 500, None)
    assert throttle.wait() == 0
    throttle.spend(1000)
    assert throttle.wait() == 2.0
    now = 10.0
    throttle.spend(1000)
    assert throttle.wait() == 1.0
    free = Throttle(Database(engine), None, None)
    free.spend(1_000_000)
    assert free.wait() == 0


def test_no_replica_is_not_behind(engine, plain, encoder):
    make(engine, plain)
    with engine.begin() as connection:
        assert replica_lag(connection) == 0
    assert backfill(engine, IDENTITY, WorkerSettings(max_replica_lag=1.0)).complete


def test_a_lag_that_cannot_be_seen_is_no_licence(engine, plain, monkeypatch):
    """What a role without pg_monitor sees of a replica: a row with NULLs."""
    from sbert_pg import system

    plain.execute(
        "CREATE TABLE replication AS SELECT 1 AS pid, NULL::text AS state, "
        "NULL::interval AS replay_lag"
    )
    columns = [sa.column(n, t.type) for n, t in system.REPLICATION.columns.items()]
    monkeypatch.setattr(system, "REPLICATION", sa.table("replication", *columns))
    with engine.begin() as connection, pytest.raises(CatalogError, match="pg_monitor"):
        replica_lag(connection)
    plain.execute("UPDATE replication SET state = 'streaming', replay_lag = '7 seconds'")
    with engine.begin() as connection:
        assert replica_lag(connection) == 7.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "10"),
        ("batch_size", 1.5),
        ("encoders", 0),
        ("poll_interval", float("nan")),
        ("rows_per_second", "500"),
        ("lease", 60),
        ("lease", timedelta(0)),
    ],
)
def test_settings_that_are_none(name, value):
    with pytest.raises(DeclarationError, match=name):
        WorkerSettings(**{name: value})


def test_what_becomes_of_indexes_is_one_of_two(engine, plain, encoder):
    make(engine, plain, "SELECT 1, 'x'")
    with pytest.raises(DeclarationError, match="'keep' or 'aside'"):
        backfill(engine, IDENTITY, index="away")


@pytest.mark.parametrize("driver", ["postgresql+psycopg2", "sqlite"])
def test_other_drivers_are_refused_at_once(driver):
    pytest.importorskip("psycopg2")
    other = sa.create_engine(f"{driver}://")
    with pytest.raises(DeclarationError, match="psycopg 3"):
        backfill(other, IDENTITY)
