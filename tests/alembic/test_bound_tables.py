"""A bound table lives on: types and names change, queues are mended, and no stale vector passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sbert_pg.freshness import backfill
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

ARTICLE = """
class Article(Base):
    __tablename__ = "article"
    id = mapped_column({key}, primary_key=True)
    title = mapped_column({title}, nullable=False)
    embedding = embedding_column(ENCODER, source="title", nullable=True)
"""
TRIGGERS = (
    "SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal AND tgrelid = 'article'::regclass"
)
EMBEDDING = ColumnIdentity(None, "article", "embedding")


def models(key: str = "sa.Integer", title: str = "sa.String(100)") -> str:
    return ARTICLE.format(key=key, title=title)


@pytest.fixture
def filled(copy_of: Callable[..., Any], fake_encoder: DeterministicEncoder) -> Any:
    """An application whose rows have their vectors."""
    return copy_of(with_vectors)


def with_vectors(app: Any) -> None:
    app.models(models())
    app.step("articles")
    app.execute("INSERT INTO article (title) SELECT 'text ' || i FROM generate_series(1, 20) i")
    backfill(app.engine, EMBEDDING)
    assert app.pending() == 0


def right(app: Any, encoder: DeterministicEncoder) -> bool:
    """Whether every vector is that of its text."""
    with app.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT title, embedding::text FROM article").all()
    vectors = encoder.encode_document([row[0] for row in rows])
    return all(
        abs(float(x) - y) < 1e-4
        for (_, text), vector in zip(rows, vectors, strict=True)
        for x, y in zip(text.strip("[]").split(","), vector, strict=True)
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"title": "sa.Text"},
        {"title": "sa.String(200)"},
        {"key": "sa.BigInteger"},
        pytest.param({"key": "sa.BigInteger", "title": "sa.Text"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_types_are_altered_as_autogenerate_writes_it(
    filled: Any, fake_encoder: DeterministicEncoder, changed: dict[str, str]
) -> None:
    app = filled
    app.execute("UPDATE article SET title = 'quite another text' WHERE id = 1")
    app.models(models(**changed))
    text = app.step("types")
    assert text.count("op.alter_column(") == 2 * len(changed)
    # What was pending still is, and nothing else.
    assert app.pending() == app.pending(where="id = 1") == 1
    app.execute("UPDATE article SET title = 'and a third' WHERE id = 2")
    assert app.pending() == 2
    backfill(app.engine, EMBEDDING)
    assert right(app, fake_encoder)
    app.downgrade("-1")
    assert app.pending() == 0
    app.upgrade()
    assert app.check() == ""


def test_type_in_which_the_text_reads_differently(filled: Any) -> None:
    """What the rows say no longer holds then, and they are pending."""
    app = filled
    app.empty_revision(
        "in capitals",
        "op.alter_column('article', 'title', type_=sa.Text(), postgresql_using='upper(title)')",
    )
    app.upgrade()
    assert app.pending() == 20


def test_no_way_round_that_trusts_stale_vectors(
    filled: Any, fake_encoder: DeterministicEncoder
) -> None:
    """Unbinding and binding again forgets what the rows said, so each vector is made again."""
    app = filled
    app.execute("UPDATE article SET title = 'quite another text' WHERE id = 1")
    again = (
        "op.bind_embedding_column('article', 'embedding', encoder='deterministic', "
        "source='title', dimensions=384{})"
    )
    app.empty_revision(
        "refused",
        "op.unbind_embedding_column('article', 'embedding')\n" + again.format(""),
    )
    with pytest.raises(Exception, match="discard_vectors"):
        app.upgrade()
    assert app.pending() == 1
    for path in (app.root / "migrations" / "versions").glob("*refused*"):
        path.write_text(
            path.read_text().replace("dimensions=384)", "dimensions=384, discard_vectors=True)")
        )
    app.upgrade()
    assert app.pending() == 20
    backfill(app.engine, EMBEDDING)
    assert right(app, fake_encoder)
    assert app.check() == ""


@pytest.mark.parametrize("column", ["embedding", "title", "id"])
def test_columns_are_renamed(filled: Any, fake_encoder: DeterministicEncoder, column: str) -> None:
    app = filled
    app.execute("UPDATE article SET title = 'quite another text' WHERE id = 1")
    new = 'a "new" name: 100%'
    app.empty_revision(
        "rename",
        f"op.rename_bound_column('article', '{column}', {new!r})",
        f"op.rename_bound_column('article', {new!r}, '{column}')",
    )
    app.upgrade()
    bound = new if column == "embedding" else "embedding"
    assert app.pending(bound) == 1
    names = app.execute("SELECT attname FROM pg_attribute WHERE attrelid = 'article'::regclass")
    assert (f"{new}_of" in names) == (column == "embedding")
    backfill(app.engine, ColumnIdentity(None, "article", bound))
    assert app.pending(bound) == 0
    assert not app.scalar("SELECT problems FROM sbert.status")
    app.undo()
    assert app.pending() == 0
    assert app.check() == ""


@pytest.mark.parametrize(
    "harm",
    [
        "DROP INDEX {queue}",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{queue}'::regclass",
        "DROP INDEX {failed}",
        "ALTER TABLE article DISABLE TRIGGER USER",
    ],
)
def test_what_a_binding_lacks_is_noticed_and_mended(filled: Any, harm: str) -> None:
    app = filled
    from sbert_pg import catalog

    with app.engine.connect() as connection:
        binding = catalog.require_binding(connection, EMBEDDING)
        names = {i.kind: i.existing for i in catalog.queue_indexes(connection, binding)}
    # Nothing of a binding's is dropped, and nothing is missing.
    assert app.check() == ""
    app.execute(harm.format(**names))
    assert "bind_embedding_column" in app.check()
    text = app.step("mended")
    assert "concurrently=True" in text
    with app.engine.connect() as connection:
        assert catalog.health(connection, binding) == []
    assert app.pending() == 0


def test_drop_leaves_nothing(filled: Any) -> None:
    app = filled
    app.models(models().replace("    embedding = ", "    # "))
    text = app.step("no embeddings")
    assert "op.drop_column" not in text.split("def downgrade")[0]
    names = app.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'article'::regclass AND attnum > 0 "
        "AND NOT attisdropped"
    )
    assert names == ["id", "title"]
    assert app.scalar("SELECT count(*) FROM pg_indexes WHERE tablename = 'article'") == 1
    assert app.scalar(TRIGGERS) == 0
    app.undo()
    app.models(models())
    assert app.check() == ""
