"""Locks: nobody queues behind a migration for long, and docs/migrations.md says what is held."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from sbert_pg import alembic as plugin
from sbert_pg import catalog, registry
from sbert_pg.alembic import statements
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import TableBusyError
from sbert_pg.freshness import backfill
from sbert_pg.system import LOCK_TIMEOUT, ColumnIdentity
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import Vector
from sbert_pg.types.indexed import VectorIndex

PAGE = Path(__file__).parents[2] / "docs" / "migrations.md"
OLD, NEW = ColumnIdentity(None, "article", "old"), ColumnIdentity(None, "article", "new")
GIVEN: dict[str, Any] = {"encoder": "deterministic", "dimensions": 384, "source": "title"}
OTHER: dict[str, Any] = {"encoder": "other", "dimensions": 64, "source": "title"}
DECLARED = Embedding("deterministic", "title", dimensions=384)
INDEX = VectorIndex(name="ix_old", table="article", column="old", opclass="vector_cosine_ops")

Body = Callable[[Any], Any]


def migrate(engine: sa.Engine, body: Body) -> None:
    """Run operations as a migration does."""
    plugin.register()
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        with context.begin_transaction(), Operations.context(context) as operations:
            body(operations)


def execute(engine: sa.Engine, *texts: str) -> None:
    with engine.begin() as connection:
        for text in texts:
            connection.execute(sa.text(text))


@pytest.fixture
def table(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> sa.Engine:
    """A table with some rows."""
    registry.use_encoder(DeterministicEncoder("other", 64, salt="other"))
    registry.use_encoder(DeterministicEncoder("alike", 384))
    execute(
        engine,
        "CREATE TABLE article (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, title text)",
        "INSERT INTO article (title) SELECT 'text ' || i FROM generate_series(1, 50) i",
    )
    return engine


# What has to be there before, built up from one another.


def nothing(engine: sa.Engine) -> None:
    pass


def column(engine: sa.Engine) -> None:
    execute(engine, "ALTER TABLE article ADD COLUMN old vector(384)")


def bound(engine: sa.Engine) -> None:
    migrate(engine, lambda op: op.add_embedding_column("article", "old", **GIVEN))


def unqueued(engine: sa.Engine) -> None:
    """Bound, and without the two indexes of the binding."""
    column(engine)
    with engine.begin() as connection:
        connection.execute(statements.bind(OLD, DECLARED, build=False))


def filled(engine: sa.Engine) -> None:
    bound(engine)
    backfill(engine, OLD)


def indexed(engine: sa.Engine) -> None:
    filled(engine)
    migrate(engine, lambda op: op.create_vector_index("ix_old", "article", "old", opclass=COSINE))


def replaced(engine: sa.Engine) -> None:
    filled(engine)
    migrate(engine, lambda op: op.begin_reembedding("article", "new", replaces="old", **OTHER))
    backfill(engine, NEW)


def contracted(engine: sa.Engine) -> None:
    replaced(engine)
    migrate(engine, lambda op: op.finish_reembedding("article", "old", force=True))
    bound(engine)


COSINE = "vector_cosine_ops"
#: What is there before, the operation, and whether it has to wait for somebody who only reads:
#: "lock" in the queue of the table, "end" for the end of older transactions.
OPERATIONS: dict[str, tuple[Callable[[sa.Engine], None], Body, str | None]] = {
    "add_embedding_column": (
        nothing,
        lambda op: op.add_embedding_column("article", "old", **GIVEN),
        "lock",
    ),
    "drop_embedding_column": (
        bound,
        lambda op: op.drop_embedding_column("article", "old"),
        "lock",
    ),
    "begin_reembedding": (
        filled,
        lambda op: op.begin_reembedding("article", "new", replaces="old", **OTHER),
        "lock",
    ),
    "finish_reembedding": (
        replaced,
        lambda op: op.finish_reembedding("article", "old"),
        "lock",
    ),
    "resume_reembedding": (
        contracted,
        lambda op: op.resume_reembedding("article", "new", replaces="old"),
        None,
    ),
    "bind_embedding_column": (
        column,
        lambda op: op.bind_embedding_column("article", "old", concurrently=True, **GIVEN),
        "lock",
    ),
    "bind_embedding_column in the transaction": (
        column,
        lambda op: op.bind_embedding_column("article", "old", **GIVEN),
        "lock",
    ),
    "unbind_embedding_column": (
        bound,
        lambda op: op.unbind_embedding_column("article", "old", concurrently=True),
        "lock",
    ),
    "unbind_embedding_column in the transaction": (
        bound,
        lambda op: op.unbind_embedding_column("article", "old"),
        "lock",
    ),
    "rebind_embedding_column": (
        filled,
        lambda op: op.rebind_embedding_column("article", "old", encoder="alike", dimensions=384),
        None,
    ),
    "rename_bound_column": (
        bound,
        lambda op: op.rename_bound_column("article", "title", "headline"),
        "lock",
    ),
    "require_backfill": (filled, lambda op: op.require_backfill("article", "old"), None),
    "backfill_embeddings": (bound, lambda op: op.backfill_embeddings("article", "old"), None),
    "create_vector_index": (
        filled,
        lambda op: op.create_vector_index("ix_old", "article", "old", opclass=COSINE),
        "end",
    ),
    "create_vector_index that replaces one": (
        indexed,
        lambda op: op.create_vector_index(
            "ix_old", "article", "old", opclass=COSINE, options={"m": 8}, replace=True
        ),
        "end",
    ),
    "create_vector_index in the transaction": (
        filled,
        lambda op: op.create_vector_index(
            "ix_old", "article", "old", opclass=COSINE, concurrently=False
        ),
        None,
    ),
    "drop_vector_index": (indexed, lambda op: op.drop_vector_index("ix_old", "article"), "end"),
    "drop_vector_index in the transaction": (
        indexed,
        lambda op: op.drop_vector_index("ix_old", "article", concurrently=False),
        "lock",
    ),
}

WAITING = sa.text(
    "SELECT locktype, mode, coalesce(relation = to_regclass('article'), false) AS here, waitstart, "
    "extract(epoch FROM clock_timestamp() - waitstart) AS seconds FROM pg_locks "
    "WHERE NOT granted AND pid <> pg_backend_pid() AND waitstart IS NOT NULL"
)


class Watcher:
    """Looks at ``pg_locks`` all the time: who waits for what, and for how long."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.exclusive: dict[Any, float] = {}
        self.others: dict[Any, float] = {}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not self.stop.is_set():
                for row in connection.execute(WAITING):
                    exclusive = row.mode == "AccessExclusiveLock"
                    found = self.exclusive if exclusive else self.others
                    found[row.waitstart] = max(found.get(row.waitstart, 0), float(row.seconds))
                time.sleep(0.005)


