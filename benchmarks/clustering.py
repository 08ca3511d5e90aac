"""Clustering and near-duplicates of a table, beside what they are made of.

    python benchmarks/clustering.py [--rows N] [--clusters K ...] [--iterations N] [--sql-rows N]
                                    [--sql-iterations N] [--duplicates N] [--database URL]
                                    [--json FILE]

k-means three ways: the whole run of the library (read in binary, cluster, write assignments), the
same with ``fetchall`` into scikit-learn, and inside PostgreSQL; and as the yardstick scikit-learn's
fit alone on the matrix. All have the same tolerance and a limit of the same iterations, one start,
and are timed in turns, in seconds of CPU (this process and the server) and on the wall. Inertia is
that of the clusters' means over unit vectors, for all alike. On a machine that others use as well,
``taskset -c 0 python benchmarks/clustering.py`` gives every way one thread, so that none of them
waits for another, and seconds of CPU are the figures to compare.

Near-duplicates: the library against ``paraphrase_mining_embeddings`` of sentence-transformers on
the same vectors, in the same process.

Vectors are made: unit vectors around topics of very different sizes. How good clusters of real
texts are is measured by ``clustering_quality.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psycopg
import sqlalchemy as sa
from bench_server import fresh_server
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import clustering as cl
from sbert_pg.clustering.duplicates import similar_pairs
from sbert_pg.clustering.kmeans import normalize
from sbert_pg.types import Vector, to_wire_rows

DIMENSIONS = 384


class Base(DeclarativeBase):
    """The tables of this benchmark."""


class Item(Base):
    """A row with a vector and nothing else."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    embedding = mapped_column(Vector(DIMENSIONS), nullable=False)


# Spherical k-means, which is the default here, minimises another sum than scikit-learn's does.
topics = cl.clusters_of(Item.embedding, metric="euclidean")


def made_vectors(rows: int) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.standard_normal((600, DIMENSIONS)).astype(np.float32)
    weights = random.pareto(1.2, 600) + 0.2
    chosen = random.choice(600, rows, p=weights / weights.sum())
    noise = random.standard_normal((rows, DIMENSIONS)).astype(np.float32)
    vectors = centres[chosen] + 1.6 * noise
    # One row in twenty is nearly another one.
    copies = rows // 20
    vectors[-copies:] = vectors[:copies] + 0.3 * random.standard_normal((copies, DIMENSIONS))
    return normalize(vectors)


def fill(engine: sa.Engine, vectors: np.ndarray) -> None:
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    raw = engine.raw_connection()
    try:
        with raw.cursor() as cursor:
            with cursor.copy("COPY item FROM STDIN (FORMAT binary)") as copy:
                copy.set_types(["int8", "bytea"])
                for number, row in enumerate(to_wire_rows(vectors, "vector")):
                    copy.write_row((number, row))
            raw.commit()
            cursor.execute("ANALYZE item")
        raw.commit()
    finally:
        raw.close()


@dataclass(frozen=True)
class Cost:
    """What something took: seconds on the wall, and of CPU in this process and the server."""

    wall: float
    cpu: float


def cpu_seconds(engine: sa.Engine | None) -> float:
    """Of this process; and of the server with all its backends, where it runs on this machine."""
    used = time.process_time()
    if engine is None:
        return used
    with engine.connect() as connection:
        backend = connection.scalar(sa.select(sa.func.pg_backend_pid()))
    if not Path(f"/proc/{backend}/stat").exists():
        return used
    ticks, postmaster = 0, stat_of(backend)[1]
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = stat_of(path.name)
        except OSError:
            continue
        if fields[1] == postmaster:
            ticks += int(fields[11]) + int(fields[12])
        elif path.name == postmaster:
            # What backends have used that have ended.
            ticks += sum(map(int, fields[11:15]))
    return used + ticks / os.sysconf("SC_CLK_TCK")


