"""Pages of the site that are made of what is elsewhere: README, changelog, examples, CLI, API."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
#: Links of files that lie beside ``docs/``, as they are from within the site.
_LINKS = (
    (re.compile(r"\]\((?:\.\./)?examples/(\w+)\.py\)"), r"](examples/\1.md)"),
    (re.compile(r"\]\(docs/"), "]("),
    (re.compile(r"\]\((?:\.\./)?CONTRIBUTING\.md"), "](contributing.md"),
    (re.compile(r"^```(\w+) no-run$", re.MULTILINE), r"```\1"),
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "reference/api.md": _api(),
        "reference/commands.md": _commands(),
    }
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        pages[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```python\n{code}\n```\n"
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at the pages that are made."""
    for pattern, replacement in _LINKS:
        markdown = pattern.sub(replacement, markdown)
    return markdown


def _api() -> str:
    """Everything that ``sbert_pg`` exports, by the module and docstring that it is defined with."""
    import sbert_pg

    lines = ["# Python API", "", "What `from sbert_pg import ...` gives.", ""]
    for name in sorted(sbert_pg.__all__, key=str.lower):
        module = getattr(sbert_pg, name).__module__
        if not module.startswith("sbert_pg"):
            module = sbert_pg._LAZY[name]
        lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)


def _commands() -> str:
    """The help of each command, as the program prints it."""
    import click
    import typer
    from rich.text import Text

    from sbert_pg.cli.app import build_app

    lines = ["# Commands", "", "The same as `sbert-pg COMMAND --help` says.", ""]

    def visit(command: Any, path: str) -> None:
        for name, child in sorted(getattr(command, "commands", {}).items()):
            visit(child, f"{path} {name}")
        if hasattr(command, "commands"):
            return
        help_ = Text.from_markup(command.help or "").plain
        usage = " ".join(command.collect_usage_pieces(click.Context(command, info_name=path)))
        lines.extend([f"## {path}", "", "```text", f"{path} {usage}", "", help_, ""])
        for each in command.params:
            text = Text.from_markup(getattr(each, "help", None) or "").plain
            names = ", ".join(each.opts) if each.param_type_name == "option" else each.name.upper()
            lines.append(f"  {names:<24} {text}")
        lines.extend(["```", ""])

    visit(typer.main.get_command(build_app()), "sbert-pg")
    return "\n".join(lines)
