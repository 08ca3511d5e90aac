"""From a statement of the application to the catalog: held once, attested in each transaction."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import catalog
from sbert_pg.catalog import tables
from sbert_pg.errors import EncoderMismatchError
from sbert_pg.orm import embed_on_flush, embedding_column
from sbert_pg.registry import forget_encoders, use_encoder
from sbert_pg.testing import DeterministicEncoder


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str | None]
    embedding = embedding_column("deterministic", source="body", dimensions=384)


@pytest.fixture
def bound(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> sa.Engine:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        catalog.bind(connection, Note.__table__.c.embedding)
    return engine


def note_session(engine: sa.Engine) -> Session:
    session = Session(engine)
    embed_on_flush(session)
    return session


def test_the_first_write_seals_and_later_ones_attest(bound: sa.Engine) -> None:
    with note_session(bound) as session:
        session.add(Note(body="a"))
        session.commit()
        session.add(Note(body="b"))
        session.commit()
    with bound.connect() as connection:
        binding = catalog.require_binding(connection, Note.__table__.c.embedding)
        assert binding.fingerprint is not None
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.pending)) == 0


def test_a_seal_that_is_rolled_back_is_made_again(bound: sa.Engine) -> None:
    with note_session(bound) as session:
        session.add(Note(body="a"))
        session.flush()
        session.add(Note(body="again in the same transaction"))
        session.flush()
        session.rollback()
        session.add(Note(body="b"))
        session.commit()
    with bound.connect() as connection:
        binding = catalog.require_binding(connection, Note.__table__.c.embedding)
        assert binding.fingerprint is not None


def test_another_process_with_another_encoder_is_refused(bound: sa.Engine) -> None:
    with note_session(bound) as session:
        session.add(Note(body="a"))
        session.commit()
    forget_encoders()
    use_encoder(DeterministicEncoder(salt="another"))
    other = sa.create_engine(bound.url)
    with note_session(other) as session:
        session.add(Note(body="b"))
        with pytest.raises(
            EncoderMismatchError, match=r"note\.embedding belongs to encoder .deterministic."
        ):
            session.commit()
    other.dispose()


def test_a_column_that_was_bound_anew_is_held_anew(bound: sa.Engine) -> None:
    column = Note.__table__.c.embedding
    with note_session(bound) as session:
        session.add(Note(body="a"))
        session.commit()
    with bound.begin() as connection:
        catalog.unbind(connection, column)
        binding = catalog.bind(connection, column)
        catalog.seal(connection, binding, DeterministicEncoder(salt="another"))
    with note_session(bound) as session:
        session.add(Note(body="b"))
        with pytest.raises(EncoderMismatchError):
            session.commit()
