"""What is served over HTTP: encoders, rerankers and searches, or a worker's health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa

from sbert_pg.freshness.worker import Worker
from sbert_pg.serving.embeddings import Embeddings, Reranking, Reranks
from sbert_pg.serving.exposed import Question, Shown
from sbert_pg.serving.http import (
    JSON,
    RefusedError,
    Service,
    application,
    busy,
    json_bytes,
    only_known,
    require_safe,
)
from sbert_pg.serving.listening import Limits, listening
from sbert_pg.serving.metrics import ServerMetrics, WorkerMetrics
from sbert_pg.spec import TextEncoder

P = ParamSpec("P")
T = TypeVar("T")

#: Searches at a time, and those that wait for one of these to end.
SEARCHES, MOST_SEARCHES = 8, 64


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
        host: address to listen on; this machine alone by default.
        port: port; 0 takes a free one.
        token: what clients have to send; needed for other addresses.
        limits: see ``Limits``.
        views: pages for browsers by path, such as ``Explorer.views``: query to response.

    Yields:
        The port.

    Raises:
        DeclarationError: the address needs a token, or cannot be listened on; or a reranker gives
            several scores of a pair.
        MissingExtraError: the extra ``serve`` is not installed.
    """
    require_safe(host, token)
    metrics = ServerMetrics()
    encoding = ThreadPoolExecutor(1, thread_name_prefix="sbert-pg-batch")
    embeddings = Embeddings(encoders, encoding, metrics)
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
        rerank = Reranking(rerankers, encoding, metrics).answer
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
        """What some work gives, when its turn comes.

        Raises:
            RefusedError: too many wait.
        """
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
