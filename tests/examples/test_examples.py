"""The examples run as they stand, each on a database of its own."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import registry

EXAMPLES = Path(__file__).parents[2] / "examples"


def imported(name: str) -> ModuleType:
    """A fresh import of an example, as no other test has it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _environment(database_url: sa.URL, minilm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.use_encoder(minilm, name="all-MiniLM-L6-v2")
    monkeypatch.setenv("DATABASE_URL", database_url.render_as_string(hide_password=False))


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_fastapi(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = sa.make_url(os.environ["DATABASE_URL"]).set(drivername=f"postgresql+{driver}")
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    testclient = pytest.importorskip("fastapi.testclient")
    example = imported("fastapi_search")
    with testclient.TestClient(example.app) as client:
        for title, body in [
            ("Refunds", "Send the goods back within 30 days and we return the money."),
            ("Opening hours", "We are open from nine to five on weekdays."),
        ]:
            assert client.post("/articles", json={"title": title, "body": body}).status_code == 201
        found = client.get("/search", params={"q": "when can I visit the shop?"}).json()
    assert [row["title"] for row in found] == ["Opening hours", "Refunds"]
    assert found[0]["similarity"] > found[1]["similarity"]


@pytest.mark.usefixtures("_environment")
def test_litestar() -> None:
    testing = pytest.importorskip("litestar.testing")
    pytest.importorskip("advanced_alchemy")
    example = imported("litestar_search")
    with testing.TestClient(example.app) as client:
        for title in ("Refunds and returns", "Opening hours"):
            assert client.post("/articles", json={"title": title}).status_code == 201
        found = client.get("/search", params={"q": "when can I visit the shop?"}).json()
    assert [row["title"] for row in found] == ["Opening hours", "Refunds and returns"]


@pytest.mark.usefixtures("_environment")
def test_sqlmodel() -> None:
    pytest.importorskip("sqlmodel")
    assert imported("sqlmodel_search").main() == ["Apple pie"]


@pytest.mark.usefixtures("_environment")
def test_passages() -> None:
    assert imported("passages_search").main() == [
        "We repair the kettle free of charge within three years."
    ]


@pytest.mark.usefixtures("_environment")
def test_flask() -> None:
    pytest.importorskip("flask_sqlalchemy")
    client = imported("flask_search").create_app().test_client()
    for subject in ["Printer is on fire", "Cannot log in", "Invoice is wrong"]:
        assert client.post("/tickets", json={"subject": subject}).status_code == 201
    found = client.get("/search", query_string={"q": "password does not work"}).get_json()
    assert found[0]["subject"] == "Cannot log in"


@pytest.mark.usefixtures("_environment")
def test_plain_sql() -> None:
    core, plain = imported("plain_sql").main()
    assert core[0] == "The old town has the best bakeries."
    assert plain == ["Trams run until midnight, night buses after that."]


@pytest.mark.usefixtures("_environment")
def test_hybrid() -> None:
    found = imported("hybrid_search").main()
    assert found["fmean"]["both"][0] == "fmean"
    assert "rmtree" in found["remove a folder and everything in it"]["both"][:2]
    ndcg = found["ndcg"]
    assert ndcg["both"] >= max(ndcg["meaning"], ndcg["words"]) - 0.02
    assert ndcg["both"] >= ndcg["meaning"] + 0.02


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tested, f"{path.name} is not run by any test"


def test_examples_say_how_to_run_them() -> None:
    for path in EXAMPLES.glob("*.py"):
        documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert "DATABASE_URL" in documentation, f"{path.name} does not say how to run it"
