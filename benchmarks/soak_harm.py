"""What ``soak.py`` does to workers, server and schema while the writers write."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psycopg
import soak_encoder
import soak_shelf
import sqlalchemy as sa
from soak_writers import LOST

from sbert_pg import catalog, reembed
from sbert_pg.cli.app import run
from sbert_pg.embedded import EmbeddedServer
from sbert_pg.errors import SbertPgError
from sbert_pg.freshness import counts
from sbert_pg.system import ColumnIdentity

#: Seconds of a lease; a paused worker sleeps longer.
LEASE = 1
#: Kinds of harm, with their weights.
HARMS = {
    "worker killed (SIGKILL)": 4,
    "worker paused beyond its leases (SIGSTOP)": 1,
    "worker stopped (SIGTERM)": 1,
    "backend terminated": 4,
    "backend killed (SIGKILL)": 1,
    "leases ended": 3,
    "leases and failures of rows that are gone": 2,
    "rows made pending again": 3,
    "row that no trigger saw": 3,
    "partition attached and detached": 2,
    "column renamed": 1,
    "column retyped": 1,
    "key retyped": 1,
    "column bound to another encoder": 3,
}
#: Names of rows that never were, in leases and failures.
GONE = ('["987654321"]', '["no key of this type"]', '["1", "2"]', "[3]", "no name at all")


class Harm:
    """Threads that do harm until they are told to stop.

    Args:
        server: the server.
        folder: where workers log.
        stop: set when they are to stop.
        count: called with the name of what was done.
        wrong: called with what must not happen.
        restart_every: seconds between two restarts of the server, on average.
    """

    def __init__(
        self,
        server: EmbeddedServer,
        folder: Path,
        stop: threading.Event,
        count: Callable[[str], None],
        wrong: Callable[[str], None],
        restart_every: float,
    ) -> None:
        self.server = server
        self.url = server.url("soak")
        self.dsn = server.dsn("soak")
        self.folder = folder
        self.stop = stop
        self.count = count
        self.wrong = wrong
        self.restart_every = restart_every
        self.workers: list[ForkServerProcess] = []

    def all(self, seed: int) -> list[threading.Thread]:
        """One that harms, and one that replaces a column."""
        return [
            threading.Thread(target=self.disturb, args=(100 * seed + 99,), daemon=True),
            threading.Thread(target=self.replace, daemon=True),
        ]

    def start_worker(self) -> None:
        """Start one more worker process."""
        url = self.url.render_as_string(hide_password=False)
        worker = _FORKS.Process(target=work, args=(url, self.folder / "workers.log"), daemon=True)
        worker.start()
        self.workers.append(worker)

    def kill_workers(self) -> None:
        """End them all."""
        for worker in self.workers:
            worker.kill()
            worker.join()

    def disturb(self, seed: int) -> None:
        """One harm after the other."""
        chance = random.Random(seed)
        next_restart = time.monotonic() + self.restart_every / 2
        while not self.stop.wait(chance.uniform(0.1, 1.0)):
            try:
                if time.monotonic() > next_restart:
                    self.server.control("restart", "immediate")
                    self.count("server restarted (immediate)")
                    wait = self.restart_every * chance.uniform(0.6, 1.4)
                    next_restart = time.monotonic() + wait
                else:
                    self.harm(chance)
            except (*LOST, psycopg.errors.DeadlockDetected, ProcessLookupError):
                time.sleep(0.2)  # What was to be harmed has just ended by itself.

    def harm(self, chance: random.Random) -> None:
        """One harm."""
        what = chance.choices([*HARMS], [*HARMS.values()])[0]
        if what.startswith("worker"):
            self.harm_worker(what, chance)
        elif what == "column bound to another encoder":
            soak_shelf.bind_other(self.url)
        elif not self.harm_server(what, chance):
            return
        self.count(what)

    def harm_worker(self, what: str, chance: random.Random) -> None:
        """Kill, pause or stop one; there are always as many as before."""
        victim = chance.choice(self.workers)
        pid = victim.pid or 0
        if "SIGSTOP" in what:
            os.kill(pid, signal.SIGSTOP)
            # Others take its rows over; then it wakes and goes on as if nothing had happened.
            self.stop.wait(LEASE + chance.uniform(0.5, 2.0))
            os.kill(pid, signal.SIGCONT)
            return
        os.kill(pid, signal.SIGKILL if "SIGKILL" in what else signal.SIGTERM)
        victim.join(timeout=120)
        if victim.exitcode not in (-signal.SIGKILL, -signal.SIGTERM, 0):
            last = (self.folder / "workers.log").read_text(errors="replace")[-1500:]
            self.wrong(f"a worker ended with {victim.exitcode}: {last}")
        self.workers.remove(victim)
        self.start_worker()

    def harm_server(self, what: str, chance: random.Random) -> bool:
        """Something over a connection; returns whether it was done."""
        with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5) as connection:
            if what.startswith("backend"):
                return self.end_backend(connection, chance, gently=what.endswith("terminated"))
            if what == "leases ended":
                connection.execute("UPDATE sbert.claim SET until = now() - interval '1 s'")
            elif what == "leases and failures of rows that are gone":
                leave_orphans(connection)
            elif what == "rows made pending again":
                connection.execute(
                    "UPDATE note SET embedding_of = overlay(embedding_of::text "
                    "placing '0000-000000000000' from 20)::uuid WHERE id %% 20 = %s "
                    "AND embedding_of IS NOT NULL", [chance.randrange(20)],
                )  # fmt: skip
            elif what == "row that no trigger saw":
                # Nobody is notified of it, and its table is written in no other way.
                connection.execute("SET session_replication_role = replica")
                connection.execute(
                    "INSERT INTO quiet (title) VALUES (%s)", [f"unseen {chance.random()}"]
                )
            elif what == "partition attached and detached":
                self.attach(connection, chance)
            else:
                self.change_column(connection, what, chance)
        return True

    def end_backend(
        self, connection: psycopg.Connection, chance: random.Random, *, gently: bool
    ) -> bool:
        """End somebody's connection, or kill its process, which takes the server down with it."""
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = 'soak' AND pid <> pg_backend_pid()"
        ).fetchall()
        if not found:
            return False
        pid = chance.choice(found)[0]
        if gently:
            connection.execute("SELECT pg_terminate_backend(%s)", [pid])
        else:
            os.kill(pid, signal.SIGKILL)
        return True

    def attach(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """Rows that no trigger sees: without a vector, with a foreign one, with a copied one."""
        connection.execute("SET lock_timeout = '2s'")
        connection.execute("CREATE TABLE coming (LIKE part INCLUDING DEFAULTS)")
        try:
            connection.execute(
                "INSERT INTO coming (region, id, title, body, embedding) SELECT 'asia', i, "
                "'comes', 'from elsewhere ' || i, CASE WHEN i %% 2 = 0 THEN "
                "array_fill(0.1::real, ARRAY[%s])::vector END FROM generate_series(1, 20) AS i",
                [soak_encoder.DIMENSIONS],
            )
            connection.execute(
                "INSERT INTO coming (region, id, title, body, embedding, embedding_of) "
                "SELECT 'asia', id + 1000, title, body || ' copied', "
                "embedding, embedding_of FROM part WHERE region = 'eu' AND id < 20"
            )
            connection.execute("ALTER TABLE part ATTACH PARTITION coming FOR VALUES IN ('asia')")
            self.stop.wait(chance.uniform(0.5, 2))
            # What came as foreign moves to another partition as anything else does.
            connection.execute("UPDATE part SET region = 'us', id = id + 2000 WHERE region = 'asia'"
                               " AND id IN (2, 4, 6) AND NOT EXISTS (SELECT FROM part AS p "
                               "WHERE p.region = 'us' AND p.id = part.id + 2000)")  # fmt: skip
            connection.execute("ALTER TABLE part DETACH PARTITION coming")
        finally:
            connection.execute("DROP TABLE IF EXISTS coming")

    def change_column(
        self, connection: psycopg.Connection, what: str, chance: random.Random
    ) -> None:
        """Ordinary DDL of the application's, on the source and key columns of ``child``."""
        if what == "column retyped":
            for type_ in ("varchar(500)", "text"):
                connection.execute(f"ALTER TABLE child ALTER body TYPE {type_}")
            return
        if what == "key retyped":
            for type_ in ("bigint", "int"):
                connection.execute(f"ALTER TABLE child ALTER number TYPE {type_}")
                self.stop.wait(chance.uniform(0.1, 3))
            return
        for old, new in (("body", "content"), ("content", "body")):
            for _ in range(50):
                try:
                    with connection.transaction():
                        connection.execute("SET LOCAL lock_timeout = '1s'")
                        connection.execute(f"ALTER TABLE child RENAME {old} TO {new}")
                        connection.execute("SELECT sbert.rename_v1('child', %s, %s)", [old, new])
                    break
                except psycopg.errors.LockNotAvailable:
                    continue
            self.stop.wait(chance.uniform(0.1, 0.5))

    def replace(self) -> None:
        """Begin a change of encoder beside the old column, see it filled, and give it up again."""
        engine = sa.create_engine(self.url, pool_pre_ping=True)
        column = ColumnIdentity("public", "note", "second")
        request = reembed.Request(
            old=ColumnIdentity("public", "note", "embedding"),
            new="second",
            encoder=soak_encoder.encoder("second").spec,
        )
        while not self.stop.is_set():
            try:
                reembed.begin(engine, request)
                self.count("replacement begun")
                if self.fill(engine, column):
                    self.count("replacement filled")
                reembed.abort(engine, column)
                self.count("replacement given up")
            except (*LOST, sa.exc.DBAPIError, SbertPgError) as error:
                # The next round goes on from whatever state this one left.
                self.count(f"replacement disturbed: {type(error).__name__}")
            self.stop.wait(1)
        engine.dispose()

    def fill(self, engine: sa.Engine, column: ColumnIdentity) -> bool:
        """Wait for the workers to drain what was there; whether they did within two minutes."""
        until = time.monotonic() + 120
        while not self.stop.wait(0.5) and time.monotonic() < until:
            with engine.begin() as connection:
                if counts(connection, catalog.require_binding(connection, column)).backfill == 0:
                    return True
        return False


#: Workers are forked from a process that has imported everything: a killed one is back at once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["soak_harm"])


def work(url: str, log: Path) -> None:
    """A worker, as on the command line."""
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    settings = {
        "lease": LEASE, "poll_interval": 0.5, "rescan_interval": 2, "backoff": 0.2,
        "batch_size": 16,
    }  # fmt: skip
    command = ["worker", "-d", url, "--app", "soak_encoder", "--log", "info:json"]
    sys.exit(run([*command, *(f"--set={name}={value}" for name, value in settings.items())]))


def leave_orphans(connection: psycopg.Connection) -> None:
    """Leases and failures of rows that are gone, and of names that are no keys."""
    connection.execute(
        "INSERT INTO sbert.claim (binding_id, worker, keys, until) "
        "SELECT id, %s, %s, now() - interval '1 s' FROM sbert.binding "
        "WHERE relation = 'note'::regclass AND column_name = 'embedding'",
        [str(uuid.uuid4()), list(GONE)],
    )
    connection.execute(
        "INSERT INTO sbert.failure (binding_id, key, attempts, next_attempt_at) "
        "SELECT id, key, 1, now() FROM sbert.binding, unnest(%s::text[]) AS key "
        "WHERE relation = 'note'::regclass AND column_name = 'embedding' ON CONFLICT DO NOTHING",
        [list(GONE)],
    )
