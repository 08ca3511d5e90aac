"""The select of a search: its caller shapes it, and it is compiled as the index needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm.util import LoaderCriteriaOption
from sqlalchemy.sql.visitors import InternalTraversal

from sbert_pg.searching.stages import in_stages

#: What tells two statements apart besides what any select has.
_OWN: list[tuple[str, InternalTraversal]] = [
    ("_exact", InternalTraversal.dp_clauseelement),
    ("_within", InternalTraversal.dp_clauseelement),
    ("_overfetch", InternalTraversal.dp_clauseelement),
]


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """What a search is made of besides its select.

    Attributes:
        similarity: the column of similarities in the select.
        distance: what it is ordered by, as the index serves it.
        key: primary key of the searched rows, which breaks ties.
        settings: the criterion that makes the index settings.
        criteria: how many criteria the search has of itself; more of them filter.
        correlated: whether the query is another row's column, which rules out stages.
    """

    similarity: sa.Label[Any]
    distance: sa.ColumnElement[Any]
    key: tuple[sa.ColumnElement[Any], ...]
    settings: sa.ColumnElement[bool]
    criteria: int
    correlated: bool


class NearestSelect(sa.Select[Any]):
    """A select whose rows come from an index scan in *relaxed* order.

    To its caller it is a select of rows ordered by the distance that the index serves, to which
    criteria, joins and options are added as to any other. What else a search needs is put into it
    when it is compiled, so that all that the caller has added takes part:

    - Under a filter an iterative scan has to go on behind its first candidates, and then meets rows
      that are nearer than some it has returned. In strict order pgvector leaves those out, which
      costs four points of recall@10 under a filter that keeps one row in a hundred; in relaxed
      order it returns them. So the page is sorted by similarity, by a query around the finished
      statement.
    - A search that filters, over-fetches, has a largest distance, or begins behind the first row is
      made of two stages; see ``stages.in_stages``.

    Where the caller has replaced the order or no longer selects the similarity, or uses the
    statement as a subquery, nothing is put around it.
    """

    inherit_cache = True
    _traverse_internals = sa.Select._traverse_internals + _OWN
    _cache_key_traversal = sa.Select._cache_key_traversal + _OWN  # type: ignore[operator,unused-ignore]
    _search: Search
    _exact: sa.ColumnElement[Any] | None = None
    _within: sa.ColumnElement[bool] | None = None
    _overfetch: sa.BindParameter[int] | None = None

    def searched(
        self,
        search: Search,
        criteria: list[sa.ColumnElement[bool]],
        *,
        exact: sa.ColumnElement[Any],
        within: sa.ColumnElement[bool] | None,
        overfetch: int,
    ) -> NearestSelect:
        """This select of rows in the order of their keys, as a search.

        Args:
            search: what it is made of.
            criteria: what a row has to meet.
            exact: the distance that ranks what the index has found.
            within: what drops rows that are too far; behind the index, since as a filter it would
                keep the scan looking for nearer rows that do not exist.
            overfetch: rows that the index fetches for each row wanted.
        """
        made: NearestSelect = self._generate()
        # Finished expressions, put where add_columns(), where() and order_by() would put them.
        made._raw_columns = [*self._raw_columns, search.similarity]
        made._where_criteria = (search.settings, *self._where_criteria)
        made._order_by_clauses = (search.distance, *self._order_by_clauses)
        made._search = search
        if exact is not search.distance:
            made._exact = exact
        made._within = within
        if overfetch > 1:
            made._overfetch = sa.literal(overfetch, sa.BigInteger())
        return made.where(*criteria) if criteria else made

    @property
    def filters(self) -> bool:
        """Whether criteria, joins or options of the caller's may turn rows away."""
        return (
            len(self._where_criteria) > self._search.criteria
            or bool(self._setup_joins)
            or any(isinstance(option, LoaderCriteriaOption) for option in self._with_options)
        )

    @property
    def has_stages(self) -> bool:
        """Whether what the index finds is ranked anew, or is not all returned."""
        search = self._search
        if search.correlated or not self.keeps_order or not search.key:
            return False
        more = self._overfetch is not None or self._within is not None
        return more or self._offset_clause is not None or self.filters

    @property
    def has_ties(self) -> bool:
        """Whether the key breaks ties of what the index gives, in one and the same order."""
        search = self._search
        return self.keeps_order and bool(search.key) and not search.correlated

    @property
    def keeps_order(self) -> bool:
        """Whether the order is still that of the search."""
        clauses = self._order_by_clauses
        return bool(clauses) and clauses[0] is self._search.distance


@compiles(NearestSelect)  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
def _compile_nearest(element: NearestSelect, compiler: Any, **options: Any) -> str:
    toplevel = not compiler.stack
    statement: sa.Select[Any] = element
    if element.has_stages or (element.has_ties and not _sorts_by_prefix(compiler.dialect)):
        statement = in_stages(element, element._search)
    text: str = compiler.visit_select(statement, **options)
    return _in_order(text, compiler, element._search) if toplevel and element.keeps_order else text


def _sorts_by_prefix(dialect: sa.Dialect) -> bool:
    """Whether an index that orders by distance serves an order by distance and then by key.

    From PostgreSQL 17 on it does, by an incremental sort. Before, the planner takes an index for an
    order by operators only where it gives the whole order, and would read the table instead.
    """
    version: tuple[int, ...] | None = getattr(dialect, "server_version_info", None)
    return version is None or version >= (17,)


def _in_order(text: str, compiler: Any, search: Search) -> str:
    """The statement, its rows sorted by similarity once more.

    By position, since names can occur twice; SQLAlchemy reads the columns by position too.
    """
    for position, entry in enumerate(compiler._result_columns, 1):
        if any(item is search.similarity for item in entry.objects):
            return "".join(
                ("SELECT * FROM (", text, ") AS nearest ORDER BY ", str(position), " DESC")
            )
    return text
