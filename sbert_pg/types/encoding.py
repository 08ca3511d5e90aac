"""Encoding inside a statement: beside the event loop, and queries once, however often they come."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar
from weakref import WeakKeyDictionary

from sbert_pg.process import ProcessLock
from sbert_pg.registry import find_encoder, get_encoder
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors, vectors_of

T = TypeVar("T")

#: Queries kept for each encoder; at 384 dimensions they take about 2 MB.
SIZE = 1024

_lock = ProcessLock()
_recent: WeakKeyDictionary[TextEncoder, OrderedDict[str, Vectors]] = WeakKeyDictionary()


def query_vector(spec: EncoderSpec, text: str) -> Vectors:
    """The vector of one query, float32 of shape ``(dimensions,)``; see ``query_vectors``."""
    return query_vectors(spec, [text])[0]


def _encoded(spec: EncoderSpec, encoder: TextEncoder, texts: list[str]) -> dict[str, Vectors]:
    vectors: dict[str, Vectors] = {}
    output = off_loop(lambda: encoder.encode_query(texts))
    for text, vector in zip(texts, vectors_of(spec, output, len(texts)), strict=True):
        # A copy each, so that one that is kept does not keep its whole batch.
        vectors[text] = vector.copy()
        vectors[text].setflags(write=False)
    return vectors


def query_vectors(spec: EncoderSpec, texts: Sequence[str]) -> list[Vectors]:
    """The vectors of queries, read-only float32, from the cache or encoded now in one batch."""
    encoder = find_encoder(spec) or off_loop(lambda: get_encoder(spec))
    vectors: dict[str, Vectors] = {}
    with _lock:
        recent = _recent.setdefault(encoder, OrderedDict())
        for text in texts:
            vector = recent.get(text)
            if vector is not None:
                vectors[text] = vector
                recent.move_to_end(text)
    missing = [text for text in dict.fromkeys(texts) if text not in vectors]
    if missing:
        # Outside the lock: two threads may encode the same text, and neither waits for the other.
        vectors |= _encoded(spec, encoder, missing)
        with _lock:
            recent.update((text, vectors[text]) for text in missing)
            while len(recent) > SIZE:
                recent.popitem(last=False)
    return [vectors[text] for text in texts]


def off_loop(work: Callable[[], T]) -> T:
    """Call ``work`` here; from a statement of an ``AsyncSession``, in a thread, beside its loop."""
    if not _in_coroutine():
        return work()
    from sqlalchemy.util import await_only

    result: T = await_only(asyncio.to_thread(work))
    return result


def wait_for(future: Future[T]) -> T:
    """The result of a future, without stopping an event loop meanwhile."""
    if not _in_coroutine():
        return future.result()
    from sqlalchemy.util import await_only

    result: T = await_only(asyncio.wrap_future(future))
    return result


def _in_coroutine() -> bool:
    # Without greenlet nothing asynchronous of SQLAlchemy's can be under way.
    if "greenlet" not in sys.modules:
        return False
    from sqlalchemy.util.concurrency import in_greenlet

    return in_greenlet()
