"""A worker in this process, on a real server."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from datetime import timedelta

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, registry
from sbert_pg.errors import CatalogError, CatalogMissingError, DeclarationError, NotBoundError
from sbert_pg.freshness import Worker, WorkerSettings, claims, refresh, worker_thread
from sbert_pg.freshness.encoding import Flow
from sbert_pg.serving.server import serving_http
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

from .conftest import failure_rows, pending_count, states, violations, wait_for


def test_refresh_embeds_what_is_pending(engine, note, plain, encoder):
    plain.execute("INSERT INTO note (body) SELECT 'n' || i % 100 FROM generate_series(1, 700) AS i")
    done = refresh(engine)
    assert (done.embedded, done.failed, done.left, done.blocked) == (700, 0, 0, {})
    assert pending_count(plain) == 0
    assert len(encoder.encoded) < 700, "equal texts of a batch are encoded once"
    assert violations(plain, encoder) == []


def test_a_batch_that_takes_long_keeps_no_other_from_being_written():
    """In order, the others would wait for it, and soon nothing would be encoded."""
    others, written = threading.Event(), []

    def encode(batch: int) -> int:
        if batch == 0:
            others.wait(30)
        return batch

    def write(batch: int, result: int) -> None:
        written.append((batch, result))
        if len(written) == 9:
            others.set()

    with Flow(encode, write, encoders=2) as flow:
        for batch in range(10):
            flow.put(batch)
    assert written[-1] == (0, 0)
    assert sorted(written) == [(batch, batch) for batch in range(10)]


def test_a_new_row_does_not_wait_until_all_of_a_lost_process_is_tried(engine, note, plain):
    class Slow(DeterministicEncoder):
        def encode_document(self, texts):
            if texts[0].startswith("lost"):
                if not any(text.startswith("lost") for text in self.encoded):
                    plain.execute("INSERT INTO note (body) VALUES ('new')")
                time.sleep(0.05)
            return super().encode_document(texts)

    encoder = Slow(dimensions=32)
    registry.use_encoder(encoder)
    plain.execute("INSERT INTO note (body) SELECT 'lost ' || i FROM generate_series(1, 80) AS i")
    plain.execute(
        "INSERT INTO sbert.failure (binding_id, key, attempts, next_attempt_at, error) "
        "SELECT id, format('[\"%%s\"]', i), 1, now(), %s "
        "FROM sbert.binding, generate_series(1, 80) AS i",
        [claims.ENDED],
    )
    with worker_thread(engine, WorkerSettings(batch_size=8, encoders=1, poll_interval=3600)):
        wait_for(lambda: pending_count(plain) == 0)
    assert "new" in encoder.encoded
    assert encoder.encoded[-1].startswith("lost")


def test_an_idle_worker_embeds_a_new_row_at_once(engine, note, plain, encoder):
    with worker_thread(engine, WorkerSettings(poll_interval=3600)) as worker:
        wait_for(lambda: worker.tally.listening)
        for i in range(20):
            plain.execute("INSERT INTO note (body) VALUES (%s)", [f"text {i}"])
            wait_for(lambda: pending_count(plain) == 0)
    assert violations(plain, encoder) == []


def test_without_listen_it_polls(engine, note, plain, encoder):
    with worker_thread(engine, WorkerSettings(listen=False)):
        plain.execute("INSERT INTO note (body) VALUES ('text')")
        wait_for(lambda: pending_count(plain) == 0)


def test_a_bad_text_fails_alone_and_is_reported(engine, note, plain, caplog):
    registry.use_encoder(DeterministicEncoder(dimensions=32, refuse="poison"))
    plain.execute(
        "INSERT INTO note (body) SELECT CASE WHEN i = 57 THEN 'poison' ELSE 'n' || i END "
        "FROM generate_series(1, 100) AS i"
    )
    settings = WorkerSettings(
        max_attempts=3, backoff=timedelta(milliseconds=20), poll_interval=0.05
    )
    with worker_thread(engine, settings) as worker:
        wait_for(lambda: worker.tally.total("failed") == 1)
    assert worker.tally.total("embedded") == 99
    assert worker.tally.total("errors") == 3
    assert states(plain)[57] == "failed", "the row says so itself"
    [(key, attempts, failed, error)] = failure_rows(plain)
    assert (key, attempts, failed) == ('["57"]', 3, True)
    assert "'poison'" in error
    messages = [r for r in caplog.records if r.getMessage().startswith("Cannot embed row 57")]
    assert len(messages) == 3
    assert messages[0].fields["column"] == "public.note.embedding"


def test_a_row_that_the_database_refuses_fails_alone(engine, note, plain, encoder):
    plain.execute("ALTER TABLE note ADD CHECK (embedding IS NULL OR body <> 'unwanted')")
    plain.execute(
        "INSERT INTO note (body) SELECT CASE WHEN i = 9 THEN 'unwanted' ELSE 'n' || i END "
        "FROM generate_series(1, 50) AS i"
    )
    done = refresh(engine)
    assert (done.embedded, done.errors, done.left) == (49, 1, 1)
    [(key, attempts, failed, error)] = failure_rows(plain)
    assert (key, attempts, failed) == ('["9"]', 1, False)
    assert "23514" in error
    assert violations(plain, encoder) == []


def test_a_row_that_somebody_holds_is_put_off(engine, note, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('a'), ('b')")
    with ExitStack() as stack:
        with plain.transaction():
            plain.execute("SELECT FROM note WHERE id = 1 FOR UPDATE")
            plain.execute("INSERT INTO note (body) VALUES ('c')")
            settings = WorkerSettings(poll_interval=0.2)
            worker = stack.enter_context(worker_thread(engine, settings))
            wait_for(lambda: worker.tally.total("embedded") == 1, what="the other row")
            wait_for(lambda: worker.tally.total("busy") >= 1)
        wait_for(lambda: pending_count(plain) == 0)
    assert failure_rows(plain) == [], "nothing is left of it"


def test_a_row_that_somebody_holds_is_put_off_before_its_lease_ends(engine, note, plain, encoder):
    # Or it would be claimed and encoded again in the meantime.
    plain.execute("CREATE TABLE seen (keys text[], put_off bigint)")
    plain.execute(
        "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen"
        " SELECT OLD.keys, count(*) FROM sbert.failure WHERE key = ANY (OLD.keys); RETURN NULL;"
        " END $$"
    )
    plain.execute(
        "CREATE CONSTRAINT TRIGGER look AFTER DELETE ON sbert.claim DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION look()"
    )
    plain.execute("INSERT INTO note (body) VALUES ('a'), ('b')")
    with plain.transaction():
        plain.execute("SELECT FROM note WHERE id = 1 FOR UPDATE")
        assert refresh(engine).embedded == 1
    assert plain.execute("SELECT * FROM seen").fetchall() == [(['["1"]', '["2"]'], 1)]


def test_a_worker_that_starts_while_the_catalog_is_locked_waits(engine, note, plain, encoder):
    hasty = sa.create_engine(
        engine.url, connect_args={"options": "-c statement_timeout=200"}, poolclass=sa.NullPool
    )
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    with plain.transaction():
        plain.execute("LOCK TABLE sbert.binding")
        worker = Worker(hasty)
        thread = threading.Thread(target=worker.run)
        thread.start()
        wait_for(lambda: worker.tally.database_errors >= 2)
    wait_for(lambda: pending_count(plain) == 0)
    worker.stop()
    thread.join()


def test_a_worker_ends_where_the_catalog_is_damaged(engine, note, plain, encoder):
    plain.execute("ALTER TABLE sbert.binding DROP COLUMN created_at CASCADE")
    with pytest.raises(sa.exc.ProgrammingError, match="does not exist"):
        Worker(engine).run()


def test_a_mismatched_encoder_writes_nothing_and_the_others_go_on(engine, note, plain, encoder):
    plain.execute("CREATE TABLE other (id int PRIMARY KEY, body text, embedding vector(16))")
    identity = ColumnIdentity("public", "other", "embedding")
    with engine.begin() as connection:
        spec = EncoderSpec(name="deterministic", dimensions=16)
        binding = catalog.bind(connection, identity, spec, Source.of("body"))
        catalog.hold_encoder(
            connection, binding, DeterministicEncoder(dimensions=16, salt="another")
        )
    registry.use_encoder(DeterministicEncoder(dimensions=16))
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    plain.execute("INSERT INTO other VALUES (1, 'a')")
    done = refresh(engine)
    assert (done.embedded, done.left) == (1, 1)
    assert "belongs to encoder" in done.blocked["public.other.embedding"]
    assert plain.execute("SELECT embedding FROM other").fetchall() == [(None,)]


def test_an_encoder_that_is_missing_blocks_its_column(engine, note, plain, monkeypatch):
    monkeypatch.setattr(registry, "_loader", None)
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    worker = Worker(engine)
    worker.run(until_empty=True)
    assert "No encoder 'deterministic'" in worker.blocked()["public.note.embedding"]
    assert pending_count(plain) == 1


def test_an_encoder_that_breaks_gives_the_rows_back(engine, note, plain, encoder, monkeypatch):
    encode = encoder.encode_document

    def broken(texts):
        if texts[0].startswith("a") and len(texts[0]) < 3:
            raise MemoryError("no more")
        return encode(texts)

    plain.execute("INSERT INTO note (body) VALUES ('a'), ('a ')")
    monkeypatch.setattr(encoder, "encode_document", broken)
    done = refresh(engine)
    assert "fails for every text: MemoryError" in done.blocked["public.note.embedding"]
    assert failure_rows(plain) == [], "it is not the rows' fault"
    assert plain.execute("SELECT FROM sbert.claim").fetchall() == []
    assert pending_count(plain) == 2


def test_columns_are_chosen_by_name(engine, note, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    assert refresh(engine, WorkerSettings(columns=("note.embedding",))).embedded == 1
    with pytest.raises(NotBoundError, match=r"Bound columns: public\.note\.embedding"):
        refresh(engine, WorkerSettings(columns=("note.vector",)))


def test_a_column_bound_later_is_found(engine, plain, encoder):
    with worker_thread(engine, WorkerSettings(poll_interval=3600, rescan_interval=3600)) as worker:
        wait_for(lambda: worker.tally.listening)
        plain.execute("CREATE TABLE late (id int PRIMARY KEY, body text, embedding vector(32))")
        plain.execute("INSERT INTO late VALUES (1, 'a')")
        identity = ColumnIdentity("public", "late", "embedding")
        with engine.begin() as connection:
            spec = EncoderSpec(name="deterministic", dimensions=32)
            catalog.bind(connection, identity, spec, Source.of("body"))
        wait_for(lambda: worker.tally.total("embedded") == 1)


def test_a_table_dropped_under_a_worker(engine, note, plain, encoder, caplog):
    with worker_thread(engine, WorkerSettings(rescan_interval=0.2, poll_interval=0.1)) as worker:
        plain.execute("INSERT INTO note (body) VALUES ('a')")
        wait_for(lambda: worker.tally.total("embedded") == 1)
        plain.execute("DROP TABLE note")
        wait_for(lambda: worker.health().details["columns"] == [])
        assert worker.health().alive


def test_no_catalog(bare_database_url):
    engine = sa.create_engine(bare_database_url)
    with pytest.raises(CatalogMissingError, match="sbert-pg migrate"):
        refresh(engine)
    engine.dispose()


def test_several_workers_share(engine, note, plain, encoder, monkeypatch):
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 1500) AS i")
    settings = [WorkerSettings(batch_size=50) for _ in range(3)]
    workers = [Worker(engine, one) for one in settings]
    encode, each_has_rows = encoder.encode_document, threading.Event()

    def together(texts):
        # No row is done before each worker has claimed some. They claim a few batches ahead and
        # wait then, so that there are some for each. Probes are encoded before the first claim.
        if texts[0][1:].isdigit() and not each_has_rows.is_set():
            names = "SELECT count(DISTINCT split_part(worker, '/', 1)) FROM sbert.claim"
            wait_for(lambda: each_has_rows.is_set() or plain.execute(names).fetchone() == (3,))
            each_has_rows.set()
        return encode(texts)

    monkeypatch.setattr(encoder, "encode_document", together)
    threads = [threading.Thread(target=w.run, kwargs={"until_empty": True}) for w in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    counts = [worker.tally.total("embedded") for worker in workers]
    assert sum(counts) == 1500, "none is written twice"
    assert all(counts), counts
    assert violations(plain, encoder) == []


def test_a_slow_batch_keeps_its_lease(engine, note, plain, encoder, monkeypatch):
    encode = encoder.encode_document

    def slow(texts):
        # Its lease would have ended, and another worker, which looks once a second, have seen it.
        if texts == ["a"]:  # and not of the probes of the other
            plain.execute("SELECT pg_sleep_until(until + interval '2 seconds') FROM sbert.claim")
        return encode(texts)

    monkeypatch.setattr(encoder, "encode_document", slow)
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    settings = WorkerSettings(lease=timedelta(seconds=4), listen=False)
    with worker_thread(engine, settings) as first, worker_thread(engine, settings) as second:
        wait_for(lambda: pending_count(plain) == 0)
    assert sorted(w.tally.total("batches") for w in (first, second)) == [0, 1]


def test_statement_timeouts_are_met_with_smaller_batches(engine, note, plain, encoder):
    plain.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF (SELECT count(*) FROM new) > 12 THEN PERFORM pg_sleep(600); END IF; "
        "RETURN NULL; END $$"
    )
    plain.execute(
        "CREATE TRIGGER slow AFTER UPDATE ON note REFERENCING NEW TABLE AS new "
        "FOR EACH STATEMENT EXECUTE FUNCTION slow()"
    )
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 40) AS i")
    impatient = sa.create_engine(engine.url, connect_args={"options": "-c statement_timeout=1s"})
    try:
        assert refresh(impatient).embedded == 40
    finally:
        impatient.dispose()
    assert violations(plain, encoder) == []


def test_a_full_disk_is_waited_out(engine, note, plain, encoder, caplog):
    """The server's own error code, raised by a trigger until "space" is made."""
    plain.execute("CREATE TABLE disk (is_full bool); INSERT INTO disk VALUES (true)")
    plain.execute(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF (SELECT is_full FROM disk) THEN RAISE EXCEPTION USING ERRCODE = 'disk_full', "
        "MESSAGE = 'could not extend file: No space left on device'; END IF; "
        "RETURN NEW; END $$"
    )
    plain.execute(
        "CREATE TRIGGER f BEFORE UPDATE ON note FOR EACH ROW EXECUTE FUNCTION full_disk()"
    )
    plain.execute("INSERT INTO note (body) VALUES ('a'), ('b')")
    with worker_thread(engine) as worker:
        wait_for(lambda: worker.tally.database_errors >= 2)
        health = worker.health()
        assert health.alive
        assert not health.ready
        assert "No space left" in health.details["database_error"]
        plain.execute("UPDATE disk SET is_full = false")
        wait_for(lambda: pending_count(plain) == 0)
        wait_for(lambda: worker.health().ready)
    assert worker.tally.total("errors") == 0, "it was not the rows' fault"
    assert len(encoder.encoded) == 2, "the vectors were kept meanwhile"
    assert any("Cannot write vectors" in r.getMessage() for r in caplog.records)