@contextmanager
def watching(engine: sa.Engine) -> Iterator[Watcher]:
    watcher = Watcher(engine)
    watcher.thread.start()
    try:
        yield watcher
    finally:
        watcher.stop.set()
        watcher.thread.join()


#: Seconds that these wait for a lock at an attempt, instead of ``LOCK_TIMEOUT``.
SHORT = 0.3
#: Those whose way of waiting another operation has as well.
ALIKE = {
    "begin_reembedding",
    "unbind_embedding_column",
    "bind_embedding_column in the transaction",
    "drop_vector_index in the transaction",
    "rename_bound_column",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in OPERATIONS],
)
def test_nobody_queues_behind_a_migration_for_long(
    table: sa.Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long transaction reads the table meanwhile, from before the operation to its end."""
    before, body, wait = OPERATIONS[name]
    before(table)
    for function in (statements.Online.__init__, statements.online.__wrapped__):
        monkeypatch.setitem(function.__kwdefaults__, "lock_timeout", SHORT)
    monkeypatch.setattr(statements, "LOCK_TIMEOUT", SHORT)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            migrate(table, body)
        except BaseException as error:  # told below
            failures.append(error)

    migration = threading.Thread(target=work)
    reader = table.connect().execution_options(isolation_level="REPEATABLE READ")
    with reader, watching(table) as watcher:
        reader.execute(sa.text("SELECT count(*) FROM article")).scalar_one()
        migration.start()
        until = time.monotonic() + 120
        while migration.is_alive() and time.monotonic() < until:
            gave_way = len(watcher.exclusive) >= 2
            outlasted = max(watcher.others.values(), default=0) > 1.5 * LOCK_TIMEOUT
            if {"lock": gave_way, "end": outlasted, None: False}[wait]:
                break
            time.sleep(0.02)
        waited = migration.is_alive()
        reader.rollback()
        migration.join(120)
    assert failures == []
    assert waited == (wait is not None), f"{watcher.exclusive} {watcher.others}"
    # Whoever comes after a statement that waits for ACCESS EXCLUSIVE waits behind it. A busy
    # machine may take its time until it ends one that has waited too long; without an end it
    # would have waited for the reader.
    assert max(watcher.exclusive.values(), default=0) < LOCK_TIMEOUT + 60
    if wait != "lock":
        assert watcher.exclusive == {}


def test_writer_that_never_ends(table: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up after its attempts, with who holds the lock; done again it works."""
    monkeypatch.setattr(
        "sbert_pg.alembic.statements.Online.execute.__kwdefaults__", {"attempts": 2}
    )
    _, body, _ = OPERATIONS["add_embedding_column"]
    with table.begin() as writer:
        pid = writer.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        writer.execute(sa.text("UPDATE article SET title = title WHERE id = 1"))
        with pytest.raises(TableBusyError, match=f"process {pid} "):
            migrate(table, body)
    migrate(table, body)
    with table.connect() as connection:
        assert catalog.require_binding(connection, OLD)


@pytest.mark.slow
def test_wait_for_older_transactions_can_be_set(table: sa.Engine) -> None:
    """A build without patience gives up and says who was in its way; done again it works."""
    filled(table)
    reader = table.connect().execution_options(isolation_level="REPEATABLE READ")
    with reader:
        reader.execute(sa.text("SELECT count(*) FROM article")).scalar_one()
        with pytest.raises(TableBusyError, match="article"):
            migrate(
                table,
                lambda op: op.create_vector_index(
                    "ix_old", "article", "old", opclass=COSINE, lock_timeout=0.2
                ),
            )
        reader.rollback()
    # An invalid index, if one could not be dropped either, is dropped and built now.
    migrate(table, lambda op: op.create_vector_index("ix_old", "article", "old", opclass=COSINE))
    with table.connect() as connection:
        valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_old'::regclass"
        assert connection.execute(sa.text(valid)).scalar_one()


# The page says what each statement locks.

LEVELS = (
    "ACCESS SHARE",
    "ROW SHARE",
    "ROW EXCLUSIVE",
    "SHARE UPDATE EXCLUSIVE",
    "SHARE",
    "SHARE ROW EXCLUSIVE",
    "EXCLUSIVE",
    "ACCESS EXCLUSIVE",
)


def stated() -> dict[tuple[str, str], str]:
    """Operation and statement, and the lock that the page says it takes."""
    section = PAGE.read_text().split("## Locks")[1].split("\n## ")[0]
    rows: dict[tuple[str, str], str] = {}
    operation = ""
    for line in section.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.replace("`", "").strip() for cell in line.split("|")[1:-1]]
        operation = cells[0] or operation
        rows[(operation, cells[1])] = cells[2]
    return dict(list(rows.items())[2:])


