"""What is served over HTTP: encoders, rerankers and searches, or a worker's health; and metrics.

And by what: uvicorn in a thread, with bounds on connections and time. A new connection takes the
place of the one that has been silent longest, so clients that open connections and send nothing, or
a byte now and then, starve nobody; a request's head, its answer, and the time between two requests
are each bounded.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa

from sbert_pg.errors import DeclarationError, needing
from sbert_pg.freshness.settings import BUCKETS, Durations, Tally
from sbert_pg.freshness.worker import Worker
from sbert_pg.serving.embeddings import Embeddings, Reranking, Reranks
from sbert_pg.serving.exposed import Question, Shown
from sbert_pg.serving.http import (
    JSON,
    Limits,
    RefusedError,
    Service,
    application,
    busy,
    json_bytes,
    only_known,
    require_safe,
)
from sbert_pg.spec import TextEncoder

with needing("prometheus-client", "serve", "serve metrics"):
    from prometheus_client import CollectorRegistry, Counter, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    from prometheus_client.registry import Collector

with needing("uvicorn", "serve", "serve over HTTP"):
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

P = ParamSpec("P")
T = TypeVar("T")

#: Searches at a time, and those that wait for one of these to end.
SEARCHES, MOST_SEARCHES = 8, 64
#: Counters: attribute of ``ColumnTally``, name, help.
_COUNTERS = (
    ("embedded", "sbert_pg_rows_embedded", "Rows whose vector was written."),
    ("texts", "sbert_pg_texts_encoded", "Texts encoded; one that rows of a batch share is one."),
    ("errors", "sbert_pg_row_errors", "Attempts to embed a row that ended with an error."),
    ("failed", "sbert_pg_rows_failed", "Rows that ended as failed after their last attempt."),
    ("changed", "sbert_pg_rows_changed", "Rows whose text changed while it was encoded."),
    ("busy", "sbert_pg_rows_busy", "Rows put off because another transaction held them locked."),
    ("batches", "sbert_pg_batches", "Batches claimed."),
)
_HISTOGRAMS = (
    ("claim", "sbert_pg_claim_seconds", "Time to claim a batch and read its texts."),
    ("encode", "sbert_pg_encode_seconds", "Time to encode a batch."),
    ("write", "sbert_pg_write_seconds", "Time to write a batch."),
)
_BACKLOG = (
    ("pending", "sbert_pg_pending_rows", "New and changed rows that wait for their vector."),
    ("backfill", "sbert_pg_backfill_rows", "Rows of a backfill that wait for their vector."),
    ("age", "sbert_pg_caught_up_seconds", "Seconds since nothing new was pending."),
    ("failed", "sbert_pg_failed_rows", "Rows that are failed, until their text changes."),
)


@contextmanager
def serving(
    encoders: Mapping[str, TextEncoder],
    shown: Shown | None = None,
    *,
    rerankers: Mapping[str, Reranks] | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    limits: Limits | None = None,
    views: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Iterator[int]:
    """Serve encoders, and searches of tables, over HTTP while the block runs; docs/serve.md.

    Args:
        encoders: encoders by the names under which clients ask for them.
        shown: tables that are searched; ``None`` for none.
        host: address to listen on; others than this machine need a token.
        port: port; 0 takes a free one.
        views: pages for browsers by path, such as ``Explorer.views``: query to response.

    Yields:
        The port.
    """
    require_safe(host, token)
    metrics = ServerMetrics()
    encoding = ThreadPoolExecutor(1, thread_name_prefix="sbert-pg-batch")
    embeddings = Embeddings(encoders, encoding, metrics.count_batch)
    service = Service(
        posts={"/v1/embeddings": embeddings.answer},
        pages={
            "/v1/models": embeddings.models,
            "/health": lambda: (200, b'{"status": "ok"}\n', JSON),
            "/ready": lambda: _ready(shown),
            "/metrics": metrics.page,
        },
        open_pages=frozenset({"/health", "/ready"}),
        token=token,
        limits=limits or Limits(),
        observe=metrics.observe,
    )
    if rerankers:
        rerank = Reranking(rerankers, encoding, metrics.count_batch).answer
        service.posts |= {"/rerank": rerank, "/v1/rerank": rerank}
    executor = ThreadPoolExecutor(SEARCHES, thread_name_prefix="sbert-pg-search")
    turns = _Turns(executor)
    if shown is not None:
        service.posts["/search"] = partial(_search, shown, turns)
    for path, view in (views or {}).items():
        service.views[path] = turns.taking(view)
    try:
        with listening(application(service), service.limits, host, port) as bound:
            yield bound
    finally:
        encoding.shutdown(wait=False, cancel_futures=True)
        executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def serving_http(
    worker: Worker, host: str = "127.0.0.1", port: int = 9187, *, limits: Limits | None = None
) -> Iterator[int]:
    """Serve a worker's health and metrics while the block runs, and yield the port.

    ``/health`` is 200 while the process works and 503 when it is to be restarted; ``/ready`` is 200
    while it reaches the database and serves every column that it should, else 503; ``/metrics`` is
    for Prometheus. They need no token, since orchestrators have none, and show no text of a row.
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


