"""What of a database is shown: tables and columns that were listed, searched by plain data.

The HTTP server and the MCP server ask here, so what is shown and how a filter reads is one thing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy.types import NullType

from sbert_pg.errors import BindingError, DeclarationError
from sbert_pg.passages import declared_passages
from sbert_pg.passages.declaring import text_of
from sbert_pg.search import hybrid, matching, nearest
from sbert_pg.search.filters import compare
from sbert_pg.search.statement import Nearest
from sbert_pg.search.target import readable_columns
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import array_of, configure, milliseconds, parts_of

By = Literal["meaning", "words", "both"]
T = TypeVar("T")

#: Rows of an answer, and values of a list in a filter.
MOST_ROWS, MOST_VALUES = 100, 1_000
#: Characters of a question: more than any encoder reads.
MOST_CHARACTERS = 100_000
#: What the columns of a statement begin with that say of a document which passage was nearest.
_PASSAGE = "passage_"
#: Seconds after which tables are looked at again: indexes, columns and encoders change.
_LOOK_AGAIN = 60.0

#: Operators of a filter, as ``sbert_pg.search.filters`` calls them.
_OPERATORS = {"=": "$eq", "!=": "$ne", "<": "$lt", "<=": "$lte", ">": "$gt", ">=": "$gte"}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a table: a text in words, or the rows like the one with a ``key``.

    ``where`` holds by column a value, a list of values, or operators with a value each. ``exact``
    compares every row and leaves indexes aside.
    """

    text: str | None
    by: By = "meaning"
    limit: int = 10
    where: Mapping[str, Any] | None = None
    key: Mapping[str, Any] | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.text is not None and (not isinstance(self.text, str) or not self.text.strip()):
            raise DeclarationError("The question has to be a text that is not blank.")
        if self.text is not None and (len(self.text) > MOST_CHARACTERS or "\0" in self.text):
            raise DeclarationError(
                f"The question has at most {MOST_CHARACTERS:,} characters, none of them NUL."
            )
        if type(self.limit) is not int or not 1 <= self.limit <= MOST_ROWS:
            raise DeclarationError(f"'limit' is a whole number from 1 to {MOST_ROWS}.")
        if self.by not in ("meaning", "words", "both"):
            raise DeclarationError("'by' is 'meaning', 'words' or 'both'.")
        for name, values in (("where", self.where), ("key", self.key)):
            if values is not None and not isinstance(values, dict):
                raise DeclarationError(f"'{name}' is an object of columns and values.")


@dataclass(frozen=True, slots=True)
class Hit:
    """A row of an answer, with its key as one text, which ``Exposed.rows`` reads.

    Of a document that was found by its passages also the nearest one: ``start`` and ``stop`` in its
    text; ``heading`` and ``text`` where the columns are listed that they are made of.
    """

    scores: dict[str, float | None]
    row: dict[str, Any]
    key: str
    passage: dict[str, Any] | None = None

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """The row and, where there is one, the passage."""
        return {"row": self.row} | ({} if self.passage is None else {"passage": self.passage})


