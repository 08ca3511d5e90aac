"""The tables of a clustering in an application's own Alembic history."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic_application import Application

MODELS = """
from sbert_pg.clustering import clusters_of, duplicates_of


class Article(Base):
    __tablename__ = "article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column(ENCODER, source="title", nullable=True)


topics = clusters_of(Article.embedding)
duplicates = duplicates_of(Article.embedding)
"""
TABLES = {
    "article_cluster_run",
    "article_cluster",
    "article_cluster_assignment",
    "article_duplicate",
}
VIEWS = """
    from sbert_pg.clustering import ClusterViews

    for statement in ClusterViews("article", "embedding", {"id": "integer"}).create():
        op.execute(statement)
"""
NO_VIEWS = """
    from sbert_pg.clustering import ClusterViews

    for statement in ClusterViews("article", "embedding", {"id": "integer"}).drop():
        op.execute(statement)
"""


def test_tables_and_views_are_migrated(tmp_path: Path, bare_database_url: sa.URL) -> None:
    app = Application(tmp_path, bare_database_url)
    app.models(MODELS)
    written = app.step()
    assert all(f"op.create_table('{name}'" in written for name in TABLES)
    app.empty_revision("views", VIEWS, NO_VIEWS)
    app.upgrade()
    assert app.check() == "", "views are not taken for tables"
    inspector = sa.inspect(app.engine)
    assert set(inspector.get_table_names()) >= TABLES
    assert set(inspector.get_view_names()) == {"article_cluster_current", "article_cluster_member"}
    (to_row,) = (
        key
        for key in inspector.get_foreign_keys("article_cluster_assignment")
        if key["referred_table"] == "article"
    )
    assert to_row["options"] == {"ondelete": "CASCADE"}
    offline = app.sql()
    assert "CREATE TABLE article_cluster_assignment" in offline
    assert "CREATE OR REPLACE VIEW article_cluster_member" in offline
    app.downgrade("base")
    assert not TABLES & set(sa.inspect(app.engine).get_table_names())
    app.upgrade()
    assert app.check() == ""
    app.engine.dispose()


def test_a_clustering_is_given_up(tmp_path: Path, bare_database_url: sa.URL) -> None:
    """Its tables refer to one another, and go in an order in which they can."""
    app = Application(tmp_path, bare_database_url)
    app.models(MODELS)
    app.step()
    app.models(MODELS.partition("topics =")[0])
    written = app.step().partition("def downgrade")[0]
    places = [
        written.index(f"op.drop_table('article_cluster{n}')") for n in ("_assignment", "", "_run")
    ]
    assert places == sorted(places)
    assert not TABLES & set(sa.inspect(app.engine).get_table_names())
    assert app.check() == ""
    app.downgrade("-1")
    assert set(sa.inspect(app.engine).get_table_names()) >= TABLES
    app.upgrade()
    app.models("")
    assert "op.drop_table('article')" in app.step()
    app.engine.dispose()
