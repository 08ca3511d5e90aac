"""What the status says, and what an operator can do about rows that failed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from sbert_pg import catalog
from sbert_pg.errors import BindingError
from sbert_pg.freshness import counts, failures, retry, skip, status
from sbert_pg.freshness.claims import fail
from sbert_pg.freshness.queue import note_caught_up, queue_fault
from sbert_pg.freshness.rows import rows_of
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.types import wire

from .conftest import wait_for

SPEC = EncoderSpec(name="deterministic", dimensions=3)
IDENTITY = ColumnIdentity(None, "note", "e")


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE note (id int, part text, title text, e vector(3), PRIMARY KEY (id, part))"
        )
        yield connection


@pytest.fixture
def binding(connection: Connection) -> catalog.Binding:
    catalog.bind(connection, IDENTITY, SPEC, Source.of("title"))
    connection.commit()
    made = catalog.require_binding(connection, IDENTITY)
    connection.commit()
    return made


def key(number: int) -> str:
    return f'["{number}", "p"]'


def insert(connection: Connection, binding: catalog.Binding, *rows: tuple[int, bool]) -> None:
    """Rows with a proven vector, or pending."""
    for number, embedded in rows:
        connection.execute(
            sa.text("INSERT INTO note (id, part, title) VALUES (:i, 'p', 'text')"), {"i": number}
        )
        if embedded:
            write(connection, binding, number, 1)
    connection.commit()


def write(connection: Connection, binding: catalog.Binding, number: int, first: float) -> None:
    """A vector as a worker writes it."""
    rows = rows_of(connection, binding)
    rows.prepare(connection)
    found = rows.find(connection, key(number))
    assert found is not None
    read = rows.read(connection, [found])
    payload = wire.to_wire(np.array([first, 0, 1], np.float32), "vector")
    assert rows.write(connection, read, {key(number): payload}).rows == (key(number),)


def make_fail(connection: Connection, binding: catalog.Binding, *keys: str) -> None:
    """As a worker does after the last attempt."""
    rows = rows_of(connection, binding)
    rows.prepare(connection)
    found = [rows.find(connection, label) for label in keys]
    read = rows.read(connection, [one for one in found if one is not None])
    fail(
        connection, binding, dict.fromkeys(keys, "too odd"), {row.label: row.of for row in read},
        max_attempts=1, backoff=timedelta(0),
    )  # fmt: skip
    rows.write(connection, read, {row.label: None for row in read})
    connection.commit()


def pending(connection: Connection, binding: catalog.Binding) -> list[int]:
    table = binding.clause()
    found = sa.select(table.c.id).where(binding.is_stale(table)).order_by(table.c.id)
    return list(connection.scalars(found))


def test_status_of_nothing(connection: Connection, bare_database_url: sa.URL) -> None:
    assert status(connection) == []
    bare = sa.create_engine(bare_database_url)
    with bare.connect() as without_catalog:
        assert status(without_catalog) == []
    bare.dispose()


def test_status(connection: Connection, binding: catalog.Binding) -> None:
    (before,) = status(connection)
    assert (before.rows, before.embedded, before.pending, before.age) == (None, None, 0, None)
    assert (before.index, before.problems, before.counted) == ("none", (), False)
    insert(connection, binding, *[(i, i % 4 != 0) for i in range(80)])
    connection.exec_driver_sql("ANALYZE note")
    connection.exec_driver_sql("CREATE INDEX i ON note USING hnsw (e vector_cosine_ops)")
    make_fail(connection, binding, key(0), key(4))
    assert skip(connection, binding, [key(4)]) == 1
    connection.commit()
    (after,) = status(connection)
    assert (after.column, after.encoder) == ("public.note.e", "deterministic")
    assert (after.rows, after.embedded) == (80, 60)
    assert (after.pending, after.backfill, after.failed, after.skipped) == (18, 0, 1, 1)
    assert (after.index, after.capped) == ("ready", False)
    insert(connection, binding, (1000, True))
    (exact,) = status(connection, exact=True)
    assert (exact.rows, exact.embedded, exact.pending, exact.counted) == (81, 61, 18, True)


def test_what_was_there_before_the_binding_is_the_backfill(connection: Connection) -> None:
    connection.exec_driver_sql("INSERT INTO note SELECT i, 'p', 'x' FROM generate_series(1, 7) i")
    catalog.bind(connection, IDENTITY, SPEC, Source.of("title"))
    connection.exec_driver_sql("INSERT INTO note (id, part, title) VALUES (8, 'p', 'new')")
    (found,) = status(connection)
    assert (found.pending, found.backfill) == (1, 7)


def test_counts_stop_where_they_are_told_to(
    connection: Connection, binding: catalog.Binding
) -> None:
    connection.exec_driver_sql(
        "INSERT INTO note (id, part, title) SELECT i, 'p', 't' FROM generate_series(1, 120) i"
    )
    capped, exact = counts(connection, binding, cap=100), counts(connection, binding)
    assert (capped.pending, capped.capped) == (100, True)
    assert (exact.pending, exact.capped) == (120, False)


def test_counts_read_no_table(connection: Connection, binding: catalog.Binding) -> None:
    """Whatever the planner believes: never analysed, or analysed while nothing was pending."""
    connection.exec_driver_sql(
        "INSERT INTO note (id, part, title) SELECT i, 'p', 't' FROM generate_series(1, 3000) i"
    )
    seen: list[tuple[str, object]] = []
    sa.event.listen(connection, "before_cursor_execute", lambda *a: seen.append((a[2], a[3])))
    for analysed in (False, True):
        if analysed:
            connection.exec_driver_sql("ANALYZE note")
        counts(connection, binding, cap=1000)
        statement, parameters = next(one for one in reversed(seen) if "count(*)" in one[0])
        plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()
        assert "Seq Scan on note" not in "\n".join(plan), "\n".join(plan)


def test_caught_up_means_that_nothing_new_is_pending(
    engine: sa.Engine, connection: Connection, binding: catalog.Binding
) -> None:
    insert(connection, binding, (1, False))
    assert not note_caught_up(connection, binding)
    assert status(connection)[0].age is None
    write(connection, binding, 1, 1)
    connection.commit()
    assert note_caught_up(connection, binding)
    connection.commit()
    age = status(connection)[0].age
    assert age is not None
    assert 0 <= age < 60


def test_a_queue_that_is_gone_is_said_and_nothing_is_counted(
    connection: Connection, binding: catalog.Binding
) -> None:
    insert(connection, binding, (1, False))
    [name] = [i.existing for i in catalog.queue_indexes(connection, binding) if i.kind == "queue"]
    connection.exec_driver_sql(f"DROP INDEX {name}")
    assert "is missing" in str(queue_fault(connection, binding))
    (found,) = status(connection)
    assert found.problems != ()
    assert found.capped, "what is not counted is not called nothing"
    catalog.bind(connection, IDENTITY, SPEC, Source.of("title"))
    assert queue_fault(connection, binding) is None
    assert status(connection)[0].problems == ()


@pytest.mark.parametrize(
    "harm",
    [
        "ALTER TABLE note DISABLE TRIGGER USER",
        "ALTER TABLE note RENAME COLUMN title TO heading; ALTER TABLE note ADD title text",
        "ALTER TABLE note RENAME TO old; CREATE TABLE note (LIKE old INCLUDING ALL)",
        "CREATE RULE r AS ON UPDATE TO note DO ALSO SELECT 1",
    ],
)
def test_status_says_what_is_wrong(
    connection: Connection, binding: catalog.Binding, harm: str
) -> None:
    connection.exec_driver_sql(harm)
    assert status(connection)[0].problems != ()


def test_triggers_that_fire_for_replication_only(
    connection: Connection, binding: catalog.Binding
) -> None:
    """And of a column that replaces another, where all are there and then one is not."""
    names = connection.exec_driver_sql(
        "SELECT tgname FROM pg_trigger WHERE tgrelid = 'note'::regclass AND NOT tgisinternal"
    ).scalars()
    for name in names.all():
        connection.exec_driver_sql(f"ALTER TABLE note ENABLE REPLICA TRIGGER {name}")
    assert status(connection)[0].problems != ()
    connection.rollback()
    connection.exec_driver_sql("ALTER TABLE note ADD w vector(3)")
    new = ColumnIdentity(None, "note", "w")
    catalog.bind(connection, new, SPEC, Source.of("title"), replaces="e")
    assert [one.problems for one in status(connection)] == [(), ()]
    connection.exec_driver_sql("ALTER TABLE note DISABLE TRIGGER USER")
    assert all(one.problems for one in status(connection))


def test_rows_that_are_hidden_are_not_called_fresh(
    engine: sa.Engine, connection: Connection, binding: catalog.Binding
) -> None:
    insert(connection, binding, (1, False))
    connection.exec_driver_sql("ALTER TABLE note ENABLE ROW LEVEL SECURITY")
    connection.exec_driver_sql("ALTER TABLE note FORCE ROW LEVEL SECURITY")
    role = f"hidden_{connection.engine.url.database}"
    connection.exec_driver_sql(f"CREATE ROLE {role}")
    connection.exec_driver_sql(f"GRANT SELECT ON note TO {role}")
    connection.execute(sa.select(sa.func.sbert.grant_v1(role, "reader")))
    connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
    with pytest.raises(BindingError, match="Row-level security"):
        status(connection)


def test_an_index_on_an_expression_of_the_column_counts(
    connection: Connection, binding: catalog.Binding
) -> None:
    connection.exec_driver_sql("CREATE INDEX ON note (title)")
    assert status(connection)[0].index == "none"
    connection.exec_driver_sql(
        "CREATE INDEX ON note USING hnsw ((e::halfvec(3)) halfvec_cosine_ops)"
    )
    assert status(connection)[0].index == "ready"


def test_failures_and_retry(connection: Connection, binding: catalog.Binding) -> None:
    insert(connection, binding, (1, False), (2, False), (3, False))
    make_fail(connection, binding, key(1), key(2))
    assert [(f.key, f.failed, f.error) for f in failures(connection, binding)] == [
        (key(1), True, "too odd"),
        (key(2), True, "too odd"),
    ]
    assert pending(connection, binding) == [3]
    assert retry(connection, binding, [key(1), key(3)]) == 1
    assert pending(connection, binding) == [1, 3]
    assert retry(connection, binding) == 1
    assert failures(connection, binding) == []
    assert pending(connection, binding) == [1, 2, 3]


@pytest.mark.parametrize(
    ("type_", "value", "shown"),
    [
        ("date", "2026-03-04", "2026-03-04"),
        ("timestamptz", "2026-03-04 05:06:07+00", "2026-03-04 05:06:07+00"),
        ("interval", "1 year 2 days", "1 year 2 days"),
        ("bytea", r"\x0f", r"\x0f"),
    ],
)
def test_failures_are_named_alike_however_values_are_spelt(
    connection: Connection, type_: str, value: str, shown: str
) -> None:
    connection.exec_driver_sql("DROP TABLE note")
    connection.exec_driver_sql(
        f"CREATE TABLE note (id {type_} PRIMARY KEY, title text, e vector(3))"
    )
    binding = catalog.bind(connection, IDENTITY, SPEC, Source.of("title"))
    connection.execute(
        sa.text(f"INSERT INTO note VALUES (CAST(:v AS {type_}), 'text')"), {"v": value}
    )
    make_fail(connection, binding, f'["{shown}"]'.replace("\\", "\\\\"))
    spelt = {
        "DateStyle": "SQL, DMY", "IntervalStyle": "iso_8601", "TimeZone": "Asia/Tokyo",
        "bytea_output": "escape",
    }  # fmt: skip
    for name, setting in spelt.items():
        connection.execute(sa.select(sa.func.set_config(name, setting, False)))
    connection.commit()
    [one] = failures(connection, binding)
    assert (one.key, one.failed, one.error) == (shown, True, "too odd")
    assert retry(connection, binding, [one.key]) == 1


def test_failures_are_listed_over_another_driver(
    connection: Connection, binding: catalog.Binding
) -> None:
    pytest.importorskip("psycopg2")
    insert(connection, binding, (1, False))
    make_fail(connection, binding, key(1))
    connection.commit()
    engine = sa.create_engine(connection.engine.url.set(drivername="postgresql+psycopg2"))
    with engine.connect() as other:
        assert [one.key for one in failures(other, binding)] == [key(1)]
    engine.dispose()


def test_a_failed_row_without_a_record_is_shown_as_well(
    connection: Connection, binding: catalog.Binding
) -> None:
    insert(connection, binding, (1, False))
    make_fail(connection, binding, key(1))
    connection.exec_driver_sql("DELETE FROM sbert.failure")
    [one] = failures(connection, binding)
    assert (one.key, one.failed, one.attempts, one.error) == (key(1), True, 0, None)


def test_skip(connection: Connection, binding: catalog.Binding) -> None:
    insert(connection, binding, (1, True), (2, True), (3, False))
    connection.exec_driver_sql("UPDATE note SET title = 'odd' WHERE id IN (1, 3)")
    make_fail(connection, binding, key(1), key(3))
    assert skip(connection, binding, [key(2)]) == 0, "a fresh row is left alone"
    assert skip(connection, binding) == 2
    assert skip(connection, binding) == 0
    left = "SELECT id FROM note WHERE e IS NOT NULL"
    assert connection.scalars(sa.text(left)).all() == [2], "an old vector must not be found"
    assert failures(connection, binding) == []
    skipped = failures(connection, binding, skipped=True)
    assert [f.error for f in skipped] == ["skipped by an operator: too odd"] * 2
    assert retry(connection, binding) == 0, "not by accident"
    assert retry(connection, binding, [key(1)]) == 1
    connection.exec_driver_sql("UPDATE note SET title = 'new' WHERE id = 3")
    assert pending(connection, binding) == [1, 3], "a new text is a new chance"


def test_skip_a_row_that_is_only_pending(connection: Connection, binding: catalog.Binding) -> None:
    insert(connection, binding, (1, True))
    connection.exec_driver_sql("UPDATE note SET title = 'odd'")
    assert skip(connection, binding, [key(1)]) == 1
    assert pending(connection, binding) == []
    assert connection.scalar(sa.text("SELECT e FROM note")) is None
    assert [f.skipped for f in failures(connection, binding, skipped=True)] == [True]


def test_skip_while_the_text_changes(
    engine: sa.Engine, connection: Connection, binding: catalog.Binding
) -> None:
    """The writer holds the row, skip waits for it, and then there is nothing left to skip."""
    insert(connection, binding, (1, True))
    connection.exec_driver_sql("UPDATE note SET title = 'odd'")
    make_fail(connection, binding, key(1))
    connection.exec_driver_sql("UPDATE note SET title = 'fine'")
    skipped: list[int] = []

    def operator() -> None:
        with engine.begin() as other:
            skipped.append(skip(other, binding))

    write(connection, binding, 1, 7)
    thread = threading.Thread(target=operator)
    thread.start()
    waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watcher:
        wait_for(lambda: watcher.scalar(waiting) > 0)
    connection.commit()
    thread.join()
    assert skipped == [0]
    assert connection.scalar(sa.text("SELECT e::text FROM note")) == "[7,0,1]"
