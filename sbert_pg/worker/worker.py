"""The worker: claims pending rows, has them encoded, writes their vectors, until it is stopped.

Three things go on at the same time: this thread claims and reads, a few threads encode, one writes.
Two more renew leases and listen. No transaction is open while anything is encoded, and whatever
happens to the process, the server or the connection, a row is either written or still pending.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.errors import SbertPgError
from sbert_pg.pending import claims
from sbert_pg.pending.claims import Claim, Claimed
from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import Fault, fault_of, words_of
from sbert_pg.pending.flow import Flow
from sbert_pg.pending.patience import Pause
from sbert_pg.pending.texts import Embedded, embed
from sbert_pg.worker.clusters import ClusterKeeper
from sbert_pg.worker.keeping import Keeper
from sbert_pg.worker.listen import Listener
from sbert_pg.worker.logs import LOGGER, say
from sbert_pg.worker.serving import Served, Serving
from sbert_pg.worker.settings import WorkerSettings
from sbert_pg.worker.storing import Store
from sbert_pg.worker.tally import Tally
from sbert_pg.worker.work import Work

if TYPE_CHECKING:
    from sbert_pg.clustering import Clustering

logger = logging.getLogger(LOGGER)

#: Longest time between looks at the database where nothing can be heard of it, in seconds.
_POLL_UNHEARD = 1.0
#: Seconds between looks at rows that may have ended a process, while there are others.
_SUSPECTS_INTERVAL = 10.0


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
        clusterings: clusterings to keep current beside the columns: new and changed rows are placed
            in the current clusters.

    Attributes:
        tally: what it has done.
        settings: its settings.
        clusters: what keeps the clusterings current.
    """

    def __init__(
        self,
        engine: sa.Engine,
        settings: WorkerSettings | None = None,
        clusterings: Sequence[Clustering] = (),
    ) -> None:
        self.settings = settings or WorkerSettings()
        self.tally = Tally()
        self._database = Database(engine)
        self.clusters = ClusterKeeper(self._database, clusterings)
        self._serving = Serving(self.settings.columns, self.settings.cache_rows)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._heard_lock = threading.Lock()
        self._heard: set[int] = set()
        self._everything = True
        self._keeper = Keeper(self._database, self.settings, self.tally)
        self._store = Store(
            self._database, self.settings, self.tally, self._serving, self._keeper, self._stop
        )
        self._numbers = itertools.count(1)
        self._next_rescan = self._next_look = self._next_suspects = 0.0
        self._beat = time.monotonic()
        self._running = False
        self._trouble: str | None = None
        self._flow: Flow[Work, Embedded | Exception] | None = None

    # -- what others may call, from any thread ------------------------------------------------

    def stop(self) -> None:
        """Claim no more, finish what is under way, and return from ``run``."""
        self._stop.set()
        self._wake.set()

    def wake(self, column_id: int | None = None) -> None:
        """Look for pending rows now: of one column, or of all."""
        with self._heard_lock:
            if column_id is None:
                self._everything = True
            else:
                self._heard.add(column_id)
        self._wake.set()

    def watch_backlog(self) -> None:
        """Look at what is pending from time to time, for the tally."""
        self._keeper.watch_backlog = True

    def column_ids(self) -> list[int]:
        """Numbers of the columns that it is to serve, whether it can or not."""
        return self._serving.ids()

    def blocked(self) -> dict[str, str]:
        """Columns that it cannot serve, with the reason."""
        return self._serving.blocked()

    def health(self) -> Health:
        """How it is, without asking the database."""
        under_way = 0 if self._flow is None else self._flow.under_way
        age = time.monotonic() - self._beat
        alive = self._running and (age < 60 + self.settings.poll_interval or under_way > 0)
        blocked = self._serving.blocked()
        trouble = self._trouble or self._store.trouble
        details = {
            "name": self.settings.name,
            "running": self._running,
            "stopping": self._stop.is_set(),
            "listening": self.tally.listening,
            "columns": [served.name for served in self._serving.columns()],
            "blocked": blocked,
            "database_error": trouble,
            "batches_under_way": under_way,
            "embedded": self.tally.total("embedded"),
            "failed": self.tally.total("failed"),
        }
        return Health(alive, alive and not blocked and trouble is None, details)

    def run(self, *, until_empty: bool = False, timeout: float | None = None) -> Tally:
        """Work until ``stop`` is called.

        Args:
            until_empty: return as well when nothing is left that can be claimed now.
            timeout: with ``until_empty``, seconds after which no more is claimed.

        Raises:
            NotBoundError: the settings name a column that is not bound.
            CatalogError: the catalog is missing, or of another version, at the start.
            sqlalchemy.exc.DBAPIError: with ``until_empty``, the database cannot be reached.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._running = True
        try:
            self._begin(patient=not until_empty)
            with ExitStack() as stack:
                stack.callback(self._keeper.stop)
                self._keeper.start()
                if not until_empty:
                    stack.callback(self.clusters.stop)
                    self.clusters.start()
                if self.settings.listen and not until_empty:
                    listener = Listener(self._database.engine, self.wake, self._set_listening)
                    stack.callback(listener.stop)
                    listener.start()
                self._flow = stack.enter_context(
                    Flow(self._encode, self._store.store, encoders=self.settings.encoders)
                )
                self._loop(self._flow, until_empty, deadline)
            if until_empty:
                self.clusters.look()
        finally:
            self._running = False
        return self.tally

    # -- the loop -----------------------------------------------------------------------------

    def _begin(self, *, patient: bool) -> None:
        """Look at the catalog for the first time; a patient worker waits for the database."""
        pause = Pause()
        while not self._stop.is_set():
            try:
                with self._database.begin() as connection:
                    catalog.require_current(connection)
                self._rescan()
                return
            except sa.exc.SQLAlchemyError as error:
                if not patient or fault_of(error) not in (Fault.LOST, Fault.BUSY):
                    raise
                self._lost(error, pause)

    def _loop(
        self, flow: Flow[Work, Embedded | Exception], until_empty: bool, deadline: float | None
    ) -> None:
        pause = Pause()
        while not self._stop.is_set():
            self._beat = time.monotonic()
            if deadline is not None and self._beat > deadline:
                return
            try:
                took = self._turn(flow, until_empty)
                self._trouble = None
                pause.reset()
            except (sa.exc.SQLAlchemyError, SbertPgError) as error:
                if until_empty:
                    raise
                self._lost(error, pause)
                self.wake()
                continue
            if took:
                continue
            if until_empty:
                if flow.under_way == 0:
                    return
                # What is under way may come back: changed, or held by somebody else.
                flow.drain()
                self.wake()
                continue
            self._wait()

    def _lost(self, error: BaseException, pause: Pause) -> None:
        self._trouble = words_of(error)
        self.tally.count_database_error()
        wait = pause.next()
        fields = {"error": self._trouble, "retry_in": round(wait, 2)}
        say(logger, logging.WARNING, "Cannot claim rows; trying again", fields)
        self._stop.wait(wait)

    def _turn(self, flow: Flow[Work, Embedded | Exception], thorough: bool) -> bool:
        """Claim a batch of every column that may have one; returns whether there was any."""
        self._wake.clear()
        with self._heard_lock:
            heard, self._heard = self._heard, set()
            everything = self._everything or thorough or time.monotonic() >= self._next_look
            self._everything = False
        if everything:
            self._next_look = time.monotonic() + self.settings.poll_interval
        if time.monotonic() >= self._next_rescan or not self._serving.knows(heard):
            self._rescan()
        took = False
        for served in self._serving.columns(None if everything else heard):
            if self._stop.is_set():
                break
            took |= self._take(flow, served, alone=False)
        # A look at suspects goes through the whole queue, so while there is other work it is rare.
        if everything and (not took or time.monotonic() >= self._next_suspects):
            self._next_suspects = time.monotonic() + _SUSPECTS_INTERVAL
            for served in self._serving.columns():
                if not self._stop.is_set():
                    took |= self._take_alone(flow, served)
        if took:
            # There may be more where this came from.
            with self._heard_lock:
                self._heard |= heard
                self._everything = self._everything or everything
        return took

    def _take(self, flow: Flow[Work, Embedded | Exception], served: Served, *, alone: bool) -> bool:
        work = self._claim(served, alone=alone)
        if work is None:
            return False
        flow.put(work)
        return True

    def _take_alone(self, flow: Flow[Work, Embedded | Exception], served: Served) -> bool:
        """One row that may be what ended a process: nothing else is in hand meanwhile."""
        with self._database.begin() as connection:
            if not claims.has_suspects(connection, served.id):
                return False
        flow.drain()
        took = self._take(flow, served, alone=True)
        flow.drain()
        return took

    def _claim(self, served: Served, *, alone: bool) -> Work | None:
        started = time.perf_counter()
        token = f"{self.settings.name}/{next(self._numbers)}"
        with self._database.connect() as connection:
            with connection.begin():
                taken = claims.claim(
                    connection,
                    served.id,
                    token=token,
                    limit=self.settings.batch_size,
                    lease=self.settings.lease,
                    alone=alone,
                )
            if not taken:
                return None
            self._keeper.hold(token, served.id, [claim.key for claim in taken])
            try:
                with connection.begin():
                    lost = self._give_up(connection, served, token, taken)
                    rest = [claim for claim in taken if claim.key not in lost]
                    claimed = claims.read(connection, served.rows, token, rest)
            except sa.exc.SQLAlchemyError as error:
                self._keeper.drop(token)
                if fault_of(error) is not Fault.COLUMN:
                    raise
                self._serving.block(served.id, served.name, error)
                self._store.release(served, token, [claim.key for claim in taken])
                return None
        with self.tally.of(served.name) as tally:
            tally.batches += 1
            tally.claim.add(time.perf_counter() - started)
        return Work(served, claimed)

    def _give_up(
        self, connection: sa.Connection, served: Served, token: str, taken: list[Claim]
    ) -> dict[str, str]:
        """Fail the rows whose every attempt has ended a process."""
        # In company a row may have been somebody else's victim, so it gets a chance alone.
        most = max(self.settings.max_attempts, claims.ALONE_FROM + 1)
        reasons = {
            claim.key: f"no result after {claim.attempts - 1} attempts: each time the process that "
            "encoded it came to an end, or its lease did"
            for claim in taken
            if claim.abandoned and claim.attempts > most
        }
        if reasons:
            failed = self._store.fail(connection, served.id, token, reasons)
            self._store.say_failures(served, reasons, failed)
        return reasons

    def _encode(self, work: Work) -> Embedded | Exception:
        started = time.perf_counter()
        try:
            embedded = embed(work.served.rows, work.served.encoder, work.claimed.rows)
        except Exception as error:  # It is the column's affair; the writer deals with it.
            return error
        with self.tally.of(work.served.name) as tally:
            tally.encode.add(time.perf_counter() - started)
            tally.texts += embedded.texts
        return embedded

    def _rescan(self) -> None:
        self._serving.rescan(self._database)
        self._keeper.set_names({served.id: served.name for served in self._serving.columns()})
        self._next_rescan = time.monotonic() + self.settings.rescan_interval
        self._everything = True

    def _set_listening(self, listening: bool) -> None:
        self.tally.listening = listening
        self._wake.set()

    def _wait(self) -> None:
        """Until something is heard, a row that was put off is due, or it is time to look."""
        wait = self.settings.poll_interval
        if not self.tally.listening:
            wait = min(wait, _POLL_UNHEARD)
        due = self._store.due_in()
        if due is not None:
            wait = min(wait, due)
        if not self._wake.wait(max(wait, 0.01)):
            self.wake()


__all__ = ["Claimed", "Health", "Worker"]
