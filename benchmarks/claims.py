"""What a claim costs while a long queue is worked off, with and without an old snapshot elsewhere.

    python benchmarks/claims.py [--rows 1000000] [--batch 256] [--claims 240] [--workers 1 4 16]

A table of rows that were there before its column was bound, and as many new ones in another round.
Rows are claimed and read in the order of their keys, by a cursor, as a worker does; those up to the
next claim are then made fresh by one statement, so that what is left behind is the same as after
encoding them and the time goes into claims. Printed: milliseconds of the server's CPU time a claim
(median) in each eighth of the queue, for the backfill and for new rows, without and with a
transaction that holds a snapshot from before it began. Then milliseconds of the server's and this
process's CPU time a claim where so many workers claim in turn, each with six batches in hand: one
claims at a time, so these times are added up over a fleet. CPU time, since other programs may share
the machine. Runs on an embedded server of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import timedelta

import sqlalchemy as sa
from bench_server import cpu_seconds, fresh_server

from sbert_pg import catalog
from sbert_pg.freshness import claims
from sbert_pg.freshness.queue import BACKFILL, CHANGED, Class, Key
from sbert_pg.freshness.rows import Rows, rows_of
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity

SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "8GB", "synchronous_commit": "off"}
IDENTITY = ColumnIdentity(None, "note", "embedding")
FILL = "INSERT INTO note (id, body) SELECT i, 'text number ' || i FROM generate_series(1, {}) AS i"


def prepare(engine: sa.Engine, class_: Class, rows: int) -> Rows:
    """A table whose rows are all of one class."""
    with engine.begin() as connection:
        run = connection.exec_driver_sql
        run("DROP TABLE IF EXISTS note")
        run("SELECT sbert.prune_v1()")
        run("CREATE TABLE note (id int PRIMARY KEY, body text, embedding vector(8))")
        if class_ == BACKFILL:
            run(FILL.format(rows))
        spec = EncoderSpec(name="bench", dimensions=8)
        catalog.bind(connection, IDENTITY, spec, Source.of("body"))
        if class_ == CHANGED:
            run(FILL.format(rows))
    with engine.begin() as connection:
        return rows_of(connection, catalog.require_binding(connection, IDENTITY))


def claim(engine: sa.Engine, rows: Rows, class_: Class, most: int, after: Key | None) -> Key | None:
    """Claim and read a batch, give the lease back; the key of its last row."""
    with engine.begin() as connection:
        chosen = claims.claim(
            connection, rows, class_, token="bench", most=most, lease=timedelta(seconds=60),
            after=after,
        )  # fmt: skip
    with engine.begin() as connection:
        rows.prepare(connection)
        rows.read(connection, chosen)
        claims.release(connection, rows.binding, "bench")
    return chosen[-1].key if chosen else None


def drain(engine: sa.Engine, rows: Rows, class_: Class, options: argparse.Namespace) -> list[float]:
    """Milliseconds of each claim, from the first to the last row."""
    step = options.rows // options.claims
    digest = rows.binding.expressions.bare("digest").replace("%", "%%")
    spent, after = [], None
    with engine.connect() as connection:
        # The pool's one connection, and so the process that does it all.
        backend = connection.scalar(sa.select(sa.func.pg_backend_pid()))
    for number in range(options.claims):
        started = cpu_seconds(backend)
        after = claim(engine, rows, class_, options.batch, after)
        spent.append(1e3 * (cpu_seconds(backend) - started))
        with engine.begin() as connection:
            statements = (
                "UPDATE note SET embedding = '[1,2,3,4,5,6,7,8]' WHERE id > %(a)s AND id <= %(b)s",
                f"UPDATE note SET embedding_of = {digest} WHERE id > %(a)s AND id <= %(b)s",
            )
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            for each in statements:
                bounds = {"a": number * step, "b": (number + 1) * step}
                connection.exec_driver_sql(each, bounds)
        if after is not None:
            last = min((number + 1) * step, options.rows)
            after = ((after[0][0], last.to_bytes(4, "big")),)
    return spent


def report(engine: sa.Engine, class_: Class, held: bool, options: argparse.Namespace) -> None:
    """One line of the report."""
    rows = prepare(engine, class_, options.rows)
    with engine.connect() as other:
        if held:
            other.execution_options(isolation_level="REPEATABLE READ")
            other.execute(sa.text("SELECT count(*) FROM sbert.binding"))
        spent = drain(engine, rows, class_, options)
        other.rollback()
    eighth = len(spent) // 8
    medians = [statistics.median(spent[i * eighth : (i + 1) * eighth]) for i in range(8)]
    words = f"{'backfill' if class_ == BACKFILL else 'new rows'}, {'old' if held else 'no old'}"
    print(f"{words} snapshot: " + " ".join(f"{ms:.1f}" for ms in medians), end="")
    print(f"   last to first {medians[-1] / medians[0]:.2f}", flush=True)


def fleet(engine: sa.Engine, workers: int, options: argparse.Namespace) -> None:
    """Claims in turn, while all have their hands full."""
    engine.dispose()  # One connection from here on, whose process does it all.
    rows = prepare(engine, BACKFILL, (6 * workers + 60) * options.batch)
    after: list[Key | None] = [None] * workers
    server, here = [], []
    with engine.connect() as connection:
        backend = connection.scalar(sa.select(sa.func.pg_backend_pid()))
    for number in range(6 * workers + 50):
        started, began = cpu_seconds(backend), time.process_time()
        with engine.begin() as connection:
            chosen = claims.claim(
                connection, rows, BACKFILL, token=str(number), most=options.batch,
                lease=timedelta(seconds=600), after=after[number % workers],
            )  # fmt: skip
        after[number % workers] = chosen[-1].key
        if number >= 6 * workers:
            server.append(1e3 * (cpu_seconds(backend) - started))
            here.append(1e3 * (time.process_time() - began))
            with engine.begin() as connection:
                claims.release(connection, rows.binding, str(number - 6 * workers))
    print(
        f"{workers} workers: server {statistics.median(server):.1f}, "
        f"here {statistics.median(here):.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--claims", type=int, default=240)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4, 16])
    options = parser.parse_args()
    with fresh_server(SETTINGS) as server:
        engine = sa.create_engine(server.ensure_database("bench"))
        with engine.begin() as connection:
            catalog.upgrade(connection)
        for class_ in (BACKFILL, CHANGED):
            for held in (False, True):
                report(engine, class_, held, options)
        for workers in options.workers:
            fleet(engine, workers, options)
        engine.dispose()


if __name__ == "__main__":
    main()
