"""Semantic search in a Litestar application, by a repository of advanced-alchemy.

pip install 'sbert-pg[convert]' litestar advanced-alchemy uvicorn greenlet
export DATABASE_URL=postgresql+psycopg://localhost/shop
sbert-pg migrate -d "$DATABASE_URL"
litestar --app litestar_search:app run
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from advanced_alchemy.extensions.litestar import base, repository
from litestar import Litestar, get, post
from litestar.di import Provide
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Mapped

from sbert_pg import create_all, embed_on_flush, embedding_column
from sbert_pg.adapters.advanced_alchemy import SbertRepository


class Article(base.BigIntBase):
    __tablename__ = "article"

    title: Mapped[str]
    embedding = embedding_column("all-MiniLM-L6-v2", source="title", nullable=True)


class Articles(SbertRepository, repository.SQLAlchemyAsyncRepository[Article]):
    model_type = Article


engine = create_async_engine(os.environ["DATABASE_URL"])
sessions = async_sessionmaker(engine, expire_on_commit=False)
embed_on_flush(sessions)


async def provide_articles() -> AsyncIterator[Articles]:
    async with sessions.begin() as session:
        yield Articles(session=session)


@dataclass
class ArticleIn:
    title: str


@post("/articles")
async def create(data: ArticleIn, articles: Articles) -> int:
    return (await articles.add(Article(title=data.title))).id


@get("/search")
async def search(q: str, articles: Articles) -> list[dict[str, Any]]:
    rows = await articles.nearest(q, limit=5)
    return [{"title": article.title, "similarity": similarity} for article, similarity in rows]


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    # A real application does this in an Alembic migration, which autogenerate writes.
    async with engine.begin() as connection:
        await connection.run_sync(create_all, Article.metadata)
    yield
    await engine.dispose()


app = Litestar(
    [create, search],
    dependencies={"articles": Provide(provide_articles)},
    lifespan=[lifespan],
    signature_types=[AsyncSession],
)
