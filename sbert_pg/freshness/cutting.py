"""Documents to passages and vectors: read one after the other, cut, and encoded where need be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from sbert_pg.freshness.encoding import Embedded, embed
from sbert_pg.freshness.passages import Cut, StoredPassages
from sbert_pg.freshness.queue import Row
from sbert_pg.freshness.rows import Rows
from sbert_pg.freshness.settings import Database
from sbert_pg.passages.cutting import Chunker, chunker_of, cut, digest_of, embedded_text
from sbert_pg.registry import get_encoder
from sbert_pg.spec import TextEncoder

#: Texts encoded by one call, and bytes of documents read by one statement and in one batch; a
#: larger document is alone.
_TEXTS, _READ, _BATCH = 1_024, 1 << 20, 32 << 20


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts and encodes the documents of a column."""

    database: Database
    rows: Rows
    stored: StoredPassages
    chunker: Chunker
    tokens: TextEncoder
    encoder: TextEncoder
    passage_encoder: TextEncoder

    @classmethod
    def of(
        cls, database: Database, rows: Rows, encoder: TextEncoder, passage_encoder: TextEncoder
    ) -> Cutter:
        """What cuts the documents of a column as their source says."""
        stored = rows.passages
        assert stored is not None
        return cls(database, rows, stored, *_cuts_by(stored), encoder, passage_encoder)

    def embed(self, batch: Sequence[Row]) -> Embedded:
        """Cut and encode documents; rows that are left out are pending still."""
        work = _Work(self)
        for row, columns, digests in self._documents(batch):
            work.add(row, columns, digests)
        return work.finish()

    def _documents(
        self, batch: Sequence[Row]
    ) -> Iterator[tuple[Row, Sequence[str | None], set[str]]]:
        """Documents whose text is the one that was claimed, and digests of what they have."""
        with self.database.begin() as connection:
            sizes = dict(self._read(connection, batch, self._size()))
        read = 0
        for group in _grouped(batch, sizes):
            read += sum(sizes.get(row.label, 0) for row in group)
            if read > _BATCH and group[0] is not batch[0]:
                return
            with self.database.begin() as connection:
                columns = [self.rows.table.c[name] for name in self.rows.binding.source.columns]
                texts = dict(self._read(connection, group, self.rows.of, *columns))
                digests = {row.label: self.stored.digests(connection, row.key) for row in group}
            for row in group:
                columns_now: list[Any] | None = texts.get(row.label)
                if columns_now is not None and columns_now[0] == row.of:
                    yield row, columns_now[1:], digests[row.label]

    def _size(self) -> sa.ColumnElement[int]:
        body = self.rows.table.c[self.rows.binding.source.columns[-1]]
        return sa.func.coalesce(sa.func.octet_length(body), 0)

    def _read(
        self, connection: sa.Connection, rows: Sequence[Row], *columns: sa.ColumnElement[Any]
    ) -> Iterator[tuple[str, Any]]:
        for row in self.rows.columns_of(connection, rows, columns):
            values: list[Any] = list(row[1:])
            yield rows[row[0] - 1].label, values if len(values) > 1 else values[0]


def _cuts_by(stored: StoredPassages) -> tuple[Chunker, TextEncoder]:
    return chunker_of(stored.settings["chunker"]), get_encoder(stored.settings["encoder"])


def is_cut_as(
    stored: StoredPassages, columns: Sequence[str | None], passages: list[Any] | None
) -> bool:
    """Whether a document has the passages that it should have, by ``StoredPassages.as_json``."""
    *titles, body = columns
    if all(value is None for value in columns):
        return not passages
    return passages == [list(one) for one in cut(titles, body or "", *_cuts_by(stored))]


def _grouped(batch: Sequence[Row], sizes: dict[str, int]) -> Iterator[list[Row]]:
    group: list[Row] = []
    total = 0
    for row in batch:
        size = sizes.get(row.label, 0)
        if group and total + size > _READ:
            yield group
            group, total = [], 0
        group.append(row)
        total += size
    if group:
        yield group


@dataclass(slots=True)
class _Work:
    """A batch on its way; every different text is encoded once."""

    cutter: Cutter
    result: Embedded = field(default_factory=Embedded)
    #: Digest of the whole text by label, and its vector or the reason why there is none.
    whole_of: dict[str, str] = field(default_factory=dict)
    wholes: dict[str, bytes | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    waiting_wholes: dict[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        """Whether documents and passages have one encoder, and so one vector for one text."""
        documents, passages = self.cutter.rows.binding, self.cutter.stored.binding
        return (documents.declared, documents.storage) == (passages.declared, passages.storage)

    def add(self, row: Row, columns: Sequence[str | None], digests: set[str]) -> None:
        """Cut a document, and have encoded what of it is not."""
        cutter = self.cutter
        if row.of is None:
            self.result.vectors[row.label] = None
            return
        *titles, body = columns
        passages = []
        for passage in cut(titles, body or "", cutter.chunker, cutter.tokens):
            passages.append(passage)
            if passage.digest not in digests and passage.digest not in self.result.passages:
                part = (body or "")[passage.start : passage.stop]
                self.waiting[passage.digest] = embedded_text(passage.heading, part)
                self._encode_if(len(self.waiting) >= _TEXTS)
        whole = cutter.rows.binding.source.joiner()(columns)
        digest = self.whole_of[row.label] = digest_of(whole)
        if digest not in self.wholes:
            self.waiting_wholes[digest] = whole
        self.result.cuts[row.label] = Cut(
            passages, body if cutter.stored.settings["copy"] else None
        )
        self._encode_if(len(self.waiting) + len(self.waiting_wholes) >= _TEXTS)

    def finish(self) -> Embedded:
        """Encode the rest."""
        self._encode_if(True)
        for label, digest in self.whole_of.items():
            if self.wholes.get(digest) is not None:
                self.result.vectors[label] = self.wholes[digest]
            else:
                self.result.failures[label] = self.reasons[digest]
        return self.result

    def _encode_if(self, due: bool) -> None:
        if not due:
            return
        cutter, passages = self.cutter, dict(self.waiting)
        if self.shared:
            passages |= self.waiting_wholes
        done = embed(cutter.stored.binding, cutter.passage_encoder, _rows(passages))
        self.result.texts += done.texts
        vectors = {digest: v for digest, v in done.vectors.items() if v is not None}
        self.result.passages.update(
            {digest: v for digest, v in vectors.items() if digest in self.waiting}
        )
        if not self.shared:
            done = embed(cutter.rows.binding, cutter.encoder, _rows(self.waiting_wholes))
            self.result.texts += done.texts
        for digest in self.waiting_wholes:
            self.wholes[digest] = done.vectors.get(digest)
        self.reasons |= done.failures
        self.waiting.clear()
        self.waiting_wholes.clear()


def _rows(texts: dict[str, str]) -> list[Row]:
    return [Row((), digest, False, text, digest) for digest, text in texts.items()]
