"""A flush of 1,000 new objects: how its time is divided.

    pip install 'sbert-pg[embedded,convert]'
    python benchmarks/flush.py [--objects 1000] [--rounds 7] [--encoder all-MiniLM-L6-v2]

Three flushes in turn, of the same objects into empty tables:

- "as it is": encoded in the flush, written with the rows;
- "without vectors": the same class without an embedding column, which is what SQLAlchemy and the
  server take for the texts alone;
- "vectors given": the vectors are assigned beforehand, so nothing is encoded.

Encoding is timed inside the flush, by a wrapper around the encoder, and the server by the wall time
of the driver's calls. What is left is Python: SQLAlchemy's and this library's; the difference to a
flush with vectors given is this library's own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from bench_server import fresh_server
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, embed_on_flush, embedding_column, use_encoder
from sbert_pg.testing import DeterministicEncoder

SETTINGS = {"shared_buffers": "512MB", "synchronous_commit": "off"}


class Base(DeclarativeBase):
    """Of the two classes."""


class Note(Base):
    """With an embedding column."""

    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column("bench", source="title", dimensions=384, nullable=True)


class Plain(Base):
    """Without."""

    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class Timed:
    """An encoder that adds up the time it takes."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode_document(self, texts: Sequence[str]) -> Any:
        """As the encoder does."""
        start = time.perf_counter()
        vectors = self._encoder.encode_document(texts)
        self.seconds += time.perf_counter() - start
        return vectors


class Server:
    """Adds up the wall time of statements."""

    def __init__(self, engine: sa.Engine) -> None:
        self.seconds = 0.0
        self._start = 0.0
        sa.event.listen(engine, "before_cursor_execute", self._before)
        sa.event.listen(engine, "after_cursor_execute", self._after)

    def _before(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def _after(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._start


Parts = tuple[float, float, float]


def timed(
    engine: sa.Engine, make: Callable[[], list[Any]], encoder: Timed, server: Server
) -> Parts:
    """Seconds of one flush: all, encoding, server."""
    with Session(engine) as session:
        embed_on_flush(session)
        session.execute(sa.text("TRUNCATE note, plain"))
        session.add_all(make())
        encoder.seconds = server.seconds = 0.0
        start = time.perf_counter()
        session.flush()
        whole = time.perf_counter() - start
        session.commit()
    return whole, encoder.seconds, server.seconds


def measure(url: sa.URL, encoder: Timed, objects: int, rounds: int) -> dict[str, Parts]:
    """Medians by flush."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    texts = [f"title number {i}: how to get a refund for order {i * 7}" for i in range(objects)]
    vectors = np.asarray(encoder.encode_document(texts), dtype=np.float32)
    server = Server(engine)
    flushes: dict[str, Callable[[], list[Any]]] = {
        "as it is": lambda: [Note(title=text) for text in texts],
        "vectors given": lambda: [
            Note(title=text, embedding=vector) for text, vector in zip(texts, vectors, strict=True)
        ],
        "without vectors": lambda: [Plain(title=text) for text in texts],
    }
    found: dict[str, list[Parts]] = {name: [] for name in flushes}
    for round_ in range(rounds + 1):
        for name, make in flushes.items():
            parts = timed(engine, make, encoder, server)
            if round_:  # the first fills caches
                found[name].append(parts)
    engine.dispose()
    return {
        name: (
            statistics.median(p[0] for p in parts),
            statistics.median(p[1] for p in parts),
            statistics.median(p[2] for p in parts),
        )
        for name, parts in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encoder", help="a name or path; one that only hashes words else")
    arguments = parser.parse_args()
    if arguments.encoder:
        from sbert_pg import Encoder

        encoder = Timed(Encoder.load(arguments.encoder))
    else:
        encoder = Timed(DeterministicEncoder(dimensions=384))
    use_encoder(encoder, name="bench")
    with fresh_server(SETTINGS) as server:
        url = server.ensure_database("bench")
        found = measure(url, encoder, arguments.objects, arguments.rounds)
    print(f"{'ms':18}{'whole':>8}{'encoding':>10}{'server':>8}{'rest':>8}  rest's share")
    for name, (whole, encoding, in_server) in found.items():
        rest = whole - encoding - in_server
        print(
            f"{name:18}{whole * 1e3:8.1f}{encoding * 1e3:10.1f}{in_server * 1e3:8.1f}"
            f"{rest * 1e3:8.1f}  {rest / whole:.1%}"
        )


if __name__ == "__main__":
    main()
