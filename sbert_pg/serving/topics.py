"""The pages of topics and map: clusters, what became of them, and the rows of each by colour."""

from __future__ import annotations

import shlex
import sys
from array import array
from base64 import b64encode
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg.clustering import Clustering, drift, flows, mapped_rows, run_before
from sbert_pg.clustering.mapping import colours, hex_colour
from sbert_pg.clustering.tables import title_of
from sbert_pg.errors import DeclarationError
from sbert_pg.serving.comparing import cut, excerpt
from sbert_pg.serving.exposed import Exposed, Hit
from sbert_pg.serving.html import Html, h, table
from sbert_pg.serving.states import MEASURED_ROWS

#: Rows of a cluster, and flows between two runs, that are listed.
LISTED = 20
#: Values of a column that have a colour each; the ranges that more numbers or dates make.
VALUES, RANGES = 20, 8
_GREY = "#9ca3af"
#: Characters of a text by which it has its colour: whole texts of many rows take much memory.
TEXT = 80
#: What is in order, and is cut into ranges.
_ORDERED = (int, float, Decimal, date, time, timedelta)
Group = dict[str, Any]


def overview(connection: sa.Connection, exposed: Exposed, topics: Clustering) -> Iterator[Any]:
    """The current clusters, largest first, and how the run came about."""
    run = topics.require_current(connection)
    clusters = Session(connection).scalars(topics.clusters()).all()
    typical = _typical(connection, exposed, topics, clusters)
    largest = max((c.size for c in clusters), default=1)
    yield h(
        "p", f"{len(clusters)} clusters of {run.rows:,} rows by {run.algorithm}, "
        f"{run.outliers:,} outliers; run {run.id} of {run.started_at:%Y-%m-%d %H:%M}.",
    )  # fmt: skip
    yield [h("p", warning, class_="advice") for warning in run.warnings]
    small = (run.rows or 0) <= MEASURED_ROWS
    if small:
        yield from _fit(connection, exposed, topics)
    else:
        command = h("code", f"sbert-pg cluster assign {exposed.name} --check", class_="command")
        yield h("p", command, " says whether they still fit.", class_="faint")
    yield h("ol", [_topic(c, exposed, typical.get(c), largest)
                   for c in clusters], class_="topics")  # fmt: skip
    before = run_before(connection, topics, run.id)
    if before is not None and small:
        yield from _flows(connection, topics, before, run)


def _typical(
    connection: sa.Connection, exposed: Exposed, topics: Clustering, clusters: Sequence[Any]
) -> dict[Any, Hit]:
    """The typical row of each cluster, where it is still there."""
    exemplars = ((c, topics.exemplar_of(c)) for c in clusters)
    keys = {c: exposed.key_of(key) for c, key in exemplars if None not in key}
    rows = {hit.key: hit for hit in exposed.rows(connection, list(keys.values()))}
    return {c: rows[key] for c, key in keys.items() if key in rows}


def members(
    connection: sa.Connection, exposed: Exposed, topics: Clustering, number: int, name: str
) -> Iterator[Any]:
    """Rows of a cluster, nearest to its centroid first, and the command that gives it a name."""
    session = Session(connection)
    cluster = session.scalars(topics.clusters().where(topics.Cluster.number == number)).first()
    if cluster is None:
        yield h("p", f"There is no current cluster {number}.", class_="fault", role="alert")
        return
    mapper = sa.inspect(topics.entity)
    properties = [mapper.get_property_by_column(key).key for key in topics.keys]
    members = session.execute(topics.members(cluster).limit(LISTED)).all()
    keys = [exposed.key_of([getattr(row, each) for each in properties]) for row, _ in members]
    yield h("h2", title_of(cluster), dir="auto")
    yield h("p", f"{cluster.size:,} rows; the {len(keys)} nearest to their middle.",
            class_="faint")  # fmt: skip
    yield _renaming(exposed, number, name.strip())
    rows = exposed.rows(connection, keys)
    shown = ([cut(row.row[c]) if row.row[c] is not None else None for c in exposed.columns]
             for row in rows)  # fmt: skip
    yield table(exposed.columns, shown)


