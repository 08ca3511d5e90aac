"""Errors raised inside a statement arrive as what they are."""

from __future__ import annotations

import pickle

import pytest
import sqlalchemy as sa

from sbert_pg import Embedding, Vector, errors, use_encoder
from sbert_pg.testing import DeterministicEncoder


@pytest.fixture
def note(engine: sa.Engine) -> sa.Table:
    table = sa.Table("note", sa.MetaData(), sa.Column("embedding", Vector(3)))
    table.create(engine)
    return table


def test_a_bad_vector_of_a_write(engine: sa.Engine, note: sa.Table) -> None:
    with engine.begin() as connection:
        with pytest.raises(errors.DimensionError, match="2 dimensions and 3"):
            connection.execute(note.insert(), [{"embedding": [1.0, 2.0]}])
        with pytest.raises(errors.NonFiniteError):
            connection.execute(note.insert().values(embedding=[1.0, 2.0, float("inf")]))
        connection.execute(note.insert(), [{"embedding": [1.0, 2.0, 3.0]}])
        assert connection.scalar(sa.select(sa.func.count()).select_from(note)) == 1


def test_a_query_that_cannot_be_encoded(engine: sa.Engine) -> None:
    use_encoder(DeterministicEncoder("refusing", 8, refuse="\x07"))
    table = sa.Table(
        "memo",
        sa.MetaData(),
        sa.Column("body", sa.Text),
        sa.Column("embedding", Embedding("refusing", "body", dimensions=8)),
    )
    table.create(engine)
    statement = sa.select(table.c.body).order_by(table.c.embedding.distance("a\x07b"))
    with engine.connect() as connection, pytest.raises(errors.EncodingError, match="contains"):
        connection.execute(statement)


def test_it_is_pickled_as_the_class_of_the_tree(engine: sa.Engine, note: sa.Table) -> None:
    with engine.connect() as connection, pytest.raises(errors.DimensionError) as caught:
        connection.execute(note.insert(), [{"embedding": [1.0]}])
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is errors.DimensionError
    assert str(again) == str(caught.value)
