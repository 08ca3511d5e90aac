"""The same writes and reads over every driver of PostgreSQL, and what is left on SQLite."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from other_drivers import url_of
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, undefer
from write_models import Array, Article, Page, embedding, pending, require_true_or_pending

from sbert_pg import (
    HalfVector,
    Vector,
    catalog,
    create_all,
    embed_on_flush,
    embed_rows,
    hnsw_index,
    hybrid,
    load,
    matching,
    nearest,
    text_column,
    text_index,
)
from sbert_pg.alembic import autogenerate_plugins
from sbert_pg.errors import (
    CatalogMissingError,
    DeclarationError,
    DimensionError,
    EncoderMismatchError,
    VectorError,
)
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import VectorArray, drivers
from sbert_pg.types.indexed import description_of
from sbert_pg.types.wire import to_text

DRIVERS = ("psycopg", "psycopg_async", "psycopg2", "pg8000", "asyncpg")
Run = Callable[[Callable[[Session], Any]], Any]


async def _asynchronous(url: sa.URL, work: Callable[[Session], Any]) -> Any:
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    engine = create_async_engine(url)
    try:
        async with AsyncSession(engine) as session:
            embed_on_flush(session)
            result = await session.run_sync(work)
            await session.commit()
            return result
    finally:
        await engine.dispose()


@pytest.fixture(params=DRIVERS)
def run(request: pytest.FixtureRequest, tables: sa.Engine) -> Iterator[Run]:
    """Does some work in a session that encodes, over one driver, and commits."""
    url = url_of(tables.url, request.param)
    if request.param in ("psycopg_async", "asyncpg"):
        yield lambda work: asyncio.run(_asynchronous(url, work))
        return
    engine = sa.create_engine(url)

    def synchronous(work: Callable[[Session], Any]) -> Any:
        with Session(engine) as session:
            embed_on_flush(session)
            result = work(session)
            session.commit()
            return result

    yield synchronous
    engine.dispose()


def test_every_way_of_writing(run: Run, tables: sa.Engine, encoder: Any) -> None:
    def work(session: Session) -> None:
        session.add_all([Article(title="a"), Page(title="b", body="c")])
        session.commit()
        session.scalars(sa.select(Page)).one().body = "d"
        session.flush()
        session.execute(sa.insert(Article), [{"title": "e"}, {"title": None}])
        session.execute(sa.update(Page), [{"id": 1, "title": "f"}])
        load(session, Article, [{"title": "g"}, {"title": "h", "embedding": encoder._vector("h")}])
        rows = embed_rows(Page.__table__, [{"title": "i", "body": None}])
        session.connection().execute(sa.insert(Page.__table__), rows)
        session.connection().execute(sa.insert(Article.__table__).values(title="left"))

    run(work)
    assert require_true_or_pending(tables, encoder, Article, Page) == (8, 1)


def test_reading_and_searching(run: Run, tables: sa.Engine, encoder: Any) -> None:
    def work(session: Session) -> None:
        session.add_all([Article(id=i, title=t) for i, t in enumerate(["red", "blue", "green"])])
        session.commit()
        options = undefer(Article.embedding)
        red = session.scalars(sa.select(Article).where(Article.id == 0).options(options)).one()
        assert np.allclose(red.embedding, encoder._vector("red"))
        for query in ("blue", encoder._vector("blue"), encoder._vector("blue").tolist()):
            assert session.execute(nearest(Article.embedding, query, limit=1)).one()[0].id == 1
        assert session.execute(nearest(Article.embedding, red, limit=1)).one()[0].id != 0
        distance = Article.embedding.distance("green")
        assert session.scalar(sa.select(Article.id).order_by(distance).limit(1)) == 2
        bound = Article.embedding.distance(sa.bindparam("q"))
        assert session.scalar(sa.select(Article.id).order_by(bound).limit(1), {"q": "red"}) == 0
        text = sa.text("SELECT embedding FROM article WHERE id = 0")
        typed = session.scalar(text.columns(embedding=Vector(384)))
        assert np.allclose(typed, encoder._vector("red"))
        entities = sa.select(Article).from_statement(sa.text("SELECT * FROM article WHERE id = 1"))
        session.expunge_all()
        blue = session.scalars(entities.options(options)).one()
        assert np.allclose(blue.embedding, encoder._vector("blue"))

    run(work)


def test_aggregates(run: Run, tables: sa.Engine, encoder: Any) -> None:
    def work(session: Session) -> None:
        session.add_all([Article(title="red"), Article(title="blue")])
        session.flush()
        column: Any = Article.__table__.c.embedding
        both = [encoder._vector("red"), encoder._vector("blue")]
        total = session.scalar(sa.select(sa.func.sum(column)))
        assert np.allclose(total, sum(both), atol=1e-5)
        for mean in (column.avg(), Article.embedding.avg()):
            assert np.allclose(session.scalar(sa.select(mean)), total / 2, atol=1e-5)
        type_ = VectorArray(column.type, dimensions=1)
        arrays = session.scalar(sa.select(sa.func.array_agg(column, type_=type_)))
        assert np.allclose(np.sum(arrays, axis=0), total, atol=1e-5)
        assert (
            session.scalar(sa.select(column.hamming_distance(both[0])).where(Article.id == 1)) == 0
        )

    run(work)


def test_many_rows_at_once_some_without_a_vector(run: Run, tables: sa.Engine, encoder: Any) -> None:
    """Of both storages; the first row has none, from which a driver might guess the type."""
    vectors = [None, encoder._vector("red").tolist(), None, encoder._vector("blue")]
    rows = [
        {"id": i, "title": None, "body": None, "by_title": vector, "by_all": vector}
        for i, vector in enumerate(vectors)
    ]
    page: Any = Page.__table__

    def work(session: Session) -> None:
        bare = sa.table("bare", *(sa.column(c.name, c.type) for c in page.c if c.name in rows[0]))
        session.execute(sa.text("CREATE TABLE bare AS SELECT * FROM page LIMIT 0"))
        session.connection().execute(sa.insert(bare), rows)
        found = session.execute(sa.select(bare).order_by(bare.c.id)).all()
        for row, vector in zip(found, vectors, strict=True):
            for stored in (row.by_title, row.by_all):
                assert (stored is None) == (vector is None)
                if vector is not None:
                    assert np.allclose(stored, vector, atol=1e-3)

    run(work)


def test_a_reader_and_a_writer_notice_that_the_column_changed_hands(
    run: Run, tables: sa.Engine, encoder: Any
) -> None:
    """In the middle of their session, and by an error of our own over any driver."""
    column: Any = Article.__table__.c.embedding

    def work(session: Session) -> None:
        session.add(Article(id=1, title="red"))
        session.commit()
        assert session.execute(nearest(Article.embedding, "red", limit=1)).one()[0].id == 1
        session.rollback()
        with tables.begin() as connection:
            catalog.unbind(connection, column)
            binding = catalog.bind(connection, column)
            catalog.hold_encoder(connection, binding, DeterministicEncoder(salt="another"))
        with pytest.raises(EncoderMismatchError, match="embedding"):
            session.execute(nearest(Article.embedding, "red", limit=1))
        session.rollback()
        with pytest.raises(EncoderMismatchError, match="embedding"):
            session.scalars(sa.select(Article.id).order_by(Article.embedding.distance("red")))
        session.rollback()
        session.add(Article(id=2, title="blue"))
        with pytest.raises(EncoderMismatchError, match="embedding"):
            session.flush()
        session.rollback()

    run(work)


def test_means_are_vectors_and_no_words(run: Run, tables: sa.Engine, encoder: Any) -> None:
    """What the driver gives as text, since nobody said that it is a vector."""

    def work(session: Session) -> None:
        session.add_all([Article(title="red"), Article(title="blue")])
        session.flush()
        encoder.encoded.clear()
        for mean in (
            session.scalar(sa.select(sa.func.avg(Article.embedding)).where(Article.id == 1)),
            session.scalar(sa.text("SELECT embedding::text FROM article WHERE id = 1")),
        ):
            assert isinstance(mean, str)
            assert session.execute(nearest(Article.embedding, mean, limit=1)).one()[0].id == 1
            bound = Article.embedding.distance(sa.bindparam("q"))
            ranked = sa.select(Article.id).order_by(bound).limit(1)
            assert session.scalar(ranked, {"q": mean}) == 1
        assert encoder.encoded == []

    run(work)


@pytest.mark.parametrize("type_", [Vector, HalfVector])
def test_arrays_of_vectors(run: Run, tables: sa.Engine, type_: Any) -> None:
    table = sa.Table(
        f"arrays_{uuid.uuid4().hex[:6]}",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("vs", sa.ARRAY(type_(3), dimensions=1)),
    )
    wanted = [np.array([1, 2, 3], np.float32), np.array([0.1, -0.5, 65504], np.float32)]
    stored = [a.astype(np.float16).astype(np.float32) if type_ is HalfVector else a for a in wanted]

    def work(session: Session) -> None:
        connection = session.connection()
        table.create(connection)
        rows = [{"id": 1, "vs": wanted}, {"id": 2, "vs": None}, {"id": 3, "vs": []}]
        connection.execute(sa.insert(table), rows)
        connection.execute(sa.insert(table).values(id=4, vs=[wanted[0].tolist(), None]))
        found = connection.execute(sa.select(table).order_by(table.c.id)).all()
        assert all(map(np.array_equal, found[0].vs, stored))
        assert found[1].vs is None
        assert found[2].vs == []
        assert found[3].vs[1] is None
        assert connection.scalar(sa.select(table.c.vs[1]).where(table.c.id == 1)).tolist() == [
            1,
            2,
            3,
        ]
        with pytest.raises(DimensionError):
            connection.execute(sa.insert(table).values(id=5, vs=[[1, 2]]))

    run(work)


def test_an_array_that_a_driver_cannot_take_apart(tables: sa.Engine, encoder: Any) -> None:
    engine = sa.create_engine(url_of(tables.url, "psycopg2"))
    with Session(engine) as session:
        session.add(Article(title="a", embedding=encoder._vector("a")))
        with pytest.raises(VectorError, match="VectorArray"):
            session.scalar(sa.select(sa.func.array_agg(Article.embedding)))
    engine.dispose()


def test_unknown_drivers_get_text() -> None:
    dialect = sa.create_engine("postgresql+psycopg://nowhere/none").dialect
    assert drivers.form_for(dialect) == "binary"
    dialect.driver = "somebody_elses"
    assert drivers.form_for(dialect) == "text"
    process = Vector(3).bind_processor(dialect)
    assert process([1, 2, 0.5]) == "[1,2,0.5]"


class TestPgvectorsOwn:
    """Connections and values of pgvector-python."""

    @pytest.fixture
    def registered(self, tables: sa.Engine) -> Iterator[sa.Engine]:
        psycopg_vectors = pytest.importorskip("pgvector.psycopg")
        engine = sa.create_engine(tables.url)
        sa.event.listen(engine, "connect", lambda raw, _: psycopg_vectors.register_vector(raw))
        yield engine
        engine.dispose()

    def test_registered_connections(self, registered: sa.Engine, encoder: Any) -> None:
        with Session(registered) as session:
            embed_on_flush(session)
            session.add(Page(id=1, title="a", body="b"))
            session.commit()
            for column, type_ in (("by_title", Vector(384)), ("by_all", HalfVector(384))):
                text = sa.text(f"SELECT {column} AS v FROM page").columns(v=type_)
                raw, read = session.scalar(text), session.scalar(sa.select(getattr(Page, column)))
                assert isinstance(raw, np.ndarray)
                assert np.array_equal(raw, read)
            entity = sa.select(Page).from_statement(sa.text("SELECT * FROM page"))
            session.expunge_all()
            page = session.scalars(entity.options(undefer(Page.by_title))).one()
            assert np.array_equal(page.by_title, session.scalar(sa.select(Page.by_title)))
            assert session.execute(nearest(Page.by_title, "a", limit=1)).one()[0].id == 1
        assert require_true_or_pending(registered, encoder, Page) == (2, 0)

    def test_values(self, tables: sa.Engine, encoder: Any) -> None:
        pgvector = pytest.importorskip("pgvector")
        vector = pgvector.Vector(encoder._vector("a"))
        half = pgvector.HalfVector(encoder._vector("a"))
        with Session(tables) as session:
            embed_on_flush(session)
            session.add_all([Article(id=1, title="a", embedding=vector), Article(id=2, title="z")])
            load(session, Page, [{"title": "a", "body": None, "by_title": vector, "by_all": half}])
            session.execute(sa.insert(Article), [{"id": 3, "title": "a", "embedding": half}])
            session.commit()
            for query in (vector, half):
                row, similarity = session.execute(nearest(Article.embedding, query, limit=1)).one()
                assert row.id in (1, 3)
                assert similarity == pytest.approx(1, abs=1e-3)
        assert require_true_or_pending(tables, encoder, Article, Page) == (5, 0)

    @pytest.mark.parametrize("name", ["VECTOR", "HALFVEC"])
    @pytest.mark.parametrize("driver", ["psycopg", "pg8000"])
    def test_columns(self, engine: sa.Engine, name: str, driver: str) -> None:
        """Searched with vectors, beside a filter that follows them, and indexed."""
        type_ = getattr(pytest.importorskip("pgvector.sqlalchemy"), name)(8)
        table = sa.Table(
            "theirs",
            sa.MetaData(),
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("side", sa.Boolean),
            sa.Column("vector", type_),
        )
        index = hnsw_index("theirs_vector", table.c.vector)
        table.create(engine)
        vectors = np.random.default_rng(5).normal(size=(300, 8)).astype(np.float32)
        rows = [{"id": n, "side": bool(v[0] > 0), "vector": v} for n, v in enumerate(vectors)]
        found = description_of(index)
        assert found is not None
        assert (found.dimensions, found.opclass) == (8, f"{name.lower()}_cosine_ops")
        assert type(table.c.vector.type) is type(type_)
        other = sa.create_engine(url_of(engine.url, driver))
        with other.begin() as connection:
            connection.execute(table.insert(), rows)
            cosines = vectors @ vectors[7] / np.linalg.norm(vectors, axis=1)
            for side in (vectors[7][0] > 0, vectors[7][0] <= 0):
                passing = np.flatnonzero((vectors[:, 0] > 0) == side)
                best = passing[np.argsort(-cosines[passing])][:10]
                for query in (vectors[7], vectors[7].tolist(), to_text(vectors[7])):
                    where = table.c.side == bool(side)
                    statement = nearest(table.c.vector, query, limit=10, where=where)
                    got = [row.id for row in connection.execute(statement)]
                    assert got[0] == best[0]
                    assert len(set(got) & {int(n) for n in best}) >= 9  # half precision
            with pytest.raises(DeclarationError, match="has no encoder"):
                nearest(table.c.vector, "words")
            # Asked for by alembic_utils, where another file has imported it.
            opts = {"autogenerate_plugins": autogenerate_plugins(), "include_schemas": False}
            context = MigrationContext.configure(connection, opts=opts)
            assert not [d for d in compare_metadata(context, table.metadata) if "theirs" in str(d)]
        other.dispose()


class TestSQLite:
    """Models are tested on it: they can be declared, created, written and read there."""

    class Base(DeclarativeBase):
        pass

    class Recipe(Base):
        __tablename__ = "recipe"
        __table_args__ = (
            hnsw_index("recipe_embedding", "embedding"), text_index("recipe_words", "words"),
        )  # fmt: skip
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        words = text_column("title", weights={"title": 2})
        half: Mapped[Array | None] = embedding(storage="halfvec")
        embedding: Mapped[Array | None] = embedding()

    @pytest.fixture
    def sqlite(self) -> Iterator[sa.Engine]:
        engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        self.Base.metadata.create_all(engine)
        yield engine
        engine.dispose()

    @pytest.mark.parametrize("encodes", [False, True])
    def test_writing_and_reading(self, sqlite: sa.Engine, encoder: Any, encodes: bool) -> None:
        with Session(sqlite) as session:
            if encodes:
                embed_on_flush(session)
            session.add(self.Recipe(title="soup"))
            session.commit()
            recipe = session.scalars(sa.select(self.Recipe)).one()
            recipe.title += " with bread"
            session.execute(sa.insert(self.Recipe), [{"title": "tea"}])
            load(session, self.Recipe, [{"title": "by load"}])
            session.commit()
            assert (recipe.embedding is not None) == encodes
            assert recipe.words is None
            if encodes:
                expected = encoder._vector("soup with bread")
                assert np.allclose(recipe.embedding, expected)  # type: ignore[arg-type]
                assert np.allclose(recipe.half, expected, atol=2e-3)  # type: ignore[arg-type]
            assert session.scalar(sa.select(self.Recipe.embedding_of)) == uuid.UUID(int=0)  # type: ignore[attr-defined]

    def test_what_needs_postgresql_says_so(self, sqlite: sa.Engine, encoder: Any) -> None:
        column = self.Recipe.embedding
        with Session(sqlite) as session:
            for statement in (
                sa.select(self.Recipe).order_by(column.distance("soup")),  # type: ignore[union-attr]
                sa.select(column.cosine_distance([1.0] * 384)),  # type: ignore[union-attr]
                nearest(column, "soup"),  # type: ignore[arg-type]
                matching(self.Recipe.words, "soup"),
                hybrid(column, self.Recipe.words, "soup"),  # type: ignore[arg-type]
            ):
                with pytest.raises(DeclarationError, match="PostgreSQL"):
                    session.execute(statement)
        assert encoder.encoded == []
        with sqlite.begin() as connection:
            with pytest.raises(CatalogMissingError, match="PostgreSQL"):
                create_all(connection, self.Base.metadata)
            assert catalog.binding_of(connection, self.Recipe.__table__.c.embedding) is None


def test_rows_say_that_they_are_pending_whatever_wrote_them(
    run: Run, tables: sa.Engine, encoder: Any
) -> None:
    """A text that changes in SQL, over any driver."""
    run(lambda session: session.add(Article(id=1, title="a")))
    run(lambda session: session.execute(sa.update(Article).values(title=Article.title + "b")))
    assert pending(tables) == {("article.embedding", "1")}
