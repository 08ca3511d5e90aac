"""Workers as processes: signals, kills, server restarts, and a pooler in between."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg.testing import DeterministicEncoder

from .conftest import pending_count, plain_dsn, violations, wait_for

QUICK = ("--poll", "0.1", "--backoff", "0.05", "--lease", "1")


def insert(plain: psycopg.Connection, rows: int) -> None:
    plain.execute(
        "INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, %s) AS i", [rows]
    )


def embedded(plain: psycopg.Connection) -> int:
    found = plain.execute("SELECT count(embedding) FROM note").fetchone()
    assert found is not None
    return int(found[0])


def test_sigterm_finishes_what_is_in_hand(note, plain, encoder, start_worker):
    insert(plain, 3000)
    worker = start_worker("--batch-size", "50", "--log-json", SBERT_PG_TEST_DELAY="0.005")
    wait_for(lambda: embedded(plain) > 0)
    worker.popen.send_signal(signal.SIGTERM)
    assert worker.popen.wait(timeout=60) == 0
    assert 0 < embedded(plain) < 3000
    leased = plain.execute("SELECT count(*) FROM sbert.pending WHERE claimed_by IS NOT NULL")
    assert leased.fetchone() == (0,), "nothing is left leased"
    assert violations(plain, encoder) == []
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    assert lines[-1]["message"].startswith("Stopping")
    assert lines[-1]["signal"] == "SIGTERM"


def test_sigkill_loses_nothing(note, plain, encoder, start_worker):
    insert(plain, 2000)
    for _ in range(3):
        worker = start_worker(*QUICK, "--batch-size", "20", SBERT_PG_TEST_DELAY="0.004")
        before = embedded(plain)
        wait_for(lambda before=before: embedded(plain) > before)
        worker.popen.kill()
        worker.popen.wait()
        assert violations(plain, encoder) == []
    start_worker(*QUICK)
    wait_for(lambda: pending_count(plain) == 0)
    assert embedded(plain) == 2000
    assert violations(plain, encoder) == []


def test_a_text_that_kills_the_process_fails_alone(note, plain, encoder, start_worker):
    insert(plain, 30)
    plain.execute("UPDATE note SET body = 'kill this one' WHERE id = 13")
    options = (*QUICK, "--max-attempts", "3")
    worker = start_worker(*options)
    deadline = time.monotonic() + 240
    while plain.execute("SELECT 1 FROM sbert.pending WHERE failed").fetchone() is None:
        assert time.monotonic() < deadline
        if worker.popen.poll() is not None:
            worker = start_worker(*options)
        time.sleep(0.05)
    [(key, error)] = plain.execute("SELECT key, error FROM sbert.pending WHERE failed").fetchall()
    assert key == "13"
    assert "no result after 3 attempts" in error
    wait_for(lambda: pending_count(plain) == 0)
    assert embedded(plain) == 29
    assert violations(plain, encoder) == []


def test_the_server_restarts(request, engine, note, plain, encoder, start_worker):
    server = request.getfixturevalue("embedded")
    insert(plain, 300)
    worker = start_worker(*QUICK, "--batch-size", "10", SBERT_PG_TEST_DELAY="0.005")
    wait_for(lambda: embedded(plain) > 0)
    server.control("restart", "immediate")
    engine.dispose()
    with psycopg.connect(plain_dsn(engine), autocommit=True) as again:
        wait_for(lambda: pending_count(again) == 0)
        assert embedded(again) == 300
        assert violations(again, encoder) == []
    assert worker.popen.poll() is None, "it is the same process"
    assert worker.said("trying again") or worker.said("Lost the connection")


def test_a_worker_that_starts_before_its_server(
    request, engine, note, plain, encoder, start_worker
):
    server = request.getfixturevalue("embedded")
    insert(plain, 5)
    server.control("stop", "fast")
    worker = start_worker(*QUICK)
    try:
        wait_for(lambda: worker.said("trying again"))
    finally:
        server.control("start", "fast")
    engine.dispose()
    with psycopg.connect(plain_dsn(engine), autocommit=True) as again:
        wait_for(lambda: pending_count(again) == 0)


def test_a_usage_error_is_told(note, start_worker):
    worker = start_worker("--column", "note.nothing")
    assert worker.popen.wait(timeout=60) == 1
    assert worker.said("No bound column is called 'note.nothing'")


@pytest.fixture
def pgbouncer(engine: sa.Engine, tmp_path: Path):
    """A pooler in transaction mode in front of the test server; yields a URL through it."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    if not Path(program).exists():
        pytest.skip("pgbouncer is not installed (Debian: apt-get install pgbouncer)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host = engine.url.query.get("host") or engine.url.host
    user = engine.url.username or getpass.getuser()
    users = tmp_path / "users.txt"
    users.write_text(f'"{user}" "{engine.url.password or ""}"\n')
    config = tmp_path / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n* = host={host} port={engine.url.port or 5432}\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {users}\npool_mode = transaction\n"
        f"default_pool_size = 4\nlogfile = {tmp_path / 'pgbouncer.log'}\n"
    )
    command = [program, str(config)]
    if os.getuid() == 0:
        # It refuses to run as root, and only the server's own user may see its socket.
        tmp_path.chmod(0o777)
        for parent in list(tmp_path.parents)[:3]:
            parent.chmod(0o755)
        owner = Path(host).stat().st_uid if str(host).startswith("/") else 65534
        command = [program, "-u", pwd.getpwuid(owner).pw_name, str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    url = engine.url.set(host="127.0.0.1", port=port, query={}, username=user)

    def is_up() -> bool:
        assert process.poll() is None, (tmp_path / "pgbouncer.log").read_text()
        try:
            made = sa.create_engine(
                url, connect_args={"prepare_threshold": None, "connect_timeout": 3}
            )
            with made.connect() as connection:
                connection.execute(sa.select(1))
            made.dispose()
        except sa.exc.OperationalError:
            return False
        return True

    try:
        try:
            wait_for(is_up)
        except AssertionError as error:
            raise AssertionError((tmp_path / "pgbouncer.log").read_text()) from error
        yield url
    finally:
        process.terminate()
        process.wait()


def test_behind_pgbouncer_it_says_so_and_polls(pgbouncer, note, plain, encoder, start_worker):
    worker = start_worker("--poll", "300", url=pgbouncer)
    wait_for(lambda: worker.said("Polling for pending rows"))
    assert worker.said("pooler in transaction mode")
    for i in range(12):  # More often than psycopg needs to prepare a statement.
        plain.execute("INSERT INTO note (body) VALUES (%s)", [f"n{i}"])
        wait_for(lambda: pending_count(plain) == 0)
    assert embedded(plain) == 12
    assert violations(plain, encoder) == []


def test_killed_backfills_repeat_at_most_what_was_in_hand(engine, plain, encoder, tmp_path):
    """SIGKILL at random instants; then another process goes on."""
    import sys

    from sbert_pg import catalog
    from sbert_pg.source import Source

    from .conftest import DECLARED, IDENTITY

    plain.execute("CREATE TABLE note (id int PRIMARY KEY, body text, embedding vector(32))")
    plain.execute("INSERT INTO note SELECT i, 'n' || i FROM generate_series(1, 3000) AS i")
    with engine.begin() as connection:
        catalog.bind(connection, IDENTITY, DECLARED, Source.of("body"))

    def start() -> subprocess.Popen:
        url = engine.url.render_as_string(hide_password=False)
        return subprocess.Popen(
            [
                sys.executable, "-m", "sbert_pg.cli.app", "backfill", "note.embedding",
                "--import", "child_encoder", "--database", url, "--batch-size", "20",
                "--span", "150",
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parent),
                "SBERT_PG_TEST_DELAY": "0.003",
            },
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    chance = random.Random(5)
    for _ in range(3):
        before = embedded(plain)
        process = start()
        wait_for(lambda before=before: embedded(plain) > before)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.wait()
        # In one statement: what the process had sent may still be committed.
        noted, written = plain.execute(
            "SELECT (SELECT coalesce(sum(rows), 0) FROM sbert.backfill), "
            "(SELECT count(embedding) FROM note)"
        ).fetchone()
        assert noted == written, "position and vectors move together"
        plain.execute("UPDATE sbert.backfill SET lease_until = now() WHERE state = 'open'")
    first, second = start(), start()
    assert (first.wait(timeout=120), second.wait(timeout=120)) == (0, 0)
    assert embedded(plain) == 3000
    assert plain.execute("SELECT sum(rows) FROM sbert.backfill").fetchone() == (3000,)
    assert violations(plain, encoder) == []


def test_the_other_commands(engine, note, plain, encoder, tmp_path, capfd):
    from sbert_pg.cli.app import run

    url = engine.url.render_as_string(hide_password=False)
    insert(plain, 3)
    assert run(["refresh", "-d", url]) == 0
    assert "3 rows embedded" in capfd.readouterr().out
    plain.execute("UPDATE sbert.pending SET failed = true")
    plain.execute("INSERT INTO sbert.pending (column_id, key, failed) VALUES (1, '2', true)")
    assert run(["retry", "note.embedding", "-d", url, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 1
    plain.execute("UPDATE sbert.pending SET failed = true")
    assert run(["skip", "note.embedding", "-k", "2", "-d", url]) == 0
    assert "1 rows skipped" in capfd.readouterr().out
    assert run(["audit", "note.embedding", "--all", "-d", url, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 2
    plain.execute("SET session_replication_role = replica")
    plain.execute("UPDATE note SET body = 'something else' WHERE id = 1")
    plain.execute("SET session_replication_role = DEFAULT")
    assert run(["audit", "note.embedding", "--all", "--mark", "-d", url]) == 1
    assert run(["refresh", "-d", url, "--json"]) == 0
    assert run(["audit", "note.embedding", "--all", "-d", url]) == 0
    capfd.readouterr()
    assert run(["retry", "note.nothing", "-d", url]) == 1
    assert "Bound columns: public.note.embedding" in capfd.readouterr().err.replace("\n", " ")


def test_encoders_of_the_tests_are_alike(encoder: DeterministicEncoder) -> None:
    """The child's encoder and this process's are one space, or nothing above means anything."""
    from .child_encoder import SlowEncoder

    assert SlowEncoder(dimensions=32).spec.fingerprint == encoder.spec.fingerprint
