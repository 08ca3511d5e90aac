"""``hnsw_index`` and ``ivfflat_index``: what they render, what they refuse, what the server has."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import Embedding, HalfVector, Vector, embedding_column, hnsw_index, ivfflat_index
from sbert_pg.errors import DeclarationError
from sbert_pg.types.indexed import description_of


def table(*indexes: sa.Index, type_: Any = None, name: str = "thing") -> sa.Table:
    return sa.Table(
        name,
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("lang", sa.Text),
        sa.Column("vec", Vector(8) if type_ is None else type_),
        *indexes,
    )


def ddl(index: sa.Index) -> str:
    from sqlalchemy.dialects.postgresql import psycopg

    return " ".join(str(sa.schema.CreateIndex(index).compile(dialect=psycopg.dialect())).split())


HNSW_DEFAULTS = "WITH (m = 16, ef_construction = 256)"
BITS = "(CAST(binary_quantize(vec) AS BIT(8)) bit_hamming_ops)"
#: How an index is made, on which type, and what follows ``CREATE INDEX i ON thing USING``.
CASES: list[tuple[Any, Any, str]] = [
    (lambda: hnsw_index("i", "vec"), None, f"hnsw (vec vector_cosine_ops) {HNSW_DEFAULTS}"),
    (
        lambda: hnsw_index("i", "vec", m=24, ef_construction=200, similarity="dot"),
        HalfVector(8),
        "hnsw (vec halfvec_ip_ops) WITH (m = 24, ef_construction = 200)",
    ),
    (
        lambda: hnsw_index("i", "vec", form="halfvec", similarity="manhattan"),
        None,
        f"hnsw (CAST(vec AS HALFVEC(8)) halfvec_l1_ops) {HNSW_DEFAULTS}",
    ),
    (lambda: hnsw_index("i", "vec", form="binary"), None, f"hnsw {BITS} {HNSW_DEFAULTS}"),
    (
        lambda: ivfflat_index("i", "vec", lists=4, similarity="euclidean"),
        None,
        "ivfflat (vec vector_l2_ops) WITH (lists = 4)",
    ),
    (
        lambda: ivfflat_index("i", "vec", lists=4, form="binary"),
        None,
        f"ivfflat {BITS} WITH (lists = 4)",
    ),
    (
        lambda: hnsw_index("i", "vec", where=sa.text("lang = 'de'")),
        None,
        f"hnsw (vec vector_cosine_ops) {HNSW_DEFAULTS} WHERE lang = 'de'",
    ),
    (
        lambda: hnsw_index("i", "vec"),
        Embedding("m", "lang", dimensions=8, similarity="dot"),
        f"hnsw (vec vector_ip_ops) {HNSW_DEFAULTS}",
    ),
]


@pytest.mark.parametrize(("make", "type_", "expected"), CASES)
def test_ddl(make: Any, type_: Any, expected: str) -> None:
    index = make()
    assert type(index) is sa.Index
    table(index, type_=type_)
    assert ddl(index) == f"CREATE INDEX i ON thing USING {expected}"


@pytest.mark.parametrize(("make", "type_", "expected"), CASES)
def test_the_server_takes_each(
    make: Any, type_: Any, expected: str, bare_database_url: sa.URL
) -> None:
    made = table(make(), type_=type_)
    engine = sa.create_engine(bare_database_url)
    with engine.begin() as connection:
        made.create(connection)
        defined = connection.scalar(sa.text("SELECT pg_get_indexdef('i'::regclass)"))
    engine.dispose()
    assert f"USING {expected.split()[0]}" in defined
    opclass = next(word for word in expected.replace(")", " ").split() if word.endswith("_ops"))
    # The server leaves out an operator class that is the default of its type.
    assert opclass in defined or opclass in ("vector_l2_ops", "bit_hamming_ops")


def test_by_name_column_and_mapped_column() -> None:
    class Base(DeclarativeBase):
        pass

    made = embedding_column("m", source="text", dimensions=8)

    class Article(Base):
        __tablename__ = "article"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        embedding = made
        __table_args__ = (hnsw_index("by_mapped", made), hnsw_index("by_name", "embedding"))

    by_column = hnsw_index("by_column", Article.__table__.c.embedding, form="halfvec")
    rendered = {str(index.name): ddl(index) for index in Article.__table__.indexes}
    assert set(rendered) == {"by_mapped", "by_name", "by_column"}
    assert "(embedding vector_cosine_ops)" in rendered["by_mapped"]
    assert "(embedding vector_cosine_ops)" in rendered["by_name"]
    assert "HALFVEC(8)) halfvec_cosine_ops" in rendered["by_column"]
    assert by_column.table is Article.__table__


def test_names_by_convention_and_names_that_need_quoting() -> None:
    metadata = sa.MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_name)s"})
    thing = sa.Table(
        "Order",
        metadata,
        sa.Column("my vec", Vector(8)),
        hnsw_index(None, "my vec"),
        schema="my shop",
    )
    rendered = ddl(next(iter(thing.indexes)))
    assert rendered.startswith('CREATE INDEX "ix_Order_my vec" ON "my shop"."Order" USING hnsw ')
    assert '("my vec" vector_cosine_ops)' in rendered


def test_copies_are_understood() -> None:
    """As Alembic and ``to_metadata`` make them, and indexes written by hand."""
    for form in ("column", "halfvec", "binary"):
        made = table(hnsw_index("i", "vec", form=form, similarity="euclidean"))  # type: ignore[arg-type]
        copy = made.to_metadata(sa.MetaData())
        index = next(iter(copy.indexes))
        description = description_of(index)
        assert description is not None
        assert (description.form, description.column) == (form, "vec")
        assert ddl(index) == ddl(next(iter(made.indexes)))
    by_hand = sa.Index("i", "vec", postgresql_using="hnsw", postgresql_ops={"vec": "vector_ip_ops"})
    table(by_hand)
    description = description_of(by_hand)
    assert description is not None
    assert description.metric.similarity == "dot"
    other = sa.Index("j", "lang")
    table(other)
    assert description_of(other) is None


@pytest.mark.parametrize(
    ("make", "type_", "says"),
    [
        (lambda: hnsw_index("i", "vec", m=1), None, "m is 1"),
        (lambda: hnsw_index("i", "vec", m=101), None, "m is 101"),
        (lambda: hnsw_index("i", "vec", m=16, ef_construction=31), None, "takes 32"),
        (lambda: hnsw_index("i", "vec", ef_construction=1001), None, "to 1000"),
        (lambda: ivfflat_index("i", "vec", lists=0), None, "lists is 0"),
        (lambda: hnsw_index("i", "vec", form="bits"), None, "form is 'bits'"),
        (lambda: hnsw_index("i", "lang"), None, "needs a vector column"),
        (lambda: hnsw_index("i", "vec"), Vector(), "known width"),
        (lambda: hnsw_index("i", "vec"), Vector(2001), "too many"),
        (lambda: hnsw_index("i", "vec", form="halfvec"), Vector(4001), "too many"),
        (lambda: hnsw_index("i", "vec", similarity="angle"), None, "angle"),
        (lambda: ivfflat_index("i", "vec", lists=1, similarity="manhattan"), None, "hnsw_index"),
    ],
)
def test_what_makes_no_sense(make: Any, type_: Any, says: str) -> None:
    with pytest.raises(DeclarationError, match=says):
        table(make(), type_=type_)
