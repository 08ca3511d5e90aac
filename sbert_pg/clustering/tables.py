"""Runs, clusters and assignments as mapped classes in the application's own metadata.

The classes are made beside the embedding column that is clustered, so Alembic sees their tables
like any other and the application joins, filters and migrates them as its own. Rows are referenced
by real foreign keys.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, Mapper, foreign, mapped_column, relationship

from sbert_pg.errors import DeclarationError
from sbert_pg.types import Vector

#: Longest identifier that PostgreSQL keeps.
MAX_IDENTIFIER = 63
#: What the references to rows are called: this, then the name of the key column.
ROW_PREFIX = "row_"
EXEMPLAR_PREFIX = "exemplar_"
#: Classes and columns of a clustering: those of its runs, its clusters and its assignments.
T = TypeVar("T")
Classes = tuple["type[ClusterRun]", "type[Cluster]", "type[Assignment]"]


class ClusterRun:
    """One clustering of a column's vectors. Subclasses are mapped by ``clusters_of``.

    Attributes:
        id: number of the run; a later run has a larger one.
        column_name: name of the vector column that was clustered.
        encoder: name of the column's encoder, or ``None`` for a plain vector column.
        fingerprint: fingerprint of the encoder, where the column was bound to one.
        algorithm: ``kmeans``, ``hdbscan``, ``communities`` or ``agglomerative``.
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
        pending: rows among them whose vector was not that of their text at the time.
        warnings: what speaks against the result, in sentences; mostly nothing.
        score: by what the number of clusters was chosen, if it was; see ``KMeans``.
        curve: what was tried for that: a list of ``{"n_clusters", "score", "inertia"}``.
        mean_distance: mean distance of the clustered rows to their centroids.
        far_distance: distance that 1 in 100 of them exceeded.
        projection: how its rows were placed on the map, if they were.
        error: why the run failed.
        started_at: time of its start.
        finished_at: time of its end.
        clusters: its clusters, by number.
    """

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    column_name: Mapped[str] = mapped_column(sa.Text)
    encoder: Mapped[str | None] = mapped_column(sa.Text)
    fingerprint: Mapped[str | None] = mapped_column(sa.Text)
    algorithm: Mapped[str] = mapped_column(sa.Text)
    parameters: Mapped[dict[str, Any]] = mapped_column(JSONB)
    seed: Mapped[int] = mapped_column(sa.BigInteger)
    filter: Mapped[str | None] = mapped_column(sa.Text)
    metric: Mapped[str] = mapped_column(sa.Text)
    state: Mapped[str] = mapped_column(sa.Text)
    is_current: Mapped[bool] = mapped_column(sa.Boolean, server_default=sa.false())
    rows: Mapped[int | None] = mapped_column(sa.BigInteger)
    n_clusters: Mapped[int | None] = mapped_column(sa.Integer)
    outliers: Mapped[int | None] = mapped_column(sa.BigInteger)
    inertia: Mapped[float | None] = mapped_column(sa.Double)
    pending: Mapped[int | None] = mapped_column(sa.BigInteger)
    warnings: Mapped[list[str]] = mapped_column(ARRAY(sa.Text), server_default=sa.text("'{}'"))
    score: Mapped[float | None] = mapped_column(sa.Double)
    curve: Mapped[list[dict[str, Any]] | None] = mapped_column(JSONB(none_as_null=True))
    mean_distance: Mapped[float | None] = mapped_column(sa.Double)
    far_distance: Mapped[float | None] = mapped_column(sa.Double)
    projection: Mapped[str | None] = mapped_column(sa.Text)
    error: Mapped[str | None] = mapped_column(sa.Text)
    started_at: Mapped[datetime.datetime] = mapped_column(
        sa.DateTime(timezone=True), server_default=sa.func.clock_timestamp()
    )
    finished_at: Mapped[datetime.datetime | None] = mapped_column(sa.DateTime(timezone=True))
    if TYPE_CHECKING:
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

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True, sort_order=-1)
    number: Mapped[int] = mapped_column(sa.Integer)
    # No width: runs over an old and a new encoder's column share the table.
    centroid: Mapped[npt.NDArray[np.float32]] = mapped_column(Vector())
    size: Mapped[int] = mapped_column(sa.Integer)
    label: Mapped[str | None] = mapped_column(sa.Text)
    is_named: Mapped[bool] = mapped_column(sa.Boolean, server_default=sa.false())
    keywords: Mapped[list[str]] = mapped_column(ARRAY(sa.Text), server_default=sa.text("'{}'"))
    cohesion: Mapped[float | None] = mapped_column(sa.Double)
    radius: Mapped[float | None] = mapped_column(sa.Double)
    if TYPE_CHECKING:
        run_id: Mapped[int]
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
        x: its place on the map, from 0 to 1; ``None`` for rows without one.
        y: the same upwards.
        run: the run.
        cluster: the cluster, or ``None``.
        row: the row.
    """

    distance: Mapped[float] = mapped_column(sa.REAL)
    is_fitted: Mapped[bool] = mapped_column(sa.Boolean)
    x: Mapped[float | None] = mapped_column(sa.REAL)
    y: Mapped[float | None] = mapped_column(sa.REAL)
    if TYPE_CHECKING:
        run_id: Mapped[int]
        cluster_id: Mapped[int | None]
        run: Mapped[Any]
        cluster: Mapped[Any]
        row: Mapped[Any]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} run {self.run_id} cluster {self.cluster_id}>"


