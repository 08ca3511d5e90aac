"""Which encoder and source made a column's vectors: candidates, and how they agree with rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from sbert_pg.probes import MAX_LENGTH_RATIO, PRECISION_MIN_COSINE
from sbert_pg.source import Source
from sbert_pg.spec import TextEncoder, Vectors

#: What home-made code joins columns with.
SEPARATORS = (" ", "\n", "\n\n", ". ", ": ", ", ")
#: More text columns than this are only tried alone.
MOST_JOINED = 5


@dataclass(frozen=True, slots=True)
class Text:
    """A way to make a row's text, from values that were read together.

    Attributes:
        source: the source that it is, ``None`` where no source can be it.
        label: what a report calls it.
        positions: which of the values it reads.
        join: from these values to the text.
        remedy: what turns it into something that can be a source.
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
class Evidence:
    """How one candidate agrees with the sampled rows.

    Attributes:
        encoder: name of the encoder.
        text: the source, in words.
        rows: rows compared.
        agreeing: rows whose vector is the candidate's, within the error of quantisation.
        mean: mean cosine over all rows.
        median: median cosine.
        worst: lowest cosine.
        doubtful: keys of the rows that do not agree.
    """

    encoder: str
    text: str
    rows: int
    agreeing: int
    mean: float
    median: float
    worst: float
    doubtful: tuple[str, ...]

    @property
    def share(self) -> float:
        """Agreeing share of the rows."""
        return self.agreeing / self.rows if self.rows else 0.0

    def __str__(self) -> str:
        return (
            f"{self.encoder} on {self.text}: {self.agreeing} of {self.rows} rows agree "
            f"(cosine mean {self.mean:.4f}, median {self.median:.4f}, worst {self.worst:.4f})"
        )


def single_texts(table: sa.Table, keys: Sequence[str]) -> list[Text]:
    """Each text column alone; positions are those of ``readable_columns``."""
    names = [column.name for column in readable_columns(table, keys) if _is_text(column)]
    return [
        Text(Source.of(name), name, (i,), Source.of(name).joiner()) for i, name in enumerate(names)
    ]


def joined_texts(table: sa.Table, keys: Sequence[str]) -> list[Text]:
    """Two text columns joined, in both orders and by each of the separators."""
    names = [column.name for column in readable_columns(table, keys) if _is_text(column)]
    if len(names) > MOST_JOINED:
        return []
    found = []
    for pair in permutations(range(len(names)), 2):
        for separator in SEPARATORS:
            source = Source((names[pair[0]], names[pair[1]]), separator)
            label = f"{source} joined by {separator!r}"
            found.append(Text(source, label, pair, source.joiner()))
    return found


def hidden_texts(table: sa.Table, keys: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[Text]:
    """Texts inside JSON documents, which no trigger can watch; ``rows`` as the columns are read."""
    found = []
    for i, column in enumerate(readable_columns(table, keys)):
        if _is_text(column):
            continue
        documents = [row[i] for row in rows if isinstance(row[i], dict)]
        for key in sorted({key for document in documents for key in document}):
            texts = sum(isinstance(document.get(key), str) for document in documents)
            if texts * 2 < len(rows):
                continue
            remedy = (
                f"ALTER TABLE {table.fullname} ADD COLUMN {key}_text text GENERATED ALWAYS AS "
                f"({column.name} ->> '{key}') STORED"
            )
            label = f"{column.name} ->> {key!r}"
            found.append(Text(None, label, (i,), _from_json(key), remedy))
    return found


def _from_json(key: str) -> Callable[[Sequence[Any]], str]:
    def join(values: Sequence[Any]) -> str:
        value = values[0].get(key) if isinstance(values[0], dict) else None
        return value if isinstance(value, str) else ""

    return join


def given_texts(table: sa.Table, keys: Sequence[str], sources: Iterable[Source]) -> list[Text]:
    """The sources that a caller names.

    Raises:
        SourceError: one names a column that the table lacks, or one that is no text.
    """
    names = [column.name for column in readable_columns(table, keys)]
    found = []
    for source in sources:
        source.resolve(table)
        positions = tuple(names.index(name) for name in source.columns)
        label = str(source)
        if len(source.columns) > 1 and source.pattern is None:
            label += f" joined by {source.separator!r}"
        found.append(Text(source, label, positions, source.joiner()))
    return found


def readable_columns(table: sa.Table, keys: Sequence[str]) -> list[sa.Column[Any]]:
    """Columns that a text may be made of: text columns first, then JSON documents.

    A key is a text of its own only where it is all that there is.
    """
    texts = [column for column in table.columns if _is_text(column)]
    others = [column for column in texts if column.name not in keys]
    documents = [column for column in table.columns if isinstance(column.type, (sa.JSON, JSONB))]
    return [*others, *(column for column in texts if column.name in keys), *documents]


def _is_text(column: sa.Column[Any]) -> bool:
    return isinstance(column.type, sa.String) and not isinstance(column.type, sa.Enum)


def weigh(
    encoder: TextEncoder,
    text: Text,
    keys: Sequence[str],
    values: Sequence[Sequence[Any]],
    stored: Sequence[Vectors],
) -> Evidence:
    """Encode the rows' texts again and compare.

    Args:
        encoder: the encoder.
        text: how a row's text is made.
        keys: the rows' keys.
        values: the rows' values, in the order of ``readable_columns``.
        stored: the rows' vectors, of whatever width they have.
    """
    encoded = np.asarray(
        encoder.encode_document([text.of(row) for row in values]), dtype=np.float64
    )
    cosines = np.zeros(len(keys))
    agrees = np.zeros(len(keys), dtype=bool)
    by_length = encoder.spec.similarity != "cosine"
    for i, vector in enumerate(stored):
        if vector.shape != encoded[i].shape:
            continue
        there, made = np.linalg.norm(vector), np.linalg.norm(encoded[i])
        cosines[i] = vector.astype(np.float64) @ encoded[i] / max(there * made, 1e-12)
        ratio = max(there, made) / max(min(there, made), 1e-12)
        agrees[i] = cosines[i] >= PRECISION_MIN_COSINE and (
            not by_length or ratio <= MAX_LENGTH_RATIO
        )
    return Evidence(
        encoder=encoder.spec.name,
        text=text.label,
        rows=len(keys),
        agreeing=int(agrees.sum()),
        mean=float(cosines.mean()) if len(keys) else 0.0,
        median=float(np.median(cosines)) if len(keys) else 0.0,
        worst=float(cosines.min()) if len(keys) else 0.0,
        doubtful=tuple(key for key, good in zip(keys, agrees, strict=True) if not good),
    )
