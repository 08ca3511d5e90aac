"""Limits, time-outs, tokens, and clients that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from command_line import process, sbert_pg

from sbert_pg.errors import DeclarationError
from sbert_pg.serving.http import Limits
from sbert_pg.serving.server import serving
from sbert_pg.testing import DeterministicEncoder

BODY = {"model": "mine", "input": "text"}
TOKEN = "0123456789abcdef"


class Slow(DeterministicEncoder):
    """Waits until it is let go."""

    def __init__(self):
        super().__init__("mine", 8)
        self.go = threading.Event()
        self.entered = threading.Event()

    def encode_document(self, texts):
        self.entered.set()
        assert self.go.wait(60)
        return super().encode_document(texts)


def encoders():
    return {"mine": DeterministicEncoder("mine", 8)}


def until_closed(client: socket.socket) -> bytes:
    client.settimeout(60)
    got = b""
    try:
        while part := client.recv(65_536):
            got += part
    except ConnectionResetError:
        pass
    return got


def connect(port: int, raw: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=60)
    made.sendall(raw)
    return made


def test_many_half_requests_starve_nobody(client):
    with serving(encoders(), port=0, limits=Limits(connections=50)) as port:
        half = [connect(port, b"POST /v1/embeddings HTTP/1.1\r\nX: ") for _ in range(200)]
        for _ in range(3):
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as fresh:
                assert fresh.post("/v1/embeddings", json=BODY).status_code == 200
        for one in half:
            one.close()


@pytest.mark.parametrize("raw", [b"", b"GET /health HTT"])
def test_a_head_that_does_not_come_is_given_up(raw):
    with serving(encoders(), port=0, limits=Limits(head=0.5)) as port, connect(port, raw) as one:
        until_closed(one)


def test_a_body_that_does_not_come_is_given_up():
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    limits = Limits(body=0.5, request=60)
    with serving(encoders(), port=0, limits=limits) as port, connect(port, head) as one:
        assert b" 408 " in until_closed(one)


def accepted(port):
    """Connections to a port that a process of this machine holds the server's side of."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    ends = [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] != "0A"]
    return sum(row[9] != "0" for row in ends)


def wait_for(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="it reads Linux's own table")
@pytest.mark.parametrize("seconds", [1, 8])
def test_an_answer_that_is_not_read_is_given_up(seconds):
    """Made in time or not: a slow machine may need longer than the shorter time."""
    # An answer that no buffer of the kernel's holds.
    texts = [f"text {i}" for i in range(2_000)]
    body = {"model": "mine", "input": texts, "encoding_format": "base64"}
    content = json.dumps(body).encode()

    class Wide(DeterministicEncoder):
        def encode_document(self, texts):
            return np.full((len(texts), 2_000), 1 / 3, np.float32)

    encoder = {"mine": Wide("mine", 2_000)}
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(content)
    )
    with (
        serving(encoder, port=0, limits=Limits(request=seconds, stopping=600)) as port,
        connect(port, head + content) as one,
    ):
        one.recv(1, socket.MSG_PEEK)
        wait_for(lambda: accepted(port) == 0)


