"""An encoder that remembers its batches, and the tables that the tests of writing share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker
from write_models import RecordingEncoder, create

from sbert_pg import embed_on_flush, registry


@pytest.fixture
def encoder() -> RecordingEncoder:
    """In use under the name ``deterministic``; it refuses a text that holds "refuse me"."""
    made = RecordingEncoder(refuse="refuse me")
    registry.use_encoder(made)
    return made


@pytest.fixture(scope="session")
def _template(databases: Any) -> str:
    """Made once, since binding eight columns takes longer than a test."""
    name = "write_models"
    if name not in databases.templates:
        url = databases.clone("catalog")
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        create(engine)
        databases.templates[name] = url.database
    return name


@pytest.fixture
def tables(databases: Any, _template: str, encoder: RecordingEncoder) -> Iterator[sa.Engine]:
    """An engine of a database with every table of ``write_models``, bound."""
    url = databases.clone(_template)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()
    databases.drop(url.database)


@pytest.fixture
def sessions(tables: sa.Engine) -> sessionmaker[Any]:
    """Sessions that encode in their flush."""
    made = sessionmaker(tables)
    embed_on_flush(made)
    return made


@pytest.fixture
def session(sessions: sessionmaker[Any]) -> Iterator[Session]:
    with sessions() as made:
        yield made
