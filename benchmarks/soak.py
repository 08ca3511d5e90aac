"""A randomised soak of the promise that no text is lost and none is silently stale.

Writers change rows in every way that SQL and the ORM have (``soak_writers.py``), at every isolation
level, in an ordinary and a partitioned table and one that follows by foreign keys, with triggers of
the application's that rewrite texts; strangers write foreign vectors, past triggers too. Readers
search a column that changes hands (``soak_shelf.py``). Documents are edited while they are cut, and
plain SQL asks questions (``soak_documents.py``). Workers are killed, paused beyond their
leases and stopped; backends are terminated and killed, the server is restarted in mode immediate;
leases are ended early or left behind, rows made pending again, partitions attached and detached,
columns renamed, retyped and replaced (``soak_harm.py``). Meanwhile one snapshot after the other is
checked, and at the end every row: its vector is that of its text, or it is pending, and not for
long, or it has failed with a cause.

    python benchmarks/soak.py --seconds 600 --seed 1

Exits with 1 if the promise was broken once, a write failed that must not, a row failed without a
cause, or a kind of write or harm happened less than a quarter as often as its share. Runs on an
embedded server of its own; ``SBERT_PG_TEST_POSTGRES`` chooses its version.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import soak_documents
import soak_encoder
import soak_shelf
import sqlalchemy as sa
from bench_server import fresh_server
from soak_harm import GONE, HARMS, Harm
from soak_writers import (
    INTRUSIONS,
    ISOLATION,
    LOST,
    PARTITIONS,
    RENAMED,
    REWRITTEN,
    TABLES,
    TRIGGERS,
    Base,
    Writers,
)

from sbert_pg import catalog, create_all
from sbert_pg.embedded import EmbeddedServer
from sbert_pg.freshness import WorkerSettings, claims, counts, refresh, retry
from sbert_pg.freshness.queue import CHANGED
from sbert_pg.freshness.rows import rows_of
from sbert_pg.sqlstates import sqlstate_of
from sbert_pg.system import ColumnIdentity, array_label
from sbert_pg.types.wire import from_text, to_wire

SETTINGS = {"fsync": "off", "max_connections": "60", "shared_buffers": "128MB"}
#: A kind of write or harm of which more are expected than this must have come up by its share.
EXPECTED = 15
#: Seconds in which little comes up, since everything starts.
START = 30.0
#: What must have come up so often a second after that, whatever the shares; also where twenty other
#: programs share the machine.
FLOORS = {
    "snapshots checked": 1 / 60,
    "rows seen fresh": 2.0,
    "leases seen": 1 / 5,
    "question answered": 1 / 30,
    **{f"write: document: {what}": 1 / 60 for what in soak_documents.EDITS},
    "read answered": 1 / 4,
    "read refused": 1 / 4,
    "replacement filled": 1 / 200,
    "server restarted (immediate)": 1 / 60,
    "write: text with vector": 1 / 10,
    "write: ORM objects": 1 / 10,
    "write: ORM bulk insert": 1 / 50,
    **{f"rewritten by a trigger: {name}": 1 / 10 for name in REWRITTEN},
}

#: Looks at every lease when it is taken; claims take turns, so it misses none.
LEASES = """
CREATE TABLE leased (keys integer, twice integer);
CREATE FUNCTION look_at_lease() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO leased SELECT cardinality(NEW.keys), count(*)
      FROM sbert.claim AS c, unnest(c.keys) AS key
     WHERE c.binding_id = NEW.binding_id AND c.worker <> NEW.worker AND c.until > now()
       AND key = ANY (NEW.keys);
    RETURN NULL;
END $$;
CREATE TRIGGER look AFTER INSERT ON sbert.claim FOR EACH ROW WHEN (NEW.until > now())
    EXECUTE FUNCTION look_at_lease();
