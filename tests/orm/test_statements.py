"""Bulk statements of the ORM: what is encoded, what is left to a worker, what is refused."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from write_models import (
    Array,
    Article,
    Book,
    Item,
    Line,
    Page,
    RecordingEncoder,
    create,
    embedding,
    pending,
    require_true_or_pending,
)

from sbert_pg import embed_on_flush, embed_rows
from sbert_pg.errors import DeclarationError, EncoderMismatchError, EncodingError

UNIT = np.eye(384, dtype=np.float32)


class TestInsert:
    def test_one_batch(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        rows = [{"title": f"t{i}"} for i in range(2500)]
        session.execute(sa.insert(Article), rows)
        session.commit()
        assert [len(batch) for batch in encoder.batches] == [2500]
        assert "embedding" not in rows[0], "the caller's rows are the caller's"
        assert require_true_or_pending(tables, encoder, Article) == (2500, 0)

    def test_returning(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        statement = sa.insert(Article).returning(Article, sort_by_parameter_order=True)
        found = session.scalars(statement, [{"title": "a"}, {"title": "b"}]).all()
        assert [article.title for article in found] == ["a", "b"]
        assert np.array_equal(found[1].embedding, encoder._vector("b"))

    def test_vectors_given_null_and_mixed(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        session.execute(
            sa.insert(Article),
            [
                {"title": "a", "embedding": None},
                {"title": "b", "embedding": UNIT[0]},
                {"title": None, "embedding": None},
                {"title": "c", "embedding": None},
            ],
        )
        session.commit()
        assert encoder.batches == [["a", "c"]]
        found = session.scalars(sa.select(Article.embedding).order_by(Article.id)).all()
        assert np.array_equal(found[1], UNIT[0])
        assert found[2] is None
        assert pending(tables) == set()

    def test_one_row(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.execute(sa.insert(Article), {"title": "a"})
        session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (1, 0)

    def test_inheritance_and_keys(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.execute(
            sa.insert(Book),
            [{"title": f"t{i}", "blurb": "b", "note": str(i), "kind": "book"} for i in range(3)],
        )
        order = uuid.uuid4()
        session.execute(
            sa.insert(Line),
            [{"order": order, "number": i, "heading": "h", "note": str(i)} for i in range(3)],
        )
        session.commit()
        assert require_true_or_pending(tables, encoder, Item, Book, Line) == (9, 0)

    def test_errors_name_the_row(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.execute(sa.insert(Article), [{"title": "before"}])
        with pytest.raises(EncodingError, match="embedding of row 1 of Article"):
            session.execute(sa.insert(Article), [{"title": "a"}, {"title": "refuse me"}])
        session.execute(sa.insert(Article), [{"title": "after"}])
        session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (2, 0)

    def test_on_conflict(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.add_all([Article(id=1, title="old"), Page(id=1, title="t", body="old")])
        session.commit()
        insert = pg_insert(Article)
        names = ("title", "embedding", "embedding_of")
        upsert = insert.on_conflict_do_update(
            index_elements=["id"], set_={name: insert.excluded[name] for name in names}
        )
        session.execute(upsert, [{"id": 1, "title": "new"}, {"id": 2, "title": "more"}])
        session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (2, 0)
        text_alone = insert.on_conflict_do_update(
            index_elements=["id"], set_={"title": insert.excluded.title}
        )
        session.execute(text_alone, [{"id": 1, "title": "newer"}])
        session.commit()
        assert pending(tables) == {("article.embedding", "1")}
        nothing = insert.on_conflict_do_nothing()
        session.execute(nothing, [{"id": 2, "title": "ignored"}])
        session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (1, 1)

    def test_on_conflict_with_a_vector_alone(self, session: Session, encoder: Any) -> None:
        session.add(Article(id=1, title="old"))
        session.commit()
        insert = pg_insert(Article)
        upsert = insert.on_conflict_do_update(
            index_elements=["id"], set_={"embedding": insert.excluded.embedding}
        )
        with pytest.raises(EncoderMismatchError, match="embedding_of"):
            session.execute(upsert, [{"id": 1, "title": "new"}])

    def test_on_conflict_with_half_of_the_source(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        """The vector is that of a text that the row does not have."""
        session.add(Page(id=1, title="t", body="old"))
        session.commit()
        insert = pg_insert(Page)
        names = ("body", "by_all", "by_all_of")
        upsert = insert.on_conflict_do_update(
            index_elements=["id"], set_={name: insert.excluded[name] for name in names}
        )
        session.execute(upsert, [{"id": 1, "body": "b"}])
        session.commit()
        assert pending(tables) == {("page.by_all", "1")}
        assert require_true_or_pending(tables, encoder, Page) == (1, 1)

    def test_values_beside_the_parameters(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        """The text is made of both, and this process looks at the parameters alone."""
        session.execute(sa.insert(Page).values(title="fixed"), [{"body": "b"}])
        session.commit()
        assert session.scalars(sa.select(Page.title)).all() == ["fixed"]
        assert require_true_or_pending(tables, encoder, Page) == (0, 2)

    def test_values_alone(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.execute(sa.insert(Article).values(title="a"))
        session.execute(sa.insert(Article).values([{"title": "a"}, {"title": "b"}]))
        session.execute(
            sa.insert(Article).from_select(
                ["title", "views"], sa.select(Article.title, sa.literal(1))
            )
        )
        session.commit()
        assert encoder.batches == []
        assert require_true_or_pending(tables, encoder, Article) == (0, 6)

    def test_other_strategies(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        rows = [{"order_id": uuid.uuid4(), "number": 1, "title": "t", "note": "n"}]
        session.execute(sa.insert(Line), rows, execution_options={"dml_strategy": "raw"})
        session.commit()
        assert require_true_or_pending(tables, encoder, Line) == (0, 1)

    def test_older_bulk_methods(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        """They send no event, so their rows are a worker's."""
        session.bulk_save_objects([Article(title="a")])
        session.bulk_insert_mappings(Article, [{"title": "b"}])  # type: ignore[arg-type]
        session.commit()
        session.bulk_update_mappings(Article, [{"id": 1, "title": "c"}])  # type: ignore[arg-type]
        session.commit()
        assert encoder.batches == []
        assert require_true_or_pending(tables, encoder, Article) == (0, 2)


