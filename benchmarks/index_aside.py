"""A backfill into a column with an HNSW index: beside it, and with the index set aside.

    pip install 'sbert-pg[embedded]'
    python benchmarks/index_aside.py [--rows 100000] [--dimensions 384] [--rounds 1]

Each way fills the same table, in turn; setting aside includes building the index at the end.
Vectors are those of ``scale.py``, made by an encoder that only looks them up, so that what is
compared is the server's work. Printed are seconds, rows a second, and the ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa
from scale import GivenVectors, embedded

from sbert_pg import catalog, use_encoder
from sbert_pg.freshness import backfill
from sbert_pg.freshness.running import Index
from sbert_pg.source import Source
from sbert_pg.system import ColumnIdentity

IDENTITY = ColumnIdentity("public", "item", "embedding")
SCRIPT = """
DROP TABLE IF EXISTS item;
SELECT sbert.prune_v1();
CREATE TABLE item (id bigint PRIMARY KEY, body text, embedding vector({dimensions}));
INSERT INTO item SELECT i, 'row ' || i FROM generate_series(0, {rows} - 1) i;
CREATE INDEX item_hnsw ON item USING hnsw (embedding vector_cosine_ops);
ANALYZE item;
"""


def fill(engine: sa.Engine, encoder: GivenVectors, rows: int, index: Index) -> float:
    """Seconds of one way, on a table of its own."""
    with engine.begin() as connection:
        connection.exec_driver_sql(SCRIPT.format(dimensions=encoder.spec.dimensions, rows=rows))
        catalog.bind(connection, IDENTITY, encoder.spec, Source.of("body"))
    started = time.perf_counter()
    assert backfill(engine, IDENTITY, index=index).complete
    spent = time.perf_counter() - started
    with engine.connect() as connection:
        valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'item_hnsw'::regclass"
        assert connection.exec_driver_sql(valid).scalar_one()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    encoder = GivenVectors(options.dimensions, seed=1)
    use_encoder(encoder)
    spent: dict[Index, list[float]] = {"aside": [], "keep": []}
    with tempfile.TemporaryDirectory(prefix="sbert-pg-aside-") as name:
        os.chmod(name, 0o755)
        with embedded(Path(name) / "data") as engine:
            with engine.begin() as connection:
                catalog.upgrade(connection)
            for _ in range(options.rounds):
                for way, values in spent.items():
                    values.append(fill(engine, encoder, options.rows, way))
                    rate = options.rows / values[-1]
                    print(f"{way:6} {values[-1]:8.1f} s {rate:8,.0f} rows/s", flush=True)
    keep, aside = (statistics.median(spent[way]) for way in ("keep", "aside"))
    print(f"beside the index it takes {keep / aside:.1f} times as long")


if __name__ == "__main__":
    main()
