"""Semantic search in a FastAPI application, synchronous or not: the statements are the same.

pip install 'sbert-pg[convert]' fastapi uvicorn asyncpg greenlet
export DATABASE_URL=postgresql+asyncpg://localhost/shop
sbert-pg migrate -d "$DATABASE_URL"
uvicorn fastapi_search:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import create_all, embed_on_flush, embedding_column, hnsw_index, nearest


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "article"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str]
    embedding = embedding_column("all-MiniLM-L6-v2", source=["title", "body"], nullable=True)

    __table_args__ = (hnsw_index("article_embedding", "embedding"),)


engine = create_async_engine(os.environ["DATABASE_URL"])
sessions = async_sessionmaker(engine, expire_on_commit=False)
embed_on_flush(sessions)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # A real application does this in an Alembic migration, which autogenerate writes.
    async with engine.begin() as connection:
        await connection.run_sync(create_all, Base.metadata)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def session() -> AsyncIterator[AsyncSession]:
    async with sessions() as made:
        yield made


Db = Annotated[AsyncSession, Depends(session)]


class ArticleIn(BaseModel):
    title: str
    body: str


@app.post("/articles", status_code=201)
async def create(article: ArticleIn, db: Db) -> int:
    row = Article(title=article.title, body=article.body)
    db.add(row)
    await db.commit()  # encoded in the flush, written with the row
    return row.id


@app.get("/search")
async def search(q: str, db: Db, limit: int = 10) -> list[dict[str, str | float]]:
    found = await db.execute(nearest(Article.embedding, q, limit=limit))
    return [{"title": article.title, "similarity": similarity} for article, similarity in found]