def test_a_connection_is_kept_for_the_next_request(client):
    with serving(encoders(), port=0, limits=Limits(head=2)) as port:
        http = client(port)
        ports = set()
        for pause in (2.2, 0):
            with http.stream("POST", "/v1/embeddings", json=BODY) as answer:
                ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
                answer.read()
            time.sleep(pause)
        assert len(ports) == 1


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [20_000, 20_000_000])
def test_a_large_body_is_refused(client, chunked, size):
    """Its client reads why, although it sends all of it first, and nothing of it is kept."""
    limits = Limits(body_bytes=10_000, held_bytes=15_000)
    with serving(encoders(), port=0, limits=limits) as port:
        content = b'{"model": "mine", "input": "' + b"x" * size + b'"}'
        for _ in range(3):
            body = iter([content[:5_000], content[5_000:]]) if chunked else content
            answer = client(port).post(
                "/v1/embeddings", content=body, headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == 413
        assert client(port).post("/v1/embeddings", json=BODY).status_code == 200


def test_a_body_without_end_is_cut():
    limits = Limits(body_bytes=10_000, refused_bytes=50_000)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    part = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    with (
        serving(encoders(), port=0, limits=limits) as port,
        connect(port, head + b"Transfer-Encoding: chunked\r\n\r\n") as one,
        pytest.raises(ConnectionError),
    ):
        one.sendall(part * 10_000)


def test_all_bodies_together_are_bounded_and_given_back(client):
    with serving(encoders(), port=0, limits=Limits(held_bytes=10_000)) as port:
        large = BODY | {"input": "x" * 20_000}
        for _ in range(3):
            answer = client(port).post("/v1/embeddings", json=large)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
        assert client(port).post("/v1/embeddings", json=BODY).status_code == 200


def test_a_large_head_is_refused(client):
    with serving(encoders(), port=0) as port:
        answer = client(port).get("/health", headers={"X": "x" * 100_000})
        assert answer.status_code == 431
        assert client(port).get("/health?" + "x" * 50_000).status_code == 431


def test_a_client_that_hangs_up_takes_its_texts_along(client):
    slow = Slow()
    with serving({"mine": slow}, port=0) as port:
        first = threading.Thread(target=lambda: client(port).post("/v1/embeddings", json=BODY))
        first.start()
        assert slow.entered.wait(60)
        content = json.dumps({"model": "mine", "input": "gone"}).encode()
        gone = connect(
            port,
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(content) + content,
        )
        gone.close()
        counted = 'sbert_pg_http_requests_total{path="/v1/embeddings",status="499"} 1.0'
        until = time.monotonic() + 60
        while counted not in client(port).get("/metrics").text:
            assert time.monotonic() < until
        slow.go.set()
        first.join()
        assert client(port).post("/v1/embeddings", json=BODY).status_code == 200
    assert "gone" not in slow.encoded


def test_requests_under_way_are_finished_when_it_stops(client):
    slow = Slow()
    answers = []
    with serving({"mine": slow}, port=0) as port:
        asking = threading.Thread(
            target=lambda: answers.append(client(port).post("/v1/embeddings", json=BODY))
        )
        asking.start()
        assert slow.entered.wait(60)
        threading.Timer(0.5, slow.go.set).start()
    asking.join()
    assert answers[0].status_code == 200


def test_without_a_token_it_serves_this_machine_alone(client):
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        with (
            pytest.raises(DeclarationError, match="SBERT_PG_TOKEN"),
            serving({}, host=host, port=0),
        ):
            pass
    with pytest.raises(DeclarationError, match="16 characters"), serving({}, token="short", port=0):
        pass
    with serving(encoders(), port=0) as port:
        http = client(port)
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Host": ""}):
            assert http.post("/v1/embeddings", json=BODY, headers=headers).status_code == 403
        form = {"Content-Type": "text/plain"}
        assert http.post("/v1/embeddings", content=b"{}", headers=form).status_code == 415
        for host in ("localhost", "127.0.0.1:80", "[::1]:80"):
            answer = http.post("/v1/embeddings", json=BODY, headers={"Host": host})
            assert answer.status_code == 200


def test_with_a_token_it_serves_those_who_have_it(client):
    with serving(encoders(), host="0.0.0.0", port=0, token=TOKEN) as port:
        http = client(port)
        for given in ("", TOKEN, f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}"):
            answer = http.post("/v1/embeddings", json=BODY, headers={"Authorization": given})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        raw = f"Bearer {TOKEN}é".encode("latin-1")
        assert http.get("/metrics", headers={"Authorization": raw}).status_code == 401
        assert http.get("/v1/models").status_code == 401
        assert http.get("/health").status_code == 200
        asked = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN)
        assert len(asked.embeddings.create(model="mine", input="text").data) == 1


def test_small_answers_are_sent_at_once(monkeypatch):
    """An answer of two writes waits for the client's acknowledgement where this is off."""
    seen = []
    original = asyncio.selector_events._SelectorSocketTransport.__init__

    def watched(self, loop, sock, *args, **options):
        original(self, loop, sock, *args, **options)
        seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(asyncio.selector_events._SelectorSocketTransport, "__init__", watched)
    with serving(encoders(), port=0) as port:
        httpx.get(f"http://127.0.0.1:{port}/health")
    assert seen
    assert all(seen)


def test_paths_and_methods_that_are_not_served(client):
    with serving(encoders(), port=0) as port:
        assert client(port).get("/nothing").json()["error"]["code"] == "not_found"
        answer = client(port).get("/v1/embeddings")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert client(port).post("/search", json={}).status_code == 404
        assert client(port).head("/health").status_code == 200


def test_what_is_no_http_is_refused_and_leaves_no_traceback(capfd):
    with serving(encoders(), port=0) as port:
        for raw in (
            b"\0" * 500,
            b"\x16\x03\x01\x02\x00",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\r\n" * 9_000,
        ):
            with connect(port, raw) as one:
                # It may be closed by then: there is no need to wait for the rest of such bytes.
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_WR)
                until_closed(one)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_the_command_serves_until_it_is_told_to_stop(articles):
    running = process("serve", "article:id,title", "--http", "127.0.0.1:0", url=articles.url)
    # Libraries may have something to say first.
    said = next(line for line in running.stderr if "http://" in line)
    port = int(said.rpartition(":")[2])
    body = {"table": "article", "query": "money back", "limit": 1}
    answer = httpx.post(f"http://127.0.0.1:{port}/search", json=body, timeout=60)
    assert answer.json()["results"][0]["row"] == {"id": 1, "title": "Refunds"}
    body = {"model": "all-MiniLM-L6-v2", "input": "money back"}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/embeddings", json=body, timeout=60)
    assert len(answer.json()["data"][0]["embedding"]) == 384
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 0


def test_the_command_refuses_what_cannot_be_served(database_url):
    assert (
        "SBERT_PG_TOKEN"
        in sbert_pg("serve", "--encoder", "all-MiniLM-L6-v2", "--http", "0.0.0.0:0").stderr
    )
    assert "nothing to serve" in sbert_pg("serve").stderr
    assert sbert_pg("serve", "nothing", url=database_url).returncode == 1
    assert sbert_pg("serve", "--http", "here").returncode == 2
