"""The tables of ``soak.py``, and its writers: every way in which SQL and the ORM change rows."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import soak_encoder
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from sbert_pg import catalog, embed_on_flush, embedding_column
from sbert_pg.errors import EncoderMismatchError, EncodingError
from sbert_pg.source import digest
from sbert_pg.sqlstates import sqlstate_of
from sbert_pg.system import ColumnIdentity
from sbert_pg.types import wire

KEYS = 400
REGIONS = ("eu", "us", "xx")
WORDS = ["red", "green", "blue", "apple", "pear", "house", "tree", "river", "stone", "cloud"]
#: What a writer meets when the server is restarted or its backend killed.
LOST = (psycopg.OperationalError, psycopg.InterfaceError, sa.exc.OperationalError,
        sa.exc.InterfaceError)  # fmt: skip
#: What concurrent writers do to each other: 40 serialization and deadlocks, 23 keys, 55 locks.
CONFLICTS = ("40", "23", "55")
#: What a writer meets whose column has just been renamed, or whose partition is detached.
RENAMED = ("42703", "42P01", "23514")
INTRUSIONS = ("raw", "unseen", "old process", "old process")
ISOLATION = ("READ COMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


class Base(DeclarativeBase):
    """The soak's own."""


def _embedding() -> Any:
    return embedding_column(
        "deterministic",
        source=["title", "body"],
        separator=" ",
        dimensions=soak_encoder.DIMENSIONS,
        nullable=True,
    )


