"""Partitioned tables: a statement's triggers do not reach a partition that is named directly."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog.sqlstates import sqlstate_of
from sbert_pg.errors import BindingError
from sbert_pg.types.guard import ColumnIdentity

DDL = (
    "note (id int, region text, title text, e vector(3), PRIMARY KEY (id, region)) "
    "PARTITION BY LIST (region)"
)
PARTS = (
    "CREATE TABLE note_eu PARTITION OF note FOR VALUES IN ('eu')",
    "CREATE TABLE note_us PARTITION OF note FOR VALUES IN ('us')",
)


@pytest.fixture
def note(make: Any) -> Any:
    return make(DDL, ("title",), *PARTS)


def key(number: int, region: str) -> str:
    return f'["{number}", "{region}"]'


def fill(note: Any, *rows: tuple[int, str, str]) -> None:
    note.attest()
    for number, region, title in rows:
        note.run(
            "INSERT INTO note VALUES (:i, :r, :t, CAST(:v AS vector))",
            i=number,
            r=region,
            t=title,
            v=f"[{number},0,0]",
        )
    note.connection.commit()


@pytest.mark.parametrize("target", ["note", "note_eu"])
def test_every_road_is_noticed(note: Any, target: str) -> None:
    note.run(f"INSERT INTO {target} (id, region, title) VALUES (1, 'eu', 'a'), (2, 'eu', NULL)")
    assert note.pending() == [key(1, "eu")]
    note.clear()
    note.run(f"UPDATE {target} SET title = 'b' WHERE id = 2")
    assert note.pending() == [key(2, "eu")]
    note.run(f"DELETE FROM {target} WHERE id = 2")
    assert note.pending() == []


@pytest.mark.parametrize("target", ["note", "note_eu"])
@pytest.mark.parametrize("write", ["INSERT INTO {} VALUES (1, 'eu', 'a', '[1,0,0]')"])
def test_every_road_is_guarded(note: Any, target: str, write: str) -> None:
    with pytest.raises(sa.exc.DBAPIError) as caught, note.connection.begin_nested():
        note.run(write.format(target))
    assert sqlstate_of(caught.value.orig) == "SB001"
    fill(note, (1, "eu", "a"))
    with pytest.raises(sa.exc.DBAPIError) as caught, note.connection.begin_nested():
        note.run(f"UPDATE {target} SET e = '[0,1,0]'")
    assert sqlstate_of(caught.value.orig) == "SB001"


def test_a_partition_that_comes_later(note: Any) -> None:
    note.run("CREATE TABLE note_asia PARTITION OF note FOR VALUES IN ('asia')")
    note.run("CREATE TABLE note_rest (LIKE note)")
    note.run("ALTER TABLE note ATTACH PARTITION note_rest DEFAULT")
    note.run("INSERT INTO note_asia (id, region, title) VALUES (1, 'asia', 'a')")
    note.run("INSERT INTO note_rest (id, region, title) VALUES (1, 'oz', 'a')")
    assert note.pending() == [key(1, "asia"), key(1, "oz")]


def test_moving_to_another_partition_keeps_a_fresh_vector_fresh(note: Any) -> None:
    fill(note, (1, "eu", "a"), (2, "eu", "b"), (3, "us", "c"))
    note.run("UPDATE note SET region = CASE region WHEN 'eu' THEN 'us' ELSE 'eu' END")
    assert note.pending() == [], "nobody wrote a vector or a text, so nobody has to vouch"


def test_moving_with_a_new_text_is_noticed(note: Any) -> None:
    fill(note, (1, "eu", "a"), (2, "eu", "b"))
    note.run("UPDATE note SET region = 'us', title = 'new' WHERE id = 2")
    assert note.pending() == [key(2, "us")]


def test_moving_with_a_new_text_is_noticed_of_vouched_writers_too(note: Any) -> None:
    fill(note, (1, "eu", "a"), (2, "eu", "b"))
    note.attest()
    note.run("UPDATE note SET region = 'us', title = CASE id WHEN 2 THEN 'new' ELSE title END")
    assert note.pending() == [key(2, "us")]


def test_moving_takes_the_mark_along(note: Any) -> None:
    fill(note, (1, "eu", "a"))
    note.run("UPDATE note SET title = 'b'")
    note.run("INSERT INTO note (id, region, title) VALUES (2, 'eu', 'c')")
    note.run("UPDATE note SET region = 'us'")
    assert note.pending() == [key(1, "us"), key(2, "us")]


def test_moving_with_a_new_vector_needs_an_attestation(note: Any) -> None:
    fill(note, (1, "eu", "a"))
    with pytest.raises(sa.exc.DBAPIError) as caught, note.connection.begin_nested():
        note.run("UPDATE note SET region = 'us', e = '[0,1,0]'")
    assert sqlstate_of(caught.value.orig) == "SB001"
    note.attest()
    note.run("UPDATE note SET region = 'us', title = 'b', e = '[0,1,0]'")
    assert note.pending() == []
    note.run("UPDATE note SET region = 'eu', e = '[0,0,1]'")
    assert note.pending() == [key(1, "eu")], "a vector alone may be of an older text"


def test_a_bulk_load_by_a_verified_writer_calls_no_trigger(note: Any) -> None:
    note.attest(verified=True)
    note.run("INSERT INTO note SELECT i, 'eu', 't', '[1,0,0]' FROM generate_series(1, 50) AS i")
    note.run("INSERT INTO note (id, region, title) VALUES (99, 'eu', 'no vector')")
    assert note.pending() == [key(99, "eu")]


def test_truncate(note: Any) -> None:
    note.run("INSERT INTO note (id, region, title) VALUES (1, 'eu', 'a')")
    note.run("TRUNCATE note")
    assert note.pending() == []


def test_a_partition_stands_for_its_table(note: Any) -> None:
    found = catalog.binding_of(note.connection, ColumnIdentity(None, "note_eu", "e"))
    assert found is not None
    assert found.id == note.binding.id
    assert found.partitioned
    with pytest.raises(BindingError, match=r"note_eu is a partition.*Bind the partitioned table"):
        catalog.bind(
            note.connection,
            ColumnIdentity(None, "note_eu", "e"),
            note.binding.declared,
            note.binding.source,
        )


def test_inheritance(make: Any) -> None:
    note = make(
        "note (id int PRIMARY KEY, title text, e vector(3))",
        ("title",),
        "CREATE TABLE parent (id int PRIMARY KEY, title text, e vector(3))",
        "CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent)",
    )
    declared, source = note.binding.declared, note.binding.source
    with (
        pytest.raises(BindingError, match="child tables by inheritance"),
        note.connection.begin_nested(),
    ):
        catalog.bind(note.connection, ColumnIdentity(None, "parent", "e"), declared, source)
    child = catalog.bind(note.connection, ColumnIdentity(None, "child", "e"), declared, source)
    note.run("INSERT INTO child (id, title) VALUES (1, 'a')")
    note.run("DELETE FROM sbert.pending")
    note.run("UPDATE parent SET title = 'b'")
    found = note.run("SELECT column_id, key FROM sbert.pending").all()
    assert found == [(child.id, "1")], "a change by way of the parent reaches the child's trigger"
