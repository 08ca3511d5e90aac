"""A randomised soak of the promise that no text is lost and none is silently stale.

Writers change rows in every way that SQL and the ORM have (``soak_writers.py``), in an ordinary and
in a partitioned table. Workers are killed, paused beyond their leases and stopped; server backends
are terminated and killed, the server is restarted in mode immediate; leases are ended early, rows
are delivered again. Meanwhile one snapshot after the other is checked, and at the end every row:
its vector is the one of its text, or it is pending or failed.

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
from typing import Any

import numpy as np
import psycopg
import soak_encoder
import sqlalchemy as sa
import sqlalchemy.dialects.postgresql as pg
from soak_writers import LOST, PARTITIONS, Base, Writers

from sbert_pg import bind_all, catalog, use_encoder
from sbert_pg.catalog.tables import pending
from sbert_pg.embedded import EmbeddedServer, embedded_server
from sbert_pg.types.wire import from_text
from sbert_pg.worker import WorkerSettings, refresh

SETTINGS = {"fsync": "off", "max_connections": "60", "shared_buffers": "128MB"}
#: Seconds of a lease; a paused worker sleeps longer.
LEASE = 2
HARMS = {
    "worker killed (SIGKILL)": 5,
    "worker paused beyond its leases (SIGSTOP)": 1,
    "worker stopped (SIGTERM)": 1,
    "backend terminated": 4,
    "backend killed (SIGKILL)": 1,
    "leases ended": 3,
    "rows delivered again": 3,
}


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
        self.bindings: list[catalog.Binding] = []
        self.encoder = soak_encoder.DeterministicEncoder(dimensions=soak_encoder.DIMENSIONS)

    def count(self, what: str, by: int = 1) -> None:
        """Count something, from any thread."""
        with self.lock:
            self.counts[what] += by

    def prepare(self) -> None:
        """Catalog, tables and bindings."""
        use_encoder(soak_encoder.encoder())
        engine = sa.create_engine(self.url)
        with engine.begin() as connection:
            catalog.upgrade(connection)
            Base.metadata.create_all(connection)
            for statement in PARTITIONS:
                connection.exec_driver_sql(statement)
            bind_all(connection, Base.metadata)
            self.bindings = catalog.all_bindings(connection)
            for binding in self.bindings:
                catalog.seal(connection, binding, self.encoder)
        engine.dispose()

    def crashed(self, arguments: threading.ExceptHookArgs) -> None:
        """A fault of this script's own must not pass for a good run."""
        self.violations.append(f"{arguments.thread}: {arguments.exc_value!r}")

    def vector(self, title: str | None, body: str | None) -> np.ndarray:
        """What the encoder gives for the text of a row."""
        with self.lock:
            text = " ".join(part for part in (title, body) if part)
            vector = self.encoder.encode_document([text])[0]
            self.encoder.encoded.clear()
            return vector

    # -- workers and harm ---------------------------------------------------------------------

    def start_worker(self) -> None:
        """Start one more worker process."""
        url = self.url.render_as_string(hide_password=False)
        with (self.folder / "workers.log").open("ab") as log:
            self.workers.append(
                subprocess.Popen(
                    [
                        sys.executable, "-m", "sbert_pg.cli.app", "worker", "-d", url,
                        "--import", "soak_encoder", "--lease", str(LEASE), "--poll", "0.2",
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
        next_restart = time.monotonic() + self.options.restart_every / 2
        while not self.stop.wait(chance.uniform(0.1, 0.8)):
            try:
                if time.monotonic() > next_restart:
                    self.server.control("restart", "immediate")
                    self.count("server restarted (immediate)")
                    next_restart = time.monotonic() + self.options.restart_every * chance.uniform(
                        0.6, 1.4
                    )
                else:
                    self.harm(chance)
            except (*LOST, ProcessLookupError):
                time.sleep(0.2)  # What was to be harmed has just ended by itself.

    def harm(self, chance: random.Random) -> None:
        """One harm."""
        what = chance.choices([*HARMS], [*HARMS.values()])[0]
        if what.startswith("worker"):
            self.harm_worker(what, chance)
        elif not self.harm_server(what, chance):
            return
        self.count(what)

    def harm_worker(self, what: str, chance: random.Random) -> None:
        """Kill, pause or stop one; there are always as many as before."""
        victim = self.workers[chance.randrange(len(self.workers))]
        if "SIGSTOP" in what:
            victim.send_signal(signal.SIGSTOP)
            # Others take its rows over; then it wakes and goes on as if nothing had happened.
            self.stop.wait(LEASE + chance.uniform(0.1, 1.0))
            victim.send_signal(signal.SIGCONT)
            return
        victim.send_signal(signal.SIGKILL if "SIGKILL" in what else signal.SIGTERM)
        if victim.wait(timeout=120) not in (-signal.SIGKILL, -signal.SIGTERM, 0):
            self.violations.append(f"a worker ended with {victim.returncode}")
        self.workers.remove(victim)
        self.start_worker()

    def harm_server(self, what: str, chance: random.Random) -> bool:
        """Something over a connection; returns whether it was done."""
        with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5) as connection:
            if what.startswith("backend"):
                found = connection.execute(
                    "SELECT pid FROM pg_stat_activity WHERE datname = 'soak' "
                    "AND pid <> pg_backend_pid()"
                ).fetchall()
                if not found:
                    return False
                pid = chance.choice(found)[0]
                if what.endswith("terminated"):
                    connection.execute("SELECT pg_terminate_backend(%s)", [pid])
                else:
                    os.kill(pid, signal.SIGKILL)
                return True
            if what == "leases ended":
                connection.execute(
                    "UPDATE sbert.pending SET lease_until = now() - interval '1 s' "
                    "WHERE lease_until IS NOT NULL"
                )
                return True
        self.deliver_again()
        return True

    def deliver_again(self) -> None:
        """Mark rows that are fresh, as a clumsy operator would."""
        engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            for binding in self.bindings:
                table = binding.clause()
                rows = sa.select(sa.literal(binding.id), binding.key_text(table)).where(
                    sa.func.random() < 0.05
                )
                insert = pg.insert(pending)
                connection.execute(
                    insert.from_select(["column_id", "key"], rows).on_conflict_do_nothing()
                )
                connection.execute(
                    sa.select(sa.func.pg_notify(catalog.PENDING_CHANNEL, str(binding.id)))
                )

    # -- the promise --------------------------------------------------------------------------

    def watch(self) -> None:
        """Check one snapshot after the other."""
        while not self.stop.wait(0.5):
            try:
                self.check()
            except LOST:
                self.count("checks lost")

    def check(self) -> Counter[str]:
        """Every row of one snapshot of each table; returns how many are in which state."""
        states: Counter[str] = Counter()
        engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        for binding in self.bindings:
            with engine.begin() as connection:
                rows = connection.execute(snapshot(binding)).all()
            states.update(self.check_row(binding, row) for row in rows)
            self.count("rows checked", len(rows))
        self.count("snapshots checked")
        return states

    def check_row(self, binding: catalog.Binding, row: sa.Row[Any]) -> str:
        """The state of one row; a violation is noted."""
        if row.marked:
            return "failed" if row.failed else "pending"
        if row.title is None and row.body is None:
            right = row.vector is None
        else:
            right = row.vector is not None and bool(
                np.allclose(from_text(row.vector), self.vector(row.title, row.body), atol=1e-6)
            )
        if not right:
            name = f"{binding.table} {row.row_key}"
            self.violations.append(f"{name}: {row.title!r}, {row.body!r} has {row.vector!s:.60}")
        return "embedded" if row.vector is not None else "without text"

    # -- the run ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """The whole run; returns the report."""
        self.prepare()
        seed = self.options.seed
        before, threading.excepthook = threading.excepthook, self.crashed
        writers = Writers(self.url, self.stop, self.count, self.vector)
        threads = writers.all(seed, self.options.writers)
        threads.append(threading.Thread(target=self.disturb, args=(100 * seed + 99,), daemon=True))
        threads.append(threading.Thread(target=self.watch, daemon=True))
        for _ in range(self.options.workers):
            self.start_worker()
        try:
            for thread in threads:
                thread.start()
            self.stop.wait(self.options.seconds)
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(timeout=120)
            for worker in self.workers:
                worker.kill()
                worker.wait()
            threading.excepthook = before
        return self.finish()

    def finish(self) -> dict[str, Any]:
        """Drain what is left, with nothing in the way, and check every row."""
        engine = sa.create_engine(self.url)
        until = time.monotonic() + 240
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
        return {
            "seconds": self.options.seconds,
            "seed": self.options.seed,
            "writes": sum(n for name, n in self.counts.items() if name.startswith("write: ")),
            "harms": sum(n for name, n in self.counts.items() if "(" in name or name in HARMS),
            "counts": dict(sorted(self.counts.items())),
            "at the end": dict(states),
            "still pending": left,
            "failed through no fault of their text": failed[0] if failed else None,
            "violations": len(self.violations),
            "first violations": self.violations[:5],
        }


def snapshot(binding: catalog.Binding) -> sa.Select[Any]:
    """Rows of a bound table with their marks, in one statement and so of one moment."""
    table = sa.table(
        binding.table, *(sa.column(n) for n in ("region", "id", "title", "body", "embedding"))
    )
    key = binding.key_text(table)
    mark = pending.c
    return sa.select(
        key.label("row_key"),
        table.c.title,
        table.c.body,
        sa.cast(table.c.embedding, sa.Text).label("vector"),
        mark.key.is_not(None).label("marked"),
        mark.failed,
    ).join_from(
        table, pending, sa.and_(mark.column_id == binding.id, mark.key == key), isouter=True
    )


def good(report: dict[str, Any]) -> bool:
    """Whether the promise held, and was put to the test at all."""
    embedded = report["at the end"].get("embedded", 0)
    return not report["violations"] and not report["still pending"] and embedded > 0


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """One run on a server of its own; returns the report."""
    with tempfile.TemporaryDirectory(prefix="sbert-pg-soak-") as name:
        os.chmod(name, 0o755)
        folder = Path(name)
        version = int(os.environ.get("SBERT_PG_TEST_POSTGRES", "18"))
        with embedded_server(
            folder / "data", postgres_version=version, settings=SETTINGS
        ) as server:
            return Soak(server, options, folder).run()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--seconds", type=float, default=60)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--writers", type=int, default=4)
    made.add_argument("--workers", type=int, default=3)
    made.add_argument("--restart-every", type=float, default=14, help="seconds, on average")
    return made


def main() -> int:
    report = soak(parser().parse_args())
    print(json.dumps(report, indent=2))
    return 0 if good(report) else 1


if __name__ == "__main__":
    sys.exit(main())
