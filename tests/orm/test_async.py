"""``AsyncSession``: the same, and the event loop goes on while texts are encoded."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session
from write_models import Article, Page, RecordingEncoder, pending, require_true_or_pending

from sbert_pg import embed_on_flush, load, nearest
from sbert_pg.errors import EncodingError
from sbert_pg.orm import leave_to_workers


class Waiting(RecordingEncoder):
    """Comes to its end when it is let go, and notes the thread that it was called in."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []
        self.go = threading.Event()

    def encode_document(self, texts: Any) -> Any:
        self.threads.append(threading.get_ident())
        assert self.go.wait(60), "the loop stood still meanwhile"
        return super().encode_document(texts)


@pytest.fixture
async def async_engine(tables: sa.Engine) -> AsyncIterator[AsyncEngine]:
    made = create_async_engine(tables.url)
    yield made
    await made.dispose()


@pytest.fixture
def async_sessions(async_engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    made = async_sessionmaker(async_engine, expire_on_commit=False)
    embed_on_flush(made)
    embed_on_flush(made)  # the second time changes nothing
    return made


async def test_flush(async_sessions: Any, tables: sa.Engine, encoder: RecordingEncoder) -> None:
    async with async_sessions() as session:
        page = Page(title="a", body="b")
        session.add_all([page, Article(title="c")])
        await session.commit()
        assert len(encoder.batches) == 1
        page.body = "changed"
        await session.commit()
        await session.refresh(page)
        page.title = None
        await session.commit()
        async with session.begin_nested() as savepoint:
            session.add(Article(title="lost"))
            await session.flush()
            await savepoint.rollback()
        await session.execute(sa.insert(Article), [{"title": "d"}, {"title": "e"}])
        await session.execute(sa.update(Page), [{"id": page.id, "title": "again"}])
        await session.commit()
        found = (await session.execute(nearest(Article.embedding, "d", limit=1))).one()
        assert found[0].title == "d"
    assert require_true_or_pending(tables, encoder, Article, Page) == (5, 0)


async def test_errors(async_sessions: Any, tables: sa.Engine, encoder: Any) -> None:
    async with async_sessions() as session:
        session.add(Article(title="before"))
        await session.flush()
        bad = Article(title="refuse me")
        session.add(bad)
        with pytest.raises(EncodingError, match="a new Article"):
            await session.commit()
        bad.title = "accept me"
        await session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (2, 0)


async def test_the_loop_goes_on(async_engine: AsyncEngine, tables: sa.Engine) -> None:
    from sbert_pg import registry

    encoder = Waiting()
    registry.use_encoder(encoder)

    async def tick() -> None:
        while not encoder.threads:
            await asyncio.sleep(0.01)
        encoder.go.set()

    async with AsyncSession(async_engine) as session:
        embed_on_flush(session)
        session.add(Article(title="a"))
        ticking = asyncio.create_task(tick())
        await session.commit()
        await ticking
    assert threading.get_ident() not in encoder.threads


async def test_many_sessions_at_once(async_sessions: Any, tables: sa.Engine, encoder: Any) -> None:
    async def write(number: int) -> None:
        async with async_sessions() as session:
            session.add_all([Article(title=f"{number} {i}") for i in range(3)])
            await session.commit()

    await asyncio.gather(*(write(number) for number in range(8)))
    assert require_true_or_pending(tables, encoder, Article) == (24, 0)


async def test_factories_stay_apart(async_engine: AsyncEngine, tables: sa.Engine) -> None:
    """One factory embeds; another one of the same class does not."""
    embedding = async_sessionmaker(async_engine)
    plain = async_sessionmaker(async_engine)
    scoped = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
    embed_on_flush(embedding)
    embed_on_flush(scoped)
    for number, factory in enumerate([embedding, plain, scoped]):
        async with factory() as session:
            session.add(Article(id=number, title=f"t{number}"))
            await session.commit()
    await scoped.remove()
    assert pending(tables) == {("article.embedding", "1")}


@pytest.mark.parametrize("first", [embed_on_flush, leave_to_workers])
async def test_a_factory_changes_nothing_for_its_class(
    async_engine: AsyncEngine, tables: sa.Engine, encoder: RecordingEncoder, first: Any
) -> None:
    """Whatever was said of the class before, other sessions of it stay so."""

    class Own(Session):
        pass

    factory = async_sessionmaker(async_engine, sync_session_class=Own)
    first(Own)
    (embed_on_flush if first is leave_to_workers else leave_to_workers)(factory)
    async with factory() as session:
        session.add(Article(id=1, title="factory"))
        await session.commit()
    async with AsyncSession(async_engine, sync_session_class=Own) as session:
        session.add(Article(id=2, title="class"))
        await session.commit()
    assert encoder.encoded == ["class" if first is embed_on_flush else "factory"]


async def test_cancelled_while_encoding(async_engine: AsyncEngine, tables: sa.Engine) -> None:
    """A request that is cancelled leaves nothing, and its connection is good for the next."""
    from sbert_pg import registry

    encoder = Waiting()
    registry.use_encoder(encoder)
    async with AsyncSession(async_engine) as session:
        embed_on_flush(session)
        session.add(Article(title="a"))
        commit = asyncio.create_task(session.commit())
        while not encoder.threads:
            await asyncio.sleep(0.01)
        commit.cancel()
        encoder.go.set()
        with pytest.raises(asyncio.CancelledError):
            await commit
    async with AsyncSession(async_engine) as session:
        assert await session.scalar(sa.select(sa.func.count()).select_from(Article)) == 0


async def test_load(async_sessions: Any, tables: sa.Engine, encoder: Any) -> None:
    rows = ({"title": f"t{i}"} for i in range(5000))
    async with async_sessions() as session:
        assert await session.run_sync(load, Article, rows) == 5000
        await session.commit()
    assert require_true_or_pending(tables, encoder, Article) == (5000, 0)


def test_nothing_needs_greenlet_before_something_is_asynchronous() -> None:
    """SQLAlchemy 2.1 does not bring it."""
    code = (
        "import sys; sys.modules['greenlet'] = None\n"
        "import sbert_pg, sbert_pg.cli.app\n"
        "from sqlalchemy.orm import Session, scoped_session, sessionmaker\n"
        "for name in sbert_pg.__all__: getattr(sbert_pg, name)\n"
        "sbert_pg.cli.app.build_app()\n"
        "for target in (Session(), sessionmaker(), scoped_session(sessionmaker())):\n"
        "    sbert_pg.embed_on_flush(target)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