def test_dropped_connections_are_replaced(engine, note, plain, encoder):
    with worker_thread(engine, WorkerSettings(poll_interval=0.2)) as worker:
        wait_for(lambda: worker.tally.listening)
        for i in range(5):
            plain.execute("INSERT INTO note (body) SELECT 'n' FROM generate_series(1, 100)")
            plain.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            wait_for(lambda: pending_count(plain) == 0, what=f"round {i}")
        wait_for(lambda: worker.tally.listening)
    assert violations(plain, encoder) == []


def test_other_isolation_levels_of_the_engine(engine, note, plain, encoder):
    strict = sa.create_engine(engine.url, isolation_level="SERIALIZABLE")
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    assert refresh(strict).embedded == 1
    with strict.connect() as connection:
        level = connection.execute(sa.text("SHOW transaction_isolation")).scalar()
    strict.dispose()
    assert level == "serializable", "the application's engine is as it was"


def test_one_connection_in_the_pool_is_enough(engine, note, plain, encoder):
    narrow = sa.create_engine(engine.url, pool_size=1, max_overflow=0)
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 600) AS i")
    assert refresh(narrow).embedded == 600
    narrow.dispose()


def get(port: int, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_health_and_metrics_over_http(engine, note, plain, encoder):
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    plain.execute("INSERT INTO note (body) VALUES ('a'), ('b'), ('b')")
    with worker_thread(engine) as worker:
        # The backlog is looked at from time to time, and from when on it is served.
        wait_for(lambda: worker.tally.total("embedded") == 3)
        with serving_http(worker, port=0) as port:
            wait_for(lambda: worker.tally.backlog != {})
            status, body = get(port, "/health")
            assert status == 200
            assert json.loads(body)["columns"] == ["public.note.embedding"]
            assert get(port, "/ready")[0] == 200
            assert get(port, "/nothing")[0] == 404
            status, body = get(port, "/metrics")
    assert status == 200
    values = {
        (sample.name, sample.labels.get("column")): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if "le" not in sample.labels
    }
    column = "public.note.embedding"
    assert values["sbert_pg_rows_embedded_total", column] == 3
    assert values["sbert_pg_texts_encoded_total", column] == 2
    assert values["sbert_pg_encode_seconds_count", column] == 1
    assert values["sbert_pg_failed_rows", column] == 0
    assert values["sbert_pg_backfill_rows", column] == 0
    assert values["sbert_pg_pending_rows", column] == 0
    assert not worker.health().alive, "it has ended"


def test_not_ready_while_a_column_is_blocked(engine, note, plain, monkeypatch):
    monkeypatch.setattr(registry, "_loader", None)
    with worker_thread(engine) as worker, serving_http(worker, port=0) as port:
        wait_for(lambda: worker.blocked() != {})
        assert get(port, "/health")[0] == 200
        status, body = get(port, "/ready")
    assert status == 503
    assert "No encoder" in json.loads(body)["blocked"]["public.note.embedding"]


def test_the_vector_is_exact(engine, note, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('exactly this')")
    refresh(engine)
    with engine.begin() as connection:
        from sbert_pg.types import Vector

        table = sa.table("note", sa.column("embedding", Vector(32)))
        stored = connection.execute(sa.select(table.c.embedding)).scalar_one()
    np.testing.assert_array_equal(stored, encoder.encode_document(["exactly this"])[0])


def test_halfvec_and_a_nul_free_log(engine, plain, encoder, caplog):
    caplog.set_level(logging.INFO)
    plain.execute("CREATE TABLE half (id int PRIMARY KEY, a text, b text, embedding halfvec(32))")
    identity = ColumnIdentity("public", "half", "embedding")
    with engine.begin() as connection:
        spec = EncoderSpec(name="deterministic", dimensions=32)
        catalog.bind(connection, identity, spec, Source.of(["a", "b"], " / "))
    plain.execute("INSERT INTO half VALUES (1, 'x', NULL), (2, 'x', 'y'), (3, NULL, NULL)")
    assert refresh(engine).embedded == 2
    assert encoder.encoded == ["x", "x / y"]
    assert plain.execute("SELECT id FROM half WHERE embedding IS NULL").fetchall() == [(3,)]


def test_row_level_security_is_refused_where_it_would_hide_rows(engine, note, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    plain.execute("ALTER TABLE note ENABLE ROW LEVEL SECURITY")
    role = f"limited_{plain.info.dbname}"
    plain.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN").format(psycopg.sql.Identifier(role)))
    try:
        limited = sa.create_engine(engine.url.set(username=role))
        for capability in (None, "reader", "writer"):
            if capability is not None:
                plain.execute("SELECT sbert.grant_v1(%s, %s)", [role, capability])
            with pytest.raises(CatalogError, match=rf"grant_v1\('{role}', 'worker'\)"):
                refresh(limited)
        limited.dispose()
        plain.execute("SELECT sbert.grant_v1(%s, 'worker')", [role])
        plain.execute(
            psycopg.sql.SQL("GRANT SELECT, UPDATE ON note TO {}").format(
                psycopg.sql.Identifier(role)
            )
        )
        limited = sa.create_engine(engine.url.set(username=role))
        done = refresh(limited)
        limited.dispose()
        assert "Row-level security" in done.blocked["public.note.embedding"]
        assert pending_count(plain) == 1
        plain.execute("ALTER TABLE note DISABLE ROW LEVEL SECURITY")
        limited = sa.create_engine(engine.url.set(username=role))
        assert refresh(limited).embedded == 1, "the rights of grant_v1(role, 'worker') are enough"
        limited.dispose()
    finally:
        plain.execute(psycopg.sql.SQL("DROP OWNED BY {}").format(psycopg.sql.Identifier(role)))
        plain.execute(psycopg.sql.SQL("DROP ROLE {}").format(psycopg.sql.Identifier(role)))


def test_no_transaction_is_open_while_encoding(engine, note, plain, encoder, monkeypatch):
    encode = encoder.encode_document

    def open_transactions():
        return plain.execute(
            "SELECT query FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND (xact_start IS NOT NULL OR backend_xid IS NOT NULL)"
        ).fetchall()

    def watched(texts):
        # The look for a further batch ends by itself; what this batch held would stay.
        wait_for(lambda: open_transactions() == [], what="every transaction to end")
        return encode(texts)

    plain.execute("INSERT INTO note (body) VALUES ('a'), ('b')")
    monkeypatch.setattr(encoder, "encode_document", watched)
    worker = Worker(engine)
    worker.run(until_empty=True)
    assert worker.tally.total("embedded") == 2
    assert encoder.encoded[-2:] == ["a", "b"]


@pytest.mark.parametrize("driver", ["postgresql+psycopg2", "sqlite"])
def test_other_drivers_are_refused_at_once(driver):
    pytest.importorskip("psycopg2")
    other = sa.create_engine(f"{driver}://")
    with pytest.raises(DeclarationError, match="psycopg 3"), worker_thread(other):
        pass
    with pytest.raises(DeclarationError, match="psycopg 3"):
        refresh(other)


def test_an_asynchronous_engine_is_refused_at_once(engine):
    asyncio = pytest.importorskip("sqlalchemy.ext.asyncio")
    with pytest.raises(DeclarationError, match="synchronous engine"):
        refresh(asyncio.create_async_engine(engine.url))
