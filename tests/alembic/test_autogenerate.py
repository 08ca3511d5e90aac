"""What autogenerate notices, one detail at a time, and what it refuses."""

from __future__ import annotations

import pytest
from alembic.util import CommandError

MODEL = """
class Article(Base):
    __tablename__ = "article"
    __table_args__ = ({index},)
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str | None]
    lang: Mapped[str | None]
    embedding = embedding_column({encoder}, source={source}, storage={storage}, nullable=True)
    {more}
"""
EMBEDDING = 'embedding = embedding_column(ENCODER, source="title", storage="vector", nullable=True)'
HNSW = 'hnsw_index("ix_e", "embedding", m=16, ef_construction=64)'


def model(
    index: str = HNSW,
    encoder: str = "ENCODER",
    source: str = '"title"',
    storage: str = '"vector"',
    more: str = "",
) -> str:
    return MODEL.format(index=index, encoder=encoder, source=source, storage=storage, more=more)


INDEXES = {
    "method": 'ivfflat_index("ix_e", "embedding", lists=10)',
    "opclass": 'hnsw_index("ix_e", "embedding", m=16, ef_construction=64, similarity="dot")',
    "m": 'hnsw_index("ix_e", "embedding", m=17, ef_construction=64)',
    "ef_construction": 'hnsw_index("ix_e", "embedding", m=16, ef_construction=65)',
    "predicate": 'hnsw_index("ix_e", "embedding", m=16, ef_construction=64, '
    "where=sa.text(\"lang = 'en'\"))",
    "halfvec": 'hnsw_index("ix_e", "embedding", m=16, ef_construction=64, form="halfvec")',
    "binary": 'hnsw_index("ix_e", "embedding", m=16, ef_construction=64, form="binary")',
    "expression": 'sa.Index("ix_e", sa.text("(subvector(embedding, 1, 64)::vector(64)) '
    'vector_cosine_ops"), postgresql_using="hnsw", postgresql_with={"m": 16})',
}


@pytest.mark.slow
def test_each_detail_of_an_index(app) -> None:
    """From one form to the next: noticed by check, replaced by the migration, clean afterwards."""
    app.models(model())
    app.step()
    for detail, index in INDEXES.items():
        app.models(model(index))
        said = app.check()
        assert "ix_e" in said, f"check does not notice {detail}"
        assert "article" in said
        text = app.step()
        assert "replace=True" in text, detail
    definition = app.scalar("SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_e'")
    assert "subvector" in definition
    for _ in INDEXES:
        app.undo()
    app.models(model())
    assert app.check() == ""
    assert app.scalar("SELECT count(*) FROM pg_indexes WHERE tablename = 'article'") == 2


@pytest.mark.slow
def test_cast_width_of_an_index(app) -> None:
    wide = 'sa.Index("ix_e", sa.text("(embedding::halfvec(384))"), postgresql_using="hnsw", '
    wide += 'postgresql_ops={"x": "halfvec_cosine_ops"})'
    app.models(model(wide))
    app.step()
    narrow = wide.replace("embedding::halfvec(384)", "subvector(embedding, 1, 128)::halfvec(128)")
    app.models(model(narrow))
    assert "ix_e" in app.check()
    app.step()
    # Spelled differently, and the same to the server.
    same = wide.replace("embedding::halfvec(384)", "CAST(embedding AS halfvec(384))")
    app.models(model(same))
    app.step()
    app.models(model(wide))
    assert app.check() == ""


def test_new_and_removed(app) -> None:
    app.models(model().replace("embedding = ", "pass #").replace(f"({HNSW},)", "()"))
    app.step()
    assert app.scalar("SELECT to_regnamespace('sbert') IS NULL")
    app.models(model())
    said = app.check()
    for word in ("upgrade_sbert_schema", "add_embedding_column", "create_vector_index"):
        assert word in said
    text = app.step()
    assert text.index("add_embedding_column") < text.index("require_backfill")
    assert text.index("require_backfill") < text.index("create_vector_index")
    app.models(model().replace("embedding = ", "pass #").replace(f"({HNSW},)", "()"))
    assert "drop_embedding_column" in app.check()
    text = app.step()
    upgrade = text[: text.index("def downgrade")]
    assert upgrade.index("drop_vector_index") < upgrade.index("drop_embedding_column")
    assert app.scalar("SELECT count(*) FROM sbert.binding") == 0
    app.undo()
    app.models(model())
    assert app.check() == ""


@pytest.mark.slow
def test_the_line_to_write_works(app) -> None:
    app.models(model())
    app.step()
    app.models(model(encoder='EncoderSpec(name="other", dimensions=384)'))
    said = app.check()
    line = next(line for line in said.splitlines() if "embedding_v2 = " in line).strip()
    app.models(model(more=line))
    assert "op.begin_reembedding(" in app.step()


@pytest.mark.slow
def test_width_of_a_plain_vector_is_never_altered(app) -> None:
    plain = """
class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    v = mapped_column(Vector({width}))
"""
    app.models(plain.format(width=3))
    text = app.step()
    assert "from sbert_pg.types import Vector" in text
    assert "Vector(3)" in text
    app.execute("INSERT INTO thing VALUES (1, '[1,2,3]')")
    app.models(plain.format(width=4))
    assert "width" in app.check()
    with pytest.raises(CommandError, match="width"):
        app.revision()
    app.execute("DELETE FROM thing")
    assert "alter_column" in app.step()