@dataclass(frozen=True, slots=True)
class Exposed:
    """A table that is shown, with the columns that clients see and filter by.

    ``bound`` is the name of its embedding column in the catalog, ``text`` its column for searches
    by words, ``passages`` the attribute by which documents are found.
    """

    name: str
    bound: str
    encoder: EncoderSpec
    embedding: sa.Column[Any]
    text: sa.Column[Any] | None
    columns: tuple[str, ...]
    passages: Any = None

    @property
    def text_columns(self) -> list[str]:
        """Those of the columns that clients see of which the embedded text is made."""
        source = getattr(self.embedding.type, "source", None)
        return [c for c in (source.columns if source is not None else ()) if c in self.columns]

    def hits(self, connection: sa.Connection, question: Question) -> list[Hit]:
        """The rows that answer a question, best first."""
        return self.read(connection, self.statement(connection, question))

    def rows(self, connection: sa.Connection, keys: Sequence[str]) -> list[Hit]:
        """Rows by their keys, in their order; those that are gone are left out."""
        columns = list(self.embedding.table.primary_key)
        parts = [_parts(key, len(columns)) for key in keys]
        criteria = [
            sa.and_(*(_compared(c, "=", v) for c, v in zip(columns, values, strict=True)))
            for values in parts
        ]
        readable = readable_columns(self.embedding.table)
        statement = sa.select(*readable).where(sa.or_(sa.false(), *criteria))
        by_key = {hit.key: hit for hit in self.read(connection, statement)}
        return [by_key[key] for key in keys if key in by_key]

    def key_of(self, values: Sequence[Any]) -> str:
        """A primary key as one text, from its values in their order."""
        texts = [str(_plain(value)) for value in values]
        return texts[0] if len(texts) == 1 else array_of(texts)

    def read(self, connection: sa.Connection, statement: Any) -> list[Hit]:
        """The rows of a statement that selects the table's readable columns, and then scores."""
        result = connection.execute(statement)
        # Not as the result calls them, which counts up where a column has a score's name.
        names = [column.name for column in statement.selected_columns]
        # The table's columns come first, then the scores, whatever they are called.
        readable = [column.name for column in readable_columns(self.embedding.table)]
        first = len(readable)
        # Apart from the columns, a score needs no other name than its own.
        prefix = f"{statement.search.function}_" if isinstance(statement, Nearest) else ""
        names[first:] = [name.removeprefix(prefix) for name in names[first:]]
        places = [readable.index(column.name) for column in self.embedding.table.primary_key]
        rows = []
        for row in result:
            values = [*zip(names, map(_plain, row), strict=True)]
            shown = {name: value for name, value in values[:first] if name in self.columns}
            key = self.key_of([row[place] for place in places])
            scores, passage = _scores_and_passage(dict(values[first:]))
            rows.append(Hit(scores, shown, key, passage))
        return rows

    def statement(self, connection: sa.Connection, question: Question) -> Any:
        """The search that a question means."""
        options: dict[str, Any] = {"limit": question.limit, "where": self._criteria(question.where)}
        if question.text is None:
            return self._like(connection, question, options)
        if question.by == "meaning":
            options["exact"] = question.exact
            if self.passages is not None:
                return self._by_passages(question.text, options)
            return nearest(self.embedding, question.text, **options)
        if self.text is None:
            raise DeclarationError(
                f"{self.name} has no text column, so it is searched by meaning alone."
            )
        if question.by == "words":
            return matching(self.text, question.text, **options)
        if self.passages is None:
            return hybrid(self.embedding, self.text, question.text, **options)
        words = getattr(self.passages.class_, self.text.key)
        statement = hybrid(self.passages, words, question.text, **options)
        return self._of_columns(statement, list(statement.selected_columns)[-5:])

    def _by_passages(self, text: str, options: Mapping[str, Any]) -> Any:
        """Documents by their passages, with what of the nearest one may be shown."""
        declared = declared_passages(self.passages)
        assert declared is not None
        statement = nearest(self.passages, text, **options)
        passage, sources = declared.passage, declared.source_keys
        parts = {"start": passage.start, "stop": passage.stop}
        if set(sources) <= set(self.columns):
            parts["heading"] = passage.heading
        if sources[-1] in self.columns:
            parts["text"] = text_of(declared)
        shown = [part.label(f"{_PASSAGE}{name}") for name, part in parts.items()]
        return self._of_columns(statement, [*list(statement.selected_columns)[-2:], *shown])

    def _of_columns(self, statement: Any, others: Sequence[Any]) -> Any:
        """A statement of documents as one of the table's readable columns and others.

        Those are its own scores, which it selects last, so that no name of the table's means them.
        """
        # Of this very statement: the method of a search would make another, of other parts.
        columns = readable_columns(self.embedding.table)
        return sa.Select.with_only_columns(statement, *columns, *others)

    def _like(self, connection: sa.Connection, question: Question, options: dict[str, Any]) -> Any:
        """The rows nearest to a row, which is itself left out."""
        table = self.embedding.table
        keys = {column.name: column for column in table.primary_key}
        own = question.key or {}
        if own.keys() != keys.keys():
            raise DeclarationError(f"'key' has to name {', '.join(keys)} of {self.name}.")
        other = table.alias("like_row")
        its = [_compared(other.c[name], "=", value) for name, value in own.items()]
        vector = sa.select(other.c[self.embedding.name]).where(*its)
        if not connection.scalar(sa.select(vector.scalar_subquery().is_not(None))):
            raise DeclarationError(
                f"{self.name} has no row with this key, or it has no vector yet."
            )
        others = sa.not_(sa.and_(*(_compared(keys[n], "=", v) for n, v in own.items())))
        options["where"] = [*options["where"], others]
        return nearest(self.embedding, vector.scalar_subquery(), **options)

    def _criteria(self, where: Mapping[str, Any] | None) -> list[sa.ColumnElement[bool]]:
        criteria = []
        for name, condition in (where or {}).items():
            if name not in self.columns:
                raise DeclarationError(
                    f"{self.name} has no column {name[:100]!r} to filter by; there are "
                    f"{', '.join(self.columns)}."
                )
            column = self.embedding.table.c[name]
            conditions = condition if isinstance(condition, dict) else {"=": condition}
            if not conditions:
                raise DeclarationError(f"{name}: the object has no operator and value.")
            criteria += [_compared(column, op, value) for op, value in conditions.items()]
        return criteria


