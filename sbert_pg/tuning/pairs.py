"""Labelled questions: from a table itself, from a click log; with hard negatives, and split.

What is learned from some questions is judged on others, and the two must not share a document: an
encoder that remembers its documents looks perfect on them. So questions that share a row, a row of
the same document or of the same vector, or their own wording, stay on one side.

Of a click log, what was clicked more, or less, than its places explain. What stands higher is
looked at more, whatever it says. So a click is taken for the product of how often a place is looked
at and how well the row answers (the examination hypothesis; Craswell et al., 2008), both by maximum
likelihood: rows that stood in several places tell the two apart.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.errors import DeclarationError, LoadError, TooFewPairsError
from sbert_pg.search import nearest
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.tuning.searches import by_question, encode_together, in_batches, with_answers
from sbert_pg.types.comparator import base_of, clause_of

#: Fewest questions on each side, and fewest documents that they ask for. Below, an interval is too
#: wide for any gain that a matrix brings.
LEAST_QUESTIONS, LEAST_DOCUMENTS = 40, 20
#: Share of the questions that is kept back.
HELD_OUT = 0.3

#: Columns that make pairs a log: the place of a row in the answer, from 1, and whether, or how
#: often, it was clicked; and of one that is summed up, how often it was shown.
POSITION, CLICKED, SHOWN = "position", "clicked", "shown"
CLICK_COLUMNS = frozenset({POSITION, CLICKED})
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

Positions = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Split:
    """Positions of questions to learn from and of those kept back; every group is on one side."""

    learning: Positions
    held_out: Positions
    groups: Positions
    by: str

    def parts(self, count: int, seed: int) -> Positions:
        """For each question to learn from the part, from 0, that its group is drawn into."""
        own = self.groups[self.learning]
        names = np.unique(own)
        part = np.random.default_rng(seed).permutation(len(names)) % count
        return np.asarray(part[np.searchsorted(names, own)])


def own_pairs(
    engine: sa.Engine,
    column: Any,
    question: str,
    *,
    where: Sequence[sa.ColumnElement[bool]] = (),
    limit: int = 10_000,
    seed: int = 0,
) -> list[LabelledQuery]:
    """Questions from the table itself: what one of its columns says asks for the row.

    A title for its body, a ticket for its answer. The column should be no part of what is embedded,
    or its words stand in the text that is searched.

    Args:
        column: the embedding column.
        question: name of the column whose text asks.
        where: criteria of the rows.
        limit: rows at most, drawn at random.
        seed: another seed draws other rows.

    Raises:
        DeclarationError: the table has no such column, or it is embedded itself.
    """
    base: Any = base_of(clause_of(column))
    table: sa.Table = base.table
    if question not in table.c:
        raise DeclarationError(f"{table.fullname} has no column {question!r} to take pairs from.")
    source = getattr(base.type, "source", None)
    if source is not None and question in source.columns:
        raise DeclarationError(
            f"{question!r} is part of the text that {base} embeds, so every question would stand "
            "in the row that it asks for. Take another column, or pairs that people have labelled."
        )
    keys = [c.name for c in table.primary_key]
    text = sa.cast(table.c[question], sa.Text)
    label = catalog_rows.label([table.c[name] for name in keys])
    criteria = [base.is_not(None), sa.func.btrim(text) != "", *where]
    with engine.connect() as connection:
        drawn = catalog_rows.sample(
            connection, table, keys, [text, label], where=criteria, size=limit, seed=seed
        )
    gains: dict[str, dict[str, float]] = {}
    for asked, key in drawn:
        gains.setdefault(asked, {})[key] = 1.0
    return [LabelledQuery(asked, keys_) for asked, keys_ in gains.items()]


def hard_negatives(
    engine: sa.Engine,
    column: Any,
    queries: Sequence[LabelledQuery],
    *,
    count: int = 10,
    where: Sequence[sa.ColumnElement[bool]] = (),
) -> list[list[str]]:
    """For each question the nearest rows that are not labelled as answers, by k-NN in SQL.

    Rows that begin with the text of a labelled one are left out: they answer as well.

    Args:
        column: the embedding column.
        queries: the questions.
        count: rows for each; fewer where the table has fewer.
        where: criteria of the rows.

    Returns:
        Their keys, nearest first.
    """
    most = max((len(query.gains) for query in queries), default=0)
    negatives: list[list[str]] = []
    with engine.connect() as connection:
        for batch in in_batches(queries):
            texts = [query.text for query in batch]
            statement = nearest(column, texts, limit=count + min(most, count) + 5, where=where)
            encode_together(statement, texts)
            answers = by_question(connection, with_answers(statement), len(batch))
            for query, rows in zip(batch, answers, strict=True):
                known = {row.text for row in rows if query.gains.get(row.key, 0) > 0}
                other = (r.key for r in rows if r.key not in query.gains and r.text not in known)
                negatives.append(list(other)[:count])
    return negatives


def split_pairs(
    queries: Sequence[LabelledQuery],
    same: Sequence[Mapping[str, Any]] = (),
    times: Sequence[str | None] | None = None,
    *,
    held_out: float = HELD_OUT,
    seed: int = 0,
) -> Split:
    """Split labelled questions so that no document is on both sides.

    Args:
        queries: the questions.
        same: by key of a row what it shares with others: the document that it is a part of, a
            digest of its vector. Rows of which one of these is equal stay on one side.
        times: when each question was asked, or its row written, as text: ISO dates and times, or
            numbers. The latest groups are then kept back, and nothing that is learned from is later
            than any of them. By chance otherwise.
        held_out: share of the questions to keep back; 1 learns from none.
        seed: another seed draws other groups.

    Raises:
        TooFewPairsError: a side would have too few questions or documents.
        DeclarationError: a time cannot be read.
    """
    groups = _groups(queries, same)
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    if times is not None:
        latest = np.full(len(sizes), -np.inf)
        np.maximum.at(latest, groups, _moments(times))
        order = order[np.argsort(-latest[order], kind="stable")]
    room = round(held_out * len(queries))
    kept: set[int] = set()
    for group in order:
        if sizes[group] <= room:
            room -= int(sizes[group])
            kept.add(int(group))
        elif times is not None:
            # By time the order is what it is: nothing later may be learned from.
            break
    back = np.isin(groups, list(kept))
    by = "document" if times is None else "document and time"
    split = Split(np.flatnonzero(~back), np.flatnonzero(back), groups, by)
    _require_enough(queries, split, learned=held_out < 1)
    return split


def _require_enough(queries: Sequence[LabelledQuery], split: Split, learned: bool) -> None:
    largest = int(np.bincount(split.groups).max(initial=0)) if len(queries) else 0
    sides = [("learn from", split.learning), ("keep back", split.held_out)]
    for side, positions in sides[0 if learned else 1 :]:
        documents = len({key for i in positions for key in queries[i].gains})
        if len(positions) < LEAST_QUESTIONS or documents < LEAST_DOCUMENTS:
            raise TooFewPairsError(
                f"Of {len(queries)} labelled questions, {len(positions)} that ask for {documents} "
                f"rows are there to {side}; {LEAST_QUESTIONS} that ask for {LEAST_DOCUMENTS} are "
                "the least on each side"
                + (f" ({largest} hang together by the rows they share)" if largest > 1 else "")
                + ". Label more, or take pairs from the table itself (a title for its body); with "
                "fewer, compare encoders by 'sbert-pg evaluate' and take a better one, or add the "
                "words arm."
            )


def _groups(queries: Sequence[LabelledQuery], same: Sequence[Mapping[str, Any]]) -> Positions:
    """The connected components of questions and what they share, numbered from 0."""
    parent = list(range(len(queries)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Any, int] = {}
    for i, query in enumerate(queries):
        shared: list[Any] = [("text", " ".join(query.text.casefold().split()))]
        for key in query.answers:
            shared.append(("key", key))
            shared += [(n, of[key]) for n, of in enumerate(same) if of.get(key) is not None]
        for thing in shared:
            parent[root(i)] = root(first.setdefault(thing, i))
    return np.unique([root(i) for i in range(len(queries))], return_inverse=True)[1]


def _moments(times: Sequence[str | None]) -> npt.NDArray[np.float64]:
    """Times as numbers that grow with them."""
    try:
        try:
            return np.array([float(time or "") for time in times])
        except ValueError:
            moments = [dt.datetime.fromisoformat(time or "") for time in times]
            return np.array([(_utc(m) - _utc(dt.datetime.min)).total_seconds() for m in moments])
    except ValueError as error:
        raise DeclarationError(
            f"The times to split by cannot be read: {error}. Each question needs one, all of them "
            "numbers, or all of them ISO dates and times."
        ) from error


def _utc(moment: dt.datetime) -> dt.datetime:
    return moment.replace(tzinfo=dt.timezone.utc) if moment.tzinfo is None else moment


def of_keys(
    engine: sa.Engine, table: sa.Table, name: str, queries: Sequence[LabelledQuery]
) -> dict[str, str]:
    """What a column says of each labelled row, as text; rows without it are left out."""
    if name not in table.c:
        raise DeclarationError(
            f"Neither the pairs nor {table.fullname} has a column {name!r} to split by."
        )
    column = table.c[name]
    # Times as seconds, which no setting of the session spells in its own way.
    timed = isinstance(column.type, (sa.DateTime, sa.Date))
    value = sa.cast(sa.extract("epoch", column) if timed else column, sa.Text)
    return values_of(engine, table, value, {key for query in queries for key in query.gains})


def values_of(
    engine: sa.Engine, table: sa.Table, value: sa.ColumnElement[str], keys: Iterable[str]
) -> dict[str, str]:
    """A text of each of some rows, by their keys; rows without it are left out."""
    label = catalog_rows.label(list(table.primary_key))
    chosen = sa.select(label, value).where(catalog_rows.is_one_of(label, keys), value.is_not(None))
    with engine.connect() as connection:
        return dict(connection.execute(chosen).tuples().all())


def is_click_log(pairs: Sequence[LabelledQuery]) -> bool:
    """Whether pairs tell where rows stood, and which were clicked."""
    return bool(pairs) and set(pairs[0].attributes) >= CLICK_COLUMNS


def of_click_log(events: Sequence[LabelledQuery]) -> list[LabelledQuery]:
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
    """
    read = np.array([_read(event, number) for number, event in enumerate(events, start=1)])
    asked = [" ".join(event.text.casefold().split()) for event in events]
    rows = [(text, next(iter(event.gains))) for text, event in zip(asked, events, strict=True)]
    pairs = {pair: i for i, pair in enumerate(dict.fromkeys(rows))}
    clicks, looks = _examined(read, np.array([pairs[pair] for pair in rows]))
    known = _clicked_gains(list(pairs), clicks, looks)
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


def _clicked_gains(
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
