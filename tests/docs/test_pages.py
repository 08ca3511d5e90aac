"""Every Python block of the README and of docs/ runs, a page's blocks pasted into one file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

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
@pytest.mark.usefixtures("minilm")
def test_every_block_runs(page: Path, database_url: sa.URL, tmp_path: Path) -> None:
    if page.name == "README.md":
        pytest.skip("it brings a server of its own: test_readme_block_answers runs it")
    if not blocks(page):
        pytest.skip(f"{page.name} has no Python that runs")
    # The embedded server runs as a user of its own where the tests run as root.
    os.chmod(tmp_path, 0o755)
    run(page, tmp_path, database_url)


def run(page: Path, directory: Path, url: sa.URL | None) -> str:
    """Run a page's blocks as a reader would, pasted into one file of an empty directory.

    Nothing is injected: what the blocks need they import and set up. A page about a database says
    that its URL is in ``DATABASE_URL``.
    """
    # Padding makes a traceback point at the page's own line.
    source = ""
    for line, block in blocks(page):
        source += "\n" * (line - source.count("\n")) + block
    script = directory / "page.py"
    script.write_text(source)
    environment = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"}
    if url is not None:
        environment["DATABASE_URL"] = url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(_ANY_BLOCK.sub("", page.read_text())):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme, f"README.md does not mention docs/{page.name}"


@pytest.mark.usefixtures("minilm")
def test_readme_block_answers(tmp_path: Path) -> None:
    """From an empty directory, with no database at hand."""
    # The embedded server runs as a user of its own where the tests run as root.
    os.chmod(tmp_path, 0o755)
    answers = run(ROOT / "README.md", tmp_path, None)
    assert "[('Refunds and returns', 0.56" in answers
    assert "Cheese knife" in answers
    assert "1.00 Kettle KT-300" in answers
    assert "Kettle KT-200 | Boil water" in answers
    assert "Refreshed(embedded=2, errors=0" in answers, "the name, and the passages' heading"
    assert [path.name for path in tmp_path.iterdir()] == ["page.py"], "it leaves nothing behind"


def test_environment_is_not_needed() -> None:
    """No page asks the reader to set a variable that no code reads."""
    read = "\n".join(path.read_text() for path in (ROOT / "sbert_pg").rglob("*.py"))
    for page in PAGES:
        for name in set(re.findall(r"\bSBERT_PG_[A-Z_]+\b", page.read_text())):
            assert name in read or os.environ.get(name) is not None or "TEST" in name, (
                f"{page.name} names {name}, which nothing reads"
            )
