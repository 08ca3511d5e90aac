"""Vector indexes of partitioned tables: built on each partition, attached, searched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg import Vector, hnsw_index, nearest
from sbert_pg.errors import StepStoppedError
from sbert_pg.indexes import build_index, index_builder, vector_indexes
from sbert_pg.types.indexed import description_of

DIMENSIONS, ROWS = 16, 2_400
#: How the table is partitioned, and its partitions.
KINDS: dict[str, tuple[str, list[str]]] = {
    "range": (
        "RANGE (id)",
        [
            'CREATE TABLE "p 0" PARTITION OF "it em" FOR VALUES FROM (0) TO (1200)',
            'CREATE TABLE p1 PARTITION OF "it em" FOR VALUES FROM (1200) TO (9000)',
        ],
    ),
    "list, and hash below": (
        "LIST (topic)",
        [
            'CREATE TABLE p0 PARTITION OF "it em" FOR VALUES IN (0, 1)',
            'CREATE TABLE p1 PARTITION OF "it em" FOR VALUES IN (2) PARTITION BY HASH (id)',
            "CREATE TABLE p10 PARTITION OF p1 FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
            'CREATE TABLE "P 11" PARTITION OF p1 FOR VALUES WITH (MODULUS 2, REMAINDER 1)',
        ],
    ),
    "hash": (
        "HASH (id)",
        [
            f'CREATE TABLE p{n} PARTITION OF "it em" FOR VALUES WITH (MODULUS 3, REMAINDER {n})'
            for n in range(3)
        ],
    ),
}


def item(kind: str) -> sa.Table:
    return sa.Table(
        "it em",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("topic", sa.Integer, primary_key=True),
        sa.Column("vec", Vector(DIMENSIONS)),
        postgresql_partition_by=KINDS[kind][0],
    )


def vectors() -> Any:
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((12, DIMENSIONS), dtype=np.float32)
    return centres[np.arange(ROWS) % 12] + 0.7 * rng.standard_normal(
        (ROWS, DIMENSIONS), dtype=np.float32
    )


def filled(url: sa.URL, kind: str) -> tuple[sa.Engine, sa.Table]:
    engine, table = sa.create_engine(url), item(kind)
    with engine.begin() as connection:
        table.create(connection)
        for statement in KINDS[kind][1]:
            connection.exec_driver_sql(statement)
        rows = [{"id": n, "topic": n % 3, "vec": v} for n, v in enumerate(vectors())]
        connection.execute(table.insert(), rows)
        connection.exec_driver_sql("ANALYZE")
    return engine, table


def leaves(engine: sa.Engine) -> int:
    """Partitions with rows that have a valid HNSW index."""
    with engine.connect() as connection:
        return int(
            connection.scalar(
                sa.text(
                    "SELECT count(*) FROM pg_index JOIN pg_class c ON c.oid = indexrelid "
                    "JOIN pg_am ON pg_am.oid = relam "
                    "WHERE amname = 'hnsw' AND relkind = 'i' AND indisvalid"
                )
            )
            or 0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_built_searched_pruned_and_dropped(bare_database_url: sa.URL, kind: str) -> None:
    engine, table = filled(bare_database_url, kind)
    index = hnsw_index("item vec", table.c.vec)
    assert build_index(engine, index)
    parts = sum("PARTITION BY" not in statement for statement in KINDS[kind][1])
    assert leaves(engine) == parts
    assert not build_index(engine, index)
    shares = []
    with engine.connect() as connection:
        (stored,) = vector_indexes(connection, "it em")
        assert stored.valid
        # As for partitions that are large.
        connection.exec_driver_sql("SET enable_seqscan = off")
        for n in range(12):
            query = vectors()[n] * 1.01
            for filters in ([], [table.c.topic == 2], [table.c.id < 900]):
                found = [
                    {
                        row.id
                        for row in connection.execute(
                            nearest(table.c.vec, query, exact=exact).where(*filters)
                        )
                    }
                    for exact in (False, True)
                ]
                assert len(found[0]) == 10
                shares.append(len(found[0] & found[1]) / 10)
        plan = _plan(connection, nearest(table.c.vec, vectors()[0]))
        assert plan.count("Index Scan using") >= parts
    assert np.mean(shares) >= 0.98
    alone = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with alone as connection, index_builder(connection, "it em") as builder:
        builder.drop("item vec")
    assert leaves(engine) == 0
    engine.dispose()


def _plan(connection: sa.Connection, statement: Any) -> str:
    written = {"render_postcompile": True}
    compiled = statement.compile(connection, compile_kwargs=written)
    return "\n".join(connection.exec_driver_sql(f"EXPLAIN {compiled}", compiled.params).scalars())


def test_a_filter_by_the_key_leaves_one_partition(bare_database_url: sa.URL) -> None:
    engine, table = filled(bare_database_url, "list, and hash below")
    build_index(engine, hnsw_index("item vec", table.c.vec))
    with engine.connect() as connection:
        compared = nearest(table.c.vec, vectors()[0], exact=True).where(table.c.topic == 0)
        plan = _plan(connection, compared)
    assert " p0" in plan
    assert " p10" not in plan
    engine.dispose()


def test_a_build_that_was_ended_is_completed(bare_database_url: sa.URL) -> None:
    """What is built is kept: by a second call, and by a migration's replacement."""
    engine, table = filled(bare_database_url, "hash")
    index = hnsw_index("item vec", table.c.vec, ef_construction=128)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            'CREATE INDEX "item vec" ON ONLY "it em" USING hnsw (vec vector_cosine_ops) '
            "WITH (m = 16, ef_construction = 128)"
        )
        connection.exec_driver_sql(
            "CREATE INDEX one ON p1 USING hnsw (vec vector_cosine_ops) "
            "WITH (m = 16, ef_construction = 128)"
        )
        connection.exec_driver_sql('ALTER INDEX "item vec" ATTACH PARTITION one')
    description = description_of(index)
    assert description is not None
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with index_builder(connection, "it em") as builder:
            assert builder.state("item vec") == "invalid"
            assert builder.replace(description)
            assert builder.state("item vec") == "valid"
            assert not builder.replace(description)
        assert connection.scalar(sa.text("SELECT to_regclass('one') IS NOT NULL"))
    assert leaves(engine) == 3
    wider = hnsw_index("item vec", item("hash").c.vec, m=8)
    other = description_of(wider)
    assert other is not None
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with index_builder(connection, "it em") as builder:
            assert builder.replace(other)
        (stored,) = vector_indexes(connection, "it em")
    assert (stored.name, stored.valid, stored.options["m"]) == ("item vec", True, 8)
    assert leaves(engine) == 3
    engine.dispose()


