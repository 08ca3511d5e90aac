"""Adopt: bind a column of existing vectors, after proving which encoder and source made it.

Nothing is encoded but a sample. The sample proves what made the column and how many of its rows
agree; then every other row gets the digest of its text and vector, as if it had been written by
this library. ``sbert-pg audit`` looks at every row afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import REGCLASS

from sbert_pg import catalog
from sbert_pg.catalog import Binding, rows
from sbert_pg.catalog.record import qualified
from sbert_pg.errors import AlreadyBoundError, NotProvenError
from sbert_pg.freshness.audit import compare
from sbert_pg.probes import measured
from sbert_pg.reembed.candidates import (
    Candidate,
    Text,
    hidden_texts,
    joined_texts,
    readable_columns,
    single_texts,
    texts_of_sources,
)
from sbert_pg.reembed.change import build_queue, reflect
from sbert_pg.reembed.digests import adopt_rows, current_snapshot
from sbert_pg.registry import find_encoder
from sbert_pg.source import Source
from sbert_pg.spec import PRECISIONS, EncoderSpec, TextEncoder, Vectors, known_encoder
from sbert_pg.system import ATTEMPTS, LOCK_TIMEOUT, ColumnIdentity, in_short_transactions
from sbert_pg.types.vector import VectorType

#: Rows that the proof looks at.
SAMPLE = 200
#: Rows by which candidates are compared.
SCREEN = 12
#: Least share of the rows that has to agree.
MIN_SHARE = 0.95
#: Candidates that a report names beside the best.
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Proof:
    """What a sample says about a column.

    Attributes:
        table: the table.
        column: the column.
        rows: rows with a vector.
        best: the candidate that agrees best, ``None`` where there was none to try.
        source: its source, where it can be one.
        others: the next candidates.
        proven: whether the best one made the column.
        reason: why not, or what to know.
    """

    table: str
    column: str
    rows: int
    best: Candidate | None
    source: Source | None
    others: tuple[Candidate, ...]
    proven: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "table": self.table,
            "column": self.column,
            "rows": self.rows,
            "best": None if self.best is None else self.best.to_json(),
            "source": None if self.source is None else self.source.to_json(),
            "others": [other.to_json() for other in self.others],
            "proven": self.proven,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        lines = [f"{self.table}.{self.column}: {self.rows:,} rows with a vector"]
        if self.best is not None:
            lines.append(f"  {'proven' if self.proven else 'not proven'}: {self.best}")
            doubtful = self.best.comparison.doubtful
            if doubtful and self.proven:
                named = ", ".join(doubtful[:20])
                lines.append(f"  doubtful rows: {named}")
        lines.extend(f"  rather than: {other}" for other in self.others)
        if self.reason:
            lines.append(f"  {self.reason}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Adoption:
    """A column that was bound, and on what proof.

    Attributes:
        binding: the binding.
        proof: the proof.
        adopted: rows whose vector counts as the encoder's from now on.
        pending: rows with a vector that wait for a worker: those of the sample that do not agree,
            and rows that were written while the others were adopted.
    """

    binding: Binding
    proof: Proof
    adopted: int
    pending: int


class _Column:
    """The column that is to be adopted, and a sample of it."""

    def __init__(self, connection: sa.Connection, identity: ColumnIdentity, size: int) -> None:
        self.table = reflect(connection, identity.schema, identity.table)
        column = self.table.c.get(identity.column)
        if column is None or not isinstance(column.type, VectorType):
            what = "does not exist" if column is None else f"has type {column.type!r}"
            raise NotProvenError(f"{identity} is not a vector column: it {what}.")
        self.column = column
        self.width: int | None = column.type.dimensions
        self.keys = self._keys(connection, identity)
        key_columns = [self.table.c[name] for name in self.keys]
        self.readable = readable_columns(self.table, self.keys)
        self.rows: int = connection.execute(
            sa.select(sa.func.count(column)).select_from(self.table)
        ).scalar_one()
        drawn = rows.sample(
            connection,
            self.table,
            self.keys,
            [rows.label(key_columns), column, *key_columns, *self.readable],
            where=[column.is_not(None)],
            size=size,
        )
        self.labels = [row[0] for row in drawn]
        self.vectors: list[Vectors] = [row[1] for row in drawn]
        end = 2 + len(self.keys)
        self.key_values = [tuple(row[2:end]) for row in drawn]
        self.values = [tuple(row[end:]) for row in drawn]

    def _keys(self, connection: sa.Connection, identity: ColumnIdentity) -> list[str]:
        """The key that a binding would use."""
        relation = sa.cast(qualified(connection, identity), REGCLASS)
        names = connection.execute(
            sa.select(sa.func.sbert.key_columns_v1(relation, type_=sa.ARRAY(sa.Text)))
        ).scalar_one()
        if not names:
            raise NotProvenError(
                f"{identity}: the table has no key by which a row could be named. Give it a "
                "primary key, or a unique index over NOT NULL columns."
            )
        return list(names)

    def compared(self, encoder: TextEncoder, text: Text, size: int | None = None) -> Candidate:
        """Compare one candidate with the sample, or its first rows."""
        comparison = compare(
            self.labels[:size],
            self.vectors[:size],
            encoder.encode_document([text.of(row) for row in self.values[:size]]),
            by_length=encoder.spec.similarity != "cosine",
        )
        return Candidate(encoder, text, comparison)

    def keys_of(self, labels: Sequence[str]) -> list[tuple[Any, ...]]:
        """Keys of some of the sampled rows, as the table has them."""
        keys = dict(zip(self.labels, self.key_values, strict=True))
        return [keys[label] for label in labels]

    def texts(self, sources: Sequence[Source] | None) -> Iterator[list[Text]]:
        """Candidate texts in rounds, the likeliest first."""
        if sources is not None:
            yield texts_of_sources(self.table, self.readable, sources)
            return
        yield single_texts(self.readable)
        yield joined_texts(self.readable)
        yield hidden_texts(self.readable, self.values)


def examine(
    engine: sa.Engine,
    column: ColumnIdentity,
    encoders: Sequence[TextEncoder],
    sources: Sequence[Source] | None = None,
    *,
    sample: int = SAMPLE,
    min_share: float = MIN_SHARE,
) -> Proof:
    """Find out which of some encoders and sources made a column's vectors; changes nothing.

    Without sources every text column is tried, then two of them joined in the usual ways, then
    texts inside JSON documents. A few rows tell the candidates apart, the sample judges the best.

    Args:
        engine: where; the schema ``sbert`` has to be installed.
        encoders: candidates, loaded. Those of another width are passed over.
        sources: candidates; found by trying where left out.
        sample: rows to encode again.
        min_share: least share of them that has to agree: cosine at least .97, which int8 keeps to
            and another pooling, prompt or model does not.

    Raises:
        NotProvenError: it is not a vector column, or its rows have no key.
        SourceError: a source names a column that is not there.
    """
    with engine.connect() as connection:
        sampled = _Column(connection, column, sample)
    return _examine(sampled, encoders, sources, min_share)


def _examine(
    column: _Column,
    encoders: Sequence[TextEncoder],
    sources: Sequence[Source] | None,
    min_share: float,
) -> Proof:
    table, name = column.table.fullname, column.column.name

    def unproven(reason: str) -> Proof:
        return Proof(table, name, column.rows, None, None, (), False, reason)

    fitting = [e for e in encoders if column.width in (None, e.spec.dimensions)]
    if not fitting:
        widths = ", ".join(f"{e.spec.name} has {e.spec.dimensions}" for e in encoders)
        return unproven(
            f"the column has {column.width} dimensions; of the encoders, "
            f"{widths or 'none is given'}"
        )
    if not column.labels:
        return unproven("no row has a vector, so there is nothing to prove; bind it in a migration")
    screened = _screen(column, fitting, sources)
    if not screened:
        return unproven("the table has no text that could be a source")
    return _judged(column, screened, min_share)


def _judged(column: _Column, screened: Sequence[Candidate], min_share: float) -> Proof:
    """The proof, or what it lacks, of the best candidate, by the whole sample."""
    text = screened[0].text
    best = column.compared(screened[0].encoder, text)
    some = bool(best.comparison.agreeing)
    return Proof(
        table=column.table.fullname,
        column=column.column.name,
        rows=column.rows,
        best=best,
        source=text.source,
        others=tuple(
            other for other in screened[1 : 1 + _NAMED] if other.comparison.agreeing or not some
        ),
        proven=best.comparison.share >= min_share and text.source is not None,
        reason=_reason(best, min_share),
    )


def _reason(best: Candidate, min_share: float) -> str:
    sample = best.comparison
    if sample.share < min_share:
        return (
            f"{sample.share:.1%} of the rows agree and {min_share:.0%} have to. Give the encoder "
            "and the source that made the vectors, with its prompts; or re-embed into a new column."
        )
    if best.text.remedy is not None:
        return (
            "the text lies in a JSON document, which cannot be a source. Make it a column first, "
            f"and adopt again: {best.text.remedy}"
        )
    if sample.doubtful:
        return (
            f"{len(sample.doubtful)} of {sample.rows} rows were made from another text or encoder"
        )
    return ""


def _screen(
    column: _Column, encoders: Sequence[TextEncoder], sources: Sequence[Source] | None
) -> list[Candidate]:
    """Candidates by a few rows, the best first; of equals the simpler one."""
    tried: list[Candidate] = []
    for texts in column.texts(sources):
        tried += [column.compared(encoder, text, SCREEN) for text in texts for encoder in encoders]
        tried.sort(key=_rank)
        # Half of the rows: some may be stale, and a wrong source agrees with none but by chance.
        if tried and tried[0].comparison.share > 0.5 and (tried[0].comparison.median or 0) > 0.97:
            break
    return tried


def _rank(candidate: Candidate) -> tuple[float, float]:
    sample = candidate.comparison
    return -round(sample.share, 2), -round(sample.mean or 0.0, 3)


def adopt(
    engine: sa.Engine,
    column: ColumnIdentity,
    encoders: Sequence[TextEncoder],
    sources: Sequence[Source] | None = None,
    *,
    sample: int = SAMPLE,
    min_share: float = MIN_SHARE,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
    progress: Callable[[int], None] | None = None,
) -> Adoption:
    """Bind an existing column to the encoder and source that are proven to have made it.

    Its vectors stay as they are. Each row gets the digest of its text and vector, in short
    transactions in the order of the key; rows of the sample that do not agree, rows without a
    vector, and rows that are written meanwhile stay pending. Until a row has its digest a
    search by this library leaves it out, so adopt before the code that searches is deployed.

    A digest is an update of the row. With a vector index on the column each costs an insertion into
    its graph, about two milliseconds: half an hour for a million rows, instead of seconds. Where
    that is too long drop the index first, and build it again afterwards. Arguments are those of
    ``examine``, and:

    Args:
        lock_timeout: seconds to wait for the table's lock at an attempt; it is held for an instant.
        attempts: how often to try.
        progress: called with the number of rows adopted so far.

    Raises:
        NotProvenError: no candidate could be shown to have made the column; nothing was changed.
        AlreadyBoundError: it is bound already.
        TableBusyError: the table's lock could not be had.
    """
    with engine.connect() as connection:
        bound = catalog.binding_of(connection, column)
        if bound is None:
            sampled = _Column(connection, column, sample)
    if bound is not None:
        # An adoption that was killed has left it without its queue; workers do the rest.
        build_queue(engine, bound)
        raise AlreadyBoundError(f"{bound} is bound to encoder {bound.declared.name!r} already.")
    proof = _examine(sampled, encoders, sources, min_share)
    best, source = proof.best, proof.source
    if not proof.proven or best is None or source is None:
        raise NotProvenError(f"The column is not adopted, and nothing was changed. {proof}")

    # What it takes to encode the probes is not spent while writers wait.
    measured(best.encoder)

    def bind(connection: sa.Connection) -> tuple[Binding, str]:
        # The queue's index comes after the digests, so that it is small and built once.
        spec = _declared(best.encoder)
        binding = catalog.bind(connection, column, spec, source, build=False)
        catalog.hold_encoder(connection, binding, best.encoder)
        return catalog.require_binding(connection, column), current_snapshot(connection)

    binding, snapshot = in_short_transactions(
        engine, bind, relation=proof.table, lock_timeout=lock_timeout, attempts=attempts
    )
    apart = sampled.keys_of(best.comparison.doubtful)
    adopted = adopt_rows(engine, binding, snapshot, apart, progress)
    build_queue(engine, binding)
    return Adoption(binding, proof, adopted, max(0, proof.rows - adopted))


def _declared(encoder: TextEncoder) -> EncoderSpec:
    """What a class would declare: the name, and what cannot be known from it."""
    spec = encoder.spec
    known = known_encoder(spec.name)
    # Workers go on in the form that made the vectors, where it is not what they would take anyway.
    usual = find_encoder(replace(spec, precision=None)) is encoder
    precision = spec.precision if spec.precision in PRECISIONS and not usual else None
    if known is not None and known.dimensions == spec.dimensions:
        return EncoderSpec.of(spec.name, precision=precision)
    return EncoderSpec(
        name=spec.name, dimensions=spec.dimensions, similarity=spec.similarity, precision=precision
    )
