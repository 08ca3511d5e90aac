"""The load of ``live_change.py``: versions of an application that search and write all the time.

Each answer is compared, in the snapshot that gave it, with exact search by hand-written SQL, with a
query vector that this library's registry has not seen, and each row of it with its text: the
similarity that was returned has to be the one of query and text in the space of that version.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import live_encoder
import numpy as np
import sqlalchemy as sa

from sbert_pg import catalog, hnsw_index, nearest
from sbert_pg.catalog.embedding import Embedding, digest_for
from sbert_pg.catalog.guard import binding_for_write
from sbert_pg.system import identity_of

# fmt: off
WORDS = [
    "river", "stone", "bridge", "market", "garden", "winter", "letter", "engine",
    "harbour", "candle", "forest", "copper", "window", "orchard", "signal", "thunder",
    "ribbon", "mirror", "castle", "lantern", "meadow", "saddle", "compass", "anchor",
]
# fmt: on
K = 10


def text_of(chance: random.Random) -> str:
    """A text of a few words, with a number that makes most of them differ."""
    return f"{' '.join(chance.choices(WORDS, k=6))} {chance.randrange(10_000)}"


@dataclass
class Tally:
    """What has been seen, by all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    recalls: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    #: Longest wait for a lock that was seen, seconds: for the table, and for a row.
    lock_waits: Counter[str] = field(default_factory=Counter)
    phase: str = "before"
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, by: int = 1) -> None:
        """Count."""
        with self.lock:
            self.counts[what] += by

    def waited(self, seconds: float) -> None:
        """A writer had its answer after so long."""
        with self.lock:
            self.waits[self.phase].append(seconds)


class LockWatch:
    """Looks all the time how long the application's sessions have waited for a lock.

    What a writer waits for in all includes a machine that is busy; this is the share of DDL.
    """

    def __init__(self, url: sa.URL, tally: Tally) -> None:
        self.engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        self.tally = tally
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        with self.engine.connect() as connection:
            while not self.stop.wait(0.02):
                for kind, seconds in connection.execute(_WAITING):
                    known = self.tally.lock_waits[kind]
                    self.tally.lock_waits[kind] = max(known, float(seconds))

    def end(self) -> None:
        """Look no more."""
        self.stop.set()
        self.thread.join()
        self.engine.dispose()


