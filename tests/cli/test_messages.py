"""A message that names a command names one that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sbert_pg

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
