from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from sbert_pg import catalog
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.guard import ColumnIdentity

SPEC = EncoderSpec(name="deterministic", dimensions=3)
A, B = "[1,0,0]", "[0,1,0]"


def pending(connection: Connection) -> list[str]:
    rows = connection.execute(sa.text("SELECT key FROM sbert.pending ORDER BY key"))
    return [row.key for row in rows]


@pytest.fixture
def connection(engine: sa.Engine):
    with engine.connect() as connection:
        connection.execute(
            sa.text(
                "CREATE TABLE note (id bigserial PRIMARY KEY, title text, body text, views int "
                "NOT NULL DEFAULT 0, e vector(3))"
            )
        )
        catalog.bind(
            connection, ColumnIdentity(None, "note", "e"), SPEC, Source.of(["title", "body"])
        )
        connection.commit()
        yield connection


def test_texts_without_vectors_become_pending(connection: Connection) -> None:
    connection.execute(sa.text("INSERT INTO note (title) VALUES ('a'), (NULL), ('')"))
    assert pending(connection) == ["1", "3"]
