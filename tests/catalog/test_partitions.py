"""Partitioned tables: a statement's triggers do not reach a partition that is named directly."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.errors import BindingError
from sbert_pg.sqlstates import sqlstate_of
from sbert_pg.system import ColumnIdentity

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


def fill(note: Any, *rows: tuple[int, str, str]) -> None:
    for number, region, title in rows:
        note.run(
            "INSERT INTO note (id, region, title, e, e_of) VALUES (:i, :r, :t, '[1,0,0]', :d)",
            i=number,
            r=region,
            t=title,
            d=note.digest(title),
        )
    note.connection.commit()


@pytest.mark.parametrize("target", ["note", "note_eu"])
def test_every_road_counts(note: Any, target: str) -> None:
    note.run(f"INSERT INTO {target} (id, region, title) VALUES (1, 'eu', 'a'), (2, 'eu', NULL)")
    assert note.pending() == ["1 eu"]
    note.run(f"UPDATE {target} SET title = 'b' WHERE id = 2")
    assert note.pending() == ["1 eu", "2 eu"]
    note.run(f"DELETE FROM {target} WHERE id = 2")
    assert note.pending() == ["1 eu"]


@pytest.mark.parametrize("target", ["note", "note_eu"])
def test_every_road_is_guarded(note: Any, target: str) -> None:
    fill(note, (2, "eu", "a"))
    for write in (
        "INSERT INTO {} (id, region, title, e) VALUES (1, 'eu', 'a', '[1,0,0]')",
        "UPDATE {} SET e = '[0,1,0]'",
    ):
        with pytest.raises(sa.exc.DBAPIError) as caught, note.connection.begin_nested():
            note.run(write.format(target))
        assert sqlstate_of(caught.value.orig) == "SB001"


def test_a_partition_that_comes_later(note: Any) -> None:
    note.run("CREATE TABLE note_asia PARTITION OF note FOR VALUES IN ('asia')")
    note.run("CREATE TABLE note_rest (LIKE note)")
    note.run(
        "INSERT INTO note_rest (id, region, title, e) VALUES (1, 'oz', 'no vector', NULL), "
        "(2, 'oz', 'foreign', '[1,2,3]'), (3, 'oz', NULL, NULL)"
    )
    note.run("ALTER TABLE note ATTACH PARTITION note_rest DEFAULT")
    note.run("INSERT INTO note_asia (id, region, title) VALUES (1, 'asia', 'a')")
    assert note.pending() == ["1 asia", "1 oz", "2 oz"]
    # A copy made by LIKE has no defaults, which is said.
    (problem,) = catalog.health(note.connection, note.binding)
    assert "does not default to the nil uuid" in problem


def test_a_partition_that_changes_while_it_is_away(note: Any) -> None:
    fill(note, (1, "eu", "a"), (2, "eu", "b"), (3, "us", "c"))
    note.run("ALTER TABLE note DETACH PARTITION note_eu")
    assert note.pending() == []
    note.run("UPDATE note_eu SET title = 'changed' WHERE id = 2")
    note.run("ALTER TABLE note ATTACH PARTITION note_eu FOR VALUES IN ('eu')")
    assert note.pending() == ["2 eu"]


def test_moving_to_another_partition(note: Any) -> None:
    fill(note, (1, "eu", "a"), (2, "eu", "b"), (3, "us", "c"))
    note.run("UPDATE note SET region = CASE region WHEN 'eu' THEN 'us' ELSE 'eu' END")
    assert note.pending() == [], "nobody wrote a vector or a text"
    note.run("UPDATE note SET region = 'us', title = 'new' WHERE id = 3")
    assert note.pending() == ["3 us"]
    with pytest.raises(sa.exc.DBAPIError) as caught, note.connection.begin_nested():
        note.run("UPDATE note SET region = 'eu', e = '[0,1,0]' WHERE id = 1")
    assert sqlstate_of(caught.value.orig) == "SB001"


def test_a_row_whose_vector_nobody_proved_may_move(note: Any) -> None:
    note.run("INSERT INTO note (id, region, title, e, e_of) VALUES (1, 'eu', 'a', '[1,2,3]', NULL)")
    note.run("UPDATE note SET region = 'us'")
    assert note.pending() == ["1 us"]


@pytest.mark.parametrize(
    "move",
    [
        "UPDATE note SET region = 'us'",
        "UPDATE note SET region = 'us', title = 'b'",
        "MERGE INTO note USING (SELECT 1) s ON id = 1 WHEN MATCHED THEN UPDATE SET region = 'us'",
    ],
)
@pytest.mark.parametrize("said", ["NULL", "gen_random_uuid()", "DEFAULT"])
def test_a_foreign_vector_that_no_trigger_saw_may_move(note: Any, said: str, move: str) -> None:
    """It stays pending, as what is new, and nothing but its companion changes on the way."""
    note.run("SET LOCAL session_replication_role = replica")
    note.run(
        f"INSERT INTO note (id, region, title, e, e_of) VALUES (1, 'eu', 'a', '[1,2,3]', {said})"
    )
    note.run("SET LOCAL session_replication_role = origin")
    note.run(move)
    assert note.pending() == ["1 us"]
    assert note.run("SELECT CAST(e AS text) FROM note").scalar_one() == "[1,2,3]"
    t = note.binding.clause()
    expected = 1 if said == "NULL" else 0
    assert note.connection.scalar(sa.select(note.binding.class_of(t))) == expected
    note.run("UPDATE note SET region = 'eu', e = '[0,1,0]'")
    assert note.pending() == ["1 eu"], "another foreign vector changes nothing"


def test_the_queue_reaches_every_partition(note: Any) -> None:
    note.run(
        "INSERT INTO note (id, region, title) SELECT g, 'eu', 'x' FROM generate_series(1, 99) g"
    )
    [queue, _] = catalog.queue_indexes(note.connection, note.binding)
    t = note.binding.clause()
    claim = sa.select(t.c.id).where(note.binding.is_stale(t), note.binding.class_of(t) == 0)
    note.run("SET LOCAL enable_seqscan = off")
    compiled = claim.compile(note.connection, compile_kwargs={"literal_binds": True})
    plan = note.connection.exec_driver_sql("EXPLAIN " + str(compiled).replace("%%", "%"))
    assert "Seq Scan" not in "\n".join(plan.scalars())
    children = note.run(
        "SELECT count(*) FROM pg_inherits WHERE inhparent = CAST(:i AS regclass)", i=queue.existing
    )
    assert children.scalar_one() == 2


def test_a_partition_stands_for_its_table(note: Any) -> None:
    found = catalog.binding_of(note.connection, ColumnIdentity(None, "note_eu", "e"))
    assert found is not None
    assert found.id == note.id
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
    note.run("UPDATE parent SET title = 'b'")
    assert type(note)(note.connection, "child", child.id).pending() == ["1"]
