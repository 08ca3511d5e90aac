"""``sbert-pg migrate --alembic``: the lines that env.py needs, printed or written."""

from __future__ import annotations

import ast
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from sbert_pg.cli.app import run
from sbert_pg.cli.schema import ARGUMENT, IMPORT, edited
from sbert_pg.errors import DeclarationError

TEMPLATES = Config().get_template_directory()


def templates() -> list[str]:
    return sorted(path.parent.name for path in Path(TEMPLATES).glob("*/env.py"))


def arguments(source: str) -> list[list[str]]:
    """Keyword arguments of each context.configure()."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "context.configure":
            assert len({k.arg for k in node.keywords}) == len(node.keywords)
            found.append([str(keyword.arg) for keyword in node.keywords])
    return found


@pytest.mark.parametrize("template", templates())
def test_every_template_of_alembic(
    template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "migrations").mkdir()
    env = tmp_path / "migrations" / "env.py"
    shutil.copy(Path(TEMPLATES) / template / "env.py", env)
    before = env.read_text()
    capsys.readouterr()
    assert run(["migrate", "--alembic", str(tmp_path / "migrations")]) == 0
    assert env.read_text() == before
    assert run(["migrate", "--write", "-d", "postgresql://127.0.0.1:1/db"]) == 1, "of which?"
    assert f"+{IMPORT}" in capsys.readouterr().out
    assert run(["migrate", "--alembic", str(tmp_path / "migrations"), "--write"]) == 0
    after = env.read_text()
    assert after.count(IMPORT) == 1
    assert len(arguments(after)) == len(arguments(before)) >= 2
    for was, now in zip(arguments(before), arguments(after), strict=True):
        assert sorted(now) == sorted([*was, "autogenerate_plugins"])
    # Nothing else has changed, and doing it again changes nothing.
    kept = after.replace(f"{IMPORT}\n", "").replace(ARGUMENT, "")
    assert re.sub(r"[\s,]", "", kept) == re.sub(r"[\s,]", "", before)
    assert edited(after) == after


def test_what_is_printed_is_a_patch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(tmp_path / "alembic.ini", stdout=io.StringIO())
    command.init(config, str(tmp_path / "migrations"))
    env = tmp_path / "migrations" / "env.py"
    wanted = edited(env.read_text())
    capsys.readouterr()
    assert run(["migrate", "--alembic", str(env)]) == 0
    change = capsys.readouterr().out
    try:
        done = subprocess.run(
            ["patch", "-p0"], input=change, text=True, capture_output=True, check=False, cwd="/"
        )
    except FileNotFoundError:
        pytest.skip("there is no 'patch' here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert env.read_text() == wanted


CALLS = {
    "on one line": "context.configure(connection=c, target_metadata=m)\n",
    "without arguments": "context.configure()\n",
    "positional": "context.configure(c)\n",
    "two in a line": "context.configure(a=1); context.configure(b=2)\n",
    "with a comment behind the bracket": "context.configure(  # here\n    connection=c,\n)\n",
    "unpacked": "context.configure(connection=c, **options)\n",
    "umlauts before it": "é = 'ü'; context.configure(connection=c, name='ö')\n",
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_however_they_are_written(kind: str) -> None:
    source = f'"""Ours."""\n{CALLS[kind]}'
    after = edited(source)
    assert after.startswith(f'"""Ours."""\n{IMPORT}\n')
    for call in arguments(after):
        assert "autogenerate_plugins" in call
    assert edited(after) == after


def test_imports_stay_in_front(tmp_path: Path) -> None:
    source = (
        '"""Ours."""\nfrom __future__ import annotations\n\n'
        "from alembic import (\n    context,\n)\n\n"
        "context.configure()\n"
    )
    after = edited(source)
    compile(after, "env.py", "exec")
    assert after.index(IMPORT) > after.index(")\n")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("run()\n", "Nothing in .* calls context.configure"),
        ("def (", "cannot be read"),
        (
            "context.configure(autogenerate_plugins=['alembic.autogenerate.*', 'theirs'])\n",
            r"autogenerate_plugins\('the others', ...\)",
        ),
    ],
)
def test_what_cannot_be_edited_is_said(source: str, said: str) -> None:
    with pytest.raises(DeclarationError, match=said):
        edited(source)


def test_no_env_py(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["migrate", "--alembic", str(tmp_path)]) != 0
    assert "There is no env.py" in capsys.readouterr().err
