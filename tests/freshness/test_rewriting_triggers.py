"""An application's trigger that rewrites a text in the very statement that writes its vector."""

from __future__ import annotations

import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import backfill, refresh
from sbert_pg.testing import DeterministicEncoder

from .conftest import IDENTITY, pending_count, violations

REWRITE = """
CREATE FUNCTION rewrite() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN NEW.body := replace(NEW.body, 'colour', 'color'); RETURN NEW; END $$;
CREATE TRIGGER rewrite BEFORE UPDATE ON note FOR EACH ROW EXECUTE FUNCTION rewrite();
"""


@pytest.mark.parametrize("way", ["worker", "backfill"])
def test_the_rewritten_row_is_done_again(
    way: str,
    engine: sa.Engine,
    note: str,
    plain: psycopg.Connection,
    encoder: DeterministicEncoder,
) -> None:
    plain.execute("INSERT INTO note (body) VALUES ('a colour'), ('a sound')")
    plain.execute(REWRITE)
    if way == "backfill":
        backfill(engine, IDENTITY)
    else:
        refresh(engine)
    assert violations(plain, encoder) == []
    refresh(engine)
    assert pending_count(plain) == 0
    assert violations(plain, encoder) == []
    bodies = [body for (body,) in plain.execute("SELECT body FROM note ORDER BY id")]
    assert bodies == ["a color", "a sound"]
