"""Searching a small shop on a real server: queries, filters, joins, distances, pages."""

from __future__ import annotations

import datetime
import enum
import re
import uuid
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    Session,
    aliased,
    joinedload,
    registry,
    selectinload,
    with_loader_criteria,
)

import sbert_pg
from sbert_pg import hnsw_index, nearest
from sbert_pg.errors import DeclarationError, EncoderMismatchError, EncodingError, NonFiniteError
from sbert_pg.testing import DeterministicEncoder
from tests.search.conftest import FORMS, Plan, Shop, fill, hnsw, make_shop, titles


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """A kind of index."""
    return str(request.param)


@pytest.fixture
def indexed(form: str, engine: sa.Engine, fake_encoder: DeterministicEncoder) -> Shop:
    """The shop with each kind of index, which small tables would not use unless they are told."""
    made = make_shop(*FORMS[form]())

    def use_indexes(connection: Any, _record: Any) -> None:
        connection.execute("SET enable_seqscan = off")
        connection.execute("SET enable_sort = on")
        connection.commit()

    sa.event.listen(engine, "connect", use_indexes)
    return made


def exact(
    encoder: DeterministicEncoder, text: str, keep: Any = lambda number: True
) -> list[tuple[float, int]]:
    """Similarity and key of every article with a text, nearest first, ties by key."""
    query = encoder.encode_query([text])[0]
    found = []
    for number, title in enumerate(titles(), 1):
        if title is not None and keep(number):
            similarity = float(encoder.encode_document([title])[0] @ query)
            found.append((similarity, number))
    return sorted(found, key=lambda pair: (-round(pair[0], 5), pair[1]))


def keys(expected: list[tuple[float, int]]) -> list[int]:
    return [number for _, number in expected]


def test_the_statement_of_the_readme(shop: Shop, session: Session) -> None:
    statement = (
        sa.select(shop.Article)
        .where(shop.Article.lang == "en")
        .order_by(shop.Article.embedding.distance("refund returns"))
        .limit(3)
    )
    found = session.scalars(statement).all()
    assert [article.title for article in found] == ["refund returns"] * 3
    assert all(article.lang == "en" for article in found)


