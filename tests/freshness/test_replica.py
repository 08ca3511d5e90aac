"""A replica that falls behind pauses a backfill: real streaming replication."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from replica import Replica, replica_of

from sbert_pg import catalog, registry
from sbert_pg.freshness import WorkerSettings, backfill
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

pytestmark = pytest.mark.slow

IDENTITY = ColumnIdentity(None, "note", "embedding")


@pytest.fixture
def replica(request: pytest.FixtureRequest) -> Iterator[Replica]:
    with replica_of(request, delay="1h") as made:
        yield made


def test_a_replica_that_is_behind_pauses_a_backfill(engine: sa.Engine, replica: Replica) -> None:
    registry.use_encoder(DeterministicEncoder(dimensions=32))
    with engine.begin() as connection:
        for statement in (
            "CREATE TABLE note (id int PRIMARY KEY, body text, embedding vector(32))",
            "INSERT INTO note SELECT i, 'n' || i FROM generate_series(1, 2000) AS i",
        ):
            connection.exec_driver_sql(statement)
        spec = EncoderSpec(name="deterministic", dimensions=32)
        catalog.bind(connection, IDENTITY, spec, Source.of("body"))
    seen = []

    def on_progress(progress: Any) -> None:
        seen.append(progress)
        if progress.paused is not None and "caught up" not in seen:
            replica.catch_up()
            seen.append("caught up")

    settings = WorkerSettings(rows_per_second=200, max_replica_lag=1.0)
    done = backfill(engine, IDENTITY, settings, on_progress=on_progress)
    assert done.complete
    assert "caught up" in seen, "it was never paused"
    paused = seen[seen.index("caught up") - 1]
    assert "a replica is" in paused.paused
    assert paused.rows < 2000
