"""The current clustering in plain SQL: views and functions, for readers in any language.

Alembic's autogenerate does not see views, so they are created where the application says so: in a
migration, by names that stay what they were when it was written, or by an explicit call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import sqlalchemy as sa

from sbert_pg import system
from sbert_pg.clustering.declaration import OPERATORS, Clustering, ClusterMetric
from sbert_pg.clustering.tables import EXEMPLAR_PREFIX, ROW_PREFIX, identifier
from sbert_pg.types import Vector


@dataclass(frozen=True)
class ClusterViews:
    """Views and functions over the tables of one clustering, by names.

    In a migration::

        views = ClusterViews(table="article", column="embedding", keys={"id": "integer"})

        def upgrade():
            for statement in views.create():
                op.execute(statement)

        def downgrade():
            for statement in views.drop():
                op.execute(statement)

    They are, for the prefix ``article_cluster``:

    - view ``article_cluster_current``: the current clusters;
    - view ``article_cluster_member``: the rows of the current run, each with the number and label
      of its cluster (``NULL`` for an outlier) and its distance;
    - function ``article_cluster_nearest(query vector, n integer DEFAULT 5)``: the current clusters
      nearest to a vector;
    - function ``article_cluster_nearest_of(key..., n integer DEFAULT 5)``: those nearest to a row.

    Attributes:
        table: table of the clustered rows.
        column: its vector column.
        keys: its key columns and their types, as SQL spells them.
        prefix: what the clustering's tables begin with; ``table`` and ``_cluster`` by default.
        metric: the clustering's metric.
        schema: schema of all of them, or ``None`` for the search path's.
    """

    table: str
    column: str
    keys: Mapping[str, str] = field(hash=False)
    prefix: str | None = None
    metric: ClusterMetric = "cosine"
    schema: str | None = None

    @classmethod
    def of(cls, clustering: Clustering, dialect: sa.Dialect) -> ClusterViews:
        """Those of a declaration."""
        return cls(
            table=clustering.rows.name,
            column=clustering.column.name,
            keys={key.name: key.type.compile(dialect) for key in clustering.keys},
            prefix=clustering.cluster_table.name,
            metric=clustering.metric,
            schema=clustering.rows.schema,
        )

    def create(self) -> Iterator[sa.schema.ExecutableDDLElement]:
        """Statements that create or replace them."""
        yield self._view("current", self._current())
        yield self._view("member", self._members())
        query = sa.literal_column("$1", Vector())
        yield self._function("nearest", {"query": "vector"}, self._nearest(query, "$2"))
        row = sa.table(self.table, *map(sa.column, (*self.keys, self.column)), schema=self.schema)
        is_row = [
            row.c[key] == sa.literal_column(f"${number}") for number, key in enumerate(self.keys, 1)
        ]
        vector = sa.select(sa.cast(row.c[self.column], Vector())).where(*is_row).scalar_subquery()
        yield self._function(
            "nearest_of",
            {f"row_{key}": type_ for key, type_ in self.keys.items()},
            # A row without a vector is near to nothing.
            self._nearest(vector, f"${len(self.keys) + 1}").where(vector.is_not(None)),
        )

    def drop(self) -> Iterator[sa.schema.ExecutableDDLElement]:
        """Statements that drop them where they exist."""
        for name, types in (("nearest_of", (*self.keys.values(),)), ("nearest", ("vector",))):
            arguments = ", ".join((*types, "integer"))
            yield _statement("DROP FUNCTION IF EXISTS ", *self._name(name), f"({arguments})")
        yield _statement("DROP VIEW IF EXISTS ", *self._name("member"))
        yield _statement("DROP VIEW IF EXISTS ", *self._name("current"))

    def _view(self, suffix: str, query: sa.Select[Any]) -> system.Statement:
        return _statement("CREATE OR REPLACE VIEW ", *self._name(suffix), " AS ", query)

    def _function(
        self, suffix: str, arguments: Mapping[str, str], query: sa.Select[Any]
    ) -> system.Statement:
        typed = ((sa.quoted_name(name, None), f" {type_}, ") for name, type_ in arguments.items())
        return _statement(
            "CREATE OR REPLACE FUNCTION ", *self._name(suffix), "(", *chain(*typed),
            "n integer DEFAULT 5) RETURNS TABLE (number integer, label text, distance double "
            "precision) LANGUAGE sql STABLE AS $sbert_pg$", query, "$sbert_pg$",
        )  # fmt: skip

    def _name(self, suffix: str) -> list[str]:
        name = sa.quoted_name(identifier(f"{self._prefix}_{suffix}"), None)
        return [name] if self.schema is None else [sa.quoted_name(self.schema, None), ".", name]

    @property
    def _prefix(self) -> str:
        return self.prefix or f"{self.table}_cluster"

    def _tables(self) -> tuple[sa.TableClause, sa.TableClause, sa.TableClause]:
        def table(suffix: str, *names: str) -> sa.TableClause:
            columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in names]
            return sa.table(f"{self._prefix}{suffix}", *columns, schema=self.schema)

        exemplars = [EXEMPLAR_PREFIX + key for key in self.keys]
        references = [ROW_PREFIX + key for key in self.keys]
        return (
            table("_run", "id", "column_name", "algorithm", "finished_at", "is_current"),
            table("", "id", "run_id", "centroid", *_READ, *exemplars),
            table("_assignment", "run_id", "cluster_id", "distance", *references),
        )

    def _is_current(self, run: sa.TableClause) -> sa.ColumnElement[bool]:
        return sa.and_(run.c.is_current, run.c.column_name == sa.literal(self.column, sa.Text))

    def _current(self) -> sa.Select[Any]:
        run, cluster, _ = self._tables()
        return (
            sa.select(
                *(cluster.c[name] for name in _READ),
                *(cluster.c[EXEMPLAR_PREFIX + key] for key in self.keys),
                cluster.c.id.label("cluster_id"),
                run.c.id.label("run_id"),
                run.c.algorithm,
                run.c.finished_at,
            )
            .join_from(cluster, run, run.c.id == cluster.c.run_id)
            .where(self._is_current(run))
        )

    def _members(self) -> sa.Select[Any]:
        run, cluster, assignment = self._tables()
        return (
            sa.select(
                *(assignment.c[ROW_PREFIX + key] for key in self.keys),
                cluster.c.number,
                cluster.c.label,
                assignment.c.distance,
                cluster.c.id.label("cluster_id"),
            )
            .join_from(assignment, run, run.c.id == assignment.c.run_id)
            .outerjoin(cluster, cluster.c.id == assignment.c.cluster_id)
            .where(self._is_current(run))
        )

    def _nearest(self, query: sa.ColumnElement[Any], limit: str) -> sa.Select[Any]:
        run, cluster, _ = self._tables()
        distance: sa.ColumnElement[float] = cluster.c.centroid.op(
            OPERATORS[self.metric], return_type=sa.Double()
        )(query)
        return (
            sa.select(cluster.c.number, cluster.c.label, distance.label("distance"))
            .join_from(cluster, run, run.c.id == cluster.c.run_id)
            .where(self._is_current(run))
            .order_by(distance, cluster.c.number)
            .limit(sa.literal_column(limit, sa.Integer))
        )


_READ = ("number", "label", "size", "keywords", "cohesion", "radius")


def _in(connection: sa.Connection, clustering: Clustering) -> ClusterViews:
    views = ClusterViews.of(clustering, connection.dialect)
    return replace(views, schema=system.schema_in(connection, views.schema))


def create_views(connection: sa.Connection, clustering: Clustering) -> None:
    """Create the views and functions of a clustering now; the caller commits."""
    for statement in _in(connection, clustering).create():
        connection.execute(statement)


def drop_views(connection: sa.Connection, clustering: Clustering) -> None:
    """Drop the views and functions of a clustering now; the caller commits."""
    for statement in _in(connection, clustering).drop():
        connection.execute(statement)


def _statement(*parts: str | sa.Select[Any]) -> system.Statement:
    """Of texts, names (``quoted_name``), and a query whose values are written out."""

    def written(compiler: Any, part: str | sa.Select[Any]) -> str:
        if isinstance(part, sa.quoted_name):
            return str(compiler.preparer.quote(part))
        if isinstance(part, str):
            return part
        return str(compiler.sql_compiler.process(part, literal_binds=True))

    return system.Statement(lambda compiler: "".join(written(compiler, part) for part in parts))
