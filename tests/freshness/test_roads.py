"""Roads by which rows come and change: each row is fresh, or says that it is not."""

from __future__ import annotations

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import catalog, create_all, embed_on_flush, embedding_column, nearest, refresh
from sbert_pg.freshness import failures, status
from sbert_pg.source import Source
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

from .conftest import DECLARED, IDENTITY, failure_rows, states, violations

FOREIGN = f"array_fill(0.5::real, ARRAY[{DECLARED.dimensions}])::vector"


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    embedding = embedding_column("deterministic", source="body", nullable=True, dimensions=32)


@pytest.mark.parametrize("name", ["article_norm", "zz_norm"])
def test_an_after_trigger_that_changes_the_text_once_more(engine, plain, encoder, name):
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    plain.execute(
        "CREATE FUNCTION norm() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.body <> trim(NEW.body) THEN "
        "UPDATE note SET body = trim(NEW.body) || ' normalised' WHERE id = NEW.id; END IF; "
        "RETURN NULL; END $$"
    )
    plain.execute(
        f"CREATE TRIGGER {name} AFTER UPDATE ON note FOR EACH ROW EXECUTE FUNCTION norm()"
    )
    with Session(engine) as session:
        embed_on_flush(session)
        session.add(Note(id=1, body="hello"))
        session.commit()
        row = session.get(Note, 1)
        row.body = "  apples and pears  "
        session.commit()
    assert violations(plain, encoder) == []
    assert states(plain) == {1: "pending"}
    refresh(engine)
    assert states(plain) == {1: "fresh"}
    assert violations(plain, encoder) == []
    plain.execute("UPDATE note SET body = '  plums  '")
    assert states(plain) == {1: "pending"}


@pytest.mark.parametrize(
    "event",
    [
        # A trigger that changes another row, that puts a deleted row back, that changes the key.
        (
            "AFTER UPDATE ON note FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION "
            "run('UPDATE note SET body = body || ''!'' WHERE id = 2')"
        ),
        (
            "AFTER UPDATE ON note FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION "
            "run('DELETE FROM note WHERE id = 1; INSERT INTO note (id, body) VALUES (1, ''back'')')"
        ),
        (
            "AFTER UPDATE ON note FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION "
            "run('UPDATE note SET id = 9 WHERE id = 1; UPDATE note SET body = ''x'' WHERE id = 9')"
        ),
    ],
)
def test_triggers_of_every_kind(engine, note, plain, encoder, event):
    plain.execute(
        "CREATE FUNCTION run() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN EXECUTE TG_ARGV[0]; RETURN NULL; END $$"
    )
    plain.execute("INSERT INTO note (id, body) VALUES (1, 'one'), (2, 'two')")
    refresh(engine)
    plain.execute(f"CREATE TRIGGER t {event}")
    plain.execute("UPDATE note SET body = 'changed' WHERE id = 1")
    assert "pending" in states(plain).values()
    assert violations(plain, encoder) == []
    for _ in range(3):
        refresh(engine)
    assert violations(plain, encoder) == []


@pytest.fixture
def parted(engine: sa.Engine, plain: psycopg.Connection, encoder: DeterministicEncoder) -> None:
    plain.execute(
        "CREATE TABLE note (id int, r int, body text, embedding vector(32), PRIMARY KEY (id, r)) "
        "PARTITION BY LIST (r)"
    )
    plain.execute("CREATE TABLE note_1 PARTITION OF note FOR VALUES IN (1)")
    with engine.begin() as connection:
        catalog.bind(connection, IDENTITY, DECLARED, Source.of("body"))


def test_a_partition_that_is_attached_detached_changed_and_attached(engine, plain, encoder, parted):
    plain.execute("CREATE TABLE note_2 (LIKE note INCLUDING DEFAULTS)")
    plain.execute(
        "INSERT INTO note_2 (id, r, body, embedding) VALUES (1, 2, 'no vector', NULL), "
        f"(2, 2, 'foreign', {FOREIGN})"
    )
    plain.execute("ALTER TABLE note ATTACH PARTITION note_2 FOR VALUES IN (2)")
    assert states(plain) == {1: "pending", 2: "pending"}
    refresh(engine)
    assert states(plain) == {1: "fresh", 2: "fresh"}
    assert violations(plain, encoder) == []
    plain.execute("ALTER TABLE note DETACH PARTITION note_2")
    plain.execute("UPDATE note_2 SET body = 'changed while it was away' WHERE id = 1")
    plain.execute("ALTER TABLE note ATTACH PARTITION note_2 FOR VALUES IN (2)")
    assert states(plain) == {1: "pending", 2: "fresh"}


