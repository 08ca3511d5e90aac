"""An HTTP service: who may ask, what is read of a request, and how errors look.

What is answered is given as handlers; everything
that has to hold for all of them is here:

- **connections and time** are bounded by ``server.listening``.
- **bytes** are bounded for a head, for a body, and for all bodies that are held at once.
- **who may ask**: whoever has the token; without one, this machine alone, and no web page in a
  browser on it (names that lead to the loopback address are refused, as are bodies of forms).
- **errors** have the shape of OpenAI's API, which its clients read, and never a traceback.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sqlalchemy as sa

from sbert_pg.errors import (
    BindingError,
    DeclarationError,
    EncodingError,
    SbertPgError,
    VectorError,
    needing,
)
from sbert_pg.sqlstates import Fault, fault_of, words_of

with needing("starlette", "serve", "serve over HTTP"):
    from starlette.applications import Starlette
    from starlette.datastructures import QueryParams
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route

logger = logging.getLogger("sbert_pg.serve")

#: A handler of ``POST``: the body, a JSON object, to the answer, JSON in UTF-8.
Handler = Callable[[dict[str, Any]], Awaitable[bytes]]
#: A handler of ``GET``: nothing to status, body and content type.
Page = Callable[[], tuple[int, bytes, str]]
#: A handler of ``GET`` for people and their browser: the query to the answer.
View = Callable[["QueryParams"], Awaitable["Response"]]
_Answer = Callable[["Request"], Awaitable["Response"]]
#: Called after each answer with path, status and seconds.
Observer = Callable[[str, int, float], None]

JSON = "application/json"


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


class RefusedError(SbertPgError):
    """An answer that is an error, in OpenAI's shape; ``param`` is the wrong field of the body."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> bytes:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json_bytes({"error": error})


def json_bytes(data: Any) -> bytes:
    """Plain data as JSON in UTF-8; what has no form in JSON becomes text."""
    return json.dumps(data, ensure_ascii=False, default=str, separators=(",", ":")).encode()


def wrong(field: str, what: str, code: str = "invalid_value") -> RefusedError:
    """The refusal of a field of the body."""
    return RefusedError(400, f"'{field}' {what}", code, param=field)


def busy(what: str) -> RefusedError:
    """The refusal of a server that has too much in hand; clients try again by themselves."""
    message = f"{what}. Try again in a second, or send less at once."
    return RefusedError(429, message, "rate_limit_exceeded", headers={"Retry-After": "1"})


@dataclass(slots=True)
class Service:
    """What a server answers by path, and to whom.

    ``views`` are for browsers, which may send the token as HTTP's basic password, too;
    ``open_pages`` need no token, such as probes of an orchestrator.
    """

    posts: dict[str, Handler] = field(default_factory=dict)
    pages: dict[str, Page] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)
    open_pages: frozenset[str] = frozenset()
    token: str | None = None
    limits: Limits = field(default_factory=Limits)
    observe: Observer = lambda path, status, seconds: None
    held: int = 0


