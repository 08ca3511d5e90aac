"""How fast pending rows are worked off, and how soon a single row can be found.

Drain: a table of pending rows is worked off by one and by two workers (processes), and the same
texts are encoded by the same encoder with no database, in turn, several times. Rows per second are
wall-clock, the ratio is what counts.

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
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.embedded import embedded_server
from sbert_pg.encoder import Encoder
from sbert_pg.registry import use_encoder
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.guard import ColumnIdentity
from sbert_pg.worker import WorkerSettings, refresh, worker_thread

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
        catalog.bind(connection, IDENTITY, spec, Source.of("body"), mark_pending=True)


def encoder_alone(encoder: Encoder, rows: list[str]) -> float:
    """Seconds to encode the texts in the worker's batches and with the worker's two threads."""
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        for _ in pool.map(encoder.encode_document, batches):
            pass
    return time.perf_counter() - started


def work(url: str, ready: Any, start: Any, threads: int | None) -> None:
    """One worker process, which has its encoder loaded before the clock starts."""
    use_encoder(Encoder.load(NAME, threads=threads), name=NAME)
    ready.release()
    start.wait()
    engine = sa.create_engine(url)
    refresh(engine, WorkerSettings(batch_size=BATCH))
    engine.dispose()


def drain(url: sa.URL, workers: int) -> float:
    """Seconds in which so many worker processes work off what is pending."""
    context = multiprocessing.get_context("spawn")
    ready, start = context.Semaphore(0), context.Event()
    text = url.render_as_string(hide_password=False)
    threads = None if workers == 1 else 1
    made = [
        context.Process(target=work, args=(text, ready, start, threads)) for _ in range(workers)
    ]
    for process in made:
        process.start()
    for _ in made:
        ready.acquire()
    started = time.perf_counter()
    start.set()
    for process in made:
        process.join()
    return time.perf_counter() - started


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
    with tempfile.TemporaryDirectory(prefix="sbert-pg-drain-") as name:
        Path(name).chmod(0o755)
        with embedded_server(Path(name) / "data", settings=settings) as server:
            url = server.ensure_database("drain")
            engine = sa.create_engine(url)
            with engine.begin() as connection:
                catalog.upgrade(connection)
            for _ in range(options.repeat):
                seconds = {"encoder": encoder_alone(encoder, rows)}
                for workers in (1, 2):
                    load(engine, rows)
                    seconds[f"workers_{workers}"] = drain(url, workers)
                seconds["encoder again"] = encoder_alone(encoder, rows)
                report["rounds"].append(summary(options.rows, seconds))
            report["latency"] = latency(
                engine, server.dsn("drain"), encoder, rows[: options.latency_rows]
            )
            engine.dispose()
    print(json.dumps(report, indent=2))
    return 0


def summary(count: int, seconds: dict[str, float]) -> dict[str, float]:
    """Rows per second, and what of the encoder's own speed is left."""
    alone = (seconds["encoder"] + seconds["encoder again"]) / 2
    return {
        "encoder_rows_per_s": count / alone,
        "one_worker_rows_per_s": count / seconds["workers_1"],
        "two_workers_rows_per_s": count / seconds["workers_2"],
        "one_worker_ratio": alone / seconds["workers_1"],
        "two_workers_ratio": alone / seconds["workers_2"],
    }


if __name__ == "__main__":
    sys.exit(main())