def test_a_partition_made_before_the_column_was_bound(engine, plain, encoder):
    """It has no companion of its own until it is given one, and then is all backfill."""
    plain.execute(
        "CREATE TABLE note (id int, r int, body text, embedding vector(32), PRIMARY KEY (id, r)) "
        "PARTITION BY LIST (r); CREATE TABLE late (LIKE note INCLUDING ALL)"
    )
    plain.execute("INSERT INTO late VALUES (1, 5, 'text', NULL)")
    with engine.begin() as connection:
        catalog.bind(connection, IDENTITY, DECLARED, Source.of("body"))
    plain.execute("ALTER TABLE late ADD embedding_of uuid")
    plain.execute("ALTER TABLE note ATTACH PARTITION late FOR VALUES IN (5)")
    assert states(plain) == {1: "pending"}
    assert refresh(engine).embedded == 1
    assert violations(plain, encoder) == []


@pytest.mark.parametrize(
    "harm",
    [
        "SET session_replication_role = replica; {}",
        "ALTER TABLE note DISABLE TRIGGER USER; {}",
        (
            "DO $$ DECLARE name text; BEGIN FOR name IN SELECT tgname FROM pg_trigger "
            "WHERE tgrelid = 'note'::regclass AND NOT tgisinternal "
            "LOOP EXECUTE format('ALTER TABLE note ENABLE "
            "REPLICA TRIGGER %I', name); END LOOP; END $$; {}"
        ),
    ],
)
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE note SET body = 'unseen'",
        f"UPDATE note SET embedding = {FOREIGN}",
        f"UPDATE note SET body = 'unseen', embedding = {FOREIGN}",
        "UPDATE note SET embedding = NULL",
        f"INSERT INTO note (id, body, embedding) VALUES (7, 'new', {FOREIGN})",
        (
            "INSERT INTO note (id, body, embedding, embedding_of) "
            "SELECT 7, 'copied', embedding, embedding_of FROM note WHERE id = 1"
        ),
        (
            f"INSERT INTO note (id, body, embedding, embedding_of) "
            f"SELECT 7, body, {FOREIGN}, embedding_of FROM note WHERE id = 1"
        ),
        f"UPDATE note SET embedding = {FOREIGN}, embedding_of = gen_random_uuid()",
    ],
)
def test_what_no_trigger_sees(engine, note, plain, encoder, harm, statement):
    plain.execute("INSERT INTO note (id, body) VALUES (1, 'one'), (2, 'two')")
    refresh(engine)
    plain.execute(harm.replace("{}", statement))
    plain.execute("SET session_replication_role = DEFAULT")
    assert "pending" in states(plain).values()
    assert violations(plain, encoder) == []
    refresh(engine)
    assert set(states(plain).values()) == {"fresh"}
    assert violations(plain, encoder) == []


def test_a_row_that_is_copied_whole_is_fresh(engine, note, plain, encoder):
    plain.execute("INSERT INTO note (id, body) VALUES (1, 'one')")
    refresh(engine)
    plain.execute(
        "INSERT INTO note (id, body, embedding, embedding_of) "
        "SELECT 2, body, embedding, embedding_of FROM note"
    )
    assert states(plain) == {1: "fresh", 2: "fresh"}


def test_an_enum_label_that_is_renamed_while_rows_are_pending(engine, plain, encoder):
    plain.execute("CREATE TYPE k AS ENUM ('a', 'b')")
    plain.execute(
        "CREATE TABLE note (kind k, id int, body text, embedding vector(32), "
        "PRIMARY KEY (kind, id))"
    )
    plain.execute("CREATE TABLE other (id int PRIMARY KEY, body text, embedding vector(32))")
    with engine.begin() as connection:
        for table in ("note", "other"):
            identity = ColumnIdentity("public", table, "embedding")
            catalog.bind(connection, identity, DECLARED, Source.of("body"))
    plain.execute("INSERT INTO note SELECT 'a', g, 'x' || g FROM generate_series(1, 3) g")
    plain.execute("INSERT INTO note SELECT 'b', g + 3, 'x' || g FROM generate_series(1, 3) g")
    plain.execute("INSERT INTO other SELECT g, 'x' || g FROM generate_series(1, 3) g")
    # Marks of older times: a lease that has ended, and a failure, under the old label.
    found = plain.execute("SELECT id FROM sbert.binding WHERE relation = 'note'::regclass")
    [(binding_id,)] = found.fetchall()
    plain.execute(
        "INSERT INTO sbert.claim VALUES "
        "(%s, 'gone/1', ARRAY['[\"a\", \"1\"]'], now() - interval '1s')",
        [binding_id],
    )
    plain.execute(
        'INSERT INTO sbert.failure (binding_id, key, attempts) VALUES (%s, \'["a", "2"]\', 1)',
        [binding_id],
    )
    plain.execute("ALTER TYPE k RENAME VALUE 'a' TO 'alpha'")
    done = refresh(engine)
    assert (done.embedded, done.left, done.blocked) == (9, 0, {})
    assert set(states(plain).values()) == {"fresh"}
    [(key, *_)] = failure_rows(plain)
    assert key == '["a", "1"]', "what the lease named waits for its time"
    plain.execute("UPDATE sbert.failure SET next_attempt_at = now()")
    refresh(engine)
    assert failure_rows(plain) == [], "and then goes"


