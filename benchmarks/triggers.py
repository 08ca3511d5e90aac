"""What freshness as a state of the row costs: each statement on a table with and without a binding.

    python benchmarks/triggers.py [--rows 5000] [--rounds 3] [--dimensions 384] [--text 2000]

Microseconds of the server's CPU time a row, since other programs may share the machine: of inserts
of texts, inserts of texts with vectors, updates of the text, of another column (HOT where there is
room) and of another column that is indexed; for tables without and with an HNSW index on the
vector. Variants are interleaved, the best of the rounds counts. Runs on an embedded server of its
own.
"""

from __future__ import annotations

import argparse
import itertools

import psycopg
import sqlalchemy as sa
from bench_server import cpu_seconds, fresh_server

from sbert_pg import catalog
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity

SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "synchronous_commit": "off"}
OPERATIONS = (
    "insert texts",
    "insert with vectors",
    "update text",
    "update other",
    "update indexed",
)


def text_of(length: int) -> str:
    """SQL for a text of about so many characters that is different for each row ``i``."""
    return f"i || ' ' || substr(repeat(md5(i::text), {length // 32 + 1}), 1, {length})"


def prepare(engine: sa.Engine, bound: bool, hnsw: bool, dimensions: int) -> None:
    """An empty table ``note``, alike but for the binding and the index."""
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS note")
        connection.exec_driver_sql("SELECT sbert.prune_v1()")
        connection.exec_driver_sql(
            "CREATE TABLE note (id int PRIMARY KEY, body text, views int DEFAULT 0, "
            f"kind int DEFAULT 0, embedding vector({dimensions}), embedding_of uuid) "
            "WITH (fillfactor = 80)"
        )
        connection.exec_driver_sql("CREATE INDEX ON note (kind)")
        if bound:
            identity = ColumnIdentity(None, "note", "embedding")
            spec = EncoderSpec(name="bench", dimensions=dimensions)
            catalog.bind(connection, identity, spec, Source.of("body"))
        if hnsw:
            connection.exec_driver_sql(
                "CREATE INDEX ON note USING hnsw (embedding vector_cosine_ops)"
            )


def digest(engine: sa.Engine, bound: bool) -> str:
    """SQL for what a writer of the library's sends beside a vector."""
    if not bound:
        return "NULL::uuid"
    with engine.begin() as connection:
        binding = catalog.require_binding(connection, ColumnIdentity(None, "note", "embedding"))
        return binding.expressions.bare("digest")


def measure(
    connection: psycopg.Connection, wanted: str, rows: int, dimensions: int, length: int
) -> dict[str, float]:
    """Microseconds a row, by operation; the rows have proven vectors after the second one."""
    text = text_of(length)
    vectors = (
        f"SELECT i AS id, {text} AS body, (SELECT array_agg(random())::vector({dimensions}) "
        f"FROM generate_series(1, {dimensions}) AS d WHERE d + i > 0) AS embedding "
        f"FROM generate_series(1, {rows}) AS i"
    )
    connection.execute(f"CREATE TEMP TABLE made ON COMMIT PRESERVE ROWS AS {vectors}")
    statements = {
        "insert texts": "INSERT INTO note (id, body) SELECT id, body FROM made",
        "insert with vectors": "INSERT INTO note (id, body, embedding, embedding_of) "
        f"SELECT id, body, embedding, {wanted} FROM made",
        "update text": "UPDATE note SET body = body || '.' WHERE id %% 4 = 0",
        "update other": "UPDATE note SET views = views + 1 WHERE id %% 4 = 1",
        "update indexed": "UPDATE note SET kind = kind + 1 WHERE id %% 4 = 2",
    }
    spent = {}
    backend = connection.info.backend_pid
    for name, statement in statements.items():
        if name == "insert with vectors":
            connection.execute("TRUNCATE note")
        started = cpu_seconds(backend)
        done = connection.execute(statement.replace("%%", "%"))
        spent[name] = 1e6 * (cpu_seconds(backend) - started) / done.rowcount
        if name == "insert with vectors":
            connection.execute("VACUUM ANALYZE note")
    connection.execute("DROP TABLE made")
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[384, 1024])
    parser.add_argument("--text", type=int, nargs="+", default=[400, 2_000])
    options = parser.parse_args()
    with fresh_server(SETTINGS) as server:
        engine = sa.create_engine(server.ensure_database("bench"))
        with engine.begin() as connection:
            catalog.upgrade(connection)
        with psycopg.connect(server.dsn("bench"), autocommit=True) as connection:
            for case in itertools.product(options.dimensions, options.text, (False, True)):
                report(engine, connection, options, *case)
        engine.dispose()


def report(
    engine: sa.Engine,
    connection: psycopg.Connection,
    options: argparse.Namespace,
    dimensions: int,
    length: int,
    hnsw: bool,
) -> None:
    """One table of the report: without a binding, and with one."""
    best: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for _ in range(options.rounds):
        for bound in (False, True):
            prepare(engine, bound, hnsw, dimensions)
            wanted = digest(engine, bound)
            for name, spent in measure(
                connection, wanted, options.rows, dimensions, length
            ).items():
                best[bound][name] = min(spent, best[bound].get(name, spent))
    print(f"\n{dimensions} dimensions, {length} characters, {'HNSW' if hnsw else 'no HNSW'}")
    for name in OPERATIONS:
        plain, bound_time = best[False][name], best[True][name]
        ratio = bound_time / plain
        print(f"  {name:20} {plain:9.1f} -> {bound_time:9.1f} us a row, {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
