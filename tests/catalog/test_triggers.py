"""Noticing: who is marked pending, by whatever road a row is written, and who is not."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog


def test_a_text_without_vector_is_pending_and_no_text_is_not(note: Any) -> None:
    note.run("INSERT INTO note (title) VALUES ('a'), (NULL), ('')")
    assert note.pending() == ["1", "3"]


def test_a_vector_written_with_its_text_is_not_pending(note: Any) -> None:
    note.fill("a")
    assert note.pending() == []


def test_a_vector_without_text_is_pending(note: Any) -> None:
    note.attest()
    note.run("INSERT INTO note (e) VALUES ('[1,0,0]')")
    assert note.pending() == ["1"]


@pytest.mark.parametrize("column", ["title", "body"])
def test_each_source_column_is_noticed(note: Any, column: str) -> None:
    note.fill("a", "b")
    note.run(f"UPDATE note SET {column} = 'new' WHERE id = 2")
    assert note.pending() == ["2"]


def test_updates_that_change_nothing_are_not_noticed(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET title = title, body = body, views = views + 1, e = e")
    note.run("UPDATE note SET title = 'a'")
    assert note.pending() == []


def test_text_and_vector_together_clear_the_mark(note: Any) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    assert note.pending() == ["1"]
    note.attest()
    note.run("UPDATE note SET title = 'b', e = '[1,0,0]'")
    assert note.pending() == []


def test_the_text_is_set_to_null(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET title = NULL")
    assert note.pending() == ["1"], "the old vector is still there"
    note.run("UPDATE note SET e = NULL")
    assert note.pending() == [], "no text, no vector"


def test_a_vector_set_to_null_is_pending(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET e = NULL")
    assert note.pending() == ["1"]


def test_text_changes_back_while_pending(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET title = 'b'")
    note.run("UPDATE note SET title = 'a'")
    assert note.pending() == ["1"], "a mark is never taken back on a guess"


def test_a_vector_alone_may_be_made_from_an_older_text(note: Any) -> None:
    note.fill("a")
    note.attest()
    note.run("UPDATE note SET e = '[0,1,0]'")
    assert note.pending() == ["1"]


def test_a_vector_alone_from_a_writer_who_holds_the_row(note: Any) -> None:
    note.fill("a")
    note.attest(verified=True)
    note.run("UPDATE note SET e = '[0,1,0]'")
    assert note.pending() == []
    note.run("UPDATE note SET title = 'b'")
    assert note.pending() == ["1"], "but a text alone is noticed all the same"


def test_an_old_vector_that_rides_along_does_not_count(note: Any) -> None:
    note.fill("a")
    note.attest()
    note.run("UPDATE note SET title = 'b', e = '[1,0,0]'")
    assert note.pending() == ["1"], "as frameworks do that write every column back"


def test_a_change_makes_another_mark_and_frees_it(note: Any) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    first = note.run("SELECT version, marked_at FROM sbert.pending").one()
    note.run(
        "UPDATE sbert.pending SET lease_until = now(), claimed_by = 'w', attempts = 5, "
        "failed = true, skipped = true, next_attempt_at = now(), error = 'e'"
    )
    note.connection.commit()
    note.run("UPDATE note SET title = 'b'")
    mark = note.run("SELECT * FROM sbert.pending").one()
    assert mark.version > first.version
    assert mark.marked_at == first.marked_at
    assert (mark.lease_until, mark.claimed_by, mark.attempts, mark.error) == (None, None, 0, None)
    assert (mark.failed, mark.skipped, mark.next_attempt_at) == (False, False, None)


def test_a_mark_that_comes_back_is_another(note: Any) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    first = note.run("SELECT version FROM sbert.pending").scalar_one()
    note.clear()
    note.run("UPDATE note SET title = 'b'")
    assert note.run("SELECT version FROM sbert.pending").scalar_one() != first


def test_insert_select_and_returning_and_cte(note: Any) -> None:
    note.run("INSERT INTO note (title) SELECT 'text ' || i FROM generate_series(1, 500) AS i")
    assert len(note.pending()) == 500
    note.run("WITH x AS (INSERT INTO note (title) VALUES ('z') RETURNING id) SELECT * FROM x")
    note.run(
        "WITH x AS (UPDATE note SET e = NULL, title = 'y' RETURNING id) SELECT count(*) FROM x"
    )
    assert len(note.pending()) == 501


@pytest.mark.slow
def test_a_million_rows_in_one_statement(note: Any) -> None:
    note.run("INSERT INTO note (title) SELECT 'text ' || i FROM generate_series(1, 1000000) AS i")
    counts = "SELECT count(*) AS marks, count(DISTINCT key) AS keys FROM sbert.pending"
    assert tuple(note.run(counts).one()) == (1_000_000, 1_000_000)
    note.run("UPDATE note SET body = 'b'")
    assert note.run("SELECT count(*) FROM sbert.pending").scalar_one() == 1_000_000
    note.run("DELETE FROM note WHERE id > 10")
    assert len(note.pending()) == 10


def test_copy(note: Any) -> None:
    raw = note.connection.connection.driver_connection
    with raw.cursor() as cursor, cursor.copy("COPY note (title) FROM STDIN") as copy:
        for number in range(300):
            copy.write_row([f"text {number}"])
    assert len(note.pending()) == 300


def test_on_conflict(note: Any) -> None:
    note.fill("a")
    statement = (
        "INSERT INTO note (id, title) VALUES (1, :t), (100, 'c') "
        "ON CONFLICT (id) DO UPDATE SET title = excluded.title"
    )
    note.run(statement, t="a")
    assert note.pending() == ["100"], "the conflicting row has its old text"
    note.run(statement, t="b")
    assert note.pending() == ["1", "100"]
    note.clear()
    note.run("INSERT INTO note (id, title) VALUES (1, 'z') ON CONFLICT DO NOTHING")
    assert note.pending() == []


def test_merge(note: Any) -> None:
    note.fill("a", "b", "c")
    note.run(
        "MERGE INTO note USING (VALUES (1, 'a'), (2, 'new'), (3, NULL), (9, 'nine')) AS s (id, t) "
        "ON note.id = s.id "
        "WHEN MATCHED AND s.t IS NULL THEN DELETE "
        "WHEN MATCHED THEN UPDATE SET title = s.t "
        "WHEN NOT MATCHED THEN INSERT (id, title) VALUES (s.id, s.t)"
    )
    assert note.pending() == ["2", "9"]


def test_deleted_and_truncated_rows_are_not_pending(note: Any) -> None:
    note.run("INSERT INTO note (title) VALUES ('a'), ('b'), ('c')")
    note.run("DELETE FROM note WHERE id = 2")
    assert note.pending() == ["1", "3"]
    note.run("TRUNCATE note")
    assert note.pending() == []


def test_deletes_by_foreign_key(make: Any) -> None:
    note = make(
        "note (id int PRIMARY KEY, author int, title text, body text, e vector(3))",
        ("title",),
        "CREATE TABLE author (id int PRIMARY KEY)",
        "ALTER TABLE note ADD FOREIGN KEY (author) REFERENCES author ON DELETE CASCADE",
    )
    note.run("INSERT INTO author VALUES (1), (2)")
    note.run("INSERT INTO note (id, author, title) VALUES (1, 1, 'a'), (2, 2, 'b')")
    note.run("DELETE FROM author WHERE id = 1")
    assert note.pending() == ["2"]


def test_a_new_key_takes_its_mark_along(note: Any) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    note.fill("b")
    note.run("UPDATE note SET id = id + 10")
    assert note.pending() == ["11"]
    note.run("UPDATE note SET id = id + 10, title = 'new'")
    assert note.pending() == ["21", "22"]


def test_keys_that_swap_places(make: Any) -> None:
    note = make(
        "note (id int, title text, e vector(3), CONSTRAINT note_pkey PRIMARY KEY (id) DEFERRABLE)",
        ("title",),
        # A key that is only checked at the end cannot be an arbiter; the unique one names the rows.
        "ALTER TABLE note ADD COLUMN code int NOT NULL UNIQUE",
    )
    assert note.binding.key_columns == ("code",)
    note.run("INSERT INTO note VALUES (1, 'a', NULL, 7)")
    assert note.pending() == ["7"]


def test_a_trigger_of_the_application_that_rewrites_the_text(make: Any) -> None:
    note = make(
        "note (id bigserial PRIMARY KEY, title text, views int DEFAULT 0, e vector(3))",
        ("title",),
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN NEW.title := ''viewed '' || NEW.views; RETURN NEW; END'",
        "CREATE TRIGGER zz BEFORE UPDATE ON note FOR EACH ROW EXECUTE FUNCTION touch()",
    )
    note.fill("a")
    note.run("UPDATE note SET views = 5")
    assert note.pending() == ["1"]


def test_a_trigger_of_the_application_that_clears_the_vector(make: Any) -> None:
    note = make(
        "note (id bigserial PRIMARY KEY, title text, e vector(3))",
        ("title",),
        "CREATE FUNCTION clear() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN NEW.e := NULL; RETURN NEW; END'",
        "CREATE TRIGGER zz BEFORE UPDATE OF title ON note FOR EACH ROW EXECUTE FUNCTION clear()",
    )
    note.fill("a")
    note.run("UPDATE note SET title = 'b'")
    assert note.pending() == ["1"]


def test_a_change_that_the_collation_calls_equal(make: Any, connection: sa.Connection) -> None:
    try:
        with connection.begin_nested():
            connection.execute(
                sa.text(
                    "CREATE COLLATION ignorant (provider = icu, locale = 'und-u-ks-level2', "
                    "deterministic = false)"
                )
            )
    except sa.exc.NotSupportedError:
        pytest.skip("the server was built without ICU; see the next test")
    note = make(
        "note (id bigserial PRIMARY KEY, title text COLLATE ignorant, e vector(3))", ("title",)
    )
    note.fill("Polish")
    assert note.run("SELECT 'polish' = title FROM note").scalar_one()
    note.run("UPDATE note SET title = 'polish'")
    assert note.pending() == ["1"]


def test_texts_are_compared_byte_by_byte(note: Any) -> None:
    """The same, for servers without a collation that ignores case."""
    definition = note.run(
        "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = :name",
        name=f"sbert_{note.binding.id}_update",
    ).scalar_one()
    for column in ("title", "body"):
        assert (
            f'(old.{column} COLLATE "C") IS DISTINCT FROM (new.{column} COLLATE "C")' in definition
        )


def test_long_texts_and_long_vectors_are_compared_in_full(make: Any) -> None:
    note = make("note (id bigserial PRIMARY KEY, title text, e vector(3))", ("title",))
    note.run("ALTER TABLE note ALTER COLUMN title SET STORAGE EXTERNAL")
    long = "x" * 20_000
    note.fill(long + "a")
    note.run("UPDATE note SET title = title")
    note.run("UPDATE note SET title = :t", t=long + "a")
    assert note.pending() == []
    note.run("UPDATE note SET title = :t", t=long + "b")
    assert note.pending() == ["1"]


def test_a_generated_column_as_source(make: Any) -> None:
    note = make(
        "note (id bigserial PRIMARY KEY, first text, last text, title text "
        "GENERATED ALWAYS AS (coalesce(first, '') || ' ' || coalesce(last, '')) STORED, "
        "e vector(3))",
        ("title",),
    )
    note.run("INSERT INTO note (first, last) VALUES ('Ada', 'Lovelace')")
    assert note.pending() == ["1"]
    note.clear()
    note.run("UPDATE note SET last = 'Byron'")
    assert note.pending() == ["1"]


@pytest.mark.parametrize("type_", ["varchar(20)", "char(5)", "citextish", "name"])
def test_text_types(make: Any, type_: str, connection: sa.Connection) -> None:
    connection.execute(sa.text("CREATE DOMAIN citextish AS text CHECK (value <> 'no')"))
    note = make(f"note (id bigserial PRIMARY KEY, title {type_}, e vector(3))", ("title",))
    note.fill("a")
    note.run("UPDATE note SET title = 'a'")
    assert note.pending() == []
    note.run("UPDATE note SET title = 'b'")
    assert note.pending() == ["1"]


def test_names_that_need_quotes(make: Any, connection: sa.Connection) -> None:
    connection.execute(sa.text('CREATE SCHEMA "My ""Shop"""'))
    table = make(
        '"My ""Shop"""."Ü ""b" ("I d" int PRIMARY KEY, "Ti\'tle" text, "ve%ctor" vector(3))',
        ("Ti'tle",),
        schema='My "Shop"',
        column="ve%ctor",
    )
    row = sa.text(f'INSERT INTO {table.name} ("I d", "Ti\'tle") VALUES (1, \'a\')')
    table.connection.execute(row)
    assert table.pending() == ["1"]
    table.connection.execute(sa.text(f'UPDATE {table.name} SET "I d" = 5'))
    assert table.pending() == ["5"]
    table.connection.execute(sa.text(f"DELETE FROM {table.name}"))
    assert table.pending() == []


