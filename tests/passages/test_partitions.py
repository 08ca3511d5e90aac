"""Passages of documents whose table is partitioned: cut, found and kept as those of any other."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from passage_documents import CHUNKER, require_whole, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, hnsw_index, nearest, passages_of
from sbert_pg.freshness import backfill
from sbert_pg.testing import DeterministicEncoder


class Base(DeclarativeBase):
    """Base of these tests."""


class Document(Base):
    """A document of a tenant."""

    __tablename__ = "letter"
    __table_args__ = {"postgresql_partition_by": "LIST (tenant)"}
    tenant: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    title: Mapped[str | None]
    body: Mapped[str | None]
    passages = passages_of(
        "deterministic", source="body", heading="title", dimensions=32, chunker=CHUNKER,
        table_args=[hnsw_index("letter_passage_hnsw", "embedding")],
    )  # fmt: skip


@pytest.fixture
def letters(engine: sa.Engine, encoder: DeterministicEncoder) -> sa.Engine:
    """Twelve documents of three tenants, each tenant with a partition; the third is attached."""
    with engine.begin() as connection:
        # Partitions are the application's to make: before the rows, and at any time after.
        Base.metadata.create_all(connection)
        for tenant in (1, 2):
            connection.exec_driver_sql(
                f"CREATE TABLE letter_{tenant} PARTITION OF letter FOR VALUES IN ({tenant})"
            )
        create_all(connection, Base.metadata)
        connection.exec_driver_sql("CREATE TABLE letter_3 (LIKE letter)")
        for number in range(12):
            tenant = number % 3 + 1
            table = "letter_3" if tenant == 3 else "letter"
            connection.execute(
                sa.text(
                    f"INSERT INTO {table} (tenant, id, title, body)"
                    " VALUES (:tenant, :id, :title, :body)"
                ),
                {
                    "tenant": tenant, "id": number, "title": f"Title {number}",
                    "body": " ".join(text(number, 8)),
                },
            )  # fmt: skip
        connection.exec_driver_sql("ALTER TABLE letter ATTACH PARTITION letter_3 FOR VALUES IN (3)")
    return engine


def work(engine: sa.Engine) -> None:
    backfill(engine, Document.__table__.c.passages_embedding)


def test_each_partition_is_cut_whichever_way_it_came(letters, encoder):
    work(letters)
    with Session(letters) as session:
        assert {d.tenant for d in session.scalars(sa.select(Document)) if d.passages} == {1, 2, 3}
    require_whole(letters, encoder, Document)


def test_a_document_that_moves_to_another_partition_keeps_its_passages(letters, encoder):
    work(letters)
    encoder.encoded.clear()
    with letters.begin() as connection:
        connection.exec_driver_sql("UPDATE letter SET tenant = 2 WHERE id = 0")
    work(letters)
    assert encoder.encoded == [], "they were moved, not made again"
    require_whole(letters, encoder, Document)
    with Session(letters) as session:
        assert len(session.get(Document, (2, 0)).passages) == 2


def test_the_search_of_a_tenant_finds_its_passages_only(letters):
    work(letters)
    with Session(letters) as session:
        question = text(4, 8)[3]
        rows = session.execute(nearest(Document.passages, question, limit=3)).all()
        assert (rows[0].Document.id, rows[0].similarity > 0.5) == (4, True)
        other = nearest(Document.passages, question, limit=10).where(Document.tenant == 3)
        assert {row.Document.id for row in session.execute(other)} == {2, 5, 8, 11}


def test_a_partition_that_is_dropped_takes_its_passages_along(letters, encoder):
    work(letters)
    with letters.begin() as connection:
        connection.exec_driver_sql("DELETE FROM letter WHERE tenant = 1")
        connection.exec_driver_sql("ALTER TABLE letter DETACH PARTITION letter_1")
        connection.exec_driver_sql("DROP TABLE letter_1")
        left = connection.exec_driver_sql(
            "SELECT count(*) FROM letter_passage WHERE letter_tenant = 1"
        )
        assert left.scalar() == 0
    work(letters)
    require_whole(letters, encoder, Document)
