"""A change of encoder by an engine of another driver than psycopg 3, from its begin to its end."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa
from other_drivers import url_of

from sbert_pg import Source, catalog, create_all, errors, registry
from sbert_pg import reembed as ree
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.freshness import backfill, worker_thread
from sbert_pg.search import nearest
from sbert_pg.system import ColumnIdentity


@pytest.fixture(params=["psycopg2", "pg8000"])
def other(world, request):
    engine = sa.create_engine(url_of(world.engine.url, request.param))
    yield engine
    engine.dispose()


def test_the_whole_way(world, other):
    world.create(60)
    request = ree.request_of(world.new_table.c.embedding_new)
    old, new = world.old_table.c.embedding, world.new_table.c.embedding_new
    with world.engine.connect() as holder:
        holder.execute(sa.text("select count(*) from articles"))
        with pytest.raises(errors.TableBusyError, match=r"held by: process \d+"):
            ree.begin(other, request, lock_timeout=0.1, attempts=2)
    ree.begin(other, request)
    with pytest.raises(errors.BackfillIncompleteError, match="60 rows have no vector yet"):
        ree.finish(other, world.new_column)
    world.fill()
    assert ree.build_indexes(other, world.new_column) == ["ix_articles_embedding_new"]
    assert ree.verify(other, world.new_column, sample_size=10).passed
    with other.connect() as connection:
        connection.execute(nearest(old, "t3", limit=3)).all()
        # Else the server may count the scan a second later, in the middle of the last finish.
        connection.execute(sa.text("SELECT pg_stat_force_next_flush()"))
        connection.rollback()
    with pytest.raises(errors.StillInUseError, match="searched it"):
        ree.finish(other, world.new_column)
    quiet = dt.timedelta(0)
    with world.engine.connect() as holder:
        holder.execute(sa.text("select count(*) from articles"))
        with pytest.raises(errors.TableBusyError, match=r"held by: process \d+"):
            ree.finish(other, world.new_column, quiet=quiet, lock_timeout=0.1, attempts=2)
    assert "embedding" in world.columns()
    assert ree.finish(other, world.new_column, quiet=quiet) is True
    assert world.columns() == ["id", "title", "body", "lang", "embedding_new"]
    with other.connect() as connection:
        assert connection.execute(nearest(new, "t7", limit=1)).one().title == "t7"


def test_giving_up(world, other):
    world.create(10)
    ree.begin(other, ree.request_of(world.new_table.c.embedding_new))
    with world.engine.connect() as holder:
        holder.execute(sa.text("select count(*) from articles"))
        with pytest.raises(errors.TableBusyError):
            ree.abort(other, world.new_column, lock_timeout=0.1, attempts=2)
    assert ree.abort(other, world.new_column) is True
    assert "embedding_new" not in world.columns()


@pytest.mark.parametrize("name", ["it's", 'a%s"b', "a\\'"])
def test_names_and_templates_that_a_driver_has_to_quote(world, other, name):
    """pg8000 reads statements by itself: a backslash in a literal made it lose its place."""
    source = Source.template(f"{name}{{body}}\\")
    table = sa.Table(
        name,
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("body", sa.Text),
        sa.Column(f"{name}e", Embedding(world.old.spec, source)),
    )
    column = table.c[f"{name}e"]
    with other.begin() as connection:
        create_all(connection, table.metadata)
        rows = sa.table(name, sa.column("id"), sa.column("body"))
        connection.execute(sa.insert(rows), [{"id": 1, "body": "a"}])
    backfill(world.engine, ColumnIdentity(None, name, column.name))
    with other.connect() as connection:
        binding = catalog.require_binding(connection, column)
        bound = binding.clause()
        stale = sa.select(bound.c.id).where(binding.is_stale(bound), bound.c.id >= sa.literal(0))
        assert connection.execute(stale).all() == []
        assert len(connection.execute(nearest(column, f"{name}a\\", limit=3)).all()) == 1


@pytest.mark.parametrize("driver", ["pg8000", "asyncpg"])
def test_what_needs_psycopg_is_refused_at_once(world, driver):
    engine = sa.create_engine(url_of(world.engine.url, driver))
    with pytest.raises(errors.DeclarationError, match=r"psycopg 3|synchronous engine"):
        backfill(engine, world.old_column)
    with pytest.raises(errors.DeclarationError, match=r"psycopg 3|synchronous engine"):
        worker_thread(engine).__enter__()
    engine.dispose()
    assert registry.get_encoder(world.old.spec) is world.old
