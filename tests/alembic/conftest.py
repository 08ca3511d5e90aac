"""Applications with an Alembic history of their own, on a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic_application import Application

from sbert_pg.testing import DeterministicEncoder
from tests.conftest import Databases


@pytest.fixture
def make_app(tmp_path: Path) -> Iterator[Callable[..., Application]]:
    """Applications in directories of this test's."""
    made: list[Application] = []

    def make(url: sa.URL, name: str = "app", *, plugin: bool = True) -> Application:
        root = tmp_path / name
        root.mkdir()
        made.append(Application(root, url, plugin=plugin))
        return made[-1]

    yield make
    for app in made:
        app.engine.dispose()


@pytest.fixture
def app(make_app: Callable[..., Application], bare_database_url: sa.URL) -> Application:
    """An application on a database that has pgvector and nothing else."""
    return make_app(bare_database_url)


@pytest.fixture(scope="session")
def originals() -> dict[Callable[[Application], None], Application]:
    return {}


@pytest.fixture
def copy_of(
    originals: dict[Callable[[Application], None], Application],
    databases: Databases,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Application]]:
    """An application that a function has brought somewhere, once for all tests: a copy of it."""
    copies: list[Application] = []

    def copied(bring: Callable[[Application], None]) -> Application:
        name = f"{bring.__module__}.{bring.__qualname__}"
        if bring not in originals:
            url = databases.clone("bare")
            original = Application(tmp_path_factory.mktemp("original"), url)
            bring(original)
            databases.templates[name] = str(url.database)
            originals[bring] = original
        url = databases.clone(name)
        copies.append(originals[bring].copied(tmp_path / "app", url))
        return copies[-1]

    yield copied
    for app in copies:
        app.engine.dispose()
        databases.discard(str(sa.make_url(app.url).database))


@pytest.fixture
def fill(fake_encoder: DeterministicEncoder) -> Callable[..., None]:
    """Give every row of a column its vector, as a worker would."""

    def fill(app: Application, column: str = "embedding", table: str = "article") -> None:
        from sbert_pg.freshness import backfill
        from sbert_pg.system import ColumnIdentity

        backfill(app.engine, ColumnIdentity(None, table, column))

    return fill
