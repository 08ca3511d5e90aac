"""Runs, clusters and assignments as mapped classes in the application's own metadata.

The classes are made beside the embedding column that is clustered, so Alembic sees their tables
like any other and the application joins, filters and migrates them as its own. Rows are referenced
by real foreign keys.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, Mapper, foreign, relationship

from sbert_pg.errors import DeclarationError
from sbert_pg.types import Vector

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Longest identifier that PostgreSQL keeps.
MAX_IDENTIFIER = 63
#: What the references to rows are called: this, then the name of the key column.
ROW_PREFIX = "row_"
EXEMPLAR_PREFIX = "exemplar_"


class ClusterRun:
    """One clustering of a column's vectors. Subclasses are mapped by ``clusters_of``.

    Attributes:
        id: number of the run; a later run has a larger one.
        column_name: name of the vector column that was clustered.
        encoder: name of the column's encoder, or ``None`` for a plain vector column.
        fingerprint: fingerprint of the encoder, where the column was bound to one.
        algorithm: ``kmeans``, ``mini-batch``, ``hdbscan``, ``communities`` or ``agglomerative``.
        parameters: its parameters, and ``method``: how it was computed.
        seed: seed of everything random in it.
        filter: the criterion that rows had to meet, as SQL, or ``None``.
        metric: ``cosine`` or ``euclidean``; the unit of every distance of the run.
        state: ``running``, ``done`` or ``failed``.
        is_current: whether this is the run that readers see; one for each column at most.
        rows: rows that were clustered.
        n_clusters: clusters that were found.
        outliers: rows without a cluster.
        inertia: sum of squared euclidean distances to the centroids; of unit vectors under cosine.
        score: value of the criterion by which the number of clusters was chosen, if it was.
        curve: what was tried for that: a list of ``{"n_clusters", "score", "inertia"}``.
        mean_distance: mean distance of the clustered rows to their centroids.
        far_distance: distance that 1 in 100 of them exceeded.
        error: why the run failed.
        started_at: time of its start.
        finished_at: time of its end.
        clusters: its clusters, by number.
    """

    id: Mapped[int]
    column_name: Mapped[str]
    encoder: Mapped[str | None]
    fingerprint: Mapped[str | None]
    algorithm: Mapped[str]
    parameters: Mapped[dict[str, Any]]
    seed: Mapped[int]
    filter: Mapped[str | None]
    metric: Mapped[str]
    state: Mapped[str]
    is_current: Mapped[bool]
    rows: Mapped[int | None]
    n_clusters: Mapped[int | None]
    outliers: Mapped[int | None]
    inertia: Mapped[float | None]
    score: Mapped[float | None]
    curve: Mapped[list[dict[str, Any]] | None]
    mean_distance: Mapped[float | None]
    far_distance: Mapped[float | None]
    error: Mapped[str | None]
    started_at: Mapped[datetime.datetime]
    finished_at: Mapped[datetime.datetime | None]
    clusters: Mapped[list[Cluster]]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.algorithm} {self.state}>"


class Cluster:
    """One cluster of one run. Subclasses are mapped by ``clusters_of``.

    Attributes:
        id: key of the cluster.
        run_id: its run.
        number: its identity, which a cluster of the next run takes over where the two match.
        centroid: mean of its rows' vectors, at length one under cosine.
        size: rows in it.
        label: its name: what a user called it, else its first keywords.
        is_named: whether a user has called it so; such a label goes with the number.
        keywords: words that tell it from the other clusters, best first.
        cohesion: mean similarity of its rows to its centroid, larger for tighter: under cosine one
            minus the mean distance, else the negative mean distance.
        radius: distance that 1 in 100 of its rows exceed.
        run: its run.
        assignments: its assignments, nearest to the centroid first.
        rows: the rows themselves, nearest first.
        exemplar: the row nearest to the centroid.
    """

    id: Mapped[int]
    run_id: Mapped[int]
    number: Mapped[int]
    centroid: Mapped[npt.NDArray[np.float32]]
    size: Mapped[int]
    label: Mapped[str | None]
    is_named: Mapped[bool]
    keywords: Mapped[list[str]]
    cohesion: Mapped[float | None]
    radius: Mapped[float | None]
    run: Mapped[Any]
    assignments: Mapped[list[Assignment]]
    rows: Mapped[list[Any]]
    exemplar: Mapped[Any]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.number} {self.label!r} of {self.size} rows>"


class Assignment:
    """One row's place in one run. Subclasses are mapped by ``clusters_of``.

    Attributes:
        run_id: the run.
        cluster_id: the cluster; ``None`` for an outlier.
        distance: distance to the centroid; for an outlier to the nearest one.
        is_fitted: whether the row took part in the run; ``False`` for rows assigned afterwards.
        run: the run.
        cluster: the cluster, or ``None``.
        row: the row.
    """

    run_id: Mapped[int]
    cluster_id: Mapped[int | None]
    distance: Mapped[float]
    is_fitted: Mapped[bool]
    run: Mapped[Any]
    cluster: Mapped[Any]
    row: Mapped[Any]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} run {self.run_id} cluster {self.cluster_id}>"


def run_table(prefix: str, metadata: sa.MetaData, schema: str | None) -> sa.Table:
    """The table of runs."""
    table = sa.Table(
        identifier(f"{prefix}_run"),
        metadata,
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("column_name", sa.Text, nullable=False),
        sa.Column("encoder", sa.Text),
        sa.Column("fingerprint", sa.Text),
        sa.Column("algorithm", sa.Text, nullable=False),
        sa.Column("parameters", JSONB, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("filter", sa.Text),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("is_current", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("rows", sa.BigInteger),
        sa.Column("n_clusters", sa.Integer),
        sa.Column("outliers", sa.BigInteger),
        sa.Column("inertia", sa.Double),
        sa.Column("score", sa.Double),
        sa.Column("curve", JSONB(none_as_null=True)),
        sa.Column("mean_distance", sa.Double),
        sa.Column("far_distance", sa.Double),
        sa.Column("error", sa.Text),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.func.clock_timestamp(),
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        schema=schema,
    )
    # What makes the switch atomic: there is no moment with two current runs.
    sa.Index(
        identifier(f"uq_{table.name}_current"),
        table.c.column_name,
        unique=True,
        postgresql_where=table.c.is_current,
    )
    return table


def cluster_table(
    prefix: str, metadata: sa.MetaData, schema: str | None, run: sa.Table, rows: sa.Table
) -> sa.Table:
    """The table of clusters."""
    name = identifier(prefix)
    exemplar = references(rows, EXEMPLAR_PREFIX, nullable=True)
    return sa.Table(
        name,
        metadata,
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("run_id", sa.ForeignKey(run.c.id, ondelete="CASCADE"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        # No width: runs over an old and a new encoder's column share the table.
        sa.Column("centroid", Vector(), nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("label", sa.Text),
        sa.Column("is_named", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("keywords", ARRAY(sa.Text), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("cohesion", sa.Double),
        sa.Column("radius", sa.Double),
        *exemplar,
        sa.ForeignKeyConstraint(
            [column.name for column in exemplar], list(rows.primary_key), ondelete="SET NULL"
        ),
        sa.UniqueConstraint("run_id", "number", name=identifier(f"uq_{name}_number")),
        schema=schema,
    )


def assignment_table(
    prefix: str,
    metadata: sa.MetaData,
    schema: str | None,
    run: sa.Table,
    cluster: sa.Table,
    rows: sa.Table,
) -> sa.Table:
    """The table of assignments."""
    name = identifier(f"{prefix}_assignment")
    row = references(rows, ROW_PREFIX, nullable=False)
    return sa.Table(
        name,
        metadata,
        *row,
        sa.Column("run_id", sa.ForeignKey(run.c.id, ondelete="CASCADE"), nullable=False),
        sa.Column("cluster_id", sa.ForeignKey(cluster.c.id, ondelete="CASCADE")),
        sa.Column("distance", sa.REAL, nullable=False),
        sa.Column("is_fitted", sa.Boolean, nullable=False),
        # The row's key comes first: this index also serves deletes of rows.
        sa.PrimaryKeyConstraint(*(column.name for column in row), "run_id"),
        sa.ForeignKeyConstraint(
            [column.name for column in row], list(rows.primary_key), ondelete="CASCADE"
        ),
        # Members of a cluster, nearest first.
        sa.Index(identifier(f"ix_{name}_cluster"), "cluster_id", "distance"),
        schema=schema,
    )


def references(rows: sa.Table, prefix: str, *, nullable: bool) -> list[sa.Column[Any]]:
    """Columns that refer to a row's key."""
    return [
        sa.Column(identifier(prefix + key.name), key.type, nullable=nullable)
        for key in rows.primary_key
    ]