def _renaming(exposed: Exposed, number: int, name: str) -> Iterator[Html]:
    yield h(
        "form",
        h("input", type="hidden", name="table", value=exposed.name),
        h("input", type="hidden", name="number", value=number),
        h("input", name="name", value=name, required=True, placeholder="A name for this cluster",
          aria_label="Name", dir="auto"),
        h("button", "Rename"),
        class_="choice",
    )  # fmt: skip
    if name:
        words = [exposed.name, str(number), f"--label={name}"]
        copy = h("button", "Copy", type="button", class_="copy")
        yield h("p", "These pages only read. This command renames it: ", copy, class_="faint")
        yield h("pre", f"sbert-pg cluster show {shlex.join(words)}", dir="auto")


def no_topics(name: str) -> Html:
    """What stands in the place of clusters where there are none."""
    return h(
        "p", "There are no clusters of this table yet. ",
        h("code", f"sbert-pg cluster run {name} --create", class_="command"), " makes them, and ",
        h("code", f"sbert-pg cluster map {name}", class_="command"), " their map.",
    )  # fmt: skip


def _fit(connection: sa.Connection, exposed: Exposed, topics: Clustering) -> Iterator[Any]:
    """Whether the clusters still fit the rows; how it is measured is the clustering's affair."""
    measured = drift(connection, topics)
    yield h(
        "p",
        f"Since then {measured.later:,} rows were added and {measured.unassigned:,} have no place "
        f"yet; {measured.far_share:.1%} are far from their cluster.",
        id="drift",
    )
    if measured.is_stale:
        command = h("code", f"sbert-pg cluster run {exposed.name}", class_="command")
        reasons = "; ".join(measured.reasons)
        yield h("p", f"It is time to run again: {reasons}. ", command, class_="advice")
    elif measured.unassigned:
        command = h("code", f"sbert-pg cluster assign {exposed.name}", class_="command")
        yield h("p", command, " gives them one.", class_="faint")


def _topic(cluster: Any, exposed: Exposed, typical: Hit | None, largest: int) -> Html:
    link = f"/explore/topics?{urlencode({'table': exposed.name, 'number': cluster.number})}"
    return h(
        "li",
        h("a", title_of(cluster), href=link, dir="auto"),
        h("small", f" {cluster.size:,} rows", class_="faint"),
        h("meter", max=largest, value=cluster.size, aria_label="share of the largest"),
        h("p", " · ".join(cluster.keywords), class_="faint", dir="auto"),
        None if typical is None else h("p", excerpt(exposed, typical), dir="auto"),
    )


def _flows(
    connection: sa.Connection, topics: Clustering, before: int, run: sa.Row[Any]
) -> Iterator[Any]:
    """Where the rows of the run before are now, the largest streams first."""
    moved = flows(connection, topics, before, run.id)
    stayed = sum(flow.rows for flow in moved if _number(flow.earlier) == _number(flow.later))
    both = sum(flow.rows for flow in moved)
    yield h("h2", f"Since run {before}")
    yield h(
        "p",
        f"{stayed:,} of {both:,} rows are in the cluster of the same number or outliers as before; "
        # Rows that were assigned since are in both, and not counted by the run.
        f"{max(0, (run.rows or 0) - both):,} were not in that run.",
        id="flows",
    )
    streams = [flow for flow in moved if _number(flow.earlier) != _number(flow.later)]
    if streams:
        yield table(
            ("from", "to", "rows", "of the first"),
            ([_label(f.earlier), _label(f.later), f"{f.rows:,}", f"{f.share:.0%}"]
             for f in streams[:LISTED]),
        )  # fmt: skip


def _number(cluster: tuple[int, str] | None) -> int | None:
    return None if cluster is None else cluster[0]


def _label(cluster: tuple[int, str] | None) -> str:
    return "outliers" if cluster is None else f"{cluster[0]} {cluster[1]}"


