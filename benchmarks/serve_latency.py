"""How much later than the encoder itself `sbert-pg serve` and `CALL sbert.embed` answer.

    python benchmarks/serve_latency.py [--questions 300] [--encoder all-MiniLM-L6-v2]

The server and a worker are processes of their own, as in production, on an embedded PostgreSQL with
its usual durability. Each question, never asked before, is encoded in this process, asked of
`/v1/embeddings` over a kept connection, and asked by `CALL sbert.embed`, one after the other, so
that whatever else the machine does meets all three. Printed are percentiles in milliseconds, and
those of the differences between a way and the encoding of the same question just before.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import psycopg
import sqlalchemy as sa
from bench_server import fresh_server

from sbert_pg import create_all, get_encoder
from sbert_pg.catalog.embedding import Embedding

COMMAND = [sys.executable, "-m", "sbert_pg.cli.app"]
CALL = "CALL sbert.embed('article.embedding', %s, NULL, 60)"
PERCENTILES = (10, 50, 90, 99)


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of the library while the block runs."""
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def port_of(process: subprocess.Popen[str]) -> int:
    """The port that a server says it listens on."""
    assert process.stderr is not None
    for line in process.stderr:
        if "http://" in line:
            return int(line.rstrip().rpartition(":")[2])
    raise SystemExit("sbert-pg serve has ended.")


def asker_of_http(port: int, encoder: str) -> Callable[[str], None]:
    """Ask ``/v1/embeddings`` over one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def ask(question: str) -> None:
        body = json.dumps({"model": encoder, "input": [question], "input_type": "query"})
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        json.loads(answer.read())

    return ask


def milliseconds(work: Callable[[str], object], question: str) -> float:
    started = time.perf_counter()
    work(question)
    return (time.perf_counter() - started) * 1000


def report(name: str, values: np.ndarray) -> None:
    figures = "  ".join(f"p{p} {np.percentile(values, p):7.2f}" for p in PERCENTILES)
    print(f"{name:34}{figures}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--encoder", default="all-MiniLM-L6-v2")
    options = parser.parse_args()
    encoder = get_encoder(options.encoder)
    with fresh_server() as server:
        engine = sa.create_engine(server.ensure_database("bench"))
        table = sa.Table(
            "article",
            sa.MetaData(),
            sa.Column("title", sa.Text, primary_key=True),
            sa.Column("embedding", Embedding(options.encoder, source="title")),
        )
        with engine.begin() as connection:
            create_all(connection, table.metadata)
        engine.dispose()
        serve = ("serve", "--encoder", options.encoder, "--http", "127.0.0.1:0")
        dsn = server.dsn("bench")
        with running(*serve) as http_, running("worker", "-d", dsn) as worker:
            with psycopg.connect(dsn, autocommit=True) as connection:
                measure(options.questions, {
                    "encoding alone": lambda q: encoder.encode_query([q]),
                    "/v1/embeddings": asker_of_http(port_of(http_), options.encoder),
                    "CALL sbert.embed": lambda q: connection.execute(CALL, [q]),
                })  # fmt: skip
            assert worker.poll() is None


def measure(questions: int, ways: dict[str, Callable[[str], object]]) -> None:
    """Ask each question each way, and print the times."""
    deadline = time.monotonic() + 60
    while True:
        try:
            for work in ways.values():
                work(f"warming up at {time.monotonic()}")
            break
        except psycopg.DatabaseError as error:
            if "no worker" not in str(error) or time.monotonic() > deadline:
                raise SystemExit(str(error)) from error
            time.sleep(0.2)
    texts = [f"which of the {n} shops has kettle number {n * 7919}?" for n in range(questions)]
    for work in ways.values():
        for n in range(20):
            work(f"warming up, question {n}")
    taken = np.array([[milliseconds(work, text) for work in ways.values()] for text in texts])
    for column, name in enumerate(ways):
        report(name, taken[:, column])
    for column, name in enumerate(ways):
        if column:
            report(f"{name}, over encoding", taken[:, column] - taken[:, 0])


if __name__ == "__main__":
    main()