class TestUpdate:
    @pytest.fixture(autouse=True)
    def _rows(self, session: Session, encoder: RecordingEncoder) -> None:
        session.add_all([Page(id=i, title=f"t{i}", body=f"b{i}") for i in range(1, 6)])
        session.commit()
        encoder.batches.clear()

    def test_by_key(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.execute(
            sa.update(Page),
            [
                {"id": 1, "title": "x1", "body": "y1"},
                {"id": 2, "title": "x2"},
                {"id": 3, "body": None},
                {"id": 4, "views": 3},
                {"id": 5, "by_all": None},
            ],
        )
        session.commit()
        assert sorted(encoder.batches[-1]) == ["t3", "t5\n\nb5", "x1\n\ny1", "x2\n\nb2"]
        assert require_true_or_pending(tables, encoder, Page) == (10, 0)

    def test_text_becomes_null(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.execute(sa.update(Page), [{"id": 1, "title": None, "body": None}])
        session.commit()
        assert require_true_or_pending(tables, encoder, Page) == (8, 0)

    def test_given_vectors(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.execute(sa.update(Page), [{"id": 1, "title": "x", "by_title": UNIT[0]}])
        session.commit()
        assert encoder.batches == [["x\n\nb1"]]
        found = session.scalars(sa.select(Page.by_title).where(Page.id == 1)).one()
        assert np.array_equal(found, UNIT[0])

    def test_criteria(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.execute(sa.update(Page).where(Page.id == 1).values(title="x"))
        session.execute(sa.update(Page).where(Page.id == 2).values(title=sa.func.upper(Page.title)))
        session.commit()
        assert encoder.batches == []
        assert require_true_or_pending(tables, encoder, Page) == (6, 4)

    def test_criteria_and_parameters(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        """One text for all rows is known; a part of one is not."""
        both = {"title": "x", "body": "y"}
        session.execute(sa.update(Page).where(Page.id < 3), both)
        session.execute(sa.update(Page).where(Page.id == 4), {"title": "x"})
        session.commit()
        assert require_true_or_pending(tables, encoder, Page) == (9, 1)

    def test_values_beside_the_parameters(
        self, session: Session, tables: sa.Engine, encoder: Any
    ) -> None:
        session.execute(sa.update(Page).values(title="fixed"), [{"id": 1, "body": "new"}])
        session.commit()
        require_true_or_pending(tables, encoder, Page)

    def test_errors_name_the_row(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        rows = [{"id": 1, "title": "a"}, {"id": 2, "title": "refuse me"}]
        with pytest.raises(EncodingError, match="row 1 of Page"):
            session.execute(sa.update(Page), rows)
        session.commit()
        assert require_true_or_pending(tables, encoder, Page) == (10, 0)


class TestCore:
    """Statements on tables, without the ORM."""

    def test_rows_are_pending(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        table = Article.__table__
        with tables.begin() as connection:
            connection.execute(sa.insert(table), [{"title": "a"}, {"title": "b"}])
        session.execute(sa.insert(table), [{"title": "through a session"}])
        session.commit()
        assert encoder.batches == []
        assert require_true_or_pending(tables, encoder, Article) == (0, 3)

    def test_embed_rows(self, tables: sa.Engine, encoder: Any) -> None:
        table: Any = Page.__table__
        rows = [
            {"title": "a", "body": None},
            {"title": "b", "body": "c"},
            {"title": None, "body": None},
        ]
        with tables.begin() as connection:
            connection.execute(sa.insert(table), embed_rows(table, rows))
        assert len(encoder.batches) == 1
        assert require_true_or_pending(tables, encoder, Page) == (4, 0)
        with pytest.raises(EncodingError, match="row 11 of page"):
            embed_rows(table, [{"title": "a"}, {"title": "refuse me"}], first=10)

    def test_text_is_no_vector(self, tables: sa.Engine) -> None:
        from sbert_pg.errors import VectorError

        table: Any = Article.__table__
        with tables.begin() as connection, pytest.raises(VectorError, match="Text is encoded"):
            connection.execute(sa.insert(table).values(title="a", embedding="a"))

    def test_rows_of_a_class(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        """By attribute names, as ``load`` takes them; what a row lacks is its default."""
        order = uuid.uuid4()
        lines = embed_rows(Line, [{"order": order, "number": 1, "heading": "h", "note": "n"}])
        pages = embed_rows(Page, [{"title": "a"}, {"body": "b"}])
        with Session(tables) as plain:
            plain.execute(sa.insert(Line), lines)
            plain.execute(sa.insert(Page), pages)
            plain.commit()
        assert require_true_or_pending(tables, encoder, Line, Page) == (4, 0)
        with pytest.raises(DeclarationError, match="neither a table nor a mapped class"):
            embed_rows(dict, [{}])

    def test_vectors_that_come_with_their_text(
        self, tables: sa.Engine, encoder: RecordingEncoder
    ) -> None:
        """A Core insert says by itself what they were made from, as far as it is known."""
        table: Any = Article.__table__
        with tables.begin() as connection:
            connection.execute(
                sa.insert(table),
                [
                    {"id": 1, "title": "a", "embedding": encoder._vector("a")},
                    {"id": 2, "title": "b", "embedding": None},
                    {"id": 3, "title": None, "embedding": None},
                    {"id": 4, "title": None, "embedding": encoder._vector("no text")},
                ],
            )
            values = {"title": "c", "embedding": encoder._vector("c").tolist()}
            connection.execute(sa.insert(table).values(id=5, **values))
            connection.execute(sa.insert(table).values([{"id": 6, **values}, {"id": 7, **values}]))
            values["title"] = sa.func.lower("C")
            connection.execute(sa.insert(table).values(id=8, **values))
        waiting = {key for _, key in pending(tables)}
        assert waiting == {"2", "4", "8"}
        assert require_true_or_pending(tables, encoder, Article) == (4, 3)

    def test_many_values_of_a_class_that_come_with_their_vectors(
        self, session: Session, tables: sa.Engine, encoder: RecordingEncoder
    ) -> None:
        """Row by row, with a row in between that has none and one whose text is not known."""
        for first in (1, 11):
            rows: list[dict[str, Any]] = [
                {"id": first + i, "title": f"t{i}", "embedding": encoder._vector(f"t{i}")}
                for i in range(5)
            ]
            rows[1]["embedding"] = None
            rows[3]["title"] = sa.func.lower("T3")
            session.execute(sa.insert(Article).values(rows))
        session.commit()
        assert {key for _, key in pending(tables)} == {"2", "4", "12", "14"}
        assert require_true_or_pending(tables, encoder, Article) == (6, 4)

    def test_update_of_a_vector_alone_is_refused(
        self, session: Session, tables: sa.Engine, encoder: RecordingEncoder
    ) -> None:
        session.add(Article(title="a"))
        session.commit()
        with tables.begin() as connection, pytest.raises(EncoderMismatchError):
            connection.execute(sa.update(Article.__table__).values(embedding=UNIT[0]))
        assert require_true_or_pending(tables, encoder, Article) == (1, 0)

    def test_vectors_copied_in_sql(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        """Nothing proves them, unless what they were made from is copied along."""
        session.add(Article(title="a"))
        session.commit()
        table: Any = Article.__table__
        names = ["title", "views", "embedding"]
        copied = sa.insert(table).from_select(names, sa.select(*(table.c[n] for n in names)))
        with tables.begin() as connection, pytest.raises(EncoderMismatchError):
            connection.execute(copied)
        names.append("embedding_of")
        copied = sa.insert(table).from_select(names, sa.select(*(table.c[n] for n in names)))
        with tables.begin() as connection:
            connection.execute(copied)
        assert require_true_or_pending(tables, encoder, Article) == (2, 0)


def test_scalar_default_beside_values(engine: sa.Engine, encoder: RecordingEncoder) -> None:
    class Own(DeclarativeBase):
        pass

    class Note(Own):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str] = mapped_column(default="by default")
        views: Mapped[int] = mapped_column(default=0)
        embedding: Mapped[Array | None] = embedding()

    create(engine, Own.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        session.execute(sa.insert(Note), [{"views": 1}])
        session.execute(sa.insert(Note).values(title="fixed"), [{"views": 1}])
        session.commit()
    assert require_true_or_pending(engine, encoder, Note) == (1, 1)
