"""Keys: one text for a row, whoever writes it, in whatever session, and back."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg.catalog.sqlstates import translated
from sbert_pg.errors import BindingError

#: Type of the key, a value, the text of the key.
KEYS = [
    ("bigint", "42", "42"),
    ("smallint", "-7", "-7"),
    ("numeric(10,2)", "1.5", "1.50"),
    ("text", "'it''s \"x\"'", 'it\'s "x"'),
    ("varchar(5)", "'ab'", "ab"),
    ("char(5)", "'ab'", "ab"),
    ("uuid", "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    ("boolean", "true", "true"),
    ("date", "'2024-02-03'", "2024-02-03"),
    ("timestamp", "'2024-02-03 04:05:06.7'", "2024-02-03T04:05:06.7"),
    ("timestamptz", "'2024-02-03 04:05:06+02'", "2024-02-03T02:05:06Z"),
    ("timestamptz", "'infinity'", "infinity"),
    ("bytea", "'\\x00ff'", "\\x00ff"),
    ("inet", "'10.0.0.1'", "10.0.0.1/32"),
    ("mood", "'so so'", "so so"),
    ("positive", "5", "5"),
    ("day", "'2024-02-03'", "2024-02-03"),
]
TYPES = (
    "CREATE TYPE mood AS ENUM ('so so', 'fine')",
    "CREATE DOMAIN positive AS int CHECK (value > 0)",
    "CREATE DOMAIN day AS date",
)


@pytest.fixture
def types(connection: sa.Connection) -> None:
    for statement in TYPES:
        connection.execute(sa.text(statement))


@pytest.mark.parametrize(("type_", "value", "text"), KEYS)
def test_one_text_for_a_key_and_back(
    types: None, make: Any, type_: str, value: str, text: str
) -> None:
    note = make(f"note (id {type_} PRIMARY KEY, title text, e vector(3))", ("title",))
    run = note.connection.exec_driver_sql
    # A session with settings of its own writes the same key, and finds its mark again.
    run("SET LOCAL TimeZone = 'Asia/Tokyo'; SET LOCAL DateStyle = 'German'")
    run("SET LOCAL bytea_output = 'escape'")
    run(f"INSERT INTO note (id, title) VALUES ({value}, 'a')")
    assert note.pending() == [text]
    run("UPDATE note SET title = 'b'")
    assert note.pending() == [text]
    clause = note.binding.clause()
    named = note.connection.execute(sa.select(note.binding.key_text(clause))).scalar_one()
    assert named == text
    wanted = note.binding.unpacked([text])
    joined = sa.select(clause.c.title).join_from(
        clause, wanted, note.binding.matches(clause, wanted)
    )
    assert note.connection.execute(joined).scalars().all() == ["b"]
    run("DELETE FROM note")
    assert note.pending() == []


def test_keys_of_several_columns(types: None, make: Any) -> None:
    note = make(
        'note (day timestamptz, mood mood, "a b" uuid, title text, e vector(3), '
        'PRIMARY KEY (mood, "a b", day))',
        ("title",),
    )
    note.run(
        "INSERT INTO note VALUES ('2024-02-03 04:05:06+02', 'so so', "
        "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', 'a', NULL)"
    )
    assert note.binding.key_columns == ("mood", "a b", "day")
    (key,) = note.pending()
    assert key == '["so so", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "2024-02-03T02:05:06Z"]'
    clause = note.binding.clause()
    assert note.connection.execute(sa.select(note.binding.key_text(clause))).scalar_one() == key
    wanted = note.binding.unpacked([key, key.replace("so so", "fine")])
    found = sa.select(wanted.c.key, clause.c.title).join_from(
        wanted, clause, note.binding.matches(clause, wanted), isouter=True
    )
    rows = note.connection.execute(found.order_by(wanted.c.key.desc())).all()
    assert [row.title for row in rows] == ["a", None]


@pytest.mark.parametrize("type_", ["float8", "interval", "int[]", "int4range", "money", "timetz"])
def test_types_without_a_text_of_their_own_are_refused(make: Any, type_: str) -> None:
    with pytest.raises(BindingError, match=r"has no key by which a row could be named\. Give it"):
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
            pytest.raises(BindingError, match="not a permanent table"),
            note.connection.begin_nested(),
            translated(),
        ):
            note.run(
                "SELECT sbert.bind_v1(CAST(:n AS regclass), 'e', "
                "jsonb_build_object('name', 'x', 'dimensions', 3), "
                "jsonb_build_object('columns', ARRAY['title']))",
                n=name,
            )


def test_an_unsized_vector_and_halfvec(make: Any) -> None:
    note = make("note (id int PRIMARY KEY, title text, e halfvec)", ("title",))
    assert note.binding.storage == "halfvec"
    note.attest()
    note.run("INSERT INTO note VALUES (1, 'a', '[1,0,0]')")
    note.run("UPDATE note SET title = 'b', e = '[0,1,0]'")
    assert note.pending() == []
