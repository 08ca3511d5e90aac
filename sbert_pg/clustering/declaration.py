"""``clusters_of``: declare the clustering of a column; and what readers select from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast

import sqlalchemy as sa

from sbert_pg import distance as d
from sbert_pg import system
from sbert_pg.clustering import tables
from sbert_pg.clustering.rows import Criteria, RowSet, criteria_list, mapped_vector
from sbert_pg.clustering.tables import Assignment, Cluster, ClusterRun
from sbert_pg.errors import ClusteringError, DeclarationError
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import Vector
from sbert_pg.types.comparator import metric_for, operand
from sbert_pg.types.vector import VectorType

ClusterMetric = Literal["cosine", "euclidean"]

#: k-means averages vectors, which fits these two; where direction carries the meaning it is cosine.
_METRIC_FOR: dict[d.Similarity, ClusterMetric] = {
    "cosine": "cosine",
    "dot": "cosine",
    "euclidean": "euclidean",
    "manhattan": "euclidean",
}
#: Where a metadata keeps its clusterings, for the command line to find them.
_DECLARED = "sbert_pg_clusterings"
OPERATORS: dict[ClusterMetric, str] = {"cosine": d.COSINE, "euclidean": d.L2}


@dataclass(frozen=True, eq=False)
class Clustering:
    """The clustering of one vector column: its three mapped classes, and selects over them.

    Made by ``clusters_of``. The methods build ordinary ``select()`` statements over the current
    run, for a session of either kind.

    Attributes:
        entity: the mapped class whose rows are clustered.
        column: its vector column.
        Run: mapped class of the runs.
        Cluster: mapped class of the clusters.
        Assignment: mapped class of the assignments.
        metric: ``cosine`` or ``euclidean``.
        criterion: which rows take part, or ``None`` for all.
    """

    entity: type[Any]
    column: sa.Column[Any]
    Run: type[ClusterRun]
    Cluster: type[Cluster]
    Assignment: type[Assignment]
    metric: ClusterMetric
    criterion: sa.ColumnElement[bool] | None = field(repr=False)

    def on(self, column: Any) -> Clustering:
        """This clustering on another vector column of the same table: its runs share the tables.

        For a change of encoder: a run over the replacement, made before the switch, keeps the
        numbers and names of the clusters of the old column. Each column has its own current run.

        Args:
            column: the attribute, as in ``topics.on(Article.embedding_v2)``, or the column's name.

        Raises:
            DeclarationError: it is not a vector column of the same table.
        """
        if isinstance(column, str):
            if column not in self.rows.c:
                raise DeclarationError(f"There is no column {column!r} in {self.rows.fullname}.")
            mapper = sa.inspect(self.entity)
            key = mapper.get_property_by_column(self.rows.c[column]).key
            column = getattr(self.entity, key)
        base = _base_column(column)
        if base.table is not self.rows:
            raise DeclarationError(
                f"Column {base} is not in {self.rows.fullname}, whose rows are clustered here."
            )
        return replace(self, column=base)

    @cached_property
    def rows(self) -> sa.Table:
        """The table of the clustered rows."""
        return self.column.table

    @cached_property
    def run_table(self) -> sa.Table:
        """The table of runs."""
        return tables.table_of(self.Run)

    @cached_property
    def cluster_table(self) -> sa.Table:
        """The table of clusters."""
        return tables.table_of(self.Cluster)

    @cached_property
    def assignment_table(self) -> sa.Table:
        """The table of assignments."""
        return tables.table_of(self.Assignment)

    @property
    def keys(self) -> tuple[sa.Column[Any], ...]:
        """Key columns of the clustered rows."""
        return tuple(self.rows.primary_key)

    @property
    def row_keys(self) -> tuple[sa.Column[Any], ...]:
        """Columns of the assignments that refer to the rows' keys."""
        table = self.assignment_table
        return tuple(table.c[tables.ROW_PREFIX + key.name] for key in self.keys)

    @property
    def spec(self) -> EncoderSpec | None:
        """The encoder that the column declares; ``None`` for a plain vector column."""
        return getattr(self.column.type, "encoder", None)

    @property
    def source(self) -> Source | None:
        """What the embedded texts are made of; ``None`` for a plain vector column."""
        return getattr(self.column.type, "source", None)

    @property
    def text(self) -> sa.ColumnElement[str] | None:
        """The text of a row, in SQL; ``None`` for a plain vector column."""
        return None if self.source is None else self.source.expression(self.rows)

    def exemplar_of(self, cluster: tables.Cluster) -> tuple[Any, ...]:
        """The key of a cluster's exemplar; all ``None`` where that row is gone."""
        return tuple(getattr(cluster, tables.EXEMPLAR_PREFIX + key.name) for key in self.keys)

    def row_is_assigned(self, rows: sa.FromClause | None = None) -> sa.ColumnElement[bool]:
        """The join of an assignment with its row; or with that of a select with the rows' keys."""
        columns = (self.rows if rows is None else rows).c
        pairs = zip(self.row_keys, self.keys, strict=True)
        return sa.and_(*(left == columns[key.name] for left, key in pairs))

    def is_placed(self, run_id: int) -> sa.Exists:
        """Whether a row has a place in a run."""
        in_run = self.assignment_table.c.run_id == run_id
        return sa.exists().where(self.row_is_assigned(), in_run)

    def row_set(self, where: Criteria | None = None) -> RowSet:
        """The rows that take part: those of the declared filter and of ``where``."""
        return RowSet(self.column, self._filters(where), self.metric == "cosine")

    def _filters(self, where: Criteria | None) -> list[sa.ColumnElement[bool]]:
        declared = [] if self.criterion is None else [self.criterion]
        return declared + criteria_list(where)

    def filter_text(self, where: Criteria | None = None) -> str | None:
        """The filter as SQL, as a run records it; ``None`` where every row takes part."""
        filters = self._filters(where)
        if not filters:
            return None
        literal = {"literal_binds": True}
        return str(sa.and_(*filters).compile(dialect=system.PLAIN, compile_kwargs=literal))

    def is_current(self) -> sa.ColumnElement[bool]:
        """Whether a run is the one that readers of this column see."""
        return sa.and_(self.Run.is_current, self.Run.column_name == self.column.name)

    def current_run(self) -> sa.Select[Any]:
        """The current run, or nothing before the first one is done."""
        return sa.select(self.Run).where(self.is_current())

    def require_current(self, connection: sa.Connection) -> sa.Row[Any]:
        """The current run, as a row of its table.

        Raises:
            ClusteringError: there is none.
        """
        run = connection.execute(sa.select(self.run_table).where(self.is_current())).first()
        if run is None:
            raise ClusteringError(
                f"{self.column} has no current clustering. Make one with cluster(engine, ...) or "
                "'sbert-pg cluster run'."
            )
        return run

    def clusters(self) -> sa.Select[Any]:
        """The current clusters, largest first."""
        return (
            sa.select(self.Cluster)
            .join(self.Cluster.run)
            .where(self.is_current())
            .order_by(self.Cluster.size.desc(), self.Cluster.number)
        )

    def members(self, cluster: tables.Cluster | int) -> sa.Select[Any]:
        """Rows of a cluster with their distances, nearest to the centroid first.

        Args:
            cluster: a cluster of any run, or the number of a current one.
        """
        statement = self._placed_rows().join(
            self.Cluster, self.Cluster.id == self.Assignment.cluster_id
        )
        if isinstance(cluster, int):
            return statement.join(self.Run, self.Run.id == self.Cluster.run_id).where(
                self.is_current(), self.Cluster.number == cluster
            )
        return statement.where(self.Cluster.id == cluster.id)

    def outliers(self) -> sa.Select[Any]:
        """Rows that the current run left without a cluster, with the distance to the nearest."""
        return (
            self._placed_rows()
            .join(self.Run, self.Run.id == self.Assignment.run_id)
            .where(self.is_current(), self.Assignment.cluster_id.is_(None))
        )

    def _placed_rows(self) -> sa.Select[Any]:
        return (
            sa.select(self.entity, self.Assignment.distance)
            .join(self.Assignment, self.row_is_assigned())
            .order_by(self.Assignment.distance, *self.row_keys)
        )

    def nearest_clusters(self, query: Any, *, limit: int = 5) -> sa.Select[Any]:
        """Current clusters nearest to a query, each with its distance, nearest first.

        Args:
            query: a text, encoded as a query when the statement runs (embedding columns only); a
                vector; or an expression, such as another row's vector.
            limit: clusters to return.
        """
        right = operand(self.column, query)
        rows = self.row_set()
        if rows.storage != "vector":
            right = sa.cast(right, Vector(rows.dimensions))
        centroid = cast("Any", self.cluster_table.c.centroid)
        value = centroid.op(OPERATORS[self.metric], precedence=5, return_type=sa.Float(53))(right)
        return (
            sa.select(self.Cluster, value.label("distance"))
            .join(self.Cluster.run)
            .where(self.is_current())
            .order_by(value, self.Cluster.number)
            .limit(limit)
        )


