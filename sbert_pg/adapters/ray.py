"""A backfill by a fleet: processes on the machines of a Ray cluster that drain one queue.

The queue is the table's own partial index, and a claim is a lease in the database, so Ray has only
to keep the processes alive: each actor is a backfill like any other. An actor or a node that
vanishes leaves rows that are pending, which another takes when the lease has ended; a driver that
dies is started again and finds what is left.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from sbert_pg import catalog, freshness
from sbert_pg.catalog import Binding
from sbert_pg.errors import DeclarationError, SbertPgError, needing
from sbert_pg.freshness.running import Index, Watch, beside_indexes, fill
from sbert_pg.freshness.settings import Database, worker_name
from sbert_pg.sqlstates import Fault, fault_of
from sbert_pg.system import ColumnIdentity, Pause

#: Seconds between looks at the actors.
_LOOK = 0.5


def backfill(
    engine: sa.Engine,
    column: ColumnIdentity | sa.Column[object] | Binding,
    settings: freshness.WorkerSettings | None = None,
    *,
    actors: int,
    address: str = "local",
    cpus: float = 1,
    gpus: float = 0,
    index: Index = "keep",
    setup: Callable[[], object] | None = None,
    on_progress: Callable[[freshness.Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> freshness.Filled:
    """Fill a bound column by processes of a Ray cluster; returns when nothing is left.

    Each actor loads the encoder, claims rows, encodes and writes them, as ``freshness.backfill``
    does; actors that end are started again, and share the work with workers and backfills outside
    of Ray. ``rows`` and ``texts`` of what is returned are the rows that are no longer waiting,
    whoever wrote them: an actor that was killed cannot say what it had done.

    Args:
        engine: an engine with the driver psycopg 3, whose URL the actors use as well; it has to
            hold on every node, its password included.
        column: the column.
        settings: see ``WorkerSettings``, for each actor; ``lease`` is how long the rows of a node
            that vanished are left alone.
        actors: processes; as many as the cluster has room for run at a time.
        address: of a cluster, as ``ray.init`` takes it, or ``"auto"`` for the running one.
            ``"local"`` starts one of this machine for the call, on the loopback address, without
            a dashboard and without usage reports. A program that has called ``ray.init`` itself
            uses its cluster.
        cpus: cores for each actor, which are the threads it encodes with.
        gpus: GPUs for each actor.
        index: see ``freshness.backfill``.
        setup: called first in each actor, to register encoders with ``use_encoder``.
        on_progress: called every second or so, in a thread.
        stop: once it is set, what is in hand is finished and the rest left.

    Raises:
        MissingExtraError: Ray is not installed.
        DeclarationError: the engine uses another driver, or there is no number of actors.
        NotBoundError: the column is not bound.
        EncoderMismatchError: the encoder of an actor is not the column's.
        BackfillError: the database refuses to let the column be written.
    """
    if actors < 1:
        raise DeclarationError(f"A fleet has at least one actor; actors is {actors}.")
    started = time.monotonic()
    database = Database(engine)
    with beside_indexes(engine, column, index, stop) as binding, _cluster(address) as ray:
        actor = ray.remote(_Actor).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=2,  # One call fills, and one may ask it to stop.
        )
        url = engine.url.render_as_string(hide_password=False)
        options = settings or freshness.WorkerSettings()
        fleet = [actor.remote(url, binding.identity, options, setup) for _ in range(actors)]
        with Watch(database, binding, on_progress) as watch:
            _wait(ray, fleet, watch, stop or threading.Event())
        for member in fleet:
            ray.kill(member)
    done = max(watch.total - watch.last.pending - watch.last.backfill, 0)
    return watch.filled(done, done, started)


def _wait(ray: Any, fleet: list[Any], watch: Watch, stop: threading.Event) -> None:
    """Wait until every actor has found nothing more, or nothing is left for one that cannot run."""
    waiting = [member.fill.remote() for member in fleet]
    stopped = False
    while waiting:
        ended, waiting = ray.wait(waiting, timeout=_LOOK)
        try:
            ray.get(ended)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, SbertPgError) else error from None
        if stop.is_set() and not stopped:
            stopped = True
            for member in fleet:
                member.stop.remote()
        # Asked until it is so: what a lost node had in hand is done when its lease has ended.
        if 0 < len(waiting) < len(fleet) and watch.look() and watch.complete:
            return


class _Actor:
    """One process of the fleet."""

    def __init__(
        self,
        url: str,
        identity: ColumnIdentity,
        settings: freshness.WorkerSettings,
        setup: Callable[[], object] | None,
    ) -> None:
        if setup is not None:
            setup()
        self._engine = sa.create_engine(url)
        self._identity = identity
        self._settings = replace(settings, name=worker_name())
        self._stop = threading.Event()

    def fill(self) -> None:
        """Take part until nothing is left; a server that is away for a while is waited for."""
        pause = Pause()
        while True:
            try:
                with self._engine.connect() as connection:
                    binding = catalog.require_binding(connection, self._identity)
                fill(self._engine, binding, self._settings, stop=self._stop)
                return
            except sa.exc.SQLAlchemyError as error:
                if fault_of(error) not in (Fault.LOST, Fault.BUSY) or self._stop.is_set():
                    raise
                self._stop.wait(pause.next())

    def stop(self) -> None:
        """Finish what is in hand."""
        self._stop.set()


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, for the length of a block; a cluster that was there stays as it is."""
    with needing("ray", "ray", "fill a column by a fleet"):
        import ray
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": address}
    if address == "local":
        # Nobody who asks for a backfill asks for reports to the makers of Ray.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    try:
        ray.init(**options, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise DeclarationError(
            f"There is no Ray cluster at {address!r}: {error}. Start one with `ray start --head`, "
            "or take 'local' for one of this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


__all__ = ["backfill"]
