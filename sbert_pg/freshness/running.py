"""A worker inside another program: in a thread, or for a column to be filled."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.errors import BackfillError, DeclarationError
from sbert_pg.freshness.claims import retrying
from sbert_pg.freshness.encoding import held_encoder
from sbert_pg.freshness.queue import Counts, counts, queue_fault, require_psycopg
from sbert_pg.freshness.rows import rows_of
from sbert_pg.freshness.settings import (
    LOGGER,
    Background,
    Companion,
    Database,
    WorkerSettings,
    say,
)
from sbert_pg.freshness.worker import Worker
from sbert_pg.loading.aside import building_aside, set_aside
from sbert_pg.sqlstates import words_of
from sbert_pg.system import ColumnIdentity

#: Whether a column's vector indexes stay while it is filled, or are dropped and built at the end.
Index = Literal["keep", "aside"]
#: Rows that wait, from which on the order of filling and building an index matters.
MANY = 10_000

logger = logging.getLogger(LOGGER)

#: Seconds between looks at the progress; a look takes at most a fiftieth of the time.
_INTERVAL = 1.0
_SHARE = 50
#: Seconds over which the rate is taken.
_WINDOW = 60.0


@contextmanager
def worker_thread(
    engine: sa.Engine,
    settings: WorkerSettings | None = None,
    *,
    companions: Sequence[Companion] = (),
) -> Iterator[Worker]:
    """Keep columns fresh while the block runs, in threads of this process.

    For applications of one process; several processes that each do this share the work. On leaving,
    what is under way is finished.

    Args:
        engine: the application's engine, with the driver psycopg 3. Up to four of its pool's
            connections are used for moments at a time, and one outside it listens.
        settings: see ``WorkerSettings``.
        companions: what is kept current beside the columns, such as clusters.

    Yields:
        The worker; ``worker.health()`` says how it is.

    Raises:
        DeclarationError: the engine uses another driver.
    """
    worker = Worker(engine, settings, companions)

    def run() -> None:
        try:
            worker.run()
        except Exception:
            logger.exception("The worker thread has ended")

    thread = threading.Thread(target=run, name="sbert-pg-worker", daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a backfill has come.

    Attributes:
        rows: rows that are done since it was begun, by all processes.
        total: rows that were to be done when it was begun; ``None`` where unknown.
        rows_per_second: rate over the last minute.
        seconds_left: at that rate; ``None`` where unknown.
        paused: why it is paused, or ``None``.
        complete: whether nothing is left.
    """

    rows: int
    total: int | None
    rows_per_second: float
    seconds_left: float | None
    paused: str | None
    complete: bool


@dataclass(frozen=True, slots=True)
class Filled:
    """What a backfill did.

    Attributes:
        rows: rows whose vector this process wrote.
        texts: texts that it encoded.
        failed: rows that could not be written: failed, or to be tried again by a worker.
        left: rows that are pending still, those of ``failed`` that are tried again among them.
        complete: whether nothing is left but rows that could not be written.
        seconds: how long it took.
    """

    rows: int
    texts: int
    failed: int
    left: int
    complete: bool
    seconds: float


