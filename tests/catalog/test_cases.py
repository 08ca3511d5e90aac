"""Faults that were found by attacking the promises, and further ones of the same kind.

A row is right when its vector is that of its text, or when it says itself that it is pending or has
failed; ``forgotten`` finds the others.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import REGCLASS

from sbert_pg import catalog, registry
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.catalog.guard import forget
from sbert_pg.errors import BindingError, EncoderMismatchError, SbertPgError
from sbert_pg.freshness import refresh
from sbert_pg.search import nearest
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.sqlstates import sqlstate_of, translated
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

SPEC = EncoderSpec(name="deterministic", dimensions=8)
FOREIGN = "[1,2,3,4,5,6,7,8]"
TABLE = "CREATE TABLE t (id int PRIMARY KEY, title text, v vector(8))"


class Place:
    """A database with a bound table ``t``, written by plain SQL."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.encoder = registry.use_encoder(DeterministicEncoder(dimensions=8))

    def run(self, *statements: str) -> Any:
        with self.engine.begin() as connection:
            for statement in statements:
                result = connection.exec_driver_sql(statement)
            return result.all() if result.returns_rows else None

    def bind(self, table: str = "t", column: str = "v", source: str = "title", **more: Any) -> Any:
        with self.engine.begin() as connection:
            identity = ColumnIdentity(None, table, column)
            return catalog.bind(connection, identity, SPEC, Source.of(source), **more).id

    def problems(self, table: str = "t", column: str = "v") -> list[str]:
        rows = self.run(
            f"SELECT problems FROM sbert.status WHERE table_name = '{table}' "
            f"AND column_name = '{column}'"
        )
        return list(rows[0][0]) if rows else []

    def noticing(self, table: str = "t", column: str = "v") -> bool:
        rows = self.run(
            f"SELECT noticing FROM sbert.status WHERE table_name = '{table}' "
            f"AND column_name = '{column}'"
        )
        return bool(rows[0][0])

    def forgotten(self, table: str = "t", column: str = "v") -> list[Any]:
        """Keys of rows that are wrong and do not say so."""
        with self.engine.connect() as connection:
            binding = catalog.require_binding(connection, ColumnIdentity(None, table, column))
            t = binding.clause()
            told = sa.or_(binding.is_stale(t), binding.expressions.on(t, "failed"))
            rows = connection.execute(
                sa.select(
                    *(t.c[name] for name in binding.key_columns),
                    binding.expressions.on(t, "text").label("text"),
                    sa.cast(t.c[column], sa.Text).label("vector"),
                ).where(~told)
            ).all()
        return [tuple(row[:-2]) for row in rows if not self.right(row.text, row.vector)]

    def right(self, text: str | None, vector: str | None) -> bool:
        if text is None or vector is None:
            return text is None and vector is None
        wanted = self.encoder.encode_document([text])[0]
        return bool(np.allclose(np.array(json.loads(vector)), wanted, atol=1e-4))

    def missing(self, table: str = "t", column: str = "v") -> int:
        return int(self.run(f"SELECT count(*) FROM {table} WHERE {column} IS NULL")[0][0])


@pytest.fixture
def place(engine: sa.Engine) -> Place:
    return Place(engine)


@pytest.fixture
def bound(place: Place) -> Place:
    """A bound table with two rows that have their vectors."""
    place.run(TABLE)
    place.bind()
    place.run("INSERT INTO t (id, title) VALUES (1, 'before'), (2, 'another')")
    refresh(place.engine)
    assert place.forgotten() == []
    assert place.missing() == 0
    return place


# ---------------------------------------------------------------- attach_partition


