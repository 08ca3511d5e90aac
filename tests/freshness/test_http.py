"""The server of health and metrics, under clients that never finish their request."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from sbert_pg.errors import DeclarationError
from sbert_pg.freshness import worker_thread
from sbert_pg.serving.listening import Limits
from sbert_pg.serving.worker import serving_http

from .conftest import wait_for

HALF = 200


def ask(port: int, raw: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(raw)
        answer = b""
        while part := client.recv(65_536):
            answer += part
        return answer


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_head_is_answered_as_get_is(engine, note, encoder):
    with worker_thread(engine) as worker, serving_http(worker, port=0) as port:
        wait_for(lambda: worker.health().alive)
        get = ask(port, b"GET /health HTTP/1.0\r\n\r\n")
        head = ask(port, b"HEAD /health HTTP/1.0\r\n\r\n")
        post = ask(port, b"POST /health HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
    assert b" 200 " in get
    assert b" 200 " in head
    assert b"{" not in head
    assert b"405" in post


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_half_requests_are_bounded_in_number_and_time(engine, note, encoder):
    printed = io.StringIO()
    with (
        worker_thread(engine) as worker,
        contextlib.redirect_stderr(printed),
        serving_http(worker, port=0, limits=Limits(head=2)) as port,
    ):
        # All threads and connections are there, of the worker and of the server.
        wait_for(lambda: worker.tally.listening)
        assert b" 200 " in ask(port, b"GET /health HTTP/1.0\r\n\r\n")
        threads, files = threading.active_count(), open_files()
        clients = []
        for _ in range(HALF):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(b"GET /health HTTP/1.1\r\nX: ")
            clients.append(client)
        assert b" 200 " in ask(port, b"GET /health HTTP/1.0\r\n\r\n"), "meanwhile it answers"
        assert threading.active_count() - threads <= 4
        wait_for(lambda: open_files() - files - HALF <= 4, what="half requests to be given up")
        for client in clients:
            # A reset, as of a client that dies.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        assert b" 200 " in ask(port, b"GET /health HTTP/1.0\r\n\r\n")
    assert "Traceback" not in printed.getvalue()


def test_a_client_that_sends_a_byte_now_and_then_is_given_up(engine, note, encoder):
    with (
        worker_thread(engine) as worker,
        serving_http(worker, port=0, limits=Limits(head=1)) as port,
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        closed = False
        client.settimeout(0.2)
        while not closed:
            with contextlib.suppress(TimeoutError):
                try:
                    client.sendall(b"G")
                    closed = client.recv(1) == b""
                except (BrokenPipeError, ConnectionResetError):
                    closed = True
            time.sleep(0.05)


def test_a_port_that_is_taken_is_said(engine, note, encoder):
    with (
        worker_thread(engine) as worker,
        serving_http(worker, port=0) as port,
        pytest.raises(DeclarationError, match=f"127.0.0.1:{port}"),
        serving_http(worker, port=port),
    ):
        pass


def test_a_worker_without_http_needs_no_extra():
    """Importing what serves is left to --http: the extra is not in every image."""
    program = (
        "import sys; sys.modules.update(uvicorn=None, starlette=None, prometheus_client=None)\n"
        "from sbert_pg.cli.app import run\n"
        "sys.exit(run(['worker', '--once', '-d', 'postgresql://localhost:1/none']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
