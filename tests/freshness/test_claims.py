"""Claims, the write that proves itself, and the record of failures, step by step."""

from __future__ import annotations

import itertools
import threading
from datetime import timedelta

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, refresh
from sbert_pg.errors import EncoderError
from sbert_pg.freshness import claims
from sbert_pg.freshness.encoding import embed, encode_each
from sbert_pg.freshness.queue import BACKFILL, CHANGED, Class, Key, Row, Written
from sbert_pg.freshness.rows import Rows, rows_of
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.wire import from_text

from .conftest import failure_rows, states

LEASE = timedelta(seconds=60)
_tokens = itertools.count()


def bind(engine: sa.Engine, table: str, source: Source | None = None) -> Rows:
    identity = ColumnIdentity(None, table, "embedding")
    with engine.begin() as connection:
        declared = EncoderSpec(name="deterministic", dimensions=32)
        catalog.bind(connection, identity, declared, source or Source.of("body"))
    with engine.begin() as connection:
        return rows_of(connection, catalog.require_binding(connection, identity))


def take(
    engine: sa.Engine,
    rows: Rows,
    *,
    most: int = 100,
    class_: Class = CHANGED,
    token: str | None = None,
    after: Key | None = None,
    lease: timedelta = LEASE,
) -> list[Row]:
    """Claim rows and read them; the lease stays."""
    with engine.begin() as connection:
        chosen = claims.claim(
            connection, rows, class_, token=token or f"t{next(_tokens)}", most=most, lease=lease,
            after=after,
        )  # fmt: skip
    with engine.begin() as connection:
        rows.prepare(connection)
        return rows.read(connection, chosen)


def take_alone(engine: sa.Engine, rows: Rows) -> str | None:
    with engine.begin() as connection:
        claims.end_waits(connection, [rows.binding])
        chosen = claims.claim_again(connection, rows, token=f"t{next(_tokens)}", lease=LEASE)
    return chosen[0].label if chosen else None


def take_few(engine: sa.Engine, rows: Rows, most: int) -> list[str]:
    with engine.begin() as connection:
        token = f"t{next(_tokens)}"
        return [
            one.label
            for one in claims.claim_again(connection, rows, token=token, lease=LEASE, most=most)
        ]


def put(engine: sa.Engine, rows: Rows, read: list[Row], encoder: DeterministicEncoder) -> Written:
    embedded = embed(rows.binding, encoder, read)
    with engine.begin() as connection:
        return rows.write(connection, read, embedded.vectors)


def ended(plain: psycopg.Connection) -> None:
    """As if every process that has a lease had come to an end a while ago."""
    plain.execute("UPDATE sbert.claim SET until = now() - interval '1 second'")


def expire(engine: sa.Engine, rows: Rows, attempts: int = 3) -> list[str]:
    with engine.begin() as connection:
        return claims.expire(connection, rows.binding, max_attempts=attempts, backoff=timedelta(0))


def vector_of(plain: psycopg.Connection, key: int) -> np.ndarray | None:
    [(text,)] = plain.execute("SELECT embedding::text FROM note WHERE id = %s", [key]).fetchall()
    return None if text is None else from_text(text)


def test_a_claimed_row_gets_the_vector_of_its_text(engine, rows, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('red apple'), ('green pear'), ('red apple')")
    read = take(engine, rows)
    assert [row.text for row in read] == ["red apple", "green pear", "red apple"]
    assert put(engine, rows, read, encoder) == Written(('["1"]', '["2"]', '["3"]'), (), ())
    assert encoder.encoded[-2:] == ["red apple", "green pear"], "each text is encoded once"
    assert set(states(plain).values()) == {"fresh"}
    for key, body in ((1, "red apple"), (2, "green pear")):
        np.testing.assert_array_equal(vector_of(plain, key), encoder.encode_document([body])[0])


def test_two_workers_never_claim_the_same_row(engine, rows, plain):
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 300) AS i")
    taken: list[str] = []
    lock = threading.Lock()

    def work() -> None:
        while read := take(engine, rows, most=7):
            with lock:
                taken.extend(row.label for row in read)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(f'["{i}"]' for i in range(1, 301))