def map_classes(mapper: Mapper[Any], rows: sa.Table, prefix: str) -> Classes:
    """Map the three classes of a clustering, with relationships among them and to the rows."""
    run = map_beside(ClusterRun, mapper, rows, f"{prefix}_run")
    runs = table_of(run)
    # What makes the switch atomic: there is no moment with two current runs.
    sa.Index(
        identifier(f"uq_{runs.name}_current"),
        runs.c.column_name,
        unique=True,
        postgresql_where=runs.c.is_current,
    )
    cluster = map_beside(
        Cluster,
        mapper,
        rows,
        prefix,
        sa.UniqueConstraint("run_id", "number", name=identifier(f"uq_{prefix}_number")),
        references={"exemplar": "SET NULL"},
        run_id=sa.Column(sa.ForeignKey(runs.c.id, ondelete="CASCADE"), nullable=False),
        run=relationship(run, back_populates="clusters"),
    )
    clusters, name = table_of(cluster), f"{prefix}_assignment"
    assignment = map_beside(
        Assignment,
        mapper,
        rows,
        name,
        # The row's key comes first: this index also serves deletes of rows.
        sa.PrimaryKeyConstraint(*(ROW_PREFIX + key.name for key in rows.primary_key), "run_id"),
        # Members of a cluster, nearest first.
        sa.Index(identifier(f"ix_{name}_cluster"), "cluster_id", "distance"),
        references={"row": "CASCADE"},
        run_id=sa.Column(sa.ForeignKey(runs.c.id, ondelete="CASCADE"), nullable=False),
        cluster_id=sa.Column(sa.ForeignKey(clusters.c.id, ondelete="CASCADE")),
        run=relationship(run, viewonly=True),
        cluster=relationship(cluster, back_populates="assignments"),
    )
    # The relationships whose other end was mapped later.
    assignments = table_of(assignment)
    for one, many, other, back, order in (
        (run, "clusters", cluster, "run", clusters.c.number),
        (cluster, "assignments", assignment, "cluster", assignments.c.distance),
    ):
        _add(one, many, other, back_populates=back, order_by=order, passive_deletes="all")
    _add(
        cluster, "rows", mapper, secondary=assignments, viewonly=True,
        primaryjoin=assignments.c.cluster_id == clusters.c.id,
        secondaryjoin=is_row(assignments, rows), order_by=assignments.c.distance,
    )  # fmt: skip
    return run, cluster, assignment


