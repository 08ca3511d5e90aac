"""How a store does its work: in sessions of its own, synchronously and asynchronously."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
from sqlalchemy.orm import Session, sessionmaker

from sbert_pg.errors import DeclarationError
from sbert_pg.registry import get_encoder
from sbert_pg.spec import EncoderSpec, TextEncoder

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S", bound="Running")
Work = Callable[[Session], T]


class Runner:
    """Does work in its own session, a transaction a call; sessions as of ``documents.Store``."""

    def __init__(self, sessions: Any) -> None:
        self._sessions = sessions
        self._is_async = not isinstance(sessions, sessionmaker)

    def run(self, work: Work[T]) -> T:
        """The result of some work."""
        if self._is_async:
            raise DeclarationError(
                "This store has an async_sessionmaker; call its asynchronous functions, or give it "
                "a sessionmaker."
            )
        with self._sessions.begin() as session:
            return work(session)

    async def arun(self, work: Work[T]) -> T:
        """The result of some work, in this event loop or a thread."""
        if not self._is_async:
            return await asyncio.to_thread(self.run, work)
        async with self._sessions.begin() as session:
            result: T = await session.run_sync(work)
            return result


class Running(Protocol):
    """What ``both`` makes functions of."""

    _runner: Runner


def both(
    work: Callable[Concatenate[S, P], Work[T]],
) -> tuple[Callable[Concatenate[S, P], T], Callable[Concatenate[S, P], Coroutine[Any, Any, T]]]:
    """A function of a store that returns work, as one that does it, and its asynchronous twin."""

    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._runner.run(work(self, *args, **kwargs))

    async def acall(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._runner.arun(work(self, *args, **kwargs))

    update_wrapper(call, work)
    update_wrapper(acall, work)
    return call, acall


def then(work: Work[T], function: Callable[[T], R]) -> Work[R]:
    """Work with something made of its result."""
    return lambda session: function(work(session))


class Lists:
    """An encoder's vectors as lists of numbers; a name is loaded at the first text."""

    def __init__(self, encoder: str | EncoderSpec | TextEncoder) -> None:
        self._encoder = encoder

    @property
    def encoder(self) -> TextEncoder:
        """The encoder, loaded."""
        given = self._encoder
        return get_encoder(given) if isinstance(given, (str, EncoderSpec)) else given

    def of_documents(self, texts: list[str]) -> list[list[float]]:
        """The vectors of texts, as documents."""
        vectors: list[list[float]] = np.asarray(self.encoder.encode_document(texts)).tolist()
        return vectors

    def of_query(self, text: str) -> list[float]:
        """The vector of a text, as a query."""
        vector: list[float] = np.asarray(self.encoder.encode_query([text])[0]).tolist()
        return vector


__all__ = ["Lists", "Runner", "Work", "both", "then"]
