"""Begin, backfill, verify, finish and abort on a real server, one step after the other."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from ways import modules_of

from sbert_pg import catalog, create_all, errors
from sbert_pg import reembed as ree
from sbert_pg.alembic import register, statements
from sbert_pg.freshness import backfill, refresh, status
from sbert_pg.indexes import vector_indexes
from sbert_pg.reembed.finish import drop_bound_column, require_droppable
from sbert_pg.search import nearest
from sbert_pg.source import NIL, Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.sqlstates import translated
from sbert_pg.system import ColumnIdentity

QUIET = dt.timedelta(0)
#: Modules on the ways; they only go down.
FINISH, FINISH_BY_MIGRATION, REFRESH = 11, 15, 15


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
                "select column_name, companion, replaces_id, state from sbert.binding order by 1"
            ),
            "encoders": rows("select fingerprint from sbert.encoder order by 1"),
            "claims": rows("select * from sbert.claim order by 1"),
            "failures": rows("select * from sbert.failure order by 1"),
            "readers": rows("select * from sbert.reader order by 1"),
        }


def test_the_whole_way(world):
    world.create(300)
    ree.begin(world.engine, request(world))
    status = ree.status(world.engine, world.new_column)
    assert status.state == "filling"
    assert (status.coverage.rows, status.coverage.backfill) == (300, 300)
    with pytest.raises(errors.BackfillIncompleteError, match="300 rows have no vector yet"):
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


def test_rows_that_just_became_pending_do_not_make_a_new_column_ready(world):
    """A migration may make all rows pending and a deployment follow in the same minute."""
    world.create(120)
    ree.begin(world.engine, request(world))
    with world.engine.begin() as connection:
        connection.execute(
            sa.text("update articles set embedding_new_of = cast(:nil as uuid)"), {"nil": NIL}
        )

    def ready(**allowed: int) -> None:
        ree.require_ready(world.engine, world.new_table.c.embedding_new, **allowed)

    for count in (120, 60):
        with pytest.raises(errors.BackfillIncompleteError, match=f"{count} rows are pending"):
            ready()
        assert ree.status(world.engine, world.new_column).state == "filling"
        assert world.fill("embedding_new", limit=60) == 60
    assert ree.build_indexes(world.engine, world.new_column) == ["ix_articles_embedding_new"]
    ready()
    # An application that writes texts alone has a few such rows at any moment, and can say so.
    with world.engine.begin() as connection:
        for i in range(9):
            connection.execute(
                sa.text("insert into articles (id, title, body) values (:id, 'new', 'x')"),
                {"id": 1000 + i},
            )
    with pytest.raises(errors.BackfillIncompleteError, match="9 rows are pending"):
        ready()
    with pytest.raises(errors.BackfillIncompleteError, match="9 rows are pending"):
        ready(max_pending=8)
    ready(max_pending=9)


def test_a_damaged_queue_is_not_ready(world):
    """Without its index nothing can be said of the rows, so nothing is."""
    world.create(20)
    ree.begin(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    ree.require_ready(world.engine, world.new_table)
    with world.engine.begin() as connection:
        binding = catalog.require_binding(connection, world.new_column)
        (queue,) = [i for i in catalog.queue_indexes(connection, binding) if i.kind == "queue"]
        connection.execute(sa.text(f"drop index {queue.existing}"))
    with pytest.raises(errors.BackfillIncompleteError, match=r"queue|index"):
        ree.require_ready(world.engine, world.new_table)
    with pytest.raises(errors.BackfillIncompleteError, match=r"queue|index"):
        ree.finish(world.engine, world.new_column, quiet=QUIET)
    ree.begin(world.engine, request(world))
    ree.require_ready(world.engine, world.new_table)


def test_a_large_table_is_not_locked_while_its_queue_is_built(world, monkeypatch):
    monkeypatch.setattr("sbert_pg.reembed.change.SMALL", 0)
    world.create(200)
    ree.begin(world.engine, request(world))
    with world.engine.connect() as connection:
        binding = catalog.require_binding(connection, world.new_column)
        assert all(index.valid for index in catalog.queue_indexes(connection, binding))
        assert catalog.health(connection, binding) == []
    assert len(world.pending("embedding_new")) == 200


def test_the_index_is_like_the_old_one(world):
    world.create(50)
    ree.begin(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    with world.engine.connect() as connection:
        (index,) = vector_indexes(connection, "articles", "embedding_new")
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
    ree.begin(world.engine, request(world))
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
    ree.begin(world.engine, request(world))
    with pytest.raises(errors.ReembeddingError, match="its replacement is 'embedding_new'"):
        ree.abort(world.engine, world.old_column)


def test_starting_again_changes_nothing(world):
    world.create(10)
    first = ree.begin(world.engine, request(world))
    before = snapshot(world)
    assert ree.begin(world.engine, request(world)).id == first.id
    assert snapshot(world) == before


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("create view ranked as select id, {column} from articles", "view ranked"),
        (
            (
                "create trigger mine before update of {column} on articles "
                "for each row execute function suppress_redundant_updates_trigger()"
            ),
            "trigger mine",
        ),
        ("create view proofs as select {column}_of from articles", "view proofs"),
    ],
)
def test_what_depends_on_a_column_is_named_before_it_goes(world, statement, named):
    world.create(10)
    ree.begin(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    ends = {
        "embedding_new": lambda: ree.abort(world.engine, world.new_column),
        "embedding": lambda: ree.finish(world.engine, world.new_column, quiet=QUIET),
    }
    for column, end in ends.items():
        with world.engine.begin() as connection:
            connection.execute(sa.text(statement.format(column=column)))
        before = snapshot(world)
        with pytest.raises(errors.ReembeddingError, match=named):
            end()
        assert snapshot(world) == before
        with world.engine.begin() as connection:
            on = " on articles" if "trigger" in named else ""
            connection.execute(sa.text(f"drop {named}{on}"))
    assert ends["embedding"]() is True


#: What may depend on a column of a partition, or go with it.
DEPENDENTS = (
    "create view v as select id, embedding from note_1",
    "create view v as select id from note where embedding is null",
    "create materialized view v as select embedding_of from note_1",
    "create view v as select note_1 as whole from note_1",
    (
        "create trigger mine before update of embedding on note_1 "
        "for each row execute function suppress_redundant_updates_trigger()"
    ),
    "create policy p on note_1 using (embedding is not null)",
    "create rule r as on insert to note_1 where new.embedding is null do also select 1",
    (
        "create unique index on note_1 (embedding_of); "
        "create table other (e uuid references note_1 (embedding_of))"
    ),
    "alter table note add g text generated always as (embedding_of::text) stored",
    "alter table note add check (embedding is null or embedding_of is not null)",
    "create index on note_1 (embedding_of)",
    "create statistics s on body, embedding_of from note",
)


def test_what_is_named_is_what_the_server_would_refuse(engine):
    """Of a partitioned table, whose partitions have views and rules of their own."""
    with engine.connect() as connection:
        run = connection.exec_driver_sql
        run(
            "create table note (id int, r int, body text, embedding vector(3), "
            "primary key (id, r)) partition by list (r)"
        )
        run("create table note_1 partition of note for values in (1)")
        spec = EncoderSpec(name="deterministic", dimensions=3)
        identity = ColumnIdentity(None, "note", "embedding")
        binding = catalog.bind(connection, identity, spec, Source.of("body"))
        connection.commit()
        for statement in DEPENDENTS:
            run(statement)
            try:
                require_droppable(connection, binding)
                named = False
            except errors.ReembeddingError:
                named = True
            try:
                drop_bound_column(connection, binding)
                refused = False
            except sa.exc.DBAPIError:
                refused = True
            connection.rollback()
            assert named == refused, statement


def test_use_of_a_table_of_the_same_name_is_none(world):
    """In another schema, by the same encoder; and its column stays."""
    world.create(10)
    elsewhere = world.old_table.to_metadata(sa.MetaData(), schema="elsewhere")
    with world.engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("elsewhere"))
        create_all(connection, elsewhere.metadata)
    ree.begin(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    with world.engine.connect() as connection:
        connection.execute(nearest(elsewhere.c.embedding, "t3", limit=3)).all()
        connection.commit()
    assert ree.status(world.engine, world.new_column).in_use == ()
    assert ree.finish(world.engine, world.new_column) is True
    with world.engine.connect() as connection:
        assert catalog.require_binding(connection, elsewhere.c.embedding).schema == "elsewhere"


def test_a_second_change_has_to_wait(world):
    world.create(10)
    ree.begin(world.engine, request(world))
    other = ree.Request(old=world.old_column, new="third", encoder=world.new.spec)
    with pytest.raises(errors.AlreadyBoundError, match="replaced by column 'embedding_new'"):
        ree.begin(world.engine, other)
    # To give the first one up would leave nothing that finishes or gives up the second.
    after = ree.Request(old=world.new_column, new="third", encoder=world.new.spec)
    with pytest.raises(errors.AlreadyBoundError, match="itself the new column of a change"):
        ree.begin(world.engine, after)
    assert "third" not in world.columns()


def test_commands_can_be_pasted(world):
    world.create(3)
    named = ree.Request(old=world.old_column, new="new one", encoder=world.new.spec)
    column = ree.begin(world.engine, named).identity
    step = ree.status(world.engine, column).next_step
    assert "sbert-pg backfill 'public.articles.new one'" in step
    with pytest.raises(errors.AlreadyBoundError, match=r"abort 'public\.articles\.new one'"):
        ree.begin(world.engine, request(world))


def test_a_column_in_the_way_is_refused(world):
    world.create(10)
    with world.engine.begin() as connection:
        connection.execute(sa.text("alter table articles add embedding_new vector(7)"))
    with pytest.raises(errors.DimensionError, match="Choose another name"):
        ree.begin(world.engine, request(world))
    with world.engine.begin() as connection:
        connection.execute(sa.text("alter table articles drop embedding_new"))
        connection.execute(sa.text("alter table articles add embedding_new vector(48)"))
        vector = "[" + ",".join(["1"] * 48) + "]"
        connection.execute(
            sa.text("update articles set embedding_new = :v where id = 1"), {"v": vector}
        )
    with pytest.raises(errors.ReembeddingError, match="holds vectors and is bound to no encoder"):
        ree.begin(world.engine, request(world))
    with world.engine.begin() as connection:
        connection.execute(sa.text("update articles set embedding_new = null"))
    ree.begin(world.engine, request(world))


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
    ree.begin(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    with world.engine.begin() as connection:
        # The old version of the code, which knows nothing of the new column.
        connection.execute(sa.text("update articles set body = 'old writer' where id = 1"))
        world.write(connection, "embedding", world.old, {1: "t0\n\nold writer"})
        # The new version, which knows nothing of the old one.
        connection.execute(sa.text("update articles set body = 'new writer' where id = 2"))
        world.write(connection, "embedding_new", world.new, {2: "t1\n\nnew writer"})
        connection.execute(sa.text("insert into articles (id, body) values (21, 'new row')"))
        world.write(connection, "embedding_new", world.new, {21: "new row"})
        # Somebody with psql.
        connection.execute(sa.text("update articles set body = 'plain' where id = 3"))
    assert world.pending("embedding") == [2, 3, 21]
    assert world.pending("embedding_new") == [1, 3]
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
        ree.begin(world.engine, request(world))
        world.fill()
        ree.build_indexes(world.engine, world.new_column)
        return world

    def test_old_version_writers(self, ready):
        engine = sa.create_engine(
            ready.engine.url, connect_args={"application_name": "web-7"}, poolclass=sa.NullPool
        )
        with engine.begin() as connection:
            vector = ready.old.encode_document(["x"])[0]
            values = {"id": 900, "body": "x", "embedding": vector}
            connection.execute(ready.old_table.insert().values(values))
        ready.fill()
        with pytest.raises(errors.StillInUseError, match=r"wrote it, the last \(web-7"):
            ree.finish(ready.engine, ready.new_column)
        assert "embedding" in ready.columns()
        assert ree.finish(ready.engine, ready.new_column, force=True) is True
        assert "embedding" not in ready.columns()

    @pytest.mark.parametrize("rows", [5, 50])
    def test_old_version_readers_of_a_small_table(self, ready, rows):
        """The planner uses no index there, so no scan is counted."""
        engine = sa.create_engine(
            ready.engine.url, connect_args={"application_name": "web-8"}, poolclass=sa.NullPool
        )
        with ready.engine.begin() as connection:
            connection.execute(sa.text("delete from articles where id > :n"), {"n": rows})
        with engine.connect() as connection:
            # As a planner does that knows how small it is.
            connection.execute(sa.text("set local enable_indexscan = off"))
            connection.execute(nearest(ready.old_table.c.embedding, "t3", limit=3)).all()
            connection.commit()
        (use,) = ree.status(ready.engine, ready.new_column).in_use
        assert "searched it, the last (web-8" in use
        with pytest.raises(errors.StillInUseError, match=r"searched it, the last \(web-8"):
            ree.finish(ready.engine, ready.new_column)
        assert ree.finish(ready.engine, ready.new_column, quiet=QUIET) is True

    def test_old_version_readers_that_roll_back(self, ready):
        """As a session does that is closed without a commit: the usual end of a request."""
        with ready.engine.connect() as connection:
            connection.execute(nearest(ready.old_table.c.embedding, "t3", limit=3)).all()
            connection.rollback()
        with pytest.raises(errors.StillInUseError, match="an older version searched it"):
            ree.finish(ready.engine, ready.new_column)
        assert ree.finish(ready.engine, ready.new_column, quiet=QUIET) is True

    def test_readers_of_the_new_version_are_not_in_the_way(self, ready):
        with ready.engine.connect() as connection:
            connection.execute(nearest(ready.new_table.c.embedding_new, "t3", limit=3)).all()
            connection.commit()
        assert ree.status(ready.engine, ready.new_column).in_use == ()
        assert ree.finish(ready.engine, ready.new_column) is True

    def test_what_cannot_be_seen_is_said(self, ready):
        status = ree.status(ready.engine, ready.new_column)
        assert any("replicas" in each for each in status.unseen)
        assert "not seen" in str(status)

    def test_the_worker_is_no_old_version(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("update articles set body = 'plain' where id < 9"))
        backfill(ready.engine, ready.old_column)
        backfill(ready.engine, ready.new_column)
        assert ready.pending("embedding") == []
        assert ree.status(ready.engine, ready.new_column).in_use == ()
        assert ree.finish(ready.engine, ready.new_column) is True

    def test_scans_of_the_old_index(self, ready):
        with ready.engine.connect() as connection:
            connection.execute(sa.text("set enable_seqscan = off"))
            connection.execute(sa.text("set enable_sort = off"))
            vector = ready.old.encode_document(["t3"])[0]
            connection.execute(nearest(ready.old_table.c.embedding, vector, limit=3)).all()
            # A backend reports what it counted when it comes to it.
            connection.execute(sa.text("select pg_stat_force_next_flush()"))
        with pytest.raises(errors.StillInUseError, match="ix_articles_embedding was scanned"):
            ree.finish(ready.engine, ready.new_column)
        assert ree.finish(ready.engine, ready.new_column, quiet=QUIET) is True

    def test_rows_that_wait_hold_it_up_unless_allowed(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("insert into articles (id, body) values (999, 'fresh')"))
        with pytest.raises(errors.BackfillIncompleteError, match="1 rows are pending"):
            ree.finish(ready.engine, ready.new_column)
        assert "embedding" in ready.columns()
        assert ree.finish(ready.engine, ready.new_column, max_pending=1) is True
        assert ready.pending("embedding_new") == [999]

    def test_failed_rows_do_unless_allowed(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("insert into articles (id, body) values (999, 'bad')"))
        ready.fail(999, "embedding_new")
        with pytest.raises(errors.BackfillIncompleteError, match="could not be encoded"):
            ree.finish(ready.engine, ready.new_column)
        assert ree.finish(ready.engine, ready.new_column, max_failed=1) is True


def _resume(connection, column, replaces):
    """As ``op.resume_reembedding`` does."""
    with translated():
        connection.execute(statements.call("resume_v1", column, replaces))
    return catalog.require_binding(connection, column)


def test_a_change_taken_back_goes_on(world):
    """As after the downgrade of a migration that finished: the old column is there and bound."""
    world.create(20)
    ree.begin(world.engine, request(world))
    world.fill()
    ree.build_indexes(world.engine, world.new_column)
    ree.finish(world.engine, world.new_column, quiet=QUIET)
    with world.engine.begin() as connection:
        connection.execute(sa.text("alter table articles add embedding vector(32)"))
        catalog.bind(connection, world.old_table.c.embedding)
        binding = _resume(connection, world.new_column, "embedding")
        assert binding.replaces == "embedding"
        assert _resume(connection, world.new_column, "embedding").id == binding.id
    world.fill()
    assert ree.status(world.engine, world.new_column).old == "embedding"
    with pytest.raises(errors.NotBoundError), world.engine.begin() as connection:
        _resume(connection, world.new_column, "nothing")
    for new, old in (("embedding", "embedding_new"), ("embedding", "embedding")):
        with pytest.raises(errors.AlreadyBoundError), world.engine.begin() as connection:
            _resume(connection, ColumnIdentity(None, "articles", new), old)


@pytest.mark.parametrize("name", ["embedding", "embedding_new", "embedding_of", "body", "id"])
def test_a_column_that_was_renamed_without_the_catalog(world, name):
    world.create(3)
    ree.begin(world.engine, request(world))
    world.fill()
    with world.engine.begin() as connection:
        connection.execute(sa.text(f"alter table articles rename {name} to renamed"))
    for step in (ree.backfill, ree.verify, ree.status, ree.finish):
        with pytest.raises(errors.BindingError, match=rf"no column {name}, .*rename_v1"):
            step(world.engine, world.new_column)
    with world.engine.begin() as connection:
        shown = {one.column: one for one in status(connection, exact=True)}
        assert any(name in problem for one in shown.values() for problem in one.problems)
        connection.execute(sa.text(f"select sbert.rename_v1('articles', '{name}', 'renamed')"))
    new = "renamed" if name == "embedding_new" else "embedding_new"
    assert ree.verify(world.engine, ColumnIdentity(None, "articles", new)).coverage.fresh == 3


class TestWays:
    """One fact, one owner: a newcomer can read a way from end to end."""

    @pytest.fixture
    def ready(self, world):
        world.create(20)
        ree.begin(world.engine, request(world))
        world.fill()
        ree.build_indexes(world.engine, world.new_column)
        return world

    def test_finish(self, ready):
        passed = modules_of(lambda: ree.finish(ready.engine, ready.new_column, quiet=QUIET))
        assert ready.columns()[-1] == "embedding_new"
        assert len(passed) <= FINISH, sorted(passed)

    def test_finish_by_a_migration(self, ready):
        register()

        def migrate() -> None:
            with ready.engine.connect() as connection:
                context = MigrationContext.configure(connection)
                with context.begin_transaction():
                    Operations(context).finish_reembedding("articles", "embedding", quiet=0)

        passed = modules_of(migrate)
        assert "embedding" not in ready.columns()
        assert len(passed) <= FINISH_BY_MIGRATION, sorted(passed)

    def test_refresh_of_one_row(self, world):
        world.create(20)
        with world.engine.begin() as connection:
            connection.execute(sa.text("update articles set body = 'changed' where id = 3"))
        passed = modules_of(lambda: refresh(world.engine))
        assert world.pending("embedding") == []
        assert len(passed) <= REFRESH, " ".join(sorted(passed))
