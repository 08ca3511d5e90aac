"""The HTTP server: uvicorn in a thread, with bounds on connections and time.

A new connection takes the place of the one that has been silent longest, so clients that open
connections and send nothing, or a byte now and then, starve nobody; a request's head, its answer,
and the time between two requests are each bounded.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sbert_pg.errors import DeclarationError, needing

with needing("uvicorn", "serve", "serve over HTTP"):
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes at most; seconds and bytes.

    Attributes:
        connections: open connections.
        head: seconds for the head of a request, from the connection or its first byte on.
        body: seconds for its body.
        request: seconds from its head to the last byte of the answer.
        idle: seconds that a connection is kept between two requests; more than the 60 that load
            balancers usually keep theirs.
        head_bytes: bytes of a head.
        body_bytes: bytes of a body.
        refused_bytes: bytes of a larger one that are read and forgotten before it is refused, so
            that its client reads why; beyond that its connection is closed while it sends.
        held_bytes: bytes of all bodies that are being read or answered.
        stopping: seconds that requests under way have when the server is stopped.
    """

    connections: int = 512
    head: float = 10.0
    body: float = 30.0
    request: float = 120.0
    idle: float = 75.0
    head_bytes: int = 16_384
    body_bytes: int = 8_388_608
    refused_bytes: int = 67_108_864
    held_bytes: int = 67_108_864
    stopping: float = 30.0


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
