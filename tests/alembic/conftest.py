"""Applications with an Alembic history of their own, on a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic_application import Application

from sbert_pg.testing import DeterministicEncoder


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


@pytest.fixture
def fill(fake_encoder: DeterministicEncoder) -> Callable[..., None]:
    """Give every row of a column its vector, as a worker would."""

    def fill(app: Application, column: str = "embedding", table: str = "article") -> None:
        from sbert_pg.freshness import backfill
        from sbert_pg.system import ColumnIdentity

        backfill(app.engine, ColumnIdentity(None, table, column))

    return fill
