"""Candidates for what made a column's vectors: encoders, and ways to make a row's text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from sbert_pg import system
from sbert_pg.errors import SourceError
from sbert_pg.freshness.audit import Comparison
from sbert_pg.source import Source, is_text
from sbert_pg.spec import TextEncoder

#: What home-made code joins columns with.
SEPARATORS = (" ", "\n", "\n\n", ". ", ": ", ", ")
#: More text columns than this are only tried alone.
MOST_JOINED = 5


@dataclass(frozen=True, slots=True)
class Text:
    """A way to make a row's text, from values that were read together; ``remedy`` is what turns it
    into something that can be a source, where no source can be it.
    """

    source: Source | None
    label: str
    positions: tuple[int, ...]
    join: Callable[[Sequence[Any]], str]
    remedy: str | None = None

    def of(self, values: Sequence[Any]) -> str:
        """The text of one row's values."""
        return self.join([values[i] for i in self.positions])


@dataclass(frozen=True, slots=True)
class Candidate:
    """An encoder and a way to make the text, and how the sampled rows agree with them."""

    encoder: TextEncoder
    text: Text
    comparison: Comparison

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = {"encoder": self.encoder.spec.name, "text": self.text.label}
        return names | self.comparison.figures()

    def __str__(self) -> str:
        return f"{self.encoder.spec.name} on {self.text.label}: {self.comparison}"


def single_texts(columns: Sequence[sa.Column[Any]]) -> list[Text]:
    """Each text column alone; columns are ``readable_columns``, whose places are the positions."""
    names = [column.name for column in columns if is_text(column.type)]
    return [
        Text(Source.of(name), name, (i,), Source.of(name).joiner()) for i, name in enumerate(names)
    ]


def joined_texts(columns: Sequence[sa.Column[Any]]) -> list[Text]:
    """Two text columns joined, in both orders and by each of the separators."""
    names = [column.name for column in columns if is_text(column.type)]
    if len(names) > MOST_JOINED:
        return []
    texts = []
    for pair in permutations(range(len(names)), 2):
        for separator in SEPARATORS:
            source = Source((names[pair[0]], names[pair[1]]), separator)
            label = f"{source} joined by {separator!r}"
            texts.append(Text(source, label, pair, source.joiner()))
    return texts


def hidden_texts(columns: Sequence[sa.Column[Any]], rows: Sequence[Sequence[Any]]) -> list[Text]:
    """Texts inside JSON documents, which cannot be a source; ``rows`` as the columns are read."""
    texts = []
    for i, column in enumerate(columns):
        if is_text(column.type):
            continue
        documents = [row[i] for row in rows if isinstance(row[i], dict)]
        for key in sorted({key for document in documents for key in document}):
            strings = sum(isinstance(document.get(key), str) for document in documents)
            if strings * 2 < len(rows):
                continue
            quote, literal = system.PLAIN.identifier_preparer.quote, key.replace("'", "''")
            table = system.written_name(column.table.schema, column.table.name)
            remedy = (
                f"ALTER TABLE {table} ADD COLUMN "
                f"{quote(f'{key}_text')} text GENERATED ALWAYS AS "
                f"({quote(column.name)} ->> '{literal}') STORED"
            )
            label = f"{column.name} ->> {key!r}"
            texts.append(Text(None, label, (i,), _from_json(key), remedy))
    return texts


def _from_json(key: str) -> Callable[[Sequence[Any]], str]:
    def join(values: Sequence[Any]) -> str:
        value = values[0].get(key) if isinstance(values[0], dict) else None
        return value if isinstance(value, str) else ""

    return join


def texts_of_sources(
    table: sa.Table, columns: Sequence[sa.Column[Any]], sources: Iterable[Source]
) -> list[Text]:
    """The sources that a caller names; refused where one is not of texts, or cut into passages."""
    names = [column.name for column in columns]
    texts = []
    for source in sources:
        if source.passages is not None or source.document is not None:
            raise SourceError(
                f"{source} cannot be adopted: a vector says nothing of how its document is cut. "
                "Declare passages_of(...) and have a worker fill it."
            )
        source.resolve(table)
        positions = tuple(names.index(name) for name in source.columns)
        label = str(source)
        if len(source.columns) > 1 and source.pattern is None:
            label += f" joined by {source.separator!r}"
        texts.append(Text(source, label, positions, source.joiner()))
    return texts


def readable_columns(table: sa.Table, keys: Sequence[str]) -> list[sa.Column[Any]]:
    """Columns that a text may be made of: text columns first, then JSON documents.

    A key is its own text only where it is all that there is.
    """
    texts = [column for column in table.columns if is_text(column.type)]
    others = [column for column in texts if column.name not in keys]
    documents = [column for column in table.columns if isinstance(column.type, (sa.JSON, JSONB))]
    return [*others, *(column for column in texts if column.name in keys), *documents]
