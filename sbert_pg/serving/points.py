"""Where the rows of a map are, and their colours: by cluster, or by a column's values."""

from __future__ import annotations

import colorsys
import sys
from array import array
from base64 import b64encode
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg.clustering import Clustering, mapped_rows
from sbert_pg.clustering.mapping import colours
from sbert_pg.errors import DeclarationError
from sbert_pg.serving.exposed import Exposed

#: Values of a column that have a colour each; the ranges that more numbers or dates make.
VALUES, RANGES = 20, 8
_GREY = "#9ca3af"
#: Characters of a text by which it has its colour: whole texts of many rows take much memory.
TEXT = 80
#: What is in order, and is cut into ranges.
_ORDERED = (int, float, Decimal, date, time, timedelta)
Group = dict[str, Any]


def points(
    connection: sa.Connection, exposed: Exposed, topics: Clustering, by: str = ""
) -> dict[str, Any]:
    """A group for each colour: keys, and places in the unit square, as base64 of floats.

    Args:
        connection: a connection in a transaction.
        exposed: the table.
        topics: its clustering, which has a current run.
        by: the column whose values decide; the clusters by default.

    Raises:
        DeclarationError: it is not a column that is shown.
    """
    statement = mapped_rows(topics)
    if by:
        if by not in exposed.columns:
            raise DeclarationError(f"{exposed.name} has no column {by[:100]!r} to colour by.")
        table = exposed.embedding.table
        same = zip(topics.row_keys, topics.keys, strict=True)
        statement = statement.join(
            table, sa.and_(*(left == table.c[key.name] for left, key in same))
        ).with_only_columns(_read(table.c[by]), *list(statement.selected_columns)[1:])
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


def _read(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    is_text = isinstance(column.type, sa.String) and not isinstance(column.type, sa.Enum)
    return sa.func.left(column, TEXT) if is_text else column


def _clusters(connection: sa.Connection, topics: Clustering) -> Callable[[Any], tuple[int, Group]]:
    """Which group a cluster's rows are in; outliers are in the last."""
    clusters = Session(connection).scalars(topics.clusters()).all()
    known: dict[int | None, tuple[int, Group]] = {
        c.id: (rank, {"label": c.label or f"cluster {c.number}", "colour": colour})
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
    return [
        "#" + "".join(f"{int(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.47, 0.7))
        for hue in hues
    ]


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
