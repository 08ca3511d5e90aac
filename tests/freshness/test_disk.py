"""A disk that is really full: a tablespace on a small file system."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.freshness import Worker, WorkerSettings, worker_thread
from sbert_pg.source import Source

from .conftest import DECLARED, IDENTITY, pending_count, violations, wait_for

SIZE = 6 * 2**20


@pytest.fixture
def small_disk(engine: sa.Engine, plain: psycopg.Connection) -> Iterator[Path]:
    """A tablespace ``small`` of 6 MB, on a file system of its own."""
    if "SBERT_PG_TEST_DSN" in os.environ:
        pytest.skip("the server's files are out of reach")
    # Not pytest's folder, which the server's own user may not look into.
    folder = Path(tempfile.mkdtemp(prefix="sbert-pg-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        folder.rmdir()
        pytest.skip("only root may mount a small file system")
    try:
        space = folder / "space"
        space.mkdir()
        owner = Path(str(engine.url.query["host"])).stat()
        os.chown(space, owner.st_uid, owner.st_gid)
        folder.chmod(0o755)
        plain.execute(f"CREATE TABLESPACE small LOCATION '{space}'")
        try:
            yield folder
        finally:
            engine.dispose()
            plain.execute("DROP TABLE IF EXISTS note")
            plain.execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def test_a_full_disk_is_waited_out_and_nothing_is_lost(
    small_disk: Path,
    engine: sa.Engine,
    plain: psycopg.Connection,
    encoder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain.execute(
        "CREATE TABLE note (id bigint PRIMARY KEY, body text, embedding vector(32)) "
        "TABLESPACE small"
    )
    with engine.begin() as connection:
        catalog.bind(connection, IDENTITY, DECLARED, Source.of("body"))
    plain.execute(
        "INSERT INTO note SELECT i, 'n' || i || repeat(' filler', 20) "
        "FROM generate_series(1, 3000) AS i"
    )
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    # Some batches fit, and then no more.
    ballast.write_bytes(b"\0" * (free.f_bavail * free.f_frsize - 300_000))
    with worker_thread(engine, WorkerSettings(batch_size=200)) as worker:
        wait_for(lambda: worker.tally.database_errors >= 2, what="the disk to be full")
        health = worker.health()
        assert health.alive
        assert not health.ready
        assert "53100" in health.details["database_error"]
        # It goes on trying, and a batch may still fit where another row's old version was.
        assert 0 < worker.tally.total("embedded") < 3000
        wait_for(lambda: pending_count(plain) == 3000 - worker.tally.total("embedded"))
        assert violations(plain, encoder) == []
        ballast.unlink()
        wait_for(lambda: pending_count(plain) == 0, what="the rest")
        assert_well(worker)
    assert violations(plain, encoder) == []
    said = [record for record in caplog.records if record.getMessage().startswith("Cannot write")]
    assert "No space left" in said[0].fields["error"]


def assert_well(worker: Worker) -> None:
    wait_for(lambda: worker.health().ready)
    assert worker.tally.total("errors") == 0, "it was not the rows' fault"