def test_two_columns_of_one_table(make: Any) -> None:
    note = make()
    note.run("ALTER TABLE note ADD COLUMN e2 vector(3)")
    second = catalog.bind(
        note.connection,
        note.binding.identity._replace(column="e2"),
        note.binding.declared,
        note.binding.source,
    )
    note.run("INSERT INTO note (title) VALUES ('a')")
    both = note.run("SELECT column_id FROM sbert.pending ORDER BY 1").scalars().all()
    assert both == [note.binding.id, second.id]


def test_notifications_name_the_column_once_per_transaction(note: Any, engine: sa.Engine) -> None:
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN sbert_pending")
        for _ in range(3):
            note.run("INSERT INTO note (title) VALUES ('a'), ('b')")
        note.run("UPDATE note SET title = 'c'")
        note.connection.commit()
        heard = [n.payload for n in listener.notifies(timeout=1, stop_after=2)]
        assert heard == [str(note.binding.id)]
        note.run("SET LOCAL sbert.notify = 'off'")
        note.run("UPDATE note SET title = 'd'")
        note.connection.commit()
        note.run("UPDATE note SET views = 3")
        note.connection.commit()
        assert list(listener.notifies(timeout=0.3)) == []


def test_marks_are_part_of_the_transaction(note: Any) -> None:
    with note.connection.begin_nested() as savepoint:
        note.run("INSERT INTO note (title) VALUES ('a')")
        savepoint.rollback()
    assert note.pending() == []
