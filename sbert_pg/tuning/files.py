"""Labelled questions and rankings in files: CSV, JSON lines, and TREC's qrels and runs."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import sqlalchemy as sa

from sbert_pg.errors import LoadError
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.system import array_of, require_engine
from sbert_pg.tuning.pairs import CLICK_COLUMNS, is_click_log, of_click_log, values_of

#: Keys of the rows that a search found, best first, with their scores; by name of the question.
Run = dict[str, list[tuple[str, float]]]

#: Names of the columns of pairs; every other column is an attribute of the question.
_QUESTION, _KEY, _GAIN = ("question", "query"), ("id", "key"), ("gain", "relevance")

#: White space ends a field of TREC's files: in keys and names it is written as ``\u0020``.
_BLANK, _ESCAPED = re.compile(r"\s|\\(?=u[0-9a-f]{4})"), re.compile(r"\\u([0-9a-f]{4})")


def labelled(pairs: Iterable[Any]) -> list[LabelledQuery]:
    """Questions with the rows that answer them, from pairs in any of their forms.

    Args:
        pairs: each is a ``LabelledQuery``; or ``(question, key)`` or ``(question, key, gain)``,
            gain being 1; or a mapping with ``question`` (or ``query``), ``id`` (or ``key``), and
            perhaps ``gain`` and ``name``, whose other items are attributes. Pairs of one question
            belong together.

    Raises:
        LoadError: a pair is in none of these forms, a gain is no number from 0 on, a row has two
            gains for one question, or two questions have one name.
    """
    queries: dict[str, LabelledQuery] = {}
    for number, pair in enumerate(pairs, start=1):
        try:
            one = pair if isinstance(pair, LabelledQuery) else _of_pair(pair)
            known = queries.get(one.name or one.text)
            _require_sound(one, known)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise LoadError(
                f"Pair {number}, {pair!r}: it has to be a question, the key of a row that answers "
                f"it, and perhaps a gain; {error}."
            ) from error
        if known is not None:
            attributes = {**known.attributes, **one.attributes}
            one = LabelledQuery(one.text, {**known.gains, **one.gains}, one.name, attributes)
        queries[one.name or one.text] = one
    return list(queries.values())


def _require_sound(one: LabelledQuery, known: LabelledQuery | None) -> None:
    """Refuse what has no meaning, and what contradicts the earlier pairs of the question."""
    if not one.text.strip() or any(not 0 <= gain < math.inf for gain in one.gains.values()):
        raise ValueError("the question is empty, or a gain is no number from 0 on")
    if known is None:
        return
    if known.text != one.text:
        raise ValueError(f"its name is that of another question, {known.text!r}")
    for key, gain in one.gains.items():
        if known.gains.get(key, gain) != gain:
            raise ValueError(f"the row {key} has the gain {known.gains[key]:g} there already")


def _of_pair(pair: Any) -> LabelledQuery:
    if not isinstance(pair, Mapping):
        question, key, *gain = pair
        return LabelledQuery(_text(question), {_text(key): float(gain[0] if gain else 1)})
    if None in pair:
        raise ValueError("it has more fields than the header (a text with commas is to be quoted)")
    rest = {str(name): value for name, value in pair.items()}

    def take(names: Sequence[str]) -> Any:
        if not (there := [name for name in names if name in rest]):
            raise ValueError(f"nothing in it is called {' or '.join(map(repr, names))}")
        return rest.pop(there[0])

    question, key = take(_QUESTION), take(_KEY)
    gain = take(_GAIN) if any(name in rest for name in _GAIN) else 1
    name = str(rest.pop("name", "") or "")
    attributes = {name: str(value) for name, value in rest.items() if value is not None}
    return LabelledQuery(_text(question), {_text(key): float(gain)}, name, attributes)


def _text(value: Any) -> str:
    """A question, or a key as reports call it: several parts as PostgreSQL writes a JSON array."""
    if value is None:
        raise ValueError("a question or key is missing")
    if isinstance(value, (list, tuple)):
        return array_of(value)
    return str(value)


def read_pairs(path: Path | str, topics: Path | str | None = None) -> list[LabelledQuery]:
    """Labelled questions from a file.

    Args:
        path: ``.csv`` or ``.tsv`` with a header (``question,id`` and perhaps ``gain``; other
            columns are attributes); ``.jsonl`` with objects of those; any other name is a TREC
            qrels file. With the columns ``position`` and ``clicked`` it is a click log (see
            ``of_click_log``).
        topics: for qrels, the questions: lines of a name, a tab, and the text. By default a file of
            the same name that ends in ``.topics``.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _together(_each_of(path, csv_rows(path), lambda row: [row]))
    if suffix in (".jsonl", ".ndjson"):
        return _together(_each_of(path, numbered_lines(path), lambda line: [json.loads(line)]))
    if topics is None:
        topics = path.parent / f"{path.stem}.topics"
        # These ask without raising, whatever was passed for a path.
        if os.path.isfile(path) and not os.path.exists(topics):
            raise LoadError(
                f"{path} ends in none of .csv, .tsv and .jsonl, so it would be TREC qrels, which "
                "name questions by number. Write the questions, lines of a name, a tab, and the "
                f"text, into {topics}."
            )
    # Where there are no qrels it is these that are missed.
    lines = list(numbered_lines(path))
    texts = read_topics(topics)

    def judged(line: str) -> list[dict[str, Any]]:
        name, _, key, gain = _fields(path, line, 4)
        if name not in texts:
            raise ValueError(f"{topics} has no question {name!r}")
        return [{"question": texts[name], "id": key, "gain": max(float(gain), 0.0), "name": name}]

    return labelled(_each_of(path, lines, judged))


