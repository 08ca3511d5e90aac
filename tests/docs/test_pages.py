"""Every Python block of the README and of docs/ runs, in order, one page in one namespace."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: ```python, and not ```python no-run, which is for fragments of other people's files.
_BLOCK = re.compile(r"^```python *\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ANY_BLOCK = re.compile(r"^```(\S*)([^\n]*)\n.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and text of each block that is to run."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start(1)), match.group(1)) for match in _BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(
    page: Path,
    engine: sa.Engine,
    minilm: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = blocks(page)
    if not found:
        pytest.skip(f"{page.name} has no Python that runs")
    # Pages use the short name as well; it is the same encoder.
    registry.use_encoder(minilm, name="all-MiniLM-L6-v2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    run(page, found, engine)


def run(page: Path, found: list[tuple[int, str]], engine: sa.Engine) -> None:
    """Run blocks in a module of their own, as if a reader had put them into one file."""
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    vars(module)["engine"] = engine
    sys.modules[module.__name__] = module
    try:
        for line, source in found:
            # Padding makes a traceback point at the page's own line.
            code = compile("\n" * line + source, str(page), "exec", dont_inherit=True)
            exec(code, vars(module))
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(_ANY_BLOCK.sub("", page.read_text())):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme, f"README.md does not mention docs/{page.name}"


def test_readme_block_answers(
    engine: sa.Engine, minilm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.use_encoder(minilm, name="all-MiniLM-L6-v2")
    page = ROOT / "README.md"
    run(page, blocks(page)[:1], engine)
    assert "Refunds and returns" in capsys.readouterr().out


def test_environment_is_not_needed() -> None:
    """No page asks the reader to set a variable that no code reads."""
    read = "\n".join(path.read_text() for path in (ROOT / "sbert_pg").rglob("*.py"))
    for page in PAGES:
        for name in set(re.findall(r"\bSBERT_PG_[A-Z_]+\b", page.read_text())):
            assert name in read or os.environ.get(name) is not None or "TEST" in name, (
                f"{page.name} names {name}, which nothing reads"
            )
