"""What the flush encodes, what it leaves alone, and what is in the database afterwards."""

from __future__ import annotations

import os
import re
import sys
import uuid
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    load_only,
    make_transient,
    mapped_column,
    sessionmaker,
    undefer,
)
from write_models import (
    Array,
    Article,
    Book,
    Item,
    Line,
    Page,
    RecordingEncoder,
    Strict,
    create,
    embedding,
    pending,
    require_true_or_pending,
)

from sbert_pg import embed_on_flush
from sbert_pg.errors import (
    DimensionError,
    EncodingError,
    NonFiniteError,
    SourceError,
    ZeroVectorError,
)

UNIT = np.eye(384, dtype=np.float32)


def stored(engine: sa.Engine, column: Any, **where: Any) -> Any:
    with engine.connect() as connection:
        statement = sa.select(column)
        for name, value in where.items():
            statement = statement.where(column.parent.class_.__table__.c[name] == value)
        return connection.scalars(statement).one()


def test_new_and_changed_objects_share_one_batch(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    session.add_all([Article(title=f"old {i}") for i in range(3)])
    session.commit()
    encoder.batches.clear()
    first, second, third = session.scalars(sa.select(Article).order_by(Article.id))
    first.title = "changed"
    second.views = 5
    session.delete(third)
    session.add_all([Article(title="new a"), Article(title="new b")])
    session.commit()
    assert [sorted(batch) for batch in encoder.batches] == [["changed", "new a", "new b"]]
    assert require_true_or_pending(tables, encoder, Article) == (4, 0)


def test_several_columns_of_one_encoder_are_one_batch(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    """Equal texts of several rows and columns are encoded once."""
    session.add_all([Page(title="a"), Page(title="a", body="b"), Page(title="b")])
    session.commit()
    assert len(encoder.batches) == 1
    assert sorted(encoder.batches[0]) == ["a", "a\n\nb", "b"]
    assert require_true_or_pending(tables, encoder, Page) == (6, 0)


def test_an_unchanged_text_is_not_encoded_again(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    session.add(Page(title="a", body="b"))
    session.commit()
    encoder.batches.clear()
    page = session.scalars(sa.select(Page)).one()
    page.views = 1
    session.commit()
    page.title = page.title  # the same again is no change
    session.commit()
    page.title = "x"
    page.title = "a"  # nor is one that was taken back
    session.commit()
    assert encoder.batches == []
    page.body = "c"
    session.commit()
    assert encoder.batches == [["a\n\nc"]], "by_title has not changed"
    assert require_true_or_pending(tables, encoder, Page) == (2, 0)


def test_an_assigned_vector_is_respected(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    article = Article(title="a", embedding=UNIT[0])
    session.add(article)
    session.commit()
    assert encoder.batches == []
    assert np.array_equal(stored(tables, Article.embedding), UNIT[0])
    article.title, article.embedding = "b", UNIT[1].tolist()
    session.commit()
    assert encoder.batches == []
    assert np.array_equal(stored(tables, Article.embedding), UNIT[1])
    assert pending(tables) == set(), "text and vector came together"
    article.embedding = UNIT[2]
    session.commit()
    assert np.array_equal(stored(tables, Article.embedding), UNIT[2])
    assert pending(tables) == {("article.embedding", "1")}, "made from which text?"
    article.title = "c"
    session.commit()
    assert encoder.batches == [["c"]]
    assert require_true_or_pending(tables, encoder, Article) == (1, 0)


def test_a_vector_that_comes_with_its_companion(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    """A detached object that has both, merged; and a copy of one under another key."""
    session.add(Article(id=1, title="a"))
    session.commit()
    both = (undefer(Article.embedding), undefer(Article.embedding_of))  # type: ignore[attr-defined]
    with Session(tables) as other:
        article = other.scalars(sa.select(Article).options(*both)).one()
    session.expunge_all()
    session.merge(article)
    session.add(
        Article(
            id=2,
            title="a",
            embedding=article.embedding,
            embedding_of=article.embedding_of,  # type: ignore[attr-defined]
        )
    )
    session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (2, 0)
    with Session(tables) as other:
        article = other.scalars(sa.select(Article).where(Article.id == 1).options(both[0])).one()
    session.expunge_all()
    session.merge(article)
    session.commit()
    require_true_or_pending(tables, encoder, Article)


@pytest.mark.parametrize("loaded", ["as written", "both", "vector alone"])
def test_a_vector_that_has_outlived_its_text(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder, loaded: str
) -> None:
    """A detached object that holds its vector gets another text, and is merged or copied."""
    session.expire_on_commit = False
    article = Article(id=1, title="a")
    session.add(article)
    session.commit()
    if loaded != "as written":
        options = [undefer(Article.embedding), undefer(Article.embedding_of)]  # type: ignore[attr-defined]
        with Session(tables) as other:
            found = sa.select(Article).options(*options[: 2 if loaded == "both" else 1])
            article = other.scalars(found).one()
    session.expunge_all()
    article.title = "b"
    session.merge(article)
    session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (1, 0)
    assert encoder.batches[-1] == ["b"]
    if loaded == "vector alone":
        return  # nothing says of a copy what its vector was made of
    make_transient(article)
    article.id, article.title = 2, "c"
    session.add(article)
    session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (2, 0)


def test_none_is_no_vector(session: Session, tables: sa.Engine, encoder: RecordingEncoder) -> None:
    """A row with a text and without a vector would only be pending."""
    session.add(Page(title="a", body="b", by_title=None))
    session.commit()
    page = session.scalars(sa.select(Page)).one()
    encoder.batches.clear()
    page.by_all = None
    session.commit()
    assert encoder.batches == [["a\n\nb"]]
    page.body, page.by_all = "c", None
    session.commit()
    assert encoder.batches[1:] == [["a\n\nc"]]
    assert require_true_or_pending(tables, encoder, Page) == (2, 0)


def test_a_value_that_is_no_text(session: Session, encoder: RecordingEncoder) -> None:
    """Whether a source has one column or several."""
    for wrong in (Article(title=5), Article(title=0), Page(title="a", body=5), Line(heading=b"a")):
        session.add(wrong)
        with pytest.raises(SourceError, match=r"(5|0|b'a') \(\w+\) stands in '(title|body)'"):
            session.flush()
        session.rollback()
    assert not encoder.batches


def test_null_text_is_null_vector(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    article, page = Article(title=None), Page(title=None, body=None)
    session.add_all([article, page, Article(title="")])
    session.commit()
    assert encoder.batches == [[""]], "an empty text is a text"
    assert article.embedding is None
    article.title = "a"
    page.body = "only the body"
    session.commit()
    assert page.by_title is None
    assert page.by_all is not None
    article.title = None
    page.body = None
    session.commit()
    assert article.embedding is None
    assert page.by_all is None
    assert require_true_or_pending(tables, encoder, Article, Page) == (1, 0)


def test_null_text_where_the_vector_must_be(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    session.add(Strict(title=None))
    session.commit()
    assert encoder.batches == [[""]]


def test_vector_is_at_hand_after_the_flush(session: Session, encoder: RecordingEncoder) -> None:
    article = Article(title="a")
    session.add(article)
    session.flush()
    assert isinstance(article.embedding, np.ndarray)
    assert article.embedding.dtype == np.float32
    assert np.array_equal(article.embedding, encoder._vector("a"))


def test_encoder_in_use_under_another_name(sessions: sessionmaker[Any], tables: sa.Engine) -> None:
    """As one loaded from a directory, for a column that names it otherwise."""
    from sbert_pg import registry

    own = RecordingEncoder("/models/my encoder")
    registry.use_encoder(own, name="deterministic")
    with sessions() as session:
        session.add(Article(title="a"))
        session.commit()
    assert require_true_or_pending(tables, own, Article) == (1, 0)


def test_autoflush_encodes(session: Session, encoder: RecordingEncoder) -> None:
    session.add(Article(title="a"))
    found = session.execute(
        sa.select(Article.title).order_by(Article.embedding.distance("a")).limit(1)
    ).scalar_one()
    assert found == "a"


def test_without_embed_on_flush_rows_are_pending(
    tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    with Session(tables) as session:
        session.add(Article(title="a"))
        session.commit()
    assert encoder.batches == []
    assert pending(tables) == {("article.embedding", "1")}


class TestPartlyLoaded:
    """Sources of several columns, of which the object holds a part."""

    @pytest.fixture(autouse=True)
    def _page(self, session: Session, encoder: RecordingEncoder) -> None:
        session.add(Page(title="t", body="b"))
        session.commit()
        session.expunge_all()
        encoder.batches.clear()

    def test_deferred(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        page = session.scalars(sa.select(Page).options(load_only(Page.title))).one()
        page.title = "new"
        session.commit()
        assert "new\n\nb" in encoder.batches[0]
        assert require_true_or_pending(tables, encoder, Page) == (2, 0)

    def test_raiseload(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        options = load_only(Page.title, raiseload=True)
        page = session.scalars(sa.select(Page).options(options)).one()
        page.title = "new"
        session.commit()
        assert require_true_or_pending(tables, encoder, Page) == (2, 0)

    def test_expired(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        page = session.scalars(sa.select(Page)).one()
        session.commit()  # expires everything, the key included
        page.body = "new"
        session.commit()
        assert encoder.batches == [["t\n\nnew"]]
        assert require_true_or_pending(tables, encoder, Page) == (2, 0)

    def test_whole_source_of_an_expired_object(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        page = session.scalars(sa.select(Page)).one()
        session.expire(page)
        page.title, page.body = "x", "y"
        session.commit()
        assert sorted(encoder.batches[0]) == ["x", "x\n\ny"]

    def test_others_change_what_was_loaded(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        """The object in memory is older than the row, and the row says that it is pending."""
        page = session.scalars(sa.select(Page)).one()
        with Session(tables) as other:
            embed_on_flush(other)
            other.scalars(sa.select(Page)).one().title = "theirs"
            other.commit()
        page.body = "ours"
        session.commit()
        assert pending(tables) == {("page.by_all", "1")}
        assert require_true_or_pending(tables, encoder, Page) == (1, 1)

    def test_key_changes_as_well(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        page = session.scalars(sa.select(Page)).one()
        page.id, page.body = 77, "new"
        session.commit()
        assert require_true_or_pending(tables, encoder, Page) == (2, 0)

    def test_row_that_is_gone(self, session: Session, tables: sa.Engine) -> None:
        page = session.scalars(sa.select(Page)).one()
        with tables.begin() as connection:
            connection.execute(sa.delete(Page))
        page.body = "new"
        with pytest.raises(sa.orm.exc.StaleDataError):
            session.commit()

    def test_detached_and_merged(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.merge(Page(id=1, title="merged"))
        session.commit()
        assert sorted(encoder.batches[0]) == ["merged", "merged\n\nb"]
        encoder.batches.clear()
        session.merge(Page(id=1, title="merged"))
        session.commit()
        assert encoder.batches == []
        assert require_true_or_pending(tables, encoder, Page) == (2, 0)


def test_inheritance(session: Session, tables: sa.Engine, encoder: RecordingEncoder) -> None:
    session.add_all([Item(title="i"), Book(title="b", blurb="x", note="y"), Book(title="c")])
    session.commit()
    assert len(encoder.batches) == 1
    book = session.scalars(sa.select(Item).where(Item.title == "b")).one()
    encoder.batches.clear()
    book.title = "changed"
    session.commit()
    assert encoder.batches == [["changed"]]
    book.note = "z"  # type: ignore[attr-defined]
    session.commit()
    assert encoder.batches[1:] == [["x\n\nz"]]
    assert require_true_or_pending(tables, encoder, Item, Book) == (4, 0)


def test_composite_keys(session: Session, tables: sa.Engine, encoder: RecordingEncoder) -> None:
    order = uuid.uuid4()
    session.add_all([Line(order=order, number=n, heading=f"h{n}", note="n") for n in range(5)])
    session.commit()
    for line in session.scalars(sa.select(Line)):
        line.note = f"note {line.number}"
    session.commit()
    assert len(encoder.batches) == 2
    assert sorted(encoder.batches[1]) == [f"h{n}: note {n}" for n in range(5)]
    assert require_true_or_pending(tables, encoder, Line) == (5, 0)


class TestTransactions:
    def test_savepoint(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        article = Article(title="a")
        session.add(article)
        session.commit()
        with session.begin_nested() as savepoint:
            article.title = "b"
            session.add(Article(title="lost"))
            session.flush()
            savepoint.rollback()
        assert article.title == "a"
        article.views = 3
        with session.begin_nested():
            session.add(Article(title="kept"))
        session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (2, 0)

    def test_attested_in_a_savepoint_that_is_rolled_back(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        """The guard's attestation goes with the savepoint and has to be made again."""
        with session.begin_nested() as savepoint:
            session.add(Article(title="lost"))
            session.flush()
            savepoint.rollback()
        session.add(Article(title="kept"))
        session.commit()
        with session.begin_nested():
            session.add(Article(title="inner"))
        session.add(Article(title="outer"))
        session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (3, 0)

    def test_rolled_back_objects_are_added_again(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        one, two = Article(title="same"), Article(title="other")
        session.add_all([one, two])
        session.flush()
        session.rollback()
        two.title = "changed meanwhile"
        encoder.batches.clear()
        session.add_all([one, two])
        session.commit()
        assert encoder.batches == [["changed meanwhile"]], "the vector of the other is still right"
        assert require_true_or_pending(tables, encoder, Article) == (2, 0)

    def test_rolled_back_change(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        article = Article(title="a")
        session.add(article)
        session.commit()
        article.title = "b"
        session.flush()
        session.rollback()
        assert article.title == "a"
        article.views = 1
        session.commit()
        assert np.allclose(article.embedding, encoder._vector("a"))
        article.title = "b"
        session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (1, 0)

    def test_failed_flush_and_another_try(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        """A unique violation after the encoding; the objects are corrected and added again."""
        session.add(Article(id=1, title="a"))
        session.commit()
        clash = Article(id=1, title="clash")
        session.expunge_all()
        session.add(clash)
        with pytest.raises(sa.exc.IntegrityError):
            session.commit()
        session.rollback()
        clash.id, clash.title = 2, "no clash"
        session.add(clash)
        session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (2, 0)

    def test_two_phase_is_not_needed_for_two_engines(
        self, tables: sa.Engine, databases: Any, encoder: Any
    ) -> None:
        url = databases.clone("catalog")
        other = sa.create_engine(url)
        create(other)
        with Session(binds={Article: tables, Page: other}) as session:
            embed_on_flush(session)
            session.add_all([Article(title="here"), Page(title="there", body="too")])
            session.commit()
            assert len(encoder.batches) == 1
            session.scalars(sa.select(Page)).one().body = "changed"
            session.scalars(sa.select(Article)).one().title = "changed"
            session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (1, 0)
        assert require_true_or_pending(other, encoder, Page) == (2, 0)
        other.dispose()
        databases.drop(url.database)

    def test_autocommit(self, tables: sa.Engine, encoder: Any) -> None:
        with Session(tables.execution_options(isolation_level="AUTOCOMMIT")) as session:
            embed_on_flush(session)
            session.add_all([Article(title="a"), Page(title="b", body="c")])
            session.flush()
            session.scalars(sa.select(Page)).one().body = "changed"
            session.flush()
        assert require_true_or_pending(tables, encoder, Article, Page) == (3, 0)

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    def test_isolation_levels(self, tables: sa.Engine, encoder: Any, level: Any) -> None:
        with Session(tables.execution_options(isolation_level=level)) as session:
            embed_on_flush(session)
            session.add(Page(title="b", body="c"))
            session.commit()
            page = session.scalars(sa.select(Page)).one()
            with Session(tables) as other:
                embed_on_flush(other)
                other.scalars(sa.select(Page)).one().title = "theirs"
                other.commit()
            page.body = "changed"
            with pytest.raises(sa.exc.OperationalError, match="could not serialize"):
                session.commit()
        assert require_true_or_pending(tables, encoder, Page) == (2, 0)


class TestErrors:
    def test_encoding_errors_name_a_new_object(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        session.add(Article(title="before"))
        session.flush()
        bad = Article(title="please refuse me", views=7)
        session.add_all([Article(title="fine"), bad, Article(title="fine too")])
        with pytest.raises(EncodingError, match=r"embedding of a new Article \(.*refuse me") as e:
            session.commit()
        assert e.value.index is not None
        bad.title = "accept me"
        session.commit()  # the transaction has gone on, "before" included
        assert require_true_or_pending(tables, encoder, Article) == (4, 0)

    def test_encoding_errors_name_a_row(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        line = Line(number=3, heading="h", note="n")
        session.add(line)
        session.commit()
        name = re.escape(f"vector of Line({line.order!r}, 3)")
        line.note = "refuse me"
        with pytest.raises(EncodingError, match=name):
            session.flush()
        line.note = "accept me"
        session.commit()
        assert require_true_or_pending(tables, encoder, Line) == (1, 0)

    def test_nothing_is_stored_in_objects(self, session: Session, encoder: Any) -> None:
        good, bad = Article(title="good"), Article(title="refuse me")
        session.add_all([good, bad])
        with pytest.raises(EncodingError):
            session.flush()
        assert good.embedding is None

    @pytest.mark.parametrize(
        ("vector", "error"),
        [
            (np.ones(3), DimensionError),
            (np.full(384, np.nan), NonFiniteError),
            (np.zeros(384), ZeroVectorError),
        ],
    )
    def test_bad_vectors(
        self, session: Session, tables: sa.Engine, encoder: Any, vector: Any, error: Any
    ) -> None:
        session.add(Article(title="before"))
        session.flush()
        session.add(Article(title="a", embedding=vector))
        with pytest.raises(error):
            session.commit()
        session.rollback()
        assert session.scalar(sa.select(sa.func.count()).select_from(Article)) == 0

    def test_another_encoder_is_refused(self, tables: sa.Engine, sessions: Any) -> None:
        from sbert_pg import registry
        from sbert_pg.errors import EncoderMismatchError

        with sessions() as session:
            session.add(Article(title="a"))
            session.commit()
        registry.use_encoder(RecordingEncoder(salt="another space"))
        engine = sa.create_engine(tables.url)  # as another process would be
        with Session(engine) as session:
            embed_on_flush(session)
            session.add(Article(title="b"))
            with pytest.raises(EncoderMismatchError, match="article"):
                session.commit()
            session.rollback()
            assert session.scalars(sa.select(Article.title)).all() == ["a"]
        engine.dispose()


class TestListeners:
    """Code of the application's that changes the text while it is being flushed."""

    def test_before_flush_registered_later(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        @event.listens_for(session, "before_flush")
        def extend(session: Session, *rest: Any) -> None:
            for article in [*session.new, *session.dirty]:
                article.title = f"{article.title} and more"

        session.add(Article(title="words"))
        session.commit()
        assert stored(tables, Article.title) == "words and more"
        require_true_or_pending(tables, encoder, Article)

    def test_before_update(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        article, page = Article(title="a"), Page(title="t", body="b")
        session.add_all([article, page])
        session.commit()

        def add_word(mapper: Any, connection: Any, target: Any) -> None:
            target.title = f"{target.title} added"

        event.listen(Article, "before_update", add_word)
        event.listen(Page, "before_update", add_word)
        try:
            article.title = "changed"
            page.body = "changed"
            session.commit()
            assert stored(tables, Article.title) == "changed added"
            assert stored(tables, Page.title) == "t added"
            require_true_or_pending(tables, encoder, Article, Page)
            article.views = 4
            session.commit()
            require_true_or_pending(tables, encoder, Article, Page)
        finally:
            event.remove(Article, "before_update", add_word)
            event.remove(Page, "before_update", add_word)

    def test_before_insert(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        def strip(mapper: Any, connection: Any, target: Any) -> None:
            target.title = "stripped words"

        event.listen(Article, "before_insert", strip)
        try:
            session.add(Article(title="words"))
            session.commit()
            require_true_or_pending(tables, encoder, Article)
        finally:
            event.remove(Article, "before_insert", strip)


def test_values_only_the_server_knows(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    session.add(Article(title=sa.func.upper("abc")))
    session.commit()
    article = session.scalars(sa.select(Article)).one()
    assert article.title == "ABC"
    assert pending(tables) == {("article.embedding", "1")}
    article.title = sa.func.lower("ABC")  # type: ignore[assignment]
    session.commit()
    assert pending(tables) == {("article.embedding", "1")}
    article.title = "known"
    session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (1, 0)


def test_defaults(engine: sa.Engine, encoder: RecordingEncoder) -> None:
    class Own(DeclarativeBase):
        pass

    class Note(Own):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        scalar: Mapped[str] = mapped_column(default="from python")
        called: Mapped[str] = mapped_column(default=lambda: "from a call")
        server: Mapped[str] = mapped_column(server_default="from the server")
        changing: Mapped[str] = mapped_column(default="c", onupdate=lambda: "updated")
        a: Mapped[Array | None] = embedding("scalar")
        b: Mapped[Array | None] = embedding("called")
        c: Mapped[Array | None] = embedding("server")
        d: Mapped[Array | None] = embedding(["scalar", "changing"])

    create(engine, Own.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        note = Note()
        session.add(note)
        session.commit()
        assert pending(engine) == {("note.b", "1"), ("note.c", "1")}
        assert require_true_or_pending(engine, encoder, Note) == (2, 2)
        note.scalar = "changed"
        session.commit()
        assert note.changing == "updated"
    require_true_or_pending(engine, encoder, Note)


def test_dataclasses_and_merge(engine: sa.Engine, encoder: RecordingEncoder) -> None:
    """A dataclass's ``__init__`` may set the vector to ``None``, which merge then copies."""

    class Own(MappedAsDataclass, DeclarativeBase):
        pass

    class Note(Own):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        embedding: Mapped[Array] = embedding()

    create(engine, Own.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        session.add(Note(id=1, title="a"))
        session.commit()
        session.merge(Note(id=1, title="a"))
        session.commit()
        session.merge(Note(id=1, title="b"))
        session.commit()
    assert require_true_or_pending(engine, encoder, Note) == (1, 0)


def test_objects_let_go_of_their_batch(sessions: sessionmaker[Any], encoder: Any) -> None:
    """One object that is kept does not keep the vectors of all that were flushed with it."""
    kept = Article(title="kept")
    with sessions() as session:
        session.add_all([kept, *(Article(title=f"t{i}") for i in range(50))])
        session.flush()
        vector: Any = kept.embedding
        assert vector.base is None or vector.base.nbytes <= 2 * vector.nbytes


def test_classes_without_an_embedding_cost_a_flush_nothing(tables: sa.Engine) -> None:
    """One look per mapper: our functions are called as often for 500 objects as for 5."""

    class Own(DeclarativeBase):
        pass

    class Plain(Own):
        __tablename__ = "plain"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]

    Own.metadata.create_all(tables)

    def calls(objects: int) -> int:
        count = 0

        def profile(frame: Any, happened: str, argument: Any) -> None:
            nonlocal count
            count += happened == "call" and f"{os.sep}sbert_pg{os.sep}" in frame.f_code.co_filename

        with Session(tables) as session:
            embed_on_flush(session)
            session.add_all(Plain(title=f"t{n}") for n in range(objects))
            sys.setprofile(profile)
            try:
                session.flush()
            finally:
                sys.setprofile(None)
        return count

    calls(5)
    few = calls(5)
    assert 0 < few == calls(500) <= 10
