"""Clusters as commands show them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg import clustering as lib
from sbert_pg.cli import common
from sbert_pg.errors import ClusteringError


def plain(made: lib.ClusterRun) -> dict[str, Any]:
    """A run as plain data."""
    return {
        name: getattr(made, name)
        for name in ("id", "column_name", "encoder", "algorithm", "parameters", "state", "rows",
                     "n_clusters", "outliers", "inertia", "score", "curve", "mean_distance",
                     "started_at", "finished_at")
    }  # fmt: skip


def clusters(
    engine: sa.Engine, topics: lib.Clustering, limit: int | None = None
) -> list[dict[str, Any]]:
    """The current clusters, largest first."""
    statement = topics.clusters() if limit is None else topics.clusters().limit(limit)
    with Session(engine) as session:
        return [
            {
                "number": cluster.number,
                "label": cluster.label,
                "size": cluster.size,
                "cohesion": None if cluster.cohesion is None else round(cluster.cohesion, 3),
                "keywords": cluster.keywords,
                "exemplar": row_text(topics, cluster.exemplar),
            }
            for cluster in session.scalars(statement)
        ]


def members(
    engine: sa.Engine, topics: lib.Clustering, number: int, limit: int
) -> list[dict[str, Any]]:
    """Rows of a current cluster, nearest to its centroid first."""
    with Session(engine) as session:
        rows = session.execute(topics.members(number).limit(limit)).all()
        if not rows:
            raise ClusteringError(
                f"There is no current cluster {number} with rows; 'sbert-pg cluster show' lists "
                "them."
            )
        keys = [key.name for key in topics.keys]
        return [
            {
                **{name: _value(row, topics, name) for name in keys},
                "distance": round(float(distance), 4),
                "text": row_text(topics, row),
            }
            for row, distance in rows
        ]


def runs(engine: sa.Engine, topics: lib.Clustering, limit: int) -> list[dict[str, Any]]:
    """The latest runs, whatever became of them."""
    table = topics.run_table
    names = ("id", "column_name", "algorithm", "state", "is_current", "rows", "n_clusters",
             "outliers", "score", "started_at", "error")  # fmt: skip
    statement = sa.select(*(table.c[name] for name in names)).order_by(table.c.id.desc())
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(statement.limit(limit)).mappings()]


def print_clusters(found: list[dict[str, Any]]) -> None:
    """Print clusters as a table."""
    if not found:
        common.note("There are no current clusters; 'sbert-pg cluster run' makes them.")
        return
    common.print_table(
        ["number", "label", "size", "cohesion", "keywords", "exemplar"],
        [
            [
                row["number"],
                row["label"],
                row["size"],
                row["cohesion"],
                ", ".join(row["keywords"][:6]),
                row["exemplar"],
            ]
            for row in found
        ],
    )


def row_text(topics: lib.Clustering, row: Any, width: int = 80) -> str | None:
    """The beginning of a row's text; its key for a plain vector column."""
    if row is None:
        return None
    if topics.source is None:
        return ", ".join(str(_value(row, topics, key.name)) for key in topics.keys)
    values = {name: _value(row, topics, name) for name in topics.source.columns}
    line = " ".join(topics.source.text(values).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _value(row: Any, topics: lib.Clustering, name: str) -> Any:
    mapper = sa.inspect(topics.entity)
    return getattr(row, mapper.get_property_by_column(topics.rows.c[name]).key)