def _compared(column: sa.Column[Any], operator: str, value: Any) -> sa.ColumnElement[bool]:
    """A criterion, its values read by the database as values of the column's type."""
    if operator not in _OPERATORS:
        raise DeclarationError(
            f"There is no operator {operator[:20]!r} for {column.name}; there are "
            f"{', '.join(_OPERATORS)}."
        )
    if isinstance(value, list):
        if operator != "=" or not 1 <= len(value) <= MOST_VALUES:
            raise DeclarationError(
                f"{column.name}: a list of 1 to {MOST_VALUES:,} values goes with '=' alone."
            )
        return compare(column, "$in", [_value(column, one) for one in value])
    if value is not None:
        value = _value(column, value)
    elif operator not in ("=", "!="):
        raise DeclarationError(f"{column.name}: null goes with '=' and '!=' alone.")
    return compare(column, _OPERATORS[operator], value)


def _value(column: sa.Column[Any], value: Any) -> sa.ColumnElement[Any]:
    if not isinstance(value, (str, int, float)):
        raise DeclarationError(
            f"{column.name}: a value is a text, a number, true, false or null, not {value!r:.100}."
        )
    if isinstance(value, str) and "\0" in value:
        raise DeclarationError(f"{column.name}: a value holds NUL, which no text of a row does.")
    text = sa.literal(str(value), sa.Text())
    return text if isinstance(column.type, NullType) else sa.cast(text, column.type)


def _scores_and_passage(scores: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What a statement selects behind a row's columns; no passage where it says nothing of one."""
    passage = {name.removeprefix(_PASSAGE): scores.pop(name)
               for name in list(scores) if name.startswith(_PASSAGE)}  # fmt: skip
    return scores, passage or None


def _parts(key: str, count: int) -> list[Any]:
    """The values of a key that ``key_of`` made."""
    if count == 1:
        return [key]
    parts = parts_of(key)
    if parts is None or len(parts) != count:
        raise DeclarationError(f"{key[:100]!r} is no key of {count} values.")
    return parts


def _plain(value: Any) -> Any:
    """A value as JSON has it; what has no form there is text."""
    if isinstance(value, (str, bool, int, NoneType)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (bytes, memoryview)):
        return bytes(value).hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


class Shown:
    """The tables that ``look`` gives by name, looked at again from time to time."""

    def __init__(
        self,
        engine: sa.Engine,
        look: Callable[[sa.Connection], Sequence[Exposed]],
        timeout: float = 10.0,
    ) -> None:
        self.engine = engine
        self._look = look
        self._timeout = timeout
        self._lock = threading.Lock()
        self._tables: dict[str, Exposed] = {}
        self._looked = 0.0
        self.tables()

    def tables(self, *, afresh: bool = False) -> dict[str, Exposed]:
        """The tables by name."""
        with self._lock:
            if afresh or not self._tables or time.monotonic() - self._looked > _LOOK_AGAIN:
                with self.engine.connect() as connection:
                    self._tables = {table.name: table for table in self._look(connection)}
                self._looked = time.monotonic()
            return self._tables

    def ask(self, name: Any, question: Question) -> list[Hit]:
        """The rows of a table that answer a question."""
        return self.within(name, lambda connection, table: table.hits(connection, question))

    def within(self, name: Any, work: Callable[[sa.Connection, Exposed], T]) -> T:
        """What some work on a table gives, in a transaction whose statements are ended in time."""
        try:
            return self._within(name, work, afresh=False)
        except BindingError:
            # The column changed hands since it was looked at.
            return self._within(name, work, afresh=True)

    def _within(self, name: Any, work: Callable[[sa.Connection, Exposed], T], *, afresh: bool) -> T:
        tables = self.tables(afresh=afresh)
        if not isinstance(name, str) or name not in tables:
            raise DeclarationError(f"'table' is one of {', '.join(tables)}.")
        with self.connected() as connection:
            return work(connection, tables[name])

    @contextmanager
    def connected(self) -> Iterator[sa.Connection]:
        """A transaction whose statements are ended in time."""
        with self.engine.begin() as connection:
            configure(connection, {"statement_timeout": milliseconds(self._timeout)})
            yield connection