@pytest.mark.parametrize(
    "come",
    [
        "ALTER TABLE p ATTACH PARTITION other FOR VALUES IN (2)",
        "ALTER TABLE p ATTACH PARTITION other DEFAULT",
        "CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2); INSERT INTO p2 TABLE other",
        """CREATE TABLE sub PARTITION OF p FOR VALUES IN (2) PARTITION BY LIST (id);
        ALTER TABLE sub ATTACH PARTITION other DEFAULT""",
    ],
    ids=["attach", "default", "copied", "nested"],
)
def test_attach_partition(place: Place, come: str) -> None:
    place.run(
        "CREATE TABLE p (id int, r int, title text, v vector(8), PRIMARY KEY (id, r)) "
        "PARTITION BY LIST (r); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1)"
    )
    place.bind("p")
    place.run(
        "CREATE TABLE other (LIKE p INCLUDING ALL)",
        f"INSERT INTO other (id, r, title, v, v_of) VALUES (1, 2, 'no vector', NULL, NULL), "
        f"(2, 2, 'foreign', '{FOREIGN}', NULL), (3, 2, NULL, NULL, NULL), "
        f"(4, 2, 'forged', '{FOREIGN}', gen_random_uuid())",
        "SET LOCAL session_replication_role = replica",
        come,
    )
    assert place.forgotten("p") == []
    refresh(place.engine)
    assert place.forgotten("p") == []
    assert place.run("SELECT id FROM p WHERE v IS NULL") == [(3,)]
    # Away, changed, and back.
    if "ATTACH PARTITION other" in come and "sub" not in come:
        bounds = come.partition("other")[2]
        place.run("ALTER TABLE p DETACH PARTITION other", "UPDATE other SET title = 'changed'")
        place.run(f"ALTER TABLE p ATTACH PARTITION other{bounds}")
        assert place.forgotten("p") == []
        assert refresh(place.engine).embedded == 4


@pytest.mark.parametrize("parent_is_bound", [False, True])
def test_a_bound_table_becomes_a_partition(bound: Place, parent_is_bound: bool) -> None:
    """Of a table without a binding it stays what it is; else the parent's binding is the one."""
    bound.run(
        "CREATE TABLE p (LIKE t INCLUDING DEFAULTS, PRIMARY KEY (id)) PARTITION BY RANGE (id)"
    )
    if parent_is_bound:
        bound.bind("p")
        with bound.engine.begin() as connection:
            p = catalog.require_binding(connection, ColumnIdentity(None, "p", "v"))
            catalog.hold_encoder(connection, p, bound.encoder)
    bound.run("ALTER TABLE p ATTACH PARTITION t DEFAULT")
    # A process that has not asked before, with an encoder of another space.
    registry.forget_encoders()
    registry.use_encoder(DeterministicEncoder(dimensions=8, salt="another"))
    other = sa.create_engine(bound.engine.url)
    with pytest.raises(EncoderMismatchError), other.connect() as connection:
        connection.execute(nearest(mapped().c.v, "before", limit=1))
    other.dispose()
    registry.use_encoder(bound.encoder)
    bound.run("UPDATE t SET title = 'changed' WHERE id = 1")
    done = refresh(bound.engine)
    if parent_is_bound:
        assert "partition of a bound table now, public.p: unbind it" in done.blocked["public.t.v"]
        assert not bound.noticing()
        assert bound.forgotten("p") == []
        with bound.engine.begin() as connection:
            connection.execute(sa.text("SELECT sbert.unbind_v1('t', 'v')"))
        assert (refresh(bound.engine).left, bound.forgotten("p"), bound.missing("p")) == (0, [], 0)
    else:
        assert (done.embedded, done.left, done.blocked) == (1, 0, {})
        assert bound.forgotten() == []


def test_a_table_inherits_from_a_bound_one(bound: Place) -> None:
    bound.run("CREATE TABLE kid () INHERITS (t)")
    bound.run(f"INSERT INTO kid (id, title, v) VALUES (1, 'twin', '{FOREIGN}'), (7, 'kid', NULL)")
    assert any("tables inherit from it" in problem for problem in bound.problems())
    assert bound.forgotten() == []
    assert refresh(bound.engine).embedded == 2
    assert (bound.forgotten(), bound.missing()) == ([], 0)


# ---------------------------------------------------------------- table_swap

SWAP = "ALTER TABLE t RENAME TO t_old; ALTER TABLE t_new RENAME TO t"


def mapped() -> sa.Table:
    return sa.Table(
        "t",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("title", sa.Text),
        sa.Column("v", Embedding("deterministic", source="title", dimensions=8)),
    )


