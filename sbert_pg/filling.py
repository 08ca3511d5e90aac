"""From the values of a row to the vectors of its embedding columns.

The flush, bulk statements and the loader meet here: what the text of a row is, which texts can be
known in this process, and how a batch of them is encoded with errors that name the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from sbert_pg.errors import DimensionError, EncodingError
from sbert_pg.registry import get_encoder
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import Embedding
from sbert_pg.types.offload import off_loop

Vectors = npt.NDArray[np.float32]


class NotKnown:
    """Type of ``NOT_KNOWN``."""

    def __repr__(self) -> str:
        return "NOT_KNOWN"


#: Stands for a source value that was not given, and for a text that hangs on one.
NOT_KNOWN: Final = NotKnown()
#: A text, none because all is ``NULL``, or none that this process could know.
Text = str | NotKnown | None


@dataclass(frozen=True)
class Filling:
    """One embedding column of a table, with the columns that its text is made of."""

    column: sa.Column[Any]
    source_columns: tuple[sa.Column[Any], ...]

    @property
    def spec(self) -> EncoderSpec:
        """The column's encoder, as declared."""
        spec: EncoderSpec = self.column.type.encoder  # type: ignore[attr-defined]
        return spec

    @cached_property
    def _join(self) -> Callable[[Sequence[Any]], str]:
        source: Source = self.column.type.source  # type: ignore[attr-defined]
        return source.joiner()

    def text_of(self, values: Sequence[Any]) -> Text:
        """The text of the source's values, in the order of the source's columns.

        Returns:
            The text; ``None`` where every value is ``NULL``, since then the vector is ``NULL`` too
            (unless the column forbids it); ``NOT_KNOWN`` where a value is an SQL expression or was
            not given.
        """
        if any(value is NOT_KNOWN or isinstance(value, sa.ClauseElement) for value in values):
            return NOT_KNOWN
        if self.column.nullable and all(value is None for value in values):
            return None
        return self._join(values)

    def text_of_new(self, values: Sequence[Any]) -> Text:
        """As ``text_of``, for a row to be inserted, where ``NOT_KNOWN`` takes its default.

        A default that only the server or the insertion computes stays unknown: this process cannot
        know the text, and the row will be pending.
        """
        return self.text_of(
            [
                default_of(column) if value is NOT_KNOWN else value
                for column, value in zip(self.source_columns, values, strict=True)
            ]
        )


def default_of(column: sa.Column[Any]) -> Any:
    """What a new row gets where no value is given, or ``NOT_KNOWN``."""
    default: Any = column.default
    if default is not None:
        return default.arg if default.is_scalar else NOT_KNOWN
    return None if column.server_default is None else NOT_KNOWN


def fillings_of(table: sa.Table) -> tuple[Filling, ...]:
    """The embedding columns of a table.

    Raises:
        SourceError: a source names a column that the table does not have, or one that is not text.
    """
    return tuple(
        Filling(column, column.type.source.resolve(table))
        for column in table.columns
        if isinstance(column.type, Embedding)
    )


@dataclass(frozen=True, slots=True)
class TextJob:
    """One text to encode: for which column, where the vector goes, and what an error calls it."""

    filling: Filling
    text: str
    store: Callable[[Vectors], None]
    label: Callable[[], str]


def encode_jobs(jobs: Sequence[TextJob]) -> None:
    """Encode all jobs, one batch for each encoder, and store their vectors.

    Nothing is stored unless everything could be encoded.

    Raises:
        EncodingError: a text cannot be encoded; the message names its row.
        EncoderError: an encoder cannot be loaded.
    """
    by_encoder: dict[EncoderSpec, list[TextJob]] = {}
    for job in jobs:
        by_encoder.setdefault(job.filling.spec, []).append(job)
    encoded = [(group, _encode(spec, group)) for spec, group in by_encoder.items()]
    for group, vectors in encoded:
        for job, vector in zip(group, vectors, strict=True):
            # A copy, so that one vector that is kept does not keep its whole batch.
            job.store(vector.copy())


def _encode(spec: EncoderSpec, group: Sequence[TextJob]) -> Vectors:
    return encode_documents(spec, [job.text for job in group], lambda i: group[i].label())


def encode_documents(
    spec: EncoderSpec, texts: Sequence[str], label: Callable[[int], str]
) -> Vectors:
    """Encode texts with the encoder that a column declares, each of several equal ones once.

    Args:
        spec: the encoder.
        texts: the texts.
        label: what an error calls the text at a position.

    Returns:
        float32 array of shape ``(len(texts), dimensions)``.

    Raises:
        EncodingError: a text cannot be encoded.
        DimensionError: the encoder's width is not the declared one.
    """
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        first.setdefault(text, number)
    try:
        vectors = off_loop(
            lambda: np.asarray(get_encoder(spec).encode_document(list(first)), dtype=np.float32)
        )
    except EncodingError as error:
        if error.index is None:
            raise
        index = list(first.values())[error.index]
        raise EncodingError(f"Cannot embed {label(index)}: {error}", index=index) from error
    if vectors.shape != (len(first), spec.dimensions):
        raise DimensionError(
            f"Encoder {spec.name!r} gave vectors of shape {vectors.shape} for {len(first)} texts "
            f"where {spec.dimensions} dimensions are declared. Correct the declaration."
        )
    if len(first) == len(texts):
        return vectors
    position = {text: i for i, text in enumerate(first)}
    return np.asarray(vectors[[position[text] for text in texts]])


def embed_rows(
    table: sa.Table, rows: Iterable[Mapping[str, Any]], *, first: int = 0
) -> list[dict[str, Any]]:
    """Rows of a Core insert, with the vectors that they lack.

    Args:
        table: a table with embedding columns.
        rows: mappings from column key to value; a vector that is given is kept.
        first: number of the first row, for messages.

    Returns:
        New dictionaries, in order. A row whose text is only known to the server stays without a
        vector.

    Raises:
        EncodingError: a text cannot be encoded; the message names the row's number.
    """
    filled = [dict(row) for row in rows]
    jobs = []
    for filling in fillings_of(table):
        key = filling.column.key
        source_keys = [column.key for column in filling.source_columns]
        for number, row in enumerate(filled):
            # Core takes the columns of all rows from the first.
            if row.setdefault(key) is not None:
                continue
            text = filling.text_of_new([row.get(k, NOT_KNOWN) for k in source_keys])
            if isinstance(text, str):
                jobs.append(_row_job(filling, text, row, key, first + number))
    encode_jobs(jobs)
    return filled


def _row_job(filling: Filling, text: str, row: dict[str, Any], key: str, number: int) -> TextJob:
    return TextJob(
        filling,
        text,
        lambda vector: row.__setitem__(key, vector),
        lambda: f"{key} of row {number} of {filling.column.table}",
    )