def test_new_and_changed_rows_come_before_the_backfill(engine, plain, encoder):
    plain.execute(
        "CREATE TABLE note (id bigint PRIMARY KEY, body text, embedding vector(32)); "
        "INSERT INTO note SELECT i, 'old ' || i FROM generate_series(1, 50) AS i"
    )
    rows = bind(engine, "note")
    assert take(engine, rows) == []
    plain.execute("INSERT INTO note VALUES (40000, 'new')")
    plain.execute("UPDATE note SET body = 'changed' WHERE id = 30")
    assert [row.text for row in take(engine, rows)] == ["new"]
    backfill = take(engine, rows, class_=BACKFILL)
    assert [row.label for row in backfill[:2]] == ['["1"]', '["2"]']
    assert len(backfill) == 50
    # Once it has a vector, a row of the backfill that changes is a changed row.
    plain.execute("DELETE FROM sbert.claim")
    put(engine, rows, backfill, encoder)
    plain.execute("UPDATE note SET body = 'changed again' WHERE id = 30")
    plain.execute("DELETE FROM sbert.claim")
    assert [row.text for row in take(engine, rows)] == ["changed again", "new"]


def test_a_cursor_goes_on_behind_the_last_row(engine, rows, plain):
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 30) AS i")
    first = take(engine, rows, most=10)
    second = take(engine, rows, most=10, after=first[-1].key)
    assert [row.label for row in second] == [f'["{i}"]' for i in range(11, 21)]
    plain.execute("DELETE FROM sbert.claim")
    assert take(engine, rows, most=1)[0].label == '["1"]', "the beginning is still there"


@pytest.mark.parametrize("class_", [CHANGED, BACKFILL])
@pytest.mark.parametrize("key", ["id bigint", "id text", "id uuid", "tenant text, id int"])
def test_a_cursor_goes_on_behind_what_others_have_in_hand(engine, plain, class_, key):
    """The next claim of each walks over nothing that the others of a fleet have claimed since."""
    names = ", ".join(part.split()[0] for part in key.split(", "))
    value = {
        "id bigint": "i",
        "id text": "lpad(i::text, 3, '0')",
        "id uuid": "lpad(i::text, 32, '0')::uuid",
        "tenant text, id int": "lpad((i / 7)::text, 2, '0'), i",
    }[key]
    plain.execute(
        f"CREATE TABLE note ({key}, body text, embedding vector(32), PRIMARY KEY ({names}))"
    )
    fill = f"INSERT INTO note SELECT {value}, 'n' || i FROM generate_series(10, 60) AS i"
    if class_ == BACKFILL:
        plain.execute(fill)
    rows = bind(engine, "note")
    if class_ == CHANGED:
        plain.execute(fill)
    # Of the other class, and further: not where this one's claims are.
    plain.execute(f"INSERT INTO note SELECT {value}, 'far' FROM generate_series(70, 70) AS i")
    if class_ == BACKFILL:
        assert [row.text for row in take(engine, rows)] == ["far"]
    first, second, third = (
        take(engine, rows, most=10, class_=class_, token=token) for token in ("a", "b", "c")
    )
    assert [row.text for row in third] == [f"n{i}" for i in range(30, 40)]
    with engine.begin() as connection:
        claims.release(connection, rows.binding, "b")
    after = first[-1].key
    on = take(engine, rows, most=5, class_=class_, after=after)
    assert [row.text for row in on] == [f"n{i}" for i in range(40, 45)]
    back = take(engine, rows, most=10, class_=class_)
    assert [row.text for row in back] == [row.text for row in second], "nothing is left out"