def require_safe(host: str, token: str | None) -> None:
    """Refuse an address that others reach, unless they need a token that cannot be guessed."""
    if token is None and not _is_loopback(host):
        raise DeclarationError(
            f"Without a token this serves on this machine alone, and {host!r} is an address that "
            "others reach. Set SBERT_PG_TOKEN to a long random text that clients send as "
            "'Authorization: Bearer ...', or serve on 127.0.0.1."
        )
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable()):
        raise DeclarationError(
            "A token has at least 16 characters, all of them printable ASCII; "
            "'openssl rand -hex 32' makes one."
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def application(service: Service) -> Starlette:
    """The ASGI application of a service."""
    gets: dict[str, _Answer] = {
        path: partial(_get, service, path, page) for path, page in service.pages.items()
    }
    gets |= {path: partial(_view, service, view) for path, view in service.views.items()}
    posts: dict[str, _Answer] = {
        path: partial(_post, service, handler) for path, handler in service.posts.items()
    }
    routes = [
        Route(path, _answering(service, path, answer), methods=[method])
        for method, answers in (("POST", posts), ("GET", gets))
        for path, answer in answers.items()
    ]
    known = ", ".join(sorted([*posts, *gets]))

    async def no_such_path(request: Request, error: Exception) -> Response:
        return _refused(RefusedError(404, f"There are {known}.", "not_found"))

    async def no_such_method(request: Request, error: Exception) -> Response:
        method = "POST" if request.url.path in service.posts else "GET"
        refusal = RefusedError(
            405, f"Use {method}.", "method_not_allowed", headers={"Allow": method}
        )
        return _refused(refusal)

    return Starlette(routes=routes, exception_handlers={404: no_such_path, 405: no_such_method})


async def _get(service: Service, path: str, page: Page, request: Request) -> Response:
    if path not in service.open_pages:
        _require_allowed(service, request)
    status, body, kind = await asyncio.to_thread(page)
    return Response(body, status, media_type=kind)


async def _view(service: Service, view: View, request: Request) -> Response:
    _require_allowed(service, request, browser=True)
    site, mode = (request.headers.get(f"sec-fetch-{name}") for name in ("site", "mode"))
    if site == "cross-site" and mode != "navigate":
        raise RefusedError(403, "Another site's page may not read this.", "forbidden")
    return await view(request.query_params)


async def _post(service: Service, handler: Handler, request: Request) -> Response:
    _require_allowed(service, request)
    body = bytearray()
    try:
        data = await _read(service, request, body)
        return Response(await _unless_gone(request, handler(data)), media_type=JSON)
    finally:
        service.held -= len(body)


def _answering(service: Service, path: str, answer: _Answer) -> _Answer:
    """An answer or an error, counted."""

    async def handle(request: Request) -> Response:
        started = time.perf_counter()
        try:
            _require_small_head(service, request)
            response = await answer(request)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception as error:
            response = _refused(refusal_of(error))
        service.observe(path, response.status_code, time.perf_counter() - started)
        return response

    return handle


def _refused(refusal: RefusedError) -> Response:
    return Response(refusal.body(), refusal.status, refusal.headers, media_type=JSON)


def refusal_of(error: Exception) -> RefusedError:
    """What a client is told of an error; of one that it did not cause, as little as it needs."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, (EncodingError, DeclarationError, VectorError)):
        return RefusedError(400, str(error), "invalid_value")
    if isinstance(error, sa.exc.SQLAlchemyError):
        return _refusal_of_database(error)
    logger.error("A request failed", exc_info=error)
    if isinstance(error, SbertPgError):
        status = 503 if isinstance(error, BindingError) else 500
        return RefusedError(status, str(error), "not_available")
    return RefusedError(500, "Something went wrong; the server's log says what.", "internal_error")


def _refusal_of_database(error: sa.exc.SQLAlchemyError) -> RefusedError:
    if isinstance(error, sa.exc.DataError):
        return RefusedError(
            400, f"A value does not fit its column: {words_of(error)}", "invalid_value"
        )
    logger.error("The database refused", exc_info=error)
    if fault_of(error) in (Fault.LOST, Fault.BUSY):
        message = "The database cannot be reached, or is too busy; try again."
        return RefusedError(503, message, "database_not_available", headers={"Retry-After": "5"})
    return RefusedError(500, "The database refused; the server's log says why.", "database_error")


def _require_small_head(service: Service, request: Request) -> None:
    # uvicorn bounds a head that comes in pieces, and not one that comes at once.
    size = sum(len(name) + len(value) for name, value in request.scope["headers"])
    if size + len(request.scope["query_string"]) > service.limits.head_bytes:
        raise RefusedError(431, "The head of the request is too large.", "request_too_large")


def _require_allowed(service: Service, request: Request, *, browser: bool = False) -> None:
    """Refuse who has no token, or where there is none, a web page that a browser runs here."""
    if service.token is None:
        host = request.headers.get("host", "")
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        if not _is_loopback(name) or "origin" in request.headers:
            raise RefusedError(
                403, "Without a token this serves programs on this machine alone.", "forbidden"
            )
        return
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if browser and scheme.lower() == "basic":
        scheme, credentials = "bearer", _password(credentials)
    right = hmac.compare_digest(credentials.strip().encode(), service.token.encode())
    if scheme.lower() != "bearer" or not right:
        message = "Send the token of this server as 'Authorization: Bearer ...'."
        basic = 'Basic realm="sbert-pg: the token is the password"'
        challenge = {"WWW-Authenticate": basic if browser else "Bearer"}
        raise RefusedError(401, message, "invalid_api_key", headers=challenge)


def _password(credentials: str) -> str:
    """The password of HTTP's basic scheme; empty where there is none."""
    with suppress(binascii.Error, UnicodeDecodeError):
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    return ""


async def _read(service: Service, request: Request, body: bytearray) -> dict[str, Any]:
    """The body of a request, a JSON object; ``service`` counts bytes, ``body`` takes them."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise RefusedError(415, f"Send the body as 'Content-Type: {JSON}'.", "invalid_content_type")
    limits = service.limits
    too_large = RefusedError(
        413, f"The body is larger than {limits.body_bytes:,} bytes; send less at once.",
        "request_too_large", headers={"Connection": "close"},
    )  # fmt: skip
    with suppress(ValueError):
        waits = "expect" in request.headers
        most = limits.body_bytes if waits else limits.refused_bytes
        if int(request.headers.get("content-length", "0")) > most:
            raise too_large

    async def read() -> None:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limits.refused_bytes:
                raise too_large
            if size > limits.body_bytes:
                # Most clients read no answer before all is sent, so a little more is thrown away.
                service.held -= len(body)
                body.clear()
                continue
            body.extend(part)
            service.held += len(part)
            if service.held > limits.held_bytes:
                raise busy("The server has too many bytes in hand")
        if size > limits.body_bytes:
            raise too_large

    try:
        await asyncio.wait_for(read(), limits.body)
    except (asyncio.TimeoutError, TimeoutError) as error:
        message = f"The body did not come within {limits.body:.0f} seconds."
        raise RefusedError(408, message, "timeout", headers={"Connection": "close"}) from error
    return parsed(bytes(body))


def parsed(body: bytes) -> dict[str, Any]:
    """A JSON object of numbers that are numbers and of texts that can be stored."""
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_number)
        if b"\\u" in body:
            # An escape may hold half a character, which has no form in UTF-8.
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RefusedError(400, f"The body is no JSON: {reason}", "invalid_json") from error
    if not isinstance(data, dict):
        raise RefusedError(400, "The body has to be a JSON object.", "invalid_json")
    return data


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


async def _unless_gone(request: Request, answer: Awaitable[bytes]) -> bytes:
    """The answer, or its end as soon as the client has hung up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(gone())
    # One waits for the other by a callback: each further task is a turn of the loop.
    leaving.add_done_callback(lambda _: working.cancel())
    try:
        return await working
    except asyncio.CancelledError:
        if leaving.done() and not leaving.cancelled():
            raise ClientDisconnect from None
        raise
    finally:
        leaving.cancel()


def only_known(body: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse fields that mean nothing, which a client would think are followed."""
    for name in body:
        if name not in known:
            raise RefusedError(
                400, f"There is no field {name[:100]!r}; there are {', '.join(known)}.",
                "unknown_parameter", param=name[:100],
            )  # fmt: skip
