"""How fast pending rows are worked off, and how soon a single row can be found.

Drain: a table of pending rows is worked off by one and by two workers (processes), and the same
texts are encoded by the same encoder with no database, in turn, several times. Rows per second are
wall-clock, and the ratio is what counts. Where other programs share the machine even that is
uncertain, so CPU time a row is given as well: of the encoder alone, of the workers, of the server.

Latency: with an idle worker, one row at a time is committed, and the time until its vector can be
seen by another connection is taken; the time to encode that text alone is subtracted.

    python benchmarks/drain.py --rows 100000
    python benchmarks/drain.py --rows 5000 --repeat 3

Texts are package descriptions of the Debian system it runs on (``apt-cache dumpavail``), or made-up
sentences where there are none. The encoder is all-MiniLM-L6-v2 in its default precision.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from bench_server import fresh_server

from sbert_pg import catalog
from sbert_pg.encoder import Encoder
from sbert_pg.freshness import WorkerSettings, refresh, worker_thread
from sbert_pg.process import usable_cores
from sbert_pg.registry import use_encoder
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity

NAME = "sentence-transformers/all-MiniLM-L6-v2"
IDENTITY = ColumnIdentity("public", "note", "embedding")
BATCH = 256


def texts(count: int) -> list[str]:
    """Short real texts, mixed by chance, each different."""
    found: list[str] = []
    if shutil.which("apt-cache"):
        dump = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True).stdout
        found = sorted(
            {
                line.partition(": ")[2]
                for line in dump.splitlines()
                if line.startswith(("Description: ", "Description-en: "))
            }
        )
    if not found:
        words = [
            "the",
            "a",
            "small",
            "large",
            "library",
            "program",
            "tool",
            "for",
            "of",
            "with",
            "and",
            "data",
            "image",
            "sound",
        ]
        chance = random.Random(0)
        found = [" ".join(chance.choices(words, k=12)) for _ in range(min(count, 20_000))]
    random.Random(1).shuffle(found)
    return [f"{found[i % len(found)]} {i // len(found) or ''}".strip() for i in range(count)]


def load(engine: sa.Engine, rows: list[str]) -> None:
    """A table whose rows are all pending."""
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS note")
        connection.exec_driver_sql("SELECT sbert.prune_v1()")
        connection.exec_driver_sql(
            "CREATE TABLE note (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text, "
            "embedding vector(384))"
        )
        driver = connection.connection.driver_connection
        with driver.cursor().copy("COPY note (body) FROM STDIN") as copy:
            for text in rows:
                copy.write_row((text,))
        spec = EncoderSpec.of(NAME)
        catalog.bind(connection, IDENTITY, spec, Source.of("body"))


@dataclass
class Spent:
    """What one way of encoding all rows took, in seconds."""

    wall: float
    cpu: float
    server_cpu: float = 0.0


def encoder_alone(encoder: Encoder, rows: list[str]) -> Spent:
    """Encode the texts in the worker's batches and with the worker's two threads."""
    started, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        for _ in pool.map(encoder.encode_document, batches):
            pass
    return Spent(time.perf_counter() - started, time.process_time() - cpu)


def server_cpu(postmaster: int) -> float:
    """CPU seconds of the server so far, of processes that have ended as well."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has just ended.
        if int(stat.parent.name) == postmaster:
            ticks += sum(int(field) for field in fields[11:15])
        elif int(fields[1]) == postmaster:
            ticks += sum(int(field) for field in fields[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def work(url: str, ready: Any, start: Any, threads: int | None, cpu: Any) -> None:
    """One worker process, which has its encoder loaded before the clock starts."""
    encoder = Encoder.load(NAME, threads=threads)
    use_encoder(encoder, name=NAME)
    # As warm as the encoder that it is compared with.
    encoder.encode_document(texts(2 * BATCH))
    _ = encoder.probe_vectors
    engine = sa.create_engine(url)
    with engine.connect():
        pass
    ready.release()
    start.wait()
    before = time.process_time()
    refresh(engine, WorkerSettings(columns=("note.embedding",), batch_size=BATCH))
    cpu.put(time.process_time() - before)
    engine.dispose()


def drain(url: sa.URL, workers: int, postmaster: int) -> Spent:
    """Let so many worker processes work off what is pending."""
    context = multiprocessing.get_context("spawn")
    ready, start = context.Semaphore(0), context.Event()
    text = url.render_as_string(hide_password=False)
    threads = max(1, usable_cores() // workers)
    cpu = context.Queue()
    made = [
        context.Process(target=work, args=(text, ready, start, threads, cpu))
        for _ in range(workers)
    ]
    for process in made:
        process.start()
    for _ in made:
        ready.acquire()
    started, before = time.perf_counter(), server_cpu(postmaster)
    start.set()
    spent = sum(cpu.get() for _ in made)
    wall, after = time.perf_counter() - started, server_cpu(postmaster)
    for process in made:
        process.join()
    return Spent(wall, spent, after - before)


def latency(engine: sa.Engine, dsn: str, encoder: Encoder, rows: list[str]) -> dict[str, float]:
    """Milliseconds from commit to searchable, and of the encoding that is part of it."""
    totals, encodings = [], []
    with (
        worker_thread(engine, WorkerSettings(poll_interval=60)) as worker,
        psycopg.connect(dsn, autocommit=True) as writer,
        psycopg.connect(dsn, autocommit=True) as reader,
    ):
        while not worker.tally.listening:
            time.sleep(0.01)
        for text in rows:
            key = writer.execute(
                "INSERT INTO note (body) VALUES (%s) RETURNING id", [text]
            ).fetchone()
            started = time.perf_counter()
            done = "SELECT 1 FROM note WHERE id = %s AND embedding IS NOT NULL"
            while reader.execute(done, key).fetchone() is None:
                time.sleep(0.0005)
            totals.append(1000 * (time.perf_counter() - started))
            started = time.perf_counter()
            encoder.encode_document([text])
            encodings.append(1000 * (time.perf_counter() - started))
            time.sleep(random.uniform(0.005, 0.03))
    over = [total - encoding for total, encoding in zip(totals, encodings, strict=True)]
    return {
        "rows": len(totals),
        "p50_ms": statistics.median(totals),
        "p95_ms": statistics.quantiles(totals, n=20)[18],
        "encoding_p50_ms": statistics.median(encodings),
        "over_encoding_p50_ms": statistics.median(over),
        "over_encoding_p95_ms": statistics.quantiles(over, n=20)[18],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--latency-rows", type=int, default=200)
    options = parser.parse_args()
    rows = texts(options.rows)
    encoder = Encoder.load(NAME)
    use_encoder(encoder, name=NAME)
    encoder.encode_document(rows[:512])
    report: dict[str, Any] = {"rows": options.rows, "rounds": []}
    settings = {"shared_buffers": "1GB", "max_wal_size": "4GB"}
    with fresh_server(settings) as server:
        url = server.ensure_database("drain")
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            catalog.upgrade(connection)
        pid = int((server.data_dir / "postmaster.pid").read_text().splitlines()[0])
        for _ in range(options.repeat):
            spent = {0: encoder_alone(encoder, rows)}
            for workers in (1, 2):
                load(engine, rows)
                spent[workers] = drain(url, workers, pid)
            again = encoder_alone(encoder, rows)
            report["rounds"].append(summary(options.rows, spent, again))
        report["median"] = {
            name: statistics.median(r[name] for r in report["rounds"])
            for name in report["rounds"][0]
        }
        report["latency"] = latency(
            engine, server.dsn("drain"), encoder, rows[: options.latency_rows]
        )
        engine.dispose()
    print(json.dumps(report, indent=2))
    return 0


def summary(count: int, spent: dict[int, Spent], again: Spent) -> dict[str, float]:
    """Rows per second, what of the encoder's own speed is left, and microseconds of CPU a row."""
    alone = (spent[0].wall + again.wall) / 2
    encoding = (spent[0].cpu + again.cpu) / 2
    report = {"encoder_rows_per_s": count / alone, "encoder_cpu_us": 1e6 * encoding / count}
    for workers, name in ((1, "one_worker"), (2, "two_workers")):
        took = spent[workers]
        report |= {
            f"{name}_rows_per_s": count / took.wall,
            f"{name}_ratio": alone / took.wall,
            f"{name}_cpu_us": 1e6 * took.cpu / count,
            f"{name}_server_cpu_us": 1e6 * took.server_cpu / count,
            f"{name}_cpu_ratio": encoding / (took.cpu + took.server_cpu),
        }
    return {key: round(value, 3) for key, value in report.items()}


if __name__ == "__main__":
    sys.exit(main())
