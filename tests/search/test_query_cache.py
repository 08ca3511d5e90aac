"""Vectors of recent queries, and encoding beside an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import sbert_pg
from sbert_pg import EncoderSpec, nearest
from sbert_pg.registry import RECENT, query_vector
from sbert_pg.testing import DeterministicEncoder
from tests.search.conftest import Shop

SPEC = EncoderSpec.of("deterministic", dimensions=384)


def test_the_most_recent_are_kept(fake_encoder: DeterministicEncoder) -> None:
    for number in range(RECENT):
        query_vector(SPEC, f"query {number}")
    query_vector(SPEC, "query 0")
    query_vector(SPEC, "one more")
    fake_encoder.encoded.clear()
    query_vector(SPEC, "query 0")
    assert fake_encoder.encoded == []
    query_vector(SPEC, "query 1")
    assert fake_encoder.encoded == ["query 1"]


def test_a_kept_vector_cannot_be_changed(fake_encoder: DeterministicEncoder) -> None:
    with pytest.raises(ValueError, match="read-only"):
        query_vector(SPEC, "text")[0] = 1


def test_each_encoder_has_its_own(fake_encoder: DeterministicEncoder) -> None:
    first = query_vector(SPEC, "text")
    sbert_pg.use_encoder(DeterministicEncoder(salt="other"))
    assert (query_vector(SPEC, "text") != first).any()


def test_from_many_threads(fake_encoder: DeterministicEncoder) -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        for n in range(200):
            text = f"query {(number + n) % 50}"
            if (query_vector(SPEC, text) != fake_encoder.encode_query([text])[0]).any():
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Waiting(DeterministicEncoder):
    """Comes to its end when it is let go, and notes the thread that it is called in."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []
        self.go = threading.Event()

    def encode_query(self, texts: Sequence[str]) -> Any:
        self.threads.append(threading.get_ident())
        assert self.go.wait(60), "the loop stood still meanwhile"
        return super().encode_query(texts)


def test_an_event_loop_goes_on_meanwhile(shop: Shop, database_url: sa.URL) -> None:
    encoder = Waiting()
    sbert_pg.use_encoder(encoder)

    async def run() -> None:
        engine = create_async_engine(database_url)

        async def tick() -> None:
            while not encoder.threads:
                await asyncio.sleep(0.01)
            encoder.go.set()

        async with AsyncSession(engine) as session:
            await session.execute(sa.text("SELECT 1"))
            ticking = asyncio.create_task(tick())
            rows = (await session.execute(nearest(shop.Article.embedding, "gift now"))).all()
            await ticking
        await engine.dispose()
        assert len(rows) == 10

    asyncio.run(run())
    assert threading.get_ident() not in encoder.threads
