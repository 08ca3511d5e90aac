"""Index settings are the search's own: nobody else's connection has them afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sbert_pg import nearest
from tests.search.conftest import Shop

NAMES = ("hnsw.ef_search", "hnsw.iterative_scan", "hnsw.max_scan_tuples")
USUAL = ("40", "off", "20000")


@pytest.fixture
def pooled(database_url: sa.URL) -> Iterator[sa.Engine]:
    """One connection, which each user gets after the other."""
    engine = sa.create_engine(database_url, pool_size=1, max_overflow=0)
    yield engine
    engine.dispose()


def shown(connection: Any) -> tuple[str, ...]:
    return tuple(connection.scalar(sa.select(sa.func.current_setting(name))) for name in NAMES)


def searched(shop: Shop) -> Any:
    return nearest(shop.Article.embedding, "gift now", limit=3, ef_search=77)


@pytest.mark.parametrize("ends", ["commit", "rollback", "close"])
def test_after_a_transaction(shop: Shop, pooled: sa.Engine, ends: str) -> None:
    with Session(pooled) as session:
        assert session.execute(searched(shop)).all()
        assert shown(session) == USUAL
        getattr(session, ends)()
    with pooled.connect() as connection:
        assert shown(connection) == USUAL


def test_under_autocommit(shop: Shop, pooled: sa.Engine) -> None:
    with pooled.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert connection.execute(searched(shop)).all()
        assert shown(connection) == USUAL


def test_after_an_error(shop: Shop, pooled: sa.Engine) -> None:
    with Session(pooled) as session, pytest.raises(sa.exc.DBAPIError):
        session.execute(searched(shop).where(sa.text("1 / (article.id - 1) > 0")))
    with pooled.connect() as connection:
        assert shown(connection) == USUAL


def test_after_a_savepoint(shop: Shop, pooled: sa.Engine) -> None:
    with Session(pooled) as session:
        session.execute(sa.text("SELECT '[1]'::vector"))
        nested = session.begin_nested()
        session.execute(searched(shop)).all()
        nested.rollback()
        assert shown(session) == USUAL


def test_what_the_user_has_set_comes_back(shop: Shop, pooled: sa.Engine) -> None:
    with pooled.connect() as connection:
        connection.execute(sa.text("SELECT '[1]'::vector"))
        connection.execute(sa.text("SET hnsw.ef_search = 400"))
        connection.commit()
        connection.execute(searched(shop)).all()
        connection.commit()
        assert shown(connection)[0] == "400"


def test_in_a_transaction_that_only_reads(shop: Shop, pooled: sa.Engine) -> None:
    with pooled.connect().execution_options(postgresql_readonly=True) as connection:
        assert connection.execute(searched(shop)).all()


def test_of_an_asynchronous_session(shop: Shop, database_url: sa.URL) -> None:
    async def run() -> None:
        engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
        async with AsyncSession(engine) as session:
            assert (await session.execute(searched(shop))).all()
            assert await session.run_sync(shown) == USUAL
        async with engine.connect() as connection:
            assert await connection.run_sync(shown) == USUAL
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            assert (await connection.execute(searched(shop))).all()
            assert await connection.run_sync(shown) == USUAL
        await engine.dispose()

    asyncio.run(run())


def test_exact_search_sets_nothing(shop: Shop, pooled: sa.Engine) -> None:
    with Session(pooled) as session:
        session.execute(sa.text("SELECT '[1]'::vector"))
        session.execute(nearest(shop.Article.embedding, "gift now", exact=True)).all()
        assert shown(session) == USUAL


def test_settings_are_made_before_the_scan_begins(shop: Shop, pooled: sa.Engine) -> None:
    """With one candidate and no iteration a search finds one row; with the settings, all."""
    with Session(pooled) as session:
        session.execute(sa.text("SET LOCAL enable_seqscan = off"))
        session.execute(sa.text("SET LOCAL hnsw.ef_search = 1"))
        article = shop.Article
        plain = sa.select(article.id).order_by(article.embedding.distance("gift now")).limit(20)
        assert len(session.execute(plain).all()) == 1
        assert len(session.execute(nearest(article.embedding, "gift now", limit=20)).all()) == 20
