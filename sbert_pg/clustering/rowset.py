"""Which rows a run is over, and in which form the server compares their vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa

from sbert_pg import distance as d
from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.transfer import is_integer, wire_key
from sbert_pg.types import Vector


@dataclass(frozen=True)
class RowSet:
    """The rows of one run.

    Attributes:
        clustering: what is clustered.
        criteria: what a row has to meet.
    """

    clustering: Clustering
    criteria: Sequence[sa.ColumnElement[bool]]

    @property
    def spherical(self) -> bool:
        """Whether vectors count by their direction only."""
        return self.clustering.metric == "cosine"

    @property
    def unit(self) -> sa.ColumnElement[Any]:
        """A row's vector as it is clustered: at length one under cosine."""
        vector = self.clustering.vector()
        if not self.spherical or self.clustering.is_unit:
            return vector
        return sa.func.l2_normalize(vector, type_=Vector(self.clustering.dimensions))

    def order(self, table: sa.FromClause) -> list[sa.ColumnElement[Any]]:
        """The order of the rows: as the client has it, whatever the database's collation."""
        keys = [table.c[key.name] for key in self.clustering.keys]
        return [
            wire_key(key) if is_integer(key) else sa.collate(wire_key(key), "C") for key in keys
        ]

    @cached_property
    def vectors(self) -> sa.Subquery:
        """Keys of the rows, and ``unit``: their vectors as they are clustered, computed once a row.

        The offset keeps the planner from moving the expression to where it is used, once for each
        centroid.
        """
        return (
            sa.select(*self.clustering.keys, self.unit.label("unit"))
            .where(*self.criteria)
            .offset(0)
            .subquery("vectors")
        )

    def rank(self, centroid: sa.ColumnElement[Any]) -> sa.ColumnElement[float]:
        """What orders centroids by distance from a row, computed as cheaply as can be.

        Of vectors at length one the inner product ranks as the cosine does, at a third of the cost.
        """
        operator = d.INNER_PRODUCT if self.spherical else d.L2
        return centroid.op(operator, precedence=5, return_type=sa.Float(53))(self.vectors.c.unit)

    def distance(self, rank: sa.ColumnElement[float]) -> sa.ColumnElement[float]:
        """The distance in the run's metric, from what ``rank`` gave."""
        return 1.0 + rank if self.spherical else rank

    def nearest(self, centroids: sa.FromClause, value: sa.ColumnElement[Any]) -> sa.FromClause:
        """The nearest centroid of the row at hand: ``value`` of its row, and ``rank``."""
        rank = self.rank(centroids.c.centroid).label("rank")
        return (
            sa.select(value.label("value"), rank)
            .select_from(centroids)
            .order_by(rank)
            .limit(1)
            .correlate(self.vectors)
            .lateral("nearest")
        )

    def count(self, connection: sa.Connection) -> int:
        """How many rows there are."""
        statement = (
            sa.select(sa.func.count()).select_from(self.clustering.rows).where(*self.criteria)
        )
        return int(connection.scalar(statement) or 0)
