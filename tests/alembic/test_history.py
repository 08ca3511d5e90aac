"""An application with years of history takes embeddings up, changes them and gives them up."""

from __future__ import annotations

from typing import Any

import press_history
import pytest
import sqlalchemy as sa

from sbert_pg import registry
from sbert_pg.errors import BackfillIncompleteError
from sbert_pg.freshness import backfill
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

OLD = 'embedding = embedding_column(ENCODER, source=["title", "body"], nullable=True)'
NEW = (
    'embedding_v2 = embedding_column(EncoderSpec(name="other", dimensions=64), '
    'source=["title", "body"], storage="halfvec"{replaces}, nullable=True)'
)
REPLACING = NEW.format(replaces=', replaces="embedding"')
OLD_INDEX = 'hnsw_index("ix_article_embedding", "embedding", form="halfvec"),'
NEW_INDEX = 'hnsw_index(None, "embedding_v2", m=8, where=sa.text("status = \'published\'")),'

BEFORE = press_history.models()
ADDED = press_history.models(OLD_INDEX, OLD)
CHANGED = press_history.models(OLD_INDEX + " " + NEW_INDEX, f"{OLD}\n    {REPLACING}")
CONTRACTED = press_history.models(NEW_INDEX, REPLACING)


#: A binding that is made again has another identity, which is in the names of its triggers and in
#: its indexes. A column that comes back comes last.
SHAPE = r"""
SELECT DISTINCT line FROM (
    SELECT concat_ws(' ', table_schema, table_name, column_name, udt_name, is_nullable,
                     column_default) AS line
      FROM information_schema.columns WHERE table_schema IN ('public', 'content', 'crm', 'audit')
    UNION ALL
    SELECT regexp_replace(indexdef, '[0-9a-f]{8}-[-0-9a-f]{27}|_[0-9a-f]{8}\M', '', 'g')
      FROM pg_indexes WHERE schemaname IN ('public', 'content', 'crm', 'audit')
    UNION ALL
    SELECT conrelid::regclass || pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid <> 0
    UNION ALL
    SELECT concat_ws(' ', tgrelid::regclass, regexp_replace(tgname, '_[0-9a-f]{8}$', ''), tgtype)
      FROM pg_trigger
     WHERE NOT tgisinternal
) AS s WHERE line NOT LIKE 'sbert.%' ORDER BY line
"""