def identifier(name: str) -> str:
    """The name, unless the server would cut it.

    Raises:
        DeclarationError: it is longer than PostgreSQL keeps.
    """
    if len(name.encode()) > MAX_IDENTIFIER:
        raise DeclarationError(
            f"The identifier {name!r} is longer than {MAX_IDENTIFIER} bytes; give clusters_of() a "
            "shorter prefix."
        )
    return name


def map_classes(
    entity: Mapper[Any], rows: sa.Table, run: sa.Table, cluster: sa.Table, assignment: sa.Table
) -> tuple[type[ClusterRun], type[Cluster], type[Assignment]]:
    """Map the three classes to their tables, with relationships among them and to the rows."""
    registry = entity.registry
    run_class = _subclass(ClusterRun, entity, run)
    cluster_class = _subclass(Cluster, entity, cluster)
    assignment_class = _subclass(Assignment, entity, assignment)
    row_join = _references_row(assignment, rows, ROW_PREFIX)
    registry.map_imperatively(
        run_class,
        run,
        properties={
            "clusters": relationship(
                cluster_class,
                back_populates="run",
                order_by=cluster.c.number,
                passive_deletes="all",
            )
        },
    )
    registry.map_imperatively(
        cluster_class,
        cluster,
        properties={
            "run": relationship(run_class, back_populates="clusters"),
            "assignments": relationship(
                assignment_class,
                back_populates="cluster",
                order_by=assignment.c.distance,
                passive_deletes="all",
            ),
            "rows": relationship(
                entity,
                secondary=assignment,
                primaryjoin=assignment.c.cluster_id == cluster.c.id,
                secondaryjoin=row_join,
                order_by=assignment.c.distance,
                viewonly=True,
            ),
            "exemplar": relationship(
                entity,
                primaryjoin=_references_row(cluster, rows, EXEMPLAR_PREFIX),
                viewonly=True,
            ),
        },
    )
    registry.map_imperatively(
        assignment_class,
        assignment,
        properties={
            "run": relationship(run_class, viewonly=True),
            "cluster": relationship(cluster_class, back_populates="assignments"),
            "row": relationship(entity, primaryjoin=row_join, viewonly=True),
        },
    )
    return run_class, cluster_class, assignment_class


