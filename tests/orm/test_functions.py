"""Encoders from functions, and sessions that stop to encode."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from write_models import Article, pending

from sbert_pg import (
    create_all,
    embed_on_flush,
    embedding_column,
    encoder_of,
    leave_to_workers,
    nearest,
    use_encoder,
)
from sbert_pg.errors import DeclarationError, DimensionError, EncoderMismatchError, VectorError
from sbert_pg.orm import flush
from sbert_pg.testing import DeterministicEncoder


class Base(DeclarativeBase):
    pass


class Word(Base):
    __tablename__ = "word"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    embedding = embedding_column("letters", source="text", nullable=True, dimensions=4)


def letters(texts: list[str]) -> list[list[float]]:
    return [[1.0 + text.count("a"), len(text), text.count(" "), 1.0] for text in texts]


def backwards(texts: list[str]) -> list[list[float]]:
    return [vector[::-1] for vector in letters(texts)]


@pytest.fixture
def words(engine: sa.Engine) -> sa.Engine:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    return engine


def written(engine: sa.Engine, text: str) -> Any:
    with Session(engine) as session:
        embed_on_flush(session)
        session.add(Word(text=text))
        session.commit()
        return session.execute(nearest(Word.embedding, text, limit=1)).one()


def test_a_function_is_an_encoder(words: sa.Engine) -> None:
    encoder = use_encoder(encoder_of(letters, name="letters", dimensions=4))
    word, similarity = written(words, "banana")
    assert word.text == "banana"
    assert similarity == pytest.approx(1, abs=1e-6)
    assert encoder.encode_document([]).shape == (0, 4)
    assert np.array_equal(encoder.encode_query([""]), encoder.encode_query([" "]))
    # The same function in another process.
    use_encoder(encoder_of(letters, name="letters", dimensions=4))
    written(words, "pear")


@pytest.mark.parametrize("version", ["", "2"])
def test_another_function_under_the_name_is_refused(words: sa.Engine, version: str) -> None:
    use_encoder(encoder_of(letters, name="letters", dimensions=4))
    written(words, "banana")
    use_encoder(encoder_of(backwards, name="letters", dimensions=4, version=version))
    # In another process: this one has proven its encoder already.
    other = sa.create_engine(words.url)
    with pytest.raises(EncoderMismatchError):
        written(other, "pear")
    other.dispose()


def test_queries_may_have_a_function_of_their_own() -> None:
    encoder = encoder_of(letters, name="letters", dimensions=4, query=backwards)
    assert encoder.encode_query(["ab"]).tolist() == [[1, 0, 2, 2]]
    assert encoder.encode_document(["ab"]).tolist() == [[2, 2, 0, 1]]


def test_functions_that_are_none() -> None:
    async def later(texts: list[str]) -> None: ...

    for wrong in (later, "letters"):
        with pytest.raises(DeclarationError, match="takes a function"):
            encoder_of(wrong, name="x", dimensions=4)  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match="needs a name"):
        encoder_of(letters, name="", dimensions=4)
    with pytest.raises(DimensionError, match=r"shape \(2, 4\) for 2 texts, where \(2, 3\)"):
        encoder_of(letters, name="x", dimensions=3).encode_query(["a", "b"])
    with pytest.raises(DimensionError, match=r"shape \(1, 4\) for 2 texts"):
        encoder_of(lambda texts: letters(texts[:1]), name="x", dimensions=4).encode_query(
            ["a", "b"]
        )
    with pytest.raises(VectorError, match="no array of numbers"):
        encoder_of(lambda texts: [[1.0], [2.0, 3.0]], name="x", dimensions=2).encode_query(
            ["a", "b"]
        )


def test_a_query_of_another_width_names_the_encoder(session: Session) -> None:
    """Also of an encoder that does not check itself, as ``encoder_of`` does."""

    class Wide(DeterministicEncoder):
        def encode_query(self, texts: Sequence[str]) -> Any:
            return np.ones((len(texts), 385))

    use_encoder(Wide(), name="deterministic")
    for _ in range(2):
        with pytest.raises(DimensionError, match=r"'deterministic' gave vectors of shape"):
            session.execute(nearest(Article.embedding, "a"))


def test_sessions_leave_rows_to_workers_again(tables: sa.Engine, encoder: Any) -> None:
    factory, other = sessionmaker(tables), sessionmaker(tables)
    embed_on_flush(factory)
    embed_on_flush(other)
    with factory() as session:
        session.add(Article(id=1, title="a"))
        session.commit()
    with factory() as session, factory() as second:
        leave_to_workers(session)  # this one alone
        session.add(Article(id=2, title="b"))
        session.execute(sa.insert(Article), [{"id": 3, "title": "c"}])
        second.add(Article(id=4, title="d"))
        session.commit()
        second.commit()
    leave_to_workers(factory)
    with factory() as session, other() as still:
        session.add(Article(id=5, title="e"))
        still.add(Article(id=6, title="f"))
        session.commit()
        still.commit()
    assert pending(tables) == {("article.embedding", key) for key in "235"}
    embed_on_flush(factory)
    with factory() as session:
        session.add(Article(id=7, title="g"))
        session.commit()
    assert pending(tables) == {("article.embedding", key) for key in "235"}
    assert encoder.encoded == ["a", "d", "f", "g"]
    with pytest.raises(DeclarationError, match="takes a session"):
        leave_to_workers(tables)  # type: ignore[arg-type]


def test_a_class_in_the_place_of_one_that_is_gone(tables: sa.Engine, encoder: Any) -> None:
    """SQLAlchemy knows the targets of events by id(), also those that are no more."""
    for number in range(1, 200):
        own = type("Own", (Session,), {})
        embed_on_flush(own)
        embed_on_flush(own)
        with own(tables) as session:
            session.add(Article(id=number, title="a"))
            session.commit()
        assert len(encoder.encoded) == number
        del own
        gc.collect(0)


def test_a_class_whose_sessions_are_made_with_arguments(tables: sa.Engine, encoder: Any) -> None:
    class Own(Session):
        def __new__(cls, bind: sa.Engine) -> Own:
            return super().__new__(cls)

    embed_on_flush(Own)
    with Own(tables) as session:
        session.add(Article(id=1, title="a"))
        session.commit()
    assert encoder.encoded == ["a"]


@pytest.mark.parametrize("kind", ["factory", "class", "session"])
def test_listeners_that_were_removed_are_noticed(
    tables: sa.Engine, encoder: Any, kind: str
) -> None:
    class Own(Session):
        pass

    factory = sessionmaker(tables, class_=Own)
    with factory() as session:
        target: Any = {"factory": factory, "class": Own, "session": session}[kind]
        embed_on_flush(target)
        embed_on_flush(session)  # It has them already, from its class or of its own.
        listened = factory.class_ if kind == "factory" else target
        for event, listener in (
            ("before_flush", flush._before_flush),
            ("do_orm_execute", flush._before_statement),
        ):
            sa.event.remove(listened, event, listener)
        session.add(Article(id=1, title="a"))
        session.flush()
        assert encoder.encoded == []
        embed_on_flush(target)
        session.add(Article(id=2, title="b"))
        session.execute(sa.insert(Article), [{"id": 3, "title": "c"}])
        session.commit()
    assert sorted(encoder.encoded) == ["b", "c"]