def test_distance_and_similarity_as_columns(
    shop: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    embedding = shop.Article.embedding
    statement = sa.select(
        shop.Article.id,
        embedding.similarity("gift now"),
        embedding.distance("gift now"),
        embedding.cosine_distance("gift now"),
        embedding.l2_distance("gift now"),
        embedding.max_inner_product("gift now"),
        embedding.l1_distance("gift now"),
    ).where(embedding.is_not(None))
    query = fake_encoder.encode_query(["gift now"])[0]
    rows = session.execute(statement).all()
    assert len(rows) == 39
    for key, similarity, distance, cosine, l2, inner, l1 in rows:
        vector = fake_encoder.encode_document([titles()[key - 1]])[0]  # type: ignore[list-item]
        assert similarity == pytest.approx(vector @ query, abs=1e-6)
        assert distance == cosine == pytest.approx(1 - vector @ query, abs=1e-6)
        assert l2 == pytest.approx(np.linalg.norm(vector - query), abs=1e-5)
        assert inner == pytest.approx(-(vector @ query), abs=1e-6)
        assert l1 == pytest.approx(np.abs(vector - query).sum(), abs=1e-4)


def test_text_vector_and_expression_find_the_same(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    text = "opening hours"
    expected = exact(fake_encoder, text)[:5]
    vector = fake_encoder.encode_query([text])[0]
    key = titles().index(text) + 1
    other = aliased(indexed.Article)
    expression = sa.select(other.embedding).where(other.id == key)
    for query in (text, vector, vector.tolist(), expression):
        rows = session.execute(nearest(indexed.Article.embedding, query, limit=5)).all()
        assert [article.id for article, _ in rows] == keys(expected)
        assert [similarity for _, similarity in rows] == pytest.approx(
            [similarity for similarity, _ in expected], abs=1e-5
        )


def test_more_like_this_leaves_itself_out(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    article = session.get_one(indexed.Article, titles().index("refund returns") + 1)
    expected = exact(fake_encoder, "refund returns", lambda number: number != article.id)
    for limit in (6, 1001):  # by the index, and more than it serves
        rows = session.execute(nearest(indexed.Article.embedding, article, limit=limit)).all()
        assert [found.id for found, _ in rows] == keys(expected)[:limit]
        assert rows[0].similarity == pytest.approx(1)


def test_vectors_of_zeros_that_came_by_other_ways_are_not_found(
    shop: Shop, session: Session
) -> None:
    zeros = sa.text("UPDATE article SET embedding = array_fill(0, ARRAY[384]) WHERE id = 3")
    session.execute(sa.text("SET LOCAL session_replication_role = replica"))
    session.execute(zeros)
    search = nearest(shop.Article.embedding, "gift", limit=1001)
    everything = nearest(shop.Article.embedding, "gift", limit=None)
    for statement in (search, search.join(shop.Article.author), everything):
        found = [article.id for article in session.scalars(statement)]
        assert len(found) == 38  # of 40, one has no text
        assert 3 not in found


def test_more_like_a_row_without_a_vector_finds_nothing(shop: Shop, session: Session) -> None:
    article = session.get_one(shop.Article, 40)
    assert session.execute(nearest(shop.Article.embedding, article)).all() == []
    with pytest.raises(DeclarationError, match="not in the database yet"):
        nearest(shop.Article.embedding, shop.Article(title="new"))


def test_columns_of_half_precision(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> None:
    half = make_shop(hnsw(), storage="halfvec")
    fill(engine, half)
    with Session(engine) as session:
        session.execute(sa.text("SET enable_seqscan = off"))
        found = session.scalars(nearest(half.Article.embedding, "gift returns", limit=9)).all()
    assert [article.id for article in found] == keys(exact(fake_encoder, "gift returns"))[:9]


@pytest.mark.parametrize("added", ["where=", "where()"])
def test_filters_reach_the_index(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder, added: str
) -> None:
    """Also behind a quantised index the first stage is filtered, so that the page is full."""
    criterion = indexed.Article.lang == "de"
    if added == "where=":
        statement = nearest(indexed.Article.embedding, "gift returns", where=criterion, limit=9)
    else:
        statement = nearest(indexed.Article.embedding, "gift returns", limit=9).where(criterion)
    found = [article.id for article in session.scalars(statement)]
    assert found == keys(exact(fake_encoder, "gift returns", lambda number: number % 3 == 0))[:9]


@pytest.mark.parametrize(
    "criteria", [(), (sa.true(),), (sa.and_(True),)], ids=["none", "true", "and"]
)
def test_criteria_that_turn_nothing_away(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder, criteria: Any
) -> None:
    statement = nearest(indexed.Article.embedding, "refund returns", limit=5).where(*criteria)
    expected = keys(exact(fake_encoder, "refund returns"))[:5]
    assert [row.Article.id for row in session.execute(statement)] == expected
    assert session.execute(statement.filter_by().filter()).first().Article.id == expected[0]


def test_joins_and_columns_added_by_the_caller(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    statement = (
        nearest(indexed.Article.embedding, "privacy gift", limit=4)
        .join(indexed.Article.author)
        .where(indexed.Author.name == "author 2")
        .add_columns(indexed.Author.name)
    )
    rows = session.execute(statement).all()
    expected = exact(fake_encoder, "privacy gift", lambda number: number % 4 == 2)
    assert [row[0].id for row in rows] == keys(expected)[:4]
    assert {row.name for row in rows} == {"author 2"}


@pytest.mark.parametrize("exact", [False, True])
def test_joins_to_many_give_each_pair_once(indexed: Shop, session: Session, exact: bool) -> None:
    statement = (
        nearest(indexed.Article.embedding, "shipping gift", limit=200, exact=exact)
        .join(indexed.Article.tags)
        .add_columns(indexed.Tag.id)
    )
    rows = session.execute(statement).all()
    with_vector = session.execute(
        sa.select(sa.func.count())
        .select_from(indexed.Tag)
        .join(indexed.Tag.article)
        .where(indexed.Article.embedding.is_not(None))
    ).scalar_one()
    assert len(rows) == len({row[2] for row in rows}) == with_vector


@pytest.mark.parametrize("options", [{}, {"exact": True}])
@pytest.mark.parametrize("by", ["relationship", "criterion", "subquery", "lateral"])
def test_pages_of_pairs_follow_each_other(
    indexed: Shop, session: Session, options: dict[str, Any], by: str
) -> None:
    """However the server joins: where partners have no order, each page has another one."""
    article, tag = indexed.Article, indexed.Tag
    statement, key = nearest(article.embedding, "shipping gift", limit=5, **options), tag.id
    if by == "criterion":
        statement = statement.where(tag.article_id == article.id)
    elif by == "relationship":
        statement = statement.join(article.tags)
    elif by == "lateral":
        # Its ON names neither of the two that are joined.
        part = sa.select(tag.id).where(tag.article_id == article.id).lateral()
        statement, key = statement.join(part, sa.true()), part.c.id
    else:
        # In it the author's key is that of a table, and there as often as they have tags.
        theirs = sa.select(indexed.Author.id, tag.id.label("tag_id"), tag.article_id)
        theirs = theirs.select_from(indexed.Author)
        part = theirs.join(tag, sa.true()).where(indexed.Author.id == 1).subquery()
        statement, key = statement.join(part, part.c.article_id == article.id), part.c.tag_id
    statement = statement.add_columns(key)
    wanted = [row[2] for row in session.execute(statement.limit(200))]
    found = []
    for offset in range(0, len(wanted), 5):
        for way in ("hashjoin", "nestloop", "mergejoin"):
            off = offset % 3 == ("hashjoin", "nestloop", "mergejoin").index(way)
            session.execute(sa.text(f"SET LOCAL enable_{way} = {'off' if off else 'on'}"))
        # The rows move within the table, as they do in any that is written to.
        session.execute(sa.update(tag).where(tag.id == 1 + offset % 7).values(name=f"{offset}"))
        found += [row[2] for row in session.execute(statement.offset(offset))]
    assert found == wanted
    assert len(set(found)) == len(wanted)


def test_loader_options(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    expected = keys(exact(fake_encoder, "careers hours"))[:7]
    for option in (joinedload(indexed.Article.tags), selectinload(indexed.Article.tags)):
        session.expunge_all()
        found = session.scalars(
            nearest(indexed.Article.embedding, "careers hours", limit=7).options(option)
        )
        articles = found.unique().all()
        assert [article.id for article in articles] == expected
        assert all("tags" not in sa.inspect(article).unloaded for article in articles)
        assert [len(article.tags) for article in articles] == [
            (key - 1 + 1) % 3 for key in expected
        ]


def test_criteria_of_the_session_reach_the_index(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    """Tenants and soft deletion are often kept apart by options that a listener adds."""
    statement = nearest(indexed.Article.embedding, "careers hours", limit=5).options(
        with_loader_criteria(indexed.Article, indexed.Article.lang == "de")
    )
    found = [article.id for article in session.scalars(statement)]
    assert found == keys(exact(fake_encoder, "careers hours", lambda key: key % 3 == 0))[:5]


def test_largest_distance_and_least_similarity(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    expected = [pair for pair in exact(fake_encoder, "refund gift") if pair[0] >= 0.4]
    assert 3 < len(expected) < 39
    for options in ({"min_similarity": 0.4}, {"max_distance": 0.6}):
        found = session.scalars(
            nearest(indexed.Article.embedding, "refund gift", limit=39, **options)  # type: ignore[arg-type]
        )
        assert [article.id for article in found] == keys(expected)
    nothing = nearest(indexed.Article.embedding, "unrelated words", min_similarity=0.9)
    assert session.execute(nothing).all() == []


@pytest.mark.parametrize("filtered", [False, True])
def test_pages_follow_each_other(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder, filtered: bool
) -> None:
    """Five articles have equal texts; they are neither repeated nor missed."""
    query = "refund returns"
    expected = keys(exact(fake_encoder, query, lambda key: not filtered or key % 3 != 0))
    for limit in (1, 3, 7, 50):
        statement = nearest(indexed.Article.embedding, query, limit=limit)
        if filtered:
            statement = statement.where(indexed.Article.lang == "en")
        found: list[int] = []
        for offset in range(0, 45, limit):
            page = statement if offset == 0 else statement.offset(offset)
            found += [article.id for article in session.scalars(page)]
        assert sorted(found) == sorted(expected)
        assert found[:3] == expected[:3]


def test_limits_and_offsets_can_be_changed_later(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    expected = keys(exact(fake_encoder, "gift now"))
    statement = nearest(indexed.Article.embedding, "gift now")
    assert [a.id for a in session.scalars(statement.limit(4))] == expected[:4]
    assert [a.id for a in session.scalars(statement.limit(4).offset(4))] == expected[4:8]
    assert len(session.scalars(statement.limit(None)).all()) == 39


def test_in_subqueries_and_aliases(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    expected = keys(exact(fake_encoder, "gift now"))[:6]
    inner = nearest(indexed.Article.embedding, "gift now", limit=6).subquery()
    rows = session.execute(sa.select(inner.c.id).order_by(inner.c.similarity.desc(), inner.c.id))
    assert list(rows.scalars()) == expected
    cte = nearest(indexed.Article.embedding, "gift now", limit=6).cte()
    assert session.scalar(sa.select(sa.func.count()).select_from(cte)) == 6
    alias = aliased(indexed.Article)
    found = session.scalars(nearest(alias.embedding, "gift now", limit=6).where(alias.id > 0))
    assert [article.id for article in found] == expected
    both = sa.union_all(
        sa.select(nearest(indexed.Article.embedding, "gift now", limit=3).subquery().c.id),
        sa.select(nearest(indexed.Article.embedding, "refund now", limit=3).subquery().c.id),
    )
    assert len(session.execute(both).all()) == 6


def test_the_nearest_of_each_row(
    indexed: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    """A query that is another row's column, by LATERAL."""
    other = aliased(indexed.Article)
    near = (
        nearest(indexed.Article.embedding, other.embedding, limit=3, max_distance=0.9)
        .where(indexed.Article.lang == "en")
        .lateral("near")
    )
    statement = sa.select(other.id, near.c.id).join(near, sa.true()).where(other.id < 5)
    found: dict[int, list[int]] = {}
    for key, nearby in session.execute(statement):
        found.setdefault(key, []).append(nearby)
    assert found == {
        key: keys(exact(fake_encoder, str(titles()[key - 1]), lambda n: n % 3 != 0))[:3]
        for key in range(1, 5)
    }


def test_core_without_the_orm(
    indexed: Shop, engine: sa.Engine, fake_encoder: DeterministicEncoder
) -> None:
    table = indexed.Article.__table__
    with engine.connect() as connection:
        rows = connection.execute(nearest(table.c.embedding, "gift now", limit=5)).mappings().all()
    assert [row["id"] for row in rows] == keys(exact(fake_encoder, "gift now"))[:5]
    assert set(rows[0]) == {"id", "title", "lang", "author_id", "similarity"}


def test_the_stored_vector_is_left_where_it_is(
    shop: Shop, session: Session, statements: list[str]
) -> None:
    article = session.scalars(nearest(shop.Article.embedding, "gift now", limit=1)).one()
    assert "vector_send(article.embedding)" not in statements[-1]
    assert article.embedding.shape == (384,)
    assert "vector_send" in statements[-1]


@pytest.mark.parametrize("form", ["hnsw", "halfvec", "binary", "ivfflat"])
def test_the_index_is_used(
    form: str, engine: sa.Engine, plan: Plan, fake_encoder: DeterministicEncoder
) -> None:
    shop = make_shop(*FORMS[form]())
    fill(engine, shop)
    article = shop.Article
    with Session(engine) as session:
        session.execute(sa.text("SET LOCAL enable_seqscan = off"))
        statements = [
            nearest(article.embedding, "gift"),
            nearest(article.embedding, "gift", offset=10),
            nearest(article.embedding, "gift", max_distance=0.5),
            nearest(article.embedding, "gift").where(article.lang == "de"),
            nearest(article.embedding, session.get_one(article, 1)),
        ]
        if form != "binary":
            statements.append(sa.select(article).order_by(article.embedding.distance("x")).limit(3))
        for statement in statements:
            assert "Index Scan using article_embedding" in plan(session, statement)
        exactly = plan(session, nearest(article.embedding, "gift", exact=True))
        assert "article_embedding" not in exactly


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_each_metric_ranks_as_numpy_does(
    similarity: Any, engine: sa.Engine, fake_encoder: DeterministicEncoder
) -> None:
    shop = make_shop(hnsw(), similarity=similarity)
    fill(engine, shop)
    query = fake_encoder.encode_query(["refund gift"])[0]
    texts = [title for title in titles() if title is not None]
    vectors = fake_encoder.encode_document(texts)
    expected = sbert_pg.distance.similarity_matrix(query[None], vectors, similarity)[0]
    with Session(engine) as session:
        rows = session.execute(nearest(shop.Article.embedding, "refund gift", limit=39)).all()
        assert [row.similarity for row in rows] == pytest.approx(
            np.sort(expected)[::-1].tolist(), abs=1e-4
        )
        for article, found in rows:
            assert found == pytest.approx(expected[article.id - 1], abs=1e-4)
        column = shop.Article.embedding.similarity("refund gift")
        assert session.scalar(sa.select(column).where(shop.Article.id == 1)) == pytest.approx(
            expected[0], abs=1e-4
        )
    index = next(iter(shop.Article.__table__.indexes))
    suffix = {"cosine": "cosine", "dot": "ip", "euclidean": "l2", "manhattan": "l1"}[similarity]
    assert f"vector_{suffix}_ops" in str(
        sa.schema.CreateIndex(index).compile(dialect=engine.dialect)
    )


def test_a_text_is_encoded_once_in_an_execution_and_then_remembered(
    shop: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    fake_encoder.encoded.clear()
    embedding = shop.Article.embedding
    statement = (
        sa.select(shop.Article, embedding.similarity("gift now"))
        .where(embedding.distance("gift now") < 0.9)
        .order_by(embedding.distance("gift now"))
    )
    session.execute(statement).all()
    assert fake_encoder.encoded == ["gift now"]
    session.execute(nearest(embedding, "gift now")).all()
    session.execute(nearest(embedding, "other words", offset=3, max_distance=0.9)).all()
    assert fake_encoder.encoded == ["gift now", "other words"]


def test_a_statement_takes_its_query_when_it_is_executed(
    shop: Shop, session: Session, fake_encoder: DeterministicEncoder
) -> None:
    statement = nearest(shop.Article.embedding, sa.bindparam("q"), limit=3)
    for text in ("gift now", "refund returns"):
        found = session.scalars(statement, {"q": text})
        assert [article.id for article in found] == keys(exact(fake_encoder, text))[:3]


def test_what_cannot_be_encoded_leaves_the_transaction_usable(shop: Shop, session: Session) -> None:
    sbert_pg.use_encoder(DeterministicEncoder(refuse="forbidden"))
    with pytest.raises(EncodingError, match="forbidden"):
        session.execute(nearest(shop.Article.embedding, "forbidden"))
    with pytest.raises(NonFiniteError):
        nearest(shop.Article.embedding, [float("nan")] * 384)
    assert session.execute(nearest(shop.Article.embedding, "gift", limit=2)).all()


@pytest.mark.parametrize("by", ["nearest", "distance", "similarity", "table"])
def test_another_encoder_is_refused_before_any_answer(
    shop: Shop, engine: sa.Engine, by: str, statements: list[str]
) -> None:
    """A process whose encoder of that name has other weights; nothing but the width agrees."""
    sbert_pg.registry.forget_encoders()
    sbert_pg.use_encoder(DeterministicEncoder(salt="another model"))
    other = sa.create_engine(engine.url)
    embedding = shop.Article.embedding
    statement: Any = {
        "nearest": nearest(embedding, "gift"),
        "distance": sa.select(shop.Article).order_by(embedding.distance("gift")),
        "similarity": sa.select(embedding.similarity([0.1] * 384)),
        "table": nearest(shop.Article.__table__.c.embedding, "gift"),
    }[by]
    statements.clear()
    with Session(other) as session:
        for _ in range(2):
            with pytest.raises(EncoderMismatchError, match="deterministic"):
                session.execute(statement)
    assert statements == []
    other.dispose()


async def _nearest(url: sa.URL, shop: Shop) -> list[int]:
    engine = create_async_engine(url)
    async with AsyncSession(engine) as session:
        rows = await session.scalars(nearest(shop.Article.embedding, "gift now", limit=5))
        found = [article.id for article in rows]
    await engine.dispose()
    return found


def test_asynchronously(
    shop: Shop, database_url: sa.URL, fake_encoder: DeterministicEncoder
) -> None:
    import asyncio

    found = asyncio.run(_nearest(database_url, shop))
    assert found == keys(exact(fake_encoder, "gift now"))[:5]


def test_criteria_as_text_name_columns_alone(
    engine: sa.Engine, fake_encoder: DeterministicEncoder
) -> None:
    """As the command line passes them on; no name of the search's own is in their way."""
    table = sa.Table(
        "candidates",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("place", sa.Text),
        sa.Column("distance", sa.Integer),
        sa.Column("number", sa.Integer),
        sa.Column("vec", sbert_pg.Vector(3)),
        hnsw_index("candidates_vec", "vec"),
    )
    with engine.begin() as connection:
        table.create(connection)
        rows = [
            {"id": n, "place": "here", "distance": n, "number": n, "vec": [1, n, 0]}
            for n in range(9)
        ]
        connection.execute(sa.insert(table), rows)
        text = sa.text("place = 'here' AND distance > 3 AND number > 4 AND id > 5")
        for offset in (0, 1):
            found = connection.execute(nearest(table.c.vec, [1, 0, 0], where=text, offset=offset))
            assert [row.id for row in found] == [6, 7, 8][offset:]


def test_composite_keys(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> None:
    table = sa.Table(
        "part",
        sa.MetaData(),
        sa.Column("a", sa.Integer, primary_key=True),
        sa.Column("b", sa.Text, primary_key=True),
        sa.Column("vec", sbert_pg.Vector(3)),
        hnsw_index("part_vec", "vec", form="binary"),
    )
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(
            sa.insert(table),
            [{"a": n % 3, "b": str(n), "vec": [1, n, -n]} for n in range(30)],
        )
        found: list[Any] = []
        for offset in (0, 10, 20):
            found += connection.execute(nearest(table.c.vec, [1, 0, 0], offset=offset)).all()
    assert sorted((row.a, int(row.b)) for row in found) == sorted((n % 3, n) for n in range(30))
    assert found[0].similarity == pytest.approx(1)


class Size(enum.Enum):
    """A key of few values."""

    small = 1
    large = 2


KEYS: dict[str, tuple[Any, Any]] = {
    "enumeration": (sa.Enum(Size, name="size"), lambda n: list(Size)[n % 2]),
    "date": (sa.Date(), lambda n: datetime.date(2020, 1, 1 + n % 2)),
    "array": (sa.ARRAY(sa.Integer, as_tuple=True), lambda n: (n, n)),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_any_type(engine: sa.Engine, kind: str) -> None:
    """A value of a key is sent as one, and the rows like a row leave that row out alone."""
    type_, value = KEYS[kind]
    further = [] if kind == "array" else [sa.Column("b", sa.Integer, primary_key=True)]
    columns = [
        sa.Column("a", type_, primary_key=True),
        *further,
        sa.Column("v", sbert_pg.Vector(2)),
    ]
    table = sa.Table("keyed", sa.MetaData(), *columns, hnsw_index("keyed_v", "v"))

    class Keyed:
        """A row."""

    registry().map_imperatively(Keyed, table)
    rows: list[dict[str, Any]] = [{"a": value(n), "b": n, "v": [1, n]} for n in range(12)]
    with engine.begin() as connection:
        table.create(connection)
        for row in rows:
            connection.execute(sa.insert(table).values({c.name: row[c.name] for c in columns}))
    first = table.c.a == value(0) if kind == "array" else table.c.b == 0
    with Session(engine) as session:
        session.execute(sa.text("SET LOCAL enable_seqscan = off"))
        row = session.scalars(sa.select(Keyed).where(first)).one()
        for statement in (nearest(Keyed.v, row), nearest(Keyed.v, row, limit=5, offset=5)):  # type: ignore[attr-defined]
            for narrowed in (statement, statement.where(table.c.a != value(3))):
                found = session.scalars(narrowed).all()
                assert row not in found
                kept = [one for one in rows[1:] if narrowed is statement or one["a"] != value(3)]
                first_one, last_one = narrowed.search.offset, narrowed.search.offset + 5
                assert len(found) == min(narrowed.search.limit, len(kept) - first_one)
                assert [one.v[1] for one in found][:5] == [
                    one["b"] for one in kept[first_one:last_one]
                ]


@pytest.mark.parametrize("seqscan", ["on", "off"])
def test_a_page_goes_on_behind_rows_that_are_not_proven(
    shop: Shop, session: Session, seqscan: str
) -> None:
    """Vectors that came where no trigger ran: most without a proof, some with one of another."""
    article = shop.Article
    session.execute(sa.text("SET LOCAL session_replication_role = replica"))
    session.execute(
        sa.text(
            "INSERT INTO article (id, title, lang, embedding, embedding_of) "
            "SELECT 1000 + n, title, 'en', embedding, "
            "CASE WHEN n % 10 = 0 THEN gen_random_uuid() "
            "WHEN n % 2 = 1 THEN CAST(:nil AS uuid) END "
            "FROM article, generate_series(1, 300) AS n WHERE id = 1"
        ),
        {"nil": str(uuid.UUID(int=0))},
    )
    session.commit()
    session.execute(sa.text(f"SET enable_seqscan = {seqscan}"))
    for options in ({}, {"exact": True}):
        plain = nearest(article.embedding, "refund returns", **options)  # type: ignore[arg-type]
        for statement, rows in ((plain, 39), (plain.where(article.lang == "en"), 26)):
            found = [
                article.id
                for offset in range(0, 40, 10)
                for article in session.scalars(statement.offset(offset))
            ]
            assert len(found) == len(set(found)) == rows
            assert max(found) <= 40
        many = nearest(article.embedding, ["refund returns", "gift"], **options)  # type: ignore[arg-type]
        assert [row.query for row in session.execute(many)] == [0] * 10 + [1] * 10


def test_few_rows_are_asked_for_their_proof_where_a_join_lets_many_pass(
    shop: Shop, session: Session, plan: Plan
) -> None:
    article = shop.Article
    session.execute(sa.text("SET LOCAL session_replication_role = replica"))
    session.execute(
        sa.text(
            "INSERT INTO article (id, title, lang, author_id, embedding, embedding_of) "
            "SELECT 1000 + n, title, 'en', 1, embedding, embedding_of "
            "FROM article, generate_series(1, 2000) AS n WHERE id = 1"
        )
    )
    session.execute(sa.text("ANALYZE article"))
    asked = sa.text("SELECT calls FROM pg_stat_xact_user_functions WHERE funcname = 'proven_v1'")
    for options in ({}, {"offset": 10}, {"exact": True}):
        session.commit()
        session.execute(sa.text("SET LOCAL track_functions = 'all'"))
        statement = nearest(article.embedding, "privacy gift", **options)  # type: ignore[arg-type]
        statement = statement.join(article.author).where(shop.Author.name == "author 1")
        keys = [found.id for found in session.scalars(statement)]
        assert len(set(keys)) == 10
        assert session.scalar(asked) < 1500
        # The planner chooses by costs, and compiles by them, so none may be many times too large.
        (cost,) = re.findall(r"^Limit  \(cost=[\d.]+\.\.([\d.]+)", plan(session, statement))
        assert float(cost) < 40_000


def test_nothing_is_near_to_no_vector(shop: Shop, engine: sa.Engine) -> None:
    """A vector that only the server knows, and that is none: by each way the same."""
    article = shop.Article
    with Session(engine) as session:
        none = sa.select(article.embedding).where(article.title.is_(None)).scalar_subquery()
        assert session.scalar(sa.select(none)) is None
        for options in ({}, {"exact": True}, {"limit": None}, {"offset": 5}):
            statement = nearest(article.embedding, none, **options)
            assert session.execute(statement).all() == []
            assert session.execute(statement.where(article.id < 30)).all() == []


def test_searches_in_one_union(indexed: Shop, session: Session) -> None:
    article = indexed.Article
    first = nearest(article.embedding, "gift now", limit=2)
    second = nearest(article.embedding, "refund returns", limit=3).where(article.lang == "de")
    wanted = [*session.scalars(first), *session.scalars(second)]
    assert len(wanted) == 5
    both = sa.select(article).from_statement(sa.union_all(first, second))
    assert [row.id for row in session.scalars(both)] == [row.id for row in wanted]
    once = sa.union(first.with_only_columns(article.id), second.with_only_columns(article.id))
    assert set(session.scalars(once)) == {row.id for row in wanted}


def test_an_index_that_is_declared_on_a_view(
    shop: Shop, engine: sa.Engine, session: Session
) -> None:
    session.execute(sa.text("CREATE VIEW shown AS SELECT * FROM article"))
    view = shop.Article.__table__.to_metadata(sa.MetaData(), name="shown")
    search = nearest(view.c.embedding, "gift now", limit=3)
    with pytest.raises(DeclarationError, match="a view"):
        session.execute(search.where(view.c.lang == "en")).all()
    session.rollback()
