"""Every Python block of the README and of docs/ runs, a page's blocks pasted into one file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import sqlalchemy as sa

from sbert_pg import errors
from sbert_pg.cli.app import run as run_command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: ```python, and not ```python no-run, which is for fragments of other people's files.
_BLOCK = re.compile(r"^```python *\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ANY_BLOCK = re.compile(r"^```(\S*)([^\n]*)\n.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


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


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _ANY_BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    plain = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", title) for title in _HEADING.findall(prose(page)))
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that is there, and a heading that it has."""
    for target, anchor in _LINK.findall(prose(page)):
        if "://" in target:
            continue
        other = page.parent / target if target else page
        assert other.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(other), f"{page.name}: {other.name} has no heading #{anchor}"


def test_every_page_can_be_reached() -> None:
    """From the README, or from the page on situations; and from the site's menu."""
    menu = (ROOT / "mkdocs.yml").read_text()
    above = (ROOT / "README.md").read_text() + (ROOT / "docs" / "howto.md").read_text()
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").as_posix()
        assert f"({name})" in above or f"(docs/{name})" in above, f"nothing leads to {name}"
        assert re.search(rf": {name}$", menu, re.MULTILINE), f"mkdocs.yml does not list {name}"


def test_page_of_errors_is_complete() -> None:
    """It has a section for each class, in the order and depth of the tree, and nothing else."""

    def tree(kind: type[errors.SbertPgError], depth: int) -> list[str]:
        below = [k for k in kind.__subclasses__() if vars(errors).get(k.__name__) is k]
        return [f"{'#' * depth} {kind.__name__}", *(t for k in below for t in tree(k, depth + 1))]

    text = (ROOT / errors.PAGE).read_text()
    headings = re.findall(r"^##+ \w+$", text, re.MULTILINE)
    root, *others = tree(errors.SbertPgError, 1)
    assert headings == [f"#{root}", *others]
    for section in re.split(r"^##+ .*$", text, flags=re.MULTILINE)[1:]:
        assert section.strip(), "a section is empty"
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"\w+Error", errors.__doc__)) - {"ValueError", "ImportError"}
    assert drawn == {heading.lstrip("# ") for heading in headings}


def test_messages_lead_to_the_page_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    class Own(errors.TableBusyError):
        """Of an application, or made by this package for Alembic or SQLAlchemy."""

    error = Own("The table is busy.")
    path, _, anchor = error.page.partition("#")
    assert anchor == "tablebusyerror"
    assert anchor in anchors(ROOT / path)
    assert str(error) == "The table is busy."
    if sys.version_info >= (3, 11):
        assert traceback.format_exception(error)[-1].endswith(f"error: {error.page}\n")
    assert run_command(["search", "article", "x", "-d", "mysql://localhost/shop"]) == 1
    assert f"Background: {errors.PAGE}#declarationerror" in capsys.readouterr().err


@pytest.mark.usefixtures("minilm")
def test_readme_block_answers(tmp_path: Path) -> None:
    """From an empty directory, with no database at hand."""
    # The embedded server runs as a user of its own where the tests run as root.
    os.chmod(tmp_path, 0o755)
    answers = run(ROOT / "README.md", tmp_path, None)
    # int8 differs a little between processors.
    assert re.search(r"^\[\('Refunds and returns', 0\.5[56]", answers, re.MULTILINE)
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
