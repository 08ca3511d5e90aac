"""From the values of a row to its text, and to the vectors of its embedding columns.

The flush, bulk statements and the loader meet here: what the text of a row is, which texts can be
known in this process, and how a batch of them is encoded with errors that name the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg.catalog import guard
from sbert_pg.catalog.embedding import Embedding, companion_of, default_of
from sbert_pg.catalog.record import Binding
from sbert_pg.errors import DeclarationError, EncodingError
from sbert_pg.registry import get_encoder, off_loop
from sbert_pg.source import NOT_KNOWN, Text
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors, vectors_of
from sbert_pg.system import ColumnIdentity, identity_of
from sbert_pg.types.comparator import clause_of


@dataclass(frozen=True)
class EmbeddingColumn:
    """An embedding column of a table, its companion, and the columns that its text is made of."""

    column: sa.Column[Any]
    companion: sa.Column[Any] | None
    source_columns: tuple[sa.Column[Any], ...]
    identity: ColumnIdentity

    @property
    def type(self) -> Embedding:
        """The column's type."""
        type_: Embedding = self.column.type  # type: ignore[assignment]
        return type_

    @property
    def is_cut(self) -> bool:
        """Whether it is of documents that are cut into passages, which its writers leave alone."""
        return self.type.source.passages is not None

    @property
    def spec(self) -> EncoderSpec:
        """The column's encoder, as declared."""
        return self.type.encoder

    def binding(self, connection: Connection) -> Binding | None:
        """The column's binding, for a writer; ``None`` where it is not bound."""
        if self.companion is None:
            return None
        return guard.binding_for_write(connection, self.identity, self.spec)

    @cached_property
    def text_of(self) -> Callable[[Sequence[Any]], Text]:
        """From the source's values, in the order of the source's columns, to the text of a row.

        ``None`` where every value is ``NULL``, since then the vector is ``NULL`` too (unless the
        column forbids it); see ``Source.text_maker``.
        """
        return self.type.source.text_maker(null_text=bool(self.column.nullable))

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


def embedding_columns(declared: Any) -> tuple[EmbeddingColumn, ...]:
    """The embedding columns of a table, mapped class, base, metadata or column, or of several."""
    return tuple(
        EmbeddingColumn(
            column,
            companion_of(column),
            column.type.source.resolve(column.table),
            identity_of(column),
        )
        for column in dict.fromkeys(_columns(declared))
        if isinstance(column.type, Embedding)
    )


def columns_filled(table: sa.Table, known: Set[sa.Column[Any]]) -> tuple[EmbeddingColumn, ...]:
    """The embedding columns that a writer fills who knows these columns of the table.

    The others are left to workers, or belong to a sibling class in the same table.
    """
    return tuple(
        each
        for each in embedding_columns(table)
        if not each.is_cut and known >= {each.column, *each.source_columns}
    )


def _columns(declared: Any) -> Iterator[sa.Column[Any]]:
    declared = clause_of(declared)
    for attribute in ("__table__", "metadata"):
        if not isinstance(declared, (sa.Column, sa.Table)):
            declared = getattr(declared, attribute, declared)
    if isinstance(declared, sa.Column):
        yield declared
        return
    parts = declared
    if isinstance(declared, sa.Table):
        parts = declared.columns
    elif isinstance(declared, sa.MetaData):
        parts = declared.tables.values()
    # The parts of a text are texts, without an end.
    for part in parts if isinstance(parts, Iterable) and not isinstance(parts, str) else ():
        yield from _columns(part)


def target_of(table: Any) -> tuple[sa.Table, dict[str, sa.Column[Any]]]:
    """The table of a ``Table`` or mapped class, and its columns by the names that rows use."""
    if isinstance(table, sa.Table):
        return table, dict(table.columns.items())
    mapper = sa.inspect(table, raiseerr=False)
    local = getattr(mapper, "local_table", None)
    if mapper is None or not isinstance(local, sa.Table):
        raise DeclarationError(f"{table!r} is neither a table nor a mapped class.")
    if mapper.inherits is not None and mapper.local_table is not mapper.inherits.local_table:
        raise DeclarationError(
            f"{mapper.class_.__name__} is stored in several tables. Give the rows of each table, "
            "the parent's first, or use session.execute(insert(...), rows)."
        )
    columns = {}
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        if isinstance(column, sa.Column) and column.table is local:
            columns[attribute.key] = column
    return local, columns


