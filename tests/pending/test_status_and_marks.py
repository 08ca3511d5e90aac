"""What the status says, and what an operator can do about marks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from sbert_pg import catalog
from sbert_pg.catalog import tables
from sbert_pg.pending import marks
from sbert_pg.pending.status import status
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.guard import ColumnIdentity

SPEC = EncoderSpec(name="deterministic", dimensions=3)


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE note (id int, part text, title text, e vector(3), PRIMARY KEY (id, part))"
        )
        yield connection


@pytest.fixture
def binding(connection: Connection) -> catalog.Binding:
    made = catalog.bind(connection, ColumnIdentity(None, "note", "e"), SPEC, Source.of("title"))
    connection.commit()
    return made


def key(number: int) -> str:
    return f'["{number}", "p"]'


def insert(connection: Connection, binding: catalog.Binding, *rows: tuple[int, bool]) -> None:
    catalog.attest(connection, binding)
    for number, embedded in rows:
        connection.execute(
            sa.text("INSERT INTO note VALUES (:i, 'p', 'text', CAST(:v AS vector))"),
            {"i": number, "v": "[1,0,0]" if embedded else None},
        )
    connection.commit()


def fail(connection: Connection, *keys: str) -> None:
    connection.execute(
        sa.update(tables.pending)
        .where(tables.pending.c.key.in_(keys))
        .values(failed=True, attempts=5, error="too odd")
    )
    connection.commit()


def pending(connection: Connection) -> list[str]:
    c = tables.pending.c
    return list(connection.scalars(sa.select(c.key).where(~c.failed).order_by(c.key)))


def test_status_of_nothing(connection: Connection, bare_database_url: sa.URL) -> None:
    assert status(connection) == []
    bare = sa.create_engine(bare_database_url)
    with bare.connect() as without_catalog:
        assert status(without_catalog) == []
    bare.dispose()


def test_status(connection: Connection, binding: catalog.Binding) -> None:
    (before,) = status(connection)
    assert (before.rows, before.embedded, before.pending, before.oldest_pending) == (
        None, None, 0, None,
    )  # fmt: skip
    assert (before.index, before.noticing, before.counted) == ("none", True, False)
    insert(connection, binding, *[(i, i % 4 != 0) for i in range(400)])
    connection.exec_driver_sql("ANALYZE note")
    connection.exec_driver_sql("CREATE INDEX i ON note USING hnsw (e vector_cosine_ops)")
    fail(connection, key(0), key(4))
    marks.skip(connection, binding, [key(4)])
    connection.commit()
    (after,) = status(connection)
    assert after.column == "public.note.e"
    assert after.encoder == "deterministic"
    assert (after.rows, after.embedded) == (400, 300)
    assert (after.pending, after.failed, after.skipped) == (98, 1, 1)
    assert after.oldest_pending is not None
    assert after.oldest_pending >= 0
    assert after.index == "ready"
    assert not after.pending_is_capped
    insert(connection, binding, (1000, True))
    (exact,) = status(connection, exact=True)
    assert (exact.rows, exact.embedded, exact.pending, exact.counted) == (401, 301, 98, True)


def test_status_reads_no_table_of_the_applications(
    connection: Connection, binding: catalog.Binding
) -> None:
    """So it costs the same on a large table as on a small one."""
    insert(connection, binding, (1, True))
    plan = connection.exec_driver_sql("EXPLAIN (VERBOSE) SELECT * FROM sbert.status").scalars()
    text = "\n".join(plan)
    assert "sbert.pending" in text, "plans do name the tables that are read"
    assert "public.note" not in text


def test_status_says_when_nobody_notices(connection: Connection, binding: catalog.Binding) -> None:
    connection.exec_driver_sql("ALTER TABLE note DISABLE TRIGGER USER")
    assert not status(connection)[0].noticing


def test_status_counts_marks_to_a_limit(connection: Connection, binding: catalog.Binding) -> None:
    connection.exec_driver_sql(
        "INSERT INTO sbert.pending (column_id, key) "
        f"SELECT {binding.id}, i::text FROM generate_series(1, 100001) AS i"
    )
    capped, counted = status(connection)[0], status(connection, exact=True)[0]
    assert (capped.pending, capped.pending_is_capped) == (100_000, True)
    assert (counted.pending, counted.pending_is_capped) == (100_001, False)


def test_an_index_on_an_expression_of_the_column_counts(
    connection: Connection, binding: catalog.Binding
) -> None:
    connection.exec_driver_sql("CREATE INDEX ON note (title)")
    assert status(connection)[0].index == "none"
    connection.exec_driver_sql(
        "CREATE INDEX ON note USING hnsw ((e::halfvec(3)) halfvec_cosine_ops)"
    )
    assert status(connection)[0].index == "ready"


def test_mark_all(connection: Connection, binding: catalog.Binding) -> None:
    insert(connection, binding, (1, True), (2, False), (3, True))
    fail(connection, key(2))
    assert marks.mark_all(connection, binding, missing_only=True) == 0
    assert pending(connection) == [key(2)], "a failed row is tried again"
    assert marks.mark_all(connection, binding) == 2
    assert pending(connection) == [key(1), key(2), key(3)]


def test_mark_some(connection: Connection, binding: catalog.Binding) -> None:
    insert(connection, binding, (1, True), (2, False))
    assert marks.mark(connection, binding, [key(1), key(2), key(1)]) == 1
    assert pending(connection) == [key(1), key(2)]
    assert marks.mark(connection, binding, []) == 0


def test_failures_and_retry(connection: Connection, binding: catalog.Binding) -> None:
    insert(connection, binding, (1, False), (2, False), (3, False))
    fail(connection, key(1), key(2))
    assert [(f.key, f.attempts, f.error) for f in marks.failures(connection, binding)] == [
        (key(1), 5, "too odd"),
        (key(2), 5, "too odd"),
    ]
    assert marks.retry(connection, binding, [key(1), key(3)]) == 1
    assert pending(connection) == [key(1), key(3)]
    assert marks.retry(connection, binding) == 1
    assert marks.failures(connection, binding) == []


def test_skip(connection: Connection, binding: catalog.Binding) -> None:
    insert(connection, binding, (1, True), (2, True), (3, False))
    connection.exec_driver_sql("UPDATE note SET title = 'odd' WHERE id IN (1, 3)")
    fail(connection, key(1), key(3))
    assert marks.skip(connection, binding) == 2
    assert marks.skip(connection, binding) == 0
    left = "SELECT id FROM note WHERE e IS NOT NULL"
    assert connection.scalars(sa.text(left)).all() == [2], "an old vector must not be found"
    assert marks.failures(connection, binding) == []
    skipped = marks.failures(connection, binding, skipped=True)
    assert [f.error for f in skipped] == ["skipped by an operator: too odd"] * 2
    assert marks.retry(connection, binding) == 0, "not by accident"
    assert marks.retry(connection, binding, [key(1)]) == 1
    connection.exec_driver_sql("UPDATE note SET title = 'new' WHERE id = 3")
    assert pending(connection) == [key(1), key(3)], "a new text is a new chance"


def test_skip_while_the_text_changes(
    engine: sa.Engine, connection: Connection, binding: catalog.Binding
) -> None:
    """The writer holds the row, skip waits for it, and then there is nothing left to skip."""
    insert(connection, binding, (1, True))
    connection.exec_driver_sql("UPDATE note SET title = 'odd'")
    fail(connection, key(1))
    catalog.attest(connection, binding)
    connection.exec_driver_sql("UPDATE note SET title = 'fine', e = '[0,0,1]'")
    skipped: list[int] = []

    def operator() -> None:
        with engine.begin() as other:
            skipped.append(marks.skip(other, binding))

    thread = threading.Thread(target=operator)
    thread.start()
    waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watcher:
        while watcher.scalar(waiting) == 0:
            time.sleep(0.01)
    connection.commit()
    thread.join()
    assert skipped == [0]
    vector = connection.scalar(sa.text("SELECT e::text FROM note"))
    assert vector == "[0,0,1]"