def test_a_row_in_hand_whose_key_cannot_be_read_any_more_stops_no_claim(engine, plain):
    plain.execute("CREATE TYPE mood AS ENUM ('a', 'b', 'c')")
    plain.execute("CREATE TABLE note (id mood PRIMARY KEY, body text, embedding vector(32))")
    rows = bind(engine, "note")
    plain.execute("INSERT INTO note VALUES ('a', 'one'), ('b', 'two'), ('c', 'three')")
    first, _ = take(engine, rows, most=1), take(engine, rows, most=1)
    plain.execute("ALTER TYPE mood RENAME VALUE 'b' TO 'd'")
    on = take(engine, rows, most=1, after=first[-1].key)
    # Under its new name the row is in nobody's hands.
    assert [row.text for row in on] == ["two"]


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("class_", [CHANGED, BACKFILL])
def test_claims_use_the_queue_and_sort_nothing(engine, rows, plain, after, class_, required):
    if required:
        plain.execute("ALTER TABLE note ALTER body SET NOT NULL")
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 5000) AS i")
    plain.execute("ANALYZE note")
    seen: list[tuple[str, object]] = []
    key = take(engine, rows, most=1)[0].key
    plain.execute("DELETE FROM sbert.claim")
    sa.event.listen(engine, "before_cursor_execute", lambda *a: seen.append((a[2], a[3])))
    with engine.begin() as connection:
        rows.prepare(connection)
        rows.candidates(connection, class_, 100, key if after else None)
        statement, parameters = seen[-1]
        plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()
    text = "\n".join(plan)
    assert "using sbert_queue" in text, text
    assert "Sort" not in text, text