@pytest.mark.parametrize(
    "make",
    [
        "CREATE TABLE t_new (LIKE t INCLUDING ALL); INSERT INTO t_new SELECT * FROM t",
        "CREATE TABLE t_new (LIKE t); ALTER TABLE t_new ADD PRIMARY KEY (id)",
        "CREATE TABLE t_new AS TABLE t; ALTER TABLE t_new ADD PRIMARY KEY (id)",
    ],
    ids=["like all", "like", "as table"],
)
def test_table_swap(bound: Place, make: str) -> None:
    t = mapped()
    row = {"id": 3, "title": "c", "v": bound.encoder.encode_document(["c"])[0]}
    with bound.engine.begin() as connection:
        connection.execute(sa.insert(t), [row])
    bound.run(make, SWAP)
    [problem] = [p for p in bound.problems("t_old") if "public.t" in p]
    assert "is the name of another table now" in problem
    assert not bound.noticing("t_old")
    with pytest.raises(EncoderMismatchError), bound.engine.begin() as connection:
        connection.execute(sa.insert(t), [row | {"id": 4}])
    with pytest.raises(BindingError, match="give the old one up first"):
        bound.bind()
    with bound.engine.begin() as connection:
        catalog.unbind(connection, ColumnIdentity(None, "t_old", "v"))
    bound.bind()
    assert bound.forgotten() == []
    refresh(bound.engine)
    assert bound.forgotten() == []
    assert bound.noticing()


def test_names_that_are_swapped_twice(bound: Place) -> None:
    before = bound.run("SELECT id FROM sbert.binding")
    bound.run("CREATE TABLE t_new (LIKE t INCLUDING ALL)", SWAP)
    bound.run("ALTER TABLE t RENAME TO t_new", "ALTER TABLE t_old RENAME TO t")
    assert bound.noticing()
    bound.bind()
    assert bound.run("SELECT id FROM sbert.binding") == before
    assert (refresh(bound.engine).embedded, bound.forgotten()) == (0, [])


def test_a_table_of_its_name_where_it_was(bound: Place) -> None:
    """It moved to another schema, and that was renamed."""
    bound.run("CREATE SCHEMA one; ALTER TABLE t SET SCHEMA one; ALTER SCHEMA one RENAME TO two")
    assert bound.noticing()
    bound.run("CREATE TABLE t (LIKE two.t INCLUDING ALL)")
    assert not bound.noticing()
    with pytest.raises(EncoderMismatchError), bound.engine.connect() as connection:
        connection.execute(nearest(mapped().c.v, "before", limit=1))
    with pytest.raises(BindingError, match="give the old one up first"):
        bound.bind()
    bound.run("UPDATE two.t SET title = 'changed' WHERE id = 1")
    assert refresh(bound.engine).embedded == 1


def test_a_renamed_table_is_the_bound_one(bound: Place) -> None:
    bound.run("ALTER TABLE t RENAME TO renamed")
    assert bound.noticing("renamed")
    bound.bind("renamed")
    bound.run(TABLE)
    assert bound.noticing("renamed"), "another table of the old name is none of its business now"


def test_a_table_that_is_dropped_and_made_again(bound: Place) -> None:
    bound.run("DROP TABLE t", TABLE, f"INSERT INTO t VALUES (1, 'a', '{FOREIGN}')")
    assert bound.run("SELECT * FROM sbert.status") == []
    bound.bind()
    assert bound.forgotten() == []
    refresh(bound.engine)
    assert bound.forgotten() == []


# ---------------------------------------------------------------- domain_key, enum_key


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_domain_key(place: Place, depth: int) -> None:
    place.run(
        "CREATE DOMAIN d1 AS timestamptz; CREATE DOMAIN d2 AS d1; CREATE DOMAIN d3 AS d2; "
        f"CREATE TABLE t (id d{depth} PRIMARY KEY, title text, v vector(8))"
    )
    place.bind()
    place.run(
        "SET LOCAL DateStyle = 'German'",
        "INSERT INTO t (id, title) VALUES ('05.01.2024 00:00+00', 'x')",
        "SET LOCAL TIME ZONE 'Asia/Tokyo'",
        "UPDATE t SET title = 'y'",
    )
    assert refresh(place.engine).embedded == 1
    assert place.missing() == 0
    assert place.forgotten() == []
    place.run(
        "CREATE DOMAIN f1 AS float8; CREATE DOMAIN f2 AS f1; CREATE DOMAIN f3 AS f2; "
        f"CREATE TABLE u (id f{depth} PRIMARY KEY, title text, v vector(8))"
    )
    with pytest.raises(BindingError, match="no key by which a row could be named"):
        place.bind("u")


