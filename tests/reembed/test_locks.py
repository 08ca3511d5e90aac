"""Who waits for whom: pg_locks, while long transactions read and write the table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from sbert_pg import errors
from sbert_pg import reembed as ree
from sbert_pg.freshness import backfill
from sbert_pg.indexes import build_index, vector_indexes

#: Modes that readers or writers conflict with.
STRONG = {
    "ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock",
}  # fmt: skip
_SEEN = sa.text(
    "SELECT DISTINCT l.mode, l.granted FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
    "WHERE l.locktype = 'relation' AND l.relation = 'articles'::regclass "
    "AND a.application_name = 'operator'"
)


class Watch:
    """What the operator's sessions hold or wait for, as often as it can be asked."""

    def __init__(self, engine: sa.Engine) -> None:
        self.granted: set[str] = set()
        self.waiting: set[str] = set()
        self._engine = engine
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        options = {"isolation_level": "AUTOCOMMIT"}
        with self._engine.connect().execution_options(**options) as connection:
            while not self._stop.is_set():
                for mode, granted in connection.execute(_SEEN):
                    (self.granted if granted else self.waiting).add(mode)
                time.sleep(0.002)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def transaction(world, statement: str) -> Iterator[sa.Connection]:
    """A long transaction of the application's, idle after its statement."""
    with world.engine.connect() as connection:
        connection.execute(sa.text("set local application_name = 'long report'"))
        connection.execute(sa.text(statement))
        yield connection
        connection.rollback()


@contextmanager
def traffic(world) -> Iterator[Callable[[], int]]:
    """Short reads and writes, one after the other; how many are through by now."""
    through, stop = [0], threading.Event()

    def go() -> None:
        with world.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as c:
            while not stop.is_set():
                c.execute(sa.text("select body from articles where id = 3")).all()
                c.execute(sa.text("update articles set lang = 'xx' where id = 3"))
                through[0] += 1

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    try:
        yield lambda: through[0]
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def operator(world) -> Iterator[sa.Engine]:
    made = sa.create_engine(world.engine.url, connect_args={"application_name": "operator"})
    yield made
    made.dispose()


def begin(world):
    ree.begin(world.engine, ree.request_of(world.new_table.c.embedding_new))


def ready(world):
    begin(world)
    world.fill()
    ree.build_indexes(world.engine, world.new_column)


GIVING_WAY = {
    "begin": (
        lambda world: None,
        lambda world, engine, **way: ree.begin(
            engine, ree.request_of(world.new_table.c.embedding_new), **way
        ),
    ),
    "finish": (
        ready,
        lambda world, engine, **way: ree.finish(engine, world.new_column, force=True, **way),
    ),
    "abort": (
        ready,
        lambda world, engine, **way: ree.abort(engine, world.new_column, **way),
    ),
}


@pytest.mark.parametrize("name", GIVING_WAY)
def test_a_step_that_cannot_have_its_lock_gives_way(world, operator, name):
    """The application goes on while a step waits, and the step says who is in its way."""
    prepare, step = GIVING_WAY[name]
    world.create(60)
    world.fill("embedding")
    prepare(world)
    columns, seen = world.columns(), []
    with transaction(world, "select count(*) from articles") as report:
        with Watch(world.engine) as watch, traffic(world) as through:
            before = through()
            with pytest.raises(errors.TableBusyError, match="long report") as refused:
                step(world, operator, lock_timeout=0.1, attempts=4)
            # A reader that queued behind the step would not have come through between attempts.
            seen.append(through() - before)
        assert "Nothing was changed" in str(refused.value)
        assert watch.waiting == {"AccessExclusiveLock"}
        assert "AccessExclusiveLock" not in watch.granted
        assert seen[0] > 4
        assert world.columns() == columns
        # In time it succeeds, once the transaction ends.
        timer = threading.Timer(0.5, report.rollback)
        timer.start()
        step(world, operator, lock_timeout=0.1, attempts=100)
        timer.join()
    assert world.columns() != columns


def test_filling_and_verifying_wait_for_nobody(world, operator):
    """They come to their end while others hold the table, a row of it, and a snapshot."""
    world.create(200)
    world.fill("embedding")
    begin(world)
    with (
        transaction(world, "select count(*) from articles"),
        transaction(world, "update articles set lang = 'yy' where id = 7"),
        Watch(world.engine) as watch,
    ):
        done = backfill(operator, world.new_column)
        assert done.rows >= 199
        ree.verify(operator, world.new_column, sample_size=20)
        ree.status(operator, world.new_column)
        with pytest.raises(errors.BackfillIncompleteError):
            ree.require_ready(operator, world.new_table)
    assert watch.granted
    assert not (watch.granted | watch.waiting) & STRONG


def test_building_the_index_stops_neither_readers_nor_writers(world, operator):
    """An older snapshot holds the build up for as long as it likes, and nobody else."""
    world.create(300)
    world.fill("embedding")
    begin(world)
    world.fill("embedding_new")
    snapshot = "select count(*) from articles"
    with world.engine.connect().execution_options(isolation_level="REPEATABLE READ") as other:
        other.execute(sa.text(snapshot))
        with Watch(world.engine) as watch, traffic(world) as through:
            thread = threading.Thread(
                target=ree.build_indexes, args=(operator, world.new_column), daemon=True
            )
            thread.start()
            ends = time.monotonic() + 120
            while not world.scalar(
                "select 1 from pg_stat_progress_create_index where phase like 'waiting for old%'"
            ):
                assert time.monotonic() < ends
                time.sleep(0.02)
            before = through()
            # Longer than the lock time-out: no build is thrown away for having to wait.
            time.sleep(1.5)
            assert through() > before
            assert thread.is_alive()
            other.rollback()
            thread.join()
    assert not (watch.granted | watch.waiting) & STRONG
    assert "ShareUpdateExclusiveLock" in watch.granted
    with world.engine.connect() as connection:
        (index,) = vector_indexes(connection, "articles", "embedding_new")
    assert index.valid


def test_a_table_that_is_being_altered_is_waited_for(world, operator):
    world.create(20)
    begin(world)
    index = ree.request_of(world.new_table.c.embedding_new)
    assert index.new == "embedding_new"
    declared = next(iter(world.new_table.indexes))
    with (
        transaction(world, "lock table articles in share update exclusive mode"),
        pytest.raises(errors.TableBusyError, match="long report"),
    ):
        build_index(operator, declared, lock_timeout=0.1, attempts=2)
    assert build_index(operator, declared) is True
    assert build_index(operator, declared) is False
