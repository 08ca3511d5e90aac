"""The worker: claims pending rows, has them encoded, writes their vectors, until it is stopped.

Three things go on at the same time: this thread claims and reads, a few threads encode, one writes.
Two more renew leases and listen. No transaction is open while anything is encoded, and whatever
happens to the process, the server or the connection, a row is either written or still pending.

Long, since what a worker is asked stands beside the loop that answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog.migrate import require_worker
from sbert_pg.errors import SbertPgError
from sbert_pg.freshness import claims
from sbert_pg.freshness.batches import Keeper, Store
from sbert_pg.freshness.columns import Claimer, Column, Columns, Shared, Work
from sbert_pg.freshness.encoding import Embedded, Flow, embed
from sbert_pg.freshness.listening import Listener
from sbert_pg.freshness.queue import BACKFILL, CHANGED, Class, require_psycopg
from sbert_pg.freshness.settings import (
    LOGGER,
    Companion,
    Database,
    Tally,
    Throttle,
    WorkerSettings,
    say,
)
from sbert_pg.sqlstates import Fault, fault_of, words_of
from sbert_pg.system import Pause

logger = logging.getLogger(LOGGER)

#: Longest time between looks at the database where nothing can be heard of it, in seconds.
_POLL_UNHEARD = 1.0
#: Seconds between looks at leases that have ended and rows whose next attempt is due, and longest
#: time for such rows before a look at what is new.
_RETRY_INTERVAL = 1.0
#: How often a starting worker hears that the catalog is wrong, beside an application's DDL, to end.
_CHANCES = 3
#: While there is other work, rows that are tried alone get one second in so many.
_ALONE_INTERVAL = 10.0

_Flow = Flow[Work, "Embedded | Exception"]


@dataclass(frozen=True, slots=True)
class Health:
    """How a worker is.

    Attributes:
        alive: it runs, and its loop has turned recently or is waiting for the encoder.
        ready: it reaches the database and serves every column that it should.
        details: plain data for people and JSON.
    """

    alive: bool
    ready: bool
    details: dict[str, Any]


class Worker:
    """Keeps embedding columns fresh.

    Args:
        engine: an engine with the driver psycopg 3. Up to four of its pool's connections are used
            for moments at a time, and one more, outside the pool, listens.
        settings: see ``WorkerSettings``.
        companions: what is kept current beside the columns.
        only: identities of the columns to serve, instead of names in the settings.
        stop: an event that ends ``run(until_empty=True)`` as ``stop()`` does.

    Attributes:
        tally: what it has done.
        settings: its settings.
        throttle: what holds the backfill back.

    Raises:
        DeclarationError: the engine uses another driver.
    """

    def __init__(
        self,
        engine: sa.Engine,
        settings: WorkerSettings | None = None,
        companions: Sequence[Companion] = (),
        *,
        only: Collection[UUID] = (),
        stop: threading.Event | None = None,
    ) -> None:
        require_psycopg(engine)
        self.settings = settings or WorkerSettings()
        self.tally = Tally()
        self.companions = tuple(companions)
        self._database = Database(engine)
        self._columns = Columns(only or self.settings.columns, self.settings.cache_rows)
        self._stop = stop or threading.Event()
        self._wake = threading.Event()
        self._heard_lock = threading.Lock()
        self._heard: set[UUID] = set()
        self._everything = True
        shared = Shared(self._database, self.settings, self.tally, self._columns)
        self._keeper = Keeper(shared)
        self._store = Store(shared, self._keeper, self._stop)
        self._claimer = Claimer(shared, self._keeper.hold, self._keeper.drop)
        self.throttle = Throttle(
            self._database, self.settings.rows_per_second, self.settings.max_replica_lag
        )
        self._throttled = 0.0
        self._next_rescan = self._next_look = self._next_retry = self._next_alone = 0.0
        self._retried = False
        self._beat = time.monotonic()
        self._running = False
        self._trouble: str | None = None
        self._flow: _Flow | None = None

    # -- what others may call, from any thread ------------------------------------------------

    def stop(self) -> None:
        """Claim no more, finish what is under way, and return from ``run``."""
        self._stop.set()
        self._wake.set()

    def wake(self, column: UUID | None = None) -> None:
        """Look for pending rows now: of one column, or of all."""
        with self._heard_lock:
            if column is None:
                self._everything = True
            else:
                self._heard.add(column)
        self._wake.set()

    def watch_backlog(self) -> None:
        """Look at what is pending from time to time, for the tally."""
        self._keeper.watch_backlog = True

    def blocked(self) -> dict[str, str]:
        """Columns that it cannot serve, with the reason."""
        return self._columns.blocked()

    def health(self) -> Health:
        """How it is, without asking the database."""
        under_way = 0 if self._flow is None else self._flow.under_way
        age = time.monotonic() - self._beat
        alive = self._running and (age < 60 + self.settings.poll_interval or under_way > 0)
        blocked = self._columns.blocked()
        trouble = self._trouble or self._store.trouble
        details = {
            "name": self.settings.name,
            "running": self._running,
            "stopping": self._stop.is_set(),
            "listening": self.tally.listening,
            "columns": [column.name for column in self._columns.served()],
            "blocked": blocked,
            "paused": self.throttle.reason,
            "database_error": trouble,
            "batches_under_way": under_way,
            "embedded": self.tally.total("embedded"),
            "failed": self.tally.total("failed"),
        }
        return Health(alive, alive and not blocked and trouble is None, details)

    def run(self, *, until_empty: bool = False, await_others: bool = False) -> Tally:
        """Work until ``stop`` is called.

        Args:
            until_empty: return as well when nothing is left that can be claimed now.
            await_others: with ``until_empty``, wait for rows that other workers have in hand, in
                case they come to an end.

        Raises:
            NotBoundError: the settings name a column that is not bound.
            CatalogError: the catalog is missing, or of another version, at the start, or the role
                may not do a worker's work.
            sqlalchemy.exc.DBAPIError: with ``until_empty``, the database cannot be reached.
        """
        self._running = True
        try:
            self._begin(patient=not until_empty)
            with ExitStack() as stack:
                stack.callback(self._keeper.stop)
                self._keeper.start()
                for companion in () if until_empty else self.companions:
                    stack.callback(companion.stop)
                    companion.start()
                if self.settings.listen and not until_empty:
                    listener = Listener(
                        self._database.engine, self.settings.name, self.wake, self._set_listening
                    )
                    stack.callback(listener.stop)
                    listener.start()
                self._flow = stack.enter_context(
                    Flow(self._encode, self._store.store, encoders=self.settings.encoders)
                )
                if until_empty:
                    self._drain(self._flow, await_others)
                else:
                    self._loop(self._flow)
            for companion in self.companions if until_empty else ():
                companion.look()
        finally:
            self._running = False
        return self.tally

    # -- the loop -----------------------------------------------------------------------------

    def _begin(self, *, patient: bool) -> None:
        """Look at the catalog for the first time; a patient worker waits for the database."""
        pause = Pause()
        chances = _CHANCES
        while not self._stop.is_set():
            try:
                with self._database.begin() as connection:
                    require_worker(connection)
                    catalog.require_current(connection)
                self._rescan()
                return
            except sa.exc.SQLAlchemyError as error:
                chances -= fault_of(error) not in (Fault.LOST, Fault.BUSY, Fault.SLOW)
                if not patient or chances == 0:
                    raise
                self._lost(error, pause)

    def _loop(self, flow: _Flow) -> None:
        pause = Pause()
        while not self._stop.is_set():
            self._beat = time.monotonic()
            try:
                took = self._turn(flow, thorough=False)
                self._trouble = None
                pause.reset()
            except (sa.exc.SQLAlchemyError, SbertPgError) as error:
                self._lost(error, pause)
                self.wake()
                continue
            if not took:
                self._wait()

    def _drain(self, flow: _Flow, await_others: bool) -> None:
        pause = Pause()
        done = False
        while not done and not self._stop.is_set():
            self._beat = time.monotonic()
            try:
                done = self._turn_to_empty(flow, await_others)
                pause.reset()
            except sa.exc.SQLAlchemyError as error:
                if not await_others or fault_of(error) not in (Fault.LOST, Fault.BUSY):
                    raise
                self._lost(error, pause)

    def _turn_to_empty(self, flow: _Flow, await_others: bool) -> bool:
        """Turn once; returns whether nothing is left, of others either where they are awaited."""
        if self._turn(flow, thorough=True):
            return False
        empty = not self._throttled and flow.under_way == 0
        others = empty and await_others and self._others()
        if empty and not others:
            return True
        # What is under way may come back: changed, or held by someone else.
        flow.drain()
        self._stop.wait(1.0 if others else min(self._throttled, 0.2))
        return False

    def _others(self) -> bool:
        """Whether other workers have rows of these columns in hand."""
        with self._database.begin() as connection:
            return any(claims.in_hand(connection, b) for b in self._columns.bindings())

    def _lost(self, error: BaseException, pause: Pause) -> None:
        self._trouble = words_of(error)
        self.tally.count_database_error()
        wait = pause.next()
        fields = {"error": self._trouble, "retry_in": round(wait, 2)}
        say(logger, logging.WARNING, "Cannot claim rows; trying again", fields)
        self._stop.wait(wait)

    def _turn(self, flow: _Flow, *, thorough: bool) -> bool:
        """Claim a batch of every column that may have one; returns whether there was any."""
        heard, everything = self._take_heard(thorough)
        if time.monotonic() >= self._next_rescan or not self._columns.knows(heard):
            self._rescan()
        self._throttled = 0.0
        self._claimer.give_back()
        took = False
        for column in self._columns.served(None if everything else heard):
            took |= self._take(flow, column, CHANGED)
        for column in self._columns.served():
            took |= self._take_backfill(flow, column, thorough=thorough)
        took |= self._retry(flow, busy=took, thorough=thorough)
        if took:
            # There may be more where this came from, and something new while it is being done.
            self._everything = True
        return took

    def _take_heard(self, thorough: bool) -> tuple[set[UUID], bool]:
        """Columns that were heard of since the last turn, and whether to look at all of them."""
        self._wake.clear()
        with self._heard_lock:
            heard, self._heard = self._heard, set()
            everything = self._everything or thorough or time.monotonic() >= self._next_look
            self._everything = False
        if everything:
            self._next_look = time.monotonic() + self._poll_interval()
        return heard, everything

    def _take(self, flow: _Flow, column: Column, class_: Class) -> bool:
        """Claim a batch of a class, and hand it over; returns whether there may be more."""
        if self._stop.is_set():
            return False
        work, more = self._claimer.claim(column, class_)
        if work is not None:
            flow.put(work)
            if class_ == BACKFILL:
                self.throttle.spend(len(work.rows))
        return more

    def _take_backfill(self, flow: _Flow, column: Column, *, thorough: bool) -> bool:
        if not thorough and time.monotonic() < column.backfill_at:
            return False
        wait = self.throttle.wait()
        if wait > 0:
            self._throttled = wait
            return False
        took = self._take(flow, column, BACKFILL)
        pause = 0.0 if took else self.settings.rescan_interval
        column.backfill_at = time.monotonic() + pause
        return took

    def _retry(self, flow: _Flow, *, busy: bool, thorough: bool) -> bool:
        """Try rows again if it is time, or nothing else is to do; returns whether any were."""
        # Nothing is left out: a thorough turn is the last one only where it took nothing. What was
        # begun goes on between looks at what is new.
        idle = not busy and (thorough or self._retried)
        if not idle and time.monotonic() < self._next_retry:
            return False
        self._retried = self._try_again(flow, busy=busy)
        self._next_retry = time.monotonic() + _RETRY_INTERVAL
        return self._retried

    def _try_again(self, flow: _Flow, *, busy: bool) -> bool:
        """What failed before, or was in hand when a process came to an end: a few, or one."""
        ended, back, due = self._claimer.look_for_ended(self._columns.served())
        for column, labels in ended:
            self._store.conclude(column, labels)
        if not due:
            return back
        now = time.monotonic()
        until = now + _RETRY_INTERVAL
        few = self.settings.batch_size // 4
        took = more = False
        if few > 1:
            took, more = self._repeat(partial(self._take_again, flow, few), until)
        if not more and not (busy and now < self._next_alone):
            self._next_alone = now + _ALONE_INTERVAL
            took |= self._repeat(partial(self._take_again, flow, 1), until)[0]
        return took or back

    def _repeat(self, take: Callable[[Column], bool], until: float) -> tuple[bool, bool]:
        """Take of each column until then; returns whether anything was, and whether more may be."""
        took = False
        for column in self._columns.served():
            while take(column):
                took = True
                if self._stop.is_set() or time.monotonic() > until:
                    return True, True
        return took, False

    def _take_again(self, flow: _Flow, most: int, column: Column) -> bool:
        """Some rows of a process that came to an end, beside all that is in hand; or one alone,
        which may be what ended it.
        """
        if most == 1:
            flow.drain()
        work = self._claimer.claim_again(column, most)
        if work is None:
            return False
        flow.put(work)
        if most == 1:
            flow.drain()
        return True

    def _encode(self, work: Work) -> Embedded | Exception:
        started = time.perf_counter()
        column = work.column
        try:
            if column.cutter is None:
                embedded = embed(column.binding, column.encoder, work.rows)
            else:
                embedded = column.cutter.embed(work.rows)
        except Exception as error:  # It is the column's affair; the writer deals with it.
            return error
        with self.tally.of(column.name) as tally:
            tally.encode.add(time.perf_counter() - started)
            tally.texts += embedded.texts
        return embedded

    def _rescan(self) -> None:
        self._columns.rescan(self._database)
        self._next_rescan = time.monotonic() + self.settings.rescan_interval
        self._everything = True

    def _set_listening(self, listening: bool) -> None:
        self.tally.listening = listening
        self._wake.set()

    def _poll_interval(self) -> float:
        interval = self.settings.poll_interval
        return interval if self.tally.listening else min(interval, _POLL_UNHEARD)

    def _wait(self) -> None:
        """Until something is heard, a row that was put off is due, or it is time to look."""
        wait = self._poll_interval()
        for due in (self._store.due_in(), self._throttled or None):
            if due is not None:
                wait = min(wait, due)
        if not self._wake.wait(max(wait, 0.01)):
            self.wake()


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What ``refresh`` did.

    Attributes:
        embedded: rows whose vector was written.
        errors: attempts that ended with an error.
        failed: rows that ended as failed.
        left: rows that are still pending: put off, or being worked on by someone else.
        blocked: columns that cannot be served, with the reason.
    """

    embedded: int
    errors: int
    failed: int
    left: int
    blocked: dict[str, str]


def refresh(
    engine: sa.Engine,
    settings: WorkerSettings | None = None,
    *,
    companions: Sequence[Companion] = (),
) -> Refreshed:
    """Embed what is pending now, and return.

    Args:
        engine: an engine with the driver psycopg 3.
        settings: see ``WorkerSettings``.
        companions: what is brought up to date at the end, such as clusters.

    Raises:
        DeclarationError: the engine uses another driver.
        NotBoundError: the settings name a column that is not bound.
        CatalogError: the catalog is missing or of another version, or the role may not do a
            worker's work.
    """
    worker = Worker(engine, settings, companions)
    tally = worker.run(until_empty=True)
    left = worker._columns.left(Database(engine))
    embedded, errors, failed = map(tally.total, ("embedded", "errors", "failed"))
    return Refreshed(embedded, errors, failed, left, worker.blocked())