def test_enum_key(place: Place) -> None:
    place.run(
        "CREATE TYPE k AS ENUM ('a', 'b')",
        "CREATE TABLE t (kind k, id int, title text, v vector(8), PRIMARY KEY (kind, id))",
        "CREATE TABLE other (id int PRIMARY KEY, title text, v vector(8))",
    )
    place.bind()
    place.bind("other")
    place.run(
        "INSERT INTO t (kind, id, title) SELECT 'a', g, 'x' || g FROM generate_series(1, 3) g",
        "INSERT INTO t (kind, id, title) SELECT 'b', g, 'x' || g FROM generate_series(1, 3) g",
        "INSERT INTO other (id, title) SELECT g, 'x' || g FROM generate_series(1, 3) g",
    )
    place.run("ALTER TYPE k RENAME VALUE 'a' TO 'alpha'")
    assert refresh(place.engine).embedded == 9
    assert place.forgotten() == []


# ---------------------------------------------------------------- enable_replica


@pytest.mark.parametrize(
    "harm",
    [
        "ALTER TABLE t ENABLE REPLICA TRIGGER {refuse_insert}",
        "ALTER TABLE t DISABLE TRIGGER {refuse_update}",
        "ALTER TABLE t DISABLE TRIGGER ALL",
        "DROP TRIGGER {wake} ON t",
        "ALTER TRIGGER {refuse_insert} ON t RENAME TO mine; ALTER TABLE t DISABLE TRIGGER mine",
        "DROP INDEX {queue}",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = CAST('{queue}' AS regclass)",
        "DROP INDEX {failed}; CREATE INDEX {failed} ON t (id)",
        "DROP INDEX {queue}; CREATE INDEX {queue} ON t (((v_of IS NULL)::int), id) WHERE v IS NULL",
        "ALTER TABLE t ALTER v_of DROP DEFAULT",
        "ALTER TABLE t ALTER v_of SET DEFAULT 'ffffffff-ffff-ffff-ffff-ffffffffffff'",
    ],
)
def test_enable_replica(bound: Place, harm: str) -> None:
    """Status says whether all is there and fires, by its content, and binding again mends it."""
    assert bound.noticing()
    names = dict(bound.run("SELECT t.kind, t.name FROM sbert.binding b, sbert.triggers_v1(b.id) t"))
    names |= dict(bound.run("SELECT q.kind, q.existing::text FROM sbert.binding b, "
                            "sbert.queue_ddl_v1(b.id) q"))  # fmt: skip
    bound.run(harm.format(**names))
    assert not bound.noticing()
    assert len(bound.problems()) >= 1
    bound.run("INSERT INTO t (id, title) VALUES (3, 'x')")
    assert bound.forgotten() == []
    bound.bind()
    assert bound.problems() == []


def test_enable_replica_of_a_replacing_column_and_of_one_partition(place: Place) -> None:
    place.run("CREATE TABLE u (id int PRIMARY KEY, title text, v vector(8), w vector(8))")
    place.bind("u")
    place.bind("u", "w", replaces="v")
    assert place.noticing("u", "v")
    assert place.noticing("u", "w")
    place.run(
        "CREATE TABLE p (id int, r int, title text, v vector(8), PRIMARY KEY (id, r)) "
        "PARTITION BY LIST (r); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1)"
    )
    place.bind("p")
    assert place.noticing("p")
    for harm in ("DISABLE TRIGGER ALL", "ALTER v_of DROP DEFAULT"):
        place.run(f"ALTER TABLE p1 {harm}")
        assert not place.noticing("p")
        place.bind("p")
        assert place.noticing("p")


# ---------------------------------------------------------------- names as data


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


NAMES = [
    "a$trigger$b",
    "x$trigger$;DROP TABLE IF EXISTS public.secret;SELECT $trigger$",
    "b$body$; DROP TABLE secret; --",
    "it's",
    "'; DROP TABLE secret; --",
    "per%s %(cent)s %% %I",
    "colon :name ::int",
    "{braces} {0}",
    "back\\slash\\'",
    'quo"te',
    "q. q.v NEW.v OLD.v",
    "new\nline",
    " ",
    "é" * 31,
    "select",
]


