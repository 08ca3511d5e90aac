"""What happens beside the build of an index: its progress is told, and it can be called off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from sbert_pg.catalog import system
from sbert_pg.errors import StepStoppedError

#: Told the phase, and blocks or tuples done and in all, while an index is built.
BuildProgress = Callable[[str, int, int], None]

#: Seconds between looks.
INTERVAL = 0.5


def phase_of(connection: sa.Connection, relation: str) -> tuple[int, str, int, int] | None:
    """Process, phase, done and total of a build under way on a table; ``None`` if there is none."""
    progress = system.INDEX_PROGRESS.c
    row = connection.execute(
        sa.select(
            progress.pid,
            progress.phase,
            sa.func.greatest(progress.blocks_done, progress.tuples_done),
            sa.func.greatest(progress.blocks_total, progress.tuples_total),
        ).where(progress.relid == system.oid_of(relation))
    ).first()
    return None if row is None else (row[0], row[1], row[2], row[3])


@contextmanager
def watched(
    engine: sa.Engine,
    pid: int,
    relation: str,
    on_progress: BuildProgress | None,
    stop: threading.Event | None,
) -> Iterator[None]:
    """Tell the progress of a build while the block runs, and cancel it once ``stop`` is set.

    Args:
        engine: where; one further connection is used.
        pid: the process that builds.
        relation: the table, as text for ``to_regclass``.
        on_progress: told the progress, in a thread.
        stop: calls the build off.
    """
    if on_progress is None and stop is None:
        yield
        return
    ended = threading.Event()

    def look() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not ended.wait(INTERVAL):
                found = phase_of(connection, relation)
                if found is None or found[0] != pid:
                    # Nothing to cancel: the cleaning up after a cancellation is no build.
                    continue
                if stop is not None and stop.is_set():
                    connection.execute(sa.select(sa.func.pg_cancel_backend(pid)))
                elif on_progress is not None:
                    on_progress(*found[1:])

    thread = threading.Thread(target=look, name="sbert-pg-index", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


def wait_for_other(
    connection: sa.Connection,
    is_building: Callable[[], bool],
    relation: str,
    seconds: float,
    on_progress: BuildProgress | None,
    stop: threading.Event | None,
) -> bool:
    """Wait while another session builds the index; returns whether it has ended.

    A process that was killed in the middle leaves such a session behind: the server notices that
    its client is gone when the index is there.
    """
    ends = time.monotonic() + seconds
    while is_building():
        if stop is not None and stop.is_set():
            raise StepStoppedError("The wait for another session's build was called off.")
        if time.monotonic() >= ends:
            return False
        found = phase_of(connection, relation)
        if found is not None and on_progress is not None:
            on_progress(f"by another session: {found[1]}", *found[2:])
        time.sleep(INTERVAL)
    return True


__all__ = ["BuildProgress", "phase_of", "wait_for_other", "watched"]