def read_topics(path: Path | str) -> dict[str, str]:
    """Questions by their names, from lines of a name, a tab, and the text."""
    texts: dict[str, str] = {}
    for _, line in numbered_lines(Path(path)):
        name, text = _fields(Path(path), line, 2, "\t")
        if texts.setdefault(name, text) != text:
            raise LoadError(f"{path} has two questions {name!r}: {texts[name]!r} and {text!r}.")
    return texts


def _together(pairs: list[LabelledQuery]) -> list[LabelledQuery]:
    """Pairs of one question as one question; those of a click log as what it says of them."""
    return of_click_log(pairs) if is_click_log(pairs) else labelled(pairs)


def _each_of(
    path: Path, lines: Iterable[tuple[int, Any]], read: Callable[[Any], list[Any]]
) -> list[LabelledQuery]:
    pairs = []
    for number, line in lines:
        try:
            pairs += [query for one in read(line) for query in labelled([one])]
        except (LoadError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise LoadError(f"{path}, line {number}: {error}") from error
    return pairs


def read_run(path: Path | str) -> Run:
    """The rankings of a TREC run: lines of question, ``Q0``, key, rank, score and tag."""
    run: Run = {}
    for _, line in numbered_lines(Path(path)):
        name, _, key, _, score, _ = _fields(Path(path), line, 6)
        try:
            run.setdefault(name, []).append((key, float(score)))
        except ValueError as error:
            raise LoadError(f"{path}: the score of {line!r} is no number.") from error
    # By score, as trec_eval reads it; ranks are there for people.
    return {name: sorted(rows, key=lambda row: -row[1]) for name, rows in run.items()}


def write_qrels(path: Path | str, queries: Sequence[LabelledQuery]) -> None:
    """Write the judgements of labelled questions as TREC qrels.

    Gains become whole numbers, and those below 1 that are not 0 become 1.
    """
    lines = (
        f"{_unbroken(name)} 0 {_unbroken(key)} {round(gain) or math.ceil(gain)}"
        for name, query in names_of(queries).items()
        for key, gain in query.gains.items()
    )
    _write(path, lines)


def write_topics(path: Path | str, queries: Sequence[LabelledQuery]) -> None:
    """Write the questions that qrels and runs name, as ``read_topics`` reads them."""
    named = names_of(queries).items()
    _write(path, (f"{_unbroken(name)}\t{' '.join(query.text.split())}" for name, query in named))


def write_run(path: Path | str, run: Run, tag: str) -> None:
    """Write rankings as a TREC run."""
    lines = (
        f"{_unbroken(name)} Q0 {_unbroken(key)} {rank} {score:.9g} {_unbroken(tag)}"
        for name, rows in run.items()
        for rank, (key, score) in enumerate(rows, start=1)
    )
    _write(path, lines)


def write_queries(path: Path | str, queries: Sequence[LabelledQuery]) -> None:
    """Write labelled questions as JSON lines, which ``read_pairs`` reads."""
    pairs = (
        {"question": query.text, "id": key, "gain": gain}
        for query in queries
        for key, gain in query.gains.items()
    )
    _write(path, (json.dumps(each, ensure_ascii=False) for each in pairs))


def _write(path: Path | str, lines: Iterable[str]) -> None:
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def names_of(queries: Sequence[LabelledQuery]) -> dict[str, LabelledQuery]:
    """Labelled questions by what files call them: their names, else their numbers from 1."""
    taken = {query.name for query in queries}
    numbers = (n for n in itertools.count(1) if str(n) not in taken)
    return {query.name or str(next(numbers)): query for query in queries}


def in_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as lines of text, cells below each other."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


@contextlib.contextmanager
def _opened(path: Path, **options: Any) -> Iterator[TextIO]:
    """A file to read, whatever goes wrong while it is read included."""
    try:
        with path.open(encoding="utf-8-sig", **options) as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoadError(f"{path} cannot be read as text in UTF-8: {reason}.") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file that are not blank, each with its number from 1."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\n")


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a ``.csv`` or ``.tsv`` file with a header, each with the line that it ends in."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with _opened(path, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            if not reader.fieldnames:
                raise LoadError(f"{path} is empty; the first line has to name the columns.")
            if len(set(reader.fieldnames)) < len(reader.fieldnames):
                names = ", ".join(reader.fieldnames)
                raise LoadError(f"{path}: the header names a column twice: {names}.")
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            # That of the reader within counts the line that cannot be read as well.
            line = reader.reader.line_num
            raise LoadError(f"{path}, line {line} cannot be read: {error}.") from error