def test_new_table_in_one_transaction(app) -> None:
    app.models(model())
    text = app.step()
    assert text.index("op.create_table(") < text.index("op.bind_embedding_column(")
    assert text.index("op.bind_embedding_column(") < text.index("op.create_vector_index(")
    assert text.count("Revision ID") == 1
    app.downgrade("base")
    assert app.scalar("SELECT to_regclass('article') IS NULL")
    app.upgrade()
    assert app.check() == ""


def test_dropped_table_leaves_nothing(app) -> None:
    app.models(model())
    app.step()
    app.models("")
    app.step()
    assert app.scalar("SELECT count(*) FROM sbert.binding") == 0
    assert (
        app.scalar(
            "SELECT count(*) FROM pg_proc WHERE pronamespace = 'sbert'::regnamespace "
            "AND proname LIKE 'inserted%'"
        )
        == 0
    )
    app.undo()
    app.models(model())
    assert app.check() == ""


def test_columns_of_pgvector_python(app) -> None:
    """Alembic writes such types with their module; the script imports it, upward and downward."""
    app.models("""
    from pgvector.sqlalchemy import BIT, HALFVEC, VECTOR

    class Thing(Base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        a = mapped_column(VECTOR(3))
        b = mapped_column(HALFVEC(4))
        c = mapped_column(BIT(5))
    """)
    app.step()
    assert app.check() == ""
    app.models("")
    app.step()
    app.undo()
    assert app.scalar("SELECT atttypmod FROM pg_attribute WHERE attname = 'b'") == 4


def test_mixed_changes_are_two_revisions(app) -> None:
    app.models(model().replace("embedding = ", "pass #").replace(f"({HNSW},)", "()"))
    app.step()
    app.models(model(more="views: Mapped[int | None]"))
    text = app.step()
    assert text.count("Revision ID") == 2
    ordinary, online = text.split("Revision ID")[1:]
    assert "op.add_column" in ordinary
    assert "add_embedding_column" not in ordinary
    assert "op.add_column" not in online
    app.downgrade("-2")
    app.upgrade()
    assert app.check() == ""


def test_unbound_column_is_bound(app) -> None:
    plain = (
        model()
        .replace(
            EMBEDDING,
            "embedding = mapped_column(Vector(384))",
        )
        .replace(HNSW, 'sa.Index("ix_t", "title")')
    )
    assert "Vector(384)" in plain
    app.models(plain)
    app.step()
    app.models(model(index='sa.Index("ix_t", "title")'))
    assert "bind_embedding_column" in app.step()
    app.models(plain)
    assert "unbind_embedding_column" in app.step()
    app.undo()
    app.models(model(index='sa.Index("ix_t", "title")'))
    assert app.check() == ""


def test_include_schemas_and_quoted_names(app) -> None:
    app.options("include_schemas=True,")
    app.execute('CREATE SCHEMA "Shop floor"')
    text = (
        model(index=HNSW)
        .replace("__table_args__ = (", "__table_args__ = (")
        .replace(f"({HNSW},)", f'({HNSW.replace("ix_e", "IX e")}, {{"schema": "Shop floor"}})')
        .replace('"article"', '"Article"')
    )
    app.models(
        text.replace("title: Mapped[str]", 'title: Mapped[str] = mapped_column("Title 1")').replace(
            'source="title"', 'source="Title 1"'
        )
    )
    first = app.step()
    assert "schema='Shop floor'" in first
    app.downgrade("base")
    app.upgrade()
    assert app.check() == ""


@pytest.mark.slow
def test_index_that_a_failure_left_invalid_is_noticed(app) -> None:
    app.models(model())
    app.step()
    app.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_e'::regclass")
    assert "ix_e" in app.check()
    app.step()
    assert app.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_e'::regclass")


def test_an_index_a_tenant(app) -> None:
    """A tenant that is added or taken out is one index, built or dropped; reversed as well."""
    indexes = '*indexes_per("lang", {}, hnsw_index, "ix_e", "embedding", m=8)'
    names = "SELECT array_agg(indexname ORDER BY 1) FROM pg_indexes WHERE indexname LIKE 'ix_e%'"
    app.models(model(indexes.format(["de", "en"])))
    app.step()
    assert app.scalar(names) == ["ix_e_de", "ix_e_en"]
    assert "'de'" in app.scalar("SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_e_de'")
    assert app.check() == ""
    app.models(model(indexes.format(["de", "fr"])))
    text = app.step()
    assert text.count("op.create_vector_index(") == text.count("op.drop_vector_index(") == 2
    assert app.scalar(names) == ["ix_e_de", "ix_e_fr"]
    assert app.check() == ""
    app.undo()
    assert app.scalar(names) == ["ix_e_de", "ix_e_en"]


def test_what_is_written_for_other_extensions(app) -> None:
    """There is no such server: the revision and its SQL, as far as they go without one."""
    app.models(model())
    app.step()
    app.models(model('vchordrq_index("ix_e", "embedding", lists=[9, 80], probes=[3, 8])'))
    assert "method: hnsw to vchordrq" in app.check()
    text = app.revision()
    assert "using='vchordrq'" in text
    assert "existing=" not in text
    sql = " ".join(app.sql("head").split())
    assert (
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_e ON article USING vchordrq "
        "(embedding vector_cosine_ops) WITH (options = '[build.internal] lists = [9, 80] "
        "spherical_centroids = true', probes = '3,8')"
    ) in sql
