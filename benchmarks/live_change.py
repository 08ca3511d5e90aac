"""A live change of encoder under load, again and again, with processes killed at random.

Versions of an application search and write throughout begin, backfill, index, verify, switch and
finish. Old and new run side by side, one change in four is aborted half-way, and each is rolled
back once after the switch. Workers, backfills and index builds are killed (SIGKILL) at random.
Encoders all have the same width, so nothing but this library tells their vectors apart. Every
answer is compared with exact search in the right space.

    python benchmarks/live_change.py --seconds 600 --seed 1

Prints JSON: queries answered, answers from a wrong space, errors, stale vectors at the end, and the
longest time that a writer waited. Exits with 1 unless there was no wrong answer, error or stale
vector. Runs on an embedded server of its own.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from bench_server import fresh_server
from live_load import LockWatch, Tally, Version, text_of

from sbert_pg import catalog, errors
from sbert_pg import reembed as ree
from sbert_pg.freshness import WorkerSettings, refresh
from sbert_pg.system import ColumnIdentity
from sbert_pg.types.wire import from_text

SETTINGS = {"fsync": "off", "max_connections": "120", "shared_buffers": "256MB"}
QUIET = dt.timedelta(seconds=2)
#: Pending rows that are normal: some writers leave all encoding to workers.
PENDING = 100


class Processes:
    """Worker processes of an operator, and one who kills them."""

    def __init__(self, url: sa.URL, folder: Path, tally: Tally, seed: int) -> None:
        self.url = url.render_as_string(hide_password=False)
        self.log = folder / "processes.log"
        self.tally = tally
        self.chance = random.Random(seed)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._kill, daemon=True)

    def command(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command."""
        here = str(Path(__file__).parent)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "sbert_pg.cli.app", *arguments, "-d", self.url],
                env={**os.environ, "PYTHONPATH": here, "LIVE_CHANGE_DELAY": "0.001"},
                stdout=log,
                stderr=log,
            )

    def start(self, number: int) -> None:
        """Start workers, and the one who kills them."""
        self.workers = [self._worker() for _ in range(number)]
        self.thread.start()

    def _worker(self) -> subprocess.Popen[bytes]:
        return self.command(
            "worker", "--app", "live_encoder", "--set", "lease=2", "--set", "poll_interval=0.3",
            "--set", "backoff=0.2", "--set", "batch_size=32", "--log", "warning",
        )  # fmt: skip

    def _kill(self) -> None:
        # Long enough for one to start on a busy machine and have something in hand.
        while not self.ended.wait(self.chance.uniform(8, 30)):
            victim = self.chance.randrange(len(self.workers))
            self.workers[victim].kill()
            self.workers.pop(victim).wait()
            self.workers.append(self._worker())
            self.tally.add("workers killed")

    def stop(self) -> None:
        """End them all."""
        self.ended.set()
        self.thread.join(timeout=30)
        for worker in self.workers:
            worker.kill()
            worker.wait()

    def until_done(self, what: str, *arguments: str, kill: float) -> None:
        """Run a command to its end, killing it half-way with some probability, and again."""
        while True:
            process = self.command(*arguments)
            if self.chance.random() < kill:
                try:
                    process.wait(timeout=self.chance.uniform(2.5, 7))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    self.tally.add(f"{what} killed")
                    continue
            if process.wait(timeout=600) == 0:
                return
            self.tally.add(f"{what} run again")
            time.sleep(0.5)


