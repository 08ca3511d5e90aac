"""Texts of many requests in one batch, each request with its own fate."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sbert_pg.errors import EncoderError, EncodingError
from sbert_pg.serving import batching
from sbert_pg.serving.batching import BATCH, Batcher
from sbert_pg.serving.http import RefusedError
from sbert_pg.testing import DeterministicEncoder


class Held:
    """An encoder that waits until it is let go, and notes its batches."""

    def __init__(self, refuse=None):
        self.encoder = DeterministicEncoder(dimensions=8, refuse=refuse)
        self.batches = []
        self.go = threading.Event()
        self.entered = threading.Event()

    def __call__(self, texts):
        self.batches.append(list(texts))
        self.entered.set()
        assert self.go.wait(60)
        return self.encoder.encode_document(texts)


def run(scenario, encode):
    async def main():
        with ThreadPoolExecutor(1) as executor:
            try:
                await scenario(Batcher(encode, executor))
            finally:
                getattr(encode, "go", threading.Event()).set()

    asyncio.run(main())


async def begun(held):
    """Until the encoder has its first batch."""
    while not held.entered.is_set():
        await asyncio.sleep(0.001)


def test_what_arrives_meanwhile_is_one_batch():
    held = Held()

    async def scenario(batcher):
        first = asyncio.create_task(batcher.encode(["first"]))
        await begun(held)
        others = [asyncio.create_task(batcher.encode([f"text {i}"])) for i in range(30)]
        await asyncio.sleep(0)
        held.go.set()
        vectors = await asyncio.gather(first, *others)
        expected = held.encoder.encode_document([f"text {i}" for i in range(30)])
        np.testing.assert_array_equal(np.concatenate(vectors[1:]), expected)

    run(scenario, held)
    assert [len(batch) for batch in held.batches] == [1, 30]


def test_one_requests_fault_is_not_anothers():
    held = Held(refuse="bad")

    async def scenario(batcher):
        first = asyncio.create_task(batcher.encode(["first"]))
        await begun(held)
        asked = [["good"], ["good", "bad"], ["also good"] * 20, ["bad"]]
        others = [asyncio.create_task(batcher.encode(texts)) for texts in asked]
        await asyncio.sleep(0)
        held.go.set()
        await first
        good, mixed, many, bad = await asyncio.gather(*others, return_exceptions=True)
        assert good.shape == (1, 8)
        assert many.shape == (20, 8)
        assert isinstance(mixed, EncodingError)
        assert mixed.index == 1
        assert isinstance(bad, EncodingError)

    run(scenario, held)


def test_a_text_far_into_a_request_is_named_by_its_place():
    encoder = DeterministicEncoder(dimensions=8, refuse="bad")

    async def scenario(batcher):
        with pytest.raises(EncodingError) as raised:
            await batcher.encode([*["good"] * 150, "bad"])
        assert raised.value.index == 150
        assert batcher.waiting == 0

    run(scenario, encoder.encode_document)


def test_cancelled_texts_are_not_encoded():
    held = Held()

    async def scenario(batcher):
        first = asyncio.create_task(batcher.encode(["first"]))
        await begun(held)
        gone = [asyncio.create_task(batcher.encode(["gone"] * 100)) for _ in range(5)]
        stays = asyncio.create_task(batcher.encode(["stays"]))
        await asyncio.sleep(0)
        for one in gone:
            one.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 1
        held.go.set()
        await asyncio.gather(first, stays)

    run(scenario, held)
    assert held.batches == [["first"], ["stays"]]


def test_small_requests_do_not_wait_for_a_large_one():
    held = Held()

    async def scenario(batcher):
        large = asyncio.create_task(batcher.encode([f"large {i}" for i in range(1_000)]))
        await begun(held)
        small = asyncio.create_task(batcher.encode(["small"]))
        await asyncio.sleep(0)
        held.go.set()
        await small
        assert not large.done()
        assert len(await large) == 1_000

    run(scenario, held)
    assert "small" in held.batches[1]
    assert max(map(len, held.batches)) <= BATCH


def test_the_queue_is_bounded(monkeypatch):
    monkeypatch.setattr(batching, "MOST_WAITING", 10)
    held = Held()

    async def scenario(batcher):
        first = asyncio.create_task(batcher.encode(["first"]))
        await begun(held)
        waits = asyncio.create_task(batcher.encode(["waits"] * 8))
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="Too many texts wait"):
            await batcher.encode(["more"] * 3)
        held.go.set()
        await asyncio.gather(first, waits)
        assert len(await batcher.encode(["later"] * 10)) == 10

    run(scenario, held)


def test_vectors_that_are_none_are_an_error():
    async def scenario(batcher):
        with pytest.raises(EncoderError, match="shape"):
            await batcher.encode(["a", "b"])

    run(scenario, lambda texts: np.zeros((1, 8), np.float32))


def test_a_lone_request_does_not_wait(monkeypatch):
    monkeypatch.setattr(batching, "WINDOW", 3600)

    async def scenario(batcher):
        for _ in range(3):
            assert len(await batcher.encode(["alone"])) == 1

    run(scenario, DeterministicEncoder(dimensions=8).encode_document)
