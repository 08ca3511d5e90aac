"""Nothing is lost on the way: changes in place, refusals in time, other tools beside this one."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from alembic.operations import Operations

from sbert_pg import registry
from sbert_pg.alembic import autogenerate_plugins, toimpl
from sbert_pg.alembic.changes import ChangedColumnError
from sbert_pg.alembic.statements import is_enclosed
from sbert_pg.errors import AlreadyBoundError, BackfillIncompleteError, ReembeddingError
from sbert_pg.freshness import backfill
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

ARTICLE = """
class Article(Base):
    __tablename__ = "article"
    __table_args__ = ({indexes}{{}})
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    {columns}
"""
OLD = 'embedding = embedding_column(ENCODER, source="title", nullable=True)'
NEW = (
    'second = embedding_column(EncoderSpec(name="other", dimensions=64), source="title", '
    'replaces="embedding", nullable=True)'
)
OLD_INDEX, NEW_INDEX = 'hnsw_index("ix_old", "embedding"),', 'hnsw_index("ix_new", "second"),'
NAMES = "SELECT attname FROM pg_attribute WHERE attrelid = 'article'::regclass AND attnum > 0"


def models(columns: str = "", indexes: str = "") -> str:
    return ARTICLE.format(columns=columns, indexes=indexes)


@pytest.fixture
def filled(copy_of: Callable[..., Any], fake_encoder: DeterministicEncoder) -> Any:
    """An application whose 20 rows have their vectors, and another encoder to change to."""
    registry.use_encoder(DeterministicEncoder("other", 64, salt="other"))
    return copy_of(with_vectors)


def with_vectors(app: Any) -> None:
    app.models(models())
    app.step("articles")
    app.execute("INSERT INTO article (title) SELECT 'text ' || i FROM generate_series(1, 20) i")
    app.models(models(OLD, OLD_INDEX))
    app.revision("embedding")
    app.upgrade()
    backfill(app.engine, ColumnIdentity(None, "article", "embedding"))


def finish_is_forced(app: Any) -> None:
    for path in (app.root / "migrations" / "versions").glob("*.py"):
        text = path.read_text()
        path.write_text(
            text.replace(
                "finish_reembedding('article', 'embedding')",
                "finish_reembedding('article', 'embedding', force=True)",
            )
        )


def test_changed_in_place(filled: Any) -> None:
    """The old attribute goes when the new one comes; the old column does not."""
    app = filled
    app.models(models(NEW, NEW_INDEX))
    text = app.revision("other encoder")
    upgrade = "".join(re.findall(r"def upgrade.*?def downgrade", text, flags=re.DOTALL))
    assert re.search(r"op\.begin_reembedding\(\s*'article',\s*'second',", upgrade)
    assert "replaces='embedding'" in upgrade
    assert "drop_embedding_column" not in upgrade
    assert "finish_reembedding" not in upgrade
    assert "drop_vector_index" not in upgrade
    app.upgrade()
    assert app.scalar("SELECT count(embedding) FROM article") == 20
    assert app.scalar("SELECT to_regclass('ix_old') IS NOT NULL")
    # What is left to do is the end of the change, which refuses until its time has come.
    assert "finish_reembedding" in app.check()
    assert "op.finish_reembedding('article', 'embedding')" in app.revision("finish")
    with pytest.raises(BackfillIncompleteError, match="20 rows"):
        app.upgrade()
    assert app.scalar("SELECT count(embedding) FROM article") == 20
    backfill(app.engine, ColumnIdentity(None, "article", "second"))
    finish_is_forced(app)
    app.upgrade()
    assert app.check() == ""
    assert "embedding" not in app.execute(NAMES)
    assert app.scalar("SELECT count(second) FROM article") == 20


THIRD = (
    'third = embedding_column(EncoderSpec(name="more", dimensions=32), source="title", '
    'replaces="embedding", nullable=True)'
)


def test_two_replacements_of_one_column_are_refused(filled: Any) -> None:
    """The end of one change would drop the column under the other: by autogenerate and by hand."""
    app = filled
    app.models(models(f"{NEW}\n    {THIRD}", NEW_INDEX))
    with pytest.raises(ChangedColumnError, match="'second' and 'third' are both to replace"):
        app.revision("both")
    app.models(models(f"{OLD}\n    {NEW}", OLD_INDEX))
    app.step("one")
    app.empty_revision(
        "the other",
        "op.begin_reembedding('article', 'third', replaces='embedding', "
        "encoder='more', dimensions=32, source='title')",
    )
    with pytest.raises(AlreadyBoundError, match="replaced by column 'second' already"):
        app.upgrade()
    assert "third" not in app.execute(NAMES)
    assert app.execute("SELECT column_name FROM sbert.binding ORDER BY 1") == [
        "embedding",
        "second",
    ]


def test_a_class_and_an_attribute_of_other_names(filled: Any) -> None:
    """What counts is the name of the table and the column."""
    app = filled
    new = NEW.replace("second =", "vector =").replace("nullable", 'name="second", nullable')
    app.models(models(new, NEW_INDEX).replace("class Article", "class Paper"))
    text = app.revision("renamed")
    assert "finish_reembedding" not in text.partition("def downgrade")[0]
    app.upgrade()
    assert app.scalar("SELECT count(embedding) FROM article") == 20


@pytest.mark.parametrize("operation", ["finish_reembedding", "drop_embedding_column"])
def test_a_view_over_the_old_column_is_noticed_before_anything_is_committed(
    filled: Any, operation: str
) -> None:
    app = filled
    app.models(models(f"{OLD}\n    {NEW}", OLD_INDEX))
    app.step("other encoder")
    backfill(app.engine, ColumnIdentity(None, "article", "second"))
    app.execute("CREATE INDEX ix_new ON article USING hnsw (second vector_cosine_ops)")
    app.execute("CREATE VIEW ranked AS SELECT id, embedding FROM article")
    force = ", force=True" if operation == "finish_reembedding" else ""
    app.empty_revision(
        "by hand",
        f"op.execute('ALTER TABLE article ADD COLUMN views int')\n"
        f"op.{operation}('article', 'embedding'{force})",
    )
    with pytest.raises(ReembeddingError, match="view ranked"):
        app.upgrade()
    assert "views" not in app.execute(NAMES)
    assert app.scalar("SELECT count(embedding) FROM ranked") == 20
    app.execute("DROP VIEW ranked")
    app.upgrade()
    assert {"views", "second"} <= set(app.execute(NAMES))
    assert "embedding" not in app.execute(NAMES)


NOTE = """
class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column(ENCODER, source="title", nullable=True)
"""


def test_no_later_revision_installs_the_schema_again(filled: Any) -> None:
    """Another table with a column, an index that goes, a table that goes."""
    app = filled
    later = [models(OLD, OLD_INDEX) + NOTE, models(OLD) + NOTE, models(OLD)]
    for number, text in enumerate(later):
        app.models(text)
        assert "upgrade_sbert_schema" not in app.revision(f"step {number}")
        app.upgrade()
    assert app.check() == ""


@pytest.mark.slow
def test_changed_in_place_at_last_without_replaces(filled: Any) -> None:
    """The end is written as well where ``replaces=`` goes together with the old column."""
    app = filled
    app.models(models(f"{OLD}\n    {NEW}", OLD_INDEX + NEW_INDEX))
    app.revision("other encoder")
    app.upgrade()
    backfill(app.engine, ColumnIdentity(None, "article", "second"))
    app.models(models(NEW.replace('replaces="embedding", ', ""), NEW_INDEX))
    assert "op.finish_reembedding('article', 'embedding')" in app.revision("finish")
    finish_is_forced(app)
    app.upgrade()
    assert app.check() == ""


def test_schema_is_installed_once(filled: Any) -> None:
    """Later revisions do not repeat it; a history that lacks it gets it."""
    app = filled
    versions = (app.root / "migrations" / "versions").glob("*.py")
    assert sum("op.upgrade_sbert_schema(" in path.read_text() for path in versions) == 1
    app.models(models(f"{OLD}\n    {NEW}", OLD_INDEX + NEW_INDEX))
    assert "upgrade_sbert_schema" not in app.revision("other encoder")


@pytest.mark.slow
def test_schema_that_was_installed_by_hand(app: Any) -> None:
    from sbert_pg import catalog

    with app.engine.begin() as connection:
        catalog.upgrade(connection)
    app.models(models())
    app.step("articles")
    app.models(models(OLD))
    assert "op.upgrade_sbert_schema(" in app.step("embedding")


@pytest.mark.parametrize("refusal", ["require_backfill", "finish_reembedding"])
def test_refusals_come_before_anything_is_committed(filled: Any, refusal: str) -> None:
    """A revision written by hand that is refused leaves nothing of itself, and can be run again."""
    app = filled
    app.models(models(f"{OLD}\n    {NEW}", OLD_INDEX + NEW_INDEX))
    app.revision("other encoder")
    app.upgrade()
    column = "second" if refusal == "require_backfill" else "embedding"
    force = "" if refusal == "require_backfill" else ", force=True"
    app.empty_revision(
        "by hand",
        f"op.execute('ALTER TABLE article ADD COLUMN views int')\n"
        f"op.{refusal}('article', '{column}'{force})",
    )
    before = app.scalar("SELECT version_num FROM alembic_version")
    with pytest.raises(BackfillIncompleteError):
        app.upgrade()
    assert "views" not in app.execute(NAMES)
    assert app.scalar("SELECT version_num FROM alembic_version") == before
    backfill(app.engine, ColumnIdentity(None, "article", "second"))
    app.upgrade()
    assert "views" in app.execute(NAMES)


def test_time_outs_of_the_database_do_not_end_an_operation(
    filled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosted databases end statements after a minute or two; a build or a count may take longer."""
    app = filled
    counts, seen = toimpl.counts, []

    def counted(connection: sa.Connection, *arguments: Any) -> Any:
        seen.append(connection.scalar(sa.text("SHOW statement_timeout")))
        return counts(connection, *arguments)

    monkeypatch.setattr(toimpl, "counts", counted)
    app.execute(
        "CREATE FUNCTION slow() RETURNS event_trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(1.5); END $$"
    )
    app.execute(
        "CREATE EVENT TRIGGER slow ON ddl_command_start WHEN TAG IN ('CREATE INDEX') "
        "EXECUTE FUNCTION slow()"
    )
    database = sa.make_url(app.url).database
    app.empty_revision(
        "index",
        "op.require_backfill('article', 'embedding')\n"
        "op.create_vector_index('ix_ivf', 'article', 'embedding', using='ivfflat', "
        "opclass='vector_cosine_ops', options={'lists': 1})",
    )
    app.execute(f'ALTER DATABASE "{database}" SET statement_timeout = 1000')
    with pytest.raises(sa.exc.OperationalError, match="timeout"):
        app.execute("SELECT pg_sleep(1.5)")
    app.upgrade()
    assert seen == ["0"]
    assert app.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_ivf'::regclass")