def _bind(identity: ColumnIdentity = OLD, declared: Embedding = DECLARED) -> Any:
    return statements.bind(identity, declared, build=False)


REPLACEMENT = Embedding("other", "title", dimensions=64, replaces="old")
#: For each row of the page: what is there before, and the very statement of the operation, or the
#: operation where it is more than a statement.
STATEMENTS: dict[tuple[str, str], tuple[Callable[[sa.Engine], None], Any]] = {
    ("add_embedding_column, begin_reembedding", "ALTER TABLE ADD COLUMN"): (
        nothing,
        statements.alter_column(OLD, "add", type_=Vector(384)),
    ),
    ("add_embedding_column, begin_reembedding", "sbert.bind_v1 (companion, triggers)"): (
        column,
        _bind(),
    ),
    ("add_embedding_column, begin_reembedding", "CREATE INDEX CONCURRENTLY, twice"): (
        unqueued,
        OPERATIONS["bind_embedding_column"][1],
    ),
    ("resume_reembedding", "an update of the catalog"): (
        contracted,
        statements.call("resume_v1", NEW, "old"),
    ),
    ("bind_embedding_column", "sbert.bind_v1"): (
        column,
        OPERATIONS["bind_embedding_column in the transaction"][1],
    ),
    ("unbind_embedding_column", "DROP TRIGGER"): (bound, statements.call("unbind_v1", OLD)),
    ("drop_embedding_column", "DROP TRIGGER"): (bound, statements.call("unbind_v1", OLD)),
    ("drop_embedding_column", "ALTER TABLE DROP COLUMN"): (
        column,
        statements.alter_column(OLD, "drop"),
    ),
    ("finish_reembedding", "LOCK TABLE, the same two, in one transaction"): (
        replaced,
        OPERATIONS["finish_reembedding"][1],
    ),
    ("create_vector_index", "CREATE INDEX CONCURRENTLY"): (
        filled,
        OPERATIONS["create_vector_index"][1],
    ),
    ("create_vector_index with replace=True", "the same, then DROP INDEX CONCURRENTLY"): (
        indexed,
        OPERATIONS["create_vector_index that replaces one"][1],
    ),
    ("drop_vector_index", "DROP INDEX CONCURRENTLY"): (
        indexed,
        OPERATIONS["drop_vector_index"][1],
    ),
    ("create_vector_index with concurrently=False", "CREATE INDEX"): (
        filled,
        OPERATIONS["create_vector_index in the transaction"][1],
    ),
    ("drop_vector_index with concurrently=False", "DROP INDEX"): (
        indexed,
        OPERATIONS["drop_vector_index in the transaction"][1],
    ),
    ("rename_bound_column", "ALTER TABLE RENAME COLUMN"): (
        bound,
        OPERATIONS["rename_bound_column"][1],
    ),
    ("rebind_embedding_column", "reading a sample of rows"): (
        filled,
        OPERATIONS["rebind_embedding_column"][1],
    ),
    ("require_backfill", "a count"): (
        bound,
        lambda op: op.require_backfill("article", "old", max_missing=50),
    ),
    ("backfill_embeddings", "UPDATE in batches"): (
        bound,
        OPERATIONS["backfill_embeddings"][1],
    ),
}


