"""Roads to a row: whoever writes it, and however, the row says whether its vector is its text's."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog


def test_a_text_without_vector_is_pending_and_no_text_is_not(note: Any) -> None:
    note.run("INSERT INTO note (title) VALUES ('a'), (NULL), ('')")
    assert note.pending() == ["1", "3"]


def test_a_vector_written_with_its_proof_is_not_pending(note: Any) -> None:
    note.fill("a")
    assert note.pending() == []


@pytest.mark.parametrize("column", ["title", "body"])
def test_each_source_column_counts(note: Any, column: str) -> None:
    note.fill("a", "b")
    note.run(f"UPDATE note SET {column} = 'new' WHERE id = 2")
    assert note.pending() == ["2"]


def test_updates_that_change_nothing(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET title = title, body = body, views = views + 1, e = e")
    note.run("UPDATE note SET title = 'a'")
    assert note.pending() == []


def test_the_text_is_set_to_null(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET title = NULL")
    assert note.pending() == ["1"], "the old vector is still there"
    note.run("UPDATE note SET e = NULL")
    assert note.pending() == [], "no text, no vector"


def test_a_vector_set_to_null(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET e = NULL")
    assert note.pending() == ["1"]


def test_a_text_that_changes_back_is_fresh_again(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET title = 'b'")
    assert note.pending() == ["1"]
    note.run("UPDATE note SET title = 'a'")
    assert note.pending() == []


def test_an_old_vector_that_rides_along(note: Any) -> None:
    """As frameworks do that write every column back."""
    note.fill("a")
    note.run("UPDATE note SET title = 'b', e = '[1,0,0]', e_of = e_of")
    assert note.pending() == ["1"]


def test_insert_select_and_returning_and_cte(note: Any) -> None:
    note.run("INSERT INTO note (title) SELECT 'text ' || i FROM generate_series(1, 500) AS i")
    assert len(note.pending()) == 500
    note.run("WITH x AS (INSERT INTO note (title) VALUES ('z') RETURNING id) SELECT * FROM x")
    note.run("WITH x AS (UPDATE note SET e = NULL, title = 'y' RETURNING id) SELECT 1 FROM x")
    assert len(note.pending()) == 501


@pytest.mark.slow
def test_a_million_rows_in_one_statement(note: Any) -> None:
    note.run("INSERT INTO note (title) SELECT 'text ' || i FROM generate_series(1, 1000000) AS i")
    t = note.binding.clause()
    count = sa.select(sa.func.count()).select_from(t).where(note.binding.is_stale(t))
    assert note.connection.scalar(count) == 1_000_000
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


def test_changes_by_foreign_key(make: Any) -> None:
    note = make(
        "note (id int PRIMARY KEY, title text, e vector(3))",
        ("title",),
        "CREATE TABLE name (title text PRIMARY KEY)",
        "ALTER TABLE note ADD FOREIGN KEY (title) REFERENCES name ON UPDATE CASCADE "
        "ON DELETE SET NULL",
    )
    note.run("INSERT INTO name VALUES ('a'), ('b'), ('c')")
    note.run(
        "INSERT INTO note VALUES (1, 'a', '[1,0,0]', :a), (2, 'b', '[1,0,0]', :b), "
        "(3, 'c', '[1,0,0]', :c)", **{text: note.digest(text) for text in "abc"}
    )  # fmt: skip
    assert note.pending() == []
    note.run("UPDATE name SET title = 'other' WHERE title = 'a'")
    note.run("DELETE FROM name WHERE title = 'b'")
    assert note.pending() == ["1", "2"]


def test_keys_may_change_and_swap(note: Any) -> None:
    note.fill("a", "b")
    note.run("UPDATE note SET title = 'new' WHERE id = 2")
    note.run("UPDATE note SET id = id + 10")
    assert note.pending() == ["12"]
    note.run("ALTER TABLE note DROP CONSTRAINT note_pkey, ADD PRIMARY KEY (id) DEFERRABLE")
    note.run("UPDATE note SET id = 23 - id")
    assert note.pending() == ["11"]


def trigger(note: Any, when: str, body: str, name: str = "zz") -> None:
    note.run(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {body} END'")
    note.run(f"CREATE TRIGGER {name} {when} ON note FOR EACH ROW EXECUTE FUNCTION {name}()")


@pytest.mark.parametrize("name", ["aaa", "zzz"])
@pytest.mark.parametrize(
    ("when", "body", "statement", "pending"),
    [
        (
            "BEFORE UPDATE",
            "NEW.title := ''viewed '' || NEW.views; RETURN NEW;",
            "UPDATE note SET views = 5 WHERE id = 1",
            ["1"],
        ),
        (
            "BEFORE UPDATE OF title",
            "NEW.e := NULL; RETURN NEW;",
            "UPDATE note SET title = 'b' WHERE id = 1",
            ["1"],
        ),
        (
            "AFTER UPDATE",
            "UPDATE note SET title = ''!'' WHERE id = 1 AND title LIKE '' %''; RETURN NULL;",
            "UPDATE note SET title = ' plums ', e = '[1,0,0]', e_of = :proof WHERE id = 1",
            ["1"],
        ),
        (
            "AFTER UPDATE",
            "IF NEW.id = 1 THEN UPDATE note SET title = ''x'' WHERE id = 2; END IF; RETURN NULL;",
            "UPDATE note SET title = ' plums ', e = '[1,0,0]', e_of = :proof WHERE id = 1",
            ["2"],
        ),
        (
            "AFTER DELETE",
            "INSERT INTO note (id, title, e, e_of) SELECT 1, ''x'', OLD.e, OLD.e_of; RETURN NULL;",
            "DELETE FROM note WHERE id = 1",
            ["1"],
        ),
        (
            "AFTER UPDATE OF title",
            "UPDATE note SET id = id + 100 WHERE id = NEW.id; RETURN NULL;",
            "UPDATE note SET title = 'new' WHERE id = 1",
            ["101"],
        ),
    ],
    ids=["rewrite", "clear", "normalise", "another row", "put back", "key"],
)
def test_triggers_of_the_application(
    note: Any, name: str, when: str, body: str, statement: str, pending: list[str]
) -> None:
    note.fill("a", "b")
    trigger(note, when, body, name)
    parameters = {"proof": note.digest(" plums ")} if ":proof" in statement else {}
    note.run(statement, **parameters)
    assert note.pending() == pending


@pytest.mark.parametrize(
    "road",
    [
        "CREATE VIEW seen AS SELECT id, title FROM note; {}",
        (
            "CREATE VIEW seen AS SELECT id, title FROM note; "
            "CREATE FUNCTION instead() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "UPDATE note SET title = NEW.title WHERE id = NEW.id; RETURN NEW; END $$; "
            "CREATE TRIGGER t INSTEAD OF UPDATE ON seen FOR EACH ROW EXECUTE FUNCTION instead(); {}"
        ),
        (
            "CREATE TABLE seen (id int, title text); INSERT INTO seen VALUES (1, 'a'); "
            "CREATE RULE r AS ON UPDATE TO seen DO ALSO "
            "UPDATE note SET title = NEW.title WHERE id = NEW.id; {}"
        ),
        (
            "CREATE TABLE seen (id int, title text); INSERT INTO seen VALUES (1, 'a'); "
            "CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "UPDATE note SET title = NEW.title WHERE id = NEW.id; RETURN NULL; END $$; "
            "CREATE CONSTRAINT TRIGGER t AFTER UPDATE ON seen DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION later(); {}; SET CONSTRAINTS ALL IMMEDIATE"
        ),
        (
            "CREATE TABLE seen (id int, title text); INSERT INTO seen VALUES (1, 'a'); "
            "CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "MERGE INTO note USING changed ON note.id = changed.id "
            "WHEN MATCHED THEN UPDATE SET title = changed.title; RETURN NULL; END $$; "
            "CREATE TRIGGER t AFTER UPDATE ON seen REFERENCING NEW TABLE AS changed "
            "FOR EACH STATEMENT EXECUTE FUNCTION later(); {}"
        ),
        (
            "CREATE FUNCTION seen() RETURNS void LANGUAGE plpgsql AS $$ BEGIN "
            "BEGIN UPDATE note SET title = 'lost'; RAISE 'back'; EXCEPTION WHEN others THEN "
            "UPDATE note SET title = 'new' WHERE id = 1; END; END $$; SELECT seen()"
        ),
        (
            "CREATE TABLE copy (LIKE note INCLUDING ALL); INSERT INTO copy TABLE note; "
            "UPDATE copy SET title = 'new' WHERE id = 1; TRUNCATE note; INSERT INTO note TABLE copy"
        ),
    ],
    ids=["view", "instead", "rule", "deferred", "transition", "savepoint", "there and back"],
)
def test_texts_that_come_by_a_detour(note: Any, road: str) -> None:
    note.fill("a", "b")
    change = "UPDATE seen SET title = 'new' WHERE id = 1"
    note.connection.exec_driver_sql(road.replace("{}", change))
    assert note.pending() == ["1"]
    note.run("UPDATE note SET title = 'a' WHERE id = 1")
    assert note.pending() == []


def test_copy_freeze(make: Any) -> None:
    note = make()
    note.run("TRUNCATE note")
    raw = note.connection.connection.driver_connection
    with raw.cursor() as cursor, cursor.copy("COPY note (title) FROM STDIN (FREEZE)") as copy:
        copy.write_row(["frozen"])
    assert len(note.pending()) == 1


def test_what_no_trigger_sees(note: Any) -> None:
    note.fill("a", "b", "c", "d")
    note.run("SET LOCAL session_replication_role = replica")
    note.run("UPDATE note SET title = 'new' WHERE id = 1")
    note.run("UPDATE note SET e = '[0,1,0]' WHERE id = 2")
    note.run("INSERT INTO note (title, e) VALUES ('e', '[0,1,0]')")
    assert note.pending() == ["1", "2", "5"]
    note.run("SET LOCAL session_replication_role = origin")
    note.run("ALTER TABLE note DISABLE TRIGGER ALL")
    note.run("UPDATE note SET title = 'new' WHERE id = 3")
    assert note.pending() == ["1", "2", "3", "5"]


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
        pytest.skip("the server was built without ICU")
    note = make(
        "note (id bigserial PRIMARY KEY, title text COLLATE ignorant, e vector(3))", ("title",)
    )
    note.fill("Polish")
    assert note.run("SELECT 'polish' = title FROM note").scalar_one()
    note.run("UPDATE note SET title = 'polish'")
    assert note.pending() == ["1"]


def test_long_texts_are_compared_in_full(make: Any) -> None:
    note = make("note (id bigserial PRIMARY KEY, title text, e vector(3))", ("title",))
    note.run("ALTER TABLE note ALTER COLUMN title SET STORAGE EXTERNAL")
    long = "x" * 20_000
    note.fill(long + "a")
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
    note.run("UPDATE note SET e = '[1,0,0]', e_of = :d", d=note.digest("Ada Lovelace"))
    assert note.pending() == []
    note.run("UPDATE note SET last = 'Byron'")
    assert note.pending() == ["1"]


@pytest.mark.parametrize("type_", ["varchar(20)", "char(5)", "citextish", "shorter", "name"])
def test_text_types(make: Any, type_: str, connection: sa.Connection) -> None:
    connection.execute(sa.text("CREATE DOMAIN citextish AS text CHECK (value <> 'no')"))
    connection.execute(
        sa.text("CREATE DOMAIN middle AS varchar(20); CREATE DOMAIN shorter AS middle")
    )
    note = make(f"note (id bigserial PRIMARY KEY, title {type_}, e vector(3))", ("title",))
    note.fill("a")
    note.run("UPDATE note SET title = 'a'")
    assert note.pending() == []
    note.run("UPDATE note SET title = 'b'")
    assert note.pending() == ["1"]


def test_two_columns_of_one_table(note: Any) -> None:
    note.run("ALTER TABLE note ADD COLUMN e2 vector(3)")
    binding = note.binding
    second = catalog.bind(
        note.connection,
        binding.identity._replace(column="e2"),
        binding.declared,
        binding.source,
    )
    note.fill("a")
    assert note.pending() == []
    assert type(note)(note.connection, "note", second.id).pending() == ["1"]


def test_notifications_name_the_column_once_per_transaction(note: Any, engine: sa.Engine) -> None:
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN sbert_pending")
        for _ in range(3):
            note.run("INSERT INTO note (title) VALUES ('a'), ('b')")
        note.run("UPDATE note SET title = 'c'")
        note.connection.commit()
        heard = [n.payload for n in listener.notifies(timeout=60, stop_after=1)]
        assert heard == [str(note.id)]
        # Those of one transaction come together.
        assert list(listener.notifies(timeout=0.3)) == []
        note.run("SET LOCAL sbert.notify = 'off'")
        note.run("UPDATE note SET title = 'd'")
        note.connection.commit()
        assert list(listener.notifies(timeout=0.3)) == []


def test_binding_wakes_workers(make: Any, engine: sa.Engine) -> None:
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN sbert_pending")
        note = make()
        assert [n.payload for n in listener.notifies(timeout=60, stop_after=1)] == [str(note.id)]
