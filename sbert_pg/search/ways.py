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
from sqlalchemy.dialects import postgresql
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
#: Times the mean distance of the nearest rows of a look that the last of them has to be away: of a
#: look without a filter, of one under a filter, whose answer is part of it, and of one that keeps
#: many candidates. Where it is less, these are nearly equally far, as where nothing is like the
#: query, and an index is likely to miss some. Of distances that spread as a power law it is one
#: more than the inverse of the power, the local dimension (Amsaleg et al. 2015,
#: doi 10.1145/2783258.2783405). Under cosine, whose distances are squares; of others its root.
APART, APART_PASSING, APART_FAR = 1.05, 1.065, 1.025
#: Spread of distances below which all rows are taken for one island.
ISLAND = 1e-6

# Names in the statement. Criteria given as text may name columns without their table, so these are
# none that a table has.
KEY, SELF, VECTOR = "nearest_key", "nearest_self", "nearest_vector"
COMPANION = "nearest_companion"
DISTANCE, PASSES, WAY = "nearest_distance", "nearest_passes", "nearest_way"
# Of all rows that a quantised index gave, those that are not taken too: how many, and the largest
# distance.
SEEN, LAST = "nearest_seen", "nearest_last"
# Place of a row in the order of a quantised index, which is coarser than that by distance.
DEPTH = "nearest_depth"
EXACT = 3
#: What is known of a search after each look, and of the next: whether there is to be one, and of
#: how many rows.
STATE: dict[str, Any] = {
    **dict.fromkeys(("look", "looked", "passed", "head", "seen"), sa.Integer()),
    **dict.fromkeys(("share", "closest"), sa.Float()),
    **dict.fromkeys(("further", "accepted", "spread", "many"), sa.Boolean()),
}
#: The same where each look takes the same number of rows, of which all pass.
PLAIN = {name: STATE[name] for name in ("look", "seen", "further", "accepted", "spread")}


def of_look(name: str) -> Any:
    """A column of ``nearest_looks`` where a look is taken, which has that row around it."""
    return sa.literal_column(f"nearest_looks.{name}", STATE.get(name))


#: That it is the second look.
AGAIN: Any = of_look("look") == number(1)


def key_names(prefix: str, count: int) -> list[str]:
    """Names of key columns in the statement."""
    return [f"{prefix}_{n}" for n in range(count)]


