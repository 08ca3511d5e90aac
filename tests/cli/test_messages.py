"""A message that names a command names one that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sbert_pg
from sbert_pg.cli.app import run

from .test_commands import commands

PATHS = commands()
GROUPS = {path[0] for path in PATHS if len(path) > 1}
#: Quoted or bracketed, as messages and docstrings do.
_NAMED = re.compile(r"[`'(]sbert-pg ([a-z-]+)(?: ([a-z-]+))?")
SOURCES = sorted(Path(sbert_pg.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_commands_in_messages_exist(path: Path) -> None:
    # A message may be broken over lines of the source.
    text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())
    for first, second in _NAMED.findall(text):
        if first in GROUPS and second:
            assert (first, second) in PATHS, f"{path.name}: sbert-pg {first} {second}"
        else:
            assert first in GROUPS or (first,) in PATHS, f"{path.name}: sbert-pg {first}"


#: What stands before a password and after it, whole URLs and broken ones.
AROUND = [
    ("postgresql://u:", "@127.0.0.1:1/db"), ("postgres://u:", "@127.0.0.1:port/db"),
    ("postgresql://u:", "@[::1/db"), ("postgresql://u:", "@one:1,two:2/db"),
    ("postgresql://u:", "@127.0.0.1:99999999/db"), ("postgresql://u:", "\ud800@127.0.0.1:1/db"),
    ("postgresql://u:", "\x00@127.0.0.1:1/db"), ("postgresql://u:@", "@127.0.0.1:1/db"),
    ("postgresql://u:a@b/", "@127.0.0.1:1/db"), ("postgresql://u:a%zz", "@127.0.0.1:1/db"),
    ("postgresql://127.0.0.1:1/db?password=", ""), ("mysql://u:", "@h/db"), ("", ""),
    ("host=127.0.0.1 port=1 password=", " dbname=x"),
    ("postgresql+asyncpg://u:", "@127.0.0.1:1/db"),
    ("postgresql://u:", "@127.0.0.1:1/db?nonsense=1"), ("postgresql:/u:", "@h/db"),
    ("postgresql://u@127.0.0.1:1/db?sslmode=require&sslpassword=", ""),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), AROUND, ids=range(len(AROUND)))
@pytest.mark.parametrize("command", [["status"], ["worker", "--once", "--log", "debug"]])
def test_a_password_is_never_shown(
    capfd: pytest.CaptureFixture[str], command: list[str], before: str, after: str
) -> None:
    secret = "s3cr3t-and-l0ng"
    assert run([*command, "-d", f"{before}{secret}{after}"]) != 0
    shown = "".join(capfd.readouterr())
    assert shown
    assert secret not in shown.replace("\n", "")
    assert "Traceback" not in shown
