"""Each step ended half-way can be run again, and rolling back at each step leaves the old state."""

from __future__ import annotations

import importlib
import threading
import time

import pytest
import sqlalchemy as sa

from sbert_pg import errors
from sbert_pg import reembed as ree
from sbert_pg.freshness import WorkerSettings, backfill
from sbert_pg.indexes import vector_indexes
from sbert_pg.search import nearest

from .test_steps import QUIET, request, snapshot

LOST = (sa.exc.OperationalError, sa.exc.DBAPIError)


def end_backend(connection: sa.Connection) -> None:
    """What a crash, a failover or an operator does to a session."""
    connection.execute(sa.text("select pg_terminate_backend(pg_backend_pid())"))


def killed_in(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> None:
    """End the session just before a function of a step does its part."""
    found = importlib.import_module(f"sbert_pg.reembed.{module}")

    def die(connection: sa.Connection, *_: object, **__: object) -> None:
        end_backend(connection)

    target = found.catalog if function == "bind" else found
    monkeypatch.setattr(target, function, die)


def test_begin(world, monkeypatch):
    world.create(30)
    before = snapshot(world)
    with monkeypatch.context() as patch:
        killed_in(patch, "change", "bind")
        with pytest.raises(LOST):
            ree.begin(world.engine, request(world))
    assert snapshot(world) == before
    ree.begin(world.engine, request(world))
    assert "embedding_new" in world.columns()


def test_backfill(world):
    world.create(300)
    ree.begin(world.engine, request(world))
    stop = threading.Event()
    settings = WorkerSettings(batch_size=8, encoders=1, rows_per_second=20)
    thread = threading.Thread(
        target=backfill, args=(world.engine, world.new_column, settings), kwargs={"stop": stop}
    )
    thread.start()
    while not world.scalar("select count(embedding_new) from articles"):
        time.sleep(0.01)
    stop.set()
    thread.join()
    there = world.scalar("select count(embedding_new) from articles")
    assert 0 < there < 300
    done = backfill(world.engine, world.new_column)
    assert (done.rows, done.complete) == (300 - there, True)


def test_index(world):
    world.create(100)
    ree.begin(world.engine, request(world))
    world.fill()
    raised: list[BaseException] = []

    def build() -> None:
        try:
            ree.build_indexes(world.engine, world.new_column)
        except LOST as error:
            raised.append(error)

    with world.engine.connect().execution_options(isolation_level="REPEATABLE READ") as other:
        other.execute(sa.text("select count(*) from articles"))
        thread = threading.Thread(target=build)
        thread.start()
        ended = None
        while not ended:
            ended = world.scalar(
                "select pg_terminate_backend(pid) from pg_stat_progress_create_index "
                "where phase like 'waiting for old%'"
            )
            time.sleep(0.02)
        thread.join()
        other.rollback()
    assert raised
    assert ree.status(world.engine, world.new_column).invalid_indexes == (
        "ix_articles_embedding_new",
    )
    assert ree.build_indexes(world.engine, world.new_column) == ["ix_articles_embedding_new"]
    assert ree.status(world.engine, world.new_column).state == "ready"


def test_stopping_the_build_leaves_no_index(world):
    world.create(100)
    ree.begin(world.engine, request(world))
    world.fill()
    stop, raised, told = threading.Event(), [], []

    def build() -> None:
        try:
            ree.build_indexes(
                world.engine,
                world.new_column,
                stop=stop,
                on_progress=lambda *progress: told.append(progress),
            )
        except errors.StepStoppedError as error:
            raised.append(error)

    with world.engine.connect().execution_options(isolation_level="REPEATABLE READ") as other:
        # A snapshot, and no lock on the table, which would hold the cleaning up up as well.
        other.execute(sa.text("select count(*) from pg_class"))
        thread = threading.Thread(target=build)
        thread.start()
        while not any(phase.startswith("waiting for old") for phase, _, _ in told):
            time.sleep(0.02)
        stop.set()
        thread.join()
        other.rollback()
    assert "called off" in str(raised[0])
    with world.engine.connect() as connection:
        assert vector_indexes(connection, "articles", "embedding_new") == ()


def test_finish(world, monkeypatch):
    world.create(30)
    world.fill()
    ree.begin(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    before = snapshot(world)
    with monkeypatch.context() as patch:
        # After the old column was dropped, in the same transaction.
        finish = importlib.import_module("sbert_pg.reembed.finish")
        drop = finish.drop_bound_column
        patch.setattr(finish, "drop_bound_column", lambda c, b: (drop(c, b), end_backend(c)))
        with pytest.raises(LOST):
            ree.finish(world.engine, world.new_column, quiet=QUIET)
    assert snapshot(world) == before
    assert ree.finish(world.engine, world.new_column, quiet=QUIET) is True
    assert "embedding" not in world.columns()


def test_abort(world, monkeypatch):
    world.create(30)
    world.fill()
    untouched = snapshot(world)
    ree.begin(world.engine, request(world))
    world.fill()
    before = snapshot(world)
    module = importlib.import_module("sbert_pg.reembed.finish")
    drop = module.drop_bound_column

    def drop_and_die(connection: sa.Connection, binding: object) -> None:
        drop(connection, binding)
        end_backend(connection)

    with monkeypatch.context() as patch:
        patch.setattr(module, "drop_bound_column", drop_and_die)
        with pytest.raises(LOST):
            ree.abort(world.engine, world.new_column)
    assert snapshot(world) == before
    assert ree.abort(world.engine, world.new_column) is True
    assert snapshot(world) == untouched


STEPS = ["begun", "half filled", "filled", "indexed", "verified", "switched"]


def go_to(world, step: str) -> None:
    """Take a change as far as a step."""
    ree.begin(world.engine, request(world))
    if step == "half filled":
        world.fill("embedding_new", limit=60)
    if STEPS.index(step) >= 2:
        world.fill("embedding_new")
    if STEPS.index(step) >= 3:
        ree.build_indexes(world.engine, world.new_column)
    if STEPS.index(step) >= 4:
        assert ree.verify(world.engine, world.new_column, sample_size=20).passed
    if step == "switched":
        ree.require_ready(world.engine, world.new_table)


@pytest.mark.parametrize("step", STEPS)
def test_rolling_back(world, step):
    """The old code finds what it found, and what the new code wrote meanwhile; then no trace."""
    world.create(120)
    world.fill()
    untouched = snapshot(world)

    def answers() -> list[tuple[int, float]]:
        with world.engine.connect() as connection:
            rows = connection.execute(
                nearest(world.old_table.c.embedding, "t7 river stone", limit=10, exact=True)
            )
            return [(row.id, round(row.similarity, 5)) for row in rows]

    before = answers()
    go_to(world, step)
    assert answers() == before
    if step == "switched":
        body = "river stone, written by the new version"
        with world.engine.begin() as connection:
            connection.execute(
                sa.text("insert into articles (id, title, body) values (500, 't7', :body)"),
                {"body": body},
            )
            world.write(connection, "embedding_new", world.new, {500: f"t7\n\n{body}"})
        world.fill("embedding")
        assert 500 in [key for key, _ in answers()]
        with world.engine.begin() as connection:
            connection.execute(sa.text("delete from articles where id = 500"))
    assert ree.abort(world.engine, world.new_column) is True
    assert answers() == before
    assert snapshot(world) == untouched


def test_a_running_statement_is_use(world):
    """A reader that uses no index, and is at it right now."""
    world.create(30)
    world.fill()
    ree.begin(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    slow = sa.text("select pg_sleep(30) from articles order by embedding <=> embedding limit 1")

    def read() -> None:
        with world.engine.connect() as connection, pytest.raises(LOST):
            connection.execute(slow)

    thread = threading.Thread(target=read)
    thread.start()
    running = (
        "select pid from pg_stat_activity where query like '%pg_sleep(30)%' "
        "and state = 'active' and pid <> pg_backend_pid()"
    )
    while not world.scalar(running):
        time.sleep(0.01)
    with pytest.raises(errors.StillInUseError, match="a running statement compares with it"):
        ree.finish(world.engine, world.new_column, quiet=QUIET)
    world.scalar(f"select pg_cancel_backend(pid) from ({running}) as found")
    thread.join()
    assert ree.finish(world.engine, world.new_column, quiet=QUIET) is True
