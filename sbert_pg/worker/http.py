"""Health and metrics of a worker over HTTP.

- ``/health``: 200 while the process works, 503 when it is to be restarted.
- ``/ready``: 200 while it reaches the database and serves every column that it should, else 503.
- ``/metrics``: for Prometheus; needs the extra ``metrics``, 501 without it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sbert_pg.errors import DeclarationError, MissingExtraError
from sbert_pg.worker.metrics import Exposition
from sbert_pg.worker.worker import Worker


@contextmanager
def serving_http(worker: Worker, host: str = "127.0.0.1", port: int = 9187) -> Iterator[int]:
    """Serve health and metrics while the block runs.

    Args:
        worker: the worker.
        host: address to listen on; the default is this machine alone.
        port: port; 0 takes a free one.

    Yields:
        The port.

    Raises:
        DeclarationError: the address cannot be listened on.
    """
    worker.watch_backlog()
    try:
        server = ThreadingHTTPServer((host, port), _handler(worker))
    except (OSError, OverflowError) as error:
        raise DeclarationError(
            f"Cannot serve health and metrics on {host}:{port}: {error}. Another worker on this "
            "machine may have the port; give each its own."
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="sbert-pg-http", daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def _handler(worker: Worker) -> type[BaseHTTPRequestHandler]:
    try:
        exposition: Exposition | None = Exposition(worker.tally)
        missing = ""
    except MissingExtraError as error:
        exposition, missing = None, str(error)

    class Handler(BaseHTTPRequestHandler):
        server_version = "sbert-pg"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].rstrip("/")
            if path in ("", "/health"):
                health = worker.health()
                self._json(200 if health.alive else 503, health.details)
            elif path == "/ready":
                health = worker.health()
                self._json(200 if health.ready else 503, health.details)
            elif path == "/metrics" and exposition is not None:
                body, content_type = exposition.text()
                self._reply(200, body, content_type)
            elif path == "/metrics":
                self._reply(501, missing.encode(), "text/plain; charset=utf-8")
            else:
                known = b"/health /ready /metrics\n"
                self._reply(404, known, "text/plain; charset=utf-8")

        def _json(self, status: int, data: dict[str, Any]) -> None:
            body = json.dumps(data, ensure_ascii=False, default=str).encode() + b"\n"
            self._reply(status, body, "application/json")

        def _reply(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not worth a line each."""

    return Handler


__all__ = ["serving_http"]