class Version:
    """One version of the application: the column and encoder that it declares, and its threads.

    Args:
        url: the database.
        space: number of the encoder and of the column.
        tally: what has been seen.
        seed: of its threads.
        replaces: whether it declares its column as the replacement of the one before.
    """

    def __init__(
        self, url: sa.URL, space: int, tally: Tally, seed: int, *, replaces: bool = False
    ) -> None:
        self.space = space
        self.column = f"embedding_{space}"
        self.tally = tally
        self.encoder = live_encoder.encoder(space)
        self.engine = sa.create_engine(
            url, pool_size=12, connect_args={"application_name": f"version-{space}"}
        )
        self.table = sa.Table(
            "doc",
            sa.MetaData(),
            sa.Column("id", sa.BigInteger, primary_key=True),
            sa.Column("body", sa.Text),
            sa.Column("views", sa.Integer, server_default="0"),
            sa.Column(
                self.column,
                Embedding(
                    live_encoder.spec(space),
                    "body",
                    replaces=f"embedding_{space - 1}" if replaces else None,
                ),
            ),
        )
        hnsw_index(f"ix_doc_{self.column}", self.table.c[self.column], m=8)
        self.chance = random.Random(seed)
        self.threads: list[threading.Thread] = []
        self.stops: list[threading.Event] = []

    def start(self, work: Callable[[random.Random], None], pause: float) -> None:
        """Do some work again and again in a thread."""
        stop, chance = threading.Event(), random.Random(self.chance.random())

        def go() -> None:
            while not stop.is_set():
                try:
                    work(chance)
                except Exception as error:  # Any error at all is a finding.
                    self.tally.add("errors")
                    with self.tally.lock:
                        name = f"version {self.space}, {work.__name__}, {self.tally.phase}"
                        self.tally.errors.append(f"{name}: {error!r:.300}")
                    time.sleep(0.2)
                stop.wait(chance.uniform(0.2, 1.8) * pause)

        thread = threading.Thread(target=go, daemon=True)
        self.threads.append(thread)
        self.stops.append(stop)
        thread.start()

    def stop(self) -> None:
        """Shut this version down."""
        for stop in self.stops:
            stop.set()
        for thread in self.threads:
            thread.join(timeout=60)
        self.threads, self.stops = [], []
        self.engine.dispose()

    # -- searching ----------------------------------------------------------------------------

    def search(self, chance: random.Random) -> None:
        """One query, held against exact search in the same snapshot."""
        query = " ".join(chance.choices(WORDS, k=3))
        vector = self.encoder.encode_query([query])[0]
        column = self.table.c[self.column]
        with self.engine.connect().execution_options(isolation_level="REPEATABLE READ") as c:
            answer = c.execute(nearest(column, query, limit=K)).all()
            exact = c.execute(self._exact(), {"q": _literal(vector)}).all()
            binding = catalog.require_binding(c, column)
            doc = binding.clause()
            waiting = sa.select(doc.c.id).where(
                doc.c.id.in_([row.id for row in answer]), binding.is_stale(doc)
            )
            pending = set(c.scalars(waiting))
            c.rollback()
        self.tally.add("queries")
        self.tally.add(f"queries, {self.tally.phase}")
        bodies = self.encoder.encode_document([row.body for row in answer])
        for row, right in zip(answer, bodies, strict=True):
            # A pending row shows the vector of its former text until a worker comes.
            if row.id in pending:
                self.tally.add("pending rows in answers")
            elif abs(row.similarity - float(vector @ right)) > 1e-3:
                with self.tally.lock:
                    self.tally.wrong.append(
                        f"version {self.space}, {self.tally.phase}: row {row.id} {row.body!r}, "
                        f"similarity {row.similarity:.4f}, right {float(vector @ right):.4f}"
                    )
        if exact:
            least = exact[-1].similarity - 1e-5
            hits = sum(row.similarity >= least for row in answer)
            with self.tally.lock:
                self.tally.recalls.append(hits / len(exact))

    def _exact(self) -> sa.TextClause:
        return sa.text(
            f"SELECT id, 1 - ({self.column} <=> CAST(:q AS vector)) AS similarity FROM doc "
            f"WHERE {self.column} IS NOT NULL ORDER BY ({self.column} <=> CAST(:q AS vector)) + 0 "
            f"LIMIT {K}"
        )

    # -- writing ------------------------------------------------------------------------------

    def write(self, chance: random.Random) -> None:
        """Insert or change a row with its vector, as this version's ORM would."""
        body, column = text_of(chance), self.table.c[self.column]
        vector = self.encoder.encode_document([body])[0]
        values = {"body": body, self.column: vector}
        started = time.perf_counter()
        with self.engine.begin() as connection:
            binding = binding_for_write(connection, identity_of(column), column.type.encoder)
            values[binding.companion] = digest_for(binding, body, vector)
            if chance.random() < 0.2:
                connection.execute(self.table.insert().values(id=_new_id(chance), **values))
            else:
                connection.execute(
                    self.table.update()
                    .where(self.table.c.id == chance.randrange(1, 1000))
                    .values(**values)
                )
        self.tally.waited(time.perf_counter() - started)
        self.tally.add("writes: text with vector")

    def write_plain(self, chance: random.Random) -> None:
        """Change rows as psql would, without a vector."""
        started = time.perf_counter()
        with self.engine.begin() as connection:
            what = chance.random()
            if what < 0.6:
                connection.execute(
                    sa.text("UPDATE doc SET body = :body WHERE id = :id"),
                    {"body": text_of(chance), "id": chance.randrange(1, 1000)},
                )
            elif what < 0.8:
                connection.execute(
                    sa.text("UPDATE doc SET views = views + 1 WHERE id = :id"),
                    {"id": chance.randrange(1, 1000)},
                )
            elif what < 0.9:
                connection.execute(
                    sa.text("INSERT INTO doc (id, body) VALUES (:id, :body)"),
                    {"body": text_of(chance), "id": _new_id(chance)},
                )
            else:
                connection.execute(sa.text("DELETE FROM doc WHERE id = (SELECT max(id) FROM doc)"))
        self.tally.waited(time.perf_counter() - started)
        self.tally.add("writes: as psql")


_WAITING = sa.text(
    "SELECT CASE l.locktype WHEN 'relation' THEN 'table' ELSE 'row' END, "
    "max(extract(epoch FROM clock_timestamp() - l.waitstart)) "
    "FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted "
    "AND l.waitstart IS NOT NULL AND a.application_name LIKE 'version-%' GROUP BY 1"
)


def _new_id(chance: random.Random) -> int:
    return chance.randrange(10_000_000, 2**62)


def _literal(vector: np.ndarray) -> str:
    return "[" + ",".join(f"{value:.8g}" for value in vector) + "]"
