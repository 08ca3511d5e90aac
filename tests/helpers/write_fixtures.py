"""Fixtures for the tests of writing, imported by the ``conftest.py`` of each of their folders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from write_models import RecordingEncoder, create

from sbert_pg import registry


@pytest.fixture
def encoder() -> RecordingEncoder:
    """In use under the name ``deterministic``; it refuses a text that holds "refuse me"."""
    made = RecordingEncoder(refuse="refuse me")
    registry.use_encoder(made)
    return made


@pytest.fixture(scope="session")
def write_template(databases: Any) -> str:
    """Made once, since binding eight columns takes longer than a test."""
    name = "write_models"
    if name not in databases.templates:
        url = databases.clone("catalog")
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        create(engine)
        databases.templates[name] = url.database
    return name


@pytest.fixture
def tables(databases: Any, write_template: str, encoder: RecordingEncoder) -> Iterator[sa.Engine]:
    """An engine of a database with every table of ``write_models``, bound."""
    url = databases.clone(write_template)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()
    databases.discard(url.database)