class Live:
    """One run."""

    def __init__(self, url: sa.URL, folder: Path, options: argparse.Namespace) -> None:
        self.url = url
        self.options = options
        self.tally = Tally()
        self.chance = random.Random(options.seed)
        self.engine = sa.create_engine(url, connect_args={"application_name": "operator"})
        self.processes = Processes(url, folder, self.tally, options.seed)
        self.plain = Version(url, 0, self.tally, options.seed)
        self.until = time.monotonic() + options.seconds

    def phase(self, name: str) -> None:
        """Name what is going on."""
        self.tally.phase = name
        print(f"{self.until - time.monotonic():6.0f} s left: {name}", file=sys.stderr)

    def identity(self, version: Version) -> ColumnIdentity:
        """Its column."""
        return ColumnIdentity("public", "doc", version.column)

    def prepare(self) -> Version:
        """The table, with the first version's column filled and indexed."""
        first = Version(self.url, 0, self.tally, self.options.seed + 1)
        with self.engine.begin() as connection:
            catalog.upgrade(connection)
            first.table.metadata.create_all(connection)
            catalog.bind(connection, first.table.c[first.column])
            rows = [{"id": i, "body": text_of(self.chance)} for i in range(1, self.options.rows)]
            vectors = first.encoder.encode_document([row["body"] for row in rows])
            connection.execute(
                first.table.insert(),
                [{**r, first.column: v} for r, v in zip(rows, vectors, strict=True)],
            )
        return first

    def serve(self, version: Version, *, readers: int, writers: int) -> None:
        """Deploy a version, or some of its threads."""
        for _ in range(readers):
            version.start(version.search, 0.05)
        for _ in range(writers):
            version.start(version.write, 0.08)

    def pause(self, low: float, high: float) -> None:
        """Let the load go on for a while."""
        time.sleep(self.chance.uniform(low, high))

    def change(self, old: Version, *, abort: bool) -> Version:
        """One change from end to end; returns the version that serves afterwards."""
        new = Version(
            self.url, old.space + 1, self.tally, self.chance.randrange(10**9), replaces=True
        )
        column = self.identity(new)
        self.phase("begin")
        ree.begin(self.engine, ree.request_of(new.table.c[new.column]), attempts=200)
        # The new version writes from now on, in part of the fleet.
        self.serve(new, readers=0, writers=2)
        self.phase("backfill")
        self.expect_not_ready(new)
        name = f"doc.{new.column}"
        fill = ("backfill", name, "--app", "live_encoder", "--set", "batch_size=32")
        if abort:
            filling = self.processes.command(*fill)
            self.pause(2, 6)
            filling.kill()
            filling.wait()
            new.stop()
            self.phase("abort")
            ree.abort(self.engine, column, attempts=200)
            self.tally.add("changes aborted")
            return old
        self.fill(fill)
        self.phase("index")
        self.processes.until_done(
            "index builds", "backfill", name, "--app", "live_encoder", kill=0.5
        )
        self.phase("verify")
        self.until_ready(new)
        report = ree.verify(self.engine, column, sample_size=30, texts=30)
        if not report.passed:
            self.tally.errors.append(f"verify: {report.failures}")
        self.switch(old, new)
        self.phase("finish")
        self.until_ready(new)
        ree.finish(self.engine, column, quiet=QUIET, watch=1.0, max_pending=PENDING, attempts=200)
        self.tally.add("changes finished")
        self.phase("after")
        self.pause(1, 3)
        return new

    def fill(self, command: tuple[str, ...]) -> None:
        """Two backfills at a time, each killed now and then; ranges of the dead end by lease."""
        others = threading.Thread(
            target=self.processes.until_done, args=("backfills", *command), kwargs={"kill": 0.5}
        )
        others.start()
        self.processes.until_done("backfills", *command, kill=0.5)
        others.join()

    def expect_not_ready(self, new: Version) -> None:
        """A start-up check before the backfill has to keep the new code from serving."""
        try:
            ree.require_ready(self.engine, new.table)
        except errors.BackfillIncompleteError:
            self.tally.add("start-ups refused before the backfill")
        else:
            self.tally.errors.append(f"version {new.space} was ready before its backfill")

    def until_ready(self, new: Version) -> None:
        """What a deployment does: ask the readiness probe until it agrees."""
        ends = time.monotonic() + 180
        while True:
            try:
                return ree.require_ready(self.engine, new.table, max_pending=PENDING)
            except errors.BackfillIncompleteError:
                if time.monotonic() > ends:
                    raise
                self.tally.add("start-ups put off until workers caught up")
                time.sleep(2)

    def switch(self, old: Version, new: Version) -> None:
        """Deploy the new version, roll it back once, deploy it again; the old one goes last."""
        self.phase("switch")
        self.until_ready(new)
        self.serve(new, readers=2, writers=0)
        self.pause(2, 5)
        self.refused(new)
        self.phase("rolled back")
        new.stop()
        self.pause(2, 4)
        self.phase("switch")
        self.until_ready(new)
        self.serve(new, readers=2, writers=2)
        self.pause(2, 5)
        self.refused(new)
        old.stop()
        # Until it has been quiet for long enough, finish goes on refusing.
        time.sleep(QUIET.total_seconds() + 1)

    def refused(self, new: Version) -> None:
        """While the old version runs, finish has to refuse."""
        try:
            ree.finish(self.engine, self.identity(new), quiet=QUIET, watch=1.0, max_pending=PENDING)
        except errors.StillInUseError:
            self.tally.add("finishes refused while the old version ran")
        else:
            self.tally.errors.append(f"finish to version {new.space} was not refused")

    def run(self) -> int:
        """The whole run; returns the exit code."""
        version = self.prepare()
        self.processes.start(self.options.workers)
        watch = LockWatch(self.url, self.tally)
        self.plain.start(self.plain.write_plain, 0.05)
        try:
            self.serve(version, readers=2, writers=2)
            self.phase("before")
            self.pause(2, 4)
            number = 0
            while number == 0 or time.monotonic() < self.until:
                version = self.change(version, abort=number % 4 == 1)
                number += 1
        finally:
            self.phase("end")
            version.stop()
            self.plain.stop()
            watch.end()
            self.processes.stop()
        return self.report(version)

    def stale(self, version: Version) -> tuple[int, int, int]:
        """Drain what is pending; then rows, those with a wrong vector, and those still pending."""
        ends = time.monotonic() + 120
        left = 1
        while left and time.monotonic() < ends:
            left = refresh(self.engine, WorkerSettings()).left
            time.sleep(0.2)
        with self.engine.connect() as connection:
            rows = connection.execute(
                sa.text(f"SELECT id, body, {version.column}::text FROM doc")
            ).all()
        vectors = version.encoder.encode_document([row[1] for row in rows])
        stale = sum(
            row[2] is None or not np.allclose(from_text(row[2]), vector, atol=1e-5)
            for row, vector in zip(rows, vectors, strict=True)
        )
        return len(rows), stale, left

    def report(self, version: Version) -> int:
        """Print what was found."""
        tally = self.tally
        rows, stale, left = self.stale(version)
        waits = {
            phase: {
                "writes": len(seen),
                "median_ms": round(1000 * float(np.median(seen)), 1),
                "p99_ms": round(1000 * float(np.quantile(seen, 0.99)), 1),
                "longest_ms": round(1000 * max(seen), 1),
            }
            for phase, seen in tally.waits.items()
        }
        bad = bool(tally.wrong or tally.errors or stale or left or not tally.counts["queries"])
        print(
            json.dumps(
                {
                    "seconds": self.options.seconds,
                    "seed": self.options.seed,
                    "queries answered": tally.counts["queries"],
                    "wrong-space answers": len(tally.wrong),
                    "errors": len(tally.errors),
                    "rows at the end": rows,
                    "stale vectors at the end": stale,
                    "still pending": left,
                    "longest wait of a writer, ms": max(w["longest_ms"] for w in waits.values()),
                    "of that for a lock, ms": {
                        kind: round(1000 * tally.lock_waits[kind], 1) for kind in ("table", "row")
                    },
                    "recall against exact search": {
                        "mean": round(float(np.mean(tally.recalls)), 4),
                        "lowest": round(min(tally.recalls), 2),
                    },
                    "waits of writers": waits,
                    "counts": dict(sorted(tally.counts.items())),
                    "first wrong answers": tally.wrong[:5],
                    "first errors": tally.errors[:5],
                },
                indent=2,
            )
        )
        return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with fresh_server(SETTINGS) as server:
        url = server.ensure_database("live")
        return Live(url, server.data_dir.parent, options).run()


if __name__ == "__main__":
    sys.exit(main())
