"""A table as a source and a sink of Ray Data: the tasks themselves, and on a real cluster."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from replica import replica_of
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import Vector, create_all, embedding_column, hnsw_index, load
from sbert_pg.errors import DeclarationError
from sbert_pg.freshness import status
from sbert_pg.registry import use_encoder
from sbert_pg.testing import DeterministicEncoder

pytest.importorskip("ray.data", reason="Ray Data is not here", exc_type=ImportError)
pa = pytest.importorskip("pyarrow")

import ray  # noqa: E402
from ray.data.block import BlockAccessor  # noqa: E402

from sbert_pg.adapters.ray_data import TableDatasink, table_source  # noqa: E402

ROWS = 3_000


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    __table_args__ = (hnsw_index("note_embedding", "embedding"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    text_: Mapped[str] = mapped_column("body")
    score: Mapped[float | None]
    code: Mapped[Any] = mapped_column(sa.Uuid, server_default=sa.func.gen_random_uuid())
    embedding = embedding_column("deterministic", source="body", dimensions=32)


def register() -> None:
    """Registers the encoder in a process of Ray's."""
    use_encoder(DeterministicEncoder(dimensions=32))


@pytest.fixture
def notes(engine: sa.Engine) -> sa.Engine:
    register()
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
        given = ({"id": n, "text_": f"text {n}", "score": n / 2 or None} for n in range(ROWS))
        load(connection, Note, given)
    return engine


def read(source: Any, parallelism: int) -> Any:
    """What the tasks give, run one after the other, as they travel to another process."""
    tasks = [pickle.loads(pickle.dumps(task)) for task in source.get_read_tasks(parallelism)]
    return tasks, pa.concat_tables(block for task in tasks for block in task())


def vectors_of(table: Any, name: str = "embedding") -> Any:
    return BlockAccessor.for_block(table.select([name])).to_numpy(name)