def _ready(shown: Shown | None) -> tuple[int, bytes, str]:
    """Whether the database answers, where there is one; who asks needs no token, so no reason."""
    if shown is not None:
        try:
            with shown.engine.connect() as connection:
                connection.execute(sa.select(1))
        except sa.exc.SQLAlchemyError:
            return 503, json_bytes({"ready": False}), JSON
    return 200, b'{"ready": true}\n', JSON


class _Turns:
    """Work on the database: as much at a time as there are threads, and a bounded number waits."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._under_way = 0

    async def take(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What some work gives, when its turn comes; refused where too many wait."""
        if self._under_way >= MOST_SEARCHES:
            raise busy("Too many searches wait")
        self._under_way += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._executor, partial(work, *args, **kwargs))
        finally:
            self._under_way -= 1

    def taking(self, view: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
        """A view that waits for its turn."""

        async def answer(query: Any) -> Any:
            return await self.take(view, query)

        return answer


async def _search(shown: Shown, turns: _Turns, body: dict[str, Any]) -> bytes:
    """``/search``."""
    only_known(body, ("table", "query", "by", "limit", "where"))
    if "query" not in body or "table" not in body:
        raise RefusedError(400, "A search has 'table' and 'query'.", "missing_parameter")
    question = Question(
        body["query"] if body["query"] is not None else "",
        body.get("by", "meaning"),
        body.get("limit", 10),
        body.get("where"),
    )
    rows = await turns.take(shown.ask, body["table"], question)
    results = [{**one.scores, **one.parts} for one in rows]
    return json_bytes({"table": body["table"], "results": results})


class WorkerMetrics(Collector):  # type: ignore[misc]
    """The tally of a worker; each scrape reads the counts as they are."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def collect(self) -> Iterator[Any]:
        """All metrics."""
        columns, backlog = self._tally.columns(), self._tally.backlog
        for attribute, *texts in _COUNTERS:
            counts = {c: (getattr(tally, attribute),) for c, tally in columns.items()}
            yield _by_column(CounterMetricFamily, texts, counts)
        for attribute, *texts in _HISTOGRAMS:
            durations = {c: _buckets(getattr(tally, attribute)) for c, tally in columns.items()}
            yield _by_column(HistogramMetricFamily, texts, durations)
        for attribute, *texts in _BACKLOG:
            numbers = {c: getattr(waiting, attribute) for c, waiting in backlog.items()}
            known = {c: (float("nan") if n is None else n,) for c, n in numbers.items()}
            yield _by_column(GaugeMetricFamily, texts, known)
        yield GaugeMetricFamily(
            "sbert_pg_listening", "Whether LISTEN works.", value=int(self._tally.listening)
        )
        yield CounterMetricFamily(
            "sbert_pg_database_errors",
            "Times that the database was away or could not write.",
            value=self._tally.database_errors,
        )


def _by_column(family: Any, texts: list[str], values: Mapping[str, tuple[Any, ...]]) -> Any:
    metric = family(*texts, labels=["column"])
    for column, value in values.items():
        metric.add_metric([column], *value)
    return metric


def _buckets(durations: Durations) -> tuple[list[tuple[str, float]], float]:
    """Cumulated counts by upper bound, as Prometheus wants them, and the total time."""
    bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
    return list(zip(bounds, accumulate(durations.counts), strict=True)), durations.total


class ServerMetrics:
    """What an HTTP server counts, in its own registry: no application's is touched."""

    def __init__(self, collector: Collector | None = None) -> None:
        self.registry = CollectorRegistry()
        if collector is not None:
            self.registry.register(collector)
        self._requests = Counter(
            "sbert_pg_http_requests", "Requests answered.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "sbert_pg_http_seconds", "Time to answer a request.", ["path"],
            buckets=BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._texts = Counter(
            "sbert_pg_http_texts_encoded", "Texts encoded.", registry=self.registry
        )
        self._batches = Counter(
            "sbert_pg_http_batches", "Batches that they were encoded in.", registry=self.registry
        )

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_batch(self, requests: int, texts: int) -> None:
        """Count a batch."""
        self._batches.inc()
        self._texts.inc(texts)

    def page(self) -> tuple[int, bytes, str]:
        """What Prometheus scrapes: status, body and content type."""
        return 200, generate_latest(self.registry), CONTENT_TYPE_LATEST


@contextmanager
def listening(app: Any, limits: Limits, host: str, port: int) -> Iterator[int]:
    """Serve in a thread while the block runs, and yield the port; what is under way is finished."""
    bound = _bound(host, port)
    protocol = type("Guarded", (_Guarded,), {"limits": limits, "waiting": {}})
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", loop="asyncio",
        log_config=None, access_log=False, proxy_headers=False, server_header=False,
        timeout_keep_alive=int(limits.idle), timeout_graceful_shutdown=int(limits.stopping),
        h11_max_incomplete_event_size=limits.head_bytes, backlog=limits.connections,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name="sbert-pg-http", daemon=True)
    thread.start()
    try:
        yield int(bound.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(limits.stopping + 5)
        bound.close()


def _bound(host: str, port: int) -> socket.socket:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = addresses[0]
        # The protocol is named for asyncio to send small answers at once (TCP_NODELAY).
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(512)
        except BaseException:
            bound.close()
            raise
        return bound
    except (OSError, OverflowError, ValueError) as error:
        raise DeclarationError(
            f"Cannot serve on {host}:{port}: {error}. Another process of this machine may have the "
            "port; give each its own."
        ) from error


class _Guarded(H11Protocol):
    """Uvicorn's protocol with a bound on connections, and on the time of each of their phases.

    uvicorn bounds the time between two requests only. Here a timer runs while a request's head is
    awaited, and another until its answer has been taken; a connection that lasts longer is cut.
    """

    limits: Limits
    #: Connections that have no request under way, the one that has waited longest first.
    waiting: dict[H11Protocol, None]
    timer: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None
    answering = False
    deadline = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections and self.waiting:
            next(iter(self.waiting)).transport.abort()
        elif len(self.connections) > self.limits.connections:
            transport.abort()
        self.waiting[self] = None
        self.set_timer(self.limits.head)

    def data_received(self, data: bytes) -> None:
        if self.timer is None:
            self.set_timer(self.limits.head)
        super().data_received(data)
        self.look()

    def on_response_complete(self) -> None:
        self.answering = False
        self.set_timer(None)
        if self.transport.get_write_buffer_size():
            # Complete for uvicorn, which has handed it on; the client has yet to take it.
            self.unread = self.loop.call_at(self.deadline, self.give_up_unread)
        self.waiting[self] = None
        # Takes what came meanwhile, which may be the next request.
        super().on_response_complete()
        self.look()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        self.set_timer(None)
        self.forget_unread()
        super().connection_lost(exc)

    def look(self) -> None:
        """Take note where a request's head has come."""
        if not self.answering and self.cycle is not None and not self.cycle.response_complete:
            self.answering = True
            self.waiting.pop(self, None)
            self.forget_unread()
            self.deadline = self.loop.time() + self.limits.request
            self.set_timer(self.limits.request)

    def give_up_unread(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def forget_unread(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
        self.unread = None

    def set_timer(self, seconds: float | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None
        if seconds is not None and not self.transport.is_closing():
            self.timer = self.loop.call_later(seconds, self.transport.abort)