def clusters_of(
    column: Any,
    *,
    prefix: str | None = None,
    attribute: str = "clusters",
    where: Criteria | None = None,
    metric: ClusterMetric | None = None,
) -> Clustering:
    """Declare the clustering of a vector column, beside the class that it belongs to.

    Makes three tables in the metadata of the column's table, with a mapped class for each, and
    gives the class two view-only relationships: its current clusters (one, or none for an outlier)
    and its assignments in every run.

    Args:
        column: the attribute of a mapped class, as in ``clusters_of(Article.embedding)``.
        prefix: what the tables' names begin with; the table's name and ``_cluster`` by default,
            which gives ``article_cluster``, ``article_cluster_run`` and
            ``article_cluster_assignment``.
        attribute: name of the relationship from a row to its current clusters. The one to its
            assignments is called ``cluster_assignments`` accordingly.
        where: which rows take part, in every run and in every later assignment.
        metric: ``cosine`` or ``euclidean``. By default what suits the encoder: cosine for encoders
            of cosine and dot similarity, else euclidean.

    Raises:
        DeclarationError: the column is not a vector column of a mapped class with a known width, or
            a name is taken or too long.
    """
    base, mapper = _base_column(column), column.parent
    rows = base.table
    names = tables.free_attributes(mapper, attribute)  # before anything is declared
    classes = tables.map_classes(mapper, rows, prefix or f"{rows.name}_cluster")
    tables.extend_entity(mapper, names, base, classes)
    criteria = criteria_list(where)
    metric = metric or _METRIC_FOR[metric_for(base).similarity]
    criterion = sa.and_(*criteria) if criteria else None
    clustering = Clustering(mapper.class_, base, *classes, metric, criterion)
    rows.metadata.info.setdefault(_DECLARED, []).append(clustering)
    return clustering


def declared_clusterings(metadata: sa.MetaData) -> list[Clustering]:
    """The clusterings that were declared on tables of a metadata, in their order."""
    return list(metadata.info.get(_DECLARED, ()))


def _base_column(column: Any) -> sa.Column[Any]:
    base = mapped_vector("clusters_of", column)
    if cast("VectorType", base.type).dimensions is None:
        raise DeclarationError(
            f"A clustering was declared on {base}, a vector column of no fixed width; declare "
            "one, as in Vector(384)."
        )
    return base
