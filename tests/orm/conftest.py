"""Sessions that encode, over an encoder that remembers its batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker
from write_fixtures import encoder, tables, write_template

from sbert_pg import embed_on_flush

__all__ = ["encoder", "tables", "write_template"]


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
