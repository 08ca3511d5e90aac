"""Two threads meet an engine for the first time at the same moment."""

from __future__ import annotations

import threading
import time

import pytest
import sqlalchemy as sa

from sbert_pg.types import guard


def test_nobody_executes_before_the_listeners_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    dialect = sa.create_engine("postgresql+psycopg://nowhere/none").dialect
    begun, listeners, seen = threading.Event(), [], []

    def listen(target, name, function):
        begun.set()
        time.sleep(0.05)
        listeners.append(name)

    monkeypatch.setattr(guard.event, "listen", listen)

    def second() -> None:
        begun.wait(5)
        guard.watch(dialect)
        seen.append(list(listeners))

    other = threading.Thread(target=second)
    other.start()
    guard.watch(dialect)
    other.join()
    assert seen == [["do_execute", "do_executemany", "do_execute_no_params"]]
