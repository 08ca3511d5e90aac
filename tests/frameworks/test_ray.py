"""A backfill by processes of a real Ray cluster on this machine, some of which are killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from command_line import sbert_pg

from sbert_pg import catalog
from sbert_pg.adapters.ray import _Actor, backfill
from sbert_pg.errors import DeclarationError, EncoderMismatchError
from sbert_pg.freshness import WorkerSettings
from sbert_pg.registry import use_encoder
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.wire import from_text

ray = pytest.importorskip("ray", reason="Ray has no wheel for this Python")

#: Where ``child_encoder`` is, which registers an encoder.
MODULES = Path(__file__).parent.parent / "freshness"
IDENTITY = ColumnIdentity("public", "note", "embedding")
SETTINGS = WorkerSettings(batch_size=50, encoders=1, lease=timedelta(seconds=1))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for all tests of this file; none reports its use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray starts its processes at 15, where beside other tests they hardly run.
        patch.setenv("RAY_worker_niceness", "0")
        path = os.pathsep.join([str(MODULES), os.environ.get("PYTHONPATH", "")])
        patch.setenv("PYTHONPATH", path)
        ray.init(
            num_cpus=3,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            object_store_memory=80_000_000,
        )
        yield
        ray.shutdown()


@pytest.fixture
def notes(engine: sa.Engine) -> sa.Engine:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE note (id bigint PRIMARY KEY, body text, embedding vector(32))"
        )
        connection.exec_driver_sql(
            "INSERT INTO note SELECT i, 'text number ' || i FROM generate_series(1, 2000) i"
        )
        spec = EncoderSpec(name="deterministic", dimensions=32)
        catalog.bind(connection, IDENTITY, spec, Source.of("body"))
    return engine


def setting_up(folder: Path, deaths: int, salt: str = "") -> Callable[[], None]:
    """Registers an encoder in an actor; the first few that encode rows die while they do."""

    def setup() -> None:
        import os
        import signal

        from sbert_pg.registry import use_encoder
        from sbert_pg.testing import DeterministicEncoder

        class Mortal(DeterministicEncoder):
            def encode_document(self, texts):
                if any(text.startswith("text number") for text in texts):
                    (folder / f"actor-{os.getpid()}").touch()
                    for death in range(deaths):
                        try:
                            (folder / f"death-{death}").touch(exist_ok=False)
                        except FileExistsError:
                            continue
                        os.kill(os.getpid(), signal.SIGKILL)
                return super().encode_document(texts)

        use_encoder(Mortal(dimensions=32, salt=salt))

    return setup


# A cluster takes as long to start as it likes, or does not, where others need the machine.
@pytest.mark.slow
def test_actors_that_are_killed_lose_nothing(notes, cluster, tmp_path):
    progress = []
    done = backfill(
        notes, IDENTITY, SETTINGS,
        actors=2, setup=setting_up(tmp_path, deaths=3), on_progress=progress.append,
    )  # fmt: skip
    assert (done.rows, done.left, done.failed, done.complete) == (2000, 0, 0, True)
    assert len(list(tmp_path.glob("death-*"))) == 3
    assert len(list(tmp_path.glob("actor-*"))) >= 4
    assert (progress[0].total, progress[-1].rows, progress[-1].complete) == (2000, 2000, True)
    with notes.connect() as connection:
        rows = connection.exec_driver_sql("SELECT body, embedding::text FROM note").all()
        assert connection.exec_driver_sql("SELECT count(*) FROM sbert.claim").scalar() == 0
    expected = DeterministicEncoder(dimensions=32).encode_document([row.body for row in rows])
    np.testing.assert_allclose(
        np.stack([from_text(row.embedding) for row in rows]), expected, atol=1e-6
    )


@pytest.mark.slow
def test_an_actor_with_another_encoder_is_refused(notes, cluster, tmp_path):
    setup = setting_up(tmp_path, deaths=0)
    backfill(notes, IDENTITY, SETTINGS, actors=1, setup=setup)
    with notes.begin() as connection:
        connection.exec_driver_sql("UPDATE note SET body = body || '!'")
    with pytest.raises(EncoderMismatchError, match=r"note\.embedding"):
        backfill(notes, IDENTITY, SETTINGS, actors=2, setup=setting_up(tmp_path, 0, salt="other"))


@pytest.mark.slow
def test_the_command_fills_by_a_cluster(notes, cluster, monkeypatch):
    monkeypatch.syspath_prepend(str(MODULES))
    done = sbert_pg(
        "backfill", "note", "--ray", "auto", "--actors", "1", "--app", "child_encoder", "--json",
        url=notes.url,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 2000


def test_an_actor_that_starts_while_the_server_is_away_waits_for_it(notes, request, tmp_path):
    server = request.getfixturevalue("embedded")
    url = notes.url.render_as_string(hide_password=False)
    actor = _Actor(url, IDENTITY, SETTINGS, setting_up(tmp_path, deaths=0))
    notes.dispose()
    server.control("stop", "fast")
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(actor.fill)
        try:
            with pytest.raises(FutureTimeoutError):
                filling.result(timeout=1)
        finally:
            server.control("start", "fast")
        filling.result(timeout=60)
    with notes.connect() as connection:
        missing = "SELECT count(*) FROM note WHERE embedding IS NULL"
        assert connection.exec_driver_sql(missing).scalar_one() == 0


class Slow(DeterministicEncoder):
    """Takes ten milliseconds a text, so that much happens while rows are in hand."""

    def encode_document(self, texts):
        time.sleep(0.01 * len(texts))
        return super().encode_document(texts)


def counted(engine: sa.Engine, statement: sa.TextClause) -> int:
    with engine.connect() as connection:
        return connection.execute(statement).scalar_one()


def test_two_fleets_while_rows_move_and_the_server_crashes(engine, request):
    """Keys that change partitions, tables that are written anew, deletes, a partition attached."""
    server = request.getfixturevalue("embedded")
    whole = DeterministicEncoder(dimensions=32)

    def run(*statements: str) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    rows = "(id bigint PRIMARY KEY, body text, embedding vector(32))"
    run(f"CREATE TABLE note {rows} PARTITION BY RANGE (id)")
    for first in (0, 1000, 2000):
        bounds = f"FOR VALUES FROM ({first}) TO ({first + 1000})"
        run(f"CREATE TABLE note_{first} PARTITION OF note {bounds}")
    run("INSERT INTO note SELECT i, 'text number ' || i FROM generate_series(0, 1999) i")
    with engine.begin() as connection:
        spec = EncoderSpec(name="deterministic", dimensions=32)
        catalog.bind(connection, IDENTITY, spec, Source.of("body"))
    url = engine.url.render_as_string(hide_password=False)

    def actor() -> _Actor:
        return _Actor(url, IDENTITY, SETTINGS, lambda: use_encoder(Slow(dimensions=32)))

    missing = sa.text("SELECT count(*) FROM note WHERE embedding IS NULL")
    with ThreadPoolExecutor(4) as pool:
        filling = [pool.submit(actor().fill) for _ in range(4)]
        while counted(engine, missing) > 1900 and not any(each.done() for each in filling):
            time.sleep(0.05)
        run(
            "UPDATE note SET body = 'another text ' || id WHERE mod(id, 7) = 0",
            "DELETE FROM note WHERE mod(id, 11) = 0",
            "UPDATE note SET id = id + 1000 WHERE id BETWEEN 1000 AND 1999 AND mod(id, 13) = 0",
            "VACUUM FULL note_0",
        )
        engine.dispose()
        server.control("restart", "immediate")
        run(
            "CREATE TABLE late (LIKE note INCLUDING DEFAULTS)",
            "INSERT INTO late (id, body) SELECT i, 'late ' || i FROM generate_series(3000, 3199) i",
            "ALTER TABLE note ATTACH PARTITION late FOR VALUES FROM (3000) TO (4000)",
            "CLUSTER note_1000 USING note_1000_pkey",
        )
        for each in filling:
            each.result(timeout=120)
    # As a driver that is started again: what a fleet that had ended did not see.
    actor().fill()
    with engine.connect() as connection:
        stored = connection.exec_driver_sql("SELECT body, embedding::text FROM note").all()
        assert connection.exec_driver_sql("SELECT count(*) FROM sbert.claim").scalar() == 0
    assert len(stored) == 2000 - 182 + 200
    expected = whole.encode_document([row.body for row in stored])
    vectors = np.stack([from_text(row.embedding) for row in stored])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_a_fleet_has_actors(notes):
    with pytest.raises(DeclarationError, match="at least one actor"):
        backfill(notes, IDENTITY, actors=0)
