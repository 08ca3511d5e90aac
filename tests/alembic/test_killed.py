"""The alembic process is killed in the middle; the same command again finishes the migration."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import registry
from sbert_pg.freshness import backfill
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

#: The process has an encoder, which never comes to the end of one text where it is asked to.
ENCODERS = """
import os
import time
from sbert_pg import registry
from sbert_pg.testing import DeterministicEncoder

class Stuck(DeterministicEncoder):
    def encode_document(self, texts):
        if os.environ.get("ENDLESS") in texts:
            time.sleep(600)
        return super().encode_document(texts)

registry.use_encoder(Stuck())
registry.use_encoder(Stuck("other", 64, salt="other"))
"""
MODELS = (
    ENCODERS
    + """
class Article(Base):
    __tablename__ = "article"
    __table_args__ = ({indexes}{{}})
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    {columns}
"""
)
OLD = 'embedding = embedding_column(ENCODER, source="title", nullable=True)'
NEW = (
    'new = embedding_column(EncoderSpec(name="other", dimensions=64), source="title", '
    'replaces="embedding", nullable=True)'
)
INDEX = 'hnsw_index("ix_e", "embedding"),'
NEW_INDEX = 'hnsw_index("ix_new", "new"),'


#: More than a batch, so that one is written while the next is in hand. What was in hand is tried
#: again a row at a time.
ARTICLES = 300


def models(indexes: str = "", *columns: str) -> str:
    return MODELS.format(indexes=indexes, columns="\n    ".join(columns))


def until(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait for something while a process runs."""
    ends = time.monotonic() + seconds
    while not what():
        if process.poll() is not None:
            raise AssertionError(f"it ended by itself: {process.communicate()}")
        assert time.monotonic() < ends, "it never came so far"
        time.sleep(0.02)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -9


@pytest.fixture
def articles(copy_of: Callable[..., Any]) -> Any:
    return copy_of(with_articles)


def with_articles(app: Any) -> None:
    app.models(models())
    app.step("articles")
    app.execute(
        f"INSERT INTO article (title) SELECT 'text ' || i FROM generate_series(1, {ARTICLES}) i"
    )


def test_killed_in_the_backfill(articles: Any) -> None:
    app = articles
    app.models(models("", OLD))
    app.step("embedding")
    app.empty_revision(
        "fill",
        "op.backfill_embeddings('article', 'embedding')\n"
        "op.require_backfill('article', 'embedding')",
    )
    done = "SELECT count(*) FROM article WHERE embedding IS NOT NULL"
    process = app.start("upgrade", "head", ENDLESS=f"text {ARTICLES}")
    until(lambda: app.scalar(done) > 0, process)
    kill(process)
    before = app.scalar(done)
    assert 0 < before < ARTICLES
    versions = "SELECT id || ' ' || xmin FROM article WHERE embedding IS NOT NULL"
    written = set(app.execute(versions))
    # What it had in hand is left alone for a while. That time is over.
    app.execute("UPDATE sbert.claim SET until = now()")
    again = app.process("upgrade", "head")
    assert again.returncode == 0, again.stderr
    assert app.scalar(done) == ARTICLES
    assert app.check() == ""
    # What was there has not been written again.
    assert len(written & set(app.execute(versions))) >= before
    assert app.pending() == 0


WAITS = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'virtualxid'"
BUILDER = "SELECT pid FROM pg_stat_progress_create_index"


@pytest.mark.parametrize(
    "server",
    [pytest.param("goes on with the build", marks=pytest.mark.slow), "ends the build"],
)
def test_killed_in_the_build_of_an_index(articles: Any, server: str) -> None:
    """The server knows nothing of its client's end: the build goes on, unless it is ended too."""
    app = articles
    app.models(models("", OLD))
    app.step("embedding")
    app.models(models(INDEX, OLD))
    app.revision("index")
    reader = app.engine.connect().execution_options(isolation_level="REPEATABLE READ")
    with reader:
        reader.execute(sa.text("SELECT count(*) FROM article"))
        process = app.start("upgrade", "head")
        until(lambda: app.scalar(WAITS), process)
        kill(process)
        assert app.scalar("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = 'ix_e'::regclass")
        if server == "ends the build":
            app.execute(f"SELECT pg_terminate_backend(pid) FROM ({BUILDER}) AS b")
        # The second run has to wait too: for the reader, or for the first one's build.
        again = app.start("upgrade", "head")
        until(
            lambda: app.scalar(
                "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND "
                "query LIKE '%pg_stat_progress_create_index%'"
                if server == "goes on with the build"
                else WAITS
            ),
            again,
        )
        reader.rollback()
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, out + err
    assert app.check() == ""
    assert app.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_e'::regclass")
    names = app.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'article'")
    assert sorted(n for n in names if "sbert" not in n) == ["article_pkey", "ix_e"]
    assert len(names) == 4


