"""The diff of docs/frameworks.md, applied to a clean application and used over HTTP on asyncpg."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

ROOT = Path(__file__).parents[2]
CLEAN = ROOT / "examples" / "fastapi_template" / "app"
_DIFF = re.compile(r"^```diff\n(.*?)^```", re.MULTILINE | re.DOTALL)

USED = """
import sys
from fastapi.testclient import TestClient
from app.main import app

TEXTS = [("Kettle", "Boils water"), ("Bread knife", "Cuts loaves"), ("Lamp", None)]
with TestClient(app) as client:
    items = [client.post("/items", json={"title": t, "description": d}).json() for t, d in TEXTS]
    assert len(client.get("/items").json()) == 3
    path = "/items/" + items[2]["id"]
    changed = client.patch(path, json={"title": "Scissors", "description": "Cut paper"})
    assert changed.json() == {**items[2], "title": "Scissors", "description": "Cut paper"}
    assert client.get(path).json() == changed.json()
    if "search" in sys.argv:
        found = client.get("/items/search", params={"q": "something sharp for paper"})
        assert found.json()[0] == changed.json(), found.text
        assert len(found.json()) == 3
        first = client.get("/items/search", params={"q": "tea", "limit": 1}).json()
        assert first == [items[0]], first
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == 404
"""


def patched(directory: Path, diff: str) -> int:
    """Apply a unified diff, each of whose hunks fits one place; returns the lines that it adds."""
    path = directory
    for hunk in re.split(r"^@@.*@@.*\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines()
        body = [line for line in lines if not line.startswith(("---", "+++"))]
        if body:
            old, new = ("\n".join(b[1:] for b in body if b[:1] != sign) for sign in "+-")
            text = path.read_text()
            assert text.count(old) == 1, f"{path.name} has this {text.count(old)} times:\n{old}"
            path.write_text(text.replace(old, new))
        for line in lines:
            if line.startswith("+++ "):
                path = directory / line[4:]
    added = (line for line in diff.splitlines() if line[:1] == "+" and line[:3] != "+++")
    return sum(line != "+" for line in added)


@pytest.mark.usefixtures("minilm")
def test_ten_lines_bring_search(tmp_path: Path, database_url: sa.URL) -> None:
    [diff] = _DIFF.findall((ROOT / "docs" / "frameworks.md").read_text())
    shutil.copytree(CLEAN, tmp_path / "app")
    url = database_url.set(drivername="postgresql+asyncpg")
    environment = {**os.environ, "DATABASE_URL": url.render_as_string(hide_password=False)}

    def use(*arguments: str) -> None:
        command = [sys.executable, "-c", USED, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    use()
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE item"))
    engine.dispose()
    assert patched(tmp_path, diff) <= 10
    use("search")
