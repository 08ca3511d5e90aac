"""One batch for the texts of many requests.

An encoder is several times faster on a batch than on its texts one by one. A request that comes
alone is encoded at once. While others come too, what arrives within two milliseconds is joined, and
so is everything that arrives while a batch is being encoded. Large requests are served in turns
with small ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sbert_pg.errors import EncoderError, EncodingError
from sbert_pg.serving.http import busy
from sbert_pg.spec import Vectors

#: Seconds that a batch waits for more, where there is company.
WINDOW = 0.002
#: Texts of a batch, and those that one request has of it before others have theirs.
BATCH, SHARE = 64, 16
#: Texts that wait, of all requests.
MOST_WAITING = 16_384

#: Of texts, or of pairs of texts.
Encode = Callable[[Sequence[Any]], Vectors]
#: Called with the number of requests and of texts of a batch.
OnBatch = Callable[[int, int], None]


def require_room(waiting: int) -> None:
    """Refuse texts with which too many would wait."""
    if waiting > MOST_WAITING:
        raise busy("Too many texts wait to be encoded")


@dataclass(slots=True, eq=False)
class _Request:
    texts: Sequence[Any]
    done: asyncio.Future[Vectors]
    next: int = 0
    blocks: list[Vectors] = field(default_factory=list)

    def take(self, most: int) -> _Part:
        begin, self.next = self.next, min(self.next + most, len(self.texts))
        return _Part(self, begin, self.texts[begin : self.next])

    def give(self, outcome: Vectors | Exception) -> None:
        if self.done.done():
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
            return
        self.blocks.append(outcome)
        if sum(map(len, self.blocks)) == len(self.texts):
            self.done.set_result(np.concatenate(self.blocks))


@dataclass(frozen=True, slots=True)
class _Part:
    request: _Request
    begin: int
    texts: Sequence[Any]


class Batcher:
    """Joins the texts of requests of one event loop.

    ``encode`` is called in a thread of the executor, one batch at a time, ``on_batch`` after each.
    """

    def __init__(
        self, encode: Encode, executor: Executor, on_batch: OnBatch = lambda requests, texts: None
    ) -> None:
        self._encode = encode
        self._executor = executor
        self._on_batch = on_batch
        self._requests: deque[_Request] = deque()
        self._waiting = 0
        self._company = False
        self._running: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Texts that wait for a batch."""
        return self._waiting

    async def encode(self, texts: Sequence[Any]) -> Vectors:
        """Vectors of some texts, at least one, float32 of shape ``(len(texts), dimensions)``.

        A caller that is cancelled takes its texts out of the queue. ``EncodingError.index`` is a
        place among *these* texts.
        """
        require_room(self._waiting + len(texts))
        request = _Request(texts, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        self._waiting += len(texts)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            return await request.done
        finally:
            self._drop(request)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._requests:
            if self._company and self._waiting < BATCH:
                await asyncio.sleep(WINDOW)
            parts = self._take()
            if not parts:
                continue
            self._company = len({id(part.request) for part in parts}) > 1
            try:
                outcomes = await loop.run_in_executor(self._executor, self._outcomes, parts)
            except RuntimeError as error:  # The executor has been shut down.
                outcomes = [error] * len(parts)
            for part, outcome in zip(parts, outcomes, strict=True):
                part.request.give(outcome)

    def _take(self) -> list[_Part]:
        """The texts of the next batch, some of each request in turn."""
        parts: list[_Part] = []
        room = BATCH
        while room and self._requests:
            request = self._requests.popleft()
            part = request.take(min(room, SHARE))
            parts.append(part)
            room -= len(part.texts)
            self._waiting -= len(part.texts)
            if request.next < len(request.texts):
                self._requests.append(request)
        return parts

    def _drop(self, request: _Request) -> None:
        """Forget what is left of a request that is answered, has failed or was cancelled."""
        if request in self._requests:
            self._requests.remove(request)
            self._waiting -= len(request.texts) - request.next

    def _outcomes(self, parts: Sequence[_Part]) -> list[Vectors | Exception]:
        """Vectors of each part, or its error; one request's fault is not another's."""
        texts = [text for part in parts for text in part.texts]
        try:
            vectors = self._vectors(texts)
        except Exception as error:
            if len(parts) > 1:
                return [outcome for part in parts for outcome in self._outcomes([part])]
            if isinstance(error, EncodingError) and error.index is not None:
                return [EncodingError(str(error), index=parts[0].begin + error.index)]
            return [error]
        self._on_batch(len({id(part.request) for part in parts}), len(texts))
        ends = np.cumsum([len(part.texts) for part in parts])[:-1]
        return list(np.split(vectors, ends))

    def _vectors(self, texts: Sequence[Any]) -> Vectors:
        vectors = np.asarray(self._encode(texts), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise EncoderError(
                f"The encoder gave vectors of shape {vectors.shape} for {len(texts)} texts, or "
                "numbers that are not finite."
            )
        return vectors