class Filler(Protocol):
    """What fills a column as ``backfill`` does."""

    def __call__(
        self,
        engine: sa.Engine,
        column: Binding,
        settings: WorkerSettings | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Filled:
        """See ``backfill``."""


def backfill(
    engine: sa.Engine,
    column: ColumnIdentity | sa.Column[object] | Binding,
    settings: WorkerSettings | None = None,
    *,
    index: Index = "keep",
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Filled:
    """Fill a bound column, together with whoever else is doing it; returns when all have finished.

    A backfill is nothing but a long queue: new and changed rows of the column come first, then the
    rows that were there before. Workers drain it as well. Killed at any moment, it leaves nothing
    half done.

    Args:
        engine: an engine with the driver psycopg 3; up to four connections are used at a time.
        settings: see ``WorkerSettings``; its ``columns`` are not used.
        index: ``"aside"`` drops the column's vector indexes where 10,000 rows or more wait, and
            builds them when the column is filled; searches compare every row meanwhile. See
            ``sbert_pg.loading.indexes_aside``.
        on_progress: called every second or so, in a thread.
        stop: once it is set, what is in hand is finished and the rest left to others.

    Raises:
        DeclarationError: the engine uses another driver.
        NotBoundError: the column is not bound.
        EncoderMismatchError: the column belongs to another encoder than the one at hand.
        BackfillError: the database refuses to let the column be written, or its indexes dropped.
    """
    binding = _bound(engine, column)
    if index == "aside":
        _require_fillable(engine, binding)
    with beside_indexes(engine, binding, index, stop):
        return fill(engine, binding, settings, on_progress=on_progress, stop=stop)


def _bound(engine: sa.Engine, column: ColumnIdentity | sa.Column[object] | Binding) -> Binding:
    """The binding of a column as it is now, for an engine that a worker can use."""
    require_psycopg(engine)
    identity = column.identity if isinstance(column, Binding) else column
    with Database(engine).begin() as connection:
        return catalog.require_binding(connection, identity)


@contextmanager
def beside_indexes(
    engine: sa.Engine,
    column: ColumnIdentity | sa.Column[object] | Binding,
    index: Index,
    stop: threading.Event | None,
) -> Iterator[Binding]:
    """Set the column's vector indexes aside, where that is asked for and pays, or say how to.

    At the end those are built that were set aside by anybody, unless ``stop`` is set.
    """
    if index not in ("keep", "aside"):
        raise DeclarationError(f"A backfill was given index={index!r}; it takes 'keep' or 'aside'.")
    binding = _bound(engine, column)
    with Database(engine).begin() as connection:
        indexes = _indexes_of_many(connection, binding)
    with building_aside(engine, binding, stop=stop):
        if indexes and index == "aside":
            set_aside(engine, binding)
        elif indexes:
            fields = {"column": str(binding), "indexes": ", ".join(indexes)}
            words = (
                "Each row has to be put into a vector index while the column is filled. With "
                "index='aside' (--index aside) it is dropped first and built at the end, which is "
                "many times faster; searches compare every row meanwhile"
            )
            say(logger, logging.WARNING, words, fields)
        yield binding


def _require_fillable(engine: sa.Engine, binding: Binding) -> None:
    database = Database(engine)
    held_encoder(database, binding)
    with database.begin() as connection:
        rows_of(connection, binding)
        fault = queue_fault(connection, binding)
        if fault is not None:
            raise BackfillError(f"Column {binding} cannot be filled: {fault}.")


def fill(
    engine: sa.Engine,
    binding: Binding,
    settings: WorkerSettings | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Filled:
    """As ``backfill``, which leaves indexes as they are."""
    started = time.monotonic()
    _require_fillable(engine, binding)
    settings = replace(settings or WorkerSettings(), listen=False, columns=())
    worker = Worker(engine, settings, only=(binding.id,), stop=stop)
    with Watch(Database(engine), binding, on_progress, lambda: worker.throttle.reason) as watch:
        tally = worker.run(until_empty=True, await_others=True)
    blocked = worker.blocked().get(str(binding))
    if blocked is not None:
        raise BackfillError(
            f"Cannot write column {binding}: {blocked}. What was written stays; run the backfill "
            "again when that is mended."
        )
    return watch.filled(tally.total("embedded"), tally.total("texts"), started)


class Watch(Background):
    """A thread that looks at how far a backfill has come, by all processes together.

    ``waiting`` are rows that are put off, to be tried again by a worker.
    """

    thread_name = "sbert-pg-progress"

    def __init__(
        self,
        database: Database,
        binding: Binding,
        on_progress: Callable[[Progress], None] | None,
        paused: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._database = database
        self._binding = binding
        self._paused = paused
        self._on_progress = on_progress
        self._seen: deque[tuple[float, int]] = deque()
        self.total = 0
        self.last = Counts(0, 0, 0, 0, True, None)
        self.waiting = 0

    def __enter__(self) -> Watch:
        self.look()
        self.total = self.last.pending + self.last.backfill
        self._report()
        if self._on_progress is not None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        # A connection that was dropped while it lay in the pool is noticed by the first use.
        if not self.look():
            self.look()
        self._report()

    def filled(self, rows: int, texts: int, started: float) -> Filled:
        """What was done, by what is left; ``started`` is a ``time.monotonic()``."""
        left = self.last.pending + self.last.backfill
        # Another process may have written a row since its failure was recorded.
        failed = self.last.failed + min(self.waiting, left)
        return Filled(rows, texts, failed, left, self.complete, time.monotonic() - started)

    def _run(self) -> None:
        wait = _INTERVAL
        while not self._stop.wait(wait):
            started = time.monotonic()
            if self.look():
                self._report()
            wait = max(_INTERVAL, _SHARE * (time.monotonic() - started))

    @property
    def complete(self) -> bool:
        """Whether nothing was left but rows that are put off, when it was seen last."""
        return self.last.pending + self.last.backfill <= self.waiting

    def look(self) -> bool:
        """See how far it is; returns whether the database answered."""
        try:
            with self._database.begin() as connection:
                self.last = counts(connection, self._binding)
                self.waiting = retrying(connection, self._binding)
        except sa.exc.SQLAlchemyError as error:
            logger.debug("Cannot look at the progress: %s", words_of(error))
            return False
        return True

    def _report(self) -> None:
        if self._on_progress is None:
            return
        left = self.last.pending + self.last.backfill
        now = time.monotonic()
        done = max(self.total - left, 0)
        self._seen.append((now, done))
        while now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        seconds = now - self._seen[0][0]
        rate = max(done - self._seen[0][1], 0) / seconds if seconds > 0 else 0.0
        complete = self.complete
        self._on_progress(
            Progress(
                done,
                self.total,
                rate,
                0.0 if complete else left / rate if rate > 0 else None,
                self._paused(),
                complete,
            )
        )


def _indexes_of_many(connection: sa.Connection, binding: Binding) -> Sequence[str]:
    """The vector indexes that many rows are about to be put into, one by one."""
    waiting = counts(connection, binding, cap=MANY)
    if waiting.pending + waiting.backfill < MANY:
        return ()
    c = catalog.tables.status.c
    names = connection.execute(sa.select(c.index_names).where(c.id == binding.id)).scalar()
    return names or ()
