"""A replica that falls behind pauses a backfill: real streaming replication."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, registry
from sbert_pg.pending.backfill import BackfillSettings, Limits, backfill
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.guard import ColumnIdentity

pytestmark = pytest.mark.slow

IDENTITY = ColumnIdentity(None, "note", "embedding")


class Replica:
    """A server that follows the one of this run."""

    def __init__(self, embedded: Any, folder: Path) -> None:
        self.bin = Path(embedded._server.bin_path)
        self.user = embedded._server.system_user
        self.data, self.socket = folder / "data", folder / "socket"
        socket = str(embedded.url().query["host"])
        self.run(
            "pg_basebackup",
            "-h",
            socket,
            "-U",
            "postgres",
            "-D",
            str(self.data),
            "-R",
            "-c",
            "fast",
        )
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.write("recovery_min_apply_delay = '1h'\nlisten_addresses = ''\n")
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


@pytest.fixture
def replica(request: pytest.FixtureRequest) -> Iterator[Replica]:
    if "SBERT_PG_TEST_DSN" in os.environ:
        pytest.skip("the server's files are out of reach")
    embedded = request.getfixturevalue("embedded")
    # Not pytest's folder, which the server's own user may not look into.
    with tempfile.TemporaryDirectory(prefix="sbert-pg-replica-") as name:
        folder = Path(name)
        (folder / "socket").mkdir()
        for path in (folder, folder / "socket"):
            path.chmod(0o777)
        made = Replica(embedded, folder)
        try:
            yield made
        finally:
            made.control("stop", "-m", "immediate")


def test_a_replica_that_is_behind_pauses_a_backfill(engine: sa.Engine, replica: Replica) -> None:
    registry.use_encoder(DeterministicEncoder(dimensions=32))
    with engine.begin() as connection:
        for statement in (
            "CREATE TABLE note (id int PRIMARY KEY, body text, embedding vector(32))",
            "INSERT INTO note SELECT i, 'n' || i FROM generate_series(1, 2000) AS i",
        ):
            connection.exec_driver_sql(statement)
        spec = EncoderSpec(name="deterministic", dimensions=32)
        catalog.bind(connection, IDENTITY, spec, Source.of("body"))
    seen = []

    def on_progress(progress: Any) -> None:
        seen.append(progress)
        if progress.paused is not None and "caught up" not in seen:
            replica.catch_up()
            seen.append("caught up")

    settings = BackfillSettings(rows_per_second=200, limits=Limits(replica_lag=1.0))
    done = backfill(engine, IDENTITY, settings, on_progress=on_progress)
    assert done.complete
    assert "caught up" in seen, "it was never paused"
    paused = seen[seen.index("caught up") - 1]
    assert "a replica is" in paused.paused
    assert paused.rows < 2000
