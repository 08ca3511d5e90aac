"""How many modules something passes on its way; a path that grows is noticed by these tests."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

#: The encoder's side: which one is meant, and what it computes.
ENCODER = ("sbert_pg.encoder", "sbert_pg.registry", "sbert_pg.spec", "sbert_pg.testing")


def modules_of(work: Callable[[], Any], *, leave_out: tuple[str, ...] = ENCODER) -> set[str]:
    """The library's modules in which a function is called meanwhile, in any thread that is begun.

    Those whose names begin with one of ``leave_out`` are not counted. Garbage is left alone: what
    earlier tests threw away would else be finalised here, and counted.
    """
    passed: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("sbert_pg."):
            passed.add(module)

    collects = gc.isenabled()
    gc.disable()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        if collects:
            gc.enable()
    return {module for module in passed if not module.startswith(leave_out)}
