"""Adopt: bind a column of somebody else's vectors, after proving which encoder and source made it.

Nothing is computed anew but a sample. The sample proves what made the column and how many of its
rows agree; it does not look at every row, which ``sbert-pg audit`` does afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import REGCLASS

from sbert_pg import catalog
from sbert_pg.catalog import Binding, keys
from sbert_pg.catalog.reading import qualified
from sbert_pg.errors import AlreadyBoundError, NotProvenError
from sbert_pg.known import known_encoder
from sbert_pg.pending import marks
from sbert_pg.reembedding.evidence import (
    Evidence,
    Text,
    given_texts,
    hidden_texts,
    joined_texts,
    readable_columns,
    single_texts,
    weigh,
)
from sbert_pg.reembedding.locks import ATTEMPTS, LOCK_TIMEOUT, in_short_transactions
from sbert_pg.reembedding.pair import reflect
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors
from sbert_pg.types.guard import ColumnIdentity
from sbert_pg.types.vector import VectorType

#: Rows that the proof looks at.
SAMPLE = 200
#: Rows that candidates are told apart by.
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
        rows: rows with a vector, as far as they were counted.
        best: the candidate that agrees best, ``None`` where there was none to try.
        source: its source, where it can be one.
        others: the next candidates.
        proven: whether the best one made the column.
        reason: why not, or what to know.
    """

    table: str
    column: str
    rows: int
    best: Evidence | None
    source: Source | None
    others: tuple[Evidence, ...]
    proven: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        data["source"] = None if self.source is None else self.source.to_json()
        return data

    def __str__(self) -> str:
        lines = [f"{self.table}.{self.column}: {self.rows:,} rows with a vector"]
        if self.best is not None:
            lines.append(f"  {'proven' if self.proven else 'not proven'}: {self.best}")
            if self.best.doubtful and self.proven:
                named = ", ".join(self.best.doubtful[:20])
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
        pending: doubtful rows that are pending now, for a worker to embed anew.
    """

    binding: Binding
    proof: Proof
    pending: int


class _Column:
    """The column that is to be adopted, and a sample of it."""

    def __init__(
        self, connection: sa.Connection, identity: ColumnIdentity, size: int, seed: int
    ) -> None:
        self.table = reflect(connection, identity.schema, identity.table)
        column = self.table.c.get(identity.column)
        if column is None or not isinstance(column.type, VectorType):
            what = "does not exist" if column is None else f"has type {column.type!r}"
            raise NotProvenError(f"{identity} is no vector column: it {what}.")
        self.column = column
        self.width: int | None = column.type.dimensions
        self.keys, self.key = self._key(connection, identity)
        self.readable = readable_columns(self.table, self.keys)
        self.rows: int = connection.execute(
            sa.select(sa.func.count(column)).select_from(self.table)
        ).scalar_one()
        found = self._sample(connection, size, seed)
        self.sampled = [row[0] for row in found]
        self.vectors: list[Vectors] = [row[1] for row in found]
        self.values = [tuple(row[2:]) for row in found]

    def _key(
        self, connection: sa.Connection, identity: ColumnIdentity
    ) -> tuple[list[str], sa.ColumnElement[str]]:
        """The key that a binding would use, and its text as marks have it."""
        relation = sa.cast(qualified(connection, identity), REGCLASS)
        names = connection.execute(
            sa.select(sa.func.sbert.key_columns_v1(relation, type_=sa.ARRAY(sa.Text)))
        ).scalar_one()
        if not names:
            raise NotProvenError(
                f"{identity}: the table has no key by which a row could be named. Give it a "
                "primary key, or a unique index over NOT NULL columns."
            )
        columns = [self.table.c[name] for name in names]
        types = [column.type.compile(connection.dialect).lower() for column in columns]
        return list(names), keys.key_text(columns, types)

    def _sample(self, connection: sa.Connection, size: int, seed: int) -> list[Any]:
        table, rows = self.table, self.rows
        statement = (
            sa.select(self.key, self.column, *self.readable)
            .where(self.column.is_not(None))
            .order_by(sa.func.md5(self.key.concat(str(seed))))
            .limit(size)
        )
        share = min(100.0, 100.0 * size * 8 / max(rows, 1))
        if share < 50:
            lucky = table.tablesample(
                sa.func.bernoulli(sa.literal_column(f"{share:.6f}", sa.Float())), name="lucky"
            )
            left = sa.tuple_(*(table.c[name] for name in self.keys))
            chosen = sa.select(*(lucky.c[name] for name in self.keys))
            found = connection.execute(statement.where(left.in_(chosen))).all()
            if len(found) >= size:
                return list(found)
        return list(connection.execute(statement).all())

    def weigh(self, encoder: TextEncoder, text: Text, rows: int | None = None) -> Evidence:
        """Compare one candidate with the sample, or its first rows."""
        return weigh(encoder, text, self.sampled[:rows], self.values[:rows], self.vectors[:rows])


def examine(
    engine: sa.Engine,
    column: ColumnIdentity,
    encoders: Sequence[TextEncoder],
    sources: Sequence[Source] | None = None,
    *,
    sample: int = SAMPLE,
    min_share: float = MIN_SHARE,
    seed: int = 0,
) -> Proof:
    """Find out which of some encoders and sources made a column's vectors; changes nothing.

    Without sources every text column is tried, then two of them joined in the usual ways, then
    texts inside JSON documents. A few rows tell the candidates apart, the sample judges the best.

    Args:
        engine: where; the schema ``sbert`` has to be installed.
        column: the column.
        encoders: candidates, loaded. Those of another width are passed over.
        sources: candidates; found by trying where left out.
        sample: rows to encode again.
        min_share: least share of them that has to agree: cosine at least .97, which int8 keeps to
            and another pooling, prompt or model does not.
        seed: another seed samples other rows.

    Raises:
        NotProvenError: it is no vector column, or its rows have no key.
        SourceError: a source names a column that is not there.
    """
    proof, _ = _examine(engine, column, encoders, sources, sample, min_share, seed)
    return proof


def _examine(
    engine: sa.Engine,
    column: ColumnIdentity,
    encoders: Sequence[TextEncoder],
    sources: Sequence[Source] | None,
    sample: int,
    min_share: float,
    seed: int,
) -> tuple[Proof, TextEncoder | None]:
    """The proof, and the encoder that it is about."""
    with engine.connect() as connection:
        found = _Column(connection, column, sample, seed)
        connection.rollback()
    fitting = [e for e in encoders if found.width in (None, e.spec.dimensions)]
    why = ""
    if not fitting:
        widths = ", ".join(f"{e.spec.name} has {e.spec.dimensions}" for e in encoders)
        why = (
            f"the column has {found.width} dimensions; of the encoders, {widths or 'none is given'}"
        )
    elif not found.sampled:
        why = "no row has a vector, so there is nothing to prove; bind it in a migration"
    screened = [] if why else _screen(found, fitting, sources)
    if not screened:
        why = why or "the table has no text that could be a source"
        return _proof(found, None, None, (), False, why), None
    encoder, text, _ = screened[0]
    best = found.weigh(encoder, text)
    others = tuple(e for _, _, e in screened[1 : 1 + _NAMED] if e.agreeing or not best.agreeing)
    proven = best.share >= min_share and text.source is not None
    reason = _reason(best, text, min_share)
    return _proof(found, best, text.source, others, proven, reason), encoder


def _proof(
    found: _Column,
    best: Evidence | None,
    source: Source | None,
    others: tuple[Evidence, ...],
    proven: bool,
    reason: str,
) -> Proof:
    table, column = found.table.fullname, found.column.name
    return Proof(table, column, found.rows, best, source, others, proven, reason)


def _reason(best: Evidence, text: Text, min_share: float) -> str:
    if best.share < min_share:
        return (
            f"{best.share:.1%} of the rows agree and {min_share:.0%} have to. Give the encoder and "
            "the source that made the vectors, with its prompts; or re-embed into a new column."
        )
    if text.remedy is not None:
        return (
            f"the text lies in a JSON document, which triggers cannot watch. Make it a column "
            f"first, and adopt again: {text.remedy}"
        )
    if best.doubtful:
        return f"{len(best.doubtful)} of {best.rows} rows were made from another text or encoder"
    return ""


def _screen(
    found: _Column, encoders: Sequence[TextEncoder], sources: Sequence[Source] | None
) -> list[tuple[TextEncoder, Text, Evidence]]:
    """Candidates by a few rows, the best first; of equals the simpler one."""
    rounds: list[Callable[[], list[Text]]]
    if sources is not None:
        rounds = [lambda: given_texts(found.table, found.keys, sources)]
    else:
        rounds = [
            lambda: single_texts(found.table, found.keys),
            lambda: joined_texts(found.table, found.keys),
            lambda: hidden_texts(found.table, found.keys, found.values),
        ]
    tried: list[tuple[TextEncoder, Text, Evidence]] = []
    for texts in rounds:
        tried += [
            (encoder, text, found.weigh(encoder, text, SCREEN))
            for text in texts()
            for encoder in encoders
        ]
        tried.sort(key=lambda each: (-round(each[2].share, 2), -round(each[2].mean, 3)))
        # Half of the rows: some may be stale, and a wrong source agrees with none but by chance.
        if tried and tried[0][2].share > 0.5 and tried[0][2].median > 0.97:
            break
    return tried


def adopt(
    engine: sa.Engine,
    column: ColumnIdentity,
    encoders: Sequence[TextEncoder],
    sources: Sequence[Source] | None = None,
    *,
    sample: int = SAMPLE,
    min_share: float = MIN_SHARE,
    seed: int = 0,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> Adoption:
    """Bind an existing column to the encoder and source that are proven to have made it.

    Its vectors stay as they are. Sampled rows that do not agree become pending; rows without a
    vector are left to a backfill. From now on whoever writes vectors into the column has to vouch
    for their encoder (``sbert.attest_v1``), as in every bound column.

    Args:
        engine: where.
        column: the column.
        encoders: candidates, loaded.
        sources: candidate sources; found by trying where left out.
        sample: see ``examine``.
        min_share: see ``examine``.
        seed: see ``examine``.
        lock_timeout: seconds to wait for the table's lock at an attempt; it is held for an instant.
        attempts: how often to try.

    Raises:
        NotProvenError: no candidate could be shown to have made the column; nothing was changed.
        AlreadyBoundError: it is bound already.
        TableBusyError: the table's lock could not be had.
    """
    with engine.connect() as connection:
        bound = catalog.binding_of(connection, column)
        connection.rollback()
    if bound is not None:
        raise AlreadyBoundError(f"{bound} is bound to encoder {bound.declared.name!r} already.")
    proof, encoder = _examine(engine, column, encoders, sources, sample, min_share, seed)
    best, source = proof.best, proof.source
    if not proof.proven or best is None or source is None or encoder is None:
        raise NotProvenError(f"The column is not adopted, and nothing was changed. {proof}")

    def step(connection: sa.Connection) -> Adoption:
        binding = catalog.bind(connection, column, _declared(encoder), source)
        catalog.seal(connection, binding, encoder)
        marked = marks.mark(connection, binding, best.doubtful)
        sealed = catalog.binding_by_id(connection, binding.id)
        assert sealed is not None
        return Adoption(sealed, proof, marked)

    return in_short_transactions(
        engine,
        step,
        relation=proof.table,
        lock_timeout=lock_timeout,
        attempts=attempts,
    )


def _declared(encoder: TextEncoder) -> EncoderSpec:
    """What a class would declare: the name, and what cannot be known from it."""
    spec = encoder.spec
    known = known_encoder(spec.name)
    if known is not None and known.dimensions == spec.dimensions:
        return EncoderSpec.of(spec.name)
    return EncoderSpec(name=spec.name, dimensions=spec.dimensions, similarity=spec.similarity)
