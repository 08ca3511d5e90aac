"""What it costs a search to ask, in its own statement, whether the column is still its encoder's.

    python benchmarks/fence.py [--rows 20000] [--dimensions 384] [--blocks 60]

The k nearest by an HNSW index, ten at a time, with the vector as a plain parameter and as the
library sends it; both prepared. Blocks of searches are interleaved; printed are microseconds of the
server's CPU time a search (medians of the blocks) and the median of the ratios of neighbouring
blocks. CPU time, since other programs may share the machine. Runs on an embedded server of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import psycopg
import sqlalchemy as sa
from server_cpu import cpu_seconds

from sbert_pg import catalog
from sbert_pg.embedded import embedded_server
from sbert_pg.source import Source
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.identity import ColumnIdentity

SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "4GB", "synchronous_commit": "off"}
IDENTITY = ColumnIdentity(None, "note", "embedding")
SEARCHES = 50
PLAIN = "SELECT id FROM note ORDER BY embedding <=> %s::vector LIMIT 10"
FENCED = (
    "SELECT id FROM note ORDER BY embedding <=> (SELECT CASE WHEN "
    "sbert.fence_v1('note'::regclass, %s, %s) THEN %s::vector END) LIMIT 10"
)


def prepare(engine: sa.Engine, rows: int, dimensions: int) -> str:
    """The table, with an index; the fingerprint of its encoder."""
    encoder = DeterministicEncoder(dimensions=dimensions)
    with engine.begin() as connection:
        catalog.upgrade(connection)
        run = connection.exec_driver_sql
        run(f"CREATE TABLE note (id int PRIMARY KEY, body text, embedding vector({dimensions}))")
        run(
            "INSERT INTO note SELECT i, i::text, (SELECT array_agg(random() - 0.5)::vector "
            f"FROM generate_series(1, {dimensions}) AS d WHERE d + i > 0) "
            f"FROM generate_series(1, {rows}) AS i"
        )
        run("CREATE INDEX ON note USING hnsw (embedding vector_cosine_ops)")
        binding = catalog.bind(connection, IDENTITY, encoder.spec, Source.of("body"))
        catalog.seal(connection, binding, encoder)
        run("ANALYZE note")
    return encoder.spec.fingerprint or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=60)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    queries = [str(rng.standard_normal(options.dimensions).tolist()) for _ in range(SEARCHES)]
    with tempfile.TemporaryDirectory(prefix="sbert-pg-fence-") as name:
        os.chmod(name, 0o755)
        with embedded_server(Path(name) / "data", settings=SETTINGS) as server:
            engine = sa.create_engine(server.ensure_database("bench"))
            fingerprint = prepare(engine, options.rows, options.dimensions)
            engine.dispose()
            with psycopg.connect(server.dsn("bench"), autocommit=True) as connection:
                report(connection, queries, fingerprint, options.blocks)


def report(connection: psycopg.Connection, queries: list[str], name: str, blocks: int) -> None:
    """Compare the two."""
    backend = connection.info.backend_pid
    spent: tuple[list[float], list[float]] = ([], [])
    for number in range(blocks + 1):
        for fenced in (False, True) if number % 2 else (True, False):
            before = cpu_seconds(backend)
            for query in queries:
                values = ("embedding", name, query) if fenced else (query,)
                statement = FENCED if fenced else PLAIN
                connection.execute(statement, values, prepare=True).fetchall()
            if number:  # The first block warms up.
                spent[fenced].append(1e6 * (cpu_seconds(backend) - before) / len(queries))
    ratios = [b / a for a, b in zip(*spent, strict=True)]
    plain, fenced_time = map(statistics.median, spent)
    print(f"plain {plain:.0f} us, fenced {fenced_time:.0f} us a search", end="")
    print(f", median of the ratios {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
