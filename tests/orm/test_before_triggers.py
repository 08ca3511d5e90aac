"""``BEFORE`` triggers of an application's that rewrite a text on its way into the row.

The row that comes out is fresh or pending, never silently stale.
"""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from write_models import (
    Array,
    Article,
    Page,
    RecordingEncoder,
    Strict,
    create,
    embedding,
    pending,
    require_true_or_pending,
)

from sbert_pg import embed_on_flush
from sbert_pg.errors import EncoderMismatchError

#: Another word for the encoder, which does not see blanks at the ends. The second time it changes
#: nothing.
MARK = "NEW.title := replace(NEW.title, ' ', 'x')"
GROW = "NEW.title := NEW.title || '!'"
TOUCH = "NEW.views := NEW.views + 1"
BOTH = "INSERT OR UPDATE"


def trigger(engine: sa.Engine, table: str, body: str, events: str = BOTH) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION rewrite() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {body}; RETURN NEW; END $$"
        )
        connection.exec_driver_sql(
            f"CREATE TRIGGER rewrite BEFORE {events} ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION rewrite()"
        )


def test_flush(session: Session, tables: sa.Engine, encoder: RecordingEncoder) -> None:
    trigger(tables, "article", MARK)
    padded, plain = Article(id=1, title=" a "), Article(id=2, title="b")
    session.add_all([padded, plain])
    session.commit()
    assert padded.title == "xax"
    assert pending(tables) == {("article.embedding", "1")}
    assert require_true_or_pending(tables, encoder, Article) == (1, 1)
    padded.title, plain.title = "c", " d "
    session.commit()
    assert pending(tables) == {("article.embedding", "2")}
    assert require_true_or_pending(tables, encoder, Article) == (1, 1)


