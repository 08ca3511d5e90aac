"""How many rows a look at an index takes, what that costs, and the settings that it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from sbert_pg.types.indexed import PROBED_FAR, VectorIndex

MAX_EF_SEARCH = 1000
#: Candidates that HNSW keeps for a search without a filter. With pgvector's default of 40 recall@10
#: on real sentence embeddings is a point or two lower; docs/search-figures.md has the curve.
DEFAULT_EF_SEARCH = 100
#: Rows fetched by a quantised index for each row wanted, before the exact rerank.
DEFAULT_OVERFETCH = 40
#: The same for later pages, whose rows are many and near each other's distances.
OVERFETCH_FAR = 10
#: Rows that a quantised index is asked for at most; beyond ``MAX_EF_SEARCH`` it scans iteratively.
MAX_OVERFETCHED = 4000
#: Rows that it is asked for by a second look.
OVERFETCHED_FAR = 2000
#: Rows taken at least without a filter, the nearer half of the candidates. That there are fewer is
#: the sign of deleted rows among them, and that all are equal that of an island.
LEAST = 50
#: What one candidate of HNSW costs, in rows compared exactly.
CANDIDATE_COST = 15
#: What reading a row to see whether it passes costs, in rows compared. Where an index finds those
#: that pass, reading one costs as much as comparing it, but not more than reading the table.
SCAN_COST = 0.2
#: Times the cost of a look that comparing has to cost for the look to be worth its risk.
WORTH = 1.5
#: The same of a look that is wide enough only where more rows pass near the query than elsewhere.
PROBE = 4
#: Rows compared that cost more than a second look, which may be in vain.
MANY = 30_000
#: Lists that IVFFlat looks into, as a power of their number: 8 of 10, 51 of 100, 355 of 1,000. On
#: real texts recall@10 is .98 with these (10 to 700 lists), and .90 to .93 with the square root.
PROBED = 0.85
#: Numbers of rows that a search by index is prepared for; beyond, every row is compared.
SIZES = (10, 25, 50, 100, 250, 500, 1000)


def number(value: float) -> sa.ColumnElement[Any]:
    """A number that never varies, as part of the text, where the planner sees it."""
    return sa.literal_column(f"{value:d}" if isinstance(value, int) else f"{value:g}", sa.Float())


@dataclass(frozen=True, slots=True)
class Shape:
    """What the text of a search depends on, besides the column.

    Attributes:
        size: largest number of rows wanted that it serves, one of ``SIZES``.
        keyed: whether it is a first page of rows that one column tells apart.
        deep: whether the page may lie behind the rows of the first look.
        joined: whether a row may occur more than once among the caller's rows.
        known: whether there is one query, a vector or a text, and no expression: that may be
            ``NULL``, and of each of several the settings are made again.
    """

    size: int
    keyed: bool = False
    deep: bool = False
    filtered: bool = False
    joined: bool = False
    indexed: bool = False
    itself: bool = False
    bounded: bool = False
    known: bool = False
    ef_search: int | None = None
    overfetch: int | None = None
    probes: int | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """One look at an index: rows taken at least and at most, and asked of the index.

    Without ``ef_search`` HNSW keeps ``OF_PASSING`` for each row taken, or more.
    """

    least: int
    most: int
    fetched: int
    ef_search: int | None = None
    probes: int | None = None
    lists: int | None = None

    def cost(self, looked: Any, rows: Any) -> Any:
        """What it costs, in rows compared exactly, of a table of so many rows."""
        if self.probes is not None:
            part = self.probes / max(self.lists or 1, self.probes)
            return rows * sa.literal_column(f"{part:g}", sa.Float())
        if self.ef_search is not None:
            return sa.literal_column(f"{CANDIDATE_COST * self.ef_search:d}", sa.Float())
        return looked * sa.literal_column(f"{CANDIDATE_COST * OF_PASSING:g}", sa.Float())


#: Candidates for each row taken: the last of those that HNSW keeps are less well chosen.
CANDIDATES = 2
#: The same where twice as many rows are taken as have the wanted ones among them: these are then
#: the nearer third of what is kept. No fewer in all than without a filter.
OF_PASSING = 1.5


def size_for(limit: int, quantized: bool, filtered: bool) -> int | None:
    """The size that serves a limit, or ``None`` where every row is to be compared."""
    size: int | None = next((size for size in SIZES if limit <= size), None)
    if size is None or (filtered and size > (25 if quantized else 250)):
        return None
    return size


def near_look(index: VectorIndex, shape: Shape) -> Look:
    """The first look; without a filter, what a plain search by the index would be."""
    size = shape.size
    probes = _probes(index, shape)
    if index.quantized:
        fetched = min(MAX_OVERFETCHED, (shape.overfetch or DEFAULT_OVERFETCH) * size)
        taken = size
        if shape.filtered:
            taken, fetched = max(100, 2 * size), max(MAX_EF_SEARCH, fetched)
        kept = shape.ef_search or min(MAX_EF_SEARCH, max(DEFAULT_EF_SEARCH, fetched))
        return Look(taken, taken, fetched, kept, probes, index.lists)
    unknown = shape.filtered and not index.partial
    least = max(LEAST, CANDIDATES * size if unknown else size)
    most = MAX_EF_SEARCH // CANDIDATES if unknown else least
    ef_search: int | None = shape.ef_search
    if ef_search is not None:
        least = most = min(most, max(size, ef_search // CANDIDATES))
    elif not unknown:
        ef_search = min(MAX_EF_SEARCH, max(DEFAULT_EF_SEARCH, CANDIDATES * least))
    return Look(least, most, most, ef_search, probes, index.lists)


def far_look(index: VectorIndex, shape: Shape) -> Look | None:
    """The second look, which sees further: for what the first has not answered, and later pages.

    None with IVFFlat, which would look into half of the lists: comparing costs hardly more, and
    misses nothing. The same for each page of a search, so that they follow each other.
    """
    if index.method != "hnsw" or shape.size > 100 or index.partial:
        return None
    if index.quantized:
        # A search that asks for more at first has as many as there may be.
        more = near_look(index, shape).fetched >= OVERFETCHED_FAR
        fetched = MAX_OVERFETCHED if more else OVERFETCHED_FAR
        rows = max(shape.size, fetched // OVERFETCH_FAR)
        return Look(rows, rows, fetched, MAX_EF_SEARCH)
    rows = MAX_EF_SEARCH // CANDIDATES
    if not (shape.filtered or shape.deep):
        # What is no page behind it takes no more rows than the first, by the same scan.
        rows = near_look(index, shape).least
    return Look(rows, rows, rows, MAX_EF_SEARCH)


def _probes(index: VectorIndex, shape: Shape) -> int | None:
    """Lists to look into; the larger the index, the smaller a part of it."""
    if index.method == "vchordrq":
        return shape.probes or (index.probes[-1] if index.probes else None)
    if index.method != "ivfflat":
        return None
    # The same for each page of a search, so that they follow each other.
    power = PROBED_FAR if shape.filtered else PROBED
    return shape.probes or (math.ceil(index.lists**power) if index.lists else None)


def planned(sample: sa.FromClause, look: Look, shape: Shape) -> sa.Select[Any]:
    """What a sample says: the share that passes, rows to look at, whether the index is worth it."""
    share = sample.c.hits / sa.func.nullif(sample.c.tried, number(0), type_=sa.Float())
    rows = sample.c.tried * sample.c.times
    columns: list[Any] = [sample.c.closest, share.label("share"), rows.label("rows")]
    whole = sa.select(*columns).subquery("nearest_share")
    # As many rows as have twice the wanted ones among them; where those are too many, a probe.
    some = sa.func.nullif(whole.c.share, number(0), type_=sa.Float())
    enough = sa.func.floor(number(2 * shape.size) / some)
    clamped = sa.func.least(number(look.most), sa.func.greatest(number(look.least), enough))
    wide = enough <= number(1.2 * look.most)
    looked = sa.case((wide, clamped), else_=number(look.least))
    risk = sa.case((wide, number(WORTH)), else_=number(PROBE)).label("risk")
    passing: Any = whole.c.share * whole.c.rows
    read: Any = number(SCAN_COST) * whole.c.rows
    effort = passing if shape.indexed else passing + read
    reading = sa.func.least(passing, read) if shape.indexed else number(0)
    size = sa.cast(looked, sa.Integer).label("looked")
    columns = [*whole.c, effort.label("effort"), reading.label("reading"), size, risk]
    costs = sa.select(*columns).subquery("nearest_effort")
    effort, cost = costs.c.effort, look.cost(costs.c.looked, costs.c.rows)
    worth = effort + costs.c.reading > costs.c.risk * cost
    use = sa.func.coalesce(worth, sa.false()).label("by_index")
    many = (effort >= number(MANY)).label("many")
    return sa.select(costs.c.share, costs.c.closest, costs.c.looked, use, many)


def settings(
    index: VectorIndex, look: Look, looked: Any, second: Look | None = None, again: Any = None
) -> sa.ColumnElement[str]:
    """What makes the settings of a look, and of a second by the same scan, for this transaction."""
    values = _values(index, look, looked)
    later = {} if second is None else _values(index, second, looked)
    for name, value in later.items():
        # Where it is not said, as many candidates as rows ask for, of both.
        if isinstance(values[name], str) and values[name] != value:
            first: Any = sa.literal_column(values[name])
            values[name] = sa.case((again, sa.literal_column(value)), else_=first)
    return _made(index, values)


def settings_back(index: VectorIndex, look: Look) -> sa.ColumnElement[str]:
    """What sets them back behind a look, to what server, database, role or connection began with.

    The planner goes by them: where they stayed, the next search of the transaction would not be
    planned as the one before, and the pages of a search would not follow each other.
    """
    return _made(index, dict.fromkeys(_values(index, look, sa.null()), sa.null()))


def _made(index: VectorIndex, values: dict[str, Any]) -> sa.ColumnElement[str]:
    return sa.func.concat(
        *(
            sa.func.set_config(
                sa.literal_column(f"'{index.method}.{name}'"),
                sa.literal_column(value) if isinstance(value, str) else value,
                sa.true(),
                type_=sa.Text(),
            )
            for name, value in values.items()
        )
    )


def _values(index: VectorIndex, look: Look, looked: Any) -> dict[str, Any]:
    """Settings of an access method by their names: SQL as text, or expressions."""
    candidates: Any = f"'{look.ef_search}'"
    if look.ef_search is None:
        kept = sa.cast(sa.func.ceil(looked * sa.literal_column(f"{OF_PASSING:g}")), sa.Integer)
        least = sa.literal_column(f"{DEFAULT_EF_SEARCH:d}", sa.Integer())
        candidates = sa.cast(sa.func.greatest(least, kept, type_=sa.Integer()), sa.Text)
    if index.method == "diskann":
        # It continues by itself while rows are asked for; what is rescored comes in its true order.
        return {"query_search_list_size": candidates, "query_rescore": candidates}
    if index.method == "vchordrq":
        values = {"max_scan_tuples": "'-1'"}
        # Only where the caller says so: it counts for other indexes of the transaction as well, and
        # these refuse a number of levels that is not theirs.
        if look.probes is not None and (look.probes,) != index.probes[-1:]:
            values["probes"] = "'" + ",".join(map(str, (*index.probes[:-1], look.probes))) + "'"
        return values
    values = {"iterative_scan": "'relaxed_order'" if look.fetched > MAX_EF_SEARCH else "'off'"}
    if index.method == "hnsw":
        return {"ef_search": candidates, **values}
    return values if look.probes is None else {**values, "probes": f"'{look.probes}'"}
