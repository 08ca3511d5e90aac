"""A click log as labelled questions: what was clicked more, or less, than its places explain.

What stands higher is looked at more, whatever it says. So a click is taken for the product of how
often a place is looked at and how well the row answers (the examination hypothesis; Craswell et
al., 2008), both by maximum likelihood: rows that stood in several places tell the two apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sbert_pg.errors import LoadError
from sbert_pg.search.exact import LabelledQuery

#: Columns that make pairs a log: the place of a row in the answer, from 1, and whether, or how
#: often, it was clicked; and of one that is summed up, how often it was shown.
POSITION, CLICKED, SHOWN = "position", "clicked", "shown"
Floats = npt.NDArray[np.float64]
COLUMNS = frozenset({POSITION, CLICKED})
#: Clicks of an answer at least, since one may be a mistake; and how good it is, as a share of the
#: best of its question.
LEAST_CLICKS, LEAST_SHARE = 2, 0.5
#: Clicks that an ordinary row would have had where one has none: by Poisson's law that happens by
#: chance in 5 of 100 cases.
SURE = 3.0
_STEPS = 50
#: Above any position or count of a log.
_MOST = 10**12
_TRUE, _FALSE = {"true", "t", "yes"}, {"false", "f", "no", ""}


def is_log(pairs: Sequence[LabelledQuery]) -> bool:
    """Whether pairs tell where rows stood, and which were clicked."""
    return bool(pairs) and set(pairs[0].attributes) >= COLUMNS


def of_log(events: Sequence[LabelledQuery]) -> list[LabelledQuery]:
    """Labelled questions of a click log.

    A row answers its question if it has two clicks and more, is clicked more often than an ordinary
    row that is looked at as often, and at least half as often as the best of its question. A row
    without any click that would have had three of them is wrong, and has a gain of 0. Of the others
    nothing is known.

    Args:
        events: one of each time that a row was shown for a question, or of several: the question,
            the key of the row, and the attributes ``position``, ``clicked`` (how often, or whether)
            and perhaps ``shown`` (how often; 1 by default). Other attributes are kept, of each
            question as its last event has them.

    Raises:
        LoadError: a position or a number cannot be read, or no row was clicked often enough.
    """
    read = np.array([_read(event, number) for number, event in enumerate(events, start=1)])
    asked = [" ".join(event.text.casefold().split()) for event in events]
    rows = [(text, next(iter(event.gains))) for text, event in zip(asked, events, strict=True)]
    pairs = {pair: i for i, pair in enumerate(dict.fromkeys(rows))}
    clicks, looks = _examined(read, np.array([pairs[pair] for pair in rows]))
    known = _gains(list(pairs), clicks, looks)
    last = dict(zip(asked, events, strict=True))
    queries = [
        replace(last[text], gains=gains, attributes=_others(last[text]))
        for text, gains in known.items()
        if any(gains.values())
    ]
    if not queries:
        raise LoadError(
            f"The log of {len(events)} rows names no answer: none was clicked {LEAST_CLICKS} times "
            "and more often than its places explain. Take a longer time of the log, or label "
            "questions by hand."
        )
    return queries


def _gains(
    pairs: Sequence[tuple[str, str]], clicks: Floats, looks: Floats
) -> dict[str, dict[str, float]]:
    """Of each question the rows that answer it, with 1, and those that are wrong, with 0."""
    usual = max(clicks.sum() / max(looks.sum(), 1e-12), 1e-12)
    # As if each had one click more at the usual rate: of few looks little is known.
    rates = (clicks + 1) / (looks + 1 / usual)
    often = clicks >= LEAST_CLICKS
    best: dict[str, float] = defaultdict(float)
    for (text, _), rate in zip(pairs, rates * often, strict=True):
        best[text] = max(best[text], rate)
    answers = (
        often & (rates > usual) & (rates >= LEAST_SHARE * np.array([best[t] for t, _ in pairs]))
    )
    wrong = (clicks == 0) & (looks * usual >= SURE)
    gains: dict[str, dict[str, float]] = defaultdict(dict)
    for i in np.flatnonzero(answers | wrong).tolist():
        text, key = pairs[i]
        gains[text][key] = float(answers[i])
    return gains


def _examined(read: Floats, row: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Clicks of each row, and how often it was looked at, in looks at the most seen place."""
    place = np.unique(read[:, 0], return_inverse=True)[1]
    clicked, shown = read[:, 1], read[:, 2]
    clicks, by_place = np.bincount(row, clicked), np.bincount(place, clicked)
    look = np.ones(len(by_place))
    for _ in range(_STEPS):
        rate = clicks / np.maximum(np.bincount(row, shown * look[place]), 1e-12)
        # Where nothing is ever clicked, nothing is known of the place: as if it were not seen.
        look = by_place / np.maximum(np.bincount(place, shown * rate[row]), 1e-12)
        look = np.maximum(look / max(look.max(), 1e-12), 1e-9)
    return np.asarray(clicks, float), np.asarray(np.bincount(row, shown * look[place]), float)


def _others(event: LabelledQuery) -> dict[str, str]:
    own = {CLICKED, POSITION, SHOWN}
    return {name: value for name, value in event.attributes.items() if name not in own}


def _read(event: LabelledQuery, number: int) -> tuple[int, float, float]:
    """Position, clicks, and how often it was shown."""
    said = event.attributes
    try:
        position, times = int(said[POSITION]), float(said.get(SHOWN, 1))
        word = said.get(CLICKED, "").strip().lower()
        clicked = 1.0 if word in _TRUE else 0.0 if word in _FALSE else float(word)
        if not 1 <= position < _MOST or not 0 <= clicked <= times < _MOST:
            raise ValueError("positions begin with 1, and nothing is clicked more often than shown")
    except (ValueError, KeyError) as error:
        raise LoadError(
            f"Row {number} of the click log, {event.text!r}: {POSITION}, {CLICKED} and {SHOWN} "
            f"have to be numbers; {error}."
        ) from error
    return position, clicked, times
