"""``sbert-pg serve-postgres``, as a process that applications connect to."""

from __future__ import annotations

import signal
import socket

import psycopg
import pytest
import sqlalchemy as sa
from command_line import process
from other_drivers import url_of
from server_directory import roomy, server_directory


def test_an_application_is_given_a_server_with_a_host() -> None:
    with server_directory(roomy()) as folder:
        folder.chmod(0o755)
        command = ["serve-postgres", str(folder / "data"), "--port", "0", "--name", "shop"]
        with process(*command) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            url = running.stdout.readline().strip()
            assert sa.make_url(url).host == "127.0.0.1"
            for driver in ("psycopg", "psycopg2", "pg8000"):
                engine = sa.create_engine(url_of(sa.make_url(url), driver))
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("SELECT current_database()")) == "shop"
                    connection.execute(sa.text("SELECT '[1,2]'::vector"))
                    many = connection.execute(
                        sa.text("SELECT repeat('x', 500) FROM generate_series(1, 5000)")
                    )
                    assert len(many.all()) == 5_000
                engine.dispose()
            with psycopg.connect(url) as connection:
                connection.cancel_safe()
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0
            assert "pg_trgm" in running.stderr.read()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url)


def test_a_port_that_is_taken_is_said() -> None:
    with server_directory(roomy()) as folder, socket.socket() as taken:
        folder.chmod(0o755)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with process("serve-postgres", str(folder / "data"), "--port", port) as running:
            assert running.wait(60) == 1
            assert running.stderr is not None
            assert "Give another port" in running.stderr.read()
        assert not (folder / "data" / "postmaster.pid").exists()
