"""Passages on every kind of class, in every key, in the flush, in migrations, as a view."""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from passage_documents import CHUNKER, text, work
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from sbert_pg import (
    Embedding,
    Source,
    add_passages,
    create_all,
    embed_on_flush,
    nearest,
    passages_of,
)
from sbert_pg.errors import DeclarationError
from sbert_pg.passages import PassageView, SentenceChunker
from sbert_pg.reembed.change import reflect
from sbert_pg.testing import DeterministicEncoder


def declared(**options: Any) -> Any:
    return passages_of("deterministic", source="body", dimensions=32, chunker=CHUNKER, **options)


def bound(engine: sa.Engine, base: Any) -> None:
    with engine.begin() as connection:
        create_all(connection, base.metadata)


class Base(MappedAsDataclass, DeclarativeBase):
    """Dataclasses, with keys of several parts."""


class Mixin(MappedAsDataclass):
    """What several classes have."""

    body: Mapped[str | None] = mapped_column(default=None)
    passages = declared()


class Page(Mixin, Base):
    """A key of two parts, an attribute under another name, and two tables of passages."""

    __tablename__ = "page"
    lang: Mapped[str] = mapped_column(sa.String(2), primary_key=True, default="en")
    number: Mapped[uuid.UUID] = mapped_column(primary_key=True, default_factory=uuid.uuid4)
    heading: Mapped[str | None] = mapped_column("title", default=None)
    titled_passages = declared(heading="title", copy_text=True)


class Letter(Mixin, Base):
    """Another class of the mixin."""

    __tablename__ = "letter"
    id: Mapped[int] = mapped_column(primary_key=True, init=False)


def test_dataclasses_mixins_and_keys_of_parts(
    engine: sa.Engine, encoder: DeterministicEncoder
) -> None:
    bound(engine, Base)
    assert set(Base.metadata.tables) == {
        "page", "page_passage", "page_titled_passage", "letter", "letter_passage",
    }  # fmt: skip
    with Session(engine) as session:
        pages = [Page(body=" ".join(text(n)), heading=f"P{n}") for n in range(3)]
        session.add_all([*pages, Letter(body=" ".join(text(9)))])
        session.commit()
        work(engine, Base)
        rows = session.execute(nearest(Page.titled_passages, "sentence topic13", limit=2)).all()
        assert len({row.Page.number for row in rows}) == 2
        passage = rows[0].PageTitledPassage
        assert passage.content == passage.text
        assert passage.heading.startswith("P")
        letter = session.scalars(sa.select(Letter)).one()
        assert len(letter.passages) > 5
        page = session.scalars(sa.select(Page)).first()
        assert page is not None
        page.lang = "de"
        session.commit()
        assert len(page.passages) > 5
        session.delete(page)
        session.commit()
        work(engine, Base)
        count = sa.select(sa.func.count(sa.text("DISTINCT page_number"))).select_from(
            Base.metadata.tables["page_passage"]
        )
        assert session.scalar(count) == 2


def test_sqlmodel(engine: sa.Engine, encoder: DeterministicEncoder) -> None:
    sqlmodel = pytest.importorskip("sqlmodel")

    class Own(sqlmodel.SQLModel, registry=sa.orm.registry()):
        """Classes of other tests stay out of it."""

    class Story(Own, table=True):
        id: int | None = sqlmodel.Field(default=None, primary_key=True)
        body: str
        passages: ClassVar[Any] = declared()

    class Tale(Own, table=True):
        id: int | None = sqlmodel.Field(default=None, primary_key=True)
        body: str

    add_passages(Tale, "passages", declared())
    bound(engine, Own)
    with Session(engine) as session:
        session.add_all([Story(body="A story. It ends."), Tale(body="A tale. It ends.")])
        session.commit()
        work(engine, Own)
        for class_ in (Story, Tale):
            [row] = session.execute(nearest(class_.passages, "it ends", limit=3)).all()
            assert row[1].text.endswith("It ends.")
            assert "passages" not in row[0].model_dump()