def test_page_names_every_statement() -> None:
    assert set(stated()) == set(STATEMENTS)


class Held:
    """The strongest lock that each backend has had on the table, seen at the end of statements.

    A trigger on nothing could see it, and polling misses an instant; so every statement on every
    connection of the engine is followed by a look at the locks of its transaction.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.modes: set[str] = set()
        #: Of its own in each thread: what one writes must be seen while another is looked at.
        self.looking = threading.local()
        sa.event.listen(engine, "after_cursor_execute", self._look)

    def _look(self, connection: sa.Connection, *_: Any) -> None:
        looking = getattr(self.looking, "now", False)
        if looking or connection.get_isolation_level() == "AUTOCOMMIT":
            return
        self.looking.now = True
        try:
            self.modes.update(connection.execute(sa.text(HELD)).scalars())
        finally:
            self.looking.now = False


HELD = (
    "SELECT mode FROM pg_locks WHERE pid = pg_backend_pid() AND granted "
    "AND relation = to_regclass('article')"
)
HELD_BY_OTHERS = HELD.replace("pid = pg_backend_pid()", "pid <> pg_backend_pid()")


def level(mode: str) -> str:
    """``ShareRowExclusiveLock`` as the manual writes it."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", mode.removesuffix("Lock")).upper()


def strongest(modes: set[str]) -> str:
    return max((level(mode) for mode in modes), key=LEVELS.index, default="none")


@pytest.mark.parametrize("row", STATEMENTS, ids=lambda row: ": ".join(row))
def test_lock_is_the_one_that_the_page_states(table: sa.Engine, row: tuple[str, str]) -> None:
    before, what = STATEMENTS[row]
    before(table)
    if "CONCURRENTLY" in row[1]:
        found = _while_it_waits(table, what)
    elif not isinstance(what, sa.Executable | sa.schema.DDLElement):
        held = Held(table)
        _in_a_transaction_where_it_may(table, what)
        found = held.modes
    else:
        with table.begin() as connection:
            connection.execute(what)
            found = set(connection.execute(sa.text(HELD)).scalars())
    assert strongest(found) == stated()[row]


def _in_a_transaction_where_it_may(engine: sa.Engine, body: Body) -> None:
    """In one transaction, so that locks are still held when they are looked at.

    Operations that insist on transactions of their own are run as they are: what they do on further
    connections is in transactions.
    """
    plugin.register()
    from sbert_pg.errors import ReembeddingError

    try:
        with engine.begin() as connection:
            context = MigrationContext.configure(connection)
            with Operations.context(context) as operations:
                body(operations)
    except ReembeddingError:
        migrate(engine, body)


def _while_it_waits(engine: sa.Engine, body: Body) -> set[str]:
    """Locks of a statement that cannot be in a transaction, which an older one keeps waiting."""
    found: set[str] = set()
    migration = threading.Thread(target=migrate, args=(engine, body))
    reader = engine.connect().execution_options(isolation_level="REPEATABLE READ")
    watch = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with reader, watch:
        pid = reader.execute(sa.text("SELECT pg_backend_pid(), count(*) FROM article")).scalar()
        migration.start()
        until = time.monotonic() + 120
        while time.monotonic() < until:
            waiting = watch.execute(
                sa.text(
                    "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'virtualxid'"
                )
            ).scalar_one()
            others = watch.execute(sa.text(HELD_BY_OTHERS + " AND pid <> :pid"), {"pid": pid})
            found.update(others.scalars())
            if waiting:
                break
        reader.rollback()
        while migration.is_alive():
            others = watch.execute(sa.text(HELD_BY_OTHERS + " AND pid <> :pid"), {"pid": pid})
            found.update(others.scalars())
    migration.join()
    return found


def test_finishing_looks_where_the_search_path_of_the_migration_does(table: sa.Engine) -> None:
    replaced(table)
    execute(table, "CREATE SCHEMA acme", "ALTER TABLE article SET SCHEMA acme")

    def body(op: Any) -> None:
        op.execute("SET search_path TO acme, public")
        op.finish_reembedding("article", "old", force=True)
        op.execute("RESET search_path")

    migrate(table, body)
    with table.connect() as connection:
        names = connection.exec_driver_sql("SELECT * FROM acme.article").keys()
    assert "new" in names
    assert "old" not in names
