"""Health and metrics of a worker over HTTP; needs the extra ``serve``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sbert_pg.freshness.worker import Worker
from sbert_pg.serving.http import JSON, Service, application, json_bytes
from sbert_pg.serving.listening import Limits, listening
from sbert_pg.serving.metrics import ServerMetrics, WorkerMetrics


@contextmanager
def serving_http(
    worker: Worker, host: str = "127.0.0.1", port: int = 9187, *, limits: Limits | None = None
) -> Iterator[int]:
    """Serve a worker's health and metrics while the block runs.

    ``/health`` is 200 while the process works and 503 when it is to be restarted; ``/ready`` is 200
    while it reaches the database and serves every column that it should, else 503; ``/metrics`` is
    for Prometheus. They need no token, since orchestrators have none, and show no text of a row.

    Args:
        host: address to listen on; the default is this machine alone.
        port: port; 0 takes a free one.
        limits: see ``Limits``.

    Yields:
        The port.

    Raises:
        DeclarationError: the address cannot be listened on.
    """
    metrics = ServerMetrics(WorkerMetrics(worker.tally))

    def health(*, ready: bool) -> tuple[int, bytes, str]:
        state = worker.health()
        good = state.ready if ready else state.alive
        return 200 if good else 503, json_bytes(state.details) + b"\n", JSON

    service = Service(
        pages={
            "/health": lambda: health(ready=False),
            "/ready": lambda: health(ready=True),
            "/metrics": metrics.page,
        },
        open_pages=frozenset({"/health", "/ready", "/metrics"}),
        observe=metrics.observe,
        limits=limits or Limits(),
    )
    worker.watch_backlog()
    with listening(application(service), service.limits, host, port) as bound:
        yield bound
