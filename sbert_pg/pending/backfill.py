"""Fill the vectors of rows that were there before their column was bound.

Any number of processes share a column by key ranges in ``sbert.backfill``. A range's position moves
in the transaction that writes the rows before it, so a process that is killed leaves nothing half
done, and whoever takes its range over encodes at most the batches again that it had in hand.

Reading, encoding and writing overlap. No mark is made for a row that goes well, which saves two
thirds of the writes that draining marks would cost; a row that does not is marked pending, and so
stays visible.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.catalog.holding import hold_encoder
from sbert_pg.catalog.tables import pending
from sbert_pg.errors import BackfillError, DeclarationError
from sbert_pg.pending import ranges
from sbert_pg.pending.cache import cached
from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import words_of
from sbert_pg.pending.flow import Flow
from sbert_pg.pending.patience import Patience, Payloads, write_in_pieces
from sbert_pg.pending.progress import Progress, Watch
from sbert_pg.pending.ranges import Range
from sbert_pg.pending.rows import Row, Rows, rows_of
from sbert_pg.pending.texts import Embedded, embed
from sbert_pg.pending.throttle import Gate, Limits, Rate
from sbert_pg.registry import get_encoder
from sbert_pg.spec import TextEncoder
from sbert_pg.types.guard import ColumnIdentity

logger = logging.getLogger("sbert_pg.backfill")

T = TypeVar("T")

#: Seconds between looks whether others have finished or left a range.
_LOOK = 1.0
#: Transactions in which a batch is written where updates of one page are to be apart.
_PIECES = 4
#: Time before a worker tries again what failed here.
_RETRY_AFTER = timedelta(seconds=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackfillSettings:
    """Settings of a backfill.

    Attributes:
        batch_size: rows read, encoded and written at a time.
        span: rows of a range; what one process takes for itself.
        encoders: threads that call the encoder.
        lease: how long a range that nothing is heard of is left alone.
        rows_per_second: most rows a second of this process.
        limits: when to pause.
        restart: begin anew, even if the last backfill is not complete.
        cache_rows: vectors kept in ``sbert.vector_cache``; none where it is 0.
        name: name of the process, in the catalog and in logs.
    """

    batch_size: int = 256
    span: int = 20_000
    encoders: int = 2
    lease: timedelta = timedelta(seconds=120)
    rows_per_second: float | None = None
    limits: Limits = field(default_factory=Limits)
    restart: bool = False
    cache_rows: int = 0
    name: str = "backfill"

    def __post_init__(self) -> None:
        if min(self.batch_size, self.span, self.encoders) < 1:
            raise DeclarationError("Batch size, span and encoders of a backfill are at least 1.")
        if self.rows_per_second is not None and self.rows_per_second <= 0:
            raise DeclarationError("The rows per second of a backfill are more than none.")


@dataclass(frozen=True, slots=True)
class Filled:
    """What a backfill did in this process.

    Attributes:
        rows: rows whose vector was written.
        texts: texts that were encoded.
        marked: rows that could not be written and are pending or failed instead.
        complete: whether the column's backfill is complete, over all processes.
        seconds: how long it took.
    """

    rows: int
    texts: int
    marked: int
    complete: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class _Batch:
    span: Range
    rows: list[Row]
    position: str | None


def backfill(
    engine: sa.Engine,
    column: ColumnIdentity | sa.Column[object] | Binding,
    settings: BackfillSettings | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Filled:
    """Fill a bound column, together with whoever else is doing it; returns when all have finished.

    Rows that have a vector are left alone, so a backfill can be run at any time. One that is
    complete is begun anew if rows without vector and without mark are found.

    Args:
        engine: an engine with the driver psycopg 3; up to four connections are used at a time.
        column: the column.
        settings: see ``BackfillSettings``.
        on_progress: called every second or so, in a thread.
        stop: once it is set, what is in hand is finished and the rest left to others.

    Raises:
        NotBoundError: the column is not bound.
        EncoderMismatchError: the column belongs to another encoder than the one at hand.
        BackfillError: the database refuses to let the column be written.
    """
    return _Run(engine, column, settings or BackfillSettings(), on_progress, stop).run()


class _RangeLostError(Exception):
    """The range is leased by another process."""


class _Run:
    """One process's part of a backfill."""

    def __init__(
        self,
        engine: sa.Engine,
        column: ColumnIdentity | sa.Column[object] | Binding,
        settings: BackfillSettings,
        on_progress: Callable[[Progress], None] | None,
        stop: threading.Event | None,
    ) -> None:
        self._database = Database(engine)
        self._settings = settings
        self._stop = stop or threading.Event()
        self._patience = Patience(self._database, logger, self._stop)
        with self._database.connect():
            pass  # A database that cannot be reached at all is told at once, not waited for.
        self._rows, self._encoder, self._spread = self._open(column)
        self._rate = Rate(settings.rows_per_second)
        self._gate = Gate(self._database, settings.limits, self._probe)
        self._watch = Watch(self._database, self._rows, self._gate, on_progress)
        self._numbers = itertools.count(1)
        self._lost: set[str] = set()
        self._held: set[str] = set()
        self._written = self._texts = self._marked = 0

    def _open(
        self, column: ColumnIdentity | sa.Column[object] | Binding
    ) -> tuple[Rows, TextEncoder, bool]:
        identity = column.identity if isinstance(column, Binding) else column

        def begin(connection: Connection) -> tuple[Rows, TextEncoder, bool]:
            binding = catalog.require_binding(connection, identity)
            encoder = get_encoder(binding.declared)
            hold_encoder(connection, binding, encoder)
            rows = rows_of(connection, binding)
            ranges.begin_again(connection, rows, force=self._settings.restart)
            return rows, encoder, rows.has_vector_index(connection)

        begun, error = self._patience.attempt("begin a backfill", begin)
        if error is not None or begun is None:
            raise error or BackfillError("The backfill was stopped before it began.")
        rows, encoder, spread = begun
        return rows, cached(encoder, self._database.engine, self._settings.cache_rows), spread

    def run(self) -> Filled:
        started = time.monotonic()
        try:
            self._gate.start()
            self._watch.start()
            with Flow(self._encode, self._write, encoders=self._settings.encoders) as flow:
                for batch in self._batches(flow):
                    flow.put(batch)
            complete = self._complete()
        finally:
            self._gate.stop()
            self._give_back()
            self._watch.stop()
        return Filled(
            self._written,
            self._texts,
            self._marked,
            complete,
            time.monotonic() - started,
        )

    # -- reading ------------------------------------------------------------------------------

    def _batches(self, flow: Flow[_Batch, Embedded | Exception]) -> Iterator[_Batch]:
        while not self._stop.is_set():
            span = self._take()
            if span is None:
                flow.drain()
                if self._complete():
                    return
                # Others are at work. One that dies leaves its range, so wait for them.
                self._stop.wait(_LOOK)
                continue
            yield from self._batches_of(span)

    def _batches_of(self, span: Range) -> Iterator[_Batch]:
        while not self._stop.is_set() and span.token not in self._lost:
            self._gate.wait(self._stop)
            batch = self._read(span)
            self._rate.wait(len(batch.rows), self._stop)
            yield batch
            if batch.position is None:
                return
            span = span.after(batch.position)

    def _take(self) -> Range | None:
        token = f"{self._settings.name}/{id(self):x}/{next(self._numbers)}"

        def take(connection: Connection) -> Range | None:
            settings = self._settings
            return ranges.take(
                connection, self._rows, token=token, span=settings.span, lease=settings.lease
            )

        span = self._must("take a range", take)
        if span is not None:
            self._held.add(token)
        return span

    def _read(self, span: Range) -> _Batch:
        limit = self._settings.batch_size
        rows, position = self._must(
            "read texts", lambda connection: ranges.read(connection, self._rows, span, limit)
        )
        return _Batch(span, rows, position)

    def _complete(self) -> bool:
        column_id = self._rows.binding.id
        return self._must("look", lambda connection: ranges.extent(connection, column_id)).complete

    def _must(self, what: str, do: Callable[[Connection], T]) -> T:
        result, error = self._patience.attempt(what, do)
        if error is not None:
            raise BackfillError(
                f"Cannot {what} for the backfill of {self._rows.binding}: {words_of(error)}. What "
                "was written stays; run it again to go on from there."
            ) from error
        return result  # type: ignore[return-value]

    # -- encoding and writing -----------------------------------------------------------------

    def _encode(self, batch: _Batch) -> Embedded | Exception:
        try:
            return embed(self._rows, self._encoder, batch.rows)
        except Exception as error:  # Raised by the writer, in order.
            return error

    def _write(self, batch: _Batch, embedded: Embedded | Exception) -> None:
        if isinstance(embedded, Exception):
            raise embedded
        if batch.span.token in self._lost:
            return
        reasons = dict(embedded.failures)
        rows_by_key = {row.key: row for row in batch.rows}

        def write(connection: Connection, piece: Payloads, earlier: Sequence[set[str]]) -> set[str]:
            written = self._write_rows(connection, [rows_by_key[key] for key in piece], piece)
            # The rule: everything goes well, and the last write moves the position.
            total = sum(map(len, earlier)) + len(written)
            if total == len(rows_by_key):
                self._advance(connection, batch, total)
            return written

        pieces = self._pieces(batch, embedded.vectors)
        done = write_in_pieces(self._patience, pieces, write)
        if isinstance(done.error, _RangeLostError):
            return self._give_up(batch.span)
        if done.error is not None:
            raise BackfillError(
                f"Cannot write column {self._rows.binding}: {words_of(done.error)}. What was "
                "written stays; run the backfill again when that is mended."
            ) from done.error
        written = set().union(*done.results)
        reasons.update(done.reasons)
        if len(written) < len(rows_by_key):
            # The marks come first: a row must not be passed over before it is visible as pending.
            for key in sorted(rows_by_key.keys() - written):
                self._mark(key, reasons.get(key))
            try:
                self._must("note progress", lambda c: self._advance(c, batch, len(written)))
            except BackfillError as error:
                if isinstance(error.__cause__, _RangeLostError):
                    return self._give_up(batch.span)
                raise
        self._written += len(written)
        self._texts += embedded.texts
        return None

    def _pieces(self, batch: _Batch, vectors: Payloads) -> list[Payloads]:
        """What is written in a transaction each: neighbours on a page in different ones.

        An update that finds room on its row's page leaves the table's indexes alone (it is HOT).
        Pages are full, but a row version that a committed transaction replaced makes room for the
        next. Where another column has a vector index, an update that is not HOT costs as much as
        the encoding.
        """
        if not self._spread:
            return [vectors]
        keys = [row.key for row in batch.rows if row.key in vectors]
        pieces = min(_PIECES, max(len(keys), 1))
        return [{key: vectors[key] for key in keys[i::pieces]} for i in range(pieces)]

    def _write_rows(self, connection: Connection, rows: list[Row], vectors: Payloads) -> set[str]:
        """Write the rows whose text is still the same; returns their keys."""
        unchanged, _ = self._rows.lock_unchanged(connection, rows)
        due = {key: vectors[key] for key in vectors if key in unchanged}
        if due:
            # Marks first: a BEFORE trigger that rewrites the text has the write itself make one.
            self._remove_marks(connection, list(due))
            self._rows.write(connection, due)
        return unchanged

    def _remove_marks(self, connection: Connection, keys: list[str]) -> None:
        """A row may have been marked before; the vector that it has now is that of its text."""
        c = pending.c
        array = sa.bindparam(None, keys, type_=pg.ARRAY(sa.Text))
        mine = sa.and_(c.column_id == self._rows.binding.id, c.key == sa.any_(array))
        free = sa.select(c.key).where(mine).with_for_update(skip_locked=True)
        connection.execute(sa.delete(pending).where(mine, c.key.in_(free)))

    def _mark(self, key: str, reason: str | None) -> None:
        """Leave a row to the workers, visibly.

        Each mark has a transaction of its own, so that no lock is held while another is waited for.
        """
        values = {"column_id": self._rows.binding.id, "key": key}
        if reason is not None:
            late = {"attempts": 1, "next_attempt_at": sa.func.now() + _RETRY_AFTER}
            values |= {**late, "error": reason[:2000].replace("\0", "�")}
            fields = {"column": str(self._rows.binding), "key": key, "reason": reason}
            words = f"Cannot embed row {key} of {self._rows.binding}"
            logger.warning(words, extra={"fields": fields})
        statement = pg.insert(pending).values(values).on_conflict_do_nothing()
        self._must("mark a row", lambda connection: connection.execute(statement).rowcount)
        self._marked += 1

    def _advance(self, connection: Connection, batch: _Batch, written: int) -> None:
        lease = self._settings.lease
        if not ranges.advance(connection, batch.span, batch.position, written, lease):
            raise _RangeLostError

    def _give_up(self, span: Range) -> None:
        self._lost.add(span.token)
        logger.warning("A range was taken over by another process, its lease having ended")

    def _give_back(self) -> None:
        if not self._held:
            return
        try:
            with self._database.begin() as connection:
                ranges.release(connection, list(self._held))
        except sa.exc.SQLAlchemyError as error:
            logger.warning("Could not give ranges back; their lease will end: %s", words_of(error))

    def _probe(self, connection: Connection) -> object:
        """Read a row by its key, as an application would."""
        table = self._rows.table
        key = [table.c[name] for name in self._rows.binding.key_columns]
        return connection.execute(sa.select(*key).order_by(*key).limit(1)).first()


__all__ = ["BackfillSettings", "Filled", "Limits", "Progress", "backfill"]
