"""The current clustering in plain SQL: views and functions, for readers in any language.

Alembic's autogenerate does not see views, so they are created where the application says so: in a
migration, by names that stay what they were when it was written, or by an explicit call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles

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
            arguments = [(None, type_) for type_ in (*types, "integer")]
            yield self._statement("DROP FUNCTION IF EXISTS", name, arguments=arguments)
        yield self._statement("DROP VIEW IF EXISTS", "member")
        yield self._statement("DROP VIEW IF EXISTS", "current")

    def _view(self, suffix: str, query: sa.Select[Any]) -> _Statement:
        return self._statement("CREATE OR REPLACE VIEW", suffix, head="AS", query=query)

    def _function(
        self, suffix: str, arguments: Mapping[str, str], query: sa.Select[Any]
    ) -> _Statement:
        return self._statement(
            "CREATE OR REPLACE FUNCTION",
            suffix,
            arguments=[*arguments.items(), ("n", "integer DEFAULT 5")],
            head="RETURNS TABLE (number integer, label text, distance double precision) "
            "LANGUAGE sql STABLE AS $sbert_pg$",
            query=query,
            tail="$sbert_pg$",
        )

    def _statement(self, verb: str, suffix: str, **parts: Any) -> _Statement:
        name = identifier(f"{self._prefix}_{suffix}")
        return _Statement(verb, name, self.schema, **parts)

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


class _Statement(sa.schema.ExecutableDDLElement):
    """A statement about one view or function.

    Attributes:
        verb: what it does, up to the name.
        name: name of the view or function.
        schema: its schema, or ``None``.
        arguments: names and types of a function's arguments; types alone where it is dropped.
        head: what stands between the name and the query.
        query: the query, or ``None``.
    """

    def __init__(
        self,
        verb: str,
        name: str,
        schema: str | None,
        *,
        arguments: Sequence[tuple[str | None, str]] | None = None,
        head: str = "",
        query: sa.Select[Any] | None = None,
        tail: str = "",
    ) -> None:
        self.verb, self.name, self.schema, self.arguments = verb, name, schema, arguments
        self.head, self.query, self.tail = head, query, tail


@compiles(_Statement)
def _compile_statement(element: _Statement, compiler: Any, **_: Any) -> str:
    quote = compiler.preparer.quote
    words = [element.verb, ".".join(map(quote, filter(None, (element.schema, element.name))))]
    if element.arguments is not None:
        arguments = (
            type_ if name is None else f"{quote(name)} {type_}" for name, type_ in element.arguments
        )
        words[-1] += f"({', '.join(arguments)})"
    if element.query is not None:
        body = compiler.sql_compiler.process(element.query, literal_binds=True)
        words += [element.head, body, element.tail]
    return " ".join(filter(None, words))
