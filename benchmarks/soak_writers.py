"""The tables of ``soak.py``, and its writers: every way in which SQL and the ORM change rows."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import soak_encoder
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from sbert_pg import catalog, embed_on_flush, embedding_column
from sbert_pg.errors import EncodingError
from sbert_pg.types.guard import ColumnIdentity

KEYS = 400
REGIONS = ("eu", "us", "xx")
WORDS = ["red", "green", "blue", "apple", "pear", "house", "tree", "river", "stone", "cloud"]
#: What a writer meets when the server is restarted, its backend killed, or a row refused.
LOST = (psycopg.OperationalError, psycopg.InterfaceError, sa.exc.DBAPIError)


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
    "truncate": (0.02, "TRUNCATE note"),
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


class Writers:
    """Threads that change rows until they are told to stop.

    Args:
        url: the database.
        stop: set when they are to stop.
        count: called with the name of what was done.
        vector: gives the vector of a row's title and body.
    """

    def __init__(
        self,
        url: sa.URL,
        stop: threading.Event,
        count: Callable[[str], None],
        vector: Callable[[str | None, str | None], np.ndarray],
    ) -> None:
        self.url = url
        self.dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self.stop = stop
        self.count = count
        self.vector = vector

    def all(self, seed: int, plain: int) -> list[threading.Thread]:
        """So many writers of plain SQL, and one each of Core and ORM."""
        work = [(self.plain, 100 * seed + i) for i in range(plain)]
        work += [(self.with_vectors, 100 * seed + 97), (self.objects, 100 * seed + 98)]
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
            except (*LOST, psycopg.errors.UniqueViolation, psycopg.Rollback) as error:
                # A rollback that the server did not live to hear of is raised again.
                self.count("writes refused or lost")
                if isinstance(error, psycopg.errors.DeadlockDetected):
                    self.count("deadlocks")
                if connection is not None and (connection.closed or connection.broken):
                    connection = None
                    time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.01))

    def change(self, connection: psycopg.Connection, chance: random.Random) -> str:
        """One transaction of one to four statements; a tenth of them are rolled back."""
        name = ""
        with connection.transaction():
            for _ in range(chance.choice([1, 1, 1, 2, 4])):
                name = self.statement(connection, chance)
                if chance.random() < 0.1:
                    time.sleep(chance.uniform(0, 0.05))
            if chance.random() < 0.1:
                name = "rolled back"
                raise psycopg.Rollback
        return name

    def statement(self, connection: psycopg.Connection, chance: random.Random) -> str:
        """One statement; returns its name."""
        table, changes = chance.choice([("note", NOTE), ("note", NOTE), ("part", PART)])
        name = chance.choices([*changes], [weight for weight, _ in changes.values()])[0]
        statement = changes[name][1]
        key = chance.randrange(KEYS)
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
        """Text and vector in one statement of Core's."""
        chance = random.Random(seed)
        engine = sa.create_engine(self.url, pool_pre_ping=True)
        while not self.stop.is_set():
            mapped = chance.choice([Note, Note, Part])
            title, body = text(chance), text(chance)
            vector = self.vector(title, body)
            try:
                with engine.begin() as connection:
                    identity = ColumnIdentity("public", mapped.__tablename__, "embedding")
                    catalog.attest(connection, catalog.require_binding(connection, identity))
                    connection.execute(
                        sa.update(mapped)
                        .values(title=title, body=body, embedding=vector)
                        .where(mapped.id == chance.randrange(KEYS))
                    )
                self.count("write: text with vector")
            except LOST:
                self.count("writes refused or lost")
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.05))
        engine.dispose()

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
            except (*LOST, StaleDataError, EncodingError):
                # A row that somebody else deleted or made, or that holds what cannot be encoded.
                self.count("writes refused or lost")
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