def extend_entity(
    entity: Mapper[Any],
    attribute: str,
    column_name: str,
    classes: tuple[type[ClusterRun], type[Cluster], type[Assignment]],
    rows: sa.Table,
) -> None:
    """Give the row's class its current clusters, and its assignments in every run.

    Raises:
        DeclarationError: the class has such an attribute already.
    """
    run, cluster, assignment = (sa.inspect(cls).local_table for cls in classes)
    all_runs = f"{attribute.removesuffix('s')}_assignments"
    for name in (attribute, all_runs):
        if entity.has_property(name) or hasattr(entity.class_, name):
            raise DeclarationError(
                f"{entity.class_.__name__} has an attribute {name!r} already; give clusters_of() "
                "another one with attribute=."
            )
    through = sa.join(assignment, run, assignment.c.run_id == run.c.id)
    row_join = _references_row(assignment, rows, ROW_PREFIX)
    entity.add_property(
        attribute,
        relationship(
            classes[1],
            secondary=through,
            primaryjoin=sa.and_(row_join, run.c.is_current, run.c.column_name == column_name),
            secondaryjoin=foreign(assignment.c.cluster_id) == cluster.c.id,
            viewonly=True,
        ),
    )
    entity.add_property(
        all_runs,
        relationship(classes[2], primaryjoin=row_join, order_by=assignment.c.run_id, viewonly=True),
    )


def _references_row(table: sa.Table, rows: sa.Table, prefix: str) -> sa.ColumnElement[bool]:
    return sa.and_(*(foreign(table.c[prefix + key.name]) == key for key in rows.primary_key))


def _subclass(base: type[Any], entity: Mapper[Any], table: sa.Table) -> type[Any]:
    name = "".join(part[:1].upper() + part[1:] for part in table.name.split("_"))
    return type(name, (base,), {"__module__": entity.class_.__module__, "__doc__": base.__doc__})
