"""Indexes built beside live traffic: time-outs, leftovers, other builders, interruption."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg import Vector, hnsw_index
from sbert_pg.errors import DeclarationError, StepStoppedError, TableBusyError
from sbert_pg.indexes import build_index, index_builder, index_state, vector_indexes
from sbert_pg.indexes.build import name_beside
from sbert_pg.system import name_of
from sbert_pg.types.indexed import VectorIndex, description_of

ROWS = 3_000
TIMEOUTS = ("statement_timeout", "lock_timeout", "transaction_timeout")


@pytest.fixture
def engine(bare_database_url: sa.URL) -> Iterator[sa.Engine]:
    engine = sa.create_engine(bare_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def table(engine: sa.Engine) -> sa.Table:
    made = sa.Table(
        "Thing's 100%",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("state", sa.Text),
        sa.Column("my vec", Vector(32), key="vec"),
    )
    vectors = np.random.default_rng(0).standard_normal((ROWS, 32)).astype("f4")
    with engine.begin() as connection:
        made.create(connection)
        rows = [{"vec": vector, "state": str(i % 7)} for i, vector in enumerate(vectors)]
        connection.execute(made.insert(), rows)
    return made


def queue_of(table: sa.Table) -> sa.Index:
    """A partial b-tree over an expression, as a queue of rows has it."""
    first = sa.cast(table.c.vec.is_(None), sa.Integer)
    return sa.Index("queue's 5%", first, table.c.id, postgresql_where=table.c.state == "5%")


def state(engine: sa.Engine, index: sa.Index) -> str:
    with engine.connect() as connection:
        assert index.table is not None
        relation = name_of(None, index.table.name)
        return index_state(connection, relation, str(index.name))


@pytest.mark.parametrize("make", [lambda table: hnsw_index("my ix", table.c.vec), queue_of])
def test_time_outs_of_the_session_do_not_end_a_build(
    make: Any, engine: sa.Engine, table: sa.Table
) -> None:
    index, waiting = make(table), threading.Event()
    with engine.begin() as connection:
        name = engine.dialect.identifier_preparer.quote(str(engine.url.database))
        for setting in TIMEOUTS:
            if setting != "transaction_timeout" or connection.dialect.server_version_info >= (17,):
                connection.exec_driver_sql(f"ALTER DATABASE {name} SET {setting} = '300ms'")
    # A transaction that is older than the build, which has to wait for it longer than that.
    with engine.connect() as older:
        older.exec_driver_sql("INSERT INTO \"Thing's 100%%\" (state) VALUES ('x')")
        end = threading.Timer(1.5, older.rollback)
        engine.dispose(close=False)
        end.start()
        assert build_index(engine, index, on_progress=lambda *_: waiting.set())
        end.join()
    assert waiting.is_set()
    assert state(engine, index) == "valid"
    assert not build_index(engine, index)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SHOW statement_timeout")) == "300ms"


@pytest.mark.parametrize("make", [lambda table: hnsw_index("my ix", table.c.vec), queue_of])
def test_invalid_index_is_replaced(make: Any, engine: sa.Engine, table: sa.Table) -> None:
    index = make(table)
    assert build_index(engine, index)
    with engine.begin() as connection:
        # What a killed build leaves behind.
        connection.exec_driver_sql(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = "
            "(SELECT oid FROM pg_class WHERE relname = %s)",
            (index.name,),
        )
    assert state(engine, index) == "invalid"
    assert build_index(engine, index)
    assert state(engine, index) == "valid"


def test_called_off_while_it_waits(engine: sa.Engine, table: sa.Table) -> None:
    """An older transaction is waited for without limit; calling off leaves nothing behind."""
    index, stop, seen = queue_of(table), threading.Event(), threading.Event()

    def progress(phase: str, done: int, total: int) -> None:
        if "waiting" in phase:
            seen.set()
            stop.set()

    with engine.connect() as reader:
        reader.exec_driver_sql("INSERT INTO \"Thing's 100%%\" (state) VALUES ('x')")
        with pytest.raises(StepStoppedError, match="called off"):
            build_index(engine, index, on_progress=progress, stop=stop)
        reader.rollback()
    assert seen.is_set()
    assert build_index(engine, index)


def test_another_session_that_builds_is_waited_for(engine: sa.Engine, table: sa.Table) -> None:
    index = queue_of(table)
    stop, waiting = threading.Event(), threading.Event()
    built: list[bool] = []
    first = threading.Thread(
        target=lambda: built.append(
            build_index(engine, index, on_progress=lambda *_: waiting.set(), stop=stop)
        )
    )
    with engine.connect() as reader:
        reader.exec_driver_sql("INSERT INTO \"Thing's 100%%\" (state) VALUES ('x')")
        first.start()
        assert waiting.wait(120)
        with pytest.raises(TableBusyError, match=r"Process \d+ is building"):
            build_index(engine, index)
        reader.rollback()
    assert not build_index(engine, index, wait=60)
    first.join(60)
    assert built == [True]


def test_needs_a_name_and_a_table(engine: sa.Engine, table: sa.Table) -> None:
    with pytest.raises(DeclarationError, match="name"):
        build_index(engine, sa.Index("alone", "id"))


def test_what_is_declared_is_what_is_read(engine: sa.Engine, table: sa.Table) -> None:
    """One description, whichever side it comes from."""
    declared = [
        hnsw_index("a", table.c.vec, m=8),
        hnsw_index("b", table.c.vec, form="halfvec", similarity="dot"),
        hnsw_index("c", table.c.vec, form="binary", where=sa.text("state = 'a%b:c'")),
        sa.Index("d", table.c.vec, postgresql_using="ivfflat"),
    ]
    for index in declared:
        assert build_index(engine, index)
    with engine.connect() as connection:
        stored = vector_indexes(connection, "Thing's 100%", "my vec")
        assert vector_indexes(connection, "Thing's 100%", "state") == ()
        assert vector_indexes(connection, "no such table") == ()
    assert [index.name for index in stored] == ["a", "b", "c", "d"]
    assert all(index.valid and not index.building for index in stored)
    for index, read in zip(declared, stored, strict=True):
        said = description_of(index)
        assert said is not None
        for detail in ("name", "table", "column", "method", "form", "similarity", "partial"):
            assert getattr(read, detail) == getattr(said, detail), detail
        assert read.effective_options == said.effective_options


def test_replacing_goes_on_where_it_was_ended(engine: sa.Engine, table: sa.Table) -> None:
    old = VectorIndex(name="ix", table=table.name, column="my vec", opclass="vector_cosine_ops")
    new = VectorIndex(
        name="ix", table=table.name, column="my vec", opclass="vector_ip_ops", options={"m": 8}
    )
    beside = name_beside("ix")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with index_builder(connection, table.name) as builder:
            assert builder.replace(old)
            assert not builder.replace(old)
            assert not builder.replace(new, keep_valid=True)
            # Ended after the build, and after the drop.
            for ended in ("built", "dropped"):
                assert builder.create(new.to_index(name=beside))
                if ended == "dropped":
                    builder.drop("ix")
                assert builder.replace(new)
                (stored,) = vector_indexes(connection, table.name)
                assert (stored.name, stored.opclass) == ("ix", "vector_ip_ops")
                assert builder.replace(old)
        assert connection.scalar(sa.text("SHOW lock_timeout")) == "0"


def test_a_schema_map_is_followed(engine: sa.Engine, table: sa.Table) -> None:
    tenant = engine.execution_options(schema_translate_map={None: "tenant"})
    with tenant.begin() as connection:
        connection.execute(sa.schema.CreateSchema("tenant"))
        table.create(connection)
    index = hnsw_index("of the tenant", table.c.vec)
    assert build_index(tenant, index)
    assert not build_index(tenant, index)
    with engine.connect() as connection:
        assert vector_indexes(connection, table.name) == ()
        (stored,) = vector_indexes(connection, table.name, schema="tenant")
        mapped = connection.execution_options(schema_translate_map={None: "tenant"})
        assert vector_indexes(mapped, table.name)[0].name == stored.name == "of the tenant"
