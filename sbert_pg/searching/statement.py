"""The select of a search of one stage, put in order once more after the index."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles


class NearestSelect(sa.Select[Any]):
    """A select whose rows come from an index scan in *relaxed* order.

    Under a filter an iterative scan has to go on behind its first candidates, and then meets rows
    that are nearer than some it has returned. In strict order pgvector leaves those out, which
    costs four points of recall@10 under a filter that keeps one row in a hundred; in relaxed order
    it returns them. So the rows are fetched in relaxed order and the page is sorted by similarity,
    by a query around the finished statement, where the caller's joins and criteria are inside.

    Where the caller has replaced the order or no longer selects the similarity, or uses the
    statement as a subquery, nothing is put around it.
    """

    inherit_cache = True
    _similarity: sa.Label[Any] | None = None
    _distance: sa.ColumnElement[Any] | None = None

    @classmethod
    def of(
        cls,
        selected: list[Any],
        similarity: sa.Label[Any],
        criteria: list[sa.ColumnElement[bool]],
        order: list[sa.ColumnElement[Any]],
    ) -> NearestSelect:
        """The select, ordered by ``order[0]``, the distance that an index serves."""
        made = cls(*selected, similarity).where(*criteria).order_by(*order)
        made._similarity = similarity
        made._distance = order[0]
        return made

    @property
    def keeps_order(self) -> bool:
        """Whether the order is still that of the search."""
        clauses = self._order_by_clauses
        return bool(clauses) and clauses[0] is self._distance


@compiles(NearestSelect)  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
def _sorted_page(element: NearestSelect, compiler: Any, **options: Any) -> str:
    toplevel = not compiler.stack
    text: str = compiler.visit_select(element, **options)
    if not toplevel or not element.keeps_order:
        return text
    for position, entry in enumerate(compiler._result_columns, 1):
        # By position, since names can occur twice; SQLAlchemy reads the columns by position too.
        if any(item is element._similarity for item in entry.objects):
            return "".join(
                ("SELECT * FROM (", text, ") AS nearest ORDER BY ", str(position), " DESC")
            )
    return text