def test_trigger_made_while_the_engine_is_in_use(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    session.add(Article(title=" before "))
    session.commit()
    trigger(tables, "article", MARK)
    session.add(Article(title=" after "))
    session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (1, 1)


@pytest.mark.parametrize("events", ["INSERT", "UPDATE", BOTH])
def test_several_columns(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder, events: str
) -> None:
    trigger(tables, "page", MARK, events)
    page = Page(title=" a ", body=" b ")
    session.add(page)
    session.commit()
    require_true_or_pending(tables, encoder, Page)
    page.body = "c"
    session.commit()
    page.title = "  d"
    session.commit()
    require_true_or_pending(tables, encoder, Page)


def test_text_that_becomes_null(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    trigger(tables, "article", "NEW.title := nullif(btrim(NEW.title), '')")
    session.add_all([Article(title="  "), Article(title=None)])
    session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (0, 1)


def test_text_that_appears(session: Session, tables: sa.Engine, encoder: RecordingEncoder) -> None:
    trigger(tables, "article", "NEW.title := coalesce(NEW.title, 'untitled')")
    session.add(Article(title=None))
    session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (0, 1)


def test_text_that_never_comes_to_rest(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    trigger(tables, "article", GROW)
    trigger(tables, "strict", GROW)
    session.add_all([Article(title="a"), Strict(title="a")])
    session.commit()
    assert require_true_or_pending(tables, encoder, Article, Strict) == (0, 2)


def test_vector_of_the_callers(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    """It came with a text that the row does not have."""
    trigger(tables, "article", MARK)
    session.add_all(
        [
            Article(id=1, title=" a ", embedding=encoder._vector(" a ")),
            Article(id=2, title="b", embedding=encoder._vector("b")),
        ]
    )
    session.commit()
    assert pending(tables) == {("article.embedding", "1")}


@pytest.mark.parametrize("column", ["embedding", "embedding_of"])
def test_trigger_that_writes_the_vector(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder, column: str
) -> None:
    """Another vector is refused; another digest makes the row pending, or is refused as well."""
    value = {"embedding": "(SELECT array_agg(1.0) FROM generate_series(1, 384))::vector"}
    trigger(tables, "article", f"NEW.{column} := {value.get(column, 'gen_random_uuid()')}")
    session.add(Article(title="a"))
    with pytest.raises(EncoderMismatchError):
        session.commit()


def test_rolled_back_object_is_no_vector_of_the_caller(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    trigger(tables, "article", MARK)
    article = Article(title=" a ")
    session.add(article)
    session.flush()
    session.rollback()
    article.title = "another"
    session.add(article)
    session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (1, 0)


def test_nothing_is_read_back(
    session: Session, tables: sa.Engine, encoder: RecordingEncoder
) -> None:
    """What came out is for the row to say, whether there are triggers or not."""
    trigger(tables, "article", TOUCH)
    statements: list[str] = []
    event.listen(tables, "before_cursor_execute", lambda *a: statements.append(a[2]))
    session.add_all([Article(title=f"t{i}") for i in range(3)])
    session.commit()
    article = session.scalars(sa.select(Article)).first()
    assert article is not None
    assert article.title
    statements.clear()
    article.title = "changed"
    session.commit()
    assert [s.split()[0] for s in statements if " article" in s] == ["UPDATE"]
    assert require_true_or_pending(tables, encoder, Article) == (3, 0)


def test_partition(engine: sa.Engine, encoder: RecordingEncoder) -> None:
    """The trigger of one partition, which the table itself does not have."""

    class Own(DeclarativeBase):
        pass

    class Note(Own):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        title: Mapped[str]
        embedding: Mapped[Array | None] = embedding()
        __table_args__ = {"postgresql_partition_by": "RANGE (id)"}

    with engine.begin() as connection:
        Own.metadata.create_all(connection)
        for number in (0, 1):
            connection.exec_driver_sql(
                f"CREATE TABLE note_{number} PARTITION OF note "
                f"FOR VALUES FROM ({number * 10}) TO ({number * 10 + 10})"
            )
    create(engine, Own.metadata)
    trigger(engine, "note_1", MARK)
    sessions = sessionmaker(engine)
    embed_on_flush(sessions)
    with sessions() as session:
        session.add_all([Note(id=1, title=" a "), Note(id=11, title=" b ")])
        session.commit()
    assert require_true_or_pending(engine, encoder, Note) == (1, 1)


class TestStatements:
    @pytest.fixture(autouse=True)
    def _trigger(self, tables: sa.Engine) -> None:
        trigger(tables, "article", MARK)
        trigger(tables, "strict", MARK)

    def test_insert(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        rows = [{"id": 1, "title": " a "}, {"id": 2, "title": "b"}]
        session.execute(sa.insert(Article), rows)
        session.execute(sa.insert(Strict), rows)
        session.commit()
        assert pending(tables) == {("article.embedding", "1"), ("strict.embedding", "1")}
        assert require_true_or_pending(tables, encoder, Article, Strict) == (2, 2)

    def test_insert_without_keys(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.execute(sa.insert(Article), [{"title": " a "}, {"title": "b"}])
        session.execute(sa.insert(Strict), [{"title": " a "}])
        session.commit()
        assert require_true_or_pending(tables, encoder, Article, Strict) == (1, 2)

    def test_insert_returning(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        statement = sa.insert(Article).returning(Article)
        assert session.scalars(statement, [{"id": 1, "title": " a "}]).one().title == "xax"
        session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (0, 1)

    def test_upsert(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        upsert = insert(Article)
        upsert = upsert.on_conflict_do_update(
            index_elements=["id"],
            set_={name: upsert.excluded[name] for name in ("title", "embedding", "embedding_of")},
        )
        for title in (" a ", " b "):
            session.execute(upsert, [{"id": 1, "title": title}])
            session.commit()
            assert require_true_or_pending(tables, encoder, Article) == (0, 1)

    def test_update(self, session: Session, tables: sa.Engine, encoder: Any) -> None:
        session.add_all([Article(id=1, title="a"), Article(id=2, title="b")])
        session.commit()
        session.execute(sa.update(Article), [{"id": 1, "title": " c "}, {"id": 2, "title": "d"}])
        session.commit()
        assert pending(tables) == {("article.embedding", "1")}
        assert require_true_or_pending(tables, encoder, Article) == (1, 1)
