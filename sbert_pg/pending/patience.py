"""Transactions that wait for a database that is away, and batches halved where one row is bad.

Encoding is what costs, so vectors are kept while a server restarts, a connection drops or a disk is
full. A row that the database refuses is found by halving, and is the only one not written.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sqlalchemy.engine import Connection

from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import Fault, fault_of, words_of

T = TypeVar("T")
Payloads = Mapping[str, "bytes | None"]


class Pause:
    """Waits that double from try to try, and differ a little from process to process.

    Args:
        first: the first wait, in seconds.
        longest: the longest, in seconds.
    """

    def __init__(self, first: float = 0.1, longest: float = 30.0) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def next(self) -> float:
        """The wait to take now."""
        wait = self._next
        self._next = min(self._next * 2, self._longest)
        return wait * random.uniform(0.75, 1.25)

    def reset(self) -> None:
        """Begin with the first again."""
        self._next = self._first


class Patience:
    """Runs transactions until the database lets them through.

    Args:
        database: the database.
        logger: where waiting is told.
        stop: once it is set, there is little patience left.
        after_stop: how much, in seconds.
        on_trouble: called whenever a try fails for the database's sake.

    Attributes:
        trouble: what is wrong with the database, while something is.
    """

    def __init__(
        self,
        database: Database,
        logger: logging.Logger,
        stop: threading.Event,
        *,
        after_stop: float = 30.0,
        on_trouble: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._logger = logger
        self._stop = stop
        self._after_stop = after_stop
        self._on_trouble = on_trouble
        self._stopped_at: float | None = None
        self.trouble: str | None = None

    def attempt(
        self, what: str, do: Callable[[Connection], T]
    ) -> tuple[T | None, Exception | None]:
        """Do something in a transaction, again and again while the database is away.

        Args:
            what: what it is, to be read after "Cannot".
            do: what to do; may be called several times.

        Returns:
            What it returned; or what it raised, where waiting does not help or patience is out.
        """
        pause = Pause()
        while True:
            try:
                with self._database.begin() as connection:
                    result = do(connection)
                self.trouble = None
                return result, None
            except Exception as error:
                if fault_of(error) not in (Fault.LOST, Fault.BUSY) or self._is_out():
                    return None, error
                self.trouble = words_of(error)
                self._on_trouble()
                wait = pause.next()
                fields = {"error": self.trouble, "retry_in": round(wait, 2)}
                self._logger.warning(
                    "Cannot %s; trying again", what, extra={"fields": fields}
                )  # fmt: skip
                time.sleep(min(wait, 1.0) if self._stop.is_set() else wait)

    def _is_out(self) -> bool:
        if not self._stop.is_set():
            return False
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        return time.monotonic() - self._stopped_at > self._after_stop


@dataclass(slots=True)
class Pieces(Generic[T]):
    """What became of a batch that was written in one piece or several.

    Attributes:
        results: what each piece that was written returned.
        reasons: why a row was refused, by key.
        error: what ended the writing, where the batch as a whole could not go on.
        left: keys that were not tried because of it.
    """

    results: list[T] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None
    left: list[str] = field(default_factory=list)


def write_in_pieces(
    patience: Patience,
    pieces: Sequence[Payloads],
    write: Callable[[Connection, Payloads, Sequence[T]], T],
) -> Pieces[T]:
    """Write a batch in a transaction for each piece, and in as many more as its bad rows ask for.

    Args:
        patience: how to wait.
        pieces: vectors by key.
        write: writes one piece, or a part of it, given what the writes before it returned.
    """
    done: Pieces[T] = Pieces()
    todo = list(reversed(pieces))
    while todo:
        piece = todo.pop()
        do = _writing(write, piece, done.results)
        result, error = patience.attempt("write vectors", do)
        if error is None:
            done.results.append(result)  # type: ignore[arg-type]
        elif fault_of(error) not in (Fault.ROW, Fault.SLOW) or not piece:
            done.error = error
            done.left = [key for part in (piece, *reversed(todo)) for key in part]
            break
        elif len(piece) == 1:
            done.reasons.update(dict.fromkeys(piece, words_of(error)))
        else:
            keys = list(piece)
            middle = len(keys) // 2
            todo.append({key: piece[key] for key in keys[middle:]})
            todo.append({key: piece[key] for key in keys[:middle]})
    return done


def _writing(
    write: Callable[[Connection, Payloads, Sequence[T]], T], piece: Payloads, earlier: Sequence[T]
) -> Callable[[Connection], T]:
    return lambda connection: write(connection, piece, earlier)


__all__ = ["Patience", "Pause", "Payloads", "Pieces", "write_in_pieces"]
