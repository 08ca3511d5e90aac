"""Vector indexes that are set aside while a column is filled, on a real server."""

from __future__ import annotations

import logging
import threading

import pytest
import sqlalchemy as sa

from sbert_pg import Embedding, catalog, load, registry
from sbert_pg.errors import BackfillError, EncoderMismatchError
from sbert_pg.freshness import WorkerSettings, backfill, running
from sbert_pg.indexes import vector_indexes
from sbert_pg.loading import indexes_aside
from sbert_pg.loading.aside import set_aside
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

#: A name that quoting and the driver's percent signs can spoil.
TABLE = 'no"te %s'
IDENTITY = ColumnIdentity("public", TABLE, "embedding")
QUOTED = '"no""te %s"'
PARTIAL = (
    'CREATE INDEX "a %s" ON {} USING hnsw (embedding vector_cosine_ops)'
    " WITH (m = '5', ef_construction = '20') WHERE ((id > 3) AND (body <> 'it''s %d'::text))"
)
INDEXES = (
    PARTIAL,
    "CREATE INDEX b ON {} USING hnsw (((embedding)::halfvec(32)) halfvec_l2_ops)",
    "CREATE INDEX c ON {} USING ivfflat (embedding vector_cosine_ops) WITH (lists = '3')",
)


def execute(connection: sa.Connection, statement: str) -> None:
    connection.exec_driver_sql(statement.replace("%", "%%"))


