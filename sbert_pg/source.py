"""The source of an embedding column: the text of a row, and what the row says of its vector.

Two rules, evaluated by Python where a writer encodes what it is about to write, and by the server
for everything that is in a row already: ``sbert.expressions_v1`` has the same in SQL, and a test
compares the two.

One is which columns a text is made of, and how they are joined. The other is the digest: beside
each embedding column ``e`` stands a column ``e_of`` of type ``uuid``. Its first half proves the
vector, its second half names the text that the vector was made from; both depend on the binding's
identity, so what was written for another binding proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import sqlalchemy as sa

from sbert_pg.distance import ELEMENT, HEADER, Storage
from sbert_pg.errors import SourceError


class NotKnown:
    """Type of ``NOT_KNOWN``."""

    def __repr__(self) -> str:
        return "NOT_KNOWN"


#: Default of the companion column: a new row is pending.
NIL = uuid.UUID(int=0)
#: Dimensions of a vector that its proof covers.
PROVEN_DIMENSIONS = 8
_PROVEN_HEADER = HEADER.pack(PROVEN_DIMENSIONS, 0)
#: Hexadecimal digits of either half.
HALF = 16
#: Types of plain values of a source.
PLAIN = frozenset({str, type(None)})
#: Bytes of the longest name that PostgreSQL keeps whole.
_LONGEST_NAME = 63

#: Characters that no text or name of PostgreSQL has, over which drivers fail in their own ways.
UNSTORABLE = re.compile(r"[\0\ud800-\udfff]")
NOT_STORED = "which PostgreSQL cannot store: a text holds no NUL and no half of a surrogate pair."
#: What stands between the heading of a passage and its part of the text.
GAP = "\n\n"
#: Columns of a passage that say, with its key, where its text stands.
PLACE = ("heading", "start", "stop")
#: Stands for a source value that was not given, and for a text that hangs on one.
NOT_KNOWN: Final = NotKnown()
#: A text, none because all is ``NULL``, or none that this process could know.
Text = str | NotKnown | None


@dataclass(frozen=True, slots=True)
class Source:
    """Columns of one table, and how their values become one text.

    Without a template the values are joined with ``separator``; a value that is ``NULL`` or empty
    is left out together with its separator. With a template, as made by ``Source.template``, each
    ``{column}`` is replaced by the value, ``NULL`` by nothing.

    Attributes:
        columns: names of text columns, in order, as the database has them.
        separator: what stands between two values, a blank line by default.
        pattern: the template, or ``None``.
        passages: how the text is cut into passages and where they are kept, as JSON, where it is;
            see ``sbert_pg.passages``.
        document: of a passage's text, where in its document it stands, as JSON. The columns are
            then a digest of the text and not the text itself, which only the database knows.
    """

    columns: tuple[str, ...]
    separator: str = "\n\n"
    pattern: str | None = None
    passages: str | None = None
    document: str | None = None

    def __post_init__(self) -> None:
        if not self.columns:
            raise SourceError("A source needs at least one column; it was declared with none.")
        if any(not isinstance(name, str) or not name for name in self.columns):
            raise SourceError(
                f"A source is made of column names; got {self.columns!r}. Give them as strings."
            )
        if len(set(self.columns)) != len(self.columns):
            raise SourceError(f"The source {self.columns!r} names a column twice.")
        for text in (*self.columns, self.separator or "", self.pattern or ""):
            if UNSTORABLE.search(text):
                raise SourceError(f"A source holds {text!r}, {NOT_STORED}")

    @classmethod
    def of(cls, value: str | Sequence[str] | Source, separator: str = "\n\n") -> Source:
        """Take one column name, several, or a source as it is.

        Raises:
            SourceError: no column is named, one is named twice, or a function was given.
        """
        if isinstance(value, Source):
            return value
        if callable(value):
            raise SourceError(
                f"A source was declared as {value!r}, which neither a trigger nor another process "
                "could evaluate. Name text columns of the table, of which one may be generated."
            )
        return cls((value,) if isinstance(value, str) else tuple(value or ()), separator)

    @classmethod
    def template(cls, pattern: str) -> Source:
        r"""A source by template, as in ``Source.template("Title: {title}\n{body}")``.

        Doubled braces stand for themselves. Conversions and format specifications are refused,
        since SQL could not follow them.

        Raises:
            SourceError: the template is malformed, names no column, or uses a conversion.
        """
        names: list[str] = []
        for _, name, specification, conversion in _parse(pattern):
            if name is None:
                continue
            if not name.isidentifier() or specification or conversion:
                raise SourceError(
                    f"The template {pattern!r} holds {{{name}}} with a conversion, a format or an "
                    "expression; only plain column names can stand in braces."
                )
            if name not in names:
                names.append(name)
        return cls(tuple(names), pattern=pattern)

    def text(self, values: Mapping[str, Any]) -> str:
        """The text of one row, given as a mapping with at least the source's columns."""
        return self.joiner()([values[name] for name in self.columns])

    def joiner(self) -> Callable[[Sequence[Any]], str]:
        """A function from the values, in the order of ``columns``, to the text of a row."""
        if self.pattern is None:
            separator = self.separator
            if len(self.columns) == 1:
                return lambda values: values[0] or ""
            return lambda values: separator.join([value for value in values if value])
        parts = list(_parse(self.pattern))
        position = {name: i for i, name in enumerate(self.columns)}

        def fill(values: Sequence[Any]) -> str:
            filled = []
            for literal, name, _, _ in parts:
                filled.append(literal)
                if name is not None:
                    filled.append(values[position[name]] or "")
            return "".join(filled)

        return fill

    def text_maker(self, *, null_text: bool) -> Callable[[Sequence[Any]], Text]:
        """A function from the values of a row that is about to be written to its text.

        It takes them in the order of ``columns``, with ``NOT_KNOWN`` for one that was not given. It
        returns the text; ``None`` where every value is ``NULL``; ``NOT_KNOWN`` where a value is an
        SQL expression or was not given, and for passages, whose text is in another row.

        Args:
            null_text: whether a row whose values are all ``NULL`` has no text; else it has an empty
                one, as where its vector has to be there.

        The function raises ``SourceError`` where a value is no text.
        """
        join = self.joiner()
        if self.document is not None:
            return lambda values: NOT_KNOWN

        def make(values: Sequence[Any]) -> Text:
            if not PLAIN.issuperset(map(type, values)):
                if any(
                    value is NOT_KNOWN or isinstance(value, sa.ClauseElement) for value in values
                ):
                    return NOT_KNOWN
                for name, value in zip(self.columns, values, strict=True):
                    if value is not None and not isinstance(value, str):
                        raise SourceError(
                            f"{value!r} ({type(value).__name__}) stands in {name!r}, of which an "
                            "embedding is made, and is no text. Assign a str, or None."
                        )
            if null_text and values.count(None) == len(values):
                return None
            return join(values)

        return make

    def resolve(self, table: sa.FromClause) -> tuple[sa.Column[Any], ...]:
        """The source's columns on a table.

        Raises:
            SourceError: a column does not exist or does not hold text.
        """
        by_name: dict[str, Any] = {column.name: column for column in table.c}
        columns = []
        for name in self.columns:
            column = by_name.get(name, table.c.get(name))
            if column is None:
                raise SourceError(
                    f"The source of an embedding column names {name!r}, which table "
                    f"{_table_name(table)!r} does not have; its columns are "
                    f"{', '.join(sorted(by_name))}."
                )
            if not is_text(column.type):
                raise SourceError(
                    f"Column {_table_name(table)}.{name} has type {column.type!r}; a source is "
                    "made of text columns, since other types read differently in Python and in SQL."
                )
            columns.append(column)
        return tuple(columns)

    def expression(self, table: sa.FromClause) -> sa.ColumnElement[str]:
        """The text of a row as an SQL expression."""
        if self.document is not None:
            return _part_of_document(table, json.loads(self.document))
        columns = dict(zip(self.columns, self.resolve(table), strict=True))
        if self.pattern is None:
            values = [sa.func.nullif(column, "") for column in columns.values()]
            return sa.func.concat_ws(self.separator, *values, type_=sa.Text())
        parts: list[Any] = []
        for literal, name, _, _ in _parse(self.pattern):
            if literal:
                parts.append(sa.cast(literal, sa.Text()))
            if name is not None:
                parts.append(columns[name])
        return sa.func.concat(*parts, type_=sa.Text())

    @property
    def is_plain(self) -> bool:
        """Whether columns and separator say all."""
        return self.pattern is self.passages is self.document is None

    @property
    def place(self) -> tuple[str, ...]:
        """Columns beside the source's own by which the text of a passage is found."""
        return () if self.document is None else (*PLACE, *json.loads(self.document)["key"])

    def to_json(self) -> dict[str, Any]:
        """Plain data for a ``jsonb`` column; ``from_json`` reads it back."""
        data: dict[str, Any] = {
            "columns": list(self.columns),
            "separator": self.separator,
            "pattern": self.pattern,
        }
        for name in ("passages", "document"):
            settings = getattr(self, name)
            if settings is not None:
                data[name] = json.loads(settings)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Source:
        """The inverse of ``to_json``."""
        settings = [
            None if data.get(name) is None else json.dumps(data[name], sort_keys=True)
            for name in ("passages", "document")
        ]
        return cls(tuple(data["columns"]), data["separator"], data.get("pattern"), *settings)

    def __str__(self) -> str:
        if self.pattern is not None:
            return repr(self.pattern)
        columns = " + ".join(self.columns)
        return columns if self.passages is None else f"{columns}, cut as {self.passages}"


