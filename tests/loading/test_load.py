"""The bulk loader: what goes in, what is refused and how it is named, what an error leaves."""

from __future__ import annotations

import datetime
import decimal
import enum
import pickle
import threading
import tracemalloc
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
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

from sbert_pg import Embedding, create_all, load, registry
from sbert_pg.errors import (
    DeclarationError,
    EncoderMismatchError,
    EncodingError,
    LoadError,
    VectorError,
)
from sbert_pg.loading import Loaded, loader
from sbert_pg.spec import Vectors

UNIT = np.eye(384, dtype=np.float32)


def count(engine: sa.Engine, class_: Any) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(class_)) or 0)


def titles(number: int) -> Iterator[dict[str, Any]]:
    return ({"title": f"t{i}"} for i in range(number))


class TestWhatGoesIn:
    def test_generator(self, tables: sa.Engine, encoder: RecordingEncoder) -> None:
        with tables.begin() as connection:
            assert load(connection, Article, titles(5000)) == 5000
        assert require_true_or_pending(tables, encoder, Article) == (5000, 0)
        assert max(len(batch) for batch in encoder.batches) <= loader.BLOCK_ROWS

    def test_nothing(self, tables: sa.Engine, encoder: Any) -> None:
        with tables.begin() as connection:
            assert load(connection, Article, []) == 0
            assert load(connection, Article, iter(())) == 0

    def test_session(self, tables: sa.Engine, encoder: Any) -> None:
        with Session(tables) as session:
            load(session, Article, titles(3))
            assert session.scalar(sa.select(sa.func.count()).select_from(Article)) == 3
            session.rollback()
            load(session, Article, titles(2))
            session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (2, 0)

    def test_session_with_two_engines(self, tables: sa.Engine, encoder: Any) -> None:
        nowhere = sa.create_engine("postgresql+psycopg://localhost:1/nowhere")
        with Session(binds={Article: tables, Page: nowhere}) as session:
            load(session, Article, titles(2))
            load(session, Article.__table__, titles(2))
            session.commit()
        assert require_true_or_pending(tables, encoder, Article) == (4, 0)

    def test_several_columns_null_and_empty(self, tables: sa.Engine, encoder: Any) -> None:
        rows: list[dict[str, Any]] = [
            {"title": "a", "body": "b"},
            {"title": None, "body": None},
            {"title": "", "body": "c"},
            {"title": "a", "body": None},
        ]
        with tables.begin() as connection:
            load(connection, Page, rows)
        assert require_true_or_pending(tables, encoder, Page) == (6, 0)
        assert count(tables, Page) == 4

    def test_attribute_names_and_defaults(self, tables: sa.Engine, encoder: Any) -> None:
        """``order`` is a column of another name, and Python makes its value."""
        with tables.begin() as connection:
            load(connection, Line, [{"number": i, "heading": "h", "note": "n"} for i in range(4)])
        assert require_true_or_pending(tables, encoder, Line) == (4, 0)
        table: Any = Line.__table__
        with tables.begin() as connection:
            row = {"order_id": uuid.uuid4(), "number": 1, "title": "t", "note": None}
            load(connection, table, [row])
        assert require_true_or_pending(tables, encoder, Line) == (5, 0)

    def test_inheritance(self, tables: sa.Engine, encoder: Any) -> None:
        with tables.begin() as connection:
            with pytest.raises(DeclarationError, match="several tables"):
                load(connection, Book, [{"title": "a"}])
            load(connection, Item, [{"id": 1, "kind": "book", "title": "a"}])
            load(connection, Book.__table__, [{"id": 1, "blurb": "b", "note": None}])
        with Session(tables) as session:
            assert isinstance(session.scalars(sa.select(Item)).one(), Book)
        assert require_true_or_pending(tables, encoder, Item, Book) == (2, 0)

    def test_tuples(self, tables: sa.Engine, encoder: Any) -> None:
        with tables.begin() as connection:
            load(connection, Page, [("a", "b"), ("c", None)], columns=("title", "body"))
            load(connection, Article, zip(["x"], UNIT[:1], strict=True),
                 columns=["title", "embedding"])  # fmt: skip
            with pytest.raises(LoadError, match=r"Row 1 is .*2 values.*title, body") as raised:
                load(connection, Page, [("a", "b"), ("c",)], columns=("title", "body"))
            assert raised.value.row == 1
            with pytest.raises(LoadError, match=r"Row 0 .*columns="):
                load(connection, Page, [("a", "b")])  # type: ignore[list-item]
            with pytest.raises(LoadError, match=r"Row 1 .*columns="):
                load(connection, Page, [{"title": "a"}, ("a", "b")])  # type: ignore[list-item]
        assert require_true_or_pending(tables, encoder, Page) == (4, 0)

    def test_rows_of_another_query(self, tables: sa.Engine, encoder: Any) -> None:
        with tables.begin() as connection:
            load(connection, Article, titles(3))
            found = connection.execute(sa.select(Article.title, Article.views)).mappings()
            load(connection, Article, found.all())
        assert require_true_or_pending(tables, encoder, Article) == (6, 0)

    def test_one_text_for_many_rows(self, tables: sa.Engine, encoder: Any) -> None:
        with tables.begin() as connection:
            load(connection, Article, ({"title": "same"} for _ in range(1000)))
        assert encoder.batches == [["same"]]


