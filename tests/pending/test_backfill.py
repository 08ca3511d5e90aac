"""Filling what was there before, on a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, registry
from sbert_pg.errors import BackfillError, CatalogError, EncoderMismatchError
from sbert_pg.pending import ranges
from sbert_pg.pending.backfill import BackfillSettings, Limits, backfill
from sbert_pg.pending.rows import Rows, rows_of
from sbert_pg.pending.throttle import Rate, replica_lag
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.guard import ColumnIdentity
from sbert_pg.types.wire import from_text

IDENTITY = ColumnIdentity(None, "note", "embedding")
SMALL = BackfillSettings(batch_size=20, span=100)


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


def rows_for(engine: sa.Engine) -> Rows:
    with engine.begin() as connection:
        return rows_of(connection, catalog.require_binding(connection, IDENTITY))


def check(plain: psycopg.Connection, encoder: DeterministicEncoder) -> None:
    """Every row has the vector of its text, or is marked."""
    found = plain.execute(
        "SELECT body, embedding::text FROM note n WHERE NOT EXISTS "
        "(SELECT FROM sbert.pending p WHERE p.key = n.id::text)"
    ).fetchall()
    for body, vector in found:
        if body is None:
            assert vector is None
            continue
        assert vector is not None, body
        np.testing.assert_allclose(from_text(vector), encoder.encode_document([body])[0], atol=1e-6)


def marks(plain: psycopg.Connection) -> list[tuple]:
    return plain.execute("SELECT key, attempts, error FROM sbert.pending ORDER BY key").fetchall()


def test_a_table_is_filled_without_marks(engine, plain, encoder):
    make(engine, plain)
    seen = []
    done = backfill(engine, IDENTITY, SMALL, on_progress=seen.append)
    assert (done.rows, done.marked, done.complete) == (1000, 0, True)
    assert marks(plain) == []
    check(plain, encoder)
    spans = plain.execute(
        "SELECT lower, upper, state, rows FROM sbert.backfill ORDER BY id"
    ).fetchall()
    assert spans[:2] == [(None, "100", "done", 100), ("100", "200", "done", 100)]
    assert spans[-1][1:] == (None, "done", 0)
    assert seen[0].total == 1000
    assert (seen[-1].rows, seen[-1].complete, seen[-1].seconds_left) == (1000, True, 0.0)


def test_an_empty_table(engine, plain, encoder):
    make(engine, plain, "SELECT 1, 'x' WHERE false")
    assert backfill(engine, IDENTITY).complete


def test_again_does_nothing_and_finds_what_was_left_out(engine, plain, encoder):
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
    assert backfill(engine, IDENTITY, BackfillSettings(restart=True)).complete


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
    assert (done.rows, done.marked, done.complete) == (999, 1, True)
    [(key, attempts, error)] = marks(plain)
    assert (key, attempts) == ("500", 1)
    assert "contains 'n500'" in error


def test_rows_that_the_database_refuses_are_marked(engine, plain, encoder):
    make(engine, plain)
    plain.execute("ALTER TABLE note ADD CHECK (embedding IS NULL OR id NOT IN (7, 8))")
    done = backfill(engine, IDENTITY, SMALL)
    assert (done.rows, done.marked) == (998, 2)
    assert [(key, "23514" in error) for key, _, error in marks(plain)] == [("7", True), ("8", True)]


@pytest.mark.parametrize("indexed", [False, True], ids=["plain", "vector index"])
def test_a_table_that_takes_only_a_few_rows_at_a_time(engine, plain, encoder, indexed):
    """Batches are halved until they pass, and nothing is left to wait for or to mark."""
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
    done = backfill(engine, IDENTITY, BackfillSettings(batch_size=50))
    assert (done.rows, done.marked, done.complete) == (102, 0, True)
    assert done.seconds < BackfillSettings().lease.total_seconds() / 4
    assert plain.execute("SELECT state, rows FROM sbert.backfill").fetchall() == [("done", 102)]
    check(plain, encoder)


def test_a_row_that_somebody_holds_is_marked(engine, plain, encoder):
    make(engine, plain)
    with plain.transaction():
        plain.execute("SELECT FROM note WHERE id = 42 FOR UPDATE")
        done = backfill(engine, IDENTITY, SMALL)
    assert (done.rows, done.marked, done.complete) == (999, 1, True)
    assert [key for key, *_ in marks(plain)] == ["42"]
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
    stale = plain.execute(
        "SELECT count(*) FROM note WHERE body = 'changed' AND embedding IS NULL AND id::text NOT "
        "IN (SELECT key FROM sbert.pending)"
    ).fetchone()
    assert stale == (0,)


def test_a_marked_row_that_is_filled_loses_its_mark(engine, plain, encoder):
    make(engine, plain)
    plain.execute("UPDATE note SET body = 'changed' WHERE id < 50")
    assert len(marks(plain)) == 49
    assert backfill(engine, IDENTITY, SMALL).rows == 1000
    assert marks(plain) == []
    check(plain, encoder)


def test_several_share_by_ranges(engine, plain, encoder):
    make(engine, plain)
    done = []
    threads = [
        threading.Thread(
            target=lambda n=n: done.append(
                backfill(engine, IDENTITY, BackfillSettings(batch_size=10, span=50, name=f"p{n}"))
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

    slow = BackfillSettings(batch_size=20, span=400, rows_per_second=200)
    done = backfill(engine, IDENTITY, slow, on_progress=on_progress, stop=stop)
    assert not done.complete
    assert 0 < done.rows < 1000
    assert backfill(engine, IDENTITY, SMALL).rows == 1000 - done.rows
    assert len(encoder.encoded) <= 1000 + slow.batch_size * 4
    check(plain, encoder)


def test_a_range_that_was_taken_over_is_given_up(engine, plain, encoder):
    """Two have one range, as after a long pause of the first: the first writes no more of it."""
    make(engine, plain)
    rows = rows_for(engine)
    lease = timedelta(seconds=60)
    with engine.begin() as connection:
        first = ranges.take(connection, rows, token="first", span=500, lease=lease)
    plain.execute("UPDATE sbert.backfill SET lease_until = now() - interval '1 second'")
    with engine.begin() as connection:
        second = ranges.take(connection, rows, token="second", span=500, lease=lease)
    assert (first.id, first.upper) == (second.id, second.upper)
    with engine.begin() as connection:
        assert not ranges.advance(connection, first, "20", 20, lease)
        assert ranges.advance(connection, second, "20", 20, lease)
    with engine.begin() as connection:
        ranges.release(connection, ["second"])
        third = ranges.take(connection, rows, token="third", span=500, lease=lease)
    assert third.position == "20", "it goes on where the second ended"


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


def test_reading_uses_the_key_index(engine, plain, encoder):
    """A filled part of the table is not read again and again: each batch begins at its key."""
    make(engine, plain, "SELECT i, 'n' || i FROM generate_series(1, 20000) AS i")
    plain.execute("ANALYZE note")
    rows = rows_for(engine)
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *a: statements.append((a[2], a[3])))
    with engine.begin() as connection:
        span = ranges.Range(0, "t", "15000", "10000")
        found, position = ranges.read(connection, rows, span, 20)
        assert [row.key for row in found] == [str(i) for i in range(10001, 10021)]
        assert position == "10020"
        statement, parameters = statements[-1]
        plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()
    assert "Index Scan using note_pkey" in "\n".join(plan)
    assert "Sort" not in "\n".join(plan)


def test_another_encoder_is_refused(engine, plain):
    registry.use_encoder(DeterministicEncoder(dimensions=32, salt="other"))
    make(engine, plain)
    with engine.begin() as connection:
        binding = catalog.require_binding(connection, IDENTITY)
        catalog.seal(connection, binding, DeterministicEncoder(dimensions=32))
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
    assert backfill(engine, IDENTITY, SMALL).rows == 1000, "its ranges were given back"


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
            BackfillSettings(batch_size=20, rows_per_second=1500),
            on_progress=lambda progress: begun.set(),
        )
    finally:
        stop.set()
        begun.set()
        thread.join()
    assert done.complete
    check(plain, encoder)


def test_the_rate_is_kept(engine, plain, encoder):
    make(engine, plain)
    started = time.monotonic()
    backfill(engine, IDENTITY, BackfillSettings(batch_size=100, rows_per_second=500))
    assert time.monotonic() - started > 0.8
    rate, stop = Rate(None), threading.Event()
    rate.wait(1_000_000, stop)


def test_it_pauses_while_the_probe_is_slow(engine, plain, encoder):
    make(engine, plain)
    slow = {"is": True}

    def probe(connection) -> None:
        connection.execute(sa.select(sa.func.pg_sleep(0.2 if slow["is"] else 0)))

    seen = []

    def on_progress(progress) -> None:
        seen.append(progress)
        if len(seen) == 3:
            slow["is"] = False

    limits = Limits(latency=0.1, probe=probe)
    done = backfill(engine, IDENTITY, BackfillSettings(limits=limits), on_progress=on_progress)
    assert done.complete
    assert "a probe takes" in seen[1].paused
    assert seen[1].rows == 0


def test_a_probe_that_fails_is_told(engine, plain, encoder):
    make(engine, plain)

    def probe(connection) -> None:
        connection.execute(sa.text("SELECT nothing FROM nowhere"))

    limits = Limits(latency=0.1, probe=probe)
    with pytest.raises(BackfillError, match="nowhere"):
        backfill(engine, IDENTITY, BackfillSettings(limits=limits))


def test_no_replica_is_not_behind(engine, plain, encoder):
    make(engine, plain)
    with engine.begin() as connection:
        assert replica_lag(connection) == 0
    limits = Limits(replica_lag=1.0, latency=10.0)
    assert backfill(engine, IDENTITY, BackfillSettings(limits=limits)).complete


def test_a_lag_that_cannot_be_seen_is_no_licence(engine, plain, monkeypatch):
    """What a role without pg_monitor sees of a replica: a row with NULLs."""
    from sbert_pg.catalog import system

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


def test_updates_are_spread_where_another_column_has_a_vector_index(engine, plain, encoder):
    """Most updates find room on their page, so that the other column's index is left alone."""
    make(
        engine,
        plain,
        # Four rows on a page, and no room for a fifth.
        "SELECT i, repeat(md5(i::text), 54) FROM generate_series(1, 1000) AS i",
    )
    plain.execute("ALTER TABLE note ADD COLUMN old vector(32)")
    plain.execute("UPDATE note SET old = array_fill(0.1, ARRAY[32])::vector")
    plain.execute("CREATE INDEX ON note USING hnsw (old vector_cosine_ops)")
    plain.execute("VACUUM FULL note")
    plain.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'not this one'; END $$; "
        "CREATE TRIGGER refuse BEFORE UPDATE ON note FOR EACH ROW WHEN (OLD.id = 502) "
        "EXECUTE FUNCTION refuse()"
    )
    before = updates(plain)
    done = backfill(engine, IDENTITY, BackfillSettings(batch_size=100))
    assert done.complete
    assert (done.rows, done.marked) == (999, 1)
    assert [(key, attempts) for key, attempts, _ in marks(plain)] == [("502", 1)]
    check(plain, encoder)
    # A session says what it did when it ends, at the latest.
    engine.dispose()
    deadline = time.monotonic() + 20
    while (made := updates(plain) - before)[0] < 999 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert made[0] >= 999
    assert made[1] / made[0] > 0.5


def updates(plain: psycopg.Connection) -> np.ndarray:
    """Updates of the table so far, and those of them that were HOT."""
    found = plain.execute(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'note'"
    ).fetchone()
    return np.array(found)
