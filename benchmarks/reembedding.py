"""What re-embedding costs: against the encoder alone, on disk, for others, and by ways of writing.

Throughput: the new column of a table is filled by the real all-MiniLM-L6-v2, and the same texts are
encoded by the same encoder with no database, in turn, several times. Where other programs share the
machine wall-clock is uncertain even as a ratio, so the ratio of CPU time is given as well (of this
process; the server's is apart), and the share of the time in which the encoder was at work, that
is, waited for neither reading nor writing. Then WAL and growth of the table, per row.

Foreground: a reader searches the old column and a writer changes texts, without anything else going
on, while the new column is filled, and while its index is built.

Ways: vectors that are there already are written into existing rows by the backfill and by what
people write by hand, each with and without a vector index on the new column.

    python benchmarks/reembedding.py --rows 3000 --repeat 3
    python benchmarks/reembedding.py --part ways

Texts are the docstrings of Python's standard library. Runs on an embedded server of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import sqlalchemy as sa
from bench_server import fresh_server
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, embedding_column, hnsw_index, nearest
from sbert_pg import reembed as ree
from sbert_pg.cli.demo_data import standard_library
from sbert_pg.encoder import Encoder
from sbert_pg.freshness import WorkerSettings, backfill
from sbert_pg.registry import use_encoder
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

NAME = "sentence-transformers/all-MiniLM-L6-v2"
SETTINGS = {"max_connections": "60", "shared_buffers": "1GB", "max_wal_size": "4GB"}
WIDTH = 384
COLUMN = ColumnIdentity("public", "doc", "embedding_new")
INDEX = "ix_doc_embedding_new"
#: The backfill's own.
BATCH = WorkerSettings().batch_size


class Base(DeclarativeBase):
    """Declarations of the application."""


class Doc(Base):
    """A row with the column that is to be replaced."""

    __tablename__ = "doc"
    __table_args__ = (hnsw_index("ix_doc_embedding", "embedding"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    embedding = embedding_column(
        EncoderSpec(name="words", dimensions=WIDTH), source="body", nullable=True
    )


class New(DeclarativeBase):
    """Declarations of the new version."""


class NewDoc(New):
    """The same row with the new column."""

    __tablename__ = "doc"
    __table_args__ = (hnsw_index(INDEX, "embedding_new"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    embedding_new = embedding_column(
        EncoderSpec.of(NAME), source="body", nullable=True,
        replaces="embedding",
    )  # fmt: skip


class Instant(DeterministicEncoder):
    """An encoder that takes no time, so that writing is all that is measured."""

    def __init__(self, name: str, salt: str = "") -> None:
        super().__init__(name, WIDTH, salt=salt)
        random = np.random.default_rng(1)
        vectors = random.standard_normal((4096, WIDTH), dtype=np.float32)
        self.some = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_document(self, texts: Any) -> Any:
        """Any vectors."""
        return self.some[np.arange(len(texts)) % 4096]


class Timed:
    """An encoder that notes when it was at work."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.spec = encoder.spec
        self.probe_vectors = encoder.probe_vectors
        self.at_work: list[tuple[float, float]] = []

    def encode_query(self, texts: Any) -> Any:
        """As the encoder does."""
        return self.encoder.encode_query(texts)

    def encode_document(self, texts: Any) -> Any:
        """As the encoder does."""
        started = time.perf_counter()
        vectors = self.encoder.encode_document(texts)
        self.at_work.append((started, time.perf_counter()))
        return vectors

    def busy(self) -> float:
        """Seconds in which at least one thread encoded, since the last time this was asked."""
        total, until = 0.0, 0.0
        for started, ended in sorted(self.at_work):
            total += max(0.0, ended - max(started, until))
            until = max(until, ended)
        self.at_work.clear()
        return total


def corpus(rows: int) -> list[str]:
    """Docstrings, each different."""
    found = list(dict.fromkeys(each.docstring for each in standard_library()))
    # Spread over the library, so that lengths are mixed.
    random = np.random.default_rng(5)
    random.shuffle(found)
    return [found[i % len(found)] + ("" if i < len(found) else f" {i}") for i in range(rows)]


