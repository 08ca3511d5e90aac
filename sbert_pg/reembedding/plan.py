"""Plan: what a change of encoder will do, take and cost, before anything is touched."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from sbert_pg.catalog.holding import compatibility, recorded_encoder
from sbert_pg.errors import EncoderError
from sbert_pg.probes import PRECISION_MIN_COSINE, agreement_of
from sbert_pg.reembedding.coverage import coverage_of
from sbert_pg.reembedding.expand import Request, likened
from sbert_pg.reembedding.locks import holders
from sbert_pg.reembedding.pair import Pair, pair_of
from sbert_pg.reembedding.reading import sample
from sbert_pg.reembedding.vector_index import CreateIndexConcurrently, index_name
from sbert_pg.registry import get_encoder
from sbert_pg.spec import TextEncoder
from sbert_pg.types.guard import ColumnIdentity
from sbert_pg.types.vector import plain_type

#: Texts that are encoded to estimate the time.
SAMPLE = 200
#: WAL that an update writes for each byte by which it makes the table grow; measured, with full
#: page images, in benchmarks/reembedding.py.
WAL_RATIO = 2.1
#: Bytes of a vector beside its elements, and of a row's header.
_OVERHEAD = 8


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a change.

    Attributes:
        step: the step that it belongs to.
        sql: the statement.
        lock: the table lock that it takes, and for how long.
    """

    step: str
    sql: str
    lock: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a change of encoder will do.

    Attributes:
        table: the table.
        old: the old column.
        new: the new column.
        old_encoder: encoder of the old column.
        new_encoder: encoder of the new column.
        need: what is needed: ``"re-embedding"``, ``"retype"`` (the vectors can be computed from the
            old ones) or ``"rebind"`` (the space is the same).
        reason: why.
        rows: rows to be embedded.
        rows_per_second: texts that this machine encodes in a second, ``None`` if the encoder is not
            at hand.
        growth: bytes by which the table grows, roughly.
        wal: bytes of WAL, roughly.
        statements: in order, with their locks.
        notes: what to look at first.
    """

    table: str
    old: str
    new: str
    old_encoder: str
    new_encoder: str
    need: str
    reason: str
    rows: int
    rows_per_second: float | None
    growth: int
    wal: int
    statements: tuple[Statement, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Time for encoding everything with one process on this machine."""
        return self.rows / self.rows_per_second if self.rows_per_second else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "seconds": self.seconds}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.table}: {self.old} ({self.old_encoder}) -> {self.new} ({self.new_encoder})"
        yield f"  needs      {self.need}: {self.reason}"
        if self.seconds is not None:
            yield (
                f"  encoding   {self.rows:,} rows at {self.rows_per_second:,.0f} a second: "
                f"{_span(self.seconds)} with one process like this one"
            )
        else:
            yield f"  encoding   {self.rows:,} rows; without the encoder no time is known"
        yield f"  disk       roughly {_size(self.growth)} more in the table, WAL {_size(self.wal)}"
        for statement in self.statements:
            yield f"  {statement.step:<10} {statement.sql}"
            yield f"             lock: {statement.lock}"
        for note in self.notes:
            yield f"  note       {note}"


def plan(engine: sa.Engine, request: Request, *, texts: int = SAMPLE) -> Plan:
    """Look at a change of encoder without making it.

    Args:
        engine: where; nothing is written.
        request: the change.
        texts: rows to encode for an estimate of the time; 0 for none.

    Raises:
        NotBoundError: the old column is not bound.
    """
    with engine.connect().execution_options(postgresql_readonly=True) as connection:
        pair = pair_of(connection, request.old)
        side = pair.new if pair.new.binding.column == request.old.column else pair.old
        assert side is not None
        old = side.binding
        encoder, why = _encoder(request)
        need, reason = _need(connection, pair, request, encoder)
        covered = coverage_of(connection, old)
        rate, width = _measured(connection, pair, request, encoder, texts, covered.rows)
        element = 2 if (request.storage or old.storage) == "halfvec" else 4
        growth = covered.with_text * int(width + element * request.encoder.dimensions + _OVERHEAD)
        notes = list(_notes(connection, pair, why))
        found = Plan(
            table=f"{old.schema}.{old.table}",
            old=old.column,
            new=request.new,
            old_encoder=old.declared.name,
            new_encoder=request.encoder.name,
            need=need,
            reason=reason,
            rows=covered.with_text,
            rows_per_second=rate,
            growth=growth,
            wal=int(growth * WAL_RATIO),
            statements=tuple(_statements(connection, pair, request)),
            notes=tuple(notes),
        )
        connection.rollback()
        return found


def need_of(engine: sa.Engine, request: Request) -> tuple[str, str]:
    """``"re-embedding"``, ``"retype"`` or ``"rebind"``, and why; nothing is written.

    Raises:
        NotBoundError: the old column is not bound.
    """
    with engine.connect() as connection:
        pair = pair_of(connection, request.old)
        found = _need(connection, pair, request, _encoder(request)[0])
        connection.rollback()
        return found


def _encoder(request: Request) -> tuple[TextEncoder | None, str]:
    try:
        return get_encoder(request.encoder), ""
    except EncoderError as error:
        return None, str(error)


