"""Searches on a hot standby, which nobody can write to: real streaming replication."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from replica import Replica, replica_of
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import (
    catalog,
    create_all,
    embed_on_flush,
    embedding_column,
    explain_search,
    hnsw_index,
    hybrid,
    matching,
    nearest,
    registry,
    text_column,
    text_index,
)
from sbert_pg.errors import EncoderMismatchError
from sbert_pg.freshness import status
from sbert_pg.testing import DeterministicEncoder


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    __table_args__ = (hnsw_index("note_embedding", "embedding"), text_index("note_words", "words"))
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    part: Mapped[int]
    embedding = embedding_column("deterministic", source="body", dimensions=384)
    words = text_column("body")


@pytest.fixture
def replica(request: pytest.FixtureRequest) -> Iterator[Replica]:
    with replica_of(request) as made:
        yield made


def answers(engine: sa.Engine) -> list[list[Any]]:
    """Each kind of search, as keys and scores."""
    searches = (
        nearest(Note.embedding, "apple 7"),
        nearest(Note.embedding, "apple 7").where(Note.part == 3),
        nearest(Note.embedding, ["apple 7", "pear 9"], limit=3),
        matching(Note.words, "apple pear"),
        hybrid(Note.embedding, Note.words, "pear 11"),
    )
    with Session(engine) as session:
        return [[(row[0].id, row[1]) for row in session.execute(s).all()] for s in searches]


def test_a_standby_answers_as_its_primary_and_refuses_with_it(
    engine: sa.Engine, fake_encoder: DeterministicEncoder, replica: Replica
) -> None:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        session.add_all(
            Note(body=f"{('apple', 'pear', 'plum')[n % 3]} {n}", part=n % 5) for n in range(300)
        )
        session.commit()
    replica.follow(engine)
    standby = sa.create_engine(replica.url(engine.url), poolclass=sa.NullPool)
    found = answers(standby)
    assert found == answers(engine)
    assert all(found)
    with Session(standby) as session:
        assert explain_search(session, nearest(Note.embedding, "apple 7"))
        assert [column.pending for column in status(session.connection())] == [0]
    with Session(standby) as session:
        embed_on_flush(session)
        session.add(Note(body="new", part=1))
        with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"):
            session.commit()
    # The column changes hands on the primary: who has searched before is refused here, too.
    with engine.begin() as connection:
        catalog.unbind(connection, Note.__table__.c.embedding)
    registry.forget_encoders()
    other = DeterministicEncoder(salt="another")
    registry.use_encoder(other)
    with engine.begin() as connection:
        binding = catalog.bind(connection, Note.__table__.c.embedding)
        catalog.hold_encoder(connection, binding, other)
    replica.follow(engine)
    registry.forget_encoders()
    registry.use_encoder(fake_encoder)
    with pytest.raises(EncoderMismatchError):
        answers(standby)