def hold_names(place: Place, name: str, role: str) -> None:
    """Bind a table with a strange name somewhere, and see that it is data."""
    columns = {"source": "title", "key": "id", "vector": "v", "table": "t", "schema": "s"}
    columns[role] = name
    schema, table, key, title, vector = (
        quoted(columns[part]) for part in ("schema", "table", "key", "source", "vector")
    )
    engine = place.engine
    with engine.connect() as connection:
        run = connection.exec_driver_sql
        run("SET LOCAL check_function_bodies = off")
        run("CREATE TABLE public.secret (x int)")
        statement = f"CREATE SCHEMA {schema}"
        run(statement.replace("%", "%%"))
        table = f"{schema}.{table}"
        run(
            f"CREATE TABLE {table} ({key} int PRIMARY KEY, {title} text, {vector} vector(8))"
            .replace("%", "%%")
        )  # fmt: skip
        identity = ColumnIdentity(columns["schema"], columns["table"], columns["vector"])
        source = Source.of((columns["source"],), "\\ '$body$")
        binding = catalog.bind(connection, identity, SPEC, source)
        run(f"INSERT INTO {table} ({key}, {title}) VALUES (1, 'x')".replace("%", "%%"))
        t = binding.clause()
        pending = connection.scalars(
            sa.select(t.c[columns["key"]]).where(binding.is_stale(t), binding.class_of(t) == 0)
        )
        assert pending.all() == [1]
        assert catalog.health(connection, binding) == []
        with pytest.raises(EncoderMismatchError), connection.begin_nested(), translated():
            run(f"UPDATE {table} SET {vector} = '{FOREIGN}'".replace("%", "%%"))
        renamed = f"ALTER TABLE {table} RENAME COLUMN {title} TO other"
        run(renamed.replace("%", "%%"))
        catalog.bind(connection, identity, SPEC, Source.of(("other",), "\\ '$body$"))
        assert catalog.health(connection, binding) == []
        catalog.unbind(connection, identity)
        run("SELECT * FROM public.secret")
        connection.rollback()


@pytest.mark.parametrize("role", ["source", "key", "vector", "table", "schema"])
@pytest.mark.parametrize("name", NAMES)
def test_dollar_injection_min(place: Place, name: str, role: str) -> None:
    hold_names(place, name, role)


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.text(
        st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40
    ).filter(lambda name: len(name.encode()) < 64 and name not in ("id", "title", "v", "v_of")),
    role=st.sampled_from(["source", "key", "vector", "table", "schema"]),
)
def test_names_are_data(place: Place, name: str, role: str) -> None:
    hold_names(place, name, role)


@pytest.mark.parametrize(
    "pattern",
    ["T: {title}\n{body}", "{{title}} {title}{body}", "{body} '$body$ \\ %s :x {title}"],
)
def test_templates_are_data(place: Place, pattern: str) -> None:
    place.run("CREATE TABLE t (id int PRIMARY KEY, title text, body text, v vector(8))")
    source = Source.template(pattern)
    with place.engine.begin() as connection:
        binding = catalog.bind(connection, ColumnIdentity(None, "t", "v"), SPEC, source)
    place.run("INSERT INTO t (id, title, body) VALUES (1, 'a', 'b'), (2, NULL, 'c'), (3, 'd', '')")
    refresh(place.engine)
    assert place.forgotten() == []
    assert place.missing() == 0
    with place.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE t RENAME title TO heading")
        table = sa.cast("t", REGCLASS)
        connection.execute(sa.select(sa.func.sbert.rename_v1(table, "title", "heading")))
        assert catalog.health(connection, binding) == []
    assert place.forgotten() == []