def change(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        execute(connection, f"UPDATE {QUOTED} SET body = body || '!'")


@pytest.fixture(params=["plain", "partitioned"])
def notes(engine: sa.Engine, request: pytest.FixtureRequest) -> sa.Engine:
    parts = " PARTITION BY HASH (id)" if request.param == "partitioned" else ""
    registry.use_encoder(DeterministicEncoder(dimensions=32))
    script = [
        f"CREATE TABLE {QUOTED} (id bigint PRIMARY KEY, body text, embedding vector(32)){parts}",
        *(
            f"CREATE TABLE p{n} PARTITION OF {QUOTED} FOR VALUES WITH (MODULUS 2, REMAINDER {n})"
            for n in (range(2) if parts else ())
        ),
        f"INSERT INTO {QUOTED} SELECT i, 'text ' || i FROM generate_series(1, 500) i",
        *(statement.format(QUOTED) for statement in INDEXES),
    ]
    with engine.begin() as connection:
        for statement in script:
            execute(connection, statement)
        spec = EncoderSpec(name="deterministic", dimensions=32)
        catalog.bind(connection, IDENTITY, spec, Source.of("body"))
    return engine


def indexes(engine: sa.Engine) -> dict[str, str]:
    with engine.connect() as connection:
        found = vector_indexes(connection, TABLE, "embedding", schema="public")
        assert all(index.valid for index in found)
        return {index.name: index.definition for index in found}


def comments(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT count(*) FROM pg_description d JOIN pg_class k"
            " ON k.oid = d.objoid WHERE k.relkind IN ('i', 'I')").scalar_one()  # fmt: skip


def test_indexes_come_back_as_they_were(notes: sa.Engine) -> None:
    before = indexes(notes)
    assert len(before) == 3
    with indexes_aside(notes, IDENTITY) as aside:
        assert set(aside) == set(before)
        assert indexes(notes) == {}
        table = sa.Table(
            TABLE,
            sa.MetaData(schema="public"),
            sa.Column("id", sa.BigInteger, primary_key=True),
            sa.Column("body", sa.Text),
            sa.Column("embedding", Embedding("deterministic", "body", dimensions=32)),
        )
        with notes.begin() as connection:
            load(connection, table, [{"id": 1000, "body": "x", "embedding": [0.5] * 32}])
    assert indexes(notes) == before
    assert comments(notes) == 0


def test_a_backfill_sets_them_aside_where_many_rows_wait(
    notes: sa.Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, seen = indexes(notes), []

    class Looking(DeterministicEncoder):
        def encode_document(self, texts):
            seen.append(len(indexes(notes)))
            return super().encode_document(texts)

    registry.use_encoder(Looking(dimensions=32))
    monkeypatch.setattr(running, "MANY", 501)
    assert backfill(notes, IDENTITY, WorkerSettings(batch_size=100), index="aside").complete
    assert (set(seen), indexes(notes)) == ({3}, before)
    seen.clear()
    change(notes)
    monkeypatch.setattr(running, "MANY", 500)
    with caplog.at_level(logging.WARNING, "sbert_pg"):
        backfill(notes, IDENTITY, WorkerSettings(batch_size=100))
    assert "index='aside'" in caplog.text
    change(notes)
    seen.clear()
    assert backfill(notes, IDENTITY, WorkerSettings(batch_size=100), index="aside").complete
    assert (set(seen[1:]), indexes(notes), comments(notes)) == ({0}, before, 0)


def test_what_a_killed_process_set_aside_is_built_by_the_next(notes: sa.Engine) -> None:
    before = indexes(notes)
    with notes.connect() as connection:
        set_aside(notes, catalog.require_binding(connection, IDENTITY))
    assert (indexes(notes), comments(notes)) == ({}, 1)
    # Another one comes in the middle, and is killed as well.
    with notes.begin() as connection:
        statement = INDEXES[1].format(QUOTED)
        execute(connection, statement)
    with notes.connect() as connection:
        assert set(set_aside(notes, catalog.require_binding(connection, IDENTITY))) == set(before)
    assert backfill(notes, IDENTITY).complete
    assert (indexes(notes), comments(notes)) == (before, 0)


def test_errors_bring_them_back_and_interrupts_leave_them(
    notes: sa.Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = indexes(notes)
    with pytest.raises(ZeroDivisionError), indexes_aside(notes, IDENTITY):
        raise ZeroDivisionError(indexes(notes))
    assert indexes(notes) == before
    monkeypatch.setattr(running, "MANY", 100)
    stop = threading.Event()
    stop.set()
    with caplog.at_level(logging.WARNING, "sbert_pg"):
        assert not backfill(notes, IDENTITY, index="aside", stop=stop).complete
    assert indexes(notes) == {}
    assert "aside until a backfill is complete" in caplog.text
    assert backfill(notes, IDENTITY).complete
    assert indexes(notes) == before
    # Refused before anything is dropped.
    registry.use_encoder(DeterministicEncoder(dimensions=32, salt="other"))
    change(notes)
    with pytest.raises(EncoderMismatchError):
        backfill(notes, IDENTITY, index="aside")
    assert indexes(notes) == before


def test_connections_that_were_lost_meanwhile_do_not_matter(notes: sa.Engine) -> None:
    before = indexes(notes)
    with indexes_aside(notes, IDENTITY):
        ended = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        )
        other = sa.create_engine(notes.url, poolclass=sa.NullPool)
        with other.connect() as connection:
            connection.exec_driver_sql(ended + " AND datname = current_database()")
    assert indexes(notes) == before


def test_who_may_not_drop_them_is_refused(notes: sa.Engine) -> None:
    before = indexes(notes)
    with notes.begin() as connection:
        connection.exec_driver_sql("CREATE ROLE aside_writer")
        connection.exec_driver_sql("SELECT sbert.grant_v1('aside_writer', 'writer')")
        execute(connection, f"GRANT SELECT, UPDATE ON {QUOTED} TO aside_writer")
    other = sa.create_engine(notes.url, connect_args={"options": "-c role=aside_writer"})
    try:
        with pytest.raises(BackfillError, match="as the owner"), indexes_aside(other, IDENTITY):
            pass
    finally:
        other.dispose()
        with notes.begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY aside_writer")
            connection.exec_driver_sql("DROP ROLE aside_writer")
    assert (indexes(notes), comments(notes)) == (before, 0)
