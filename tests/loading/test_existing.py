"""Rows loaded again: what becomes of those whose key is in the table already."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import create_all, embedding_column, hnsw_index, load
from sbert_pg.errors import DeclarationError, LoadError
from sbert_pg.indexes import build_index
from sbert_pg.testing import DeterministicEncoder


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "load note"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    extra: Mapped[str] = mapped_column(server_default="none")
    more: Mapped[Any] = mapped_column(sa.JSON, nullable=True)
    embedding = embedding_column("deterministic", source="body", dimensions=384)


class Json(sa.types.TypeDecorator[Any]):
    impl = sa.JSON
    cache_ok = True


class Other(Base):
    """Keys of columns that are not their names, a default, and JSON behind a type of one's own."""

    __tablename__ = "load 5%'s"
    id: Mapped[int] = mapped_column("Id%", key="id_", primary_key=True)
    body: Mapped[str | None] = mapped_column("Bo dy", key="text_")
    state: Mapped[str] = mapped_column(default="new")
    more: Mapped[Any] = mapped_column(Json, nullable=True)
    embedding = embedding_column("deterministic", source="Bo dy", dimensions=384, nullable=True)


@pytest.fixture
def notes(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> sa.Engine:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
        load(connection, Note, rows(range(4), "old"))
    return engine


def rows(numbers: Any, text: str) -> list[dict[str, Any]]:
    return [{"id": n, "body": f"{text} {n}"} for n in numbers]


def stored(engine: sa.Engine) -> list[Any]:
    """Rows with where they stand, which tells one that was written again."""
    table = Note.__table__
    where = sa.literal_column("CAST(ctid AS text)")
    with engine.connect() as connection:
        return list(
            connection.execute(
                sa.select(where, table.c.id, table.c.body, table.c.extra).order_by(table.c.id)
            )
        )


def pending(engine: sa.Engine) -> int:
    from sbert_pg.freshness import status

    with engine.connect() as connection:
        return sum(column.pending + column.backfill for column in status(connection))


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("existing", ["keep", "replace"])
def test_rows_that_are_there(notes: sa.Engine, existing: Any, driver: str) -> None:
    engine = sa.create_engine(notes.url.set(drivername=f"postgresql+{driver}"))
    before = stored(notes)
    with engine.begin() as connection:
        load(connection, Note, rows(range(2, 6), "new"), existing=existing)
    engine.dispose()
    texts = [row.body for row in stored(notes)]
    new = "new" if existing == "replace" else "old"
    assert texts == ["old 0", "old 1", f"{new} 2", f"{new} 3", "new 4", "new 5"]
    assert stored(notes)[:2] == before[:2]
    assert pending(notes) == 0


def test_the_same_rows_again_are_not_written(notes: sa.Engine) -> None:
    """Whatever was loaded before a failure is loaded again with the rest, to no effect."""
    before = stored(notes)
    for existing in ("keep", "replace"):
        with notes.begin() as connection:
            load(connection, Note, rows(range(4), "old"), existing=existing)  # type: ignore[arg-type]
    assert stored(notes) == before


def test_only_rows_that_are_there_cost_a_temporary_table(notes: sa.Engine) -> None:
    statements: list[str] = []
    with notes.begin() as connection:
        sa.event.listen(
            connection, "before_cursor_execute", lambda *given: statements.append(given[2])
        )
        load(connection, Note, rows(range(100, 3100), "new"), existing="keep")
        assert not any("TEMPORARY" in statement for statement in statements)
        # Two blocks, of which the second ends with a row that is there.
        given = rows(range(4000, 7000), "new") + rows([3], "new")
        load(connection, Note, given, existing="replace")
        assert sum("TEMPORARY" in statement for statement in statements) == 1
    texts = [row.body for row in stored(notes)]
    assert len(texts) == 4 + 3000 + 3000
    assert texts[3] == "new 3"
    assert pending(notes) == 0


def test_with_vectors(notes: sa.Engine) -> None:
    vectors = np.eye(384, dtype=np.float32)
    given = ({"id": n, "body": f"row {n}", "embedding": vectors[n]} for n in range(384))
    with notes.begin() as connection:
        assert load(connection, Note, given, existing="replace") == 384
        tables = connection.scalar(
            sa.text("SELECT count(*) FROM pg_class WHERE relname LIKE 'sbert_load_%'")
        )
        read = connection.execute(
            sa.select(Note.__table__.c.embedding).order_by(Note.__table__.c.id)
        ).scalars()
        np.testing.assert_array_equal(np.stack(list(read)), vectors)
    assert tables == 0
    assert pending(notes) == 0


def test_columns_that_cannot_be_compared_are_written(notes: sa.Engine) -> None:
    with notes.begin() as connection:
        given = [{"id": 1, "body": "old 1", "more": {"a": 1}}]
        assert load(connection, Note, given, existing="replace") == 1
        more = connection.scalar(sa.select(Note.more).where(Note.id == 1))
    assert more == {"a": 1}


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("existing", ["keep", "replace"])
def test_what_rows_lack_stays(notes: sa.Engine, existing: Any, driver: str) -> None:
    engine = sa.create_engine(notes.url.set(drivername=f"postgresql+{driver}"))
    columns = sa.select(Other.body, Other.state, Other.more, sa.cast(Other.embedding, sa.Text))
    with engine.begin() as connection:
        load(connection, Other, [{"id": 1, "body": "one", "state": "read"}], existing=existing)
        (before,) = connection.execute(columns)
        again = [{"id": 1, "more": [1]}] if existing == "replace" else [{"id": 1, "body": "two"}]
        load(connection, Other, again, existing=existing)
        (after,) = connection.execute(columns)
        load(connection, Other, [{"id": 1, "body": "three", "more": [2]}], existing=existing)
        (last,) = connection.execute(columns)
    engine.dispose()
    if existing == "replace":
        assert last[:3] == ("three", "read", [2])
        assert last[3] != before[3]
    assert before[3] is not None
    assert after == ("one", "read", [1] if existing == "replace" else None, before[3])
    assert pending(notes) == 0


def test_many_rows_beside_an_index_say_how_to_be_fast(
    notes: sa.Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sbert_pg.loading.loader.MANY", 40)
    monkeypatch.setattr("sbert_pg.loading.loader.BLOCK_ROWS", 20)
    monkeypatch.setattr("sbert_pg.loading.loader.READ_ROWS", 10)
    with notes.begin() as connection:
        load(connection, Note, rows(range(100, 200), "without an index"))
    assert not caplog.records
    build_index(
        notes, hnsw_index("note hnsw", Note.__table__.to_metadata(sa.MetaData()).c.embedding)
    )
    with notes.begin() as connection:
        load(connection, Note, rows(range(200, 230), "few"))
        assert not caplog.records
        load(connection, Note, rows(range(300, 400), "many"))
    (record,) = caplog.records
    assert "40 rows are put into note hnsw of load note" in record.getMessage()
    assert "indexes_aside" in record.getMessage()


def test_what_cannot_be(notes: sa.Engine) -> None:
    with notes.begin() as connection:
        with pytest.raises(DeclarationError, match="'replce'; it is 'refuse', 'keep' or 'replace'"):
            load(connection, Note, [], existing="replce")  # type: ignore[arg-type]
        with pytest.raises(LoadError, match="Row 0 is 'None', and a mapping"):
            load(connection, Note, [None, *rows([8], "after")])  # type: ignore[list-item]
        with pytest.raises(DeclarationError, match="id is not among"):
            load(connection, Note, [{"body": "no key"}], existing="keep")
        with pytest.raises(LoadError, match="second time"):
            load(connection, Note, rows([7, 7], "twice"), existing="replace")
        with pytest.raises(LoadError, match="duplicate key"):
            load(connection, Note, rows([1], "there"))
        assert load(connection, Note, rows([7], "once"), existing="replace") == 1