class Bench:
    """One database with a table whose old column is filled and indexed."""

    def __init__(self, engine: sa.Engine, texts: list[str]) -> None:
        self.engine = engine
        self.texts = texts
        self.request = ree.request_of(NewDoc.__table__.c.embedding_new)
        use_encoder(DeterministicEncoder("words", WIDTH))
        use_encoder(Instant(NAME, "instant"))
        with engine.begin() as connection:
            create_all(connection, Base.metadata)
        self.reset()

    def reset(self, *, index: bool = False) -> None:
        """The state after *begin*, in a table that was written once and vacuumed."""
        ree.abort(self.engine, COLUMN)
        instant = Instant("words")
        with self.engine.begin() as connection:
            connection.execute(sa.text("TRUNCATE doc"))
            connection.execute(sa.text("DROP INDEX IF EXISTS ix_doc_embedding"))
            rows = [
                {"id": i, "body": text, "embedding": vector}
                for i, (text, vector) in enumerate(
                    zip(self.texts, instant.encode_document(self.texts), strict=True)
                )
            ]
            connection.execute(sa.insert(Doc), rows)
            for each in Doc.__table__.indexes:
                each.create(connection)
        ree.begin(self.engine, self.request)
        if index:
            with self.engine.begin() as connection:
                for each in NewDoc.__table__.indexes:
                    each.create(connection)
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM ANALYZE doc"))
            connection.execute(sa.text("CHECKPOINT"))

    def scalar(self, statement: str) -> Any:
        """One value."""
        with self.engine.connect() as connection:
            return connection.execute(sa.text(statement)).scalar()

    @contextmanager
    def measured(self, into: dict[str, float]) -> Iterator[None]:
        """Wall-clock, CPU time of this process, WAL and growth of the table while a block runs."""
        size = "SELECT pg_table_size('doc')"
        position, bytes_before = self.scalar("SELECT pg_current_wal_lsn()::text"), self.scalar(size)
        started, cpu = time.perf_counter(), time.process_time()
        yield
        into["seconds"] = time.perf_counter() - started
        into["cpu"] = time.process_time() - cpu
        into["wal"] = float(
            self.scalar(f"SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '{position}')")
        )
        into["growth"] = float(self.scalar(size) - bytes_before)


def throughput(bench: Bench, repeat: int) -> dict[str, Any]:
    """Re-embedding against the encoder alone, in turn."""
    encoder = Timed(Encoder.load(NAME))
    use_encoder(encoder)
    rows = len(bench.texts)
    alone_s, alone_cpu, wall, cpu, busy, last = [], [], [], [], [], {}
    for number in range(repeat + 1):
        bench.reset()
        started, used = time.perf_counter(), time.process_time()
        for first in range(0, rows, BATCH):
            encoder.encode_document(bench.texts[first : first + BATCH])
        alone_s.append(time.perf_counter() - started)
        alone_cpu.append(time.process_time() - used)
        encoder.busy()
        last = {}
        with bench.measured(last):
            done = backfill(bench.engine, COLUMN, WorkerSettings())
        assert done.rows == rows, done
        wall.append(last["seconds"])
        cpu.append(last["cpu"])
        busy.append(encoder.busy() / last["seconds"])
        if number == 0:
            # The first round warms up.
            alone_s, alone_cpu, wall, cpu, busy = [], [], [], [], []
    pairs = list(zip(alone_s, wall, strict=True))
    return {
        "rows": rows,
        "encoder alone, texts/s": round(rows / statistics.median(alone_s)),
        "re-embedding, rows/s": round(rows / statistics.median(wall)),
        "ratio, wall-clock": round(statistics.median(a / b for a, b in pairs), 3),
        "ratios, wall-clock": [round(a / b, 3) for a, b in pairs],
        "ratio, CPU of this process": round(
            statistics.median(a / b for a, b in zip(alone_cpu, cpu, strict=True)), 3
        ),
        "share of the time in which the encoder was at work": round(statistics.median(busy), 3),
        "WAL a row, bytes": round(last["wal"] / rows),
        "growth of the table a row, bytes": round(last["growth"] / rows),
    }


def foreground(bench: Bench, seconds: float) -> dict[str, Any]:
    """Latency of a reader and a writer: alone, during the backfill, during the build."""
    use_encoder(Encoder.load(NAME))
    bench.reset()
    vectors = Instant("words").some
    found = {"quiet": _during(bench, vectors, lambda stop: time.sleep(seconds))}
    found["backfill"] = _during(
        bench, vectors, lambda stop: backfill(bench.engine, COLUMN, WorkerSettings())
    )
    found["index build"] = _during(
        bench, vectors, lambda stop: ree.build_indexes(bench.engine, COLUMN)
    )
    return found


def _during(
    bench: Bench, vectors: Any, work: Callable[[threading.Event], object]
) -> dict[str, Any]:
    stop, times = threading.Event(), {"search": [], "write": []}
    random = np.random.default_rng(3)

    def loop(name: str, do: Callable[[sa.Connection], object]) -> None:
        with bench.engine.connect() as connection:
            while not stop.wait(0.01):
                started = time.perf_counter()
                do(connection)
                connection.commit()
                times[name].append(time.perf_counter() - started)

    def search(connection: sa.Connection) -> object:
        vector = vectors[random.integers(4096)]
        return connection.execute(nearest(Doc.__table__.c.embedding, vector, limit=10)).all()

    def write(connection: sa.Connection) -> object:
        change = sa.text("UPDATE doc SET body = body || '.' WHERE id = :id")
        return connection.execute(change, {"id": int(random.integers(len(bench.texts)))})

    threads = [
        threading.Thread(target=loop, args=pair) for pair in (("search", search), ("write", write))
    ]
    for thread in threads:
        thread.start()
    work(stop)
    stop.set()
    for thread in threads:
        thread.join()
    return {
        name: {
            "count": len(seen),
            "p50_ms": round(1000 * float(np.quantile(seen, 0.5)), 2),
            "p95_ms": round(1000 * float(np.quantile(seen, 0.95)), 2),
            "longest_ms": round(1000 * max(seen), 1),
        }
        for name, seen in times.items()
        if seen
    }


