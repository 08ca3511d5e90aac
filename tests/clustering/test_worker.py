"""The worker places new and changed rows in the current clusters."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from command_line import Result, sbert_pg
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import catalog, registry
from sbert_pg import clustering as cl
from sbert_pg.clustering import ClusterKeeper
from sbert_pg.clustering.assigning import written
from sbert_pg.freshness import refresh, worker_thread
from sbert_pg.orm import embed_on_flush, embedding_column
from sbert_pg.testing import DeterministicEncoder

helpers = sys.modules["clustering_app"]
blobs, numbers_of = helpers.blobs, helpers.numbers_of

WORDS = ["rain storm clouds", "bank money credit", "butter garlic oven"]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


@pytest.fixture
def notes(engine: sa.Engine) -> Any:
    """Sixty notes on three topics, clustered."""
    registry.use_encoder(DeterministicEncoder())

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding = embedding_column("deterministic", "body", dimensions=384, nullable=True)

    topics = cl.clusters_of(Note.embedding)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        catalog.bind(connection, Note.__table__.c.embedding)
    with Session(engine) as session, session.begin():
        embed_on_flush(session)
        session.add_all(Note(id=n, body=f"{WORDS[n % 3]} {n // 30}") for n in range(60))
    cl.cluster(engine, topics, cl.KMeans(3))
    return topics


def write(engine: sa.Engine, first: int, number: int) -> None:
    """As a program does that knows nothing of vectors."""
    with engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO note (id, body) VALUES (:id, :body)"),
            [{"id": n, "body": f"{WORDS[n % 3]} new"} for n in range(first, first + number)],
        )


def test_a_worker_embeds_and_places_rows(
    engine: sa.Engine, notes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine a pass takes long, and the pause after it twenty times as long.
    monkeypatch.setattr("sbert_pg.clustering.assigning._MOST_TIME", 1.0)
    before = numbers_of(engine, notes)
    keeper = ClusterKeeper(engine, [notes], interval=0.05)
    with worker_thread(engine, companions=[keeper]):
        write(engine, 60, 30)
        wait_for(lambda: len(numbers_of(engine, notes)) == 90)
        with engine.begin() as connection:
            connection.execute(
                sa.text("UPDATE note SET body = :body WHERE id = 0"), {"body": WORDS[1]}
            )
        wait_for(lambda: numbers_of(engine, notes).get(0) == before[1])
    after = numbers_of(engine, notes)
    assert all(after[n] == before[n % 3] for n in range(60, 90))
    assert keeper.assigned >= 31


def test_refresh_places_rows_and_returns(engine: sa.Engine, notes: Any) -> None:
    write(engine, 60, 6)
    keeper = ClusterKeeper(engine, [notes])
    done = refresh(engine, companions=[keeper])
    assert (done.embedded, keeper.assigned) == (6, 6)
    assert len(numbers_of(engine, notes)) == 66


MODULE = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg.clustering import clusters_of
from sbert_pg.orm import embedding_column
from sbert_pg.registry import use_encoder
from sbert_pg.testing import DeterministicEncoder

use_encoder(DeterministicEncoder())


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    embedding = embedding_column("deterministic", "body", dimensions=384, nullable=True)


class Plain(DeclarativeBase):
    pass


topics = clusters_of(Note.embedding)
"""


def test_the_command_places_rows(
    engine: sa.Engine, notes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "app_models.py").write_text(MODULE)
    write(engine, 60, 6)

    monkeypatch.syspath_prepend(str(tmp_path))

    def command(target: str) -> Result:
        return sbert_pg("worker", "--once", "--json", "--app", target, url=engine.url)

    done = command("app_models:Base")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["assigned"] == 6
    assert len(numbers_of(engine, notes)) == 66
    nothing = command("app_models:Plain")
    assert nothing.returncode == 1
    assert "clusters_of()" in nothing.stderr


def test_the_declarations_mean_a_tenant_by_the_search_path(
    engine: sa.Engine, notes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tenant_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("acme"))
        for table in ("note", *(table.name for table in notes.rows.metadata.sorted_tables)):
            connection.exec_driver_sql(f"ALTER TABLE IF EXISTS {table} SET SCHEMA acme")
    show = ("cluster", "show", "--runs", "--json", "--app", "tenant_models:Base")
    path = {"PGOPTIONS": "-csearch_path=acme,public"}
    shown = sbert_pg(*show, "note.embedding", url=engine.url, **path)
    assert shown.returncode == 0, shown.stderr
    assert len(json.loads(shown.stdout)) == 1
    refused = sbert_pg(*show, "acme.note.embedding", url=engine.url)
    assert refused.returncode == 1
    assert "PGOPTIONS" in refused.stderr