def test_a_build_that_is_called_off(bare_database_url: sa.URL) -> None:
    import threading

    engine, table = filled(bare_database_url, "hash")
    index, stop = hnsw_index("item vec", table.c.vec), threading.Event()
    with engine.connect() as other:
        # A writer whom the build of a partition waits for, so that it can be called off meanwhile.
        other.exec_driver_sql("UPDATE p1 SET vec = vec WHERE id < 10")

        def said(*_: Any) -> None:
            stop.set()

        with pytest.raises(StepStoppedError, match="called off"):
            build_index(engine, index, on_progress=said, stop=stop)
        other.rollback()
    assert build_index(engine, index)
    assert leaves(engine) == 3
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("unique", [False, True])
def test_names_with_percent_signs_and_unique_indexes(
    bare_database_url: sa.URL, driver: str, unique: bool
) -> None:
    table = sa.Table(
        "5%'s",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("v%c", Vector(3)),
        postgresql_partition_by="RANGE (id)",
    )
    own = sa.Index('U%"', table.c.id, table.c["v%c"], unique=True)
    index = own if unique else hnsw_index('V%"', table.c["v%c"])
    table.indexes.clear()
    engine = sa.create_engine(bare_database_url.set(drivername=f"postgresql+{driver}"))
    with engine.begin() as connection:
        table.create(connection)
        for statement in (
            """CREATE TABLE "1%%" PARTITION OF "5%%'s" FOR VALUES FROM (0) TO (9)""",
            """CREATE TABLE "2%%" PARTITION OF "5%%'s" FOR VALUES FROM (9) TO (20)
            PARTITION BY RANGE (id)""",
            """CREATE TABLE "3%%" PARTITION OF "2%%" FOR VALUES FROM (9) TO (15)""",
        ):
            connection.execute(sa.DDL(statement))
    assert build_index(engine, index)
    assert not build_index(engine, index)
    valid = sa.text(
        "SELECT count(*) FROM pg_index WHERE indisvalid AND NOT indisprimary AND indisunique = :u "
        "AND indrelid::regclass::text IN ('\"5%''s\"', '\"1%\"', '\"2%\"', '\"3%\"')"
    )
    with engine.connect() as connection:
        assert connection.scalar(valid, {"u": unique}) == 4
    engine.dispose()
