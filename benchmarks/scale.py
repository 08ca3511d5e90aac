"""What grows with a table, and how: each figure at several sizes, with its exponent beside.

    pip install 'sbert-pg[embedded,clustering]'
    python benchmarks/scale.py [--rows 10000 100000 1000000] [--dimensions 384] [--seed 1]

Vectors are mixtures of a thousand centres, given to the library by an encoder that only looks them
up, so that the time goes into the database and not into a model. An exponent is the slope between
the first and the last size on logarithms: 1 grows as the rows do, 0 does not grow. Times of
searches and of ``status`` are medians. Each figure goes to stderr as it comes, the table to stdout
at the end. Runs on an embedded server of its own.

What may grow faster than n log n between two sizes: near-duplicates up to some 8,000 rows, among
which PostgreSQL prefers to compare all with all, while a search of the graph costs the same from
there on; and an update of all rows, once they and their log are more than memory holds.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, embedding_column, hnsw_index, load, nearest, reembed, use_encoder
from sbert_pg.catalog import bind, require_binding
from sbert_pg.clustering import KMeans, cluster, clusters_of, duplicate_pairs
from sbert_pg.embedded import embedded_server
from sbert_pg.freshness import audit, backfill, refresh, status
from sbert_pg.indexes.build import build_index
from sbert_pg.registry import get_encoder
from sbert_pg.source import Source
from sbert_pg.system import ColumnIdentity, identity_of
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.tuning.evaluation import evaluate

SETTINGS = {
    "shared_buffers": "4GB", "maintenance_work_mem": "4GB", "max_wal_size": "16GB",
    "synchronous_commit": "off",
}  # fmt: skip
CENTRES, QUERIES, TOPICS = 1_000, 40, 200
DRAINED, PAIRS = 2_000, 1_000
#: Each row is searched for once, which takes an hour beyond.
MOST_FOR_PAIRS = 100_000
OTHER = ColumnIdentity("public", "item", "other")
COPIED = ColumnIdentity("public", "copied", "embedding")


class GivenVectors(DeterministicEncoder):
    """Gives the vectors that belong to texts ``row N``."""

    def __init__(self, dimensions: int, seed: int, name: str = "deterministic") -> None:
        super().__init__(name, dimensions, salt=name)
        rng = np.random.default_rng(seed)
        self._centres = rng.standard_normal((CENTRES, dimensions), dtype=np.float32)

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """Vectors of rows, each near the centre of its topic."""
        noise = np.stack(
            [
                np.random.default_rng(n).standard_normal(self._centres.shape[1], dtype=np.float32)
                for n in numbers
            ]
        )
        mixed = self._centres[numbers % CENTRES] + 0.7 * noise
        return np.asarray(mixed / np.linalg.norm(mixed, axis=1, keepdims=True))

    def encode_document(self, texts):  # noqa: D102
        if all(text.startswith("row ") for text in texts):
            return self.vectors(np.array([int(text[4:]) for text in texts]))
        return super().encode_document(texts)


class Figures:
    """What was measured, by name, one number a size."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Seconds of a block."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def median(self, name: str, call: Callable[[int], object], times: int = QUERIES) -> None:
        """Median seconds of calls."""
        spent = []
        for number in range(times):
            started = time.perf_counter()
            call(number)
            spent.append(time.perf_counter() - started)
        self.add(name, statistics.median(spent))

    def add(self, name: str, value: float) -> None:
        """A figure of the size at hand."""
        print(f"{name}: {value:.3g}", file=sys.stderr, flush=True)
        self.rows.setdefault(name, []).append(value)

    def report(self, sizes: list[int]) -> None:
        """A table in Markdown."""
        print("| | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent |")
        print("|---" * (len(sizes) + 2) + "|")
        for name, values in self.rows.items():
            shown = " | ".join(
                [f"{value:.3g}" for value in values] + [""] * (len(sizes) - len(values))
            )
            grown, last = "", sizes[len(values) - 1]
            if len(values) > 1 and values[0] > 0:
                grown = f"{math.log(values[-1] / values[0]) / math.log(last / sizes[0]):.2f}"
            print(f"| {name} | {shown} | {grown} |", flush=True)


