"""Expand, backfill, verify, contract and abort on a real server, one step after the other."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa

from sbert_pg import catalog, errors
from sbert_pg import reembedding as ree
from sbert_pg.search import nearest
from sbert_pg.types.guard import ColumnIdentity

QUIET = dt.timedelta(0)


def request(world):
    return ree.request_of(world.new_table.c.embedding_new)


def snapshot(world) -> dict[str, object]:
    """All that a change could leave behind."""
    with world.engine.connect() as connection:

        def rows(statement: str) -> list[object]:
            return [tuple(row) for row in connection.execute(sa.text(statement))]

        return {
            "columns": rows(
                "select attname, atttypid from pg_attribute where attrelid = 'articles'::regclass "
                "and attnum > 0 and not attisdropped order by attnum"
            ),
            "indexes": rows(
                "select indexdef from pg_indexes where tablename = 'articles' order by 1"
            ),
            "triggers": rows(
                "select tgname from pg_trigger where tgrelid = 'articles'::regclass order by 1"
            ),
            "functions": rows(
                "select proname from pg_proc where pronamespace = 'sbert'::regnamespace order by 1"
            ),
            "bindings": rows(
                "select column_name, replaces_id, state from sbert.embedding_column order by id"
            ),
            "encoders": rows("select fingerprint from sbert.encoder order by 1"),
            "pending": rows("select * from sbert.pending order by 1, 2"),
            "backfill": rows("select * from sbert.backfill order by 1"),
            "writers": rows("select * from sbert.old_writer order by 1"),
        }


def test_the_whole_way(world):
    world.create(300)
    ree.start(world.engine, request(world))
    status = ree.status(world.engine, world.new_column)
    assert status.state == "expanded"
    assert status.facts.coverage.late == 300
    with pytest.raises(errors.BackfillIncompleteError, match="300 of 300 rows"):
        ree.finish(world.engine, world.new_column, quiet=QUIET)
    world.fill()
    assert ree.status(world.engine, world.old_column).state == "filled"
    with pytest.raises(errors.BackfillIncompleteError, match="has an index"):
        ree.finish(world.engine, world.new_column, quiet=QUIET)
    assert ree.build_indexes(world.engine, world.new_column) == ["ix_articles_embedding_new"]
    assert ree.status(world.engine, world.new_column).state == "ready"
    report = ree.verify(world.engine, world.new_column, sample_size=40)
    assert report.passed, report
    assert ree.finish(world.engine, world.new_column, quiet=QUIET) is True
    assert ree.finish(world.engine, world.new_column, quiet=QUIET) is False
    assert world.columns() == ["id", "title", "body", "lang", "embedding_new"]
    with world.engine.connect() as connection:
        (binding,) = catalog.all_bindings(connection)
        assert (binding.column, binding.replaces, binding.state) == (
            "embedding_new",
            None,
            "active",
        )
        hit = connection.execute(nearest(world.new_table.c.embedding_new, "t7", limit=1)).one()
        assert hit.title == "t7"


def test_rows_that_were_just_marked_do_not_make_a_new_column_ready(world):
    """A migration may mark all rows pending and a deployment follow in the same minute."""
    world.create(120)
    ree.start(world.engine, request(world))
    with world.engine.begin() as connection:
        binding = catalog.binding_of(connection, world.new_column)
        assert binding is not None
        connection.execute(sa.select(sa.func.sbert.mark_pending_v1(binding.id, sa.false())))

    def ready() -> None:
        ree.assert_ready(world.engine, world.new_table.c.embedding_new)

    def complete() -> None:
        with world.engine.connect() as connection:
            ree.require_complete(connection, world.new_column)

    for count in (120, 60):
        with pytest.raises(errors.BackfillIncompleteError, match=f"{count} of 120 rows"):
            ready()
        with pytest.raises(errors.BackfillIncompleteError, match=f"{count} of 120 rows"):
            complete()
        assert ree.status(world.engine, world.new_column).state == "expanded"
        assert world.fill("embedding_new", limit=60) == 60
    assert ree.build_indexes(world.engine, world.new_column) == ["ix_articles_embedding_new"]
    ready()
    # An application that writes texts alone has a few such rows at any moment.
    with world.engine.begin() as connection:
        rows = [{"title": "new", "body": f"just written {i}"} for i in range(9)]
        values = world.new_table.insert().values({"id": sa.bindparam("number")})
        connection.execute(values, [{**row, "number": 1000 + i} for i, row in enumerate(rows)])
    ready()
    complete()
    assert ree.status(world.engine, world.new_column).state == "ready"


def test_the_index_is_like_the_old_one(world):
    world.create(50)
    ree.start(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    with world.engine.connect() as connection:
        (index,) = ree.vector_indexes(connection, "articles", "embedding_new")
    assert (index.method, index.opclass, index.options) == (
        "hnsw", "vector_cosine_ops", {"m": 8, "ef_construction": 64},
    )  # fmt: skip
    assert index.valid
    assert not index.building


@pytest.mark.parametrize("filled", [0, 100, 300])
@pytest.mark.parametrize("indexed", [False, True])
def test_abort_leaves_no_trace(world, filled, indexed):
    world.create(300)
    world.fill("embedding")
    before = snapshot(world)
    ree.start(world.engine, request(world))
    assert snapshot(world) != before
    if filled:
        world.fill("embedding_new", limit=filled)
    if indexed:
        ree.build_indexes(world.engine, world.new_column)
    assert ree.abort(world.engine, world.new_column) is True
    assert snapshot(world) == before
    assert ree.abort(world.engine, world.new_column) is False


def test_abort_does_not_touch_a_column_that_replaces_nothing(world):
    world.create(3)
    with pytest.raises(errors.ReembeddingError, match="replaces no column"):
        ree.abort(world.engine, world.old_column)
    ree.start(world.engine, request(world))
    with pytest.raises(errors.ReembeddingError, match="its replacement is 'embedding_new'"):
        ree.abort(world.engine, world.old_column)


def test_starting_again_changes_nothing(world):
    world.create(10)
    first = ree.start(world.engine, request(world))
    before = snapshot(world)
    assert ree.start(world.engine, request(world)).id == first.id
    assert snapshot(world) == before


def test_a_second_change_has_to_wait(world):
    world.create(10)
    ree.start(world.engine, request(world))
    other = ree.Request(old=world.old_column, new="third", encoder=world.new.spec)
    with pytest.raises(errors.AlreadyBoundError, match="replaced by column 'embedding_new'"):
        ree.start(world.engine, other)


def test_a_column_in_the_way_is_refused(world):
    world.create(10)
    with world.engine.begin() as connection:
        connection.execute(sa.text("alter table articles add embedding_new vector(7)"))
    with pytest.raises(errors.DimensionError, match="Choose another name"):
        ree.start(world.engine, request(world))
    with world.engine.begin() as connection:
        connection.execute(sa.text("alter table articles drop embedding_new"))
        connection.execute(sa.text("alter table articles add embedding_new vector(48)"))
        vector = "[" + ",".join(["1"] * 48) + "]"
        connection.execute(
            sa.text("update articles set embedding_new = :v where id = 1"), {"v": vector}
        )
    with pytest.raises(errors.ReembeddingError, match="holds vectors and is bound to no encoder"):
        ree.start(world.engine, request(world))
    with world.engine.begin() as connection:
        connection.execute(sa.text("update articles set embedding_new = null"))
    ree.start(world.engine, request(world))


def test_an_unbound_column_is_named(world):
    world.create(1)
    nothing = ColumnIdentity(None, "articles", "title")
    with pytest.raises(errors.NotBoundError, match="title"):
        ree.status(world.engine, nothing)
    with pytest.raises(errors.ReembeddingError, match="replaces no column and none replaces it"):
        ree.status(world.engine, world.old_column)


def test_both_columns_stay_fresh_whoever_writes(world):
    """Why rolling back is nothing but deploying the old code."""
    world.create(20)
    world.fill()
    ree.start(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    with world.engine.begin() as connection:
        # The old version of the code, which knows nothing of the new column.
        connection.execute(
            world.old_table.update().where(world.old_table.c.id == 1).values(
                body="old writer", embedding=world.old.encode_document(["t0\n\nold writer"])[0])
        )  # fmt: skip
        # The new version, which knows nothing of the old one.
        connection.execute(
            world.new_table.update().where(world.new_table.c.id == 2).values(
                body="new writer", embedding_new=world.new.encode_document(["t1\n\nnew writer"])[0])
        )  # fmt: skip
        connection.execute(
            world.new_table.insert().values(
                id=21, body="new row", embedding_new=world.new.encode_document(["new row"])[0])
        )  # fmt: skip
        # Somebody with psql.
        connection.execute(sa.text("update articles set body = 'plain' where id = 3"))
    with world.engine.connect() as connection:
        marks = connection.execute(
            sa.text(
                "select c.column_name, p.key from sbert.pending p "
                "join sbert.embedding_column c on c.id = p.column_id order by 1, 2"
            )
        ).all()
    assert [tuple(mark) for mark in marks] == [
        ("embedding", "2"), ("embedding", "21"), ("embedding", "3"),
        ("embedding_new", "1"), ("embedding_new", "3"),
    ]  # fmt: skip
    world.fill()
    for table, column, encoder in (
        (world.old_table, "embedding", world.old),
        (world.new_table, "embedding_new", world.new),
    ):
        with world.engine.connect() as connection:
            rows = connection.execute(sa.select(table.c.title, table.c.body, table.c[column])).all()
        wanted = encoder.encode_document(
            ["\n\n".join(part for part in (row.title, row.body) if part) for row in rows]
        )
        for row, vector in zip(rows, wanted, strict=True):
            assert row[2] @ vector > 0.999999, (column, row.body)


class TestStillInUse:
    @pytest.fixture
    def ready(self, world):
        world.create(50)
        world.fill()
        ree.start(world.engine, request(world))
        world.fill()
        ree.build_indexes(world.engine, world.new_column)
        return world

    def test_old_version_writers(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("set local application_name = 'web-7'"))
            connection.execute(
                ready.old_table.update().where(ready.old_table.c.id == 1).values(
                    body="x", embedding=ready.old.encode_document(["t0\n\nx"])[0])
            )  # fmt: skip
        with pytest.raises(errors.StillInUseError, match=r"wrote it, the last \(web-7"):
            ree.finish(ready.engine, ready.new_column)
        assert "embedding" in ready.columns()
        assert ree.finish(ready.engine, ready.new_column, force=True) is True
        assert "embedding" not in ready.columns()

    def test_the_worker_is_no_old_version(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("update articles set body = 'plain' where id < 9"))
        ready.fill()
        assert ree.status(ready.engine, ready.new_column).usage.writers == ()
        assert ree.finish(ready.engine, ready.new_column) is True

    def test_scans_of_the_old_index(self, ready):
        with ready.engine.connect() as connection:
            connection.execute(sa.text("set enable_seqscan = off"))
            connection.execute(sa.text("set enable_sort = off"))
            vector = ready.old.encode_document(["t3"])[0]
            connection.execute(nearest(ready.old_table.c.embedding, vector, limit=3)).all()
        ready.engine.dispose()  # A backend reports what it counted when it is idle, or ends.
        with pytest.raises(errors.StillInUseError, match="ix_articles_embedding was scanned"):
            ree.finish(ready.engine, ready.new_column)
        assert ree.finish(ready.engine, ready.new_column, quiet=QUIET) is True

    def test_rows_that_just_came_do_not_hold_it_up(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("insert into articles (id, body) values (999, 'fresh')"))
        assert ree.finish(ready.engine, ready.new_column) is True
        with ready.engine.connect() as connection:
            assert connection.execute(
                sa.text("select key from sbert.pending")).scalars().all() == ["999"]  # fmt: skip

    def test_rows_that_wait_for_long_do(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("insert into articles (id, body) values (999, 'fresh')"))
            connection.execute(
                sa.text("update sbert.pending set marked_at = now() - interval '1 h'")
            )
        with pytest.raises(errors.BackfillIncompleteError, match="1 of 51"):
            ree.finish(ready.engine, ready.new_column)

    def test_failed_rows_do_unless_allowed(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("insert into articles (id, body) values (999, 'bad')"))
            connection.execute(sa.text("update sbert.pending set failed = true"))
        with pytest.raises(errors.BackfillIncompleteError, match="could not be encoded"):
            ree.finish(ready.engine, ready.new_column)
        assert ree.finish(ready.engine, ready.new_column, max_failed=1) is True
