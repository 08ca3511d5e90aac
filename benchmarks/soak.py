"""A randomised soak of the promise that no text is lost and none is silently stale.

Writers change rows in every way that SQL has; workers are killed and started; server backends are
terminated and killed, the server is restarted in mode immediate; leases are ended early, rows are
delivered again. Meanwhile one snapshot after the other is checked, and at the end every row: its
vector is the one of its text, or it is pending or failed.

    python benchmarks/soak.py --seconds 600 --seed 1

Exits with 1 if the promise was broken once. Runs on an embedded server of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psycopg
import soak_encoder
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.embedded import EmbeddedServer, embedded_server
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import Vector
from sbert_pg.types.guard import ColumnIdentity
from sbert_pg.types.wire import from_text
from sbert_pg.worker import WorkerSettings, refresh

IDENTITY = ColumnIdentity("public", "note", "embedding")
SETTINGS = {"fsync": "off", "max_connections": "60", "shared_buffers": "128MB"}
KEYS = 400
WORDS = ["red", "green", "blue", "apple", "pear", "house", "tree", "river", "stone", "cloud"]
LOST = (psycopg.OperationalError, psycopg.InterfaceError, sa.exc.DBAPIError)


class Soak:
    """One run."""

    def __init__(self, server: EmbeddedServer, options: argparse.Namespace, folder: Path) -> None:
        self.server = server
        self.url = server.ensure_database("soak")
        self.dsn = server.dsn("soak")
        self.options = options
        self.folder = folder
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.violations: list[str] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.encoder = soak_encoder.DeterministicEncoder(dimensions=soak_encoder.DIMENSIONS)
        threading.excepthook = self.crashed

    def count(self, what: str, by: int = 1) -> None:
        """Count something, from any thread."""
        with self.lock:
            self.counts[what] += by

    def prepare(self) -> None:
        """Catalog, table and binding."""
        engine = sa.create_engine(self.url)
        with engine.begin() as connection:
            catalog.upgrade(connection)
            connection.exec_driver_sql(
                "CREATE TABLE note (id bigint PRIMARY KEY, title text, body text, "
                f"views int DEFAULT 0, embedding vector({soak_encoder.DIMENSIONS}))"
            )
            spec = EncoderSpec(name="deterministic", dimensions=soak_encoder.DIMENSIONS)
            binding = catalog.bind(connection, IDENTITY, spec, Source.of(["title", "body"], " "))
            catalog.seal(connection, binding, self.encoder)
        engine.dispose()

    def crashed(self, arguments: threading.ExceptHookArgs) -> None:
        """A fault of this script's own must not pass for a good run."""
        self.violations.append(f"{arguments.thread}: {arguments.exc_value!r}")

    # -- writers ------------------------------------------------------------------------------

    def write(self, seed: int) -> None:
        """Change rows until told to stop, through whatever happens to the server."""
        chance = random.Random(seed)
        connection: psycopg.Connection | None = None
        while not self.stop.is_set():
            try:
                if connection is None or connection.closed:
                    connection = psycopg.connect(self.dsn, autocommit=True, connect_timeout=5)
                name = self.change(connection, chance)
                self.count(f"write: {name}")
            except LOST as error:
                self.count("writes refused or lost")
                if isinstance(error, psycopg.errors.DeadlockDetected):
                    self.count("deadlocks")
                if connection is not None and (connection.closed or connection.broken):
                    connection = None
                    time.sleep(0.05)
            except (psycopg.errors.UniqueViolation, psycopg.Rollback):
                self.count("writes refused or lost")
            time.sleep(chance.uniform(0, 0.01))

    def change(self, connection: psycopg.Connection, chance: random.Random) -> str:
        """One transaction of one to four changes; a tenth of them are rolled back."""
        name = ""
        with connection.transaction():
            for _ in range(chance.choice([1, 1, 1, 2, 4])):
                name = self.one_change(connection, chance)
                if chance.random() < 0.1:
                    time.sleep(chance.uniform(0, 0.05))
            if chance.random() < 0.1:
                raise psycopg.Rollback
        return name

    def one_change(self, connection: psycopg.Connection, chance: random.Random) -> str:
        """One statement; returns its name."""
        key, other = chance.randrange(KEYS), chance.randrange(KEYS)
        title, body = self.text(chance), self.text(chance)
        changes = {
            "insert": (
                (
                    "INSERT INTO note (id, title, body) VALUES (%s, %s, %s) "
                    "ON CONFLICT (id) DO UPDATE SET title = excluded.title"
                ),
                [key, title, body],
            ),
            "update": ("UPDATE note SET body = %s WHERE id = %s", [body, key]),
            "update title": ("UPDATE note SET title = %s WHERE id = %s", [title, key]),
            "no-op": ("UPDATE note SET body = body WHERE id = %s", [key]),
            "unrelated": ("UPDATE note SET views = views + 1 WHERE id = %s", [key]),
            "many": ("UPDATE note SET body = %s WHERE id %% 40 = %s", [body, key % 40]),
            "to null": ("UPDATE note SET title = NULL, body = NULL WHERE id = %s", [key]),
            "unencodable": ("UPDATE note SET body = 'unencodable' WHERE id = %s", [key]),
            "delete": ("DELETE FROM note WHERE id = %s", [key]),
            "key": ("UPDATE note SET id = %s WHERE id = %s", [KEYS + other, key]),
            "key back": ("UPDATE note SET id = %s WHERE id = %s", [key, KEYS + other]),
            "clear vector": ("UPDATE note SET embedding = NULL WHERE id = %s", [key]),
            "merge": (
                (
                    "MERGE INTO note USING (SELECT %s::bigint AS id, %s::text AS body) s "
                    "ON note.id = s.id WHEN MATCHED THEN UPDATE SET body = s.body "
                    "WHEN NOT MATCHED THEN INSERT (id, body) VALUES (s.id, s.body)"
                ),
                [key, body],
            ),
        }
        name = chance.choices(
            [*changes, "copy", "truncate"],
            [20, 20, 10, 4, 6, 3, 3, 1, 6, 3, 3, 2, 4, 3, 0.02],
        )[0]
        if name == "copy":
            connection.execute("DELETE FROM note WHERE id = ANY(%s)", [[key, other]])
            with connection.cursor().copy("COPY note (id, title, body) FROM STDIN") as copy:
                for one in sorted({key, other}):
                    copy.write_row((one, title, body))
        elif name == "truncate":
            connection.execute("TRUNCATE note")
        else:
            connection.execute(*changes[name])
        return name

    @staticmethod
    def text(chance: random.Random) -> str:
        """A short text, which comes again often enough."""
        return " ".join(chance.choices(WORDS, k=chance.randint(1, 6)))

    def write_with_vectors(self, seed: int) -> None:
        """A writer that embeds what it writes, as the ORM does, in one statement."""
        chance = random.Random(seed)
        engine = sa.create_engine(self.url, pool_pre_ping=True)
        table = sa.table(
            "note",
            sa.column("id"),
            sa.column("title"),
            sa.column("body"),
            sa.column("embedding", Vector(soak_encoder.DIMENSIONS)),
        )
        while not self.stop.is_set():
            title, body = self.text(chance), self.text(chance)
            vector = self.vector(title, body)
            try:
                with engine.begin() as connection:
                    binding = catalog.require_binding(connection, IDENTITY)
                    catalog.attest(connection, binding)
                    connection.execute(
                        sa.update(table)
                        .values(title=title, body=body, embedding=vector)
                        .where(table.c.id == chance.randrange(KEYS))
                    )
                self.count("write: text with vector")
            except LOST:
                self.count("writes refused or lost")
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.05))
        engine.dispose()

    def vector(self, title: str | None, body: str | None) -> np.ndarray:
        """What the encoder gives for the text of a row."""
        with self.lock:
            text = " ".join(part for part in (title, body) if part)
            vector = self.encoder.encode_document([text])[0]
            self.encoder.encoded.clear()
            return vector

    # -- workers and chaos --------------------------------------------------------------------

    def start_worker(self) -> None:
        """Start one more worker process."""
        url = self.url.render_as_string(hide_password=False)
        with (self.folder / "workers.log").open("ab") as log:
            self.workers.append(
                subprocess.Popen(
                    [
                        sys.executable, "-m", "sbert_pg.cli.app", "worker", "-d", url,
                        "--import", "soak_encoder", "--lease", "2", "--poll", "0.2",
                        "--backoff", "0.2", "--batch-size", "16", "--log-json",
                    ],
                    env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
                    stdout=log,
                    stderr=log,
                )
            )  # fmt: skip

    def disturb(self, seed: int) -> None:
        """Do harm until told to stop."""
        chance = random.Random(seed)
        next_restart = time.monotonic() + 6
        while not self.stop.wait(chance.uniform(0.1, 0.8)):
            try:
                if time.monotonic() > next_restart:
                    self.restart()
                    next_restart = time.monotonic() + chance.uniform(8, 20)
                else:
                    self.disturb_once(chance)
            except LOST:
                time.sleep(0.2)

    def disturb_once(self, chance: random.Random) -> None:
        """One harm."""
        what = chance.choices(
            ["kill worker", "terminate backend", "kill backend", "end leases", "deliver again"],
            [5, 4, 1, 3, 3],
        )[0]
        if what == "kill worker":
            victim = chance.randrange(len(self.workers))
            self.workers[victim].kill()
            self.workers.pop(victim).wait()
            self.start_worker()
            self.count("worker killed (SIGKILL)")
            return
        with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5) as connection:
            if what in ("terminate backend", "kill backend"):
                found = connection.execute(
                    "SELECT pid FROM pg_stat_activity WHERE datname = 'soak' "
                    "AND pid <> pg_backend_pid()"
                ).fetchall()
                if not found:
                    return
                pid = chance.choice(found)[0]
                if what == "terminate backend":
                    connection.execute("SELECT pg_terminate_backend(%s)", [pid])
                else:
                    os.kill(pid, signal.SIGKILL)
            elif what == "end leases":
                connection.execute(
                    "UPDATE sbert.pending SET lease_until = now() - interval '1 s' "
                    "WHERE lease_until IS NOT NULL"
                )
            else:
                connection.execute(
                    "INSERT INTO sbert.pending (column_id, key) SELECT 1, id::text FROM note "
                    "WHERE random() < 0.05 ON CONFLICT DO NOTHING"
                )
                connection.execute("SELECT pg_notify('sbert_pending', '1')")
        self.count(
            {
                "terminate backend": "backend terminated",
                "kill backend": "backend killed (SIGKILL)",
                "end leases": "leases ended",
                "deliver again": "rows delivered again",
            }[what]
        )

    def restart(self) -> None:
        """Crash the whole server and start it again."""
        self.server.control("restart", "immediate")
        self.count("server restarted (immediate)")

    # -- the promise --------------------------------------------------------------------------

    def watch(self) -> None:
        """Check one snapshot after the other."""
        while not self.stop.wait(0.5):
            try:
                self.check()
            except LOST:
                self.count("checks lost")

    def check(self) -> Counter[str]:
        """Every row of one snapshot; returns how many are in which state."""
        with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5) as connection:
            rows = connection.execute(
                "SELECT n.id, n.title, n.body, n.embedding::text, p.key IS NOT NULL, p.failed "
                "FROM note n LEFT JOIN sbert.pending p ON p.column_id = 1 AND p.key = n.id::text"
            ).fetchall()
        states: Counter[str] = Counter()
        for id_, title, body, vector, marked, failed in rows:
            if marked:
                states["failed" if failed else "pending"] += 1
                continue
            states["embedded" if vector is not None else "without text"] += 1
            if title is None and body is None:
                right = vector is None
            else:
                right = vector is not None and bool(
                    np.allclose(from_text(vector), self.vector(title, body), atol=1e-6)
                )
            if not right:
                self.violations.append(f"row {id_}: ({title!r}, {body!r}) has {vector!s:.60}")
        self.count("snapshots checked")
        self.count("rows checked", len(rows))
        return states

    def run(self) -> int:
        """The whole run; returns the exit code."""
        self.prepare()
        seed, seconds = self.options.seed, self.options.seconds
        threads = [
            threading.Thread(target=self.write, args=(seed * 100 + i,), daemon=True)
            for i in range(self.options.writers)
        ]
        threads.append(
            threading.Thread(target=self.write_with_vectors, args=(seed * 100 + 98,), daemon=True)
        )
        threads.append(threading.Thread(target=self.disturb, args=(seed * 100 + 99,), daemon=True))
        threads.append(threading.Thread(target=self.watch, daemon=True))
        for _ in range(self.options.workers):
            self.start_worker()
        try:
            for thread in threads:
                thread.start()
            self.stop.wait(seconds)
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(timeout=60)
            for worker in self.workers:
                worker.kill()
                worker.wait()
        return self.finish(seconds)

    def finish(self, seconds: float) -> int:
        """Drain what is left, with nothing in the way, and check every row."""
        engine = sa.create_engine(self.url)
        until = time.monotonic() + 120
        while True:
            refresh(engine, WorkerSettings(max_attempts=1))
            with engine.begin() as connection:
                left = connection.exec_driver_sql(
                    "SELECT count(*) FROM sbert.pending WHERE NOT failed"
                ).scalar_one()
            if left == 0 or time.monotonic() > until:
                break
            time.sleep(0.3)
        engine.dispose()
        states = self.check()
        with psycopg.connect(self.dsn) as connection:
            failed = connection.execute(
                "SELECT count(*) FROM sbert.pending p JOIN note n ON n.id::text = p.key "
                "WHERE p.failed AND concat(n.title, n.body) NOT LIKE '%unencodable%'"
            ).fetchone()
        report = {
            "seconds": seconds,
            "seed": self.options.seed,
            "writes": sum(n for name, n in self.counts.items() if name.startswith("write: ")),
            "counts": dict(sorted(self.counts.items())),
            "at the end": dict(states),
            "still pending": left,
            "failed through no fault of their text": failed[0] if failed else None,
            "violations": len(self.violations),
            "first violations": self.violations[:5],
        }
        print(json.dumps(report, indent=2))
        return 1 if self.violations or left or states["embedded"] == 0 else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sbert-pg-soak-") as name:
        os.chmod(name, 0o755)
        folder = Path(name)
        with embedded_server(folder / "data", settings=SETTINGS) as server:
            return Soak(server, options, folder).run()


if __name__ == "__main__":
    sys.exit(main())