def test_a_text_that_changed_meanwhile_is_not_overwritten(engine, rows, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('old')")
    read = take(engine, rows)
    plain.execute("UPDATE note SET body = 'new'")
    assert put(engine, rows, read, encoder) == Written((), ('["1"]',), ())
    assert vector_of(plain, 1) is None
    plain.execute("DELETE FROM sbert.claim")
    again = take(engine, rows)
    assert [row.text for row in again] == ["new"]
    assert put(engine, rows, again, encoder).rows == ('["1"]',)


def test_nothing_to_write_is_written(engine, rows, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('text')")
    read = take(engine, rows)
    assert put(engine, rows, [], encoder) == Written((), (), ())
    with engine.begin() as connection:
        assert rows.write(connection, read, {}) == Written((), (), ())
        assert rows.columns_of(connection, [], [rows.label]) == ()


def test_a_change_of_something_else_does_not_matter(engine, rows, plain, encoder):
    plain.execute("ALTER TABLE note ADD views int DEFAULT 0")
    plain.execute("INSERT INTO note (body) VALUES ('text')")
    read = take(engine, rows)
    plain.execute("UPDATE note SET views = views + 1")
    assert put(engine, rows, read, encoder).rows == ('["1"]',)


def test_a_text_that_comes_back_is_the_same_text(engine, rows, plain, encoder):
    """A, then B, then A again: what was encoded for A is right."""
    plain.execute("INSERT INTO note (body) VALUES ('A')")
    read = take(engine, rows)
    plain.execute("UPDATE note SET body = 'B'")
    plain.execute("UPDATE note SET body = 'A'")
    assert put(engine, rows, read, encoder).rows == ('["1"]',)
    plain.execute("UPDATE note SET body = 'B'")
    assert states(plain) == {1: "pending"}
    plain.execute("UPDATE note SET body = 'A'")
    assert states(plain) == {1: "fresh"}, "its vector is still that of its text"


def test_a_row_that_was_replaced_by_another_of_its_key(engine, rows, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('old')")
    read = take(engine, rows)
    plain.execute("DELETE FROM note; INSERT INTO note (id, body) VALUES (1, 'another')")
    assert put(engine, rows, read, encoder).rows == ()
    assert states(plain) == {1: "pending"}


def test_a_row_that_somebody_holds_is_skipped_and_not_awaited(engine, rows, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('old'), ('held'), ('other')")
    read = take(engine, rows)
    with plain.transaction():
        plain.execute("UPDATE note SET body = 'new' WHERE id = 1")
        plain.execute("SELECT FROM note WHERE id = 2 FOR UPDATE")
        # Were either awaited, this would never return.
        written = put(engine, rows, read, encoder)
        assert written == Written(('["3"]',), (), ('["1"]', '["2"]'))
    assert states(plain) == {1: "pending", 2: "pending", 3: "fresh"}


def test_what_is_written_says_if_a_trigger_made_it_pending_again(engine, rows, plain, encoder):
    plain.execute(
        "CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "NEW.body := NEW.body || '.'; RETURN NEW; END $$; "
        "CREATE TRIGGER stamp BEFORE UPDATE ON note FOR EACH ROW EXECUTE FUNCTION stamp()"
    )
    plain.execute("INSERT INTO note (body) VALUES ('text')")
    written = put(engine, rows, take(engine, rows), encoder)
    assert (written.rows, written.again) == (('["1"]',), ('["1"]',))
    assert states(plain) == {1: "pending"}


def test_a_row_that_lost_its_text_loses_its_vector(engine, rows, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('text')")
    put(engine, rows, take(engine, rows), encoder)
    plain.execute("UPDATE note SET body = NULL")
    plain.execute("DELETE FROM sbert.claim")
    read = take(engine, rows)
    assert [row.text for row in read] == [None]
    assert put(engine, rows, read, encoder).rows == ('["1"]',)
    assert vector_of(plain, 1) is None
    assert states(plain) == {1: "fresh"}


def test_a_vector_that_is_set_to_null_is_made_again(engine, rows, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('text')")
    put(engine, rows, take(engine, rows), encoder)
    plain.execute("UPDATE note SET embedding = NULL")
    assert states(plain) == {1: "pending"}


def test_an_empty_text_is_a_text(engine, rows, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('')")
    put(engine, rows, take(engine, rows), encoder)
    np.testing.assert_array_equal(vector_of(plain, 1), encoder.encode_document([""])[0])


def test_an_old_snapshot_of_the_text_writes_nothing_under_load(engine, rows, plain, encoder):
    """Writers change texts while vectors are written, with nobody to coordinate them."""
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 40) AS i")
    stop = threading.Event()

    def change() -> None:
        with psycopg.connect(
            engine.url.set(drivername="postgresql").render_as_string(hide_password=False),
            autocommit=True,
        ) as writer:
            number = 0
            while not stop.is_set():
                number += 1
                writer.execute(
                    "UPDATE note SET body = %s WHERE id = %s", [f"c{number}", number % 40 + 1]
                )

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(30):
            read = take(engine, rows)
            if read:  # The writer may not have had its turn since the last round.
                put(engine, rows, read, encoder)
            plain.execute("DELETE FROM sbert.claim")
    finally:
        stop.set()
        thread.join()
    found = plain.execute("SELECT id, body, embedding::text FROM note").fetchall()
    now = states(plain)
    for key, body, vector in found:
        if now[key] == "fresh":
            np.testing.assert_allclose(
                from_text(vector), encoder.encode_document([body])[0], atol=1e-6
            )


# -- leases -----------------------------------------------------------------------------------


def test_a_lease_keeps_others_away_until_it_is_given_back(engine, rows, plain):
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    assert len(take(engine, rows, token="mine")) == 1
    assert take(engine, rows) == []
    with engine.begin() as connection:
        claims.release(connection, rows.binding, "mine")
    assert len(take(engine, rows)) == 1


def test_a_lease_that_is_renewed_does_not_end(engine, rows, plain):
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    take(engine, rows, token="mine")
    ended(plain)
    with engine.begin() as connection:
        claims.renew(connection, ["mine"], LEASE)
    assert expire(engine, rows) == []
    assert failure_rows(plain) == []
    [(left,)] = plain.execute("SELECT until - now() FROM sbert.claim").fetchall()
    assert timedelta(seconds=50) < left <= LEASE


def test_a_late_worker_writes_nothing_that_is_not_right(engine, rows, plain, encoder):
    """Its lease has ended, another has done the row; the write of the first is not even wrong."""
    plain.execute("INSERT INTO note (body) VALUES ('text')")
    late = take(engine, rows)
    ended(plain)
    expire(engine, rows)
    assert take_alone(engine, rows) == '["1"]'
    plain.execute("UPDATE note SET body = 'another'")
    assert put(engine, rows, late, encoder).rows == ()


def test_rows_in_hand_when_a_process_ended_are_tried_alone(engine, rows, plain):
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 5) AS i")
    take(engine, rows, most=4)
    ended(plain)
    assert expire(engine, rows) == []
    assert [(key, attempts) for key, attempts, *_ in failure_rows(plain)] == [
        (f'["{i}"]', 1) for i in range(1, 5)
    ]
    assert [row.label for row in take(engine, rows)] == ['["5"]'], "the others in company"
    assert take_alone(engine, rows) == '["1"]'
    assert take_alone(engine, rows) == '["2"]', "the first is leased"


def test_rows_in_hand_when_a_process_ended_are_tried_a_few_at_a_time_first(engine, rows, plain):
    """Alone, all that a fleet's machines had in hand when they vanished would take minutes."""
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 9) AS i")
    take(engine, rows, most=7)
    ended(plain)
    expire(engine, rows)
    plain.execute("DELETE FROM note WHERE id = 2")
    assert take_few(engine, rows, 3) == ['["1"]', '["3"]']
    ended(plain)
    expire(engine, rows)
    # One of these has ended a process again, so they are tried alone, and the others are not.
    assert take_few(engine, rows, 3) == ['["4"]', '["5"]', '["6"]']
    assert take_few(engine, rows, 3) == [], "a single one would count as one that was tried alone"
    assert [take_alone(engine, rows) for _ in range(4)] == ['["7"]', '["1"]', '["3"]', None]


def test_a_row_that_ends_processes_alone_fails(engine, rows, plain):
    plain.execute("INSERT INTO note (body) VALUES ('a'), ('kill')")
    take(engine, rows)
    ended(plain)
    expire(engine, rows)
    assert take_alone(engine, rows) == '["1"]'
    plain.execute("UPDATE note SET embedding = NULL WHERE id = 0")
    for _ in range(2):
        plain.execute("DELETE FROM sbert.claim")
        plain.execute("DELETE FROM sbert.failure WHERE key = '[\"1\"]'")
        assert take_alone(engine, rows) == '["2"]'
        ended(plain)
        failed = expire(engine, rows)
    assert failed == ['["2"]']
    with engine.begin() as connection:
        read = claims.conclude(connection, rows, failed)
        rows.write(connection, read, {row.label: None for row in read})
    assert states(plain)[2] == "failed"
    plain.execute("UPDATE note SET body = 'cured' WHERE id = 2")
    plain.execute("UPDATE sbert.failure SET at = now() - interval '1 minute'")
    assert '["2"]' in [row.label for row in take(engine, rows)]


def test_records_of_rows_that_are_gone_or_fresh_disappear(engine, rows, plain, encoder):
    plain.execute("INSERT INTO note (body) VALUES ('a'), ('b'), ('c')")
    read = take(engine, rows)
    ended(plain)
    expire(engine, rows)
    plain.execute("DELETE FROM note WHERE id = 1")
    put(engine, rows, read, encoder)
    assert take_alone(engine, rows) is None
    assert failure_rows(plain) == []


def test_a_record_whose_key_cannot_be_read_any_more_disappears(engine, plain, encoder):
    plain.execute("CREATE TYPE kind AS ENUM ('a', 'b')")
    plain.execute("CREATE TABLE note (id kind PRIMARY KEY, body text, embedding vector(32))")
    rows = bind(engine, "note")
    plain.execute("INSERT INTO note VALUES ('a', 'x'), ('b', 'y')")
    take(engine, rows)
    plain.execute("ALTER TYPE kind RENAME VALUE 'a' TO 'alpha'")
    ended(plain)
    expire(engine, rows)
    assert take_alone(engine, rows) == '["b"]'
    assert [row.label for row in take(engine, rows)] == ['["alpha"]']


@pytest.mark.parametrize("name", ["no name at all", "[3]", '["1", "2"]', "{}", '["1", null]', "["])
def test_a_record_of_what_is_no_name_stops_nothing(engine, rows, plain, encoder, name):
    """Whoever wrote it: it is removed, and the row that is due after it is tried."""
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    for label in (name, '["1"]'):
        plain.execute(
            "INSERT INTO sbert.failure (binding_id, key, attempts, next_attempt_at) "
            "VALUES (%s, %s, 1, now())", [rows.binding.id, label],
        )  # fmt: skip
    assert take_alone(engine, rows) == '["1"]'
    assert [row[0] for row in failure_rows(plain)] == ['["1"]']


# -- failures ---------------------------------------------------------------------------------


def test_failures_back_off_and_end(engine, rows, plain):
    plain.execute("INSERT INTO note (body) VALUES ('poison')")
    [row] = take(engine, rows)
    plain.execute("DELETE FROM sbert.claim")
    waits = []
    for attempt in range(1, 4):
        with engine.begin() as connection:
            final = claims.fail(
                connection, rows.binding, {row.label: "no\0 good"}, {row.label: row.of},
                max_attempts=3, backoff=timedelta(seconds=10),
            )  # fmt: skip
        assert final == ([row.label] if attempt == 3 else [])
        found = plain.execute("SELECT next_attempt_at - at, failed, error FROM sbert.failure")
        wait, failed, error = found.fetchone()
        waits.append(round(wait.total_seconds()))
        assert (failed, error) == (attempt == 3, "no\ufffd good")
        assert take(engine, rows) == [], "it is not tried before its time"
        assert take_alone(engine, rows) is None
        plain.execute("UPDATE sbert.failure SET next_attempt_at = now()")
        assert (take_alone(engine, rows) is None) == failed
        plain.execute("DELETE FROM sbert.claim")
    assert waits == [10, 20, 40]
    plain.execute("UPDATE note SET body = 'cured'")
    assert take(engine, rows) == [], "a trigger that stamps texts makes no endless loop"
    plain.execute("UPDATE sbert.failure SET at = now() - interval '1 minute'")
    [again] = take(engine, rows)
    assert (again.text, again.failed_before) == ("cured", True)


def test_attempts_count_by_the_row_and_begin_again_with_a_new_text(engine, rows, plain):
    plain.execute("INSERT INTO note (body) VALUES ('poison')")
    [row] = take(engine, rows)

    def fail(text: str) -> list[str]:
        with engine.begin() as connection:
            return claims.fail(
                connection, rows.binding, {row.label: "bad"}, {row.label: text},
                max_attempts=2, backoff=timedelta(0),
            )  # fmt: skip

    assert fail("one") == []
    assert fail("two") == [row.label], "another text each time does not begin again"
    assert fail("three") == [], "one that failed for good is over"
    assert failure_rows(plain)[0][1] == 1


def test_rows_that_are_put_off_come_back_in_company(engine, rows, plain):
    plain.execute("INSERT INTO note (body) VALUES ('a'), ('b')")
    with engine.begin() as connection:
        claims.put_off(connection, rows.binding, ['["1"]'], timedelta(hours=1))
    assert [row.label for row in take(engine, rows)] == ['["2"]']
    plain.execute("UPDATE sbert.failure SET next_attempt_at = now()")
    with engine.begin() as connection:
        assert claims.end_waits(connection, [rows.binding]) == (True, False)
    assert [row.label for row in take(engine, rows)] == ['["1"]']


def test_ten_thousand_failed_rows_cost_a_claim_nothing(engine, rows, plain):
    """They are not in the queue: the row says itself that it failed."""
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 10000) AS i")
    read = take(engine, rows, most=10_000)
    with engine.begin() as connection:
        rows.write(connection, read, {row.label: None for row in read})
    assert set(states(plain).values()) == {"failed"}
    plain.execute("VACUUM note")
    with engine.begin() as connection:
        rows.prepare(connection)
        before = plain.execute("SELECT pg_stat_get_numscans('note'::regclass)").fetchone()
        assert rows.candidates(connection, CHANGED, 100) == []
    size = plain.execute(
        "SELECT relname, reltuples FROM pg_class WHERE relname LIKE 'sbert\\_queue%'"
    ).fetchone()
    assert size[1] == 0, before


# -- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "values", "storage"),
    [
        ("a uuid, primary key (a)", "gen_random_uuid()", "vector"),
        ('"Weird ""name" text, primary key ("Weird ""name")', "'it''s [\"x\"]%'", "halfvec"),
        ("a int, b timestamptz, c text, primary key (b, a, c)", "1, now(), '\"\\'", "vector"),
        ("a bytea, b date, primary key (a, b)", "'\\x00ff', '2024-02-29'", "halfvec"),
        ("a timestamptz, b date, primary key (a, b)", "'infinity', '-infinity'", "vector"),
        ("a numeric(20, 5), primary key (a)", "1.50", "vector"),
        ("a char(20), primary key (a)", "'x'", "vector"),
        ("a varchar(10) collate \"C\", b bool, primary key (a, b)", "'ä', true", "vector"),
        ("a text, primary key (a)", "repeat('k', 2000)", "vector"),
        ("a interval, b timetz, primary key (a, b)", "'-1 mon 2 days', '04:05+02'", "vector"),
        ("a tstzrange, b int4multirange, primary key (a, b)",
         "'[2024-02-03 04:05+02,)', '{[1,3),[5,7)}'", "halfvec"),
    ],
)  # fmt: skip
def test_keys_of_every_kind(engine, plain, encoder, columns, values, storage):
    """Under sessions of different formats: no key depends on them."""
    plain.execute(f"CREATE TABLE odd ({columns}, body text, embedding {storage}(32))")
    rows = bind(engine, "odd")
    plain.execute("SET DateStyle = 'German'; SET TimeZone = 'Asia/Tokyo'; SET bytea_output=escape")
    plain.execute(f"INSERT INTO odd SELECT {values}, 'some text'")
    read = take(engine, rows)
    assert put(engine, rows, read, encoder).rows == (read[0].label,)
    # By its name, as a row that failed is found again.
    plain.execute("UPDATE odd SET body = 'other'")
    ended(plain)
    expire(engine, rows)
    assert take_alone(engine, rows) == read[0].label
    assert plain.execute("SELECT embedding IS NOT NULL FROM odd").fetchall() == [(True,)]


def test_a_domain_over_a_domain_over_a_type(engine, plain, encoder):
    plain.execute("CREATE DOMAIN inner_day AS date CHECK (value > '1900-01-01')")
    plain.execute("CREATE DOMAIN day AS inner_day")
    plain.execute("CREATE TABLE odd (d day PRIMARY KEY, body text, embedding vector(32))")
    rows = bind(engine, "odd")
    plain.execute("SET DateStyle = 'German'")
    plain.execute("INSERT INTO odd VALUES ('31.12.2024', 'x')")
    read = take(engine, rows)
    assert read[0].label == '["2024-12-31"]'
    assert put(engine, rows, read, encoder).rows == ('["2024-12-31"]',)


def test_columns_of_any_name(engine, plain, encoder):
    """Names of ours and of the statements' own do not clash with the table's."""
    plain.execute(
        'CREATE TABLE odd (key int, "%(n)s" text, failed text, "sbert_n;--" text, error text, '
        'embedding vector(32), PRIMARY KEY ("%(n)s", key))'
    )
    rows = bind(engine, "odd", Source.of(["failed", "sbert_n;--", "error"]))
    plain.execute("INSERT INTO odd VALUES (1, 'a', 'one', ':two', '%s three')")
    read = take(engine, rows)
    assert [row.text for row in read] == ["one\n\n:two\n\n%s three"]
    assert len(put(engine, rows, read, encoder).rows) == 1
    assert take_alone(engine, rows) is None


@pytest.mark.parametrize(
    ("table", "key", "text", "vector"),
    [
        ("note", "sbert_n", "sbert_of", "sbert_vector"),
        ("note", "sbert_k0", "sbert_text", "sbert_label"),
        ("sbert_locked", "id", "body", "embedding"),
        ("sbert_failure", "id", "body", "embedding"),
    ],
)
def test_names_after_the_library(engine, plain, encoder, table, key, text, vector):
    plain.execute(f"CREATE TABLE {table} ({key} int PRIMARY KEY, {text} text, {vector} vector(32))")
    identity = ColumnIdentity("public", table, vector)
    with engine.begin() as connection:
        spec = EncoderSpec(name="deterministic", dimensions=32)
        catalog.bind(connection, identity, spec, Source.of(text))
    plain.execute(f"INSERT INTO {table} ({key}, {text}) VALUES (1, 'a'), (2, 'b')")
    assert refresh(engine).embedded == 2


def test_a_table_that_takes_the_name_is_left_alone(engine, rows, plain, encoder):
    """What a worker knows by its name is held against the identity until it looks again."""
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    read = take(engine, rows)
    plain.execute(
        "ALTER TABLE note RENAME TO old; CREATE TABLE note (LIKE old INCLUDING ALL); "
        "INSERT INTO note (id, body) VALUES (1, 'a'), (2, 'b')"
    )
    assert put(engine, rows, read, encoder).rows == ()
    plain.execute("DELETE FROM sbert.claim")
    assert take(engine, rows) == []
    assert plain.execute("SELECT count(embedding) FROM note").fetchone() == (0,)
    assert refresh(engine).embedded == 1, "the bound table, by the name that it has now"


def test_a_partitioned_table(engine, plain, encoder):
    plain.execute(
        "CREATE TABLE parted (id int, body text, embedding vector(32), primary key (id)) "
        "PARTITION BY RANGE (id)"
    )
    plain.execute("CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    plain.execute("CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (10) TO (20)")
    rows = bind(engine, "parted")
    plain.execute("INSERT INTO parted SELECT i, 'n' || i FROM generate_series(1, 19) AS i")
    read = take(engine, rows)
    plain.execute("UPDATE parted SET id = 0 WHERE id = 19")
    assert len(put(engine, rows, read, encoder).rows) == 18
    assert states(plain, "parted")[0] == "pending"


class Moody(DeterministicEncoder):
    """Raises for some texts without saying which."""

    def encode_document(self, texts):
        if any("bad" in text for text in texts):
            raise RuntimeError("something in here")
        return super().encode_document(texts)


@pytest.mark.parametrize("encoder", [Moody(), DeterministicEncoder(refuse="bad")])
def test_bad_texts_are_isolated(encoder):
    texts = [f"text {i}" for i in range(40)]
    for position in (3, 17, 39):
        texts[position] = f"bad {position}"
    vectors, faults = encode_each(encoder, texts)
    assert sorted(faults) == [3, 17, 39]
    for i, text in enumerate(texts):
        if i not in faults:
            np.testing.assert_array_equal(vectors[i], encoder.encode_document([text])[0])


def test_an_encoder_that_fails_for_everything_is_to_blame_itself():
    with pytest.raises(EncoderError, match="fails for every text: RuntimeError: something"):
        encode_each(Moody(), [f"bad {i}" for i in range(5)])
    _, faults = encode_each(Moody(), ["bad"])
    assert faults == {0: "RuntimeError: something in here"}
    _, faults = encode_each(DeterministicEncoder(refuse="bad"), ["bad 1", "bad 2"])
    assert len(faults) == 2