class TestVectors:
    @pytest.mark.parametrize("kind", [list, tuple, np.float64, np.float32])
    def test_given(self, tables: sa.Engine, encoder: Any, kind: Any) -> None:
        vector = kind(UNIT[3].tolist()) if kind in (list, tuple) else UNIT[3].astype(kind)
        with tables.begin() as connection:
            load(connection, Article, [{"title": "a", "embedding": vector}])
            found = connection.scalars(sa.select(Article.__table__.c.embedding)).one()
        assert np.array_equal(found, UNIT[3])
        assert encoder.batches == []
        assert pending(tables) == set()

    def test_mixed(self, tables: sa.Engine, encoder: Any) -> None:
        rows = [
            {"title": "given", "body": "b", "by_title": UNIT[1], "by_all": UNIT[2] * 3},
            {"title": "half", "body": "b", "by_title": None, "by_all": UNIT[2]},
            {"title": "none", "body": "b", "by_title": None, "by_all": None},
        ]
        with tables.begin() as connection:
            load(connection, Page, rows)
            c = Page.__table__.c
            found = connection.execute(sa.select(c.by_title, c.by_all).order_by(c.id)).all()
        assert [len(batch) for batch in encoder.batches] == [2, 1]
        assert np.array_equal(found[0].by_title, UNIT[1])
        assert np.array_equal(found[0].by_all, UNIT[2] * 3)
        assert np.allclose(found[1].by_title, encoder._vector("half"))
        assert np.allclose(found[2].by_all, encoder._vector("none\n\nb"), atol=1e-3)

    @pytest.mark.parametrize(
        ("vector", "says"),
        [
            (np.ones(3), "3 dimensions and 384"),
            (np.full(384, np.nan), "nan at position 0"),
            (np.zeros(384), "all zeros"),
            ("[1,2]", "str"),
            ([[1.0] * 384], "one axis"),
            (["a"] * 384, "not a sequence of numbers"),
        ],
    )
    def test_bad(self, tables: sa.Engine, encoder: Any, vector: Any, says: str) -> None:
        rows: list[dict[str, Any]] = [{"title": "a", "embedding": UNIT[i]} for i in range(5)]
        rows[3] = {"title": "bad", "embedding": vector}
        with tables.begin() as connection:
            with pytest.raises(LoadError, match=f"Row 3: .*{says}") as raised:
                load(connection, Article, rows)
            assert isinstance(raised.value.__cause__, VectorError)
            assert raised.value.row == 3
        assert count(tables, Article) == 0

    def test_halfvec_range(self, tables: sa.Engine, encoder: Any) -> None:
        with tables.begin() as connection, pytest.raises(LoadError, match=r"Row 0: .*65504"):
            load(connection, Page, [{"title": "a", "by_all": UNIT[0] * 1e6}])


