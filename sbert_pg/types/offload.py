"""Encoding beside the event loop, where SQLAlchemy runs inside one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def off_loop(work: Callable[[], T]) -> T:
    """Call ``work`` here; from a statement of an ``AsyncSession``, in a thread of the loop's.

    Encoding takes milliseconds to minutes and releases the interpreter lock meanwhile, so other
    requests of an asynchronous application are served while it lasts.
    """
    # Without greenlet nothing asynchronous can be under way.
    if "greenlet" not in sys.modules:
        return work()
    from sqlalchemy.util import await_only
    from sqlalchemy.util.concurrency import in_greenlet

    if not in_greenlet():
        return work()
    result: T = await_only(asyncio.to_thread(work))
    return result