"""


class Soak:
    """One run."""

    def __init__(self, server: EmbeddedServer, options: argparse.Namespace, folder: Path) -> None:
        self.url = server.ensure_database("soak")
        self.engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        self.options = options
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.violations: list[str] = []
        self.harm = Harm(server, folder, self.stop, self.count, self.wrong, options.restart_every)
        self.encoders = {n: soak_encoder.encoder(n, slow=False) for n in soak_encoder.NAMES}
        #: Whether nobody does harm any more. Before, the processes of a row that is tried alone may
        #: all come to an end, the more so the slower the machine.
        self.at_rest = False
        #: Since when rows of ``quiet`` are pending, by key.
        self.unseen: dict[str, float] = {}

    def count(self, what: str, by: int = 1) -> None:
        """Count something, from any thread."""
        with self.lock:
            self.counts[what] += by

    def prepare(self) -> None:
        """Catalog, tables and bindings."""
        soak_encoder.register()
        with self.engine.begin() as connection:
            catalog.upgrade(connection)
            Base.metadata.create_all(connection)
            for statement in PARTITIONS:
                connection.exec_driver_sql(statement)
            for script in (TRIGGERS, LEASES):
                connection.connection.cursor().execute(script)
            soak_encoder.sabotage_schema(connection)
            create_all(connection, Base.metadata)
            for binding in catalog.all_bindings(connection):
                catalog.hold_encoder(connection, binding, self.encoders[binding.declared.name])
            soak_shelf.prepare(connection)
            soak_encoder.sabotage_tables(connection)

    def crashed(self, arguments: threading.ExceptHookArgs) -> None:
        """A fault of this script's own must not pass for a good run."""
        self.violations.append(f"{arguments.thread}: {arguments.exc_value!r}")

    def wrong(self, what: str) -> None:
        """Note what must not happen."""
        with self.lock:
            self.violations.append(what)

    def vector(self, text: str, name: str = soak_encoder.NAMES[0]) -> np.ndarray:
        """What an encoder gives for a text."""
        encoder = self.encoders[name]
        with self.lock:
            vector = encoder.encode_document([text])[0]
            encoder.encoded.clear()
            return vector

    # -- the promise --------------------------------------------------------------------------

    def watch(self) -> None:
        """Check one snapshot after the other."""
        while not self.stop.wait(0.5):
            try:
                self.try_claims()
                self.check()
            except LOST:
                self.count("checks lost")
            except sa.exc.ProgrammingError as error:
                # A column was renamed between the look at its binding and the snapshot.
                if sqlstate_of(error) not in RENAMED:
                    raise
                self.count("checks lost")

    def check(self) -> Counter[str]:
        """Every row of one snapshot of each table; returns how many are in which state."""
        states: Counter[str] = Counter()
        engine = self.engine
        with engine.begin() as connection:
            self.check_leases(connection)
            known = catalog.all_bindings(connection)
        for each in known:
            with engine.begin() as connection:
                # Its source's column may have another name now, or it may be gone.
                binding = catalog.binding_by_id(connection, each.id)
                rows = [] if binding is None else connection.execute(snapshot(binding)).all()
            if binding is not None:
                found = [(row, self.check_row(binding, row)) for row in rows]
                states.update(state for _, state in found)
                if binding.table == "quiet":
                    self.check_unseen({row.key for row, state in found if state == "pending"})
            self.count("rows checked", len(rows))
        self.count("rows seen fresh", states["embedded"])
        self.count("snapshots checked")
        return states

    def try_claims(self) -> None:
        """Two claims of one column, and a write of a text that has changed since it was read.

        In the transaction that makes something pending, since a worker might be faster else. What
        is pending otherwise is left to workers, who have to come for it.
        """
        quiet = ColumnIdentity(None, "quiet", "embedding")
        unseen, seen = (f"SET LOCAL session_replication_role = {r}" for r in ("replica", "origin"))
        with self.engine.begin() as connection:
            run = connection.exec_driver_sql
            rows = rows_of(connection, catalog.require_binding(connection, quiet))
            run(f"{unseen}; INSERT INTO quiet (title) VALUES ('claimed'); {seen}")
            lease = timedelta(minutes=1)
            chosen = [
                *claims.claim(connection, rows, CHANGED, token="one", most=16, lease=lease),
                *claims.claim(connection, rows, CHANGED, token="another", most=16, lease=lease),
            ]
            read = [row for row in rows.read(connection, chosen) if row.text == "claimed"]
            run(f"{unseen}; UPDATE quiet SET title = 'changed since' WHERE title = 'claimed'")
            vectors = {row.label: to_wire(self.vector(str(row.text)), "vector") for row in read}
            rows.write(connection, read, vectors)
            run(seen)
            for token in ("one", "another"):
                claims.release(connection, rows.binding, token)

    def check_leases(self, connection: sa.Connection) -> None:
        """No row is leased twice, unless its lease has ended or its worker."""
        for keys, twice in connection.exec_driver_sql("DELETE FROM leased RETURNING keys, twice"):
            self.count("leases seen")
            if twice:
                self.wrong(f"{twice} of {keys} leased rows are leased twice")

    def check_unseen(self, pending: set[str]) -> None:
        """Rows of which nobody is told are found in time, however often they are tried then."""
        with self.engine.begin() as connection:
            keys = "SELECT key FROM sbert.failure UNION SELECT unnest(keys) FROM sbert.claim"
            found = set(connection.exec_driver_sql(keys).scalars())
        now = time.monotonic()
        pending = {key for key in pending if f'["{key}"]' not in found}
        self.unseen = {key: self.unseen.get(key, now) for key in pending}
        for key, since in self.unseen.items():
            if now - since > self.options.unseen and not self.stop.is_set():
                self.wrong(f"quiet {key} has been pending for {now - since:.0f} s, and nobody came")

    def check_row(self, binding: catalog.Binding, row: sa.Row[Any]) -> str:
        """The state of one row; a violation is noted."""
        name = f"{binding.table} {row.key}"
        if row.stale:
            return "pending"
        if row.failed:
            if row.why == claims.ENDED and not self.at_rest:
                self.count("failed with its processes")
            elif "unencodable" not in str(row.text):
                self.wrong(f"{name}: {row.text!r} failed without a cause: {row.why}")
            return "failed"
        if binding.source.passages is not None:
            return "embedded"  # How it is cut is checked at the end.
        if row.text is None and binding.source.document is not None:
            return "pending"  # A passage of a document that was edited and is not cut again yet.
        if row.text is None:
            right = row.vector is None
        else:
            wanted = self.vector(row.text, binding.declared.name)
            right = row.vector is not None and bool(
                np.allclose(from_text(row.vector), wanted, atol=1e-6)
            )
            for name, sign in REWRITTEN.items():
                if sign in row.text:
                    self.count(f"rewritten by a trigger: {name}")
        if not right:
            self.wrong(f"{name}: {row.text!r} has {row.vector!s:.60}")
        return "embedded" if row.vector is not None else "without text"

    # -- the run ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """The whole run; returns the report."""
        self.prepare()
        seed = self.options.seed
        before, threading.excepthook = threading.excepthook, self.crashed
        writers = Writers(self.url, self.stop, self.count, self.vector, self.wrong)
        threads = writers.all(seed, self.options.writers)
        threads += soak_shelf.Readers(self.url, self.stop, self.count, self.wrong).all(seed)
        threads += soak_documents.Documents(self.url, self.stop, self.count, self.wrong).all(seed)
        threads += self.harm.all(seed)
        threads.append(threading.Thread(target=self.watch, daemon=True))
        for _ in range(self.options.workers):
            self.harm.start_worker()
        try:
            for thread in threads:
                thread.start()
            self.wait()
            for thread in threads:
                if not thread.is_alive():
                    self.wrong(f"{thread} has ended")
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(timeout=120)
            self.harm.kill_workers()
            threading.excepthook = before
        return self.finish()

    def harms(self) -> int:
        """How often anything was harmed."""
        with self.lock:
            return sum(self.counts[name] for name in HARMS)

    def seen(self) -> bool:
        """Whether what it is to end at was seen."""
        pattern = self.options.until
        with self.lock:
            return bool(pattern) and any(re.search(pattern, each) for each in self.violations)

    def wait(self) -> None:
        """Let it run: until its time is over or, as asked, enough harm is done or any is seen."""
        options = self.options
        start = time.monotonic()
        while not self.seen():
            self.stop.wait(0.2)
            spent = time.monotonic() - start
            enough = self.harms() >= options.least_harms or spent > 10 * options.seconds
            if spent > options.seconds and enough:
                return

    def finish(self) -> dict[str, Any]:
        """Drain what is left, with nothing in the way, and check every row."""
        engine = sa.create_engine(self.url)
        settings = WorkerSettings(max_attempts=2, backoff=timedelta(0))
        until = time.monotonic() + 240
        # What the last workers had in hand may fail with them, and is tried once more.
        refresh(engine, settings)
        with engine.begin() as connection:
            for binding in catalog.all_bindings(connection):
                retry(connection, binding)
        self.at_rest = True
        while True:
            done = refresh(engine, settings)
            with engine.begin() as connection:
                left = sum(
                    found.pending + found.backfill
                    for found in (counts(connection, b) for b in catalog.all_bindings(connection))
                )
            if (left == 0 and not done.embedded) or time.monotonic() > until:
                break
            time.sleep(0.3)
        engine.dispose()
        states = self.check()
        for key in soak_documents.torn(self.engine):
            self.wrong(f"document {key} has passages of another text")
        with self.engine.begin() as connection:
            orphans = connection.execute(
                sa.text(
                    "SELECT count(*) FROM sbert.claim UNION ALL "
                    "SELECT count(*) FROM sbert.failure WHERE key = ANY(:gone)"
                ),
                {"gone": list(GONE)},
            ).scalars()
            if any(orphans.all()):
                self.wrong("leases or failures of rows that are gone were left behind")
        return {
            "seconds": self.options.seconds,
            "seed": self.options.seed,
            "writes": sum(n for name, n in self.counts.items() if name.startswith("write: ")),
            "harms": self.harms(),
            "counts": dict(sorted(self.counts.items())),
            "at the end": dict(states),
            "still pending": left,
            "hardly happened": self.missing(),
            "violations": len(self.violations),
            "of each kind": [*{kind(each): each for each in self.violations}.values()],
        }

    def missing(self) -> list[str]:
        """What should have come up and hardly did, by its share or by its floor."""
        shares: list[tuple[str, Mapping[str, float]]] = [("", HARMS)]
        shares += [("isolation: ", Counter(ISOLATION))]
        shares += [("write: foreign vector ", Counter(INTRUSIONS) - Counter(["raw"]))]
        for table, kinds in TABLES.items():
            shares.append((f"write: {table}: ", {name: kinds[name][0] for name in kinds}))
        missing = []
        for prefix, weights in shares:
            happened = sum(self.counts[prefix + name] for name in weights)
            for name, weight in weights.items():
                due = happened * weight / sum(weights.values())
                if due > EXPECTED and self.counts[prefix + name] < due / 4:
                    missing.append(f"{prefix}{name}: {self.counts[prefix + name]}, due {due:.0f}")
        for name, rate in FLOORS.items():
            due = int(rate * max(self.options.seconds - START, 0))
            if self.counts[name] < due:
                missing.append(f"{name}: {self.counts[name]}, due {due}")
        return missing