class TestErrors:
    """Every error says which row, and leaves the transaction as it was."""

    def refused(
        self, engine: sa.Engine, table: Any, rows: Any, match: str, error: Any = LoadError
    ) -> Any:
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE witness (i int)"))
            with pytest.raises(error, match=match) as raised:
                load(connection, table, rows)
            connection.execute(sa.text("INSERT INTO witness VALUES (1)"))
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM witness")) == 1
            connection.execute(sa.text("DROP TABLE witness"))
            connection.commit()
        assert count(engine, table) == 0
        return raised.value

    def test_key_that_is_there_already(self, tables: sa.Engine, encoder: Any) -> None:
        rows = [{"id": i % 4000, "title": f"t{i}"} for i in range(5000)]
        error = self.refused(tables, Article, rows, r"Row 4000 .*unique.*\(id\)=\(0\)")
        assert error.row == 4000

    def test_null_where_none_may_be(self, tables: sa.Engine, encoder: Any) -> None:
        rows = [{"number": 1, "heading": "h"}, {"number": 2, "heading": None}]
        error = self.refused(tables, Line, rows, r"Row 1 .*null value.*title")
        assert error.row == 1

    def test_encoding(self, tables: sa.Engine, encoder: Any) -> None:
        rows = [{"title": f"t{i}"} for i in range(3000)]
        rows[2500]["title"] = "refuse me"
        self.refused(tables, Article, rows, "embedding of row 2500", EncodingError)

    def test_too_much_too_little(self, tables: sa.Engine, encoder: Any) -> None:
        self.refused(tables, Article, [{"titel": "a"}], r"Row 0 .*'titel'.*title")
        self.refused(tables, Article, [{"title": "a"}, {"title": "b", "id": 1}], "Row 1 .*'id'")
        rows = [{"id": 1, "title": "a"}, {"title": "b"}]
        self.refused(tables, Article, rows, r"Row 1 has no 'id'")

    def test_values_of_the_wrong_type(self, tables: sa.Engine, encoder: Any) -> None:
        self.refused(tables, Article, [{"title": "a", "views": "many"}], r"Row 0 .*'many'.*views")
        self.refused(tables, Article, [{"title": "a", "views": [1]}], "Row 0")
        self.refused(tables, Article, [{"title": "a\0b"}], r"Row 0|row 0")
        self.refused(tables, Article, [{"title": 3}], "Row 0|row 0")
        self.refused(tables, Article, [{"title": sa.func.now()}], "Row 0 .*SQL expression")

    def test_source_of_rows_that_fails(self, tables: sa.Engine, encoder: Any) -> None:
        def rows() -> Iterator[dict[str, Any]]:
            yield from titles(3000)
            raise OSError("the file is gone")

        self.refused(tables, Article, rows(), "the file is gone", OSError)

    def test_interruption(self, tables: sa.Engine, encoder: Any) -> None:
        def rows() -> Iterator[dict[str, Any]]:
            yield from titles(5000)
            raise KeyboardInterrupt

        self.refused(tables, Article, rows(), "^$", KeyboardInterrupt)
        assert not [t for t in threading.enumerate() if t.name.startswith("sbert-pg-load")]

    def test_no_such_table(self, tables: sa.Engine, encoder: Any) -> None:
        other = sa.Table("other", sa.MetaData(), sa.Column("a", sa.Text))
        with tables.begin() as connection:
            with pytest.raises(LoadError, match=r"no table \"other\""):
                load(connection, other, [{"a": "b"}])
            connection.execute(sa.text("CREATE TABLE other (b text)"))
            with pytest.raises(LoadError, match="no column 'a'"):
                load(connection, other, [{"a": "b"}])
            with pytest.raises(DeclarationError, match="neither a table nor a mapped class"):
                load(connection, dict, [{"a": "b"}])

    def test_autocommit(self, tables: sa.Engine, encoder: Any) -> None:
        engine = tables.execution_options(isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            with pytest.raises(LoadError):
                load(connection, Article, [*titles(3000), {"title": "a", "views": "many"}])
            assert count(tables, Article) == 0
            load(connection, Article, titles(10))
        assert require_true_or_pending(tables, encoder, Article) == (10, 0)

    def test_another_encoder(self, tables: sa.Engine, encoder: Any) -> None:
        with tables.begin() as connection:
            load(connection, Article, titles(1))
        registry.use_encoder(RecordingEncoder(salt="another space"))
        engine = sa.create_engine(tables.url)
        with engine.begin() as connection, pytest.raises(EncoderMismatchError, match="article"):
            load(connection, Article, titles(1))
        engine.dispose()


def test_an_interrupt_within_a_copy_ends_its_connection(
    tables: sa.Engine, encoder: RecordingEncoder, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The server waits for rows; on that connection nothing could be rolled back."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(psycopg.Copy, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt), tables.begin() as connection:
        load(connection, Article, titles(10))
    assert [r.getMessage() for r in caplog.records if r.name.startswith("sqlalchemy.pool")] == []
    assert count(tables, Article) == 0


class TestProgress:
    def test_progress(self, tables: sa.Engine, encoder: Any) -> None:
        seen: list[int] = []
        with tables.begin() as connection:
            load(connection, Article, titles(5000), progress=seen.append)
        assert seen == [2048, 4096, 5000]

    def test_savepoint_of_the_caller(self, tables: sa.Engine, encoder: Any) -> None:
        with tables.begin() as connection:
            with connection.begin_nested() as savepoint:
                load(connection, Article, titles(10))
                savepoint.rollback()
            load(connection, Article, titles(3))
        assert require_true_or_pending(tables, encoder, Article) == (3, 0)


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


@pytest.mark.parametrize("copies", [True, False])
def test_types(engine: sa.Engine, encoder: RecordingEncoder, copies: bool) -> None:
    """Through COPY, and, where one type has no binary form here, through INSERT."""
    metadata = sa.MetaData()
    table = sa.Table(
        "typed",
        metadata,
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("title", sa.String(40)),
        sa.Column("colour", sa.Enum(Colour)),
        sa.Column("price", sa.Numeric(10, 2)),
        sa.Column("ratio", sa.Float),
        sa.Column("on", sa.Boolean),
        sa.Column("day", sa.Date),
        sa.Column("at", sa.DateTime(timezone=True)),
        sa.Column("for", sa.Interval),
        sa.Column("key", sa.Uuid),
        sa.Column("document", pg.JSONB),
        sa.Column("plain", sa.JSON),
        sa.Column("tags", pg.ARRAY(sa.Text)),
        sa.Column("raw", sa.LargeBinary),
        *([] if copies else [sa.Column("address", pg.INET)]),
        sa.Column("small", sa.SmallInteger),
        sa.Column("long", sa.Integer, sa.Computed("length(title)")),
        sa.Column("made", sa.DateTime, server_default=sa.func.now()),
        sa.Column("embedding", Embedding("deterministic", "title", dimensions=384)),
    )
    create(engine, metadata)
    value: dict[str, Any] = {
        "title": "a word",
        "colour": Colour.BLUE,
        "price": decimal.Decimal("12.50"),
        "ratio": 0.25,
        "on": True,
        "day": datetime.date(2024, 2, 29),
        "at": datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
        "for": datetime.timedelta(hours=3),
        "key": uuid.uuid4(),
        "document": {"a": [1, None]},
        "plain": ["x"],
        "tags": ["one", "two"],
        "raw": b"\0\1",
        "small": 7,
    }
    if not copies:
        value["address"] = "10.0.0.1"
    text = value | {
        "price": "12.5",
        "ratio": "0.25",
        "on": "yes",
        "day": "2024-02-29",
        "at": "2024-02-29T12:00:00+00:00",
        "key": str(value["key"]),
        "small": "7",
    }
    nothing = dict.fromkeys(value)
    with engine.begin() as connection:
        load(connection, table, [value, text, nothing])
        found = connection.execute(sa.select(table).order_by(table.c.id)).mappings().all()
    for name, expected in value.items():
        if name != "address":
            assert found[0][name] == found[1][name] == expected, name
        assert found[2][name] is None, name
    assert found[0]["long"] == 6
    assert found[0]["made"] is not None
    assert found[2]["embedding"] is None
    assert np.allclose(found[1]["embedding"], encoder._vector("a word"))


def test_defaults_that_only_insert_knows(engine: sa.Engine, encoder: RecordingEncoder) -> None:
    """A sequence, an SQL expression, a function of the row: the loader goes through INSERT."""

    class Own(DeclarativeBase):
        pass

    class Note(Own):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(sa.Sequence("note_seq", start=100), primary_key=True)
        title: Mapped[str] = mapped_column(unique=True)
        slug: Mapped[str] = mapped_column(
            default=lambda context: context.get_current_parameters()["title"].upper()
        )
        made: Mapped[datetime.datetime] = mapped_column(default=sa.func.now())
        extra: Mapped[Any] = mapped_column(pg.JSONB)
        embedding: Mapped[Array | None] = embedding()

    create(engine, Own.metadata)
    with engine.begin() as connection:
        load(connection, Note, ({"title": f"t{i}", "extra": {"i": i}} for i in range(2100)))
    assert require_true_or_pending(engine, encoder, Note) == (2100, 0)
    with Session(engine) as session:
        note = session.scalars(sa.select(Note).order_by(Note.id).limit(1)).one()
        assert (note.id, note.slug, note.extra) == (100, "T0", {"i": 0})
    with engine.begin() as connection:
        rows = [{"title": "x", "extra": 1}, {"title": "y", "extra": 1}, {"title": "t5", "extra": 1}]
        with pytest.raises(LoadError, match=r"Row 2 .*unique"):
            load(connection, Note, rows)
    assert require_true_or_pending(engine, encoder, Note) == (2100, 0)


def test_quoting_and_schemas(engine: sa.Engine, encoder: RecordingEncoder) -> None:
    class Own(DeclarativeBase):
        pass

    class Odd(Own):
        __tablename__ = 'Odd "Table" %s'
        key: Mapped[int] = mapped_column("the Key", primary_key=True)
        title: Mapped[str] = mapped_column('Title "%"')
        embedding: Mapped[Array | None] = embedding('Title "%"', name="Em bedding")
        __table_args__ = {"schema": "My Schema"}

    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("My Schema"))
    create(engine, Own.metadata)
    with engine.begin() as connection:
        load(connection, Odd, [{"title": "a"}, {"title": "b"}])
    assert count(engine, Odd) == 2
    assert pending(engine) == set()


def test_map_of_schemas(engine: sa.Engine, encoder: RecordingEncoder) -> None:
    """Tenants: one class, a schema for each."""
    metadata = sa.MetaData()
    table = sa.Table(
        "note",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("title", sa.Text),
        sa.Column("embedding", Embedding("deterministic", "title", dimensions=384)),
    )
    for tenant in ("one", "two"):
        mapped = engine.execution_options(schema_translate_map={None: tenant})
        with mapped.begin() as connection:
            connection.execute(sa.schema.CreateSchema(tenant))
            create_all(connection, metadata)
        with mapped.begin() as connection:
            load(connection, table, titles(2))
            assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 2
    assert pending(engine) == set()


@pytest.mark.slow
def test_memory_is_bounded(tables: sa.Engine, encoder: RecordingEncoder) -> None:
    """200,000 rows with vectors, 300 MB of them, through a generator."""
    vectors = np.random.default_rng(0).standard_normal((256, 384), dtype=np.float32)

    def rows(number: int) -> Iterator[dict[str, Any]]:
        # Copies, as a reader of a file makes them.
        return ({"title": f"t{i}", "embedding": vectors[i % 256].copy()} for i in range(number))

    def peak(number: int) -> int:
        tracemalloc.start()
        with tables.begin() as connection:
            load(connection, Article, rows(number))
            connection.rollback()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(20_000), peak(200_000)
    assert many < 60_000_000
    assert many < 1.3 * few


class TestBeforeTriggers:
    """A trigger of the application's may rewrite a text that was encoded already."""

    def trigger(self, engine: sa.Engine, table: str, events: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION trim_title() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN NEW.title := btrim(NEW.title); RETURN NEW; END $$"
            )
            connection.exec_driver_sql(
                f"CREATE TRIGGER trim_title BEFORE {events} ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION trim_title()"
            )

    def test_changed_rows_are_pending(self, tables: sa.Engine, encoder: RecordingEncoder) -> None:
        self.trigger(tables, "article", "INSERT OR UPDATE")
        rows = [{"id": 1, "title": " a "}, {"id": 2, "title": "b"}, {"id": 3, "title": None}]
        with tables.begin() as connection:
            assert load(connection, Article, rows) == 3
        assert pending(tables) == {("article.embedding", "1")}
        assert require_true_or_pending(tables, encoder, Article) == (1, 1)
        given = [
            {"id": i, "title": t, "embedding": encoder._vector(t)} for i, t in ((4, "x"), (5, " y"))
        ]
        with tables.begin() as connection:
            load(connection, Article, given)
        assert pending(tables) == {("article.embedding", "1"), ("article.embedding", "5")}
        assert require_true_or_pending(tables, encoder, Article) == (2, 2)

    def test_trigger_for_updates_alone(self, tables: sa.Engine, encoder: RecordingEncoder) -> None:
        self.trigger(tables, "article", "UPDATE")
        with tables.begin() as connection:
            load(connection, Article, titles(3))
        assert require_true_or_pending(tables, encoder, Article) == (3, 0)

    def test_vector_that_has_to_be_there(
        self, tables: sa.Engine, encoder: RecordingEncoder
    ) -> None:
        self.trigger(tables, "strict", "INSERT")
        with tables.begin() as connection:
            load(connection, Strict, [{"title": " a"}, {"title": "b"}, {"title": None}])
        assert require_true_or_pending(tables, encoder, Strict)[1] == 1


class TestCompanion:
    """What is written beside the vectors."""

    def test_is_the_loaders(self, tables: sa.Engine, encoder: Any) -> None:
        with tables.begin() as connection, pytest.raises(LoadError, match="by the loader itself"):
            load(connection, Article, [{"title": "a", "embedding_of": uuid.uuid4()}])

    def test_of_a_column_that_is_not_bound(self, engine: sa.Engine, encoder: Any) -> None:
        metadata = sa.MetaData()
        table = Article.__table__.to_metadata(metadata)  # type: ignore[attr-defined]
        with engine.begin() as connection:
            metadata.create_all(connection)
            load(connection, table, [{"title": "a"}])
            row = connection.execute(sa.select(table.c.embedding, table.c.embedding_of)).one()
        assert np.allclose(row.embedding, encoder._vector("a"))
        assert row.embedding_of == uuid.UUID(int=0), "its default"

    def test_defaults_of_the_server(self, engine: sa.Engine, encoder: RecordingEncoder) -> None:
        """A text that only the server knows is not taken for none."""

        class Own(DeclarativeBase):
            pass

        class Note(Own):
            __tablename__ = "note"
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str] = mapped_column(server_default="by the server")
            body: Mapped[str | None]
            embedding: Mapped[Array | None] = embedding(["title", "body"])

        create(engine, Own.metadata)
        with engine.begin() as connection:
            load(connection, Note, [{"body": "a"}, {"body": None}])
            load(connection, Note, [{"body": "a", "embedding": encoder._vector("a")}])
        assert encoder.batches == []
        assert require_true_or_pending(engine, encoder, Note) == (0, 3)