#: The migration, and the command in the middle of which its process is killed: what the models say
#: before and then, and the tag of the command.
STOPS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str]] = {
    "adding, at the column": (("",), ("", OLD), "ALTER TABLE"),
    "adding, at the triggers": (("",), ("", OLD), "CREATE TRIGGER"),
    "adding, at the index": (("",), (INDEX, OLD), "CREATE INDEX"),
    "dropping, at the triggers": (("", OLD), ("",), "DROP TRIGGER"),
    "dropping, at the column": (("", OLD), ("",), "ALTER TABLE"),
    "dropping, at the index": ((INDEX, OLD), ("",), "DROP INDEX"),
    "replacing an index, at the old one": (
        (INDEX, OLD),
        (INDEX.replace('"),', '", m=8),'), OLD),
        "DROP INDEX",
    ),
    "replacing an index, at the name": (
        (INDEX, OLD),
        (INDEX.replace('"),', '", m=8),'), OLD),
        "ALTER INDEX",
    ),
    "beginning a replacement, at the triggers": (
        (INDEX, OLD),
        (INDEX + NEW_INDEX, OLD, NEW),
        "CREATE TRIGGER",
    ),
    "finishing a replacement, at the triggers": (
        (INDEX + NEW_INDEX, OLD, NEW),
        (NEW_INDEX, NEW),
        "DROP TRIGGER",
    ),
    "finishing a replacement, at the column": (
        (INDEX + NEW_INDEX, OLD, NEW),
        (NEW_INDEX, NEW),
        "ALTER TABLE",
    ),
}
STOP = """
CREATE FUNCTION stop() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_sleep(600); END $$
"""
SLEEPING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_killed_at_a_command(articles: Any, fake_encoder: DeterministicEncoder, stop: str) -> None:
    app = articles
    registry.use_encoder(DeterministicEncoder("other", 64, salt="other"))
    app.execute("DELETE FROM article WHERE id > 20")
    before, after, tag = STOPS[stop]
    if before != ("",):
        app.models(models(*before))
        app.step("before")
        for name in ("embedding", "new")[: len(before) - 1]:
            backfill(app.engine, ColumnIdentity(None, "article", name))
    app.models(models(*after))
    app.revision("after")
    app.execute(STOP)
    # The library's own schema has commands of these kinds as well.
    _schema_first(app)
    app.execute(
        f"CREATE EVENT TRIGGER stop ON ddl_command_start WHEN TAG IN ('{tag}') "
        "EXECUTE FUNCTION stop()"
    )
    process = app.start("upgrade", "head")
    until(lambda: app.execute(SLEEPING), process)
    kill(process)
    app.execute("DROP EVENT TRIGGER stop")
    app.execute(f"SELECT pg_terminate_backend(pid) FROM ({SLEEPING}) AS s")
    until_gone = time.monotonic() + 30
    while app.execute(SLEEPING) and time.monotonic() < until_gone:
        time.sleep(0.02)
    app.upgrade()
    assert app.check() == ""
    app.execute("INSERT INTO article (title) VALUES ('afterwards')")
    columns = app.execute("SELECT column_name FROM sbert.binding")
    assert len(columns) == len(after) - 1
    last = "id = (SELECT max(id) FROM article)"
    assert [app.pending(column, where=last) for column in columns] == [1] * len(columns)
    invalid = app.scalar("SELECT count(*) FROM pg_index WHERE NOT indisvalid")
    assert invalid == 0


def _schema_first(app: Any) -> None:
    """Have the schema ``sbert`` at its newest, so that the operations themselves come next."""
    from sbert_pg import catalog

    with app.engine.begin() as connection:
        catalog.upgrade(connection)


@pytest.mark.slow
def test_two_at_once(articles: Any) -> None:
    """Two deployments run the same migration at the same time: it is done once, and done well."""
    app = articles
    app.models(models(INDEX, OLD))
    app.revision("embedding")
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(target=lambda: results.append(app.process("upgrade", "head")))
        for _ in range(2)
    ]
    app.process("current")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(result.returncode == 0 for result in results), [r.stderr for r in results]
    app.upgrade()
    assert app.check() == ""
    assert app.scalar("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 0