def test_ranges_are_the_table_at_one_moment(
    notes: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with table_source(notes, Note) as source:
        (task,) = source.get_read_tasks(200)  # A small table is not worth more.
        assert task.metadata.size_bytes == source.estimate_inmemory_data_size()
    monkeypatch.setattr("sbert_pg.adapters.ray_data._LEAST_BYTES", 1)
    with table_source(notes, Note) as source:
        with notes.begin() as connection:
            connection.execute(sa.text("DELETE FROM note WHERE id < 500"))
            connection.execute(sa.text("UPDATE note SET body = 'changed'"))
            load(connection, Note, [{"id": ROWS, "text_": "later", "score": None}])
        tasks, table = read(source, 7)
        assert 5 <= len(tasks) <= 8
        assert source.estimate_inmemory_data_size() > 32 * 4 * ROWS
        assert abs(sum(t.metadata.size_bytes for t in tasks) - 32 * 4 * ROWS) < 40 * 4 * ROWS
    assert sorted(table["id"].to_pylist()) == list(range(ROWS))
    texts = table["text_"].to_pylist()
    assert set(texts) == {f"text {n}" for n in range(ROWS)}
    assert (table["score"].null_count, table["code"].type) == (1, pa.string())
    expected = DeterministicEncoder(dimensions=32).encode_document(texts)
    np.testing.assert_allclose(vectors_of(table), expected, atol=1e-6)


def test_a_read_after_the_block_is_refused(notes: sa.Engine) -> None:
    with table_source(notes, Note, ["id"]) as source:
        (task, *_) = source.get_read_tasks(1)
    with pytest.raises(DeclarationError, match="inside its `with` block"):
        list(task())
    with (
        pytest.raises(DeclarationError, match="no column 'body'"),
        table_source(notes, Note, ["body"]),
    ):
        pass


def test_partitions_half_precision_and_rows_without_a_vector(engine: sa.Engine) -> None:
    from sbert_pg import HalfVector

    metadata = sa.MetaData()
    table = sa.Table(
        "Parted",
        metadata,
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("v", HalfVector(4)),
        postgresql_partition_by="HASH (id)",
    )
    with engine.begin() as connection:
        metadata.create_all(connection)
        for n in range(3):
            connection.exec_driver_sql(
                f'CREATE TABLE part_{n} PARTITION OF "Parted" '
                f"FOR VALUES WITH (MODULUS 3, REMAINDER {n})"
            )
        connection.execute(
            table.insert(),
            [{"id": n, "v": None if n == 5 else [n, 1, 2, 0.5]} for n in range(100)],
        )
    with table_source(engine, table) as source:
        tasks, found = read(source, 2)
    assert len(tasks) == 3
    order = np.argsort(found["id"].to_numpy())
    vectors = vectors_of(found, "v")[order]
    assert vectors.dtype == np.float32
    assert np.isnan(vectors[5]).all()
    assert vectors[7].tolist() == [7, 1, 2, 0.5]


def blocks(texts: list[str], vectors: Any = None, listed: Any = None) -> list[Any]:
    columns: dict[str, Any] = {"id": np.arange(len(texts)), "text_": np.array(texts)}
    if vectors is not None:
        columns["embedding"] = vectors
    block = BlockAccessor.batch_to_arrow_block(columns)
    if listed is not None:
        type_ = pa.list_(pa.float32()) if listed == "list" else pa.list_(pa.float32(), 32)
        lists = pa.array([row.tolist() for row in vectors], type_)
        block = block.set_column(2, "embedding", lists)
    return [block.slice(0, 700), block.slice(700)]


@pytest.mark.parametrize("given", ["tensor", "list", "fixed list", "nothing"])
def test_blocks_are_written_once_however_often(notes: sa.Engine, given: str) -> None:
    """As a task is that Ray tries again; every row is fresh, by vectors given or made there."""
    texts = [f"new {n}" for n in range(1000)]
    vectors = DeterministicEncoder(dimensions=32).encode_document(texts)
    brought = None if given == "nothing" else vectors
    made = blocks(texts, brought, None if given in ("tensor", "nothing") else given)
    sink = pickle.loads(pickle.dumps(TableDatasink(notes, Note, setup=register)))
    assert sink.write(made, None) == 1000
    query = sa.text("SELECT id, CAST(ctid AS text), body, embedding FROM note ORDER BY id").columns(
        embedding=Vector(32)
    )
    with notes.connect() as connection:
        before = connection.execute(query).all()
    assert sink.write(made, None) == 1000
    with notes.connect() as connection:
        after = connection.execute(query).all()
        (column,) = status(connection)
    assert [row[:3] for row in after] == [row[:3] for row in before]
    assert len(after) == ROWS
    assert [row.body for row in after[:1000]] == texts
    np.testing.assert_allclose(
        np.stack([row.embedding for row in after[:1000]]), vectors, atol=1e-6
    )
    assert (column.pending, column.failed) == (0, 0)


def test_a_replica_is_read(notes: sa.Engine, request: pytest.FixtureRequest) -> None:
    with replica_of(request) as replica:
        replica.follow(notes)
        standby = sa.create_engine(replica.url(notes.url), poolclass=sa.NullPool)
        with table_source(standby, Note, ["id", "text_"]) as source:
            with notes.begin() as connection:
                connection.execute(sa.text("DELETE FROM note WHERE id < 500"))
            replica.follow(notes)
            _, table = read(source, 3)
    assert sorted(table["id"].to_pylist()) == list(range(ROWS))


def test_blocks_of_a_task_have_the_same_columns(notes: sa.Engine) -> None:
    sink = TableDatasink(notes, Note, setup=register)
    first, second = blocks([f"new {n}" for n in range(701)])
    empty = first.slice(0, 0).select(["id"])
    assert sink.write([empty, first, second.select(["text_", "id"])], None) == 701
    assert sink.write([empty], None) == 0
    with pytest.raises(DeclarationError, match="the first of its task has id, text_"):
        sink.write([first, second.select(["id"])], None)


def test_a_sink_says_what_becomes_of_rows(notes: sa.Engine) -> None:
    with pytest.raises(DeclarationError, match="'replace' or 'keep'"):
        TableDatasink(notes, Note, existing="refuse")
    keep = TableDatasink(notes, Note, existing="keep", setup=register)
    keep.write(blocks(["other"] * 10), None)
    with notes.connect() as connection:
        assert connection.scalar(sa.text("SELECT body FROM note WHERE id = 3")) == "text 3"


@pytest.fixture
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray starts its processes at 15, where beside other tests they hardly run.
        patch.setenv("RAY_worker_niceness", "0")
        path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
        patch.setenv("PYTHONPATH", path)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            object_store_memory=100_000_000,
        )
        yield
        ray.shutdown()


# A cluster takes as long to start as it likes, or does not, where others need the machine.
@pytest.mark.slow
def test_from_a_table_to_parquet_and_back(notes: sa.Engine, cluster: None, tmp_path: Any) -> None:
    with table_source(notes, Note, ["id", "text_", "embedding"]) as source:
        ray.data.read_datasource(source, override_num_blocks=4).write_parquet(str(tmp_path))
    with notes.begin() as connection:
        connection.execute(sa.text("DELETE FROM note WHERE id >= 1000"))
    sink = TableDatasink(notes, Note.__table__, setup=register)
    dataset = ray.data.read_parquet(str(tmp_path)).rename_columns({"text_": "body"})
    dataset.write_datasink(sink)
    assert sink.rows == ROWS
    with notes.connect() as connection:
        rows = connection.execute(sa.select(Note.text_, Note.__table__.c.embedding)).all()
        (column,) = status(connection)
    assert len(rows) == ROWS
    assert (column.pending, column.backfill) == (0, 0)
    expected = DeterministicEncoder(dimensions=32).encode_document([row[0] for row in rows])
    np.testing.assert_allclose(np.stack([row[1] for row in rows]), expected, atol=1e-6)