def ways(bench: Bench, repeat: int) -> dict[str, Any]:
    """Ways of writing vectors that are there, without and with an index on the column."""
    use_encoder(Instant(NAME, "instant"))
    vectors = Instant(NAME).encode_document(bench.texts)
    found: dict[str, Any] = {}
    chosen: dict[str, Callable[[], object]] = {
        "backfill (this library)": lambda: backfill(bench.engine, COLUMN),
        "ORM assign and flush": lambda: _orm(bench, vectors),
        "ORM bulk update by key": lambda: _orm_bulk(bench, vectors),
        "COPY, UPDATE ... FROM": lambda: _copy(bench, vectors),
    }
    for index in (False, True):
        results: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for _ in range(1 if index else repeat):
            for name, way in chosen.items():
                bench.reset(index=index)
                one: dict[str, float] = {}
                with bench.measured(one):
                    way()
                assert bench.scalar("SELECT count(embedding_new) FROM doc") == len(bench.texts)
                results[name].append(one)
        found["with an index" if index else "without an index"] = {
            name: {
                "rows/s": round(len(bench.texts) / statistics.median(r["seconds"] for r in runs)),
                "WAL a row": round(runs[-1]["wal"] / len(bench.texts)),
                "growth a row": round(runs[-1]["growth"] / len(bench.texts)),
            }
            for name, runs in results.items()
        }
    bench.reset()
    backfill(bench.engine, COLUMN)
    started = time.perf_counter()
    ree.build_indexes(bench.engine, COLUMN)
    found["building the index afterwards, seconds"] = round(time.perf_counter() - started, 2)
    return found


def _orm(bench: Bench, vectors: Any) -> None:
    with Session(bench.engine) as session:
        for first in range(0, len(vectors), 1000):
            wanted = sa.select(NewDoc).where(NewDoc.id.between(first, first + 999))
            for doc in session.scalars(wanted.order_by(NewDoc.id)):
                doc.embedding_new = vectors[doc.id]
            session.commit()


def _orm_bulk(bench: Bench, vectors: Any) -> None:
    with Session(bench.engine) as session:
        for first in range(0, len(vectors), 1000):
            rows = range(first, min(first + 1000, len(vectors)))
            session.execute(
                sa.update(NewDoc), [{"id": i, "embedding_new": vectors[i]} for i in rows]
            )
            session.commit()


def _copy(bench: Bench, vectors: Any) -> None:
    """As somebody writes it who knows PostgreSQL: a temporary table, text on the wire."""
    with bench.engine.begin() as connection:
        connection.execute(
            sa.text(f"CREATE TEMP TABLE made (id int, v vector({WIDTH})) ON COMMIT DROP")
        )
        raw: Any = connection.connection.driver_connection
        with raw.cursor().copy("COPY made FROM STDIN") as copy:
            for i, vector in enumerate(vectors):
                copy.write_row((i, "[" + ",".join(map(str, vector.tolist())) + "]"))
        # What plain SQL says of a vector that its encoder made.
        fingerprint = connection.execute(
            sa.text(
                "SELECT e.fingerprint FROM sbert.binding b JOIN sbert.encoder e "
                "ON e.id = b.encoder_id WHERE b.column_name = 'embedding_new'"
            )
        ).scalar()
        connection.execute(
            sa.text(
                "UPDATE doc SET embedding_new = v, embedding_new_of = sbert.proof_v1("
                "'doc', 'embedding_new', :fingerprint, body, v) FROM made WHERE made.id = doc.id"
            ),
            {"fingerprint": fingerprint},
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of quiet foreground")
    parser.add_argument("--part", choices=["throughput", "foreground", "ways"])
    options = parser.parse_args()
    texts = corpus(options.rows)
    report: dict[str, Any] = {}
    with fresh_server(SETTINGS) as server:
        bench = Bench(sa.create_engine(server.ensure_database("bench")), texts)
        if options.part in (None, "throughput"):
            report["throughput"] = throughput(bench, options.repeat)
        if options.part in (None, "ways"):
            report["ways"] = ways(bench, options.repeat)
        if options.part in (None, "foreground"):
            report["foreground"] = foreground(bench, options.seconds)
        bench.engine.dispose()
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