def measure(engine: sa.Engine, encoder: GivenVectors, rows: int, figures: Figures) -> None:
    """One size, on an empty database."""

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        topic: Mapped[int]
        body: Mapped[str]
        embedding = embedding_column(
            "deterministic", source="body", dimensions=encoder.spec.dimensions
        )

    table = Item.__table__
    topics = clusters_of(Item.embedding)
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    given = (
        {"id": n, "topic": n % CENTRES % TOPICS, "body": f"row {n}", "embedding": vector}
        for first in range(0, rows, 1_000)
        for n, vector in zip(
            range(first, first + 1_000),
            encoder.vectors(np.arange(first, first + 1_000)),
            strict=True,
        )
    )
    with figures.of("load with vectors given, s"), engine.begin() as connection:
        load(connection, Item, given)
    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE item")

    queries = encoder.vectors(np.arange(10**9, 10**9 + QUERIES))
    with Session(engine) as session:

        def ask(number: int, *criteria: sa.ColumnElement[bool], exact: bool = False) -> set[int]:
            statement = nearest(Item.embedding, queries[number], limit=10, exact=exact)
            found = {row.Item.id for row in session.execute(statement.where(*criteria))}
            session.rollback()
            return found

        drain(engine, "drain of {:,} rows without an index, s", figures)
        right = [ask(number, exact=True) for number in range(QUERIES)]
        figures.median("exact search, s", lambda n: ask(n, exact=True), 10)
        index = hnsw_index("ix_item_embedding", table.c.embedding)
        with figures.of("HNSW build, s"):
            build_index(engine, index)
        figures.median("nearest, s", ask)
        shares = [len(ask(n) & right[n]) / 10 for n in range(QUERIES)]
        figures.add("nearest, recall@10", statistics.mean(shares))

        def filtered(filters: list[sa.ColumnElement[bool]], number: int) -> set[int]:
            return ask(number, filters[number])

        own = [Item.topic == int((10**9 + n) % CENTRES % TOPICS) for n in range(QUERIES)]
        other = [Item.topic == int((10**9 + n + 7) % CENTRES % TOPICS) for n in range(QUERIES)]
        for name, filters in (("own", own), ("another", other)):
            exact = [ask(n, filters[n], exact=True) for n in range(QUERIES)]
            figures.median(f"nearest of {name} topic, s", partial(filtered, filters))
            shares = [len(ask(n, filters[n]) & exact[n]) / 10 for n in range(QUERIES)]
            figures.add(f"nearest of {name} topic, recall@10", statistics.mean(shares))
    with engine.connect() as connection:
        figures.median("status, s", lambda _: status(connection), 5)
        figures.median("status, all rows counted, s", lambda _: status(connection, exact=True), 1)
        binding = require_binding(connection, table.c.embedding)
    with figures.of("audit of 1,000 rows, s"):
        audit(engine, binding, encoder)
    # Which row answers says nothing of the time.
    pairs = [(f"row {10**9 + n}", n % rows) for n in range(PAIRS)]
    with figures.of(f"evaluate {PAIRS:,} pairs, s"):
        evaluate(engine, {"nearest": lambda questions: nearest(Item.embedding, questions)}, pairs)
    drain(engine, "drain of {:,} rows beside an index, s", figures)
    with figures.of("k-means, 100 clusters, s"):
        cluster(engine, topics, KMeans(100), keywords=False)
    if rows <= MOST_FOR_PAIRS:
        with figures.of("near-duplicates by the index, s"), engine.connect() as connection:
            deque(duplicate_pairs(connection, Item.embedding, method="index"), maxlen=0)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX ix_item_embedding")
        with figures.of("make all pending, s"):
            connection.exec_driver_sql("UPDATE item SET embedding_of = NULL")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE item")
    with figures.of("backfill without an index, s"):
        backfill(engine, table.c.embedding)
    with figures.of("audit of all rows, s"):
        audit(engine, binding, encoder, sample=None)
    build_index(engine, index)
    change_encoder(engine, table.c.embedding, figures)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE copied AS SELECT id, body FROM item")
        vector = f"vector({encoder.spec.dimensions})"
        connection.exec_driver_sql(
            f"ALTER TABLE copied ADD PRIMARY KEY (id), ADD embedding {vector}"
        )
        with figures.of("bind a table that is there, s"):
            bind(connection, COPIED, encoder.spec, Source.of("body"))
        connection.exec_driver_sql("DROP TABLE copied")
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.exec_driver_sql("SELECT sbert.prune_v1()")


def drain(engine: sa.Engine, name: str, figures: Figures) -> None:
    """Work some rows off that wait in a table that is fresh otherwise."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE item SET embedding_of = NULL WHERE id < {DRAINED}")
    with figures.of(name.format(DRAINED)):
        refresh(engine)


def change_encoder(engine: sa.Engine, old: sa.Column, figures: Figures) -> None:
    """From ``begin`` to ``finish``, with an index like the old column's."""
    spec = get_encoder("other").spec
    with figures.of("begin to finish of a change of encoder, s"):
        reembed.begin(engine, reembed.Request(old=identity_of(old), new=OTHER.column, encoder=spec))
        with figures.of("its backfill, s"):
            backfill(engine, OTHER)
        with figures.of("its index, s"):
            reembed.build_indexes(engine, OTHER)
        assert reembed.finish(engine, OTHER, force=True, quiet=timedelta(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    encoder = GivenVectors(options.dimensions, options.seed)
    use_encoder(encoder)
    use_encoder(GivenVectors(options.dimensions, options.seed + 1, "other"))
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="sbert-pg-scale-") as name:
        os.chmod(name, 0o755)
        with embedded(Path(name) / "data") as engine:
            for rows in options.rows:
                measure(engine, encoder, rows, figures)
    figures.report(options.rows)


@contextmanager
def embedded(path: Path) -> Iterator[sa.Engine]:
    """An engine on a server of its own."""
    with embedded_server(path, settings=SETTINGS) as server:
        engine = sa.create_engine(server.ensure_database("bench"))
        yield engine
        engine.dispose()


if __name__ == "__main__":
    main()
