"""Keys: one text for a row, whoever writes it, in whatever session, and back."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import system
from sbert_pg.catalog.rows import estimated_rows
from sbert_pg.errors import BindingError
from sbert_pg.sqlstates import translated

#: Type of a key, and two values of it.
KEYS = [
    ("bigint", "42", "43"),
    ("numeric(10,2)", "1.5", "2"),
    ("numeric", "'NaN'", "'-0'"),
    ("text", "'it''s \"x\"'", "''"),
    ('text COLLATE "C"', "repeat('x', 2000)", "'x'"),
    ("char(5)", "'ab'", "'b'"),
    ("uuid", "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'", "gen_random_uuid()"),
    ("boolean", "true", "false"),
    ("date", "'2024-02-03'", "'infinity'"),
    ("timestamptz", "'2024-02-03 04:05:06+02'", "'-infinity'"),
    ("bytea", "'\\x00ff'", "'\\x'"),
    ("inet", "'10.0.0.1'", "'::1'"),
    ("interval", "'1 month -2 days 03:04:05.6'", "'30 days'"),
    ("timetz", "'04:05:06+02'", "'04:05:06+03'"),
    ("int4range", "'[1,5)'", "'empty'"),
    ("period", "'[2024-02-03 04:05+02,)'", "'(,2024-02-03 04:05+02)'"),
    ("mood", "'so so'", "'fine'"),
    ("positive", "5", "6"),
    ("instant", "'2024-02-03 04:05:06+02'", "now()"),
]
NO_KEY = r"no key by which a row could be named\. Its primary key is made of id \(.+\)\. Give it"
TYPES = (
    "CREATE TYPE mood AS ENUM ('so so', 'fine')",
    "CREATE DOMAIN positive AS int CHECK (value > 0)",
    "CREATE DOMAIN moment AS timestamptz",
    "CREATE DOMAIN instant AS moment",
    "CREATE DOMAIN share AS float8",
    "CREATE DOMAIN percentage AS share",
    "CREATE DOMAIN numbers AS int[]",
    "CREATE DOMAIN period AS tstzrange CHECK (NOT isempty(value))",
)


@pytest.fixture
def types(connection: sa.Connection) -> None:
    for statement in TYPES:
        connection.execute(sa.text(statement))


@pytest.mark.parametrize(("type_", "one", "two"), KEYS)
def test_a_row_is_one_row_in_whatever_session(
    types: None, make: Any, type_: str, one: str, two: str
) -> None:
    note = make(f"note (id {type_} PRIMARY KEY, title text, e vector(3))", ("title",))
    run = note.connection.exec_driver_sql
    run("SET LOCAL TimeZone = 'Asia/Tokyo'; SET LOCAL DateStyle = 'German'")
    run("SET LOCAL bytea_output = 'escape'; SET LOCAL IntervalStyle = 'iso_8601'")
    run(f"INSERT INTO note (id, title) VALUES ({one}, 'a'), ({two}, 'b')")
    t = note.binding.clause()
    stale = sa.select(sa.func.count()).select_from(t).where(note.binding.is_stale(t))
    assert note.connection.scalar(stale) == 2
    run("UPDATE note SET e = '[1,0,0]', e_of = %s WHERE title = 'a'", (note.digest("a"),))
    assert note.connection.scalar(stale) == 1
    run("SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'; SET LOCAL bytea_output = 'hex'")
    assert note.connection.scalar(stale) == 1
    run("UPDATE note SET title = 'c'")
    assert note.connection.scalar(stale) == 2


def test_keys_of_several_columns(types: None, make: Any) -> None:
    note = make(
        'note (day timestamptz, mood mood, "a b" uuid, title text, e vector(3), '
        'PRIMARY KEY (mood, "a b", day))',
        ("title",),
    )
    assert note.binding.key_columns == ("mood", "a b", "day")
    assert note.binding.key_types == ("mood", "uuid", "timestamp with time zone")
    note.run(
        "INSERT INTO note VALUES ('2024-02-03 04:05:06+02', 'so so', "
        "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', 'a', NULL)"
    )
    assert len(note.pending()) == 1


@pytest.mark.parametrize("type_", ["percentage", "numbers"])
def test_what_a_domain_is_made_of_counts(types: None, make: Any, type_: str) -> None:
    with pytest.raises(BindingError, match=NO_KEY):
        make(f"note (id {type_} PRIMARY KEY, title text, e vector(3))", ("title",))


def test_a_label_of_a_key_may_be_renamed(types: None, make: Any) -> None:
    note = make("note (id mood PRIMARY KEY, title text, e vector(3))", ("title",))
    note.run("INSERT INTO note VALUES ('so so', 'a'), ('fine', 'b')")
    note.run("ALTER TYPE mood RENAME VALUE 'so so' TO 'well'")
    assert note.pending() == ["well", "fine"]


@pytest.mark.parametrize("type_", ["float8", "int[]", "money", "pg_am"])
def test_types_without_a_text_of_their_own_are_refused(make: Any, type_: str) -> None:
    with pytest.raises(BindingError, match=NO_KEY):
        make(f"note (id {type_} PRIMARY KEY, title text, e vector(3))", ("title",))


def test_a_table_without_primary_key_uses_its_narrowest_unique_index(make: Any) -> None:
    note = make(
        "note (a int NOT NULL, b int NOT NULL, c int UNIQUE, d int NOT NULL, title text, "
        "e vector(3), UNIQUE (a, b), UNIQUE (d))",
        ("title",),
        "CREATE UNIQUE INDEX ON note (a) WHERE a > 0",
        "CREATE UNIQUE INDEX ON note ((b + 1))",
    )
    assert note.binding.key_columns == ("d",)


def test_a_table_without_any_key_is_refused(make: Any) -> None:
    with pytest.raises(BindingError, match="no key"):
        make("note (id int UNIQUE, title text, e vector(3))", ("title",))


def test_a_key_with_included_columns(make: Any) -> None:
    note = make(
        "note (id int, title text, e vector(3), PRIMARY KEY (id) INCLUDE (title))", ("title",)
    )
    assert note.binding.key_columns == ("id",)


@pytest.mark.parametrize(
    ("ddl", "source", "reason"),
    [
        ("note (id int PRIMARY KEY, title text, e text)", "title", "has type text"),
        ("note (id int PRIMARY KEY, title text)", "title", "has no vector column e"),
        ("note (id int PRIMARY KEY, title text, e vector(4))", "title", "is 4 wide"),
        ("note (id int PRIMARY KEY, title int, e vector(3))", "title", "not a text type"),
        ("note (id int PRIMARY KEY, title text[], e vector(3))", "title", "not a text type"),
        ("note (id int PRIMARY KEY, title text, e vector(3))", "body", "does not have"),
    ],
)
def test_what_cannot_be_bound(make: Any, ddl: str, source: str, reason: str) -> None:
    with pytest.raises(BindingError, match=reason):
        make(ddl, (source,))


def test_a_virtual_column_is_refused_where_there_are_such(make: Any) -> None:
    ddl = (
        "note (id int PRIMARY KEY, a text, title text GENERATED ALWAYS AS (lower(a)) {}, "
        "e vector(3))"
    )
    try:
        with pytest.raises(BindingError, match="virtual generated column"):
            make(ddl.format("VIRTUAL"), ("title",))
    except sa.exc.ProgrammingError:
        pytest.skip("virtual columns came with PostgreSQL 18")


def test_views_and_temporary_tables_are_refused(note: Any) -> None:
    note.run("CREATE TEMPORARY TABLE t (id int PRIMARY KEY, title text, e vector(3))")
    note.run("CREATE VIEW v AS SELECT * FROM note")
    for name in ("t", "v"):
        with (
            pytest.raises(BindingError, match=r"^Relation .* is not a permanent table"),
            note.connection.begin_nested(),
            translated(),
        ):
            note.run(
                "SELECT sbert.bind_v1(CAST(:n AS regclass), 'e', "
                "jsonb_build_object('name', 'x', 'dimensions', 3), "
                "jsonb_build_object('columns', ARRAY['title']))",
                n=name,
            )


def test_an_unsized_halfvec(make: Any) -> None:
    note = make("note (id bigserial PRIMARY KEY, title text, e halfvec)", ("title",))
    assert note.binding.storage == "halfvec"
    note.fill("a")
    assert note.pending() == []
    note.run("UPDATE note SET title = 'b'")
    assert note.pending() == ["1"]


@pytest.mark.parametrize("name", ["plain", 'Per "cent" 100%', "a.b"])
@pytest.mark.parametrize("schema", [None, "real", "a map knows it"])
def test_rows_that_the_planner_knows_of(engine: sa.Engine, name: str, schema: str | None) -> None:
    table = sa.Table(name, sa.MetaData(), sa.Column("id", sa.Integer), schema=schema)
    with engine.begin() as plain:
        plain.execute(sa.schema.CreateSchema("real"))
        connection = plain.execution_options(schema_translate_map={"a map knows it": "real"})
        table.create(connection)
        assert estimated_rows(connection, table) == 0
        connection.execute(sa.insert(table), [{"id": n} for n in range(50)])
        connection.execute(system.ddl("ANALYZE %(fullname)s", table))
        assert estimated_rows(connection, table) == 50
