"""A small application whose rows fall into topics that anybody can tell apart."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg.clustering import Clustering, DuplicateTable, clusters_of, duplicates_of
from sbert_pg.indexes import hnsw_index
from sbert_pg.types import HalfVector, Vector

DIMENSIONS = 24
#: The tests take the functions of this file from here, whatever pytest calls it.
sys.modules["clustering_app"] = sys.modules[__name__]


@dataclass
class App:
    """The mapped classes of one test."""

    base: Any
    row: Any
    topics: Clustering
    duplicates: DuplicateTable

    def fill(self, engine: sa.Engine, vectors: Any, **columns: Any) -> None:
        """Create the tables, and rows numbered from 1."""
        self.base.metadata.create_all(engine)
        values = [
            {
                "id": number,
                "title": f"row {number}",
                "embedding": vector,
                **{name: column[number - 1] for name, column in columns.items()},
            }
            for number, vector in enumerate(vectors, 1)
        ]
        with engine.begin() as connection:
            connection.execute(sa.insert(self.row.__table__), values)


def make_app(
    *,
    dimensions: int = DIMENSIONS,
    metric: Any = None,
    half: bool = False,
    key: Any = sa.BigInteger,
    where: Callable[[Any], Any] | None = None,
) -> App:
    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "row"
        __table_args__ = (hnsw_index("row_embedding", "embedding"),)
        id: Mapped[Any] = mapped_column(key, primary_key=True)
        title: Mapped[str] = mapped_column(sa.Text)
        kind: Mapped[int | None]
        embedding = mapped_column(HalfVector(dimensions) if half else Vector(dimensions))

    topics = clusters_of(
        Row.embedding, metric=metric, where=where(Row) if where is not None else None
    )
    return App(Base, Row, topics, duplicates_of(Row.embedding))


@pytest.fixture
def app() -> App:
    return make_app()


def blobs(
    rows: int = 300,
    clusters: int = 5,
    *,
    noise: float = 0.05,
    seed: int = 0,
    dimensions: int = DIMENSIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around orthogonal directions, and the direction of each."""
    random = np.random.default_rng(seed)
    directions = np.eye(dimensions, dtype=np.float32)[:clusters]
    truth = np.arange(rows) % clusters
    vectors = directions[truth] + noise * random.standard_normal((rows, dimensions))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), truth


def numbers_of(engine: sa.Engine, topics: Clustering) -> dict[Any, int | None]:
    """The number of the current cluster of each row, by key."""
    assignment, cluster, run = topics.assignment_table, topics.cluster_table, topics.run_table
    statement = (
        sa.select(*topics.row_keys, cluster.c.number)
        .join_from(assignment, run, run.c.id == assignment.c.run_id)
        .outerjoin(cluster, cluster.c.id == assignment.c.cluster_id)
        .where(run.c.is_current, run.c.column_name == topics.column.name)
    )
    width = len(topics.row_keys)
    with engine.connect() as connection:
        return {
            row[0] if width == 1 else tuple(row[:width]): row[width]
            for row in connection.execute(statement)
        }


def same_partition(one: Any, other: Any) -> bool:
    """Whether two labellings group alike, whatever the names of the groups."""
    pairs = set(zip(one, other, strict=True))
    return len(pairs) == len(set(one)) == len(set(other))
