"""The database's own guard: a vector that nobody vouches for does not get in, by any road."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog.sqlstates import as_error, sqlstate_of, translated
from sbert_pg.errors import BindingError, EncoderMismatchError, NotBoundError
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
        pytest.raises(Exception, match="has not been held against it"),
        raw.cursor() as cursor,
        cursor.copy("COPY note (title, e) FROM STDIN") as copy,
    ):
        copy.write_row(["a", "[1,0,0]"])
    note.connection.rollback()


def test_the_refusal_says_what_to_do(note: Any) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    message = refused(note, f"UPDATE note SET e = {VECTOR}")
    assert 'column e of table public.note belongs to encoder "deterministic"' in message
    assert "SELECT sbert.attest_v1('public.note', 'e', 'the fingerprint of the encoder')" in message


def test_what_carries_no_new_vector_is_not_refused(note: Any) -> None:
    note.fill("a")
    note.run("UPDATE note SET title = 'b'")
    note.run("UPDATE note SET e = e, views = 2")
    note.run("UPDATE note SET e = '[1,0,0]'")  # what it is already
    note.run("UPDATE note SET e = NULL")
    note.run("INSERT INTO note (title, e) VALUES ('c', NULL)")


def test_an_attestation_ends_with_its_transaction(note: Any) -> None:
    note.attest()
    note.run(f"INSERT INTO note (title, e) VALUES ('a', {VECTOR})")
    note.connection.commit()
    refused(note, f"INSERT INTO note (title, e) VALUES ('a', {VECTOR})")


def test_an_attestation_ends_with_its_savepoint(note: Any) -> None:
    with note.connection.begin_nested() as savepoint:
        note.attest()
        savepoint.rollback()
    refused(note, f"INSERT INTO note (title, e) VALUES ('a', {VECTOR})")
    with note.connection.begin_nested():
        note.attest()
    note.run(f"INSERT INTO note (title, e) VALUES ('a', {VECTOR})")


def test_an_attestation_is_for_one_column(note: Any) -> None:
    note.run("ALTER TABLE note ADD COLUMN e2 vector(3)")
    second = catalog.bind(
        note.connection,
        note.binding.identity._replace(column="e2"),
        note.binding.declared,
        note.binding.source,
    )
    note.attest()
    refused(note, f"INSERT INTO note (title, e2) VALUES ('a', {VECTOR})")
    catalog.attest(note.connection, second)
    note.run(f"INSERT INTO note (title, e, e2) VALUES ('a', {VECTOR}, {VECTOR})")


@pytest.mark.parametrize("setting", [",11,", ",1", "1,", ",,", "garbage", ",-1,"])
def test_only_the_number_itself_counts(note: Any, setting: str) -> None:
    note.run("SELECT set_config('sbert.attested', :value, true)", value=setting)
    refused(note, f"INSERT INTO note (title, e) VALUES ('a', {VECTOR})")


def test_attest_by_fingerprint_in_plain_sql(note: Any) -> None:
    attest = "SELECT sbert.attest_v1('note', 'e', :f)"
    with (
        pytest.raises(EncoderMismatchError, match="has not met its encoder yet"),
        note.connection.begin_nested(),
        translated(),
    ):
        note.run(attest, f="anything")
    catalog.seal(note.connection, note.binding, DeterministicEncoder(dimensions=3))
    sealed = catalog.binding_by_id(note.connection, note.binding.id).fingerprint
    with (
        pytest.raises(EncoderMismatchError, match="fingerprint wrong"),
        note.connection.begin_nested(),
        translated(),
    ):
        note.run(attest, f="wrong")
    note.run(attest, f=sealed)
    note.run(attest, f=sealed)
    assert note.run("SELECT current_setting('sbert.attested')").scalar_one() == (
        f",{note.binding.id},"
    )
    note.run(f"INSERT INTO note (title, e) VALUES ('a', {VECTOR})")
    with pytest.raises(NotBoundError), note.connection.begin_nested(), translated():
        note.run("SELECT sbert.attest_v1('note', 'title', 'x')")


def test_a_compatible_fingerprint_may_be_attested(note: Any) -> None:
    catalog.seal(note.connection, note.binding, DeterministicEncoder(dimensions=3))
    note.run(
        "SELECT sbert.add_compatible_v1(:id, 'int8-of-it', CAST('{}' AS jsonb), "
        "CAST('{}' AS jsonb))",
        id=note.binding.id,
    )
    note.run("SELECT sbert.attest_v1('note', 'e', 'int8-of-it')")
    note.run(f"INSERT INTO note (title, e) VALUES ('a', {VECTOR})")


@pytest.mark.parametrize(
    "change",
    [
        "encoder_name = 'other'",
        "declared = '{}'",
        "source = '{}'",
        "column_name = 'title'",
        "encoder_id = NULL",
        "dimensions = 4",
        "relation = 'pg_class'",
        "key_columns = '{title}'",
    ],
)
def test_a_binding_cannot_be_changed_by_hand(note: Any, change: str) -> None:
    catalog.seal(note.connection, note.binding, DeterministicEncoder(dimensions=3))
    with (
        pytest.raises(BindingError, match=r"for life"),
        note.connection.begin_nested(),
        translated(),
    ):
        note.run(f"UPDATE sbert.embedding_column SET {change}")
    note.run("UPDATE sbert.embedding_column SET state = 'replaced'")


def test_what_is_recorded_of_an_encoder_cannot_be_changed(note: Any) -> None:
    catalog.seal(note.connection, note.binding, DeterministicEncoder(dimensions=3))
    for statement in (
        "UPDATE sbert.encoder SET fingerprint = 'x'",
        "DELETE FROM sbert.embedding_column",
    ):
        with pytest.raises(BindingError), note.connection.begin_nested(), translated():
            note.run(statement)


def test_other_errors_of_the_driver_stay_what_they_are(note: Any) -> None:
    with pytest.raises(sa.exc.IntegrityError) as caught, note.connection.begin_nested():
        note.run("INSERT INTO note (id) VALUES (1), (1)")
    assert as_error(caught.value) is None
