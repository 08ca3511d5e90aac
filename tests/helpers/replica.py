"""A server that follows the one of this run by streaming replication."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa


class Replica:
    """A server that follows the one of this run."""

    def __init__(self, embedded: Any, folder: Path, *, delay: str = "0") -> None:
        self.bin = Path(embedded._server.bin_path)
        self.user = embedded._server.system_user
        self.data, self.socket = folder / "data", folder / "socket"
        socket = str(embedded.url().query["host"])
        self.run(
            "pg_basebackup", "-h", socket, "-U", "postgres", "-D", str(self.data), "-R",
            "-c", "fast",
        )  # fmt: skip
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.write(f"recovery_min_apply_delay = '{delay}'\nlisten_addresses = ''\n")
            file.write(f"unix_socket_directories = '{self.socket}'\nhot_standby_feedback = off\n")
        self.control("start", "-l", str(self.data / "replica.log"))

    def run(self, program: str, *options: str) -> None:
        command = [str(self.bin / program), *options]
        done = subprocess.run(
            command, user=self.user, capture_output=True, text=True, timeout=300, cwd="/"
        )
        assert done.returncode == 0, done.stderr

    def control(self, action: str, *options: str) -> None:
        # What is started must not hold a pipe that somebody waits for.
        command = [str(self.bin / "pg_ctl"), "-w", "-D", str(self.data), action, *options]
        subprocess.run(
            command, check=True, user=self.user, timeout=300,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip

    def catch_up(self) -> None:
        """Apply everything at once from now on."""
        dsn = f"host={self.socket} user=postgres dbname=postgres"
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET recovery_min_apply_delay = 0")
            connection.execute("SELECT pg_reload_conf()")

    def url(self, primary: sa.URL) -> sa.URL:
        """A database of the primary, here."""
        return primary.set(query={"host": str(self.socket)}, port=None)

    def follow(self, primary: sa.Engine) -> None:
        """Wait until all that is committed on the primary can be read here."""
        with primary.connect() as connection:
            position = connection.exec_driver_sql("SELECT pg_current_wal_insert_lsn()").scalar()
        engine = sa.create_engine(self.url(primary.url), poolclass=sa.NullPool)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with engine.connect() as connection:
                if connection.execute(
                    sa.text("SELECT pg_last_wal_replay_lsn() >= CAST(:at AS pg_lsn)"),
                    {"at": position},
                ).scalar():
                    return
            time.sleep(0.05)
        raise AssertionError("the replica does not catch up")


@contextmanager
def replica_of(request: pytest.FixtureRequest, **options: str) -> Iterator[Replica]:
    """A replica of the server of this run, while it is needed."""
    if "SBERT_PG_TEST_DSN" in os.environ:
        pytest.skip("the server's files are out of reach")
    embedded = request.getfixturevalue("embedded")
    # Not pytest's folder, which the server's own user may not look into.
    with tempfile.TemporaryDirectory(prefix="sbert-pg-replica-") as name:
        folder = Path(name)
        (folder / "socket").mkdir()
        for path in (folder, folder / "socket"):
            path.chmod(0o777)
        made = Replica(embedded, folder, **options)
        try:
            yield made
        finally:
            made.control("stop", "-m", "immediate")