def kind(violation: str) -> str:
    """A violation without the names and numbers that are its own."""
    return re.sub(r"'.*?'|\[.*|[\d./-]+", "", violation)


def snapshot(binding: catalog.Binding) -> sa.Select[Any]:
    """Rows of a bound table with what they say of themselves, of one moment."""
    table = binding.clause()
    keys = [table.c[name] for name in binding.key_columns]
    record = catalog.tables.failure.c
    why = sa.select(record.error).where(
        record.binding_id == binding.id, record.key == array_label(keys)
    )
    return sa.select(
        sa.func.concat_ws("/", *(sa.cast(key, sa.Text) for key in keys)).label("key"),
        why.scalar_subquery().label("why"),
        binding.expressions.on(table, "text").label("text"),
        sa.cast(table.c[binding.column], sa.Text).label("vector"),
        binding.is_stale(table).label("stale"),
        binding.expressions.on(table, "failed").label("failed"),
    )


def good(report: dict[str, Any]) -> bool:
    """Whether the promise held, and was put to the test at all."""
    states = report["at the end"]
    return (
        not report["violations"]
        and not report["still pending"]
        and not report["hardly happened"]
        and states.get("embedded", 0) > max(50, 4 * states.get("failed", 0))
        and report["writes"] > 2 * report["seconds"]
        and report["harms"] > report["seconds"] / 8
    )


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """One run on a server of its own; returns the report."""
    version = int(os.environ.get("SBERT_PG_TEST_POSTGRES", "18"))
    with fresh_server(SETTINGS, postgres_version=version) as server:
        return Soak(server, options, server.data_dir.parent).run()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--seconds", type=float, default=60)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--writers", type=int, default=4)
    made.add_argument("--workers", type=int, default=3)
    made.add_argument(
        "--unseen",
        type=float,
        default=180,
        help="seconds after which a row that no trigger saw has its vector, whatever is killed",
    )
    made.add_argument("--restart-every", type=float, default=30, help="seconds, on average")
    made.add_argument("--until", default="", help="end at the first violation like this pattern")
    made.add_argument(
        "--least-harms", type=int, default=0, help="go on for up to ten times as long for so many"
    )
    return made


def main() -> int:
    report = soak(parser().parse_args())
    print(json.dumps(report, indent=2))
    return 0 if good(report) else 1


if __name__ == "__main__":
    sys.exit(main())