def test_a_table_that_takes_anothers_name(engine, note, plain, encoder):
    """CREATE TABLE (LIKE ...), fill it, and swap the names, as tools that repack tables do."""
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    refresh(engine)
    plain.execute("CREATE TABLE note_new (LIKE note INCLUDING ALL)")
    plain.execute("INSERT INTO note_new SELECT * FROM note")
    plain.execute("ALTER TABLE note RENAME TO note_old; ALTER TABLE note_new RENAME TO note")
    with engine.connect() as connection:
        problems = [problem for one in status(connection) for problem in one.problems]
    assert problems != [], "status says that the table of this name is another"


def test_a_catalog_that_was_dropped_and_a_table_that_was_copied_leave_nothing_behind(
    engine, note, plain, encoder
):
    """An old queue, of a binding that is no more, would hold every row of the table."""
    plain.execute("INSERT INTO note (body) VALUES ('one')")
    refresh(engine)
    plain.execute("CREATE TABLE other (LIKE note INCLUDING ALL)")
    plain.execute("DROP SCHEMA sbert CASCADE")
    with engine.begin() as connection:
        catalog.upgrade(connection)
        for table in ("note", "other"):
            identity = ColumnIdentity("public", table, "embedding")
            catalog.bind(connection, identity, DECLARED, Source.of("body"))
    left = plain.execute(
        "SELECT indrelid::regclass::text, count(*) FROM pg_index WHERE indpred IS NOT NULL "
        "GROUP BY 1 ORDER BY 1"
    )
    assert left.fetchall() == [("note", 2), ("other", 2)]
    assert states(plain) == {1: "pending"}
    refresh(engine)
    assert violations(plain, encoder) == []


@pytest.mark.parametrize(
    "setting",
    [
        "standard_conforming_strings=off",
        "quote_all_identifiers=on",
        "DateStyle='SQL, DMY'",
        "IntervalStyle=iso_8601",
        "bytea_output=escape",
        "extra_float_digits=-15",
        "plan_cache_mode=force_generic_plan",
        "default_transaction_isolation=serializable",
        "search_path=pg_catalog,public",
    ],
)
def test_settings_of_the_database_do_not_matter(engine, plain, encoder, setting):
    """What an application sets for itself, as older ones do, holds for workers and readers too."""
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    plain.execute(f'ALTER DATABASE "{engine.url.database}" SET {setting}')
    engine.dispose()
    plain.execute("INSERT INTO note (id, body) VALUES (1, 'a \\ back''slash')")
    assert refresh(engine).embedded == 1
    with Session(engine) as session:
        embed_on_flush(session)
        session.add(Note(id=2, body="another \\ one"))
        session.commit()
        nearest_ids = session.scalars(nearest(Note.embedding, "a \\ back'slash", limit=2)).all()
        assert [note.id for note in nearest_ids] == [1, 2]
        [one] = status(session.connection())
        assert (one.problems, one.pending, one.failed) == ((), 0, 0)
        binding = catalog.require_binding(session.connection(), IDENTITY)
        assert failures(session.connection(), binding) == []
    assert states(plain) == {1: "fresh", 2: "fresh"}


def test_logical_replication_would_bring_rows_that_say_themselves(engine, note, plain, encoder):
    """What its apply process does: rows written under the replica role, whole or in part."""
    plain.execute("INSERT INTO note (id, body) VALUES (1, 'one')")
    refresh(engine)
    plain.execute("CREATE TABLE published AS SELECT * FROM note")
    plain.execute("UPDATE published SET body = 'changed at the publisher'")
    plain.execute("SET session_replication_role = replica")
    plain.execute("DELETE FROM note; INSERT INTO note OVERRIDING SYSTEM VALUE TABLE published")
    plain.execute("SET session_replication_role = DEFAULT")
    assert states(plain) == {1: "pending"}
