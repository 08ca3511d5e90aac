"""Run the command: in this process, or in one of its own where a process is what is tested."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import sqlalchemy as sa
import typer

from sbert_pg.cli import app, common
from sbert_pg.cli.app import build_app


class Result(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def environment(url: sa.URL | None, **more: str) -> dict[str, str]:
    """The variables of a command, with this folder's modules at hand."""
    kept = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    kept |= {"COLUMNS": "200", "PYTHONPATH": path, **more}
    if url is not None:
        kept["SBERT_PG_DATABASE_URL"] = url.render_as_string(hide_password=False)
    return kept


@functools.cache
def made_command() -> Any:
    """All commands, which a program makes at its start: once for what this process runs."""
    return typer.main.get_command(build_app())


def sbert_pg(
    *arguments: str, url: sa.URL | None = None, stdin: str | None = None, **variables: str
) -> Result:
    """Run the command to its end, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment(url, **variables), clear=True),
        mock.patch.object(app, "build_app", made_command),
        mock.patch.object(sys, "stdin", io.StringIO(stdin or "")),
        mock.patch.object(common.out, "_width", 200),
        mock.patch.object(common.err, "_width", 200),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = app.run(list(arguments))
    return Result(code, out.getvalue(), err.getvalue())


def process(*arguments: str, url: sa.URL | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start the command as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "sbert_pg.cli.app", *arguments],
        env=environment(url, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