class Counting(RecordingEncoder):
    """Reads three words of a text, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self._spec = replace(self._spec, max_seq_length=3)
        self.statistics = SimpleNamespace(truncated=0)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        self.statistics.truncated += sum(length > 3 for length in self.count_tokens(texts))
        return super().encode_document(texts)


def test_a_result_travels_between_processes() -> None:
    there = pickle.loads(pickle.dumps(Loaded(3, {"embedding": 1})))
    assert (there, there.cut, type(there)) == (3, {"embedding": 1}, Loaded)


def test_texts_that_were_cut_are_counted(tables: sa.Engine, encoder: RecordingEncoder) -> None:
    registry.use_encoder(Counting())
    given = ["one", "a b c", "a b c d", "a b c d", "w x y z"] * 600
    rows = [{"title": title} for title in given]
    with tables.begin() as connection:
        done = load(connection, Article, rows)
        assert done == len(rows)
        assert done.cut == {"embedding": 3 * 600}, "equal texts count as often as they stand there"
        assert load(connection, Article, [{"title": "short"}]).cut == {"embedding": 0}
        vector = {"title": "a b c d e", "embedding": UNIT[0]}
        assert load(connection, Article, [vector]).cut == {}


def test_an_encoder_that_counts_no_tokens_says_nothing(tables: sa.Engine, encoder: Any) -> None:
    with tables.begin() as connection:
        assert load(connection, Article, titles(2)).cut == {}