def test_the_flush_does_it_when_asked_to(engine: sa.Engine, encoder: DeterministicEncoder) -> None:
    from passage_documents import Base, Document, Passage, require_whole
    from sqlalchemy.orm import sessionmaker

    bound(engine, Base)
    sessions: Any = sessionmaker(engine)
    embed_on_flush(sessions, passages=True)
    sentences = text(1, 60)
    with sessions() as session:
        document = Document(title="T", body=" ".join(sentences))
        session.add_all([document, Document(title=None, body=None), Document(title="T", body="")])
        session.commit()
        before = {p.id: p.digest for p in document.passages}
        encoder.encoded.clear()
        sentences[20] = "This sentence was written anew in the flush, and nothing else was."
        document.body = " ".join(sentences)
        session.commit()
        after = {p.id: p.digest for p in document.passages}
        kept = before.keys() & after.keys()
        assert len(kept) >= len(before) - 3
        assert len(encoder.encoded) == 1 + len(after) - len(kept)
        require_whole(engine, encoder)
        encoder.encoded.clear()
        assert work(engine) == 0, "nothing is left for workers"
        document.body = "Something else."
        session.flush()
        session.rollback()
        require_whole(engine, encoder)
        document.title = None
        document.body = None
        session.commit()
        assert session.scalar(sa.select(sa.func.count()).where(Passage.document_id == 1)) == 0
        assert work(engine) == 0


def test_declarations_read_as_they_are_written() -> None:
    from passage_documents import Document, Passage

    for column in (Document.passages_embedding, Passage.embedding):
        type_ = column.property.columns[0].type
        made = eval(repr(type_), {"Embedding": Embedding, "sbert_pg": __import__("sbert_pg")})
        assert made.source == type_.source == Source.from_json(type_.source.to_json())


def test_the_text_of_a_passage_is_an_expression(
    engine: sa.Engine, encoder: DeterministicEncoder
) -> None:
    """Clusters, near-duplicates and evaluations read it, of declared and of reflected tables."""
    from sbert_pg.passages.cutting import embedded_text

    bound(engine, Base)
    with Session(engine) as session:
        pages = [Page(body=" ".join(text(n)), heading=f"P{n}") for n in range(2)]
        session.add_all(pages)
        session.commit()
        work(engine, Base)
        due = {
            (p.page_number, p.ordinal): embedded_text(p.heading, p.text)
            for page in pages
            for p in page.titled_passages
        }
        reflected = reflect(session.connection(), None, "page_titled_passage")
        for table in (Base.metadata.tables["page_titled_passage"], reflected):
            source = Base.metadata.tables["page_titled_passage"].c.embedding.type.source
            for rows in (table, table.alias("other")):
                chosen = sa.select(rows.c.page_number, rows.c.ordinal, source.expression(rows))
                assert {(row[0], row[1]): row[2] for row in session.execute(chosen)} == due
        assert len(due) > 10


def test_a_view_of_texts(engine: sa.Engine, encoder: DeterministicEncoder) -> None:
    from passage_documents import Base, Document

    bound(engine, Base)
    with Session(engine) as session:
        session.add(Document(title="It's %", body=" ".join(text(1))))
        session.commit()
        work(engine)
        session.execute(PassageView(Document.passages))
        session.commit()
        document = session.get_one(Document, 1)
        read = session.execute(sa.text("SELECT text FROM document_passage_text ORDER BY ordinal"))
        assert read.scalars().all() == [p.text for p in document.passages]
        session.execute(sa.text("UPDATE document SET body = 'x' || body"))
        shown = sa.text("SELECT count(text) FROM document_passage_text")
        assert session.execute(shown).scalar() == 0


def test_what_cannot_be_declared() -> None:
    with pytest.raises(DeclarationError, match="one text column"):
        passages_of("deterministic", source=["a", "b"], dimensions=32)  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match="PassageView"):
        PassageView(Page.body)
    assert SentenceChunker() == SentenceChunker(60, 230, 0, None)