def _need(
    connection: sa.Connection, pair: Pair, request: Request, encoder: TextEncoder | None
) -> tuple[str, str]:
    old = pair.new.binding if pair.old is None else pair.old.binding
    if request.source is not None and request.source != old.source:
        return "re-embedding", f"the text changes, from {old.source} to {request.source}"
    if encoder is None or old.fingerprint is None:
        return "re-embedding", "as far as can be said without the encoders' probe vectors"
    verdict = compatibility(connection, old.fingerprint, encoder)
    storage = request.storage or old.storage
    if verdict and storage == old.storage:
        return "rebind", f"{verdict.reason} (sbert-pg reembed rebind)"
    if verdict:
        return "retype", f"{old.storage} to {storage} of the same space (sbert-pg reembed retype)"
    _, probes = recorded_encoder(connection, old.fingerprint)
    cut = probes[:, : encoder.spec.dimensions]
    if cut.shape == encoder.probe_vectors.shape:
        agreement = agreement_of(cut, encoder.probe_vectors)
        if agreement.min_cosine >= PRECISION_MIN_COSINE and cut.shape != probes.shape:
            return "retype", "its vectors are the old ones, cut (sbert-pg reembed retype)"
    return "re-embedding", verdict.reason


def _measured(
    connection: sa.Connection,
    pair: Pair,
    request: Request,
    encoder: TextEncoder | None,
    texts: int,
    rows: int,
) -> tuple[float | None, float]:
    """Texts encoded in a second, and the average size of a row, from a sample."""
    side = pair.old or pair.new
    source = request.source or side.binding.source
    table = pair.table
    columns = [table.c[name] for name in source.columns]
    size = sa.func.pg_column_size(sa.literal_column(connection.dialect.identifier_preparer.quote(
        table.name)), type_=sa.Integer())  # fmt: skip
    found = sample(
        connection,
        table,
        side.binding,
        [size, *columns],
        [sa.or_(*(column.is_not(None) for column in columns))],
        max(texts, 20),
        rows,
    )
    if not found:
        return None, 0.0
    width = sum(row[1] for row in found) / len(found)
    if encoder is None or not texts:
        return None, width
    join = source.joiner()
    wanted = [join(row[2:]) for row in found]
    # The first batch pays for what is only done once.
    encoder.encode_document(wanted[:8])
    started = time.perf_counter()
    encoder.encode_document(wanted)
    return len(wanted) / max(time.perf_counter() - started, 1e-6), width


def _statements(connection: sa.Connection, pair: Pair, request: Request) -> Iterator[Statement]:
    old = pair.old or pair.new
    type_ = plain_type(request.storage or old.binding.storage, request.encoder.dimensions)
    name = pair.relation
    quote = connection.dialect.identifier_preparer.quote
    new, column = quote(request.new), quote(old.binding.column)
    yield Statement(
        "expand",
        f"ALTER TABLE {name} ADD COLUMN {new} {type_.get_col_spec()}",
        "ACCESS EXCLUSIVE for an instant, with a lock time-out and retries; nothing is rewritten",
    )
    yield Statement(
        "expand",
        f"SELECT sbert.bind_v1('{name}', '{request.new}', ..., replaces => '{old.binding.column}')",
        "SHARE ROW EXCLUSIVE until the same transaction commits",
    )
    yield Statement(
        "backfill",
        f"{new} of {name} is written in batches",
        "ROW EXCLUSIVE; rows are locked while their batch is written, free ones only",
    )
    for index in _indexes(pair, request):
        yield Statement(
            "index",
            str(CreateIndexConcurrently(index).compile(dialect=connection.dialect)),
            "SHARE UPDATE EXCLUSIVE: readers and writers go on; waits for older transactions",
        )
    yield Statement(
        "contract",
        f"ALTER TABLE {name} DROP COLUMN {column}",
        "ACCESS EXCLUSIVE for an instant, with a lock time-out and retries; nothing is rewritten",
    )


def _indexes(pair: Pair, request: Request) -> list[sa.Index]:
    """What the new column's indexes will be, whether or not it exists yet."""
    if pair.old is not None and pair.new.binding.column == request.new:
        return likened(pair)
    from sbert_pg.types import Embedding

    source = request.source or pair.new.binding.source
    storage = request.storage or pair.new.binding.storage
    column = sa.Column(request.new, Embedding(request.encoder, source, storage=storage))
    keys = [sa.Column(name, sa.Text) for name in dict.fromkeys(source.columns)]
    sa.Table(pair.table.name, sa.MetaData(), *keys, column, schema=pair.table.schema)
    return [
        index.on(column, index_name(index.name, request.old.column, request.new, pair.table.name))
        for index in pair.new.indexes
        if index.valid
    ]


def _notes(connection: sa.Connection, pair: Pair, why: str) -> Iterator[str]:
    side = pair.old or pair.new
    if why:
        yield f"the new encoder cannot be loaded here: {why}"
    if not side.indexes:
        yield "the old column has no vector index, so none will be made for the new one"
    for index in side.indexes:
        if not index.valid:
            yield f"index {index.name} is not valid and will not be copied"
    held = holders(connection, pair.relation)
    if held:
        yield (
            "transactions that hold the table now, which expand and contract wait for: "
            f"{'; '.join(held[:3])}"
        )
    if pair.old is not None:
        old, new = pair.old.binding.column, pair.new.binding.column
        yield f"the change is under way already: {new} replaces {old}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _size(number: int) -> str:
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


__all__ = ["ColumnIdentity", "Plan", "Statement", "need_of", "plan"]
