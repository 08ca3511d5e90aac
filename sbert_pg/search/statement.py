"""The select of a search, and what its caller may add to it.

A statement has up to four parts: ``nearest_query``, one row with what was asked;
``nearest_within``, keys and vectors of the caller's rows, with criteria and joins; the page, which
finds keys by the ways of ``ways.Ways``; and around it the caller's select, of the rows with those
keys. The page knows the other parts by name, so it is built once for each column and shape and not
for each search.

The module is long: what a search passes is to be few modules. ``criteria`` has what most do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import LoaderCriteriaOption
from sqlalchemy.sql import visitors

from sbert_pg.errors import DeclarationError
from sbert_pg.search.criteria import Call, aggregated, once, partners, spelled_out
from sbert_pg.search.looks import Shape, number, size_for
from sbert_pg.search.target import Target, columns_of, name_beside, tables_of
from sbert_pg.search.ways import (
    DISTANCE,
    KEY,
    SELF,
    VECTOR,
    WAY,
    Ways,
    among,
    compared_page,
    key_names,
    named,
)
from sbert_pg.types.comparator import clause_of


class Changeable:
    """A search that its caller may still change, by calls that choose rows or shape them."""

    __slots__ = ()
    function: ClassVar[str] = "nearest"
    narrowing: tuple[Call, ...]
    shaping: tuple[Call, ...]

    @property
    def origin(self) -> Any:
        """What the rows are selected from, as the caller would write it; ``None`` where several."""

    def called(self, name: str) -> str:
        """What the search calls a value of its own, beside columns of its rows."""
        return name_beside(self.origin, self.function, name)

    @property
    def joining(self) -> tuple[Call, ...]:
        """The calls that choose rows by more than criteria: joins."""
        return tuple(call for call in self.narrowing if call[0] != "where")

    @property
    def joins(self) -> bool:
        """Whether there are such calls."""
        return bool(self.joining)

    @property
    def loader_criteria(self) -> bool:
        """Whether there are criteria of the whole statement's."""
        return any(isinstance(o, LoaderCriteriaOption) for _, all_, _ in self.shaping for o in all_)

    def statement(self) -> Nearest:
        """The statement of the search."""
        raise NotImplementedError

    def narrowed(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Nearest:
        """The search, with one more call that chooses rows."""
        if name in ("where", "filter_by") and not arguments and not options:
            return self.statement()
        return self._with(narrowing=(*self.narrowing, self.said((name, arguments, options))))

    def said(self, call: Call) -> Call:
        """A call that chooses rows, by criteria where it names them.

        The names mean what they mean in the caller's own select: parts of the search are of more.
        """
        if call[0] != "filter_by" or self.origin is None:
            return call
        select = replayed(sa.select(self.origin), (*self.joining, call))
        return "where", () if select.whereclause is None else (select.whereclause,), {}

    def shaped(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Nearest:
        """The search, with one more call that shapes its rows."""
        if name in ("add_columns", "with_only_columns") and any(map(aggregated, arguments)):
            return self.refused(name, arguments, options)
        return self._with(shaping=(*self.shaping, (name, arguments, options)))

    def refused(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Nearest:
        """No search: a call would work on what is found already; ``None`` alone is harmless."""
        if len(arguments) == 1 and arguments[0] is None:
            return self.shaped(name, arguments, options)
        raise DeclarationError(
            f"{self.function}(...).{name}() would work on what the search has found, not choose "
            "what it finds. Take the search as a subquery, and do it to the rows of that, as "
            "select(func.count()).select_from(search.subquery())."
        )

    def paged(self, limit: Any, offset: Any) -> Nearest:
        """The search with another page."""
        require_page(self.function, limit, offset or 0)
        return self._with(limit=limit, offset=offset or 0)

    def _with(self, **changes: Any) -> Nearest:
        search: Any = self
        changed: Changeable = replace(search, **changes)
        return changed.statement()


@dataclass(frozen=True, slots=True, eq=False)
class Search(Changeable):
    """What is searched for.

    Attributes:
        right: the query's vector as an expression; a list of them where there are several.
        itself: key of a row to leave out.
        overrides: the caller's ``ef_search``, ``overfetch`` and ``probes``.
        narrowing: calls that choose rows: criteria and joins.
        shaping: calls that shape the rows chosen.
    """

    target: Target
    right: Any
    limit: int | None
    offset: int
    furthest: float | None
    itself: tuple[Any, ...]
    overrides: tuple[int | None, int | None, int | None]
    exact: bool
    narrowing: tuple[Call, ...] = ()
    shaping: tuple[Call, ...] = ()

    @property
    def origin(self) -> Any:
        """See ``Changeable.origin``."""
        return self.target.origin

    def statement(self) -> Nearest:
        """The statement of the search."""
        return statement_of(self)

    @property
    def many(self) -> bool:
        """Whether there are several queries."""
        return isinstance(self.right, list)

    @property
    def criteria(self) -> list[Any]:
        """The caller's criteria, where they are such."""
        return [one for name, all_, _ in self.narrowing if name == "where" for one in all_]

    @property
    def named(self) -> bool:
        """Whether criteria say few rows one by one."""
        outer = self.outer()
        return any(self.target.names_rows(criterion, outer) for criterion in self.criteria)

    @property
    def filtered(self) -> bool:
        """Whether rows may be turned away."""
        return bool(self.narrowing) or self.target.narrows or self.loader_criteria

    @property
    def single(self) -> bool:
        """Whether each row is there once for all that is joined."""
        return not self.joins

    @property
    def finishing(self) -> tuple[Call, ...]:
        """Calls on the select of the rows found, where it has not the joins that chose them."""
        return self.shaping

    def outer(self) -> list[Any]:
        """Tables of an enclosing statement that the query's vector comes from."""
        return [] if self.many else tables_of(self.right)


def _shape(search: Search) -> Shape | None:
    """What the text of the statement depends on; ``None`` where every row is to be compared."""
    target = search.target
    usable = target.index is not None and target.table is not None and not search.exact
    if not usable or not search.limit:
        return None
    if search.named:
        return None
    size = size_for(search.limit, target.quantized, search.filtered)
    joined, indexed = _criteria_of(search)
    if size is None or (target.partial and not _of_own_rows(search, joined)):
        return None
    return _shape_of(search, size, joined, indexed)


def _of_own_rows(search: Search, joined: bool) -> bool:
    """Whether there are criteria, and on the rows alone: those that a partial index serves."""
    return search.filtered and not (joined or search.joins)


def _criteria_of(search: Search) -> tuple[bool, bool]:
    """Whether rows are chosen by more than their own columns, and whether an index finds them."""
    target = search.target
    columns = [column for criterion in search.criteria for column in columns_of(criterion)]
    outer, own = search.outer(), list(filter(target.owns, columns))
    inner = [column for column in columns if not any(column.table is one for one in outer)]
    others = len(own) < len(inner) and not target.narrows
    joined = not search.single if search.joins else others
    own += filter(target.owns, [*_joining(search), *_asked_about(search)])
    return joined, any(column.name in target.leading for column in own)


def _joining(search: Search) -> list[Any]:
    """Columns by which joins reach other tables: those said, or foreign keys."""
    calls = search.joining
    given = [clause_of(one) for _, to, options in calls for one in (*to, *options.values())]
    said = sa.and_(sa.true(), *(one for one in given if isinstance(one, sa.ColumnElement)))
    keys = () if not calls else getattr(search.target.table, "foreign_keys", ())
    return [*columns_of(said)] or [key.parent for key in keys]


def _asked_about(search: Search) -> list[Any]:
    """Columns in ``EXISTS``: by those of the row's own the planner finds what it is there for."""
    exists = (one for one in _subqueries(search) if isinstance(one, sa.Exists))
    return [element for one in exists for element in visitors.iterate(one)]


def _subqueries(search: Search) -> list[Any]:
    """Subqueries and ``EXISTS`` in the criteria."""
    inner = visitors.iterate(sa.and_(sa.true(), *map(clause_of, search.criteria)))
    return [element for element in inner if isinstance(element, (sa.Exists, sa.Select))]


def _shape_of(search: Search, size: int, joined: bool, indexed: bool) -> Shape:
    target = search.target
    ef_search, overfetch, probes = search.overrides
    assert target.index is not None
    if target.index.method not in ("hnsw", "diskann"):
        ef_search = None
    deep = search.offset > 0 or joined
    apart = deep or search.many or target.partial
    return Shape(
        size,
        keyed=not apart and len(target.key) == 1,
        deep=deep,
        filtered=search.filtered,
        joined=joined,
        indexed=indexed,
        itself=bool(search.itself),
        bounded=search.furthest is not None,
        known=isinstance(search.right, sa.BindParameter),
        ef_search=ef_search,
        overfetch=overfetch,
        probes=probes,
    )


def replayed(statement: Any, calls: tuple[Call, ...]) -> Any:
    """A select after calls of methods of ``Select``."""
    for name, arguments, options in calls:
        statement = getattr(statement, name)(*arguments, **options)
    return statement


def replayed_of(statement: Any, origin: Any, calls: tuple[Call, ...]) -> Any:
    """The same of a select that has a page beside the origin.

    A join whose ON names no column, as to what is ``LATERAL``, might be to either of the two.
    """
    if not any(name in ("select_from", "join_from") for name, _, _ in calls):
        statement = statement.select_from(origin)
    return replayed(statement, calls)


def criteria_of(where: Any) -> tuple[Any, ...]:
    """The criteria that an argument ``where=`` stands for; ``None`` is none."""
    if isinstance(where, str):
        raise DeclarationError(f"where={where!r} is a text; for SQL write where=text({where!r}).")
    if isinstance(clause_of(where), sa.ClauseElement):
        return (where,)
    if not isinstance(where, Iterable | None):
        raise DeclarationError(f"where={where!r} is no criterion, such as Article.lang == 'en'.")
    return () if where is None else tuple(where)


def require_page(function: str, limit: Any, offset: Any) -> None:
    """Refuse a limit or offset that is no whole number from 0 on; no limit is all rows."""
    for name, given in (("limit", limit), ("offset", offset)):
        every = given is None and name == "limit" and function != "hybrid"
        if not every and (not isinstance(given, (int, np.integer)) or given < 0):
            raise DeclarationError(
                f"{function}() was given {name}={given!r}; it takes a whole number from 0 on, "
                "which decides how the search is made."
            )


def is_number(given: Any) -> bool:
    """Whether it is a real number, which NaN is not."""
    return isinstance(given, Real) and not math.isnan(given)


def statement_of(search: Search) -> Nearest:
    """The statement of a search."""
    shape = _shape(search)
    if shape is not None:
        return _by_ways(search, shape)
    if not search.many:
        return _compared(search)
    if not search.limit or not search.target.key:
        raise DeclarationError(
            "nearest() with several queries needs a limit and a primary key of the table."
        )
    return _each(search, compared_page(search.target, search.furthest is not None), None)


def _compared(search: Search) -> Nearest:
    """Every row that passes is compared, and the nearest are taken."""
    target = search.target
    told_apart = len(target.key) == 1 if _criteria_of(search)[0] else bool(target.key)
    if target.proof and search.limit and told_apart:
        return _compared_then_proven(search)
    distance = target.distance(target.column, search.right)
    made = Nearest(*target.selected, target.similarity_from(distance))
    comparable = target.comparable()
    if not isinstance(search.right, sa.BindParameter):
        # What only the server knows may be no vector: nothing is near to that.
        directed = len(comparable) > 1
        comparable.append(target.directed(search.right) if directed else search.right.is_not(None))
    # Here no part of the statement has asked for the binding.
    proof = target.proven(target.column)
    made = made.where(*comparable, *proof, *_others(search))
    if search.furthest is not None:
        made = made.where(distance <= search.furthest)
    made = _correlated(replayed(made, search.narrowing), search)
    # Adding zero keeps an index, whose settings are not made, from serving the order.
    made = made.order_by(distance + sa.literal_column("0"), *target.key, *_partners(search))
    if search.limit is not None:
        made = made.limit(search.limit)
    if search.offset:
        made = made.offset(search.offset)
    return _finished(made, search, narrowed=True)


def _compared_then_proven(search: Search) -> Nearest:
    """The same; the proof is asked of the rows that are taken, not of all."""
    target, bounded = search.target, search.furthest is not None
    parts = [_asked(search).cte("nearest_query"), _within_part(search, *_others(search))]
    if _criteria_of(search)[0]:
        parts.append(compared_page(target, bounded).cte("nearest_page"))
        return _finished(_cut(_joined_page(search), search, parts), search, narrowed=True)
    if bounded not in target.prepared:
        target.prepared[bounded] = _around(target, compared_page(target, bounded))
    return _finished(_cut(target.prepared[bounded], search, parts), search)


def _joined_page(search: Search) -> Any:
    """The caller's select of the rows of a page that is a part of the statement.

    Not joined to it, since a row may be there more than once, with each of its partners.
    """
    target = search.target
    taken = _of_few(target, named("nearest_page", *key_names(KEY, 1)))
    vector = sa.select(named("nearest_query", "vector").c.vector).scalar_subquery()
    similarity = target.similarity_from(target.distance(target.column, vector))
    made = replayed(Nearest(*target.selected, similarity), search.narrowing)
    made = made.where(*taken, *target.proof).order_by(similarity.desc(), *target.key)
    return made.order_by(*_partners(search))


def _partners(search: Search) -> list[Any]:
    """What orders the partners that a row may have by joins."""
    return partners(search.target, _chosen(search)) if _criteria_of(search)[0] else []


def _chosen(search: Search) -> Any:
    """A select of the rows with their partners, as joins have chosen them."""
    target = search.target
    return replayed(sa.select(target.key[0] if target.key else target.column), search.narrowing)


def _others(search: Search) -> list[sa.ColumnElement[bool]]:
    """That a row is not the one that others like it are asked for."""
    if not search.itself:
        return []
    itself = [k == v for k, v in zip(search.target.key, search.itself, strict=True)]
    return [search.right.is_not(None), sa.not_(sa.and_(*itself))]


def _finished(made: Any, search: Search, *, narrowed: bool = False) -> Nearest:
    """The statement; ``narrowed`` where its select has the calls that chose rows."""
    calls = search.shaping if narrowed and search.joins else search.finishing
    statement: Nearest = replayed(made, calls)
    statement.search = search
    return statement


def _query_part(search: Search, vector: Any) -> sa.Select[Any]:
    """What was asked, as a part of one row; it asks the catalog, for the whole statement."""
    assert search.limit is not None
    fence, binding_id = search.target.fence, search.target.bound
    if not isinstance(vector, sa.BindParameter):
        fence = None
    if fence is not None:
        # The type is said, since not every driver does.
        value = sa.cast(sa.type_coerce(vector, fence.type), fence.type)
        vector, binding_id = sa.case((fence.rows.c.id.is_not(None), value)), fence.id
    columns = [vector.label("vector"), sa.literal(search.limit + search.offset).label("needed")]
    if search.target.proof:
        columns.append(binding_id.label("binding"))
    if search.furthest is not None:
        columns.append(sa.literal(search.furthest, sa.Float(53)).label("furthest"))
    names = key_names(SELF, len(search.itself))
    for name, value, key in zip(names, search.itself, search.target.row_key, strict=False):
        # The type is said: an enumeration's value alone would be a text.
        columns.append(sa.cast(sa.literal(value, key.type), key.type).label(name))
    query = sa.select(*columns)
    return query if fence is None else query.select_from(fence.rows)


def _within_part(search: Search, *criteria: Any) -> sa.CTE:
    """Keys and vectors of the rows that pass, for the planner to put where they are needed."""
    target = search.target
    names = key_names(KEY, len(target.key))
    keys = [key.label(name) for key, name in zip(target.key, names, strict=True)]
    rows = sa.select(*keys, target.column.label(VECTOR))
    if target.entity is not None:
        rows = rows.select_from(target.entity)
    # The caller's criteria first, since the vector is far behind in the row.
    narrowing = search.narrowing
    if target.dividing:
        narrowing = spelled_out(target, narrowing)
    rows = replayed(rows, narrowing).where(*target.present, *criteria)
    part: sa.CTE = _correlated(rows, search).cte("nearest_within").prefix_with("NOT MATERIALIZED")
    return part


def _passes(search: Search, row: sa.FromClause) -> Any:
    """That another row of the table passes: by the criteria, or as one of those within."""
    target = search.target
    own: list[Any] = [target.about(row, criterion) for criterion in search.criteria]
    others = any(name != "where" for name, _, _ in search.narrowing)
    if target.narrows or others or search.loader_criteria or any(one is None for one in own):
        return among([row.c[column.key] for column in target.row_key])
    return sa.and_(*own)


def _by_ways(search: Search, shape: Shape) -> Nearest:
    """The rows of a page that is found by the index where it suffices."""
    target, (ways, around) = search.target, _prepared(search.target, shape)
    if search.many:
        return _each(search, ways.page, shape)
    parts = _parts(search, shape)
    if not shape.joined:
        return _finished(_cut(around, search, parts), search)
    parts.append(ways.page.cte("nearest_page"))
    page = named("nearest_page", *key_names(KEY, len(target.key)), DISTANCE, WAY)
    made = Nearest(*target.selected, target.similarity_from(page.c[DISTANCE]))
    made = replayed_of(made, target.origin, search.narrowing)
    made = _ordered(made, target, page).where(*_of_few(target, page))
    made = made.order_by(*_partners(search))
    return _finished(_cut(made, search, parts), search, narrowed=True)


def _of_few(target: Target, page: Any) -> list[sa.ColumnElement[bool]]:
    """That a row is of a page, said so that the planner expects few.

    It takes a page for a tenth of the table, and would join all rows that pass, and ask each for
    its proof, to find those of the page among them.
    """
    if len(target.key) > 1:
        return []
    (key,), (name,) = target.key, key_names(KEY, 1)
    keys = sa.select(page.c[name]).scalar_subquery()
    return [key == sa.any_(sa.func.array(keys, type_=sa.ARRAY(key.type)))]


def _prepared(target: Target, shape: Shape) -> tuple[Ways, Nearest]:
    """What is the same for all searches of a shape."""
    prepared: tuple[Ways, Nearest] | None = target.prepared.get(shape)
    if prepared is None:
        ways = Ways(target, shape)
        around = _around(target, ways.page) if ways.taken is None else _taken(target, ways)
        prepared = target.prepared[shape] = (ways, around)
    return prepared


def _around(target: Target, page: sa.Select[Any]) -> Nearest:
    """The caller's select of the rows of a page; the same for all, so that columns stay theirs."""
    rows = page.subquery("nearest_page")
    made = Nearest(*target.selected, target.similarity_from(rows.c[DISTANCE]))
    return _ordered(made, target, rows)  # type: ignore[no-any-return]


def _taken(target: Target, ways: Ways) -> Nearest:
    """The same where the page is a condition on the rows themselves."""
    assert ways.taken is not None
    distance = target.distance(target.column, ways.vector)
    similarity = target.similarity_from(distance)
    made = Nearest(*target.selected, similarity).where(ways.taken)
    if ways.shape.bounded:
        made = made.where(distance <= ways.furthest)
    # By the similarity, since the index, which has no settings here, would serve the distance.
    return made.order_by(similarity.desc(), *target.key)  # type: ignore[no-any-return]


def _cut(made: Any, search: Search, parts: list[sa.CTE]) -> Any:
    """The page of the rows around; here, since rows that are not proven are left out before."""
    assert search.limit is not None
    # The number itself: as a parameter PostgreSQL would plan each execution for its value.
    made = made.add_cte(*parts, nest_here=True).limit(number(search.limit))
    return made.offset(search.offset) if search.offset else made


def _parts(search: Search, shape: Shape, query: sa.Select[Any] | None = None) -> list[sa.CTE]:
    """What the page of a search knows by name."""
    ways = _prepared(search.target, shape)[0]
    parts = [(_asked(search) if query is None else query).cte("nearest_query")]
    if shape.filtered:
        if not search.joins and _subqueries(search):
            narrowing, sets = once(search.target, search.outer(), search.narrowing, _chosen(search))
            search, parts = replace(search, narrowing=narrowing), [*parts, *sets]
        parts.append(_within_part(search))
    return parts + ways.parts(lambda row: _passes(search, row))


def _asked(search: Search) -> sa.Select[Any]:
    query: sa.Select[Any] = _correlated(_query_part(search, search.right), search)
    return query


def _correlated(statement: Any, search: Search) -> Any:
    """The statement, which takes the query's vector from the enclosing one where it is of there."""
    outer = search.outer()
    return statement.correlate(*outer) if outer else statement


def parts_of(search: Search) -> tuple[Ways, list[sa.CTE]] | None:
    """The ways of a search and what it adds, or ``None`` where every row is compared."""
    shape = _shape(search)
    return None if shape is None else (_prepared(search.target, shape)[0], _parts(search, shape))


def _joined(target: Target, rows: Any) -> list[Any]:
    """That a row of the table is one of those found."""
    names = key_names(KEY, len(target.key))
    return [key == rows.c[name] for key, name in zip(target.key, names, strict=True)]


def _order(key: list[Any], rows: Any) -> list[Any]:
    """Nearest first, ties by key; on later pages the ways one after the other."""
    first = [rows.c[WAY]] if WAY in rows.c else []
    return [*first, rows.c[DISTANCE], *key]


def _ordered(made: Any, target: Target, page: Any) -> Any:
    made = made.join_from(target.origin, page, sa.and_(*_joined(target, page)))
    return made.where(*target.proof).order_by(*_order(target.key, page))


def _one_asks(search: Search) -> Iterator[Any]:
    """The vectors of several queries; the first that is a parameter asks for the binding."""
    fence, asked = search.target.fence, False
    for vector in search.right:
        if fence is not None and isinstance(vector, sa.BindParameter):
            vector, asked = (sa.type_coerce(vector, fence.type) if asked else vector), True
        yield vector


def _each(search: Search, page: sa.Select[Any], shape: Shape | None) -> Nearest:
    """The nearest of each of several queries."""
    target = search.target
    if shape is not None and shape.joined:
        raise DeclarationError(
            "nearest() with several queries takes criteria on the searched rows alone; join the "
            "rest to its subquery, or use exists()."
        )
    queries = (
        sa.func.unnest(postgresql.array(list(_one_asks(search))))
        .table_valued("vector", with_ordinality="number", name="nearest_queries")
        .render_derived()
    )
    query = _query_part(search, queries.c.vector).correlate(queries)
    if shape is None:
        parts = [query.cte("nearest_query"), _within_part(search)]
    else:
        parts = _parts(search, shape, query)
    # Around the page, whose own parts would otherwise come before these.
    rows = page.subquery("nearest_one")
    one, names = sa.select(*rows.c), key_names(KEY, len(target.key))
    if target.proof:
        one = one.join_from(rows, target.origin, sa.and_(*_joined(target, rows)))
        one = one.where(*target.proof)
    one = one.order_by(*_order([rows.c[name] for name in names], rows))
    found = _cut(one, search, parts).lateral("nearest_page")
    asked = (queries.c.number - sa.literal_column("1")).label(search.called("query"))
    made = Nearest(*target.selected, target.similarity_from(found.c[DISTANCE]), asked)
    made = made.select_from(queries).join_from(queries, found, sa.true())
    made = made.join_from(found, target.origin, sa.and_(*_joined(target, found)))
    made = made.order_by(queries.c.number, *_order(target.key, found))
    return _finished(made, search)


def _delegated(name: str, to: str) -> Any:
    """A method of ``Select`` that a finished search does in its own way, ``narrowed`` or such."""

    def method(self: Nearest, *arguments: Any, **options: Any) -> Any:
        if self.search is None:
            return getattr(super(Nearest, self), name)(*arguments, **options)
        return getattr(self.search, to)(name, arguments, options)

    return method


class Nearest(sa.Select[Any]):
    """A select of the rows that a search finds, nearest first.

    What chooses rows (``where``, ``filter_by``, ``join``, ``limit``, ``offset``) changes the
    search, and gives the statement of the changed search; what shapes rows (``options``,
    ``add_columns``, ``with_only_columns``) is done to those that it finds; the rest is refused.
    """

    inherit_cache = True
    search: Any = None

    where = _delegated("where", "narrowed")
    filter_by = _delegated("filter_by", "narrowed")
    join = _delegated("join", "narrowed")
    join_from = _delegated("join_from", "narrowed")
    select_from = _delegated("select_from", "narrowed")
    options = _delegated("options", "shaped")
    add_columns = _delegated("add_columns", "shaped")
    with_only_columns = _delegated("with_only_columns", "shaped")
    with_for_update = _delegated("with_for_update", "shaped")
    execution_options = _delegated("execution_options", "shaped")
    set_label_style = _delegated("set_label_style", "shaped")
    prefix_with = _delegated("prefix_with", "shaped")
    suffix_with = _delegated("suffix_with", "shaped")
    add_cte = _delegated("add_cte", "shaped")
    correlate = _delegated("correlate", "shaped")
    order_by = _delegated("order_by", "refused")
    group_by = _delegated("group_by", "refused")
    having = _delegated("having", "refused")
    distinct = _delegated("distinct", "refused")
    fetch = _delegated("fetch", "refused")
    from_statement = _delegated("from_statement", "refused")
    union = _delegated("union", "refused")
    union_all = _delegated("union_all", "refused")
    intersect = _delegated("intersect", "refused")
    intersect_all = _delegated("intersect_all", "refused")
    except_ = _delegated("except_", "refused")
    except_all = _delegated("except_all", "refused")

    def self_group(self, against: Any = None) -> Any:
        """Within ``union_all`` and the like, the rows of its subquery: parts keep their names."""
        if self.search is None or not isinstance(against, sa.CompoundSelect):
            return super().self_group(against)
        return sa.select(*self.subquery().c)

    def filter(self, *criteria: Any) -> Any:
        """The same as ``where``."""
        return self.where(*criteria)

    def outerjoin(self, *arguments: Any, **options: Any) -> Any:
        """As ``join``, keeping rows without a partner."""
        return self.join(*arguments, isouter=True, **options)

    def outerjoin_from(self, *arguments: Any, **options: Any) -> Any:
        """As ``join_from``, keeping rows without a partner."""
        return self.join_from(*arguments, isouter=True, **options)

    def limit(self, limit: Any) -> Any:
        """Search for another number of rows."""
        if self.search is None:
            return super().limit(limit)
        return self.search.paged(limit, self.search.offset)

    def offset(self, offset: Any) -> Any:
        """Leave out as many of the nearest rows."""
        if self.search is None:
            return super().offset(offset)
        return self.search.paged(self.search.limit, offset)

    def slice(self, start: int, stop: int) -> Any:
        """The rows from one place to another, counted from 0."""
        return self.limit(max(0, stop - start)).offset(start)
