"""A precision that a column declares, and what obeys it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import catalog, embedding_column, registry
from sbert_pg.alembic.changes import declaration_line
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.encoder import Encoder
from sbert_pg.errors import DeclarationError
from sbert_pg.freshness import refresh
from sbert_pg.spec import EncoderSpec

NAME = "all-MiniLM-L6-v2"


@pytest.fixture
def own_cache(
    minilm_path: Path, encoder_cache: Path, fp32: Encoder, int8: Encoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Encoders are loaded by their declarations, from the conversions of this run."""
    monkeypatch.setenv("SBERT_PG_CACHE", str(encoder_cache))
    registry.forget_encoders()


def test_a_spec_says_it_once() -> None:
    assert EncoderSpec.of(NAME).precision is None
    spec = EncoderSpec.of(NAME, precision="fp32")
    assert spec.precision == "fp32"
    assert EncoderSpec.of(spec, precision="fp32") == spec
    with pytest.raises(DeclarationError, match="says fp32 and the declaration says int8"):
        EncoderSpec.of(spec, precision="int8")
    with pytest.raises(DeclarationError, match="no precision 'fp64'"):
        embedding_column(NAME, "body", precision="fp64")


def test_it_is_part_of_the_type() -> None:
    type_ = Embedding(NAME, "body", precision="fp32")
    again = type_.copy()
    assert isinstance(again, Embedding)
    assert again.encoder == type_.encoder
    assert "precision='fp32'" in repr(type_)
    line = declaration_line(type_)
    assert "precision='fp32'" in line
    assert "precision" not in declaration_line(Embedding(NAME, "body"))


def test_two_precisions_of_one_encoder_side_by_side(minilm_path: Path, own_cache: None) -> None:
    name = str(minilm_path)
    exact, usual = (
        registry.get_encoder(EncoderSpec.of(name, dimensions=384, precision=precision))
        for precision in ("fp32", None)
    )
    assert (exact.spec.precision, usual.spec.precision) == ("fp32", "int8")
    assert registry.find_encoder(EncoderSpec.of(name, dimensions=384, precision="fp32")) is exact
    used = registry.use_encoder(usual, name=name)
    assert registry.find_encoder(EncoderSpec.of(name, dimensions=384, precision="fp32")) is used


def test_a_worker_obeys_it(
    engine: sa.Engine, minilm_path: Path, own_cache: None, fp32: Encoder, int8: Encoder
) -> None:
    """The worker knows the database alone."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding: Mapped[Any] = embedding_column(
            str(minilm_path), "body", dimensions=384, precision="fp32", nullable=True
        )

    Base.metadata.create_all(engine)
    column = Note.__table__.c.embedding
    with engine.begin() as connection:
        catalog.bind(connection, column)
        connection.execute(sa.text("INSERT INTO note (id, body) VALUES (1, 'a refund, please')"))
    refresh(engine)
    with Session(engine) as session:
        stored = session.scalars(sa.select(Note.embedding)).one()
    exact, rough = (one.encode_document(["a refund, please"])[0] for one in (fp32, int8))
    np.testing.assert_allclose(stored, exact, atol=1e-6)
    assert np.abs(np.asarray(stored) - rough).max() > 1e-4
