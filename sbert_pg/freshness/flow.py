"""Read, encode and write at the same time, in order, with little in between.

The encoder is the slowest part by far, so it must never wait: while it has one batch, the next is
being read (by whoever calls ``put``) and the last is being written (by a thread). Encoding runs in
two threads by default, so that one batch is tokenised while the other is computed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")

#: How often a thread that waits for room looks whether it should stop, in seconds.
_LOOK = 0.2


class Flow(Generic[Batch, Result]):
    """A pipeline of three stages; use it as a context manager.

    Args:
        encode: makes the result of a batch; called in several threads.
        write: takes batch and result, in the order of ``put``; called in one thread.
        encoders: threads that encode.
    """

    def __init__(
        self,
        encode: Callable[[Batch], Result],
        write: Callable[[Batch, Result], None],
        *,
        encoders: int,
    ) -> None:
        self._encode = encode
        self._write = write
        self._pool = ThreadPoolExecutor(encoders, thread_name_prefix="sbert-pg-encode")
        # One batch waits, encoded or not, beside those that are being encoded.
        self._queue: queue.Queue[tuple[Batch, Future[Result]] | None] = queue.Queue(encoders + 1)
        self._writer = threading.Thread(target=self._write_all, name="sbert-pg-write", daemon=True)
        self._lock = threading.Condition()
        self._open = 0
        self._error: BaseException | None = None

    def __enter__(self) -> Flow[Batch, Result]:
        self._writer.start()
        return self

    def put(self, batch: Batch) -> None:
        """Hand a batch over; waits while enough are under way.

        Raises:
            Exception: what a stage raised; nothing is taken after that.
        """
        self._raise()
        with self._lock:
            self._open += 1
        entry = (batch, self._pool.submit(self._encode, batch))
        while True:
            try:
                self._queue.put(entry, timeout=_LOOK)
                return
            except queue.Full:
                self._raise()

    @property
    def under_way(self) -> int:
        """Batches that were put and are not written yet."""
        with self._lock:
            return self._open

    def drain(self) -> None:
        """Wait until everything that was put is written.

        Raises:
            Exception: what a stage raised.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._open == 0 or self._error is not None)
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        while (entry := self._queue.get()) is not None:
            batch, future = entry
            try:
                if self._error is None:
                    self._write(batch, future.result())
            except BaseException as error:  # Handed to the thread that puts.
                self._error = error
            finally:
                with self._lock:
                    self._open -= 1
                    self._lock.notify_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._error is None:
            # The reader failed: what is under way is encoded no further.
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._queue.put(None)
        self._writer.join()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if error is None:
            self._raise()