def points(
    connection: sa.Connection, exposed: Exposed, topics: Clustering, by: str = ""
) -> dict[str, Any]:
    """A group for each colour, of the clusters or of a column's values: keys, and places in the
    unit square, as base64 of floats.
    """
    statement = mapped_rows(topics)
    if by:
        if by not in exposed.columns:
            raise DeclarationError(f"{exposed.name} has no column {by[:100]!r} to colour by.")
        table = exposed.embedding.table
        value: Any = table.c[by]
        if isinstance(value.type, sa.String) and not isinstance(value.type, sa.Enum):
            value = sa.func.left(value, TEXT)
        statement = statement.join(table, topics.row_is_assigned(table)).with_only_columns(
            value, *list(statement.selected_columns)[1:]
        )
    rows = connection.execute(statement).all()
    group_of = _values(row[0] for row in rows) if by else _clusters(connection, topics)
    groups: dict[int, tuple[Group, list[str], array[float], array[float]]] = {}
    for value, x, y, *key in rows:
        number, group = group_of(value)
        _, keys, xs, ys = groups.setdefault(number, (group, [], array("f"), array("f")))
        keys.append(exposed.key_of(key))
        xs.append(x)
        ys.append(y)
    run = topics.require_current(connection)
    return {
        "groups": [
            {**group, "keys": keys, "x": _floats(xs), "y": _floats(ys)}
            for _, (group, keys, xs, ys) in sorted(groups.items())
        ],
        "projection": run.projection,
        "rows": run.rows,
        "command": f"sbert-pg cluster map {exposed.name}",
    }


def _clusters(connection: sa.Connection, topics: Clustering) -> Callable[[Any], tuple[int, Group]]:
    """Which group a cluster's rows are in; outliers are in the last."""
    clusters = Session(connection).scalars(topics.clusters()).all()
    known: dict[int | None, tuple[int, Group]] = {
        c.id: (rank, {"label": title_of(c), "colour": colour})
        for rank, (c, colour) in enumerate(zip(clusters, colours(len(clusters)), strict=True))
    }
    known[None] = len(clusters), {"label": "outliers", "colour": _GREY}
    return known.__getitem__


def _values(values: Iterable[Any]) -> Callable[[Any], tuple[int, Group]]:
    """Which group a value is in: a range of many numbers or dates, else one of the frequent."""
    counts = Counter(map(_hashable, values))
    counts.pop(None, None)
    nothing = VALUES + 1, {"label": "no value", "colour": _GREY}
    in_order = len(counts) > VALUES and all(isinstance(value, _ORDERED) for value in counts)
    group_of = _by_range(counts) if in_order else _by_frequency(counts)

    def of(value: Any) -> tuple[int, Group]:
        known = _hashable(value)
        return nothing if known is None else group_of(known)

    return of


def _by_range(counts: Counter[Any]) -> Callable[[Any], tuple[int, Group]]:
    ranges = _ranges(sorted(counts.elements()))
    lows = [low for low, _ in ranges]
    known = [
        (rank, {"label": f"{_shown(low)} – {_shown(high)}", "colour": colour})
        for rank, ((low, high), colour) in enumerate(zip(ranges, _shades(len(ranges)), strict=True))
    ]
    return lambda value: known[bisect_right(lows, value) - 1]


def _by_frequency(counts: Counter[Any]) -> Callable[[Any], tuple[int, Group]]:
    frequent = [value for value, _ in counts.most_common(VALUES)]
    known = {
        value: (rank, {"label": str(value)[:TEXT] or "(empty)", "colour": colour})
        for rank, (value, colour) in enumerate(zip(frequent, colours(len(frequent)), strict=True))
    }
    others = f"{len(counts) - len(frequent):,} other values"
    other = VALUES, {"label": others, "colour": _GREY}
    return lambda value: known.get(value, other)


def _ranges(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    """First and last of about equally many values each, no value in two of them."""
    lows = sorted({values[len(values) * part // RANGES] for part in range(RANGES)})
    highs = [values[bisect_left(values, low) - 1] for low in lows[1:]]
    return list(zip(lows, [*highs, values[-1]], strict=True))


def _shades(number: int) -> list[str]:
    """So many colours in order, from blue to red, which are seen on light and on dark ground."""
    hues = (0.68 * (1 - rank / max(number - 1, 1)) for rank in range(number))
    return [hex_colour(hue, 0.47, 0.7) for hue in hues]


def _hashable(value: Any) -> Any:
    """A value itself, as text where it is an array or a document; not a number is no value."""
    if not isinstance(value, Hashable):
        return str(value)
    return value if value == value else None


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (float, Decimal)) else str(value)


def _floats(values: array[float]) -> str:
    """Single precision, the low byte first as browsers have it, in base64."""
    if sys.byteorder == "big":
        values.byteswap()
    return b64encode(values).decode("ascii")
