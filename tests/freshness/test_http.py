"""The server of health and metrics, under clients that never finish their request."""

from __future__ import annotations

import contextlib
import io
import logging
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
from sbert_pg.serving.http import JSON, Limits, Service, application
from sbert_pg.serving.server import listening, serving_http

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
def test_half_requests_are_bounded_in_number_and_time(engine, note, encoder, monkeypatch):
    # The log may still have a stream of an earlier test, which is closed and is not meant here.
    monkeypatch.setattr(logging, "raiseExceptions", False)
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


BIG = b"x" * 8_000_000


@contextlib.contextmanager
def pages(**limits):
    """The server by itself, with a small page and one that no buffer of a socket holds."""
    service = Service(
        pages={"/small": lambda: (200, b"{}", JSON), "/big": lambda: (200, BIG, JSON)},
        open_pages=frozenset({"/small", "/big"}),
        observe=lambda *_, **__: None,
        limits=Limits(**limits),
    )
    with listening(application(service), service.limits, "127.0.0.1", 0) as port:
        assert b" 200 " in ask(port, b"GET /small HTTP/1.0\r\n\r\n")
        yield port


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("more", [b"", b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n" * 3])
def test_a_client_that_never_reads_its_answer_is_given_up(more):
    with pages(request=3) as port:
        before = open_files()
        clients = []
        for _ in range(5):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" + more)
            assert client.recv(4), "it is being answered"
            clients.append(client)
        wait_for(lambda: open_files() - before <= len(clients), what="unread answers to be cut")
        for client in clients:
            client.close()


def test_a_client_that_reads_late_but_reads_is_kept():
    with pages(request=60) as port, socket.create_connection(("127.0.0.1", port)) as client:
        for _ in range(2):
            client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
            read = 0
            while read < len(BIG):
                part = client.recv(65_536)
                assert part, "it was cut"
                read += len(part)


@pytest.mark.parametrize(
    "raw",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(range(160)),
        b"GET /small HTTP/1.1\r\nHost: x\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(5000)),
        b"POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"GET /sm\x00all HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%zz%ff/../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /small%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"CONNECT evil:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"TRACE /small HTTP/1.1\r\nHost: x\r\nCookie: secret\r\nConnection: close\r\n\r\n",
    ],
    ids=["http2", "tls", "headers", "negative", "two lengths", "nul", "percent", "newline",
         "connect", "trace"],
)  # fmt: skip
def test_what_is_no_request_for_a_page_is_refused(raw, capfd):
    with pages(head=2, idle=2) as port:
        answer = ask(port, raw)
        assert b" 200 " in ask(port, b"GET /small HTTP/1.0\r\n\r\n")
    assert answer.split()[1].startswith(b"4"), answer[:80]
    head, _, _ = answer.partition(b"\r\n\r\n")
    assert b"evil" not in head.lower()
    assert b"secret" not in answer
    assert "Traceback" not in capfd.readouterr().err