def _fields(path: Path, line: str, number: int, separator: str | None = None) -> list[str]:
    fields = line.split(separator, number - 1)
    if len(fields) != number:
        raise LoadError(f"{path}: {line!r} has {len(fields)} fields and not {number}.")
    return [_ESCAPED.sub(lambda match: chr(int(match[1], 16)), field) for field in fields]


def _unbroken(text: str) -> str:
    """A key or name as a field, which white space would end."""
    return _BLANK.sub(lambda match: f"\\u{ord(match[0]):04x}", text) or "_"


def pairs_of(engine: sa.Engine, pairs: Any) -> list[LabelledQuery]:
    """Pairs in any form, those of a query and of a click log included; see ``labelled``.

    Questions that no row answers, of which only wrong rows are known, measure nothing: without
    them.
    """
    require_engine("A measurement", engine)
    if isinstance(pairs, sa.sql.base.Executable):
        with engine.connect() as connection:
            pairs = connection.execute(pairs).mappings().all()
    pairs = list(pairs)
    if pairs and isinstance(pairs[0], Mapping) and set(pairs[0]) >= CLICK_COLUMNS:
        queries = of_click_log([query for pair in pairs for query in labelled([pair])])
    else:
        queries = labelled(pairs)
    answered = [query for query in queries if any(query.gains.values())]
    if not answered:
        raise LoadError("There are no labelled questions to measure by.")
    return answered


def with_attribute(
    engine: sa.Engine, table: sa.Table, queries: Sequence[LabelledQuery], name: str
) -> list[LabelledQuery]:
    """Questions with an attribute that a column of the table says of their first relevant row."""
    first = [next(iter(query.answers), "") for query in queries]
    values = values_of(engine, table, sa.cast(table.c[name], sa.Text), first)
    return [
        replace(query, attributes={**query.attributes, name: values.get(key, "")})
        for query, key in zip(queries, first, strict=True)
    ]
