"""Roles that own little: an owner without superuser, writers without rights, row-level security."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from sbert_pg import catalog
from sbert_pg.catalog.sqlstates import translated
from sbert_pg.errors import CatalogError
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.guard import ColumnIdentity


def act_as(connection: Connection, role: str | None) -> None:
    connection.execute(sa.text(f"SET ROLE {role}" if role else "RESET ROLE"))


def test_a_writer_of_texts_needs_no_right_on_the_catalog(note: Any, role: str) -> None:
    note.fill("a")
    note.run(f"GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON note TO {role}")
    note.run(f"GRANT USAGE ON SEQUENCE note_id_seq TO {role}")
    act_as(note.connection, role)
    note.run("INSERT INTO note (title) VALUES ('b'), ('c')")
    note.run("UPDATE note SET title = 'x' WHERE id = 1")
    note.run("UPDATE note SET id = 30 WHERE id = 3")
    note.run("DELETE FROM note WHERE id = 2")
    with (
        pytest.raises(sa.exc.ProgrammingError, match="permission denied for schema sbert"),
        note.connection.begin_nested(),
    ):
        note.run("SELECT * FROM sbert.pending")
    act_as(note.connection, None)
    assert note.pending() == ["1", "30"]
    act_as(note.connection, role)
    note.run("TRUNCATE note")
    act_as(note.connection, None)
    assert note.pending() == []


def test_a_writer_without_rights_is_told_whom_to_ask(note: Any, role: str) -> None:
    act_as(note.connection, role)
    with pytest.raises(CatalogError, match=rf"SELECT sbert\.grant_v1\('{role}', 'writer'\)"):
        catalog.binding_of(note.connection, note.binding.identity)


def test_a_writer_seals_and_attests(note: Any, role: str) -> None:
    note.run("SELECT sbert.grant_v1(:r, 'writer')", r=role)
    note.run(f"GRANT SELECT, INSERT ON note TO {role}")
    note.run(f"GRANT USAGE ON SEQUENCE note_id_seq TO {role}")
    note.connection.commit()
    act_as(note.connection, role)
    encoder = DeterministicEncoder(dimensions=3)
    catalog.seal(note.connection, note.binding, encoder)
    binding = catalog.require_binding(note.connection, note.binding.identity)
    assert binding.fingerprint == encoder.spec.fingerprint
    note.run("SELECT sbert.attest_v1('note', 'e', :f)", f=binding.fingerprint)
    note.run("INSERT INTO note (title, e) VALUES ('a', '[1,0,0]')")
    for statement in (
        "DELETE FROM sbert.pending",
        "UPDATE sbert.embedding_column SET state = 'replaced'",
        "INSERT INTO sbert.compatible_encoder VALUES (1, 'x', '{}', '{}')",
        "SELECT sbert.unbind_v1('note', 'e')",
        "SELECT sbert.forget_v1(1)",
    ):
        with (
            pytest.raises(CatalogError, match="may not do that"),
            note.connection.begin_nested(),
            translated(),
        ):
            note.run(statement)


def test_a_reader_only_reads(note: Any, role: str) -> None:
    note.run("SELECT sbert.grant_v1(:r, 'reader')", r=role)
    act_as(note.connection, role)
    assert catalog.require_binding(note.connection, note.binding.identity) == note.binding
    assert note.run("SELECT table_name FROM sbert.status").scalar_one() == "note"
    with pytest.raises(CatalogError, match="may not do that"):
        catalog.seal(note.connection, note.binding, DeterministicEncoder(dimensions=3))


def test_a_worker_works_off_marks(note: Any, role: str) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    note.run("SELECT sbert.grant_v1(:r, 'worker')", r=role)
    note.run(f"GRANT SELECT, UPDATE ON note TO {role}")
    act_as(note.connection, role)
    note.run("UPDATE sbert.pending SET lease_until = now(), claimed_by = 'w'")
    note.attest(verified=True)
    note.run("UPDATE note SET e = '[1,0,0]'")
    note.run("DELETE FROM sbert.pending")
    note.run("INSERT INTO sbert.backfill (column_id) VALUES (1)")
    note.run("UPDATE sbert.embedding_column SET state = 'filling'")


def test_a_binder_binds_its_own_tables_only(note: Any, role: str) -> None:
    note.run("SELECT sbert.grant_v1(:r, 'binder')", r=role)
    note.run(f"GRANT CREATE ON SCHEMA public TO {role}")
    note.connection.commit()
    act_as(note.connection, role)
    declared, source = note.binding.declared, Source.of("title")
    note.run("CREATE TABLE mine (id int PRIMARY KEY, title text, e vector(3))")
    mine = catalog.bind(note.connection, ColumnIdentity(None, "mine", "e"), declared, source)
    note.run("INSERT INTO mine VALUES (1, 'a', NULL)")
    act_as(note.connection, None)
    owner = note.run(
        "SELECT pg_get_userbyid(proowner) FROM pg_proc WHERE proname = :n",
        n=f"updated_{mine.id}",
    ).scalar_one()
    assert owner == role, "the triggers have no more rights than who bound the column"
    note.run("CREATE TABLE theirs (id int PRIMARY KEY, title text, e vector(3))")
    act_as(note.connection, role)
    with pytest.raises(CatalogError, match="has to own its table"), note.connection.begin_nested():
        catalog.bind(note.connection, ColumnIdentity(None, "theirs", "e"), declared, source)
    catalog.unbind(note.connection, ColumnIdentity(None, "mine", "e"))


def test_a_trigger_function_cannot_be_borrowed(note: Any, role: str) -> None:
    note.run("SELECT sbert.grant_v1(:r, 'binder')", r=role)
    note.run(f"GRANT CREATE ON SCHEMA public TO {role}")
    act_as(note.connection, role)
    note.run("CREATE TABLE trap (id int, title text, body text, e vector(3))")
    with pytest.raises(sa.exc.ProgrammingError, match=r"permission denied for function sbert\.upd"):
        note.run(
            "CREATE TRIGGER t AFTER UPDATE ON trap FOR EACH ROW "
            f"EXECUTE FUNCTION sbert.updated_{note.binding.id}()"
        )


def test_a_search_path_of_the_writer_does_not_matter(note: Any, role: str) -> None:
    """A schema before pg_catalog, with functions and operators that lie."""
    note.run("CREATE SCHEMA evil")
    note.run("CREATE FUNCTION evil.strpos(text, text) RETURNS int LANGUAGE sql AS 'SELECT 1'")
    note.run("CREATE FUNCTION evil.lies(text, text) RETURNS bool LANGUAGE sql AS 'SELECT true'")
    note.run("CREATE OPERATOR evil.= (leftarg = text, rightarg = text, function = evil.lies)")
    note.run(f"GRANT USAGE ON SCHEMA evil TO {role}")
    note.run(f"GRANT SELECT, INSERT, UPDATE ON note TO {role}")
    note.run(f"GRANT USAGE ON SEQUENCE note_id_seq TO {role}")
    act_as(note.connection, role)
    note.run("SET LOCAL search_path = evil, pg_catalog, public")
    note.run("INSERT INTO note (title) VALUES ('a')")
    note.run("UPDATE note SET title = 'b'")
    with (
        pytest.raises(sa.exc.DBAPIError, match="has not been held against it"),
        note.connection.begin_nested(),
    ):
        note.run("UPDATE note SET e = '[1,0,0]'")
    act_as(note.connection, None)
    assert note.pending() == ["1"]


def test_row_level_security_hides_nothing_from_the_triggers(note: Any, role: str) -> None:
    note.run("ALTER TABLE note ENABLE ROW LEVEL SECURITY")
    note.run(f"CREATE POLICY own ON note TO {role} USING (title = 'mine') WITH CHECK (true)")
    note.run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON note TO {role}")
    note.run(f"GRANT USAGE ON SEQUENCE note_id_seq TO {role}")
    act_as(note.connection, role)
    note.run("INSERT INTO note (title) VALUES ('mine'), ('not visible to its writer')")
    note.run("UPDATE note SET title = 'given away'")
    act_as(note.connection, None)
    assert note.pending() == ["1", "2"]


def test_an_owner_without_superuser_installs_and_uses_everything(
    bare_database_url: sa.URL, role: str
) -> None:
    engine = sa.create_engine(bare_database_url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(
            sa.text(f'GRANT CREATE ON DATABASE "{bare_database_url.database}" TO {role}')
        )
        connection.execute(sa.text(f"GRANT CREATE ON SCHEMA public TO {role}"))
        connection.commit()
        act_as(connection, role)
        connection.commit()
        catalog.upgrade(connection)
        connection.execute(sa.text("CREATE TABLE n (id int PRIMARY KEY, t text, e vector(3))"))
        identity = ColumnIdentity(None, "n", "e")
        spec = EncoderSpec(name="deterministic", dimensions=3)
        binding = catalog.bind(connection, identity, spec, Source.of("t"), mark_pending=True)
        catalog.seal(connection, binding, DeterministicEncoder(dimensions=3))
        connection.execute(sa.text("INSERT INTO n VALUES (1, 'a', NULL)"))
        catalog.attest(connection, binding)
        connection.execute(sa.text("UPDATE n SET t = 'b', e = '[1,0,0]'"))
        assert connection.execute(sa.text("SELECT count(*) FROM sbert.pending")).scalar_one() == 0
        catalog.unbind(connection, identity)
        catalog.downgrade(connection, "base")
        assert catalog.current(connection) is None
        connection.commit()
        act_as(connection, None)
        connection.execute(sa.text(f"DROP OWNED BY {role} CASCADE"))
        connection.commit()
    engine.dispose()