# ---------------------------------------------------------------- rename_readd


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE t RENAME title TO title_old; ALTER TABLE t ADD title text",
        "ALTER TABLE t DROP title; ALTER TABLE t ADD title text",
        """ALTER TABLE t ADD other text; ALTER TABLE t RENAME title TO old;
        ALTER TABLE t RENAME other TO title""",
        "ALTER TABLE t RENAME id TO x; ALTER TABLE t ALTER x SET DEFAULT 9, ADD id serial UNIQUE",
        "ALTER TABLE t RENAME v TO w; ALTER TABLE t ADD v vector(8)",
        "ALTER TABLE t RENAME v_of TO w_of; ALTER TABLE t ADD v_of uuid",
    ],
    ids=["rename", "drop", "swap", "key", "vector", "companion"],
)
def test_rename_readd(bound: Place, change: str) -> None:
    bound.run(change)
    assert not bound.noticing()
    bound.run("INSERT INTO t (id, title) VALUES (7, 'one')")
    assert bound.forgotten() == []
    bound.run("UPDATE t SET title = 'two' WHERE id = 7")
    assert bound.forgotten() == []
    before = bound.run("SELECT v::text FROM t ORDER BY 1")
    done = refresh(bound.engine)
    assert (done.embedded, list(done.blocked)) == (0, ["public.t.v"])
    assert bound.run("SELECT v::text FROM t ORDER BY 1") == before


@pytest.mark.parametrize(("old", "new"), [("title", "heading"), ("id", "number"), ("v", "vector")])
def test_a_column_that_was_only_renamed_is_followed(bound: Place, old: str, new: str) -> None:
    bound.run(f"ALTER TABLE t RENAME {old} TO {new}")
    assert not bound.noticing()
    names = {"title": "title", "v": "v"} | {old: new}
    before = bound.run("SELECT id FROM sbert.binding")
    again = bound.bind(column=names["v"], source=names["title"])
    assert [(again,)] == before
    assert bound.problems(column=names["v"]) == []
    assert bound.forgotten(column=names["v"]) == []
    assert bound.run(f"SELECT count(*) FROM t WHERE {names['v']} IS NULL") == [(0,)]


def test_two_columns_that_were_renamed_are_not_guessed_at(place: Place) -> None:
    place.run("CREATE TABLE t (id int PRIMARY KEY, a text, b text, v vector(8))")
    identity = ColumnIdentity(None, "t", "v")
    with place.engine.begin() as connection:
        catalog.bind(connection, identity, SPEC, Source.of(("a", "b")))
        connection.exec_driver_sql("ALTER TABLE t RENAME a TO x")
        connection.exec_driver_sql("ALTER TABLE t RENAME b TO y")
        with pytest.raises(SbertPgError, match=r"sbert\.rename_v1"):
            catalog.bind(connection, identity, SPEC, Source.of(("x", "y")))


# ---------------------------------------------------------------- DDL of the application


def test_extension_moved(bound: Place) -> None:
    bound.run("CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions")
    name = bound.engine.url.database
    bound.run(f'ALTER DATABASE "{name}" SET search_path = public, extensions')
    bound.engine.dispose()
    bound.run("UPDATE t SET title = title || 'x' WHERE id = 1")
    bound.run("INSERT INTO t (id, title) VALUES (3, 'new')")
    assert bound.noticing()
    assert bound.forgotten() == []
    assert refresh(bound.engine).embedded == 2
    with pytest.raises(sa.exc.DBAPIError, match="nothing proves"):
        bound.run(f"UPDATE t SET v = '{FOREIGN}'")
    bound.bind()
    assert bound.noticing()


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ("id int PRIMARY KEY, title varchar(100)", "ALTER title TYPE text"),
        ("id int PRIMARY KEY, title text", "ALTER title TYPE varchar(200)"),
        ("id int PRIMARY KEY, title char(20)", "ALTER title TYPE text"),
        ("id int PRIMARY KEY, title text", "ALTER id TYPE bigint"),
        ("id int PRIMARY KEY, title text", "ALTER id TYPE text USING id::text"),
        ("id int PRIMARY KEY, title text", "ALTER title TYPE text USING upper(title)"),
        ("id int PRIMARY KEY, title text", "ADD more int NOT NULL DEFAULT 1, ALTER id TYPE bigint"),
        ("id int PRIMARY KEY, title text", "SET UNLOGGED"),
    ],
)
def test_alter_type_of_bound_columns(place: Place, before: str, change: str) -> None:
    place.run(f"CREATE TABLE t ({before}, v vector(8))")
    place.bind()
    place.run("INSERT INTO t (id, title) VALUES (1, 'first'), (2, 'second')")
    refresh(place.engine)
    place.run("UPDATE t SET title = 'quite another text' WHERE title = 'first'")
    place.run(f"ALTER TABLE t {change}")
    assert place.noticing()
    assert place.forgotten() == []
    refresh(place.engine)
    assert place.forgotten() == []
    assert place.missing() == 0


