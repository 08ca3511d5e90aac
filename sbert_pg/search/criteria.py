"""What criteria and joins say of the rows that a search is to find, where they say much.

What tells the partners of a row apart, which parts are computed once, and which are written out.
"""

from __future__ import annotations

import enum
import re
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.sql import functions, operators, visitors
from sqlalchemy.sql.selectable import FromGrouping

from sbert_pg.search.target import Target, table_behind, tables_of
from sbert_pg.search.ways import named
from sbert_pg.types.comparator import clause_of

#: A method of ``Select`` that was called, and its arguments.
Call = tuple[str, tuple[Any, ...], dict[str, Any]]
#: Types of columns, and of values that become literals of them.
_SPELLED = ((sa.Enum, enum.Enum), (sa.String, str), (sa.Integer, int), (sa.Boolean, bool))
_UUID = re.compile(r"[0-9A-Fa-f-]{32,36}")
#: Functions of many rows: a subquery with one is computed whole, however few rows are asked for.
_AGGREGATES = frozenset(
    ["avg", "sum", "min", "max", "count", "array_agg", "string_agg", "bool_and", "bool_or"]
)


def aggregated(element: Any) -> bool:
    """Whether a column is one value of many rows, as ``count()`` is without ``OVER``."""
    element = clause_of(element)
    if isinstance(element, functions.FunctionElement):
        return element.name in _AGGREGATES or any(map(aggregated, element.get_children()))
    if not isinstance(element, sa.ColumnElement) or isinstance(element, (sa.ScalarSelect, sa.Over)):
        return False
    return any(map(aggregated, element.get_children()))


def partners(target: Target, select: Any) -> list[Any]:
    """What tells the partners apart that a row may have by joins, for an order of all pairs.

    Keys of the other tables, or what can be ordered of their columns: pairs that are equal in these
    differ in nothing that pages could repeat or miss.

    Args:
        select: a select of the target's rows, with the joins.
    """
    order: list[Any] = []
    for one in _joined_tables(select):
        if one not in tables_of(target.column):
            # A subquery has the key of its table, whose rows may be in it more than once.
            key = list(one.primary_key) if isinstance(table_behind(one), sa.Table) else []
            order += key or [c for c in one.c if _orderable(c.type)]
    return order


def _joined_tables(select: Any) -> list[Any]:
    """Tables, and what stands for such, that a row and its partners are of.

    Not the table between the two ends of a relationship: SQLAlchemy gives it another name whenever
    a statement is compiled, so that nothing can mean it.
    """
    froms = _froms_of(select)
    if not any(isinstance(one, sa.Alias) for one in froms):
        return froms
    again = _froms_of(select)
    return [one for one in froms if one in again]


def _froms_of(select: Any) -> list[Any]:
    """What a select is from, the sides of joins one by one."""
    froms, alone = list(select.get_final_froms()), []
    while froms:
        one = froms.pop(0)
        if isinstance(one, FromGrouping):
            froms.append(one.element)
        elif isinstance(one, sa.Join):
            froms += [one.left, one.right]
        else:
            alone.append(one)
    return alone


def _orderable(type_: Any) -> bool:
    """Whether PostgreSQL surely orders the values of a type; ``json`` and shapes it does not."""
    plain = (sa.String, sa.Numeric, sa.Integer, sa.Boolean, sa.Date, sa.DateTime, sa.Uuid)
    return isinstance(getattr(type_, "impl_instance", type_), plain)


def _whole(subquery: Any, known: list[Any]) -> bool:
    """Whether a subquery is computed whole, and the same for all rows of some tables."""
    inner = list(visitors.iterate(subquery))
    called = (e.name for e in inner if isinstance(e, functions.FunctionElement))
    return not _AGGREGATES.isdisjoint(called) and not any(_may_be_of(e, known) for e in inner)


def _may_be_of(element: Any, known: list[Any]) -> bool:
    """Whether a part of a subquery is about one of some tables; names alone do not say it."""
    table = getattr(element, "table", None)
    if table is None and isinstance(element, sa.ColumnClause):
        return re.search(r"[^\W\d]", element.name) is not None
    return table in known or isinstance(element, sa.TextClause)