def test_alembic_utils_drops_nothing_of_ours(filled: Any) -> None:
    """It would drop triggers, functions and extensions that are not registered with it."""
    pytest.importorskip("alembic_utils")
    from alembic_utils.pg_extension import PGExtension
    from alembic_utils.pg_function import PGFunction
    from alembic_utils.pg_materialized_view import PGMaterializedView
    from alembic_utils.pg_trigger import PGTrigger
    from alembic_utils.replaceable_entity import register_entities
    from alembic_utils.replaceable_entity import registry as entities

    app = filled
    function = PGFunction(
        schema="public",
        signature="touched()",
        definition="RETURNS trigger LANGUAGE plpgsql AS $$ begin return new; end $$",
    )
    foreign = PGFunction(
        schema="sbert", signature="mine()", definition="RETURNS int LANGUAGE sql AS $$ SELECT 1 $$"
    )
    trigger = PGTrigger(
        schema="public",
        signature="touched_trg",
        on_entity="article",
        definition="BEFORE UPDATE ON article FOR EACH ROW EXECUTE FUNCTION touched()",
    )
    gone = PGTrigger(
        schema="public",
        signature="gone_trg",
        on_entity="article",
        definition="BEFORE INSERT ON article FOR EACH ROW EXECUTE FUNCTION touched()",
    )
    with app.engine.begin() as connection:
        for entity in (function, trigger, gone):
            connection.execute(entity.to_sql_statement_create())
    kinds = (PGExtension, PGFunction, PGTrigger)
    register_entities((function, trigger, foreign), entity_types=kinds)
    try:
        with app.engine.connect() as connection:
            metadata = runpy.run_path(str(app.root / "models.py"))["Base"].metadata
            options = {
                "target_metadata": metadata,
                "autogenerate_plugins": autogenerate_plugins(),
                "include_schemas": False,
                "include_object": None,
                "include_name": None,
            }
            context = MigrationContext.configure(connection, opts=options)
            script = produce_migrations(context, metadata)
            code = render_python_code(script.upgrade_ops, migration_context=context)
    finally:
        entities.clear()
        # Its comparison stays in this process, of every kind where none is named: name one that no
        # other test has.
        entities.entity_types.add(PGMaterializedView)
    # What the application took out of its own registration goes, and nothing else.
    dropped = re.findall(r'signature="([^"]+)"', code)
    assert dropped == ["gone_trg"], code


def test_alembic_that_keeps_its_transaction_to_itself_is_refused() -> None:
    """The private attribute that is_enclosed() reads: there, and refused where it is not."""
    context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True})
    assert hasattr(context, "_in_external_transaction")
    assert not is_enclosed(Operations(context))
    silent: Any = SimpleNamespace(migration_context=SimpleNamespace(as_sql=False))
    with pytest.raises(ReembeddingError, match="release of Alembic"):
        is_enclosed(silent)