@pytest.mark.parametrize(
    "type_", ["bytea USING title::bytea", "int USING length(title)", "jsonb USING to_jsonb(title)"]
)
def test_a_source_that_is_no_text_any_more(bound: Place, type_: str) -> None:
    """Its text would depend on settings of the session."""
    bound.run(f"ALTER TABLE t ALTER title TYPE {type_}")
    [problem] = bound.problems()
    assert problem.startswith("title has type ")
    done = refresh(bound.engine)
    assert (done.embedded, list(done.blocked)) == (0, ["public.t.v"])
    bound.run("ALTER TABLE t ALTER title TYPE text USING 'text again'")
    assert (refresh(bound.engine).embedded, bound.problems(), bound.forgotten()) == (2, [], [])


@pytest.mark.parametrize(
    "change",
    [
        "ALTER v TYPE halfvec(8)",
        "ALTER v TYPE vector",
        "ALTER v_of TYPE text",
        "DROP v",
        "DROP v_of",
    ],
)
def test_the_vector_and_its_companion_stay_as_they_are(bound: Place, change: str) -> None:
    with pytest.raises(sa.exc.DBAPIError, match="sbert_refuse_update_") as raised:
        bound.run(f"ALTER TABLE t {change}")
    assert sqlstate_of(raised.value) in ("0A000", "2BP01")
    assert (bound.problems(), bound.forgotten(), bound.missing()) == ([], [], 0)


def test_the_extension_is_dropped(bound: Place) -> None:
    bound.run("DROP EXTENSION vector CASCADE")
    assert any("there is no column v" in problem for problem in bound.problems())
    assert "there is no column v" in refresh(bound.engine).blocked["public.t.v"]


def test_a_dropped_column_is_said(bound: Place) -> None:
    bound.run("ALTER TABLE t DROP COLUMN title")
    assert not bound.noticing()
    assert any("there is no column title" in problem for problem in bound.problems())


def test_a_dropped_primary_key(bound: Place) -> None:
    bound.run("ALTER TABLE t DROP CONSTRAINT t_pkey")
    bound.run("UPDATE t SET title = 'new' WHERE id = 1")
    assert bound.forgotten() == []
    refresh(bound.engine)
    assert bound.forgotten() == []


# ---------------------------------------------------------------- reader_cached


def test_reader_cached(engine: sa.Engine) -> None:
    registry.use_encoder(DeterministicEncoder("encA", 8, salt="A"))
    registry.use_encoder(DeterministicEncoder("encB", 8, salt="B"))

    def table(name: str) -> sa.Table:
        return sa.Table(
            "t",
            sa.MetaData(),
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("title", sa.Text),
            sa.Column("v", Embedding(name, source="title", dimensions=8)),
        )

    old, new = table("encA"), table("encB")
    with engine.begin() as connection:
        catalog.create_all(connection, old.metadata)
        connection.exec_driver_sql("INSERT INTO t (id, title) VALUES (1, 'apple'), (2, 'pear')")
    refresh(engine)
    with engine.connect() as connection:
        assert connection.execute(nearest(old.c.v, "apple", limit=1)).one().id == 1
    migration = sa.create_engine(engine.url)
    with migration.begin() as connection:
        catalog.unbind(connection, old.c.v)
        connection.exec_driver_sql("UPDATE t SET v = NULL")
        catalog.bind(connection, new.c.v)
    refresh(migration)
    for statement in (
        nearest(old.c.v, "apple", limit=3),
        sa.select(old.c.id).order_by(old.c.v.distance("apple")),
        sa.select(sa.func.count()).where(old.c.v.cosine_distance("apple") < 2),
        sa.update(old).values(title="x").where(old.c.v.distance("apple") < 2),
    ):
        with pytest.raises(EncoderMismatchError), engine.begin() as connection:
            connection.execute(statement)
    with migration.connect() as connection:
        assert connection.execute(nearest(new.c.v, "apple", limit=1)).one().id == 1
    forget(migration.dialect)
    migration.dispose()
