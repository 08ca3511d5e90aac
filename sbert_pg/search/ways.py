"""Which way a search goes: by the index, or by comparing every row that passes the filter.

The one owner of that decision. The database makes it inside the statement, so that one statement
serves sessions and connections of both kinds; this module writes it, and is long since the parts
know each other. docs/search.md has a picture.

- **near**: the index gives the rows nearest to the query, *whatever* their other columns; those
  that pass the filter are the answer, where they are many enough and begin near enough. Only the
  nearer half of what the index keeps is taken, since its last rows are less well chosen. How many
  rows are looked at follows from the share that passes, which is estimated from a few rows.
- **exact**: the rows that pass are all compared. It is right by itself, and taken at once where
  few rows pass, and where what the index has found is no answer.
- **far**: the index once more, with as many candidates as it allows; for later pages, and where so
  many rows pass that comparing them costs more.

The index is never asked to go on until enough rows pass (pgvector's iterative scan): under a filter
that is related to the vectors this is what comes back wrong, or empty behind an island of equal
vectors. Later pages begin with the very rows of the first look, and what comes after leaves them
out, so that pages neither repeat nor miss a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import visitors

from sbert_pg.catalog.embedding import companion_of
from sbert_pg.search.looks import (
    MAX_EF_SEARCH,
    Look,
    Shape,
    far_look,
    near_look,
    number,
    planned,
    settings,
    settings_back,
)
from sbert_pg.search.target import ASKED, Target

#: Part of the rows looked at in which the first has to pass.
HEAD = 0.3
#: Least share of passing rows near the query, as a part of the share in the whole table. Where
#: fewer pass here than elsewhere the filter is related to the vectors, and the rows that the index
#: has missed are likely those that pass.
LOCAL = 0.5
#: One row in so many of a sample is compared where its vector is stored apart.
EIGHTH = 8
#: Spread of distances below which all rows are taken for one island.
ISLAND = 1e-6

# Names in the statement. Criteria given as text may name columns without their table, so these are
# none that a table has.
KEY, SELF, VECTOR = "nearest_key", "nearest_self", "nearest_vector"
COMPANION = "nearest_companion"
DISTANCE, PLACE, PASSES, WAY = "nearest_distance", "nearest_place", "nearest_passes", "nearest_way"
# Of all rows that the index gave, those that are not taken too: how many, and the largest distance.
SEEN, LAST = "nearest_seen", "nearest_last"
NEAR, FAR, EXACT = 1, 2, 3


def key_names(prefix: str, count: int) -> list[str]:
    """Names of key columns in the statement."""
    return [f"{prefix}_{n}" for n in range(count)]


def named(name: str, *columns: str, **typed: Any) -> sa.TableClause:
    """A part of the statement that is made elsewhere, by its name.

    Args:
        columns: names of its columns, whose type does not matter but for ``PASSES``.
    """
    types = {PASSES: sa.Boolean(), **typed}
    names = (*columns, *typed)
    return sa.table(name, *(sa.column(c, types.get(c, sa.Float())) for c in names))


NAN: Any = sa.literal_column("'NaN'::float8")


def _one_in(number_: int, keys: list[Any]) -> sa.ColumnElement[bool]:
    """That a row is one in so many, by its whole key: a part of it may be that of many rows."""
    text: Any = sa.cast(keys[0], sa.Text)
    if len(keys) > 1:
        text = sa.func.concat_ws(sa.literal_column("'/'"), *keys)
    remainder = sa.func.hashtext(text) % number(number_)
    return remainder == number(0)


def _spread(distance: sa.ColumnElement[float], last: Any) -> sa.ColumnElement[bool]:
    """Whether rows are not all equally far: an island of equal vectors ends a search."""
    # In this form it does not hold where the query is all zeros, and no distance a number.
    return sa.func.min(distance) + number(ISLAND) < sa.func.max(last)


#: Whether a row passes the caller's filter, as an expression about the row.
Passes = Callable[[sa.FromClause], Any]


class Ways:
    """The parts of one search's statement.

    They know each other and what a search adds by name alone (``nearest_query``; under a filter
    also ``nearest_within``), so that they are built once for each column
    and shape. What tries the caller's filter is finished for each search, by ``parts``.

    Attributes:
        page: candidates as a select of keys and distance, nearest first, and more than are wanted;
            for later pages also the way that found them, which comes before the distance.
        taken: that a row of the caller's is one of the candidates, by its key; for most first
            pages, in place of ``page``, since it is planned in less time than a join.
        verdict: which way was taken and why, as a select of one row.
    """

    def __init__(self, target: Target, shape: Shape) -> None:
        assert target.table is not None
        assert target.index is not None
        self.target, self.index, self.shape = target, target.index, shape
        self.table: sa.Table = target.table
        self.row = self.table.alias("nearest_row")
        self.names = key_names(KEY, len(target.row_key))
        own = key_names(SELF, len(self.names))
        self.query = named("nearest_query", "vector", "needed", "furthest", *own)
        self.within = named("nearest_within", *self.names, VECTOR)
        self.first, self.second = near_look(self.index, shape), far_look(self.index, shape)
        # What the predicate of a partial index leaves out is known to the planner alone. So the
        # rows that pass are ordered, by the index where the planner finds that it holds them.
        self.partial = self.index.partial and shape.filtered
        self.tested = shape.filtered and not self.partial
        self.proof = self._proof()
        self.vector, self.furthest = self._asked("vector"), self._asked("furthest")
        #: Neither pages nor filters: what the index gives is the answer as it is, or none.
        self.plain = shape.keyed and not shape.filtered
        #: What the proof is asked of, where it is asked of a look's rows later.
        self.carried = self._carried() if self.proof and shape.keyed else {}
        self.found = {look: self._found(f"nearest_{look}") for look in ("near", "far")}
        self._make()

    def _make(self) -> None:
        """The parts, each of which knows those before it."""
        self.plan = self._plan() if self.tested else None
        self.near_rows = self._rows(self.first, self.plan)
        if not self.plain:
            self.near = self._judged_near()
        if self.second is not None:
            self.far_rows = self._rows(self.second, self.near)
            self.far = self._judged_far(self.second)
        #: The keys that each look gives, ``NULL`` where it is no answer.
        self.best: dict[str, sa.ScalarSelect[Any]] = {}
        self.taken = self._taken() if self.shape.keyed else None
        self.page = sa.select() if self.taken is not None else self._page()
        self.verdict = self._verdict()

    def parts(self, passes: Passes | None) -> list[sa.CTE]:
        """The parts that page and verdict know by name, in their order."""
        parts = []
        if self.plan is not None:
            assert passes is not None
            parts = [self._sample(passes(self.tried)), self.plan]
        if self.plain:
            return [self._part("near", self.near_rows)]
        parts += [self._look("near", self.near_rows, passes), self.near]
        if self.second is not None:
            parts += [self._look("far", self.far_rows, passes), self.far]
        return parts

    # -- small pieces

    def _proof(self) -> list[sa.ColumnElement[bool]]:
        return [] if self.partial else self.target.proven(self.target.row_column(self.row), ASKED)

    def _carried(self) -> dict[str, Any]:
        column = self.target.row_column(self.row)
        return {VECTOR: column, COMPANION: companion_of(column)}

    def _found(self, name: str) -> sa.TableClause:
        """The rows of a look, by its name."""
        columns = [*self.names, DISTANCE]
        columns += [] if self.plain else [PLACE, SEEN, LAST, PASSES]
        return named(name, *columns, **{n: column.type for n, column in self.carried.items()})

    def _part(self, name: str, statement: sa.Select[Any]) -> sa.CTE:
        return statement.cte(f"nearest_{name}").prefix_with("MATERIALIZED")

    def _asked(self, name: str) -> sa.ScalarSelect[Any]:
        return sa.select(self.query.c[name]).scalar_subquery()

    def _keys(self, rows: Any) -> list[Any]:
        if rows is self.row:
            return [self.row.c[column.key] for column in self.target.row_key]
        return [rows.c[name] for name in self.names]

    def _others(self, rows: Any) -> list[sa.ColumnElement[bool]]:
        """That a row is not the one that others like it are asked for."""
        if not self.shape.itself:
            return []
        own = key_names(SELF, len(self.names))
        pairs = zip(self._keys(rows), own, strict=True)
        return [sa.not_(sa.and_(*(key == self._asked(name) for key, name in pairs)))]

    def _present(self, rows: Any, column: Any) -> list[sa.ColumnElement[bool]]:
        """That a row has a vector that may be its column's; those within have been asked."""
        if rows is self.within:
            return [column.is_not(None)]
        return self.target.claimed(column)

    def _packed(self) -> int:
        """How many times as many rows as of 384 dimensions a page of the table holds."""
        size = 2 if self.target.type.storage == "halfvec" else 4
        return max(1, 1600 // (size * (self.target.type.dimensions or 384) + 60))

    # -- the plan: about how many rows pass, and so whether the index is worth a look

    def _sample(self, passes: Any) -> sa.CTE:
        """How many rows of a few pages pass, and how near the nearest of them is."""
        tried = self.tried
        keys: list[Any] = [tried.c[column.key] for column in self.target.row_key]
        vector = self.target.row_column(tried)
        source: Any = tried
        times = self.times
        if isinstance(passes, sa.Exists):
            # Each row is looked up by its key where that costs less than all rows that pass: the
            # planner compares both here, and not within an aggregate, for as many rows as it
            # expects. It expects a tenth of the table, but for a criterion that it takes for rare.
            packed = self._packed()
            some = _one_in(packed, keys)
            rows = sa.select(*keys, vector, passes.label(PASSES)).where(some)
            source = rows.offset(number(0)).subquery("nearest_tries")
            *keys, vector, passes = source.c
            times = times * number(packed)
        few = sa.and_(passes, _one_in(EIGHTH, keys)) if self.target.wide else passes
        closest = sa.func.min(self.target.distance(vector, self.vector)).filter(few)
        counts: list[Any] = [sa.func.count().label("tried"), times.label("times")]
        counts += [sa.func.count().filter(passes).label("hits"), closest.label("closest")]
        return sa.select(*counts).select_from(source).cte("nearest_sample")

    def _plan(self) -> sa.CTE:
        """From a few pages of the table; it decides what a search costs, never what it finds."""
        self.times = self.target.sample_times()
        part = sa.func.system(number(100) / self.times)
        # The same pages each time; of each partition, where the table has such.
        self.tried = self.table.tablesample(part, "nearest_tried", seed=number(0))
        sample = named("nearest_sample", "tried", "hits", "times", "closest")
        return self._part("plan", planned(sample, self.first, self.shape))

    # -- looks at the index

    def _rows(self, look: Look, condition: sa.CTE | None) -> sa.Select[Any]:
        """The rows that the index gives, nearest first."""
        vector = self._asked("vector")
        row: Any = self.within if self.partial else self.row
        column = row.c[VECTOR] if self.partial else self.target.row_column(row)
        keys = [key.label(n) for key, n in zip(self._keys(row), self.names, strict=True)]
        carried = [column.label(name) for name, column in self.carried.items()]
        present = [column.is_not(None)] if carried else self._present(row, column)
        if self.plain:
            present += self._others(row)
        return (
            sa.select(*keys, self.target.distance(column, vector).label(DISTANCE), *carried)
            .where(self._set(look, condition).is_not(None), *present)
            .order_by(self.target.index_distance(column, self.index, vector))
            .limit(number(look.fetched))
        )

    def _set(self, look: Look, condition: sa.CTE | None) -> sa.ScalarSelect[Any]:
        """The settings of a look; made once, ahead of the scan, which reads them at its first row.

        Not at all where the look is not to be taken or there is no vector to look for.
        """
        first = condition is not None and condition is self.plan
        looked = condition.c.looked if condition is not None and first else self._looked(look)
        made = sa.select(settings(self.index, look, looked))
        if condition is not None:
            allows = condition.c["by_index" if first else "further"]
            made = made.select_from(condition).where(allows)
        if not self.shape.known:
            made = made.where(self._asked("vector").is_not(None))
        return made.scalar_subquery()

    def _look(self, name: str, rows: sa.Select[Any], passes: Passes | None) -> sa.CTE:
        """The same with their places, and whether they pass."""
        row: Any = self.within if self.partial else self.row
        criteria: list[Any] = self._others(row)
        if self.tested:
            assert passes is not None
            criteria.append(passes(row))
        if not self.shape.keyed:
            # Last, since it hashes.
            criteria += self.proof
        if name == "far" and self.shape.deep:
            known = sa.not_(self._accepted("near"))
            criteria.append(sa.or_(known, self._not_among("near", row)))
        look = self.first if name == "near" else self.second
        given, passing = self._behind(rows, row, sa.and_(sa.true(), *criteria))
        columns = [given.c[column] for column in (*self.names, DISTANCE, *self.carried)]
        columns += [given.c[column] for column in (PLACE, SEEN, LAST)]
        # Adding zero has the planner expect a third of the rows, as it does not of a mere number
        # of rows: where a join decides, it looks these up, or computes all that pass.
        among = given.c[PLACE] + number(0) <= self._looked(look)
        return self._part(name, sa.select(*columns, passing.label(PASSES)).where(among))

    def _behind(self, rows: sa.Select[Any], row: Any, criterion: Any) -> tuple[Any, Any]:
        """Rows of a look with places and what a criterion needs, and the criterion about these.

        Within the look the planner would expect it to be asked of all rows that there are, and look
        up by one scan of the table which of these pass.
        """
        labels = dict(zip(self._keys(row), self.names, strict=True))
        inner = visitors.iterate(criterion)
        used: set[Any] = {c for c in inner if isinstance(c, sa.ColumnClause) and c.table is row}
        more = {c: f"nearest_own_{n}" for n, c in enumerate(sorted(used - {*labels}, key=str))}
        given = rows.add_columns(*(c.label(n) for c, n in more.items())).subquery("nearest_rows")
        order = [given.c[DISTANCE], *self._keys(given)]
        placed = sa.select(
            *given.c,
            sa.func.row_number().over(order_by=order).label(PLACE),
            sa.func.count().over().label(SEEN),
            sa.func.max(given.c[DISTANCE]).over().label(LAST),
        ).subquery("nearest_places")
        labels |= more

        def replace(element: Any, **_: Any) -> Any:
            # A part is another one where it is copied, and would be written once more.
            if isinstance(element, sa.CTE):
                return element
            return placed.c[labels[element]] if element in labels else None

        traverse: Any = visitors.replacement_traverse
        return placed, traverse(criterion, {}, replace)

    def _looked(self, look: Look | None) -> Any:
        assert look is not None
        if self.plan is None or look.least == look.most:
            return number(look.least)
        return sa.select(self.plan.c.looked).scalar_subquery()

    def _not_among(self, name: str, rows: Any) -> sa.ColumnElement[bool]:
        """That a row is not one that an earlier look has found.

        Not as ``NOT EXISTS``, whose cost the planner takes for a scan of the look for each row,
        beside which no other choice in the statement matters to it.
        """
        earlier = self.found[name]
        found = sa.select(*self._keys(earlier)).where(earlier.c[PASSES])
        key = self._keys(rows)
        known: Any = key[0] if len(key) == 1 else sa.tuple_(*key)
        return known.not_in(found)  # type: ignore[no-any-return]

    # -- whether what a look has found is an answer

    def _counted(self, name: str, **more: Any) -> sa.Subquery:
        """What is asked of the rows of a look, as one row."""
        found = self.found[name]
        more["passed"] = sa.func.count()
        spread = _spread(found.c[DISTANCE], found.c[LAST])
        columns: list[Any] = [sa.func.max(found.c[SEEN]).label("seen"), spread.label("spread")]
        columns += [value.filter(found.c[PASSES]).label(key) for key, value in more.items()]
        return sa.select(*columns).select_from(found).subquery("nearest_counts")

    def whole(self, look: Look) -> int:
        """Rows that the index gives where none is missing.

        Deleted rows that are not vacuumed are kept by the index and seen by nobody: where they
        crowd out others, fewer rows come than it keeps.
        """
        if not self.index.quantized:
            return look.least
        # As many candidates as the caller says, but where the scan goes on by itself.
        kept = look.fetched if look.fetched > MAX_EF_SEARCH else look.ef_search or look.fetched
        # They are ordered coarsely, so that twice as many as are wanted have to be there.
        wide = min(look.fetched, 2 * self.shape.size)
        return max(min(look.fetched, kept) * 3 // 4, wide)

    def _judged_near(self) -> sa.CTE:
        look, found, plan = self.first, self.found["near"], self.plan
        more: dict[str, Any] = {}
        if plan is not None:
            more["head"] = sa.func.min(found.c[PLACE])
            more["last"] = sa.func.max(found.c[DISTANCE])
            more["distances"] = sa.func.array_agg(found.c[DISTANCE])
        counts = self._counted("near", **more)
        source: Any = counts
        whole: Any = number(self.whole(look))
        criteria: list[Any] = [counts.c.spread, counts.c.passed >= number(self.shape.size)]
        if plan is not None:
            source = sa.join(counts, plan, sa.true())
            looked = number(look.least) if look.least == look.most else plan.c.looked
            whole = whole if self.index.quantized else looked
            criteria += [
                counts.c.head <= number(HEAD) * looked,
                counts.c.passed >= number(LOCAL) * plan.c.share * looked,
                # No row of the sample is nearer that the index has not found.
                sa.or_(
                    plan.c.closest.is_(None),
                    plan.c.closest >= counts.c.last,
                    plan.c.closest == sa.func.any(counts.c.distances),
                ),
            ]
        criteria.append(counts.c.seen >= whole)
        head = sa.null() if plan is None else counts.c.head
        columns: list[Any] = [
            sa.func.coalesce(sa.and_(*criteria), sa.false()).label("accepted"),
            counts.c.passed,
            head.label("head"),
            counts.c.spread,
        ]
        if plan is not None and self.second is not None:
            columns.append(sa.and_(plan.c.by_index, plan.c.many).label("worth"))
        judged = sa.select(*columns).select_from(source).subquery("nearest_judgement")
        columns = [judged.c[name] for name in ("accepted", "passed", "head", "spread")]
        columns.append(settings_back(self.index, look).label("back"))
        if self.second is not None:
            columns.append(self._further(judged).label("further"))
        return self._part("judged_near", sa.select(*columns))

    def _further(self, judged: Any) -> sa.ColumnElement[bool]:
        """Whether the second look is worth its cost."""
        later: Any = judged.c.passed < self._asked("needed") if self.shape.deep else sa.false()
        if self.plan is None:
            return sa.and_(judged.c.accepted, later)
        spread = sa.func.coalesce(judged.c.spread, sa.true())
        return sa.case((judged.c.accepted, later), else_=sa.and_(judged.c.worth, spread))

    def _judged_far(self, look: Look) -> sa.CTE:
        """Whether its rows may follow those of the first look, or stand for them."""
        # As many as are wanted among the nearer half.
        half = sa.case((self.found["far"].c[PLACE] <= number(look.most // 2), 1))
        counts = self._counted("far", half=sa.func.count(half))
        enough = sa.or_(self._accepted("near"), counts.c.half >= number(self.shape.size))
        whole = sa.and_(counts.c.spread, counts.c.seen >= number(self.whole(look)), enough)
        accepted = sa.func.coalesce(whole, sa.false()).label("accepted")
        back = settings_back(self.index, look).label("back")
        return self._part("judged_far", sa.select(accepted, counts.c.passed, back))

    # -- the page

    def _compared(self, criteria: list[Any], limit: Any) -> sa.Select[Any]:
        """All rows that pass, compared; adding zero keeps the index from serving the order."""
        rows: Any = self.row
        column = self.target.row_column(self.row)
        if self.shape.filtered:
            rows, column = self.within, self.within.c[VECTOR]
        distance = (self.target.distance(column, self.vector) + number(0)).label(DISTANCE)
        keys = [key.label(n) for key, n in zip(self._keys(rows), self.names, strict=True)]
        criteria = [*criteria, *self._present(rows, column), *self._others(rows)]
        if self.shape.deep:
            for name in self.found if self.second is not None else ("near",):
                known = sa.not_(self._accepted(name))
                criteria.append(sa.or_(known, self._not_among(name, rows)))
        if not self.shape.known:
            criteria.append(self.vector.is_not(None))
        return sa.select(*keys, distance).where(*criteria).order_by(distance, *keys).limit(limit)

    def _exact(self) -> sa.Select[Any]:
        """The same where what the looks have found is too little."""
        limit: Any = number(self.shape.size + self.target.margin)
        looks = [self.near] if self.second is None else [self.near, self.far]
        if self.shape.deep:
            limit = self._asked("needed") + number(self.target.margin)
            found: Any = number(0)
            for judged in looks:
                found = found + sa.case((judged.c.accepted, judged.c.passed), else_=number(0))
            # What the looks have found is proven already.
            short: Any = found < self._asked("needed")
        else:
            short = sa.not_(sa.or_(*(judged.c.accepted for judged in looks)))
        source: Any = looks[0] if len(looks) == 1 else sa.join(self.near, self.far, sa.true())
        asked = sa.select(short).select_from(source).scalar_subquery()
        compared = self._compared([asked], limit).subquery("nearest_exact")
        # The distance to a vector of zeros is not a number under cosine: such a row is not similar.
        # It comes last.
        columns = [*compared.c, *([number(EXACT).label(WAY)] if self.shape.deep else [])]
        exact = sa.select(*columns).where(compared.c[DISTANCE] != NAN)
        # By joins a row may come with several partners. Then fewer rows than wanted have as many.
        return exact.distinct() if self.shape.joined else exact

    def _taken(self) -> sa.ColumnElement[bool]:
        """That a row is one of the nearest by the index, or where that is no answer, of all."""
        (key,), (name,) = self.target.key, self.names
        type_ = sa.ARRAY(key.type)
        for look in ("near",) if self.second is None else ("near", "far"):
            found = self.found[look]
            rows = sa.select(*(found.c[n] for n in (name, DISTANCE, *self.carried)))
            if self.plain:
                accepted = sa.select(self._plain_verdict()[0]).select_from(found).scalar_subquery()
            else:
                rows, accepted = rows.where(found.c[PASSES]), self._accepted(look)
            rows = rows.order_by(found.c[DISTANCE], found.c[name])
            best = self._proven(rows.limit(number(self.first.most))).subquery("nearest_best")
            keys = sa.select(sa.func.array_agg(best.c[name], type_=type_)).where(accepted)
            full = sa.func.count() >= number(self.shape.size)
            self.best[look] = keys.having(full).scalar_subquery()
        rows = self._compared([], number(self.shape.size + self.target.margin))
        exact = self._proven(rows).subquery("nearest_best")
        compared = sa.func.array(sa.select(exact.c[name]).scalar_subquery(), type_=type_)
        page = sa.func.coalesce(*self.best.values(), compared)
        return key == sa.any_(page)  # type: ignore[no-any-return]

    def _proven(self, rows: sa.Select[Any]) -> sa.Select[Any]:
        """The nearest of some rows that are proven; one is asked after the other, since it hashes.

        The distance to a vector of zeros is not a number under cosine: such a row is not similar.
        """
        given = rows.subquery("nearest_given")
        (row_key,), (name,) = self._keys(self.row), self.names
        proven: list[Any] = [given.c[DISTANCE] != NAN]
        if VECTOR in given.c:
            own: dict[Any, Any] = {column: given.c[n] for n, column in self.carried.items()}
            traverse: Any = visitors.replacement_traverse
            proven += [traverse(one, {}, lambda e, **_: own.get(e)) for one in self.proof]
        elif self.proof:
            proof = sa.select(*self.proof).where(row_key == given.c[name])
            proven.append(proof.correlate(given).scalar_subquery())
        chosen = sa.select(given.c[name], given.c[DISTANCE]).where(*proven)
        chosen = chosen.order_by(given.c[DISTANCE], given.c[name])
        return chosen.limit(number(self.shape.size))

    def _plain_verdict(self) -> list[sa.ColumnElement[Any]]:
        full = sa.func.count() >= number(max(self.whole(self.first), self.shape.size))
        distance = self.found["near"].c[DISTANCE]
        spread = _spread(distance, distance)
        # First, since what follows a false part may not be asked for.
        back = settings_back(self.index, self.first).is_not(None)
        return [sa.and_(back, full, spread).label("accepted"), spread.label("spread")]

    def _accepted(self, name: str) -> sa.ScalarSelect[Any]:
        judged = self.near if name == "near" else self.far
        return sa.select(judged.c.accepted).scalar_subquery()

    def _page(self) -> sa.Select[Any]:
        arms = []
        for name, way in (("near", NEAR), ("far", FAR)):
            if name == "far" and self.second is None:
                continue
            found = self.found[name]
            columns = [*self._keys(found), found.c[DISTANCE]]
            arm = sa.select(*columns, *([number(way).label(WAY)] if self.shape.deep else []))
            arm = arm.where(self._accepted(name))
            arms.append(arm.where(found.c[PASSES]))
        rows = sa.union_all(*arms, self._exact()).subquery("nearest_ranked")
        page = sa.select(*rows.c)
        if self.shape.bounded:
            page = page.where(rows.c[DISTANCE] <= self._asked("furthest"))
        order = [rows.c[DISTANCE], *self._keys(rows)]
        return page.order_by(*([rows.c[WAY]] if self.shape.deep else []), *order)

    def _verdict(self) -> sa.Select[Any]:
        found = self.found["near"]
        source: Any = None if self.plain else self.near
        if self.plain:
            counted = [sa.func.count().label("passed"), sa.null().label("head")]
            counts = sa.select(*self._plain_verdict(), *counted).select_from(found)
            source = counts.subquery("nearest_counts")
        columns = [source.c[name] for name in ("accepted", "passed", "head", "spread")]
        seen: Any = sa.func.count() if self.plain else sa.func.max(found.c[SEEN])
        seen = sa.select(sa.func.coalesce(seen, number(0))).select_from(found)
        seen = seen.scalar_subquery().label("seen")
        far = sa.false() if self.second is None else self._answers("far")
        columns += [seen, self._answers("near").label("taken"), far.label("far")]
        if self.plan is not None:
            columns += [*self.plan.c]
            source = sa.join(source, self.plan, sa.true())
        return sa.select(*columns).select_from(source)

    def _answers(self, look: str) -> sa.ColumnElement[bool]:
        """Whether the rows of a look are the answer."""
        best = self.best.get(look)
        return self._accepted(look) if best is None else best.is_not(None)


def among(key: list[Any]) -> sa.ColumnElement[bool]:
    """That a row, by its key, is one of the caller's."""
    within = named("nearest_within", *key_names(KEY, len(key)))
    same = [a == b for a, b in zip(within.c, key, strict=True)]
    return sa.exists(sa.literal_column("1")).select_from(within).where(*same)


def compared_page(target: Target, bounded: bool) -> sa.Select[Any]:
    """The page of a search without an index, of rows and query known by name."""
    names = key_names(KEY, len(target.key))
    query = named("nearest_query", "vector", "needed", "furthest")
    within = named("nearest_within", *names, VECTOR)
    vector = sa.select(query.c.vector).scalar_subquery()
    distance = (target.distance(within.c[VECTOR], vector) + number(0)).label(DISTANCE)
    # What only the server knows may be no vector, and nothing is near to that.
    page = sa.select(*(within.c[name] for name in names), distance).where(vector.is_not(None))
    if bounded:
        page = page.where(distance.element <= sa.select(query.c.furthest).scalar_subquery())
    needed = sa.select(query.c.needed + number(target.margin)).scalar_subquery()
    page = page.order_by(distance, *(within.c[name] for name in names)).limit(needed)
    # A vector of zeros is not similar under cosine: its distance, no number, comes last.
    rows = page.subquery("nearest_compared")
    return sa.select(*rows.c).where(rows.c[DISTANCE] != NAN)
