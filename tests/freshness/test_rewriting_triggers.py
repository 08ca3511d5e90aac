"""An application's triggers on the very statement that writes a vector."""

from __future__ import annotations

from datetime import timedelta

import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import backfill, refresh
from sbert_pg.freshness import WorkerSettings
from sbert_pg.testing import DeterministicEncoder

from .conftest import IDENTITY, failure_rows, pending_count, states, violations

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


def test_a_row_whose_write_is_left_out_fails(
    engine: sa.Engine, note: str, plain: psycopg.Connection, encoder: DeterministicEncoder
) -> None:
    """A trigger that returns NULL: nobody holds the row, and no attempt would ever succeed."""
    plain.execute("INSERT INTO note (body) VALUES ('kept'), ('written')")
    plain.execute(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$; "
        "CREATE TRIGGER keep BEFORE UPDATE ON note FOR EACH ROW "
        "WHEN (OLD.id = 1 AND NEW.embedding IS NOT NULL) EXECUTE FUNCTION keep()"
    )
    settings = WorkerSettings(max_attempts=2, backoff=timedelta(0))
    for _ in range(2):
        refresh(engine, settings)
    assert states(plain) == {1: "failed", 2: "fresh"}
    [(key, attempts, failed, error)] = failure_rows(plain)
    assert (key, attempts, failed) == ('["1"]', 2, True)
    assert "trigger" in str(error)
    plain.execute("DROP TRIGGER keep ON note; UPDATE note SET body = 'changed' WHERE id = 1")
    plain.execute("UPDATE sbert.failure SET at = now() - interval '1 minute'")
    refresh(engine, settings)
    assert states(plain) == {1: "fresh", 2: "fresh"}
    assert violations(plain, encoder) == []
