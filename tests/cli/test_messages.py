"""A message or page that names a command names one that there is."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import sbert_pg
from sbert_pg.cli.app import build_app, run

from .test_commands import commands

PATHS = commands()
GROUPS = {path[0] for path in PATHS if len(path) > 1}
#: Quoted or bracketed, as messages and docstrings do.
_NAMED = re.compile(r"[`'(]sbert-pg ([a-z][a-z-]*)(?: ([a-z-]+))?")
SOURCES = sorted(Path(sbert_pg.__file__).parent.rglob("*.py"))
ROOT = Path(__file__).parents[2]
WRITTEN = [
    *SOURCES, ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.py")),
]  # fmt: skip


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_commands_in_messages_and_docs_exist(path: Path) -> None:
    # A message may be broken over lines of the source.
    text = re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
    for first, second in _NAMED.findall(text):
        if first in GROUPS and second:
            assert (first, second) in PATHS, f"{path.name}: sbert-pg {first} {second}"
        else:
            assert first in GROUPS or (first,) in PATHS, f"{path.name}: sbert-pg {first}"


@cache
def options_of(path: tuple[str, ...]) -> set[str]:
    """The options of a command, by both their names."""
    command: Any = typer.main.get_command(build_app())
    for name in path:
        command = command.commands[name]
    options = [p.opts for p in command.params if p.param_type_name == "option"]
    return {"--help", "-h"}.union(*options)


def test_options_in_messages_and_docs_exist() -> None:
    """Of a command that is written out, up to the end of its line or quotation."""
    wrong, seen = [], 0
    for page in WRITTEN:
        text = re.sub(r'"\s*\n\s*f?"', "", page.read_text(encoding="utf-8"))
        for line in re.findall(r"sbert-pg ((?:[^\n`'#&|;\[]|\[(?=-))+)", text):
            words = line.split()
            path = next((p for n in (2, 1) if (p := tuple(words[:n])) in PATHS), None)
            unquoted = re.sub(r'"[^"]*"', " ", line)
            named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+|-[a-z])\b", unquoted))
            if path is not None and named:
                seen += 1
                unknown = " ".join(named - options_of(path))
                wrong += [f"{page.name}: sbert-pg {' '.join(path)} {unknown}"] if unknown else []
    assert seen > 60
    assert not wrong, "\n".join(wrong)


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
