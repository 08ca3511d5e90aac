"""Plan: what a change of encoder will do, take and cost, before anything is touched."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from sbert_pg import system
from sbert_pg.catalog import Binding, rows
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.indexes import index_like, index_name
from sbert_pg.progress import duration
from sbert_pg.reembed.backfill import encoder_of, way_of
from sbert_pg.reembed.change import Pair, Request, Side, missing_indexes, pair_of
from sbert_pg.source import companion_name
from sbert_pg.spec import TextEncoder
from sbert_pg.system import holders
from sbert_pg.types.vector import plain_type

#: Texts that are encoded to estimate the time.
SAMPLE = 200
#: WAL that an update writes for each byte by which it makes the table grow; measured, with full
#: page images, in benchmarks/reembedding.py.
WAL_RATIO = 2.1
#: Bytes of a vector beside its elements, and of a row's header.
_OVERHEAD = 8


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
        statements: step, statement and the lock that it takes on the table, in order.
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
    statements: tuple[tuple[str, str, str], ...]
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
                f"{duration(self.seconds)} with one process like this one"
            )
        else:
            yield f"  encoding   {self.rows:,} rows; without the encoder no time is known"
        yield f"  disk       roughly {_size(self.growth)} more in the table, WAL {_size(self.wal)}"
        for step, statement, lock in self.statements:
            yield f"  {step:<10} {statement}"
            yield f"             lock: {lock}"
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
        old = _old_side(pair).binding
        encoder, why = encoder_of(request.encoder)
        way = way_of(connection, old, encoder, source=request.source, storage=request.storage)
        rate, width = _measured(connection, pair, old, request, encoder, texts)
        total = rows_with_text(connection, pair.table, request, old)
        element = 2 if (request.storage or old.storage) == "halfvec" else 4
        growth = total * int(width + element * request.encoder.dimensions + _OVERHEAD)
        return Plan(
            table=f"{old.schema}.{old.table}",
            old=old.column,
            new=request.new,
            old_encoder=old.declared.name,
            new_encoder=request.encoder.name,
            need=way.need,
            reason=way.reason,
            rows=total,
            rows_per_second=rate,
            growth=growth,
            wal=int(growth * WAL_RATIO),
            statements=tuple(_statements(pair, request)),
            notes=tuple(_notes(connection, pair, why)),
        )


def _old_side(pair: Pair) -> Side:
    """The column to be replaced, whether or not the change has begun."""
    return pair.new if pair.old is None else pair.old


def rows_with_text(
    connection: sa.Connection, table: sa.Table, request: Request, old: Binding
) -> int:
    """Rows that a change will embed."""
    columns = (request.source or old.source).columns
    has_text = sa.or_(*(table.c[name].is_not(None) for name in columns))
    statement = sa.select(sa.func.count()).select_from(table).where(has_text)
    return connection.execute(statement).scalar_one()


def _measured(
    connection: sa.Connection,
    pair: Pair,
    old: Binding,
    request: Request,
    encoder: TextEncoder | None,
    texts: int,
) -> tuple[float | None, float]:
    """Texts encoded in a second, and the average size of a row, from a sample."""
    source, table = request.source or old.source, pair.table
    columns = [table.c[name] for name in source.columns]
    name = system.PLAIN.identifier_preparer.quote(table.name)
    drawn = rows.sample(
        connection,
        table,
        old.key_columns,
        [sa.func.pg_column_size(sa.literal_column(name), type_=sa.Integer()), *columns],
        where=[sa.or_(*(column.is_not(None) for column in columns))],
        size=max(texts, 20),
    )
    if not drawn:
        return None, 0.0
    width = sum(row[0] for row in drawn) / len(drawn)
    if encoder is None or not texts:
        return None, width
    join = source.joiner()
    sampled = [join(row[1:]) for row in drawn]
    # The first batch pays for what is only done once.
    encoder.encode_document(sampled[:8])
    started = time.perf_counter()
    encoder.encode_document(sampled)
    return len(sampled) / max(time.perf_counter() - started, 1e-6), width


def _statements(pair: Pair, request: Request) -> Iterator[tuple[str, str, str]]:
    old = _old_side(pair).binding
    type_ = plain_type(request.storage or old.storage, request.encoder.dimensions).get_col_spec()
    quote = system.PLAIN.identifier_preparer.quote
    table = system.written_name(pair.table.schema, pair.table.name)
    alter, new, column = f"ALTER TABLE {table}", quote(request.new), quote(old.column)
    companion = quote(companion_name(request.new))
    instant = "ACCESS EXCLUSIVE for an instant, with a lock time-out and retries; no rewriting"
    concurrently = "SHARE UPDATE EXCLUSIVE: readers and writers go on; waits for older transactions"
    yield "begin", f"{alter} ADD COLUMN {new} {type_}", instant
    yield "begin", f"{alter} ADD COLUMN {companion} UUID; {new} replaces {column}", "the same"
    yield "begin", f"CREATE INDEX CONCURRENTLY of the queue ON {table}", concurrently
    yield "backfill", f"{new} is written in batches", "ROW EXCLUSIVE, and each batch's free rows"
    for index in _indexes(pair, request):
        text = str(sa.schema.CreateIndex(index).compile(dialect=system.PLAIN))
        if " CONCURRENTLY " not in text:
            text = text.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)
        yield "index", text, concurrently
    yield "finish", f"{alter} DROP COLUMN {column}, and its companion", instant


def _indexes(pair: Pair, request: Request) -> list[sa.Index]:
    """What the new column's indexes will be, whether or not it exists yet."""
    if pair.old is not None and pair.new.binding.column == request.new:
        return missing_indexes(pair)
    source = request.source or pair.new.binding.source
    storage = request.storage or pair.new.binding.storage
    column: sa.Column[Any] = sa.Column(
        request.new, Embedding(request.encoder, source, storage=storage)
    )
    keys = [sa.Column(name, sa.Text) for name in dict.fromkeys(source.columns)]
    sa.Table(pair.table.name, sa.MetaData(), *keys, column, schema=pair.table.schema)
    old, table = request.old.column, pair.table.name
    return [
        index_like(index, column, index_name(index.name, old, request.new, table))
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
            "transactions that hold the table now, which begin and finish wait for: "
            f"{'; '.join(held[:3])}"
        )
    if pair.old is not None:
        old, new = pair.old.binding.column, pair.new.binding.column
        yield f"the change is under way already: {new} replaces {old}"


def _size(number: int) -> str:
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