def named(name: str, *columns: str, **typed: Any) -> sa.TableClause:
    """A part of the statement that is made elsewhere, by its name; types matter for ``PASSES``
    alone.
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

    Where there are pages or filters, ``nearest_looks`` has a row for each look that was taken, and
    one before them that says what the first is to be. It is recursive: what the planner does for a
    look it does once for both.

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
        column = target.row_column(self.row)
        self.proof = [] if self.partial else target.proven(column, ASKED)
        self.vector, self.furthest = self._asked("vector"), self._asked("furthest")
        #: Neither pages nor filters: what a look gives is the answer as it is, or none.
        exact = self.second is None or not self.index.quantized
        self.plain = shape.keyed and not shape.filtered and exact
        #: No filter: each page has to begin with the very rows of the plain one.
        self.same = not shape.filtered and not self.index.quantized
        #: Whether what the index gives is in an order of its own, whose depth says something.
        self.coarse = self.index.quantized and not self.plain
        #: What the proof is asked of, where it is asked of a look's rows later.
        companion: dict[str, Any] = {VECTOR: column, COMPANION: companion_of(column)}
        self.carried = companion if self.proof and self.plain else {}
        columns = [*self.names, DISTANCE]
        columns += [] if self.plain else [PASSES]
        columns += [SEEN, LAST, DEPTH] if self.coarse else []
        types = {name: column.type for name, column in self.carried.items()}
        #: The rows of the look that is being taken, by name.
        self.near = named("nearest_near", *columns, **types)
        #: What a look hands on, each as an array.
        self.arrays = self.names if shape.keyed else [*self.names, DISTANCE]
        self.state = PLAIN if self.plain else STATE
        self.looks = named("nearest_looks", *self.arrays, **self.state)
        self.plan = self._plan() if self.tested else None
        self.rows = self._rows()
        self.begun, self.counted = self._begun(), [] if self.plain else self._counted()
        self.judged = self._judged_plainly() if self.plain else self._judged()
        self.stepped = self._stepped()
        self.taken = self._taken() if shape.keyed else None
        self.page = sa.select() if self.taken is not None else self._page()
        self.verdict = self._verdict()

    def parts(self, passes: Passes | None) -> list[sa.CTE]:
        """The parts that page and verdict know by name, in their order."""
        parts = []
        if self.plan is not None:
            assert passes is not None
            parts = [self._sample(passes(self.tried)), self.plan]
        if self.plain:
            near = self.rows.cte("nearest_near").prefix_with("MATERIALIZED")
            judged = sa.select(*self.judged).select_from(self.near).add_cte(near, nest_here=True)
        else:
            counts = sa.select(*self.counted).select_from(self._look(passes))
            judged = sa.select(*self.judged).select_from(counts.subquery("nearest_counts"))
        step = sa.join(self.looks, judged.lateral("nearest_judged"), sa.true())
        looks = sa.union_all(self.begun, self.stepped.select_from(step))
        return [*parts, looks.cte("nearest_looks", recursive=True)]

    # -- small pieces

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
            size = 2 if self.target.type.storage == "halfvec" else 4
            # How many times as many rows as of 384 dimensions a page of the table holds.
            packed = max(1, 1600 // (size * (self.target.type.dimensions or 384) + 60))
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
        plan = planned(sample, self.first, self.shape).cte("nearest_plan")
        return plan.prefix_with("MATERIALIZED")

    # -- looks at the index

    def _rows(self) -> sa.Select[Any]:
        """The rows that the index gives, nearest first."""
        vector = self._asked("vector")
        row: Any = self.within if self.partial else self.row
        column = row.c[VECTOR] if self.partial else self.target.row_column(row)
        keys = [key.label(n) for key, n in zip(self._keys(row), self.names, strict=True)]
        carried = [column.label(name) for name, column in self.carried.items()]
        order = self.target.index_distance(column, self.index, vector)
        coarse = [order.label(DEPTH)] if self.coarse else []
        # Those without a claim are asked for their proof; all pages judge by the same rows.
        present = [column.is_not(None)] if self.same else self._present(row, column)
        present += self._others(row)
        fetched = max(look.fetched for look in (self.first, self.second) if look is not None)
        return (
            sa.select(*keys, self.target.distance(column, vector).label(DISTANCE))
            .add_columns(*carried, *coarse)
            .where(self._set().is_not(None), *present)
            .order_by(order)
            .limit(number(fetched))
        )

    def _set(self) -> sa.ScalarSelect[Any]:
        """The settings of a look; made once, ahead of the scan, which reads them at its first row.

        Not at all where there is no vector to look for.
        """
        made = sa.select(settings(self.index, self.first, of_look("looked"), self.second, AGAIN))
        if not self.shape.known:
            made = made.where(self._asked("vector").is_not(None))
        return made.scalar_subquery()

    def _look(self, passes: Passes | None) -> sa.Subquery:
        """The nearer of these rows, and whether they pass."""
        row: Any = self.within if self.partial else self.row
        criteria: list[Any] = []
        if self.tested:
            assert passes is not None
            criteria.append(passes(row))
        if self.shape.deep and self.second is not None:
            criteria.append(self._not_among(row, [of_look(name) for name in self.names]))
        # The proof last, since it hashes.
        taken, passing = self._taken_of(row, sa.and_(sa.true(), *criteria, *self.proof))
        columns = [taken.c[c.name] for c in self.near.c if c.name != PASSES]
        # As a part of its own, so that it is asked once, and not once for each use of it.
        near = sa.select(*columns, passing.label(PASSES)).offset(number(0))
        return near.subquery("nearest_near")

    def _taken_of(self, row: Any, criterion: Any) -> tuple[Any, Any]:
        """The nearer rows with what a criterion needs, and the criterion about these.

        Within the look the planner would expect it to be asked of all rows that there are, and look
        up by one scan of the table which of these pass. It takes what is taken for a tenth.
        """
        labels = dict(zip(self._keys(row), self.names, strict=True))
        inner = visitors.iterate(criterion)
        used: set[Any] = {c for c in inner if isinstance(c, sa.ColumnClause) and c.table is row}
        labels |= {c: f"nearest_own_{n}" for n, c in enumerate(sorted(used - {*labels}, key=str))}
        more = [c.label(name) for c, name in labels.items() if name not in self.names]
        given = self._fetched(self.rows.add_columns(*more)).subquery("nearest_rows")
        columns: list[Any] = [column for column in given.c if column.name != DEPTH]
        if self.coarse:
            columns.append(sa.func.count().over().label(SEEN))
            columns.append(sa.func.max(given.c[DISTANCE]).over().label(LAST))
            depth = sa.func.row_number().over(order_by=given.c[DEPTH])
            columns.append(depth.label(DEPTH))
        nearer = sa.select(*columns).order_by(given.c[DISTANCE], *self._keys(given))
        taken = nearer.limit(of_look("looked")).subquery("nearest_taken")

        def replace(element: Any, **_: Any) -> Any:
            # A part is another one where it is copied, and would be written once more.
            if isinstance(element, sa.CTE):
                return element
            return taken.c[labels[element]] if element in labels else None

        traverse: Any = visitors.replacement_traverse
        return taken, traverse(criterion, {}, replace)

    def _fetched(self, rows: sa.Select[Any]) -> sa.Select[Any]:
        """As many rows as a look asks the index for, where it would give more.

        Its scan goes on by itself, or pages begin with what a plain look takes: of rows that are
        equally far the index decides which these are.
        """
        behind = self.same and self.shape.deep
        if self.second is None or not (behind or self.first.fetched > MAX_EF_SEARCH):
            return rows
        all_ = rows.subquery("nearest_fetched")
        more = sa.and_(AGAIN, of_look("accepted")) if behind else AGAIN
        most = sa.case((more, number(self.second.fetched)), else_=number(self.first.fetched))
        return sa.select(*all_.c).limit(most)

    def _not_among(self, rows: Any, found: list[Any]) -> sa.ColumnElement[bool]:
        """That a row is not one that an earlier look has found.

        Not as ``NOT EXISTS``, whose cost the planner takes for a scan of the look for each row,
        beside which no other choice in the statement matters to it.
        """
        key = self._keys(rows)
        known: Any = key[0] if len(key) == 1 else sa.tuple_(*key)
        return known.not_in(sa.select(*self._unnested(found).c))  # type: ignore[no-any-return]

    def _unnested(self, arrays: list[Any]) -> Any:
        """Arrays that belong together as rows."""
        columns = [sa.column(c.name, c.type) for c, _ in zip(self.near.c, arrays, strict=False)]
        return sa.func.unnest(*arrays).table_valued(*columns).render_derived("nearest_found")

    # -- one look after the other, and whether what it has found is an answer

    def _begun(self) -> sa.Select[Any]:
        """What the first look is to be: the row before those of the looks."""
        values: dict[str, Any] = dict.fromkeys(STATE, number(0))
        values |= dict.fromkeys(("accepted", "spread", "many"), sa.false())
        if self.plan is None:
            values |= {"looked": number(self.first.least), "further": sa.true()}
        else:
            values |= {name: self.plan.c[name] for name in ("looked", "share", "closest", "many")}
            values["further"] = self.plan.c.by_index
        columns = [values[name].label(name) for name in self.state]
        # Arrays of nothing, of the very types and collations; never asked for.
        for column, name in zip(self.target.row_key, self.names, strict=True):
            key = sa.select(self.row.c[column.key]).scalar_subquery()
            array = sa.func.array(key, type_=sa.ARRAY(column.type))
            columns.append(sa.case((sa.false(), array)).label(name))
        if DISTANCE in self.arrays:
            columns.append(sa.cast(sa.null(), sa.ARRAY(sa.Float(53))).label(DISTANCE))
        begun = sa.select(*columns)
        return begun if self.plan is None else begun.select_from(self.plan)

    def _counted(self) -> list[Any]:
        """What is asked of the rows of a look, by their names alone."""
        near: dict[str, Any] = {column.name: sa.column(column.name, column.type)
                                for column in self.near.c}  # fmt: skip
        order = [near[name] for name in (DISTANCE, *self.names)]

        def in_order(value: Any) -> Any:
            return sa.func.array_agg(postgresql.aggregate_order_by(value, *order))

        places = in_order(near[PASSES])
        places = sa.func.array_positions(places, sa.true(), type_=sa.ARRAY(sa.Integer()))
        seen = sa.func.max(near[SEEN]) if self.coarse else sa.func.count()
        spread = _spread(near[DISTANCE], near.get(LAST, near[DISTANCE]))
        names = self.arrays if self.plan is None else [*self.names, DISTANCE]
        names = [*names, DEPTH] if self.coarse else names
        return [
            sa.cast(seen, sa.Integer()).label("seen"),
            spread.label("spread"),
            in_order(near[DISTANCE]).label("distances"),
            places.label("places"),
            *(in_order(near[name]).filter(near[PASSES]).label(name) for name in names),
        ]

    def _apart(self, last: Any, mean: Any) -> list[sa.ColumnElement[bool]]:
        """That the nearest rows of a look are not nearly equally far, which no inner product says.

        Not asked where the caller says how many candidates or lists there are to be.
        """
        metric, index, shape = self.target.metric.similarity, self.index, self.shape
        measured = index.method in ("hnsw", "ivfflat") and not index.quantized
        if not measured or metric == "dot" or (shape.ef_search, shape.probes) != (None, None):
            return []
        root = 1 if metric == "cosine" else 0.5
        near = APART_PASSING if self.shape.filtered else APART
        if (self.first.ef_search or 0) >= MAX_EF_SEARCH // 2:
            near = APART_FAR
        first, far = number(near**root), number(APART_FAR**root)
        return [last >= sa.case((AGAIN, far), else_=first) * mean]

    def _judged(self) -> list[Any]:
        """Whether these rows are an answer, and their keys."""
        counts: dict[str, Any] = {c.name: sa.column(c.name, c.type) for c in self.counted}
        # First, since what follows a false part may not be asked for.
        back = settings_back(self.index, self.first).is_not(None)
        accepted = sa.func.coalesce(sa.and_(back, *self._criteria(counts)), sa.false())
        return [
            accepted.label("accepted"),
            _passed(counts).label("passed"),
            counts["places"][number(1)].label("head"),
            counts["spread"],
            counts["seen"],
            *(counts[name] for name in self.arrays),
        ]

    def _judged_plainly(self) -> list[Any]:
        """The same where there is nothing but the nearest rows."""
        distance, size = self.near.c[DISTANCE], self.shape.size
        seen, spread = sa.func.count(), _spread(distance, distance)
        # First, since what follows a false part may not be asked for.
        back = settings_back(self.index, self.first).is_not(None)
        apart = self._apart(sa.func.max(distance), sa.func.avg(distance))
        accepted = sa.and_(back, seen >= number(max(self.whole(self.first), size)), spread, *apart)
        (name,) = self.names
        rows = sa.select(*(self.near.c[n] for n in (name, DISTANCE, *self.carried)))
        if self.carried:
            rows = rows.order_by(distance, self.near.c[name]).limit(number(self.first.most))
        best = self._proven(rows).subquery("nearest_best")
        keys = sa.func.array(sa.select(best.c[name]).scalar_subquery())
        return [
            sa.func.coalesce(accepted, sa.false()).label("accepted"),
            spread.label("spread"),
            sa.cast(seen, sa.Integer()).label("seen"),
            keys.label(name),
        ]

    def _stepped(self) -> sa.Select[Any]:
        """A row for each look that is to be taken, which says what the next is to be."""
        looks: dict[str, Any] = {c.name: c for c in self.looks.c}
        judged: dict[str, Any] = {
            column.name: sa.literal_column(f"nearest_judged.{column.name}", column.type)
            for column in self.judged
        }
        look = looks["look"]
        values = {**looks, **judged, "look": look + number(1), "further": self._further(judged)}
        values["looked"] = number((self.second or self.first).least)
        if self.same and self.shape.deep:
            # A second look that replaces the first takes what that of a plain search does.
            least = number(self.first.least)
            values["looked"] = sa.case((judged["accepted"], values["looked"]), else_=least)
        columns = [values[name].label(name) for name in self.state]
        columns += [sa.case((judged["accepted"], judged[n])).label(n) for n in self.arrays]
        # There are two at most, and the planner expects one where it is said as a range.
        few = look.between(number(0), number(1))
        return sa.select(*columns).where(looks["further"], few)

    def _further(self, judged: dict[str, Any]) -> sa.ColumnElement[bool]:
        """Whether the second look is worth its cost."""
        if self.second is None:
            return sa.false()
        later: Any = judged["passed"] < self._asked("needed") if self.shape.deep else sa.false()
        worth: Any = sa.true() if self.plan is None else self.looks.c.many
        worth = sa.and_(worth, sa.func.coalesce(judged["spread"], sa.true()))
        wanted = sa.case((judged["accepted"], later), else_=worth)
        return sa.and_(self.looks.c.look == number(0), wanted)

    def _criteria(self, counts: dict[str, Any]) -> list[sa.ColumnElement[bool]]:
        """What has to hold of the rows of a look."""
        size, looked = number(self.shape.size), of_look("looked")
        passed = _passed(counts)
        whole: Any = number(self.whole(self.first)) if self.index.quantized else looked
        near: list[Any] = [passed >= size]
        if self.plan is not None:
            closest = of_look("closest")
            near += [
                counts["places"][number(1)] <= number(HEAD) * looked,
                passed >= number(LOCAL) * of_look("share") * looked,
                # No row of the sample is nearer that the index has not found.
                sa.or_(
                    closest.is_(None),
                    closest >= counts[DISTANCE][passed],
                    closest == sa.any_(counts[DISTANCE]),
                ),
            ]
        nearest = sa.literal_column(f"distances[1:{self.first.least:d}]", sa.ARRAY(sa.Float()))
        mean = sa.func.avg(sa.func.unnest(nearest).column_valued("nearest_some"))
        last = counts["distances"][number(self.first.least)]
        apart = self._apart(last, sa.select(mean).scalar_subquery())
        deep = self._deep_enough()
        if self.second is None:
            return [counts["spread"], counts["seen"] >= whole, *near, *apart, *deep]
        if self.index.quantized:
            whole = sa.case((AGAIN, number(self.whole(self.second))), else_=whole)
        # As many as are wanted among the nearer half.
        half = counts["places"][size] <= number(self.second.most // 2)
        far = sa.or_(of_look("accepted"), half)
        return [
            counts["spread"],
            counts["seen"] >= whole,
            sa.case((AGAIN, far), else_=sa.and_(*near)),
            *(sa.or_(of_look("accepted"), one) for one in apart),
            *deep,
        ]

    def _deep_enough(self) -> list[sa.ColumnElement[bool]]:
        """That the nearest of what a quantised index gave come early in its order.

        Where they come late, others are likely behind its end. Of few rows even a quarter is no
        safe sign. Not asked where the caller says how many rows there are to be.
        """
        if not self.coarse or self.shape.overfetch is not None:
            return []
        first, *second = (
            number(look.fetched // (2 if look.fetched >= MAX_EF_SEARCH else 4))
            for look in (self.first, self.second)
            if look is not None
        )
        early = sa.case((AGAIN, second[0]), else_=first) if second else first
        nearest: Any = sa.literal_column(f"{DEPTH}[1:{self.shape.size:d}]", sa.ARRAY(sa.Float()))
        return [early >= sa.all_(nearest)]

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
            known: Any = self._keys(rows)
            known = known[0] if len(known) == 1 else sa.tuple_(*known)
            criteria.append(known.not_in(self._found(*self.names)))
        if not self.shape.known:
            criteria.append(self.vector.is_not(None))
        return sa.select(*keys, distance).where(*criteria).order_by(distance, *keys).limit(limit)

    def _found(self, *names: str) -> sa.Select[Any]:
        """The rows of the looks that are an answer, whose arrays the others do not have."""
        rows = self._unnested([self.looks.c[n] for n in names])
        found = sa.select(*rows.c)
        return found.select_from(self.looks).join(rows, sa.true())

    def _exact(self) -> sa.Select[Any]:
        """The same where what the looks have found is too little."""
        limit: Any = number(self.shape.size + self.target.margin)
        looks = self.looks
        if self.shape.deep:
            limit = self._asked("needed") + number(self.target.margin)
            # What the looks have found is proven already.
            found = sa.func.coalesce(
                sa.func.sum(looks.c.passed).filter(looks.c.accepted), number(0)
            )
            short: Any = found < self._asked("needed")
        else:
            short = sa.not_(sa.func.bool_or(looks.c.accepted))
        asked = sa.select(short).select_from(looks).scalar_subquery()
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
        size = number(self.shape.size)
        looks = self.looks
        full = sa.func.cardinality(looks.c[name]) >= size
        best = sa.select(sa.type_coerce(looks.c[name], type_)).where(full).scalar_subquery()
        rows = self._compared([], number(self.shape.size + self.target.margin))
        exact = self._proven(rows).subquery("nearest_best")
        compared = sa.func.array(sa.select(exact.c[name]).scalar_subquery(), type_=type_)
        page = sa.func.coalesce(best, compared)
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

    def _page(self) -> sa.Select[Any]:
        way = [WAY] if self.shape.deep else []
        found = self._found(*self.names, DISTANCE)
        if way:
            found = found.add_columns(self.looks.c.look.label(WAY))
        rows = sa.union_all(found, self._exact()).subquery("nearest_ranked")
        page = sa.select(*rows.c)
        if self.shape.bounded:
            page = page.where(rows.c[DISTANCE] <= self._asked("furthest"))
        order = [rows.c[DISTANCE], *self._keys(rows)]
        return page.order_by(*(rows.c[name] for name in way), *order)

    def _verdict(self) -> sa.Select[Any]:
        near, far = self.looks.alias("nearest_first"), self.looks.alias("nearest_second")
        columns: list[Any] = [near.c[name] for name in ("accepted", "spread", "seen")]
        if self.plain:
            columns += [near.c.seen.label("passed")]
        else:
            columns += [near.c.passed, near.c.head]
        for look, name in ((near, "taken"), (far, "far")):
            full: Any = look.c.accepted
            if self.shape.keyed:
                full = sa.func.cardinality(look.c[self.names[0]]) >= number(self.shape.size)
            columns.append(sa.func.coalesce(full, sa.false()).label(name))
        source: Any = self.plan
        if source is None:
            source = sa.select(number(1)).subquery("nearest_one")
        else:
            columns += source.c
        source = source.outerjoin(near, near.c.look == number(1))
        return sa.select(*columns).select_from(source.outerjoin(far, far.c.look == number(2)))


def _passed(counts: dict[str, Any]) -> sa.ColumnElement[int]:
    """How many rows of a look pass."""
    return sa.func.coalesce(sa.func.cardinality(counts["places"]), number(0))


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
