"""Operations on a table in use: locks, retries, interruptions, scripts, changes of encoder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from sbert_pg import registry
from sbert_pg.errors import BackfillIncompleteError, ReembeddingError, TableBusyError
from sbert_pg.testing import DeterministicEncoder

BEFORE = """
class Article(Base):
    __tablename__ = "article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
"""
AFTER = """
class Article(Base):
    __tablename__ = "article"
    __table_args__ = (hnsw_index("ix_e", "embedding"), {more})
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column(ENCODER, source="title", nullable=True)
    {column}
""".replace("{more})", "{more})")
ADOPTED = AFTER.format(more="", column="")
REPLACED = AFTER.format(
    more='hnsw_index("ix_e2", "embedding_v2")',
    column="embedding_v2 = embedding_column("
    'EncoderSpec(name="other", dimensions=64), source="title", replaces="embedding", '
    "nullable=True)",
)
CONTRACTED = (
    REPLACED.replace('hnsw_index("ix_e", "embedding"), ', "")
    .replace('    embedding = embedding_column(ENCODER, source="title", nullable=True)\n', "")
    .replace('"embedding_v2")', '"embedding_v2"),')
)


def adopt(app, rows: int = 20) -> None:
    app.models(BEFORE)
    app.step("articles")
    app.execute(
        "INSERT INTO article (title) SELECT 'text ' || i FROM generate_series(1, :n) i", n=rows
    )
    app.models(ADOPTED)


@contextmanager
def reading(app) -> Iterator[None]:
    """A long transaction that has read the table."""
    with app.engine.connect() as connection:
        connection.execute(sa.text("SELECT count(*) FROM article"))
        yield


def test_long_reader_delays_nobody_else(app) -> None:
    """While a long transaction reads the table, the migration waits and others hardly do."""
    adopt(app)
    app.revision("embedding")
    waits: list[float] = []
    queued: list[float] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            started = time.monotonic()
            app.execute("INSERT INTO article (title) VALUES ('meanwhile')")
            waits.append(time.monotonic() - started)
            time.sleep(0.02)

    def watch() -> None:
        # How long anybody waits for ACCESS EXCLUSIVE at a stretch, and so stands in others' way.
        with app.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            since = None
            while not stop.is_set():
                waiting = connection.execute(
                    sa.text(
                        "SELECT count(*) FROM pg_locks WHERE NOT granted AND "
                        "mode = 'AccessExclusiveLock' AND relation = 'article'::regclass"
                    )
                ).scalar_one()
                if waiting and since is None:
                    since = time.monotonic()
                if not waiting and since is not None:
                    queued.append(time.monotonic() - since)
                    since = None
                time.sleep(0.01)

    threads = [threading.Thread(target=work) for work in (write, watch)]
    migration = threading.Thread(target=app.upgrade)
    with reading(app):
        for thread in threads:
            thread.start()
        migration.start()
        written = []
        for times in (1, 2):
            until = time.monotonic() + 120
            while len(queued) < times or len(waits) <= sum(written):
                assert time.monotonic() < until, "the migration did not give way"
                time.sleep(0.01)
            written.append(len(waits))
        assert migration.is_alive(), "the migration did not wait for the reader"
        assert written[1] > written[0], "others write while the reader goes on"
    migration.join()
    stop.set()
    for thread in threads:
        thread.join()
    assert app.check() == ""
    # Whoever wrote meanwhile is noticed, whether before or after the triggers were there.
    missing = "SELECT count(*) FROM article WHERE embedding IS NULL"
    assert app.pending() == app.scalar(missing)


def test_lock_that_is_never_free(app, monkeypatch: pytest.MonkeyPatch) -> None:
    adopt(app)
    app.revision("embedding")
    monkeypatch.setattr(
        "sbert_pg.alembic.statements.Online.execute.__kwdefaults__", {"attempts": 2}
    )
    with reading(app), pytest.raises(TableBusyError, match="process"):
        app.upgrade()
    app.upgrade()
    assert app.check() == ""


def test_large_table_is_filled_before_it_is_indexed(
    app, fake_encoder: DeterministicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbert_pg.alembic.compare.MAX_MISSING", 10)
    adopt(app)
    app.revision("embedding")
    with pytest.raises(BackfillIncompleteError, match=r"20 rows.*sbert-pg backfill"):
        app.upgrade()
    assert app.scalar("SELECT count(*) FROM pg_indexes WHERE indexname = 'ix_e'") == 0
    # Alembic's command says it as it says its own errors, and not as a bug of the migration.
    said = app.process("upgrade", "head")
    assert said.returncode != 0
    assert "FAILED: " in said.stdout + said.stderr
    assert "20 rows" in said.stdout + said.stderr
    assert "Traceback" not in said.stdout + said.stderr
    from sbert_pg.freshness import backfill
    from sbert_pg.system import ColumnIdentity

    backfill(app.engine, ColumnIdentity(None, "article", "embedding"))
    app.upgrade()
    assert app.check() == ""


def test_in_one_go(app, fake_encoder: DeterministicEncoder) -> None:
    adopt(app)
    app.step("embedding")
    app.empty_revision(
        "fill",
        "op.backfill_embeddings('article', 'embedding')\n"
        "op.require_backfill('article', 'embedding')",
    )
    app.upgrade()
    assert app.scalar("SELECT count(*) FROM article WHERE embedding IS NULL") == 0
    assert app.pending() == 0


@pytest.mark.slow
def test_interrupted_build_is_taken_up(app) -> None:
    """An invalid index, and a replacement that was interrupted at each step."""
    adopt(app)
    app.step("embedding")
    invalid = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{}'::regclass"
    other = ADOPTED.replace('"embedding")', '"embedding", m=20)')
    new = "CREATE INDEX ix_e_new ON article USING hnsw (embedding vector_cosine_ops) "
    new += "WITH (m = 20, ef_construction = 256)"
    for leftover in (
        [new, invalid.format("ix_e_new")],
        [new],
        [new, "DROP INDEX ix_e"],
        ["CREATE INDEX ix_e_new ON article USING hnsw (embedding vector_l2_ops)"],
        [invalid.format("ix_e")],
    ):
        app.models(other)
        app.revision("index")
        for statement in leftover:
            app.execute(statement)
        app.upgrade()
        assert app.check() == "", leftover
        assert app.scalar("SELECT count(*) FROM pg_indexes WHERE indexname = 'ix_e_new'") == 0
        app.undo()
        app.models(ADOPTED)
        assert app.check() == "", leftover


def test_change_of_encoder(app, fake_encoder: DeterministicEncoder) -> None:
    registry.use_encoder(DeterministicEncoder("other", 64, salt="other"))
    from sbert_pg.freshness import backfill
    from sbert_pg.system import ColumnIdentity

    adopt(app)
    app.step("embedding")
    backfill(app.engine, ColumnIdentity(None, "article", "embedding"))
    app.models(REPLACED)
    text = app.step("other encoder")
    assert "op.begin_reembedding(" in text
    assert "replaces='embedding'" in text
    app.execute("INSERT INTO article (title) VALUES ('both are kept fresh')")
    assert [app.pending(c, where="id = 21") for c in ("embedding", "embedding_v2")] == [1, 1]
    # Contract, written before it may happen.
    app.models(CONTRACTED)
    text = app.revision("contract")
    assert "op.finish_reembedding('article', 'embedding')" in text
    with pytest.raises(ReembeddingError):
        app.upgrade()
    assert app.scalar("SELECT count(*) FROM pg_indexes WHERE indexname = 'ix_e'") == 1
    backfill(app.engine, ColumnIdentity(None, "article", "embedding_v2"))
    for path in (app.root / "migrations" / "versions").glob("*contract*"):
        changed = path.read_text().replace(
            "finish_reembedding('article', 'embedding')",
            "finish_reembedding('article', 'embedding', force=True)",
        )
        path.write_text(changed)
    app.upgrade()
    assert app.check() == ""
    assert app.execute("SELECT column_name FROM sbert.binding") == ["embedding_v2"]
    app.undo()
    app.models(REPLACED)
    assert app.check() == ""
    app.downgrade("base")
    app.upgrade()


def test_foreign_vectors_are_not_bound(app) -> None:
    app.models("")
    app.empty_revision(
        "table",
        "op.execute('CREATE TABLE article '\n"
        "'(id int PRIMARY KEY, title text, embedding vector(384))')\n"
        "op.execute(\"INSERT INTO article SELECT 1, 'a', array_fill(1, ARRAY[384])::vector\")",
    )
    app.upgrade()
    app.models(
        ADOPTED.replace('(hnsw_index("ix_e", "embedding"), )', "()").replace(
            "title: Mapped[str]", "title: Mapped[str | None]"
        )
    )
    assert "op.bind_embedding_column(" in app.revision()
    with pytest.raises(ReembeddingError, match="discard_vectors"):
        app.upgrade()


def test_rename_is_followed(app) -> None:
    adopt(app)
    app.step("embedding")
    app.empty_revision(
        "rename",
        "op.rename_bound_column('article', 'title', 'headline')",
        "op.rename_bound_column('article', 'headline', 'title')",
    )
    app.upgrade()
    app.models(ADOPTED.replace("title", "headline"))
    assert app.check() == ""
    app.execute("UPDATE article SET headline = 'another' WHERE id = 1")
    app.undo()
    app.models(ADOPTED)
    assert app.check() == ""


def test_script(app, make_app: Callable[..., object], databases) -> None:
    """What --sql writes does the same, run by psql."""
    awkward = ADOPTED.replace('source="title"', 'source=Source.template("it\'s 100%\\n\\t{title}")')
    app.models(awkward)
    app.revision("all")
    # An existing table as well.
    script = app.sql()
    assert "sbert.bind_v1" in script
    app.upgrade()
    online = app.scalar("SELECT source FROM sbert.binding")
    app.downgrade("base")
    app.execute("DROP TABLE alembic_version")
    run(app, script)
    assert app.check() == ""
    assert app.scalar("SELECT source FROM sbert.binding") == online
    app.models(awkward.replace('"ix_e", "embedding"', '"ix_e", "embedding", m=20'))
    app.revision("index")
    run(app, app.sql(head_range(app)))
    assert app.check() == ""


def head_range(app) -> str:
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(app.config())
    head = script.get_revision(script.get_current_head())
    return f"{head.down_revision}:{head.revision}"


def run(app, script: str) -> None:
    """As psql does: statement by statement, transactions as the script has them."""
    import psycopg

    url = sa.make_url(app.url).set(drivername="postgresql").render_as_string(hide_password=False)
    warnings: list[str] = []
    with psycopg.connect(url, autocommit=True) as connection:
        connection.add_notice_handler(
            lambda said: said.severity == "WARNING" and warnings.append(str(said.message_primary))
        )
        for statement in statements(script):
            connection.execute(statement.encode(), prepare=False)
    # Of a transaction within another, which would end the outer one.
    assert warnings == []


def statements(script: str) -> Iterator[str]:
    """Split at semicolons that end a line outside of dollar quotes."""
    import re

    current, quote = "", None
    for line in script.splitlines(keepends=True):
        for tag in re.findall(r"\$[a-z]*\$", line):
            quote = tag if quote is None else (None if tag == quote else quote)
        current += line
        if quote is None and line.rstrip().endswith(";"):
            yield current
            current = ""
    if current.strip():
        yield current