def map_beside(
    base: type[T],
    mapper: Mapper[Any],
    rows: sa.Table,
    name: str,
    *arguments: Any,
    references: Mapping[str, str] = MappingProxyType({}),
    **members: Any,
) -> type[T]:
    """Map a subclass of a class above, in the metadata and the schema of the rows' table.

    ``references`` are relationships to a row, by name, and what becomes of each when the row is
    deleted. Their columns are called after the row's key: ``exemplar_id``.
    """
    if any((t.schema, t.name) == (rows.schema, name) for t in rows.metadata.tables.values()):
        raise DeclarationError(
            f"There is a table {name!r} in the metadata already; give clusters_of() another "
            "prefix=, or duplicates_of() another name=."
        )
    constraints = list(arguments)
    for reference, ondelete in references.items():
        keys = list(rows.primary_key)
        names = [identifier(f"{reference}_{key.name}") for key in keys]
        optional = ondelete != "CASCADE"
        columns = [
            sa.Column(n, k.type, nullable=optional) for n, k in zip(names, keys, strict=True)
        ]
        members |= dict(zip(names, columns, strict=True))
        constraints.append(sa.ForeignKeyConstraint(names, keys, ondelete=ondelete))
        joined = (foreign(c) == key for c, key in zip(columns, keys, strict=True))
        members[reference] = relationship(mapper, primaryjoin=sa.and_(*joined), viewonly=True)
    # ``article_cluster`` is the table of ``ArticleCluster``.
    class_name = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    members |= {
        "__module__": mapper.class_.__module__,
        "__doc__": base.__doc__,
        "__tablename__": identifier(name),
        "__table_args__": (*constraints, {"schema": rows.schema}),
        "metadata": rows.metadata,
    }
    return mapper.registry.map_declaratively(type(class_name, (base,), members)).class_


def table_of(cls: type[Any]) -> sa.Table:
    """The table of a mapped class."""
    return cast("sa.Table", sa.inspect(cls).local_table)


def title_of(cluster: Any) -> str:
    """What a cluster is called, of a mapped one or a row with its label and number."""
    return str(cluster.label or f"cluster {cluster.number}")


def is_row(table: sa.Table, rows: sa.Table) -> sa.ColumnElement[bool]:
    """The join of an assignment with its row."""
    return sa.and_(*(foreign(table.c[ROW_PREFIX + key.name]) == key for key in rows.primary_key))


def identifier(name: str) -> str:
    """The name, unless the server would cut it."""
    if len(name.encode()) > MAX_IDENTIFIER:
        raise DeclarationError(
            f"The identifier {name!r} is longer than {MAX_IDENTIFIER} bytes; give clusters_of() a "
            "shorter prefix."
        )
    return name


def free_attributes(mapper: Mapper[Any], attribute: str) -> tuple[str, str]:
    """What the row's class calls its current clusters, and its assignments in every run."""
    names = (attribute, f"{attribute.removesuffix('s')}_assignments")
    for name in names:
        if mapper.has_property(name) or hasattr(mapper.class_, name):
            raise DeclarationError(
                f"{mapper.class_.__name__} has an attribute {name!r} already; give clusters_of() "
                "another one with attribute=."
            )
    return names


def extend_entity(
    mapper: Mapper[Any], names: tuple[str, str], column: sa.Column[Any], classes: Classes
) -> None:
    """Give the row's class both of them."""
    run, cluster, assignment = map(table_of, classes)
    current, all_runs = names
    joined = is_row(assignment, column.table)
    _add(
        mapper, current, classes[1], viewonly=True,
        secondary=sa.join(assignment, run, assignment.c.run_id == run.c.id),
        primaryjoin=sa.and_(joined, run.c.is_current, run.c.column_name == column.name),
        secondaryjoin=foreign(assignment.c.cluster_id) == cluster.c.id,
    )  # fmt: skip
    order = assignment.c.run_id
    _add(mapper, all_runs, classes[2], primaryjoin=joined, order_by=order, viewonly=True)


def _add(mapped: Any, name: str, other: Any, **arguments: Any) -> None:
    sa.inspect(mapped).add_property(name, relationship(other, **arguments))