def once(
    target: Target, outer: list[Any], calls: tuple[Call, ...], select: Any
) -> tuple[tuple[Call, ...], list[sa.CTE]]:
    """The calls that choose rows, whose aggregated subqueries are parts of their own, and these.

    Within the criteria each would be computed once more for every part that asks them. Not those
    that the row's key is to be in: PostgreSQL asks them of that key alone.
    """
    parts: list[sa.CTE] = []
    known: list[Any] = []
    own = [column.name for column in target.row_key]

    def apart(element: Any, **_: Any) -> Any:
        if isinstance(element, sa.BinaryExpression) and element.operator is operators.in_op:
            left: Any = element.left
            return element if target.owns(left) and left.name in own else None
        if not isinstance(element, sa.Select):
            return None
        if not known:
            known.extend([target.column.table, *outer, *_joined_tables(select)])
        if not _whole(element, known):
            # What is within it may be about its rows.
            known.extend(_froms_of(element))
            return None
        name = f"nearest_set_{len(parts)}"
        part = element.cte(name)
        parts.append(part.prefix_with("MATERIALIZED"))
        types = {column.key: column.type for column in part.c}
        return sa.select(*named(name, **types).c)

    def parted(criterion: Any) -> Any:
        clause, traverse = clause_of(criterion), cast("Any", visitors.replacement_traverse)
        is_clause = isinstance(clause, sa.ClauseElement)
        return traverse(clause, {}, apart) if is_clause else criterion

    parted_calls = (
        (name, tuple(map(parted, all_)) if name == "where" else all_, options)
        for name, all_, options in calls
    )
    return tuple(parted_calls), parts


def _literal(target: Target, column: str, value: Any) -> sa.BindParameter[Any] | None:
    """A value as part of the text, where a partial index may need it there.

    Those that indexes are declared for decide, and are written as they are there. Where predicates
    say it in other words, a value is written that is what it will be and whose literal nothing in
    it can end: not every release of SQLAlchemy looks at what it writes as a number or a UUID.
    """
    # A parameter with a name may be given another value for each execution, and so may one of a
    # lambda_stmt(), which is a copy: the lambda is called once for all values.
    if not isinstance(value, sa.BindParameter) or not value.unique or value.callable is not None:
        return None
    if value._is_clone_of is not None:
        return None
    own = value.effective_value
    declared = target.divided.get(column)
    if declared is not None:
        value = next((one for one in declared if one.effective_value == own), None)
    elif not _can_be_spelled(value.type, own):
        return None
    if value is None:
        return None
    return sa.bindparam(None, value.effective_value, type_=value.type, literal_execute=True)


def _can_be_spelled(type_: Any, own: Any) -> bool:
    type_ = getattr(type_, "impl_instance", type_)
    if isinstance(type_, sa.Uuid):
        return _UUID.fullmatch(str(own)) is not None
    return any(isinstance(type_, t) and isinstance(own, kind) for t, kind in _SPELLED)


def spelled_out(target: Target, calls: tuple[Call, ...]) -> tuple[Call, ...]:
    """The calls that choose rows, with values that choose a partial index as part of the text.

    A plan made once for all values, as of a prepared statement, cannot use an index of one of them.
    """

    def spelled(criterion: Any) -> Any:
        criterion = clause_of(criterion)
        if isinstance(criterion, sa.BooleanClauseList) and criterion.operator is operators.and_:
            return sa.and_(*map(spelled, criterion.clauses))
        if not isinstance(criterion, sa.BinaryExpression) or criterion.operator is not operators.eq:
            return criterion
        column: Any = criterion.left
        if getattr(column, "name", None) not in target.dividing:
            return criterion
        text = _literal(target, column.name, criterion.right)
        if text is None:
            return criterion
        return sa.BinaryExpression(column, text, operators.eq, type_=criterion.type)

    return tuple(
        (name, tuple(map(spelled, criteria)) if name == "where" else criteria, options)
        for name, criteria, options in calls
    )