def stat_of(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat, from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def timed(action: Callable[[], Any], engine: sa.Engine | None = None) -> tuple[Cost, Any]:
    used, began = cpu_seconds(engine), time.perf_counter()
    result = action()
    wall = time.perf_counter() - began
    return Cost(wall, cpu_seconds(engine) - used), result


def mean_inertia(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squares less what the means of the clusters explain."""
    total = float(np.einsum("ij,ij->", vectors, vectors, dtype=np.float64))
    for number in np.unique(labels):
        members = vectors[labels == number]
        total -= float((members.sum(axis=0, dtype=np.float64) ** 2).sum()) / len(members)
    return total


def current_labels(engine: sa.Engine) -> np.ndarray:
    assignment, run = topics.assignment_table, topics.run_table
    statement = (
        sa.select(assignment.c.cluster_id)
        .join_from(assignment, run, run.c.id == assignment.c.run_id)
        .where(run.c.is_current)
        .order_by(assignment.c.row_id)
    )
    with engine.connect() as connection:
        return np.array(list(connection.scalars(statement)))


def library(
    engine: sa.Engine, k: int, iterations: int, seed: int = 0, method: Any = "memory"
) -> cl.ClusterRun:
    algorithm = cl.KMeans(k, method=method, max_iter=iterations)
    return cl.cluster(engine, topics, algorithm, seed=seed, keywords=False, follow=0)


def fetchall(engine: sa.Engine, k: int, iterations: int) -> Any:
    """What a notebook does: fetch, parse, fit, and write the labels back."""
    from sklearn.cluster import KMeans

    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("SELECT id, embedding FROM item").fetchall()
        matrix = np.array(
            [np.fromstring(text[1:-1], dtype=np.float32, sep=",") for _, text in rows]
        )
        fit = KMeans(k, n_init=1, max_iter=iterations, random_state=0).fit(matrix)
        connection.execute("CREATE TEMPORARY TABLE label (id bigint, number integer)")
        with connection.cursor().copy("COPY label FROM STDIN") as copy:
            for (key, _), number in zip(rows, fit.labels_.tolist(), strict=True):
                copy.write_row((key, number))
    return fit


def k_means(
    engine: sa.Engine, vectors: np.ndarray, clusters: list[int], iterations: int, rounds: int
) -> list[dict[str, Any]]:
    from sklearn.cluster import KMeans

    found = []
    for k in clusters:
        ways = ("scikit-learn fit", "scikit-learn fit, random seeds", "library", "fetchall")
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        inertia: dict[str, list[float]] = {name: [] for name in costs}
        for turn in range(rounds):
            for name, init in zip(ways, ("k-means++", "random"), strict=False):
                model = KMeans(k, init=init, n_init=1, max_iter=iterations, random_state=turn)
                cost, fit = timed(lambda model=model: model.fit(vectors))
                costs[name].append(cost)
                inertia[name].append(mean_inertia(vectors, fit.labels_))
            cost, _ = timed(lambda k=k, turn=turn: library(engine, k, iterations, turn), engine)
            costs["library"].append(cost)
            inertia["library"].append(mean_inertia(vectors, current_labels(engine)))
            if turn == 0:
                cost, fit = timed(lambda k=k: fetchall(engine, k, iterations), engine)
                costs["fetchall"].append(cost)
                inertia["fetchall"].append(mean_inertia(vectors, fit.labels_))
        fit_alone = costs["scikit-learn fit"]
        for name, taken in costs.items():
            found.append(
                {
                    "k": k,
                    "way": name,
                    "cpu s": round(median(c.cpu for c in taken), 2),
                    "wall s": round(median(c.wall for c in taken), 2),
                    "cpu of fit": round(
                        median(c.cpu for c in taken) / median(c.cpu for c in fit_alone), 2
                    ),
                    "wall of fit": round(
                        median(c.wall for c in taken) / median(c.wall for c in fit_alone), 2
                    ),
                    "inertia": round(median(inertia[name])),
                }
            )
            print(found[-1], flush=True)
    return found


def in_database(
    engine: sa.Engine, vectors: np.ndarray, clusters: list[int], iterations: int
) -> list[dict[str, Any]]:
    """The same clusters from the same seed, inside the server and on the client.

    Iterations are few: in the server each compares every row with every centroid.
    """
    fill(engine, vectors)
    found = []
    for k in clusters:
        client, _ = timed(lambda k=k: library(engine, k, iterations), engine)
        on_client = mean_inertia(vectors, current_labels(engine))
        server, run = timed(lambda k=k: library(engine, k, iterations, 0, "database"), engine)
        found.append(
            {
                "rows": len(vectors),
                "k": k,
                "iterations": run.parameters["iterations"],
                "in SQL, cpu s": round(server.cpu, 2),
                "client, cpu s": round(client.cpu, 2),
                "cpu of client": round(server.cpu / client.cpu, 1),
                "wall of client": round(server.wall / client.wall, 1),
                "inertia in SQL": round(mean_inertia(vectors, current_labels(engine))),
                "inertia on the client": round(on_client),
            }
        )
        print(found[-1], flush=True)
    return found


def near_duplicates(vectors: np.ndarray, threshold: float) -> dict[str, Any]:
    row: dict[str, Any] = {"rows": len(vectors), "threshold": threshold}
    ours, found = timed(lambda: sum(len(block[0]) for block in similar_pairs(vectors, threshold)))
    row |= {"cpu s": round(ours.cpu, 2), "wall s": round(ours.wall, 2), "pairs": found}
    try:
        import torch
        from sentence_transformers import util
    except ImportError:
        print("sentence-transformers is not installed", flush=True)
        return row
    tensor = torch.from_numpy(vectors)
    theirs, pairs = timed(lambda: util.paraphrase_mining_embeddings(tensor, top_k=20))
    row |= {
        "paraphrase_mining, cpu s": round(theirs.cpu, 2),
        "paraphrase_mining, wall s": round(theirs.wall, 2),
        "its pairs": sum(score >= threshold for score, _, _ in pairs),
        "times less cpu": round(theirs.cpu / ours.cpu, 1),
        "times faster": round(theirs.wall / ours.wall, 1),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, nargs="+", default=[50, 300, 1000])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sql-rows", type=int, default=100_000)
    parser.add_argument("--sql-iterations", type=int, default=3)
    parser.add_argument("--duplicates", type=int, default=100_000)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--database", help="a database with pgvector; tables are made in it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    vectors = made_vectors(max(options.rows, options.duplicates))

    def measure(url: sa.URL) -> None:
        engine = sa.create_engine(url)
        fill(engine, vectors[: options.rows])
        results["k-means"] = k_means(
            engine, vectors[: options.rows], options.clusters, options.iterations, options.rounds
        )
        if options.sql_rows:
            results["in the database"] = in_database(
                engine,
                vectors[: options.sql_rows],
                options.clusters,
                options.sql_iterations,
            )
        engine.dispose()

    if options.rows and options.database:
        measure(sa.make_url(options.database).set(drivername="postgresql+psycopg"))
    elif options.rows:
        settings = {"shared_buffers": "1GB", "max_wal_size": "4GB", "synchronous_commit": "off"}
        with fresh_server(settings) as server:
            measure(server.ensure_database("benchmark"))
    if options.duplicates:
        results["near-duplicates"] = near_duplicates(
            vectors[: options.duplicates], options.threshold
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