def test_nothing_is_done_where_nothing_was_written(engine: sa.Engine, app: Any) -> None:
    keeper = ClusterKeeper(engine, [app.topics])
    vectors, _ = blobs(60)
    app.fill(engine, vectors)
    assert keeper.look() == [], "there is no clustering yet"
    cl.cluster(engine, app.topics, cl.KMeans(5))
    assert keeper.look() == [cl.Assigned(0, 0, 0)]
    # Statistics of the first writes may still be under way.
    wait_for(lambda: keeper.look() == [])
    with engine.begin() as connection:
        connection.execute(sa.delete(app.row).where(app.row.id == 1))
        connection.execute(sa.insert(app.row).values(id=61, title="new", embedding=vectors[0]))
    wait_for(lambda: keeper.look() == [cl.Assigned(1, 0, 0)])
    # Another run is another place for every row.
    cl.cluster(engine, app.topics, cl.KMeans(5), seed=1)
    assert keeper.look() == [cl.Assigned(0, 0, 0)]
    with engine.connect() as busy, busy.begin():
        run = app.topics.run_table
        busy.execute(sa.select(run.c.id).where(run.c.is_current).with_for_update())
        connection_free = ClusterKeeper(engine, app.topics)
        assert connection_free.look() == [], "somebody else is at it"


def test_where_statistics_are_off_it_looks_each_time(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(60)
    app.fill(engine, vectors)
    cl.cluster(engine, app.topics, cl.KMeans(5))
    with engine.begin() as connection:
        name = connection.dialect.identifier_preparer.quote(str(engine.url.database))
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET track_counts = off")
    engine.dispose()
    keeper = ClusterKeeper(engine, [app.topics])
    assert [keeper.look() for _ in range(3)] == [[cl.Assigned(0, 0, 0)]] * 3


def test_what_is_refused_and_stale_is_said_once(
    engine: sa.Engine, app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    vectors, _ = blobs(100)
    app.fill(engine, vectors)
    keeper = ClusterKeeper(engine, [app.topics])
    cl.cluster(engine, app.topics, cl.KMeans(5), where=app.row.id <= 90)
    with caplog.at_level(logging.INFO, "sbert_pg.clustering"):
        assert keeper.look() == keeper.look() == []
    (refused,) = caplog.records
    assert "made with the filter" in refused.fields["error"]  # type: ignore[attr-defined]
    caplog.clear()
    cl.cluster(engine, app.topics, cl.KMeans(5))
    far = np.zeros((40, helpers.DIMENSIONS))
    far[:, 12] = 1
    with engine.begin() as connection:
        connection.execute(
            sa.insert(app.row),
            [{"id": 101 + n, "title": "far", "embedding": v} for n, v in enumerate(far)],
        )
    with caplog.at_level(logging.INFO, "sbert_pg.clustering"):
        assert keeper.look() == [cl.Assigned(40, 0, 0)]
        with engine.begin() as connection:
            connection.execute(sa.delete(app.row).where(app.row.id == 1))
        wait_for(lambda: keeper.look() != [])
    said = [record.getMessage() for record in caplog.records]
    assert said.count("It is time to cluster again") == 1
    assert "Placed rows in clusters" in said


def test_writes_to_partitions_are_noticed(engine: sa.Engine) -> None:
    table = sa.Table(
        "event",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        postgresql_partition_by="RANGE (id)",
    )
    with engine.begin() as connection:
        table.create(connection)
        connection.exec_driver_sql(
            "CREATE TABLE event_1 PARTITION OF event FOR VALUES FROM (0) TO (100)"
        )

    def count() -> int | None:
        with engine.begin() as connection:
            return written(connection, table)

    assert count() == 0
    with engine.begin() as connection:
        connection.execute(sa.insert(table), [{"id": n} for n in range(5)])
        connection.execute(sa.delete(table).where(table.c.id == 1))
    wait_for(lambda: count() == 6)


def test_a_run_without_a_process_is_failed(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(60)
    app.fill(engine, vectors)
    cl.cluster(engine, app.topics, cl.KMeans(5))
    run = app.topics.run_table
    with engine.begin() as connection:
        connection.execute(
            sa.insert(run).values(
                column_name="embedding", algorithm="kmeans", parameters={}, seed=0,
                metric="cosine", state="running",
            )
        )  # fmt: skip
    ClusterKeeper(engine, app.topics).look()
    with engine.connect() as connection:
        assert list(connection.scalars(sa.select(run.c.state).order_by(run.c.id))) == [
            "done",
            "failed",
        ]