@dataclass(frozen=True, slots=True)
class TextJob:
    """One text to encode: for which column, where the vector goes, and what an error calls it."""

    column: EmbeddingColumn
    text: str
    store: Callable[[Vectors], None]
    label: Callable[[], str]


def encode_jobs(jobs: Sequence[TextJob]) -> None:
    """Encode all jobs, one batch for each encoder, and store their vectors.

    Nothing is stored unless everything could be encoded.
    """
    by_encoder: dict[EncoderSpec, list[TextJob]] = {}
    for job in jobs:
        by_encoder.setdefault(job.column.spec, []).append(job)
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
    """Vectors of texts, ``(texts, dimensions)``, equal ones encoded once; a label is for errors."""
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        first.setdefault(text, number)
    try:
        output = off_loop(lambda: get_encoder(spec).encode_document(list(first)))
    except EncodingError as error:
        if error.index is None:
            raise
        index = list(first.values())[error.index]
        raise EncodingError(f"Cannot embed {label(index)}: {error}", index=index) from error
    vectors = vectors_of(spec, output, len(first))
    if len(first) == len(texts):
        return vectors
    position = {text: i for i, text in enumerate(first)}
    return np.asarray(vectors[[position[text] for text in texts]])


def cut_so_far(encoder: TextEncoder) -> int | None:
    """Texts that an encoder has cut off in this process, for whomever; ``None`` without a count."""
    counted = getattr(getattr(encoder, "statistics", None), "truncated", None)
    return counted if isinstance(counted, int) else None


def count_cut(encoder: TextEncoder, texts: Sequence[str]) -> int | None:
    """How many of some documents are longer than an encoder reads; ``None`` where it cannot say."""
    count = getattr(encoder, "count_tokens", None)
    if count is None:
        return None
    limit, prompt = encoder.spec.max_seq_length, encoder.spec.document_prompt
    if limit is None:
        return 0
    lengths: list[int] = count([prompt + text for text in texts])
    return sum(length > limit for length in lengths)


def embed_rows(
    table: Any, rows: Iterable[Mapping[str, Any]], *, first: int = 0
) -> list[dict[str, Any]]:
    """Rows of an insert, with the vectors that they lack.

    They are for ``connection.execute(insert(table), rows)``, which also writes what the vectors
    were made from. The text and its vector belong together from here on: change neither alone.

    Args:
        table: a mapped class, whose rows are given by attribute names, or a ``Table``.
        rows: mappings from name to value; a vector that is given is kept.
        first: number of the first row, for messages.

    Returns:
        New dictionaries, in order. A row whose text is only known to the server stays without a
        vector. Values of the source that a row lacks are written out, as their defaults.

    Raises:
        EncodingError: a text cannot be encoded; the message names the row's number.
        DeclarationError: ``table`` is neither, or the class is stored in several tables.
    """
    if isinstance(rows, (Mapping, str)) or not isinstance(rows, Iterable):
        raise DeclarationError(f"embed_rows() takes a list of rows, and got {rows!r}.")
    target, names = target_of(table)
    key_of = {column: key for key, column in names.items()}
    embedded = [dict(row) for row in rows]
    jobs = []
    for column in columns_filled(target, key_of.keys()):
        key = key_of[column.column]
        for number, row in enumerate(embedded):
            # Core takes the columns of all rows from the first.
            if row.setdefault(key) is not None:
                continue
            text = column.text_of_new(
                [_written_out(row, key_of[c], c) for c in column.source_columns]
            )
            if isinstance(text, str):
                of = f"row {first + number} of {target}"
                jobs.append(row_job(column, text, row, key, of))
    encode_jobs(jobs)
    return embedded


def _written_out(row: dict[str, Any], key: str, column: sa.Column[Any]) -> Any:
    """A value of a row, which the row gets where only its default is known."""
    if key in row:
        return row[key]
    default = default_of(column)
    if default is not NOT_KNOWN:
        row[key] = default
    return default


def row_job(column: EmbeddingColumn, text: str, row: dict[str, Any], key: str, of: str) -> TextJob:
    """The job whose vector goes into a row, under a key; ``of`` says in errors which it is."""
    return TextJob(
        column, text, lambda vector: row.__setitem__(key, vector), lambda: f"{key} of {of}"
    )
