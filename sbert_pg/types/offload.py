"""Encoding beside the event loop, where SQLAlchemy runs inside one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def off_loop(work: Callable[[], T]) -> T:
    """Call ``work`` here; from a statement of an ``AsyncSession``, in a thread of the loop's.

    Encoding takes milliseconds to minutes and releases the interpreter lock meanwhile, so other
    requests of an asynchronous application are served while it lasts.
    """
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
