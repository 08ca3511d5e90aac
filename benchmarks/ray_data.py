"""Rows in and out of a table by Ray Data: this library's source and sink beside Ray's own.

    pip install 'sbert-pg[embedded,ray]'
    python benchmarks/ray_data.py [--rows 20000] [--dimensions 384] [--cpus 2]

Each way reads every row with its vector as numbers, and writes every row with its vector and its
proof. ``ray.data.read_sql`` gets vectors as text, which a ``map_batches`` makes into arrays;
``write_sql`` is an INSERT that does nothing where the key is there, into an unbound table, since a
bound one refuses vectors without their proof. Interleaved; the medians of three rounds are shown,
and the CPU time of this process, Ray's and the server's (by ``/proc``, so on Linux). Two rounds
before them start Ray's processes and do not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psycopg
import ray
import sqlalchemy as sa
from scale import embedded
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import create_all, embedding_column, load, use_encoder
from sbert_pg.adapters.ray_data import TableDatasink, table_source
from sbert_pg.testing import DeterministicEncoder

#: Rounds, of which the first do not count: not each process of Ray's has a task in each.
ROUNDS, COLD = 5, 2
INSERT = "INSERT INTO plain (id, body, embedding) VALUES (%s, %s, %s) ON CONFLICT (id) DO NOTHING"


class Base(DeclarativeBase):
    """Its tables."""


def parsed(batch):
    """Vectors from their text."""
    batch["embedding"] = np.stack(
        [np.array(text.strip("[]").split(","), dtype=np.float32) for text in batch["embedding"]]
    )
    return batch


def spelled(batch):
    """Vectors as text."""
    batch["embedding"] = np.array(
        ["[" + ",".join(map(str, vector)) + "]" for vector in batch["embedding"]]
    )
    return batch


def cpu(*roots: int) -> float:
    """CPU seconds so far of processes and all that descend from them, ended ones included."""
    parents, spent = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has just ended.
        number = int(stat.parent.name)
        parents[number] = int(fields[1])
        spent[number] = sum(map(int, fields[11:15]))

    def belongs(number: int) -> bool:
        while number not in roots and number in parents:
            number = parents[number]
        return number in roots

    return sum(spent[number] for number in spent if belongs(number)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    encoder = DeterministicEncoder(dimensions=options.dimensions)
    use_encoder(encoder)

    class Item(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding = embedding_column("deterministic", source="body", dimensions=options.dimensions)

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=options.cpus,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory(prefix="sbert-pg-ray-") as folder:
        os.chmod(folder, 0o755)
        with embedded(Path(folder) / "data") as engine:
            postmaster = (Path(folder) / "data" / "postmaster.pid").read_text().split()[0]
            roots = os.getpid(), int(postmaster)
            measure(engine, Item, encoder, options.rows, roots)


def measure(
    engine: sa.Engine, item, encoder: DeterministicEncoder, rows: int, roots: tuple[int, int]
) -> None:
    """Each way in turn; ``roots`` are the processes whose CPU counts."""
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    vectors = np.random.default_rng(1).standard_normal(
        (rows, encoder.spec.dimensions), dtype=np.float32
    )
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
        given = ({"id": n, "body": f"row {n}", "embedding": v} for n, v in enumerate(vectors))
        load(connection, item, given)
        connection.exec_driver_sql("CREATE TABLE plain (LIKE item INCLUDING INDEXES)")
    names = ["id", "body", "embedding"]

    def read() -> int:
        with table_source(engine, item, names) as source:
            return ray.data.read_datasource(source).materialize().count()

    def read_sql() -> int:
        query = "SELECT id, body, embedding FROM item"
        dataset = ray.data.read_sql(query, lambda: psycopg.connect(dsn))
        return dataset.map_batches(parsed).materialize().count()

    with table_source(engine, item, names) as source:
        data = ray.data.read_datasource(source).materialize()

    def write() -> int:
        data.write_datasink(TableDatasink(engine, item.__table__))
        return rows

    def write_sql() -> int:
        data.map_batches(spelled).write_sql(INSERT, lambda: psycopg.connect(dsn))
        return rows

    spent: dict[str, list[tuple[float, float]]] = {}
    for _ in range(ROUNDS):
        for way in (read, read_sql, write, write_sql):
            table = {write: "item", write_sql: "plain"}.get(way)
            if table is not None:
                with engine.begin() as connection:
                    connection.exec_driver_sql(f"TRUNCATE {table}")
            started, before = time.perf_counter(), cpu(*roots)
            assert way() == rows
            took = time.perf_counter() - started, cpu(*roots) - before
            spent.setdefault(way.__name__, []).append(took)
            print(f"{way.__name__}: {took[0]:.2f} s, CPU {took[1]:.2f} s", file=sys.stderr)
    print("| | rows a second | microseconds of CPU a row |\n|---|---|---|")
    for name, took in spent.items():
        seconds, busy = (statistics.median(some) for some in zip(*took[COLD:], strict=True))
        print(f"| {name} | {rows / seconds:,.0f} | {1e6 * busy / rows:,.1f} |", flush=True)


if __name__ == "__main__":
    main()
