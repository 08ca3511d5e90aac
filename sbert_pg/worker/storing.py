"""The last step of a batch: write what was encoded, whatever happens to the database meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import sqlalchemy as sa

from sbert_pg.pending import claims
from sbert_pg.pending.claims import Claimed, Written
from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import Fault, fault_of, words_of
from sbert_pg.pending.texts import Embedded
from sbert_pg.worker.keeping import Keeper
from sbert_pg.worker.logs import LOGGER, say
from sbert_pg.worker.serving import Served, Serving
from sbert_pg.worker.settings import WorkerSettings
from sbert_pg.worker.tally import Tally
from sbert_pg.worker.work import Pause, Work

logger = logging.getLogger(LOGGER)

T = TypeVar("T")


class Store:
    """Writes batches; called in one thread.

    A lost connection or a full disk is waited out with the vectors at hand, since encoding is what
    costs. A row that the database refuses is found by halving, and fails alone.

    Args:
        database: the database.
        settings: the worker's.
        tally: where it is counted.
        serving: the columns.
        keeper: renews the leases meanwhile.
        stop: set when the worker is to stop.

    Attributes:
        trouble: what is wrong with the database, while something is.
    """

    def __init__(
        self,
        database: Database,
        settings: WorkerSettings,
        tally: Tally,
        serving: Serving,
        keeper: Keeper,
        stop: threading.Event,
    ) -> None:
        self._database = database
        self._settings = settings
        self._tally = tally
        self._serving = serving
        self._keeper = keeper
        self._stop = stop
        self._stopped_at: float | None = None
        self._due: float | None = None
        self.trouble: str | None = None

    def due_in(self) -> float | None:
        """Seconds until a row that was put off is due; asking clears it."""
        due, self._due = self._due, None
        return None if due is None else max(due - time.monotonic(), 0.0)

    def store(self, work: Work, embedded: Embedded | Exception) -> None:
        """Write a batch; its marks are removed, released or given a reason."""
        served, claimed = work.served, work.claimed
        try:
            if isinstance(embedded, Exception):
                self._serving.block(served.id, served.name, embedded)
                self.release(served, claimed.token, [claim.key for claim in claimed.claims])
                return
            reasons = dict(embedded.failures)
            written = self._write(served, claimed, embedded.vectors, reasons)
            self._settle(served, claimed.token, written, reasons)
        finally:
            self._keeper.drop(claimed.token)

    def _write(
        self,
        served: Served,
        claimed: Claimed,
        vectors: Mapping[str, bytes | None],
        reasons: dict[str, str],
    ) -> list[Written]:
        """Write all that can be written, in one transaction if possible; fills ``reasons``."""
        done: list[Written] = []
        pieces = [dict(vectors)]
        while pieces:
            piece = pieces.pop()
            started = time.perf_counter()
            part = claimed if not done else Claimed(claimed.token, claimed.claims, claimed.rows)
            written, error = self._try(_writing(served, part, piece))
            if written is not None:
                done.append(written)
                with self._tally.of(served.name) as tally:
                    tally.write.add(time.perf_counter() - started)
                continue
            assert error is not None
            if fault_of(error) in (Fault.ROW, Fault.SLOW) and len(piece) > 1:
                keys = list(piece)
                middle = len(keys) // 2
                pieces += [
                    {k: piece[k] for k in keys[middle:]},
                    {k: piece[k] for k in keys[:middle]},
                ]
            elif fault_of(error) in (Fault.ROW, Fault.SLOW):
                reasons.update(dict.fromkeys(piece, words_of(error)))
            else:
                if fault_of(error) is Fault.COLUMN:
                    self._serving.block(served.id, served.name, error)
                self.release(served, claimed.token, [k for p in (piece, *pieces) for k in p])
                break
        return done

    def _settle(
        self, served: Served, token: str, written: Sequence[Written], reasons: Mapping[str, str]
    ) -> None:
        """Let go of what was not written, and count."""
        changed = [key for part in written for key in part.changed]
        busy = [key for part in written for key in part.busy]
        with self._tally.of(served.name) as tally:
            tally.embedded += sum(part.rows for part in written)
            tally.changed += len(changed)
            tally.busy += len(busy)
        if not (changed or busy or reasons):
            return
        wait = self._settings.busy_wait

        def settle(connection: sa.Connection) -> int:
            claims.release(connection, served.id, token, changed)
            claims.release(connection, served.id, token, busy, after=wait)
            return self.fail(connection, served.id, token, reasons)

        failed, _ = self._try(settle)
        self.say_failures(served, reasons, failed or 0)
        self._put_off(timedelta(0) if changed else wait if busy else self._settings.backoff)

    def fail(
        self, connection: sa.Connection, column_id: int, token: str, reasons: Mapping[str, str]
    ) -> int:
        """Record why rows could not be embedded; returns how many are failed for good."""
        return claims.fail(
            connection,
            column_id,
            token,
            reasons,
            max_attempts=self._settings.max_attempts,
            backoff=self._settings.backoff,
        )

    def say_failures(self, served: Served, reasons: Mapping[str, str], failed: int) -> None:
        """Count and log why rows could not be embedded; their text is not logged."""
        with self._tally.of(served.name) as tally:
            tally.errors += len(reasons)
            tally.failed += failed
        for key, reason in reasons.items():
            fields = {"column": served.name, "key": key, "reason": reason}
            say(logger, logging.WARNING, f"Cannot embed row {key} of {served.name}", fields)

    def release(self, served: Served, token: str, keys: Sequence[str]) -> None:
        """Give rows back unfinished; if that fails, their lease ends by itself."""
        try:
            with self._database.begin() as connection:
                claims.release(connection, served.id, token, keys)
        except sa.exc.SQLAlchemyError as error:
            fields = {"column": served.name, "rows": len(keys), "error": words_of(error)}
            say(logger, logging.WARNING, "Could not give rows back; their lease will end", fields)

    def _put_off(self, wait: timedelta) -> None:
        due = time.monotonic() + wait.total_seconds()
        self._due = due if self._due is None else min(due, self._due)

    def _try(self, do: Callable[[sa.Connection], T]) -> tuple[T | None, Exception | None]:
        """Do something in a transaction; waits for a database that is away.

        Returns:
            What it returned; or what it raised, where waiting does not help or the worker is not to
            wait any longer.
        """
        pause = Pause()
        while True:
            try:
                with self._database.begin() as connection:
                    result = do(connection)
                self.trouble = None
                return result, None
            except Exception as error:
                if fault_of(error) not in (Fault.LOST, Fault.BUSY) or self._out_of_patience():
                    return None, error
                self.trouble = words_of(error)
                self._tally.count_database_error()
                wait = pause.next()
                fields = {"error": self.trouble, "retry_in": round(wait, 2)}
                say(logger, logging.WARNING, "Cannot write vectors; trying again", fields)
                time.sleep(min(wait, 1.0) if self._stop.is_set() else wait)

    def _out_of_patience(self) -> bool:
        if not self._stop.is_set():
            return False
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        return time.monotonic() - self._stopped_at > self._settings.shutdown_timeout


def _writing(
    served: Served, claimed: Claimed, vectors: Mapping[str, bytes | None]
) -> Callable[[sa.Connection], Written]:
    return lambda connection: claims.write(connection, served.rows, claimed, vectors)


__all__ = ["Store"]
