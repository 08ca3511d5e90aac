"""Search by words beside PostgreSQL's own ranking: time, and what writing costs.

    python benchmarks/words.py [--rows N] [--questions N] [--database URL] [--json FILE]

One table of texts (three docstrings of the standard library each, some 90 words). Every question is
asked in turns: ``matching``, the same scoring every row with any of its words (``exhaustive``),
``ts_rank_cd`` with the words joined by OR, ``nearest`` alone and
``hybrid``. Given are medians in milliseconds, the median of the ratio to ``ts_rank_cd`` asked the
same question, and the ratio of ``hybrid`` to the sum of its arms.

*Writing* is the time to insert rows into a table with a plain generated ``tsvector`` and GIN, and
into one with ``text_column`` and ``text_index``, which are the same.
Quality is measured by ``sbert-pg evaluate``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from bench_server import fresh_server
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import hnsw_index, hybrid, matching, nearest, text_column, text_index
from sbert_pg.cli.demo_data import standard_library
from sbert_pg.search import fusion
from sbert_pg.types import Vector

DIMENSIONS = 64
#: Vectors are noise: how well the graph is built says nothing, and takes most of the time.
HNSW = hnsw_index("text_vector", "vector", ef_construction=64)


class Base(DeclarativeBase):
    """The tables of this benchmark."""


class Text(Base):
    """A long text."""

    __tablename__ = "text"
    __table_args__ = (text_index("text_search", "search"), HNSW)
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    vector: Mapped[Any] = mapped_column(Vector(DIMENSIONS))
    search = text_column("body")


class Written(Base):
    """Written by ``text_column``."""

    __tablename__ = "written"
    __table_args__ = (text_index("written_search", "search"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    search = text_column("body")


PLAIN = sa.Table(
    "plain",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("body", sa.Text),
    sa.Column(
        "search",
        sa.dialects.postgresql.TSVECTOR,
        sa.Computed("to_tsvector('english', coalesce(body, ''))", persisted=True),
    ),
    sa.Index("plain_search", "search", postgresql_using="gin"),
)


def bodies(count: int) -> list[str]:
    """Long texts: three docstrings each, drawn at random."""
    texts = [entry.docstring for entry in standard_library()]
    random = np.random.default_rng(1)
    picked = random.integers(0, len(texts), size=(count, 3))
    return [" ".join(texts[i][:900] for i in row) for row in picked]


def fill(engine: sa.Engine, texts: list[str]) -> None:
    """The table of long texts, analysed."""
    random = np.random.default_rng(2)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
        for table in (Text.__table__, Written.__table__, PLAIN):
            table.drop(connection, checkfirst=True)
            table.create(connection)
        for index in Text.__table__.indexes:
            index.drop(connection)
        for first in range(0, len(texts), 5000):
            part = texts[first : first + 5000]
            vectors = random.normal(size=(len(part), DIMENSIONS)).astype(np.float32)
            rows = [
                {"id": first + n, "body": body, "vector": vector}
                for n, (body, vector) in enumerate(zip(part, vectors, strict=True))
            ]
            connection.execute(sa.insert(Text), rows)
        connection.execute(sa.text("SET LOCAL maintenance_work_mem = '1GB'"))
        for index in Text.__table__.indexes:
            index.create(connection)
        connection.execute(sa.text("ALTER TABLE text ALTER search SET STATISTICS 1000"))
        connection.execute(sa.text("ANALYZE text"))


def ranked_by_server(question: str) -> sa.Select[Any]:
    """What guides write, with OR: with AND most questions find nothing."""
    words = sa.select(
        sa.func.string_agg(sa.func.quote_literal(sa.column("lexeme")), " | ")
    ).select_from(sa.func.unnest(sa.func.to_tsvector("english", question)).alias("lexemes"))
    query = sa.cast(words.scalar_subquery(), sa.dialects.postgresql.TSQUERY)
    asked = sa.select(query.label("query")).cte("asked").prefix_with("MATERIALIZED")
    vector = Text.__table__.c.search
    score = sa.func.ts_rank_cd(vector, asked.c.query).label("score")
    matches = vector.op("@@")(sa.select(asked.c.query).scalar_subquery())
    return (
        sa.select(Text.__table__.c.id, score)
        .select_from(sa.join(Text.__table__, asked, sa.true()))
        .where(matches)
        .order_by(sa.desc("score"), Text.__table__.c.id)
        .limit(10)
    )


def timed(connection: sa.Connection, statement: Any) -> tuple[float, list[Any]]:
    started = time.perf_counter()
    rows = connection.execute(statement).all()
    return 1000 * (time.perf_counter() - started), rows


def times(engine: sa.Engine, texts: list[str], count: int) -> dict[str, Any]:
    """Every way asked in turns."""
    table = Text.__table__.c
    random = np.random.default_rng(3)
    taken: dict[str, list[float]] = {}
    same = 0
    real = fusion.nearest
    with engine.connect() as connection:
        for n in range(count + 2):
            question = " ".join(texts[random.integers(len(texts))].split()[:12])
            vector = random.normal(size=DIMENSIONS).astype(np.float32)
            # Vectors that are at hand: what is timed is the database.
            fusion.nearest = lambda column, _, v=vector, **options: real(column, v, **options)
            ways = {
                "matching": matching(table.search, question),
                "exhaustive": matching(table.search, question, exhaustive=True),
                "ts_rank_cd": ranked_by_server(question),
                "nearest 100": nearest(table.vector, vector, limit=100),
                "matching 100": matching(table.search, question, limit=100),
                "hybrid": hybrid(table.vector, table.search, question),
            }
            answers = {}
            for name, statement in ways.items():
                spent, answers[name] = timed(connection, statement)
                if n >= 2:  # the first two warm up
                    taken.setdefault(name, []).append(spent)
            same += [r.id for r in answers["matching"]] == [r.id for r in answers["exhaustive"]]
    fusion.nearest = real
    medians = {name: round(statistics.median(values), 2) for name, values in taken.items()}

    def ratio(name: str) -> float:
        pairs = zip(taken[name], taken["ts_rank_cd"], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    arms = medians["nearest 100"] + medians["matching 100"]
    return {
        "milliseconds": medians,
        "of ts_rank_cd": {"matching": ratio("matching"), "exhaustive": ratio("exhaustive")},
        "hybrid of its arms": round(medians["hybrid"] / arms, 3),
        "same ten": f"{same} of {count + 2}",
    }


def writing(engine: sa.Engine, texts: list[str]) -> dict[str, float]:
    """Milliseconds for a thousand rows, the better of interleaved turns."""
    best: dict[str, float] = {}
    with engine.connect() as connection:
        for turn in range(5):
            for name, table in (("plain", PLAIN), ("text_column", Written.__table__)):
                rows = [{"id": turn * 1000 + n, "body": t} for n, t in enumerate(texts[:1000])]
                started = time.perf_counter()
                connection.execute(sa.insert(table), rows)
                connection.commit()
                spent = 1000 * (time.perf_counter() - started)
                best[name] = min(best.get(name, spent), spent)
    return {name: round(value) for name, value in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--database")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.database:
        run(sa.create_engine(options.database), options)
        return
    with fresh_server() as server:
        run(sa.create_engine(server.ensure_database("words")), options)


def run(engine: sa.Engine, options: Any) -> None:
    """Fill, measure, print."""
    texts = bodies(options.rows)
    fill(engine, texts)
    report = times(engine, texts, options.questions)
    report["writing 1,000 rows"] = writing(engine, texts)
    text = json.dumps({"rows": options.rows, **report}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text)
    engine.dispose()


if __name__ == "__main__":
    main()