class Note(Base):
    """An ordinary table."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    title: Mapped[str | None]
    body: Mapped[str | None]
    views: Mapped[int] = mapped_column(server_default="0")
    embedding = _embedding()


class Part(Base):
    """A partitioned table with a key of two columns."""

    __tablename__ = "part"
    __table_args__ = {"postgresql_partition_by": "LIST (region)"}

    region: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    title: Mapped[str | None]
    body: Mapped[str | None]
    views: Mapped[int] = mapped_column(server_default="0")
    embedding = _embedding()


class Child(Base):
    """Rows that follow others by foreign keys; their text's column is renamed and retyped."""

    __tablename__ = "child"

    note_id: Mapped[int] = mapped_column(
        sa.ForeignKey("note.id", ondelete="CASCADE", onupdate="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    body: Mapped[str | None]
    embedding = embedding_column(
        "deterministic", source="body", dimensions=soak_encoder.DIMENSIONS, nullable=True
    )


class Quiet(Base):
    """Rows that come where no trigger sees them, one at a time."""

    __tablename__ = "quiet"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column(
        "deterministic", source="title", dimensions=soak_encoder.DIMENSIONS, nullable=True
    )


#: Triggers of the application's: one rewrites texts before, one after, one other rows.
TRIGGERS = """
CREATE FUNCTION before_part() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    NEW.title := replace(NEW.title, 'river', 'stream');
    RETURN NEW;
END $$;
CREATE TRIGGER rewrite BEFORE INSERT OR UPDATE ON part
    FOR EACH ROW EXECUTE FUNCTION before_part();
CREATE FUNCTION after_note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.body LIKE '%stone%' AND pg_trigger_depth() < 2 THEN
        UPDATE note SET body = replace(body, 'stone', 'rock') WHERE id = NEW.id;
        UPDATE note SET title = 'next to ' || NEW.body WHERE id = NEW.id + 1;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER aa_after AFTER UPDATE ON note FOR EACH ROW EXECUTE FUNCTION after_note();
CREATE TRIGGER zz_after AFTER INSERT ON note FOR EACH ROW EXECUTE FUNCTION after_note();
"""

#: What a text has that one of them rewrote.
REWRITTEN = {"before": "stream", "after": "rock", "another row": "next to"}

PARTITIONS = (
    "CREATE TABLE part_eu PARTITION OF part FOR VALUES IN ('eu')",
    "CREATE TABLE part_us PARTITION OF part FOR VALUES IN ('us')",
    "CREATE TABLE part_rest PARTITION OF part DEFAULT",
)

#: Statements on ``note``: weight, SQL, parameters by name.
NOTE: dict[str, tuple[float, str]] = {
    "upsert": (
        20,
        (
            "INSERT INTO note (id, title, body) VALUES (%(id)s, %(title)s, %(body)s) "
            "ON CONFLICT (id) DO UPDATE SET title = excluded.title"
        ),
    ),
    "update": (20, "UPDATE note SET body = %(body)s WHERE id = %(id)s"),
    "update title": (10, "UPDATE note SET title = %(title)s WHERE id = %(id)s"),
    "no-op": (4, "UPDATE note SET body = body WHERE id = %(id)s"),
    "unrelated": (6, "UPDATE note SET views = views + 1 WHERE id = %(id)s"),
    "many": (3, "UPDATE note SET body = %(body)s WHERE id %% 40 = %(some)s"),
    "to null": (3, "UPDATE note SET title = NULL, body = NULL WHERE id = %(id)s"),
    "unencodable": (1, "UPDATE note SET body = 'unencodable' WHERE id = %(id)s"),
    "delete": (6, "DELETE FROM note WHERE id = %(id)s"),
    "key": (3, "UPDATE note SET id = %(far)s WHERE id = %(id)s"),
    "key back": (3, "UPDATE note SET id = %(id)s WHERE id = %(far)s"),
    "clear vector": (2, "UPDATE note SET embedding = NULL WHERE id = %(id)s"),
    "merge": (
        4,
        (
            "MERGE INTO note USING (SELECT %(id)s::bigint AS id, %(body)s::text AS body) s "
            "ON note.id = s.id WHEN MATCHED THEN UPDATE SET body = s.body "
            "WHEN NOT MATCHED THEN INSERT (id, body) VALUES (s.id, s.body)"
        ),
    ),
    "insert select": (
        2,
        (
            "INSERT INTO note (id, title, body) SELECT 4 * %(keys)s + id, body, title FROM note "
            "WHERE id < %(keys)s AND id %% 40 = %(some)s ON CONFLICT DO NOTHING"
        ),
    ),
    "delete many": (1, "DELETE FROM note WHERE id >= 4 * %(keys)s AND id %% 3 = %(some)s %% 3"),
    "copy": (3, "COPY note (id, title, body) FROM STDIN"),
    "truncate": (0.02, "TRUNCATE note CASCADE"),
}

#: The same on ``part``.
PART: dict[str, tuple[float, str]] = {
    "upsert": (
        20,
        (
            "INSERT INTO part (region, id, title, body) "
            "VALUES (%(region)s, %(id)s, %(title)s, %(body)s) "
            "ON CONFLICT (region, id) DO UPDATE SET body = excluded.body"
        ),
    ),
    "update": (12, "UPDATE part SET body = %(body)s WHERE id = %(id)s"),
    "move": (
        6,
        "UPDATE part SET region = %(region)s WHERE id = %(id)s AND region = %(other_region)s",
    ),
    "move and update": (
        4,
        (
            "UPDATE part SET region = %(region)s, title = %(title)s "
            "WHERE id = %(id)s AND region = %(other_region)s"
        ),
    ),
    "key": (3, "UPDATE part SET id = %(far)s WHERE id = %(id)s AND region = %(region)s"),
    "key back": (3, "UPDATE part SET id = %(id)s WHERE id = %(far)s AND region = %(region)s"),
    "partition": (4, "UPDATE part_eu SET title = %(title)s WHERE id = %(id)s"),
    "delete": (5, "DELETE FROM part WHERE id = %(id)s AND region = %(region)s"),
    "copy": (3, "COPY part (region, id, title, body) FROM STDIN"),
    "truncate": (0.02, "TRUNCATE part_us"),
}


#: The same on ``child``.
CHILD: dict[str, tuple[float, str]] = {
    "upsert": (
        20,
        (
            "INSERT INTO child (note_id, number, body) SELECT id, %(some)s, %(body)s FROM note "
            "WHERE id = %(id)s ON CONFLICT (note_id, number) DO UPDATE SET body = excluded.body"
        ),
    ),
    "update": (10, "UPDATE child SET body = %(body)s WHERE note_id = %(id)s"),
    "key": (3, "UPDATE child SET number = number + 100 WHERE note_id = %(id)s"),
    "delete": (2, "DELETE FROM child WHERE note_id = %(id)s"),
}
TABLES = {"note": NOTE, "part": PART, "child": CHILD}


class Writers:
    """Threads that change rows until they are told to stop.

    Args:
        url: the database.
        stop: set when they are to stop.
        count: called with the name of what was done.
        vector: gives the vector of a text.
        wrong: called with what must not happen.
    """

    def __init__(
        self,
        url: sa.URL,
        stop: threading.Event,
        count: Callable[[str], None],
        vector: Callable[[str], np.ndarray],
        wrong: Callable[[str], None],
    ) -> None:
        self.url = url
        self.dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self.stop = stop
        self.count = count
        self.vector = vector
        self.wrong = wrong

    def all(self, seed: int, plain: int) -> list[threading.Thread]:
        """So many writers of plain SQL, and one each of Core, ORM and foreign vectors."""
        work = [(self.plain, 100 * seed + i) for i in range(plain)]
        work += [(self.with_vectors, 100 * seed + 97), (self.objects, 100 * seed + 98)]
        work += [(self.strangers, 100 * seed + 96)]
        return [threading.Thread(target=do, args=(s,), daemon=True) for do, s in work]

    # -- plain SQL ----------------------------------------------------------------------------

    def plain(self, seed: int) -> None:
        """Any SQL, as from psql or another language, through whatever happens to the server."""
        chance = random.Random(seed)
        connection: psycopg.Connection | None = None
        while not self.stop.is_set():
            try:
                if connection is None or connection.closed:
                    connection = psycopg.connect(self.dsn, autocommit=True, connect_timeout=5)
                name = self.change(connection, chance)
                self.count(f"write: {name}")
            except (psycopg.Error, psycopg.Rollback) as error:
                # A rollback that the server did not live to hear of is raised again.
                self.account(error)
                if connection is not None and (connection.closed or connection.broken):
                    connection = None
                    time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.01))

    def account(self, error: BaseException) -> None:
        """Tell lost connections and conflicts from statements that must not fail."""
        state = sqlstate_of(error) or ""
        if state == "40P01":
            self.count("deadlocks")
        if state.startswith(CONFLICTS):
            self.count("writes in conflict")
        elif state in RENAMED:
            self.count("writes to what was renamed")
        elif isinstance(error, (*LOST, psycopg.Rollback)) or state.startswith(("57", "08")):
            self.count("writes lost with their connection")
        else:
            self.wrong(f"a write failed: {threading.current_thread().name}: {state} {error}")

    def change(self, connection: psycopg.Connection, chance: random.Random) -> str:
        """One transaction of one to four statements; a tenth of them are rolled back."""
        name = ""
        with connection.transaction():
            isolation = chance.choice(ISOLATION)
            connection.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
            for _ in range(chance.choice([1, 1, 1, 2, 4])):
                name = self.statement(connection, chance)
                if chance.random() < 0.1:
                    time.sleep(chance.uniform(0, 0.05))
            if chance.random() < 0.1:
                name = "rolled back"
                raise psycopg.Rollback
        self.count(f"isolation: {isolation}")
        return name

    def statement(self, connection: psycopg.Connection, chance: random.Random) -> str:
        """One statement; returns its name."""
        table = chance.choice(["note", "note", "part", "child"])
        changes = TABLES[table]
        name = chance.choices([*changes], [weight for weight, _ in changes.values()])[0]
        statement = changes[name][1]
        threading.current_thread().name = f"{table}: {name}"
        # Some rows are changed again and again, so that they change while they are in hand.
        key = chance.randrange(KEYS if chance.random() < 0.5 else 5)
        region, other_region = chance.choice(REGIONS), chance.choice(REGIONS)
        if statement.startswith("COPY"):
            keys = sorted({key, chance.randrange(KEYS)})
            connection.execute(f"DELETE FROM {table} WHERE id = ANY(%s)", [keys])
            with connection.cursor().copy(statement) as copy:
                for one in keys:
                    row = (one, text(chance), text(chance))
                    copy.write_row(row if table == "note" else (region, *row))
        else:
            values = {
                "id": key,
                "keys": KEYS,
                "far": KEYS + chance.randrange(KEYS),
                "some": key % 40,
                "title": text(chance),
                "body": text(chance),
                "region": region,
                "other_region": other_region,
            }
            connection.execute(statement, values if "%" in statement else None)
        return f"{table}: {name}"

    # -- writers that embed -------------------------------------------------------------------

    def with_vectors(self, seed: int) -> None:
        """Text, vector and what it was made from in one statement of Core's."""
        chance = random.Random(seed)
        engine = sa.create_engine(self.url, pool_pre_ping=True)
        while not self.stop.is_set():
            mapped = chance.choice([Note, Note, Part])
            title, body = text(chance), text(chance)
            vector = self.vector(f"{title} {body}")
            try:
                with engine.begin() as connection:
                    binding = self.binding(connection, mapped.__tablename__)
                    proof = digest(
                        binding.id, f"{title} {body}", wire.to_wire(vector, "vector"), "vector"
                    )
                    connection.execute(
                        sa.update(mapped)
                        .values(title=title, body=body, embedding=vector, embedding_of=proof)
                        .where(mapped.id == chance.randrange(KEYS))
                    )
                self.count("write: text with vector")
            except sa.exc.DBAPIError as error:
                self.account(error)
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.05))
        engine.dispose()

    def binding(self, connection: sa.Connection, table: str) -> catalog.Binding:
        """The binding of a table's column."""
        identity = ColumnIdentity("public", table, "embedding")
        return catalog.require_binding(connection, identity)

    def strangers(self, seed: int) -> None:
        """Vectors of something else: refused, or where no trigger fires pending."""
        chance = random.Random(seed)
        engine = sa.create_engine(self.url, pool_pre_ping=True)
        while not self.stop.is_set():
            try:
                with engine.begin() as connection:
                    name = self.intrude(connection, chance)
                self.count(f"write: {name}")
            except EncoderMismatchError:
                self.count("write: foreign vector refused")
            except sa.exc.DBAPIError as error:
                if sqlstate_of(error) == "SB001":
                    self.count("write: foreign vector refused")
                else:
                    self.account(error)
            time.sleep(chance.uniform(0, 0.05))
        engine.dispose()

    def intrude(self, connection: sa.Connection, chance: random.Random) -> str:
        """One foreign vector; returns the name of how it came."""
        binding = self.binding(connection, chance.choice(["note", "note", "part"]))
        table = binding.clause()
        row = chance.randrange(KEYS)
        body = text(chance)
        vector = self.vector(body + " of another space")
        payload = wire.to_wire(vector, "vector")
        array = sa.cast([float(x) for x in vector], sa.ARRAY(sa.REAL))
        values: dict[str, Any] = {"embedding": sa.func.array_to_vector(array, -1, True)}
        how = chance.choice(INTRUSIONS)
        if how == "old process":
            # It knows a binding that is no more.
            values["embedding_of"] = digest(uuid.UUID(int=7), body, payload, "vector")
            values["body"], values["title"] = body, None
        if how != "raw":
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        # A row that has this very vector already, unproven, would not be changed by it.
        same = sa.cast(table.c.embedding, sa.Text) == sa.cast(values["embedding"], sa.Text)
        rows = sa.and_(table.c.id % 40 == row % 40, same.is_not(True))
        done = connection.execute(sa.update(table).values(values).where(rows))
        if how == "raw" and done.rowcount:
            self.wrong(f"a foreign vector was accepted by {binding.table} {row}")
        return f"foreign vector {how}" if done.rowcount else "foreign vector nowhere"

    def objects(self, seed: int) -> None:
        """Objects in sessions that embed in their flush."""
        chance = random.Random(seed)
        engine = sa.create_engine(self.url, pool_pre_ping=True)
        while not self.stop.is_set():
            try:
                with Session(engine) as session:
                    embed_on_flush(session)
                    name = self.change_objects(session, chance)
                    session.commit()
                self.count(f"write: {name}")
            except (StaleDataError, EncodingError):
                # A row that somebody else deleted or made, or that holds what cannot be encoded.
                self.count("writes of objects in conflict")
            except sa.exc.DBAPIError as error:
                self.account(error)
            time.sleep(chance.uniform(0, 0.03))
        engine.dispose()

    def change_objects(self, session: Session, chance: random.Random) -> str:
        """One unit of work; returns its name."""
        if chance.random() < 0.15:
            ids = chance.sample(range(KEYS), 5)
            session.execute(sa.delete(Note).where(Note.id.in_(ids)))
            rows = [{"id": i, "title": text(chance), "body": text(chance)} for i in ids]
            session.execute(sa.insert(Note), rows)
            return "ORM bulk insert"
        for _ in range(chance.choice([1, 2, 5])):
            self.change_object(session, chance)
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0, 0.05))
        return "ORM objects"

    def change_object(self, session: Session, chance: random.Random) -> None:
        """One object added, changed, renamed or deleted."""
        key = chance.randrange(KEYS)
        mapped: type[Note] | type[Part] = chance.choice([Note, Note, Part])
        identity: Any = key if mapped is Note else (chance.choice(REGIONS), key)
        found = session.get(mapped, identity)
        what = chance.choice(["title", "body", "both", "views", "key", "delete"])
        if found is None:
            made = mapped(id=key, title=text(chance), body=text(chance))
            if isinstance(made, Part):
                made.region = identity[0]
            session.add(made)
        elif what == "delete":
            session.delete(found)
        elif what == "key":
            found.id = KEYS + chance.randrange(KEYS)
        elif what == "views":
            found.views += 1
        else:
            if what != "body":
                found.title = text(chance)
            if what != "title":
                found.body = text(chance)


def text(chance: random.Random) -> str:
    """A short text, which comes again often enough."""
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 6)))
