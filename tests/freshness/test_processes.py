"""Workers as processes: signals, kills, server restarts, and a pooler in between."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import catalog, embed_on_flush, embedding_column, nearest
from sbert_pg.cli.app import run
from sbert_pg.source import Source
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.wire import to_text

from .conftest import (
    DECLARED,
    IDENTITY,
    failure_rows,
    pending_count,
    plain_dsn,
    states,
    violations,
    wait_for,
)

QUICK = ("--set", "poll_interval=0.1", "--set", "backoff=0.05", "--set", "lease=2")
#: What a killed process had in hand is tried a few rows at a time afterwards.
SMALL = ("--set", "batch_size=5")


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
    worker = start_worker(
        "--set", "batch_size=50", "--log", "info:json", SBERT_PG_TEST_DELAY="0.005"
    )
    wait_for(lambda: embedded(plain) > 0)
    worker.popen.send_signal(signal.SIGTERM)
    assert worker.popen.wait(timeout=60) == 0
    assert 0 < embedded(plain) < 3000
    leased = plain.execute("SELECT count(*) FROM sbert.claim")
    assert leased.fetchone() == (0,), "nothing is left leased"
    assert violations(plain, encoder) == []
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    assert lines[-1]["message"].startswith("Stopping")
    assert lines[-1]["signal"] == "SIGTERM"


def test_sigkill_loses_nothing(note, plain, encoder, start_worker):
    insert(plain, 800)
    for _ in range(3):
        worker = start_worker(*QUICK, *SMALL, SBERT_PG_TEST_DELAY="0.03")
        before = embedded(plain)
        wait_for(lambda before=before: embedded(plain) > before)
        worker.popen.kill()
        worker.popen.wait()
        assert violations(plain, encoder) == []
    start_worker(*QUICK)
    wait_for(lambda: pending_count(plain) == 0)
    assert embedded(plain) == 800
    assert violations(plain, encoder) == []


def test_a_text_that_kills_the_process_fails_alone(note, plain, encoder, start_worker):
    insert(plain, 30)
    plain.execute("UPDATE note SET body = 'kill this one' WHERE id = 13")
    options = (*QUICK, "--set", "max_attempts=3")
    worker = start_worker(*options)
    deadline = time.monotonic() + 240
    while states(plain)[13] != "failed":
        assert time.monotonic() < deadline
        if worker.popen.poll() is not None:
            worker = start_worker(*options)
        time.sleep(0.05)
    # Those that were in hand with it have a record until they are done.
    wait_for(lambda: pending_count(plain) == 0)
    [(key, attempts, failed, error)] = failure_rows(plain)
    assert (key, attempts, failed) == ('["13"]', 3, True)
    assert "the process that encoded it came to an end" in error
    assert embedded(plain) == 29
    assert violations(plain, encoder) == []


def test_the_server_restarts(request, engine, note, plain, encoder, start_worker):
    server = request.getfixturevalue("embedded")
    insert(plain, 300)
    worker = start_worker(*QUICK, "--set", "batch_size=10", SBERT_PG_TEST_DELAY="0.005")
    wait_for(lambda: embedded(plain) > 0)
    # Recovery begins at the last checkpoint, which may be as long ago as the first test.
    plain.execute("CHECKPOINT")
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
    worker = start_worker("note.nothing")
    assert worker.popen.wait(timeout=60) == 1
    assert worker.said("No bound column is called 'note.nothing'")


@pytest.fixture
def pgbouncer(engine: sa.Engine, tmp_path: Path):
    """A pooler in transaction mode in front of the test server; yields a URL through it."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    if not Path(program).exists():
        pytest.skip("pgbouncer is not installed (Debian: apt-get install pgbouncer)")
    # A short path: that of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="sbert-pg-pooler-"))
    host = engine.url.query.get("host") or engine.url.host
    user = engine.url.username or getpass.getuser()
    users = tmp_path / "users.txt"
    users.write_text(f'"{user}" "{engine.url.password or ""}"\n')
    config = tmp_path / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n* = host={host} port={engine.url.port or 5432}\n[pgbouncer]\n"
        f"listen_addr =\nlisten_port = 6432\nunix_socket_dir = {folder}\n"
        f"auth_type = trust\nauth_file = {users}\npool_mode = transaction\n"
        f"default_pool_size = 4\nlogfile = {tmp_path / 'pgbouncer.log'}\n"
    )
    command = [program, str(config)]
    if os.getuid() == 0:
        # It refuses to run as root, and only the server's own user may see its socket.
        for path in (tmp_path, folder):
            path.chmod(0o777)
        for parent in list(tmp_path.parents)[:3]:
            parent.chmod(0o755)
        owner = Path(host).stat().st_uid if str(host).startswith("/") else 65534
        command = [program, "-u", pwd.getpwuid(owner).pw_name, str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    url = engine.url.set(host=None, port=6432, query={"host": str(folder)}, username=user)

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
        shutil.rmtree(folder)


def test_behind_pgbouncer_it_says_so_and_polls(pgbouncer, note, plain, encoder, start_worker):
    worker = start_worker("--set", "poll_interval=300", url=pgbouncer)
    wait_for(lambda: worker.said("Polling for pending rows"))
    assert worker.said("pooler in transaction mode")
    for i in range(8):  # More often than psycopg needs to prepare a statement.
        plain.execute("INSERT INTO note (body) VALUES (%s)", [f"n{i}"])
        wait_for(lambda: pending_count(plain) == 0)
    assert embedded(plain) == 8
    assert violations(plain, encoder) == []


async def test_an_application_on_asyncpg_behind_pgbouncer(pgbouncer, note, plain, encoder):
    """As docs/howto/pgbouncer.md has it: each statement has its own name, and none is kept."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = note
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding = embedding_column("deterministic", "body", dimensions=32, nullable=True)

    engine = create_async_engine(
        pgbouncer.set(drivername="postgresql+asyncpg"),
        poolclass=sa.NullPool,
        connect_args={
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"__asyncpg_{uuid.uuid4()}__",
        },
    )
    sessions = async_sessionmaker(engine)
    embed_on_flush(sessions)

    async def write_and_search(text: str) -> str:
        async with sessions() as session:
            session.add(Note(body=text))
            await session.commit()
            found = await session.execute(nearest(Note.embedding, text, limit=1))
            return found.one()[0].body

    texts = [f"n{i}" for i in range(24)]
    assert await asyncio.gather(*map(write_and_search, texts)) == texts
    await engine.dispose()
    assert embedded(plain) == len(texts)
    assert violations(plain, encoder) == []


def test_killed_backfills_leave_nothing_half_done(engine, plain, encoder):
    """SIGKILL at random instants; then others go on."""
    plain.execute("CREATE TABLE note (id int PRIMARY KEY, body text, embedding vector(32))")
    plain.execute("INSERT INTO note SELECT i, 'n' || i FROM generate_series(1, 800) AS i")
    with engine.begin() as connection:
        catalog.bind(connection, IDENTITY, DECLARED, Source.of("body"))

    def start(*options: str) -> subprocess.Popen:
        url = engine.url.render_as_string(hide_password=False)
        return subprocess.Popen(
            [
                sys.executable, "-m", "sbert_pg.cli.app", "backfill", "note.embedding",
                "--app", "child_encoder", "--database", url, "--set", "lease=2", *options,
                # Rows that were in hand when a process ended are tried again at once.
                "--set", "backoff=0",
            ],
            env={
                **os.environ,
                "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
                "SBERT_PG_TEST_DELAY": "0.005",
            },
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    chance = random.Random(5)
    for _ in range(3):
        before = embedded(plain)
        process = start(*SMALL)
        wait_for(lambda before=before: embedded(plain) > before)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.wait()
        assert violations(plain, encoder) == []
    shared = ("--set", "batch_size=20")
    first, second = start(*shared), start(*shared)
    assert (first.wait(timeout=240), second.wait(timeout=240)) == (0, 0)
    assert embedded(plain) == 800
    assert set(states(plain).values()) == {"fresh"}
    assert failure_rows(plain) == [], "nothing failed, and nobody is suspected any more"
    assert violations(plain, encoder) == []


def test_the_other_commands(engine, note, plain, encoder, capfd):
    url = engine.url.render_as_string(hide_password=False)
    insert(plain, 3)
    assert run(["worker", "--once", "-d", url]) == 0
    assert "3 rows embedded" in capfd.readouterr().out
    refusing(plain)
    plain.execute("UPDATE note SET body = 'refused', embedding = NULL WHERE id = 2")
    once = ["worker", "--once", "-d", url, "--set", "max_attempts=1", "--log", "error"]
    assert run(once) == 1
    capfd.readouterr()
    assert run(["failed", "note.embedding", "-d", url, "--json"]) == 0
    [one] = json.loads(capfd.readouterr().out)
    assert (one["key"], one["failed"], one["skipped"]) == ("2", True, False)
    assert run(["failed", "note", "-d", url, "--retry", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 1
    assert run(once) == 1
    assert run(["failed", "note.embedding", "--skip", "--key", "2", "-d", url]) == 0
    assert "1 rows skipped" in capfd.readouterr().out
    assert run(["failed", "note.embedding", "-d", url, "--retry", "--skip"]) == 1
    assert run(["audit", "note.embedding", "--sample", "0", "-d", url, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 2
    corrupt(plain, 1, encoder)
    assert run(["audit", "note.embedding", "--sample", "0", "--requeue", "-d", url]) == 1
    assert run(["worker", "--once", "-d", url, "--json"]) == 0
    assert run(["audit", "note.embedding", "--sample", "0", "-d", url]) == 0
    capfd.readouterr()
    assert run(["backfill", "note.nothing", "-d", url]) == 1
    assert "public.note.embedding" in capfd.readouterr().err.replace("\n", "")
    assert run(["worker", "--once", "-d", url, "--set", "speed=3"]) == 1
    assert "there is no setting 'speed'" in capfd.readouterr().err.replace("\n", " ")


def refusing(plain: psycopg.Connection) -> None:
    """A constraint under which a row can have no vector."""
    plain.execute("ALTER TABLE note ADD CHECK (embedding IS NULL OR body <> 'refused')")


def corrupt(plain: psycopg.Connection, key: int, encoder: DeterministicEncoder) -> None:
    """A proven vector of another text, as only somebody who knows the encoder could write it."""
    vector = to_text(encoder.encode_document(["of something else entirely"])[0])
    encoder.encoded.clear()
    found = plain.execute("SELECT id FROM sbert.binding").fetchone()
    plain.execute(
        "UPDATE note SET embedding = v, embedding_of = d FROM (SELECT %s::vector AS v) AS new, "
        "LATERAL (SELECT sbert.proof_v1('note', 'embedding', %s, body, new.v) AS d FROM note "
        "WHERE id = %s) AS made WHERE id = %s",
        [vector, encoder.spec.fingerprint, key, key],
    )
    assert found is not None


def test_encoders_of_the_tests_are_alike(encoder: DeterministicEncoder) -> None:
    """The child's encoder and this process's are one space, or nothing above means anything."""
    from .child_encoder import SlowEncoder

    assert SlowEncoder(dimensions=32).spec.fingerprint == encoder.spec.fingerprint
