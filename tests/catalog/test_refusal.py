"""The database's own guard: a vector that nobody vouches for does not get in, by any road."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.errors import BindingError, EncoderMismatchError, NotBoundError
from sbert_pg.sqlstates import as_error, sqlstate_of, translated
from sbert_pg.testing import DeterministicEncoder

VECTOR = "'[1,0,0]'"


def refused(note: Any, statement: str) -> str:
    with pytest.raises(sa.exc.DBAPIError) as caught, note.connection.begin_nested():
        note.run(statement)
    assert sqlstate_of(caught.value.orig) == "SB001"
    return str(caught.value.orig)


@pytest.mark.parametrize(
    "statement",
    [
        f"INSERT INTO note (title, e) VALUES ('a', {VECTOR})",
        f"INSERT INTO note (title, e) SELECT 'a', {VECTOR} FROM generate_series(1, 3)",
        f"INSERT INTO note (id, title) VALUES (1, 'a') ON CONFLICT (id) DO UPDATE SET e = {VECTOR}",
        f"UPDATE note SET e = {VECTOR}",
        f"UPDATE note SET title = 'b', e = {VECTOR}",
        f"UPDATE note SET e = {VECTOR}, e_of = gen_random_uuid()",
        f"UPDATE note SET e = {VECTOR}, e_of = NULL",
        f"MERGE INTO note USING note s ON s.id = note.id WHEN MATCHED THEN UPDATE SET e = {VECTOR}",
        f"WITH x AS (UPDATE note SET e = {VECTOR} RETURNING 1) SELECT 1",
    ],
)
def test_plain_sql_is_refused(note: Any, statement: str) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    refused(note, statement)
    assert note.run("SELECT count(*) FROM note WHERE e IS NOT NULL").scalar_one() == 0


def test_copy_is_refused(note: Any) -> None:
    raw = note.connection.connection.driver_connection
    with (
        pytest.raises(Exception, match="nothing proves that the vector was made by it"),
        raw.cursor() as cursor,
        cursor.copy("COPY note (title, e) FROM STDIN") as copy,
    ):
        copy.write_row(["a", "[1,0,0]"])
    note.connection.rollback()


def test_another_rows_proof_does_for_its_vector_only(note: Any) -> None:
    note.fill("a")
    note.run("INSERT INTO note (title, e, e_of) SELECT 'b', e, e_of FROM note")
    assert note.pending() == ["2"], "a copy has the vector of another text"
    refused(note, "INSERT INTO note (title, e, e_of) SELECT 'c', '[0,1,0]', e_of FROM note")
    refused(note, "UPDATE note SET e = '[0,1,0]'")


def test_the_refusal_says_what_to_do(note: Any) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    message = refused(note, f"UPDATE note SET e = {VECTOR}")
    assert 'column e of table public.note belongs to encoder "deterministic"' in message
    assert "sbert.proof_v1('public.note', 'e', 'the fingerprint of the encoder'" in message


def test_what_carries_no_new_vector_is_not_refused(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET title = 'b'")
    note.run("UPDATE note SET e = e, views = 2")
    note.run("UPDATE note SET e = '[1,0,0]'")  # what it is already
    note.run("UPDATE note SET e_of = NULL")  # asks for a new one
    note.run("UPDATE note SET e = '[1,0,0]', title = 'c'")
    note.run("UPDATE note SET e = NULL")
    note.run("INSERT INTO note (title, e) VALUES ('c', NULL)")


def test_rows_that_come_as_they_were_are_pending(note: Any) -> None:
    """A restore, or a row that moves, brings its companion: nobody writes a vector."""
    note.run("INSERT INTO note (title, e, e_of) VALUES ('a', '[1,0,0]', NULL)")
    assert note.pending() == ["1"]
    t = note.binding.clause()
    assert not note.connection.scalar(sa.select(note.binding.is_proven(t)))


def test_a_proof_is_for_one_column(note: Any) -> None:
    note.run("ALTER TABLE note ADD COLUMN e2 vector(3)")
    catalog.bind(
        note.connection,
        note.binding.identity._replace(column="e2"),
        note.binding.declared,
        note.binding.source,
    )
    with pytest.raises(sa.exc.DBAPIError) as caught, note.connection.begin_nested():
        note.run(
            f"INSERT INTO note (title, e2, e2_of) VALUES ('a', {VECTOR}, :d)", d=note.digest("a")
        )
    assert sqlstate_of(caught.value.orig) == "SB001"


def test_a_proof_of_a_binding_that_is_no_more(note: Any, connection: sa.Connection) -> None:
    """A process that knows the column from before writes nothing that counts."""
    old = note.digest("a")
    binding = note.binding
    catalog.unbind(connection, binding.identity)
    again = catalog.bind(connection, binding.identity, binding.declared, binding.source)
    assert again.id != note.id
    with pytest.raises(sa.exc.DBAPIError, match="tries once more"), connection.begin_nested():
        note.run(f"INSERT INTO note (title, e, e_of) VALUES ('a', {VECTOR}, :d)", d=old)
    note.run("SET LOCAL session_replication_role = replica")
    note.run(f"INSERT INTO note (title, e, e_of) VALUES ('a', {VECTOR}, :d)", d=old)
    t = again.clause()
    assert connection.scalar(sa.select(again.is_stale(t)))
    assert not connection.scalar(sa.select(again.is_proven(t)))


def test_a_writer_of_plain_sql_proves_itself_by_fingerprint(note: Any) -> None:
    prove = f"SELECT sbert.proof_v1('note', 'e', :f, 'a', {VECTOR}::vector)".replace("::", "\\:\\:")
    with (
        pytest.raises(EncoderMismatchError, match="not known yet"),
        note.connection.begin_nested(),
        translated(),
    ):
        note.run(prove, f="anything")
    catalog.hold_encoder(note.connection, note.binding, DeterministicEncoder(dimensions=3))
    sealed = note.binding.fingerprint
    for wrong in ("wrong", None):
        with (
            pytest.raises(EncoderMismatchError),
            note.connection.begin_nested(),
            translated(),
        ):
            note.run(prove, f=wrong)
    assert note.run(prove, f=sealed).scalar_one() == note.digest("a")
    note.run(
        f"INSERT INTO note (title, e, e_of) "
        f"SELECT 'a', v, sbert.proof_v1('note', 'e', :f, 'a', v) "
        f"FROM (SELECT CAST({VECTOR} AS vector) AS v) AS made",
        f=sealed,
    )
    assert note.pending() == []
    with pytest.raises(NotBoundError), note.connection.begin_nested(), translated():
        note.run(prove.replace("'e'", "'title'"), f="x")


def test_a_compatible_fingerprint_proves_as_well(note: Any) -> None:
    catalog.hold_encoder(note.connection, note.binding, DeterministicEncoder(dimensions=3))
    note.run(
        "SELECT sbert.add_compatible_v1(:id, 'int8-of-it', CAST('{}' AS jsonb), "
        "CAST('{}' AS jsonb))",
        id=note.id,
    )
    prove = f"SELECT sbert.proof_v1('note', 'e', 'int8-of-it', 'a', CAST({VECTOR} AS vector))"
    assert note.run(prove).scalar_one() == note.digest("a")


@pytest.mark.parametrize("storage", ["vector", "halfvec"])
def test_proven_by_the_function_as_by_the_expression(make: Any, storage: str) -> None:
    note = make(f"note (id bigserial PRIMARY KEY, title text, e {storage}(3))", ("title",))
    note.fill("a")
    note.run("INSERT INTO note (title) VALUES ('b')")
    note.run("INSERT INTO note (title, e, e_of) VALUES ('c', '[0,1,0]', NULL)")
    note.run("SET LOCAL session_replication_role = replica")
    note.run("INSERT INTO note (title, e, e_of) SELECT 'd', '[0,1,0]', e_of FROM note WHERE id = 1")
    head = f"{storage}_send(subvector(e, 1, 8))"
    by_function = f"SELECT id FROM note WHERE sbert.proven_v1({head}, e_of, :id) ORDER BY id"
    t = note.binding.clause()
    by_expression = (
        sa.select(t.c.id).where(note.binding.expressions.on(t, "proven")).order_by(t.c.id)
    )
    assert note.run(by_function, id=note.id).scalars().all() == [1, 2]
    assert note.connection.scalars(by_expression).all() == [1, 2]
    unbound = f"SELECT bool_and(sbert.proven_v1({head}, e_of, NULL)) FROM note"
    assert note.run(unbound).scalar_one()


@pytest.mark.parametrize(
    "change",
    [
        "encoder_name = 'other'",
        "declared = '{}'",
        "source_columns = '{title}'",
        "encoder_id = NULL",
        "dimensions = 4",
        "relation = 'pg_class'",
        "key_columns = '{id,title}'",
        "id = gen_random_uuid()",
        "null_text = false",
        "storage = 'halfvec'",
    ],
)
def test_a_binding_cannot_be_changed_by_hand(note: Any, change: str) -> None:
    catalog.hold_encoder(note.connection, note.binding, DeterministicEncoder(dimensions=3))
    with (
        pytest.raises(BindingError, match=r"for life"),
        note.connection.begin_nested(),
        translated(),
    ):
        note.run(f"UPDATE sbert.binding SET {change}")
    note.run("UPDATE sbert.binding SET state = 'replaced'")


def test_what_is_recorded_of_an_encoder_cannot_be_changed(note: Any) -> None:
    catalog.hold_encoder(note.connection, note.binding, DeterministicEncoder(dimensions=3))
    with pytest.raises(BindingError), note.connection.begin_nested(), translated():
        note.run("UPDATE sbert.encoder SET fingerprint = 'x'")


def test_other_errors_of_the_driver_stay_what_they_are(note: Any) -> None:
    with pytest.raises(sa.exc.IntegrityError) as caught, note.connection.begin_nested():
        note.run("INSERT INTO note (id) VALUES (1), (1)")
    assert as_error(caught.value) is None