def _part_of_document(table: sa.FromClause, place: Mapping[str, Any]) -> sa.ColumnElement[str]:
    """The heading and the text of a passage, read out of the document that its key refers to."""
    keys = [next(iter(table.c[name].foreign_keys)) for name in place["key"]]
    try:
        names = [key.column.name for key in keys]
        schema, name = keys[0].column.table.schema, keys[0].column.table.name
    except sa.exc.NoReferencedTableError:
        # Reflected by itself: the other table is known by its name alone.
        names = [key.target_fullname.rpartition(".")[2] for key in keys]
        schema, _, name = keys[0].target_fullname.rpartition(".")[0].rpartition(".")
    columns: list[Any] = [sa.column(column) for column in (*names, place["column"])]
    document = sa.table(name, *columns, schema=schema or None).alias("passage_document")
    whole = sa.func.coalesce(document.c[place["column"]], "")
    part = sa.func.substr(whole, table.c.start + 1, table.c.stop - table.c.start)
    text = sa.func.concat_ws(GAP, sa.func.nullif(table.c.heading, ""), part, type_=sa.Text())
    same = [table.c[ours] == document.c[n] for ours, n in zip(place["key"], names, strict=True)]
    return sa.select(text).where(*same).correlate(table).scalar_subquery()


def _parse(pattern: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise SourceError(f"The template {pattern!r} is malformed: {error}.") from error


def is_text(type_: sa.types.TypeEngine[Any]) -> bool:
    """Whether Python and SQL read the same text from a column of this type."""
    if isinstance(type_, sa.types.TypeDecorator):
        # One that only chooses among text types is text; one that changes values (encryption, say)
        # has another text in Python than in the database.
        kind = type(type_)
        if (
            kind.process_bind_param is not sa.types.TypeDecorator.process_bind_param
            or kind.process_result_value is not sa.types.TypeDecorator.process_result_value
        ):
            return False
        type_ = type_.impl_instance
    return isinstance(type_, sa.String) and not isinstance(type_, sa.Enum)


def _table_name(table: sa.FromClause) -> str:
    return str(getattr(table, "fullname", None) or getattr(table, "name", table))


def digest(
    binding_id: uuid.UUID, text: str | None, wire: bytes | None, storage: Storage
) -> uuid.UUID | None:
    """What the companion of a fresh row holds; ``None`` where there is no text.

    Without a vector it says "failed for this text". The server hashes texts in its own encoding, so
    this is of use only where that is UTF8.
    """
    if text is None:
        return None
    return uuid.UUID(bytes=digests(binding_id, [text], [wire], storage)[0])


def digests(
    binding_id: uuid.UUID, texts: Sequence[str], wires: Sequence[bytes | None], storage: Storage
) -> list[bytes]:
    """As ``digest``, of many rows that have a text, 16 bytes each."""
    seed = _seed(binding_id.int)
    return [
        _hash(seed, _proven(wire, storage)) + _hash(seed, text.encode())
        for text, wire in zip(texts, wires, strict=True)
    ]


def proof(binding_id: uuid.UUID, wire: bytes | None, storage: Storage) -> str:
    """The half that proves a vector: 16 hexadecimal digits over its first eight dimensions."""
    return _hash(_seed(binding_id.int), _proven(wire, storage)).hex()


def companion_name(column: str) -> str:
    """Name of the companion of an embedding column: ``embedding_of`` for ``embedding``.

    Where that would be longer than PostgreSQL's 63 bytes it is made of a digest of the name.
    """
    encoded = column.encode()
    if len(encoded) + len("_of") <= _LONGEST_NAME:
        return f"{column}_of"
    return f"of_{hashlib.sha256(encoded).hexdigest()[:HALF]}"


def _proven(wire: bytes | None, storage: Storage) -> bytes:
    """What the proof of a vector covers: its first dimensions, in the same format."""
    if wire is None:
        return b"-"
    end = HEADER.size + PROVEN_DIMENSIONS * ELEMENT[storage].itemsize
    if len(wire) > end:
        wire = _PROVEN_HEADER + wire[HEADER.size : end]
    return wire.hex().encode()


def _hash(seed: bytes, content: bytes) -> bytes:
    return hashlib.sha256(seed + content).digest()[: HALF // 2]


@cache
def _seed(number: int) -> bytes:
    """An identity as text, which every hash begins with; made once, as it costs more than one."""
    return str(uuid.UUID(int=number)).encode()
