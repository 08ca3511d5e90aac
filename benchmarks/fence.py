"""What it costs a search to ask, in its own statement, whether the column is still its encoder's.

    python benchmarks/fence.py [--rows 20000] [--dimensions 384] [--blocks 60]

Ten rows at a time, prepared, in two forms: a bare scan of the HNSW index, with the vector as a
plain parameter and as it is sent in an expression of one's own; and the statement of ``nearest``,
as it is and with the answer of the catalog as a constant. Blocks of searches are interleaved;
printed are microseconds of the server's CPU time a search (medians of the blocks) and the median of
the ratios of neighbouring blocks. CPU time, since other programs may share the machine. Runs on an
embedded server of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
from typing import Any

import numpy as np
import psycopg
import sqlalchemy as sa
from bench_server import cpu_seconds, fresh_server
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import catalog, create_all, embedding_column, hnsw_index, nearest
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "4GB", "synchronous_commit": "off"}
SEARCHES = 50
PLAIN = "SELECT id FROM note ORDER BY embedding <=> %(param_1)s::vector LIMIT 10"
FENCED = (
    "SELECT id FROM note ORDER BY embedding <=> (SELECT CASE WHEN sbert.fence_v1("
    "'note'::regclass, 'embedding', %(fingerprint)s, %(known)s) IS NOT NULL "
    "THEN %(param_1)s::vector END) LIMIT 10"
)
FENCE = re.compile(r"sbert\.fence_v1\(.*\) AS id", re.DOTALL)


def declared(encoder: DeterministicEncoder) -> Any:
    """The mapped class."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        __table_args__ = (hnsw_index("note_embedding", "embedding", ef_construction=64),)
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding = embedding_column(encoder.spec, source="body")

    return Note


def prepare(engine: sa.Engine, note: Any, encoder: DeterministicEncoder, rows: int) -> str:
    """The table, with rows that are proven, and an index; the identity of its binding."""
    with engine.begin() as connection:
        create_all(connection, note.metadata)
        binding = catalog.require_binding(connection, ColumnIdentity(None, "note", "embedding"))
        catalog.hold_encoder(connection, binding, encoder)
        run = connection.exec_driver_sql
        run("DROP INDEX note_embedding")
        run(
            "INSERT INTO note (id, body, embedding, embedding_of) "
            "SELECT i, i::text, v, sbert.proof_v1('note', 'embedding', %s, i::text, v) FROM ("
            "SELECT i, (SELECT array_agg(random() - 0.5)::vector FROM generate_series(1, %s) AS d "
            "WHERE d + i > 0) AS v FROM generate_series(1, %s) AS i) AS made",
            (encoder.spec.fingerprint, encoder.spec.dimensions, rows),
        )
        sa.schema.CreateIndex(next(iter(note.__table__.indexes)))(note.__table__, connection)
        run("ANALYZE note")
    return str(binding.id)


def statement_of(engine: sa.Engine, note: Any, query: Any) -> tuple[str, dict[str, Any]]:
    """The text of a search, as it is sent, and its parameters."""
    sent: list[tuple[str, Any]] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def keep(_: Any, __: Any, text: str, parameters: Any, *___: Any) -> None:
        sent.append((text, parameters))

    with engine.connect() as connection:
        for _ in range(2):  # The first compares the process with the column.
            assert len(connection.execute(nearest(note.embedding, query, limit=10)).all()) == 10
    return next(one for one in reversed(sent) if "nearest_query" in one[0])


def report(
    connection: psycopg.Connection, name: str, pair: tuple[str, str], rows: list[Any], blocks: int
) -> None:
    """Compare a statement without and with the question."""
    backend = connection.info.backend_pid
    spent: tuple[list[float], list[float]] = ([], [])
    for number in range(blocks + 1):
        for fenced in (False, True) if number % 2 else (True, False):
            before = cpu_seconds(backend)
            for row in rows:
                connection.execute(pair[fenced], row, prepare=True).fetchall()
            if number:  # The first block warms up.
                spent[fenced].append(1e6 * (cpu_seconds(backend) - before) / len(rows))
    ratios = [b / a for a, b in zip(*spent, strict=True)]
    plain, fenced_time = map(statistics.median, spent)
    print(f"{name}: {plain:.0f} us, fenced {fenced_time:.0f} us a search", end="")
    print(f", median of the ratios {statistics.median(ratios):.3f}", end="")
    print(f", of the sums {sum(spent[1]) / sum(spent[0]):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=60)
    options = parser.parse_args()
    encoder = DeterministicEncoder(dimensions=options.dimensions)
    note = declared(encoder)
    queries = np.random.default_rng(1).standard_normal((SEARCHES, options.dimensions))
    directory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with fresh_server(SETTINGS, directory=directory) as server:
        engine = sa.create_engine(server.ensure_database("bench"))
        known = prepare(engine, note, encoder, options.rows)
        text, parameters = statement_of(engine, note, queries[0])
        engine.dispose()
        shared = {**parameters, "fingerprint": encoder.spec.fingerprint, "known": known}
        rows = [shared | {"param_1": str(query.tolist())} for query in queries]
        searched = (FENCE.sub(f"'{known}'::uuid AS id", text), text)
        assert "fence_v1" in text
        assert "fence_v1" not in searched[0]
        with psycopg.connect(server.dsn("bench"), autocommit=True) as connection:
            report(connection, "bare scan of the index", (PLAIN, FENCED), rows, options.blocks)
            report(connection, "nearest", searched, rows, options.blocks)


if __name__ == "__main__":
    main()