class Press:
    """The application, what its tables hold, and a worker."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def head(self) -> str:
        return str(self.app.scalar("SELECT version_num FROM alembic_version"))

    def contents(self) -> list[Any]:
        return [
            self.app.scalar(f"SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM ({query}) t")
            for query in (
                "SELECT id, title, body, status, tags, price, length FROM content.article",
                "SELECT * FROM content.comment",
                "SELECT * FROM crm.account",
                "SELECT * FROM category",
            )
        ]

    def fill(self, column: str) -> None:
        backfill(self.app.engine, ColumnIdentity("content", "article", column))

    def pending(self, *columns: str) -> list[str]:
        """Of some columns, those with rows that wait for their vector."""
        table = "content.article"
        return [column for column in columns if self.app.pending(column, table)]

    def missing(self, column: str) -> int:
        return int(self.app.scalar(f"SELECT count(*) FROM content.article WHERE {column} IS NULL"))

    def shape(self) -> list[str]:
        """Columns, indexes, constraints and triggers, as the server writes them."""
        found: list[str] = self.app.execute(SHAPE)
        return found

    def step(self, models: str, message: str) -> str:
        """Autogenerate what the models ask for; up, down and up, the tables being as they were."""
        app, contents = self.app, self.contents()
        app.models(models)
        assert app.check() != ""
        text = app.revision(message)
        app.upgrade()
        assert app.check() == "", message
        assert self.contents() == contents
        return str(text)

    def back_and_forth(self, to: str, shape: list[str]) -> None:
        """Down to a revision, where everything is as it was then, and up again."""
        app, contents, now = self.app, self.contents(), self.shape()
        app.downgrade(to)
        assert self.head() == to
        assert self.shape() == shape
        assert self.contents() == contents
        app.upgrade()
        assert app.check() == ""
        assert self.shape() == now
        assert self.contents() == contents


@pytest.fixture
def press(app: Any, fake_encoder: DeterministicEncoder) -> Press:
    registry.use_encoder(DeterministicEncoder("other", 64, salt="other"))
    app.options("include_schemas=True,")
    made = press_history.write_history(app.root / "migrations" / "versions")
    assert len(made) > 30
    app.models(BEFORE)
    app.upgrade()
    return Press(app)


def test_whole_life_by_autogenerate_alone(press: Press) -> None:
    app = press.app
    assert app.check() == ""
    without, bare = press.head(), press.shape()

    text = press.step(ADDED, "semantic search")
    assert text.count("Revision ID") == 1
    assert "schema='content'" in text
    assert press.missing("embedding") == 60
    press.fill("embedding")
    assert press.missing("embedding") == 0
    press.back_and_forth(without, bare)
    press.fill("embedding")
    with_one, one = press.head(), press.shape()

    # The old name with another encoder is refused, and the line that is printed is the way.
    app.models(press_history.models(OLD_INDEX, REPLACING.replace("embedding_v2", "embedding")))
    assert "embedding_v2 = embedding_column('other', dimensions=64" in app.check()

    text = press.step(CHANGED, "another encoder")
    assert "op.begin_reembedding(" in text
    assert "op.f('ix_content_article_embedding_v2')" in text
    assert press.missing("embedding_v2") == 60
    press.fill("embedding_v2")
    app.execute("UPDATE content.article SET body = 'meanwhile' WHERE title = 'Article 1'")
    assert press.pending("embedding", "embedding_v2") == ["embedding", "embedding_v2"]
    # Rolling back leaves the old column as fresh as it was.
    press.back_and_forth(with_one, one)
    assert press.missing("embedding") == 0
    assert app.pending("embedding", "content.article") == 1
    press.fill("embedding")
    press.fill("embedding_v2")
    with_both, both = press.head(), press.shape()

    text = press.step(CONTRACTED, "the old one goes")
    assert "op.finish_reembedding('article', 'embedding', schema='content')" in text
    assert press.missing("embedding_v2") == 0
    press.back_and_forth(with_both, both)
    with_new, new = press.head(), press.shape()

    text = press.step(BEFORE, "no embeddings any more")
    assert "op.drop_embedding_column(" in text
    assert app.scalar("SELECT count(*) FROM sbert.binding") == 0
    press.back_and_forth(with_new, new)


@pytest.mark.slow
def test_whole_history_on_an_empty_server(press: Press) -> None:
    """What a colleague and a continuous integration do: all of it at once, without any encoder."""
    app = press.app
    for models, message in ((ADDED, "added"), (CHANGED, "changed")):
        press.step(models, message)
        press.fill("embedding" if models is ADDED else "embedding_v2")
    press.step(CONTRACTED, "contracted")
    registry.forget_encoders()
    app.downgrade("base")
    left = app.execute(
        "SELECT nspname FROM pg_namespace WHERE nspname IN ('sbert', 'content', 'crm', 'audit')"
    )
    assert left == []
    (path,) = (app.root / "migrations" / "versions").glob("*_people_and_articles.py")
    path.write_text(path.read_text().replace("def upgrade():\n", "def upgrade():\n    return\n"))
    app.upgrade()
    assert app.check() == ""


@pytest.mark.slow
def test_contract_of_a_column_without_vectors_fails_and_changes_nothing(press: Press) -> None:
    app = press.app
    press.step(ADDED, "added")
    press.fill("embedding")
    press.step(CHANGED, "changed")
    app.models(CONTRACTED)
    app.revision("too early")
    with pytest.raises(BackfillIncompleteError, match="60 of 60 rows"):
        app.upgrade()
    assert press.missing("embedding") == 0
    assert sa.inspect(app.engine).has_table("article", schema="content")
    press.fill("embedding_v2")
    app.upgrade()
    assert app.check() == ""
