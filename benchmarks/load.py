"""Rows with given vectors into a table, by the loader, by bare psycopg, and by two peers.

    pip install 'sbert-pg[embedded]' pgvector langchain-postgres vecs
    python benchmarks/load.py [--rows 20000] [--rounds 5] [--dsn postgresql://...]

Every way writes the same ids, texts and float32 vectors of 384 dimensions into an empty table
without a vector index and commits once. Ways run in turn. Printed: the best and the median rate of
the rounds, both also as a ratio to "bare", and the client's own CPU time a row. "bare" is psycopg's
COPY BINARY with ``write_row`` and pgvector-python; "prepared" is the same with every vector turned
into bytes before the clock starts, which no program that is handed arrays can reach. The peers
write fewer rows, since they take their time; ways whose package is missing are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import psycopg
import sqlalchemy as sa
from bench_server import fresh_server

from sbert_pg import Embedding, create_all, load, use_encoder
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.wire import to_wire_rows

DIMENSIONS = 384
SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "4GB", "synchronous_commit": "off"}
COPY = "COPY plain (id, body, embedding) FROM STDIN (FORMAT BINARY)"
Way = Callable[[Any], None]
Result = tuple[float, float, float]


class Data:
    """The rows, in the forms that the ways are handed."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.vectors = rng.standard_normal((rows, DIMENSIONS), dtype=np.float32)
        self.texts = [f"text number {i} " + "lorem ipsum " * 6 for i in range(rows)]
        self.ids = list(range(rows))
        self.payloads = to_wire_rows(self.vectors, "vector")

    @cached_property
    def lists(self) -> list[list[float]]:
        """The vectors as one of the peers asks for them."""
        return [list(map(float, vector)) for vector in self.vectors]

    def rows(self) -> Any:
        """As mappings."""
        for i, text, vector in zip(self.ids, self.texts, self.vectors, strict=True):
            yield {"id": i, "body": text, "embedding": vector}

    def tuples(self) -> Any:
        """As tuples."""
        yield from zip(self.ids, self.texts, self.vectors, strict=True)


def table(name: str, metadata: sa.MetaData) -> sa.Table:
    return sa.Table(
        name,
        metadata,
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("body", sa.Text),
        sa.Column("embedding", Embedding("deterministic", "body", dimensions=DIMENSIONS)),
    )


def own_ways(engine: sa.Engine) -> dict[str, Way]:
    """The loader into a bound table, with its triggers, and into one that is not bound."""
    use_encoder(DeterministicEncoder(dimensions=DIMENSIONS))
    bound, plain = sa.MetaData(), sa.MetaData()
    tables = {"bound": table("bound", bound), "plain": table("plain", plain)}
    with engine.begin() as connection:
        bound.create_all(connection)
        plain.create_all(connection)
        create_all(connection, bound)

    def through(name: str) -> Way:
        def way(data: Data) -> None:
            with engine.begin() as connection:
                load(connection, tables[name], data.rows())

        return way

    def as_tuples(data: Data) -> None:
        with engine.begin() as connection:
            load(connection, tables["plain"], data.tuples(), columns=("id", "body", "embedding"))

    def insertmany(data: Data) -> None:
        with engine.begin() as connection:
            connection.execute(sa.insert(tables["plain"]), list(data.rows()))

    return {
        "load, no triggers": through("plain"),
        "load, tuples, no triggers": as_tuples,
        "load, bound table": through("bound"),
        "Core insert, own type": insertmany,
    }


def bare_ways(dsn: str) -> dict[str, Way]:
    from pgvector.psycopg import register_vector

    def copy(data: Data, values: Any, type_: str) -> None:
        with psycopg.connect(dsn) as connection:
            register_vector(connection)
            with connection.cursor().copy(COPY) as copy:
                # A vector in its wire form is bytes, and COPY itself knows of no types.
                copy.set_types(["int8", "text", type_])
                for row in zip(data.ids, data.texts, values, strict=True):
                    copy.write_row(row)

    return {
        "bare": lambda data: copy(data, data.vectors, "vector"),
        "prepared": lambda data: copy(data, data.payloads, "bytea"),
    }


def langchain_way(url: sa.URL) -> Way:
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_postgres import PGEngine, PGVectorStore

    engine = PGEngine.from_connection_string(url.set(drivername="postgresql+psycopg"))
    engine.init_vectorstore_table("langchain", DIMENSIONS, overwrite_existing=True)
    store = PGVectorStore.create_sync(
        engine, DeterministicFakeEmbedding(size=DIMENSIONS), "langchain"
    )

    def way(data: Data) -> None:
        store.add_embeddings(data.texts, data.lists)

    return way


def vecs_way(url: sa.URL) -> Way:
    import vecs

    client = vecs.create_client(
        url.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)
    )
    collection = client.get_or_create_collection(name="docs", dimension=DIMENSIONS)

    def way(data: Data) -> None:
        collection.upsert(
            (str(i), vector, {"body": text})
            for i, text, vector in zip(data.ids, data.texts, data.vectors, strict=True)
        )

    return way


def measure(url: sa.URL, rows: int, few: int, rounds: int) -> dict[str, Result]:
    """By way, the best and the median rows per second, and the client's CPU seconds a row."""
    engine = sa.create_engine(url)
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    many, some = Data(rows), Data(few)
    _ = some.lists  # made before the clock starts
    ways: dict[str, tuple[Way, Data]] = {n: (w, many) for n, w in own_ways(engine).items()}
    if importlib.util.find_spec("pgvector"):
        ways |= {name: (way, many) for name, way in bare_ways(dsn).items()}
    if importlib.util.find_spec("langchain_postgres"):
        ways["langchain-postgres PGVectorStore"] = langchain_way(url), some
    if importlib.util.find_spec("vecs"):
        ways["vecs"] = vecs_way(url), some
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    empty = "TRUNCATE bound, plain"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for _ in range(rounds):
            for name, (way, data) in ways.items():
                connection.exec_driver_sql(empty)
                for peer in ("public.langchain", "vecs.docs"):
                    if connection.exec_driver_sql(f"SELECT to_regclass('{peer}')").scalar():
                        connection.exec_driver_sql(f"TRUNCATE {peer}")
                start, used = time.perf_counter(), time.process_time()
                way(data)
                seconds[name].append((time.perf_counter() - start) / len(data.ids))
                cpu[name].append((time.process_time() - used) / len(data.ids))
    engine.dispose()
    return {n: (1 / min(seconds[n]), 1 / statistics.median(seconds[n]), min(cpu[n])) for n in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--few", type=int, default=500, help="rows that the peers write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dsn", help="an empty database with pgvector; the embedded server else")
    arguments = parser.parse_args()
    sizes = arguments.rows, arguments.few, arguments.rounds
    if arguments.dsn:
        url = sa.make_url(arguments.dsn).set(drivername="postgresql+psycopg")
        rates = measure(url, *sizes)
    else:
        with fresh_server(SETTINGS) as server:
            rates = measure(server.ensure_database("bench"), *sizes)
    bare = rates.get("bare")
    for name, (best, median, cpu) in sorted(rates.items(), key=lambda item: -item[1][0]):
        of_bare = f"{best / bare[0]:6.2f} {median / bare[1]:6.2f}" if bare else ""
        print(f"{name:34} {best:9,.0f} {median:9,.0f} rows/s {of_bare} {cpu * 1e6:8.1f} us CPU")


if __name__ == "__main__":
    main()
