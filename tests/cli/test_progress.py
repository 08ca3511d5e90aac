"""Bars on terminals, and nothing in a pipe."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext

import pytest
import sqlalchemy as sa

from sbert_pg.cli import app, data
from sbert_pg.cli.app import COMMANDS, GROUPS

WORK = """
import time
from sbert_pg.progress import bar
with bar("reading") as advance:
    advance("iterations", 3, 10)
    time.sleep(0.3)
    advance("numbers", 5)
    time.sleep(0.3)
print("result")
"""
#: Commands that answer at once, or that speak for themselves as long as they run.
QUICK = {
    "migrate", "status", "doctor", "worker", "failed", "serve", "show",
    "finish", "abort", "passages", "demo", "serve_postgres",
}  # fmt: skip


def test_a_bar_on_a_terminal_alone() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    shown = os.read(ours, 65_536).decode()
    assert done.stdout == b"result\n"
    assert re.search(r"iterations .* 3/10 ", shown), shown
    # Of how much is not known: no part of the bar is full, each character has its own colour.
    assert re.search(r"numbers .* 5 ", shown), shown
    assert "━━" not in shown[shown.index("numbers") :], shown
    os.close(ours)
    os.close(theirs)
    forced = {**environment, "FORCE_COLOR": "1"}
    piped = subprocess.run([sys.executable, "-c", WORK], capture_output=True, env=forced)
    assert (piped.stdout, piped.stderr) == (b"result\n", b"")


def test_every_long_command_shows_that_it_works() -> None:
    commands = [*COMMANDS, *(command for _, group in GROUPS.values() for command in group)]
    silent = {command.__name__ for command in commands if "bar" not in command.__code__.co_names}
    assert silent == QUICK


def test_a_search_by_words_loads_no_encoder(
    database_url: sa.URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def bar(step: str) -> AbstractContextManager[None]:
        steps.append(step)
        return nullcontext()

    monkeypatch.setattr(data, "bar", bar)
    url = database_url.render_as_string(hide_password=False)
    for by in ("words", "meaning"):
        assert app.run(["search", "no_such_table", "toast", "--by", by, "-d", url]) != 0
    assert steps == ["searching", "loading the encoder"]
