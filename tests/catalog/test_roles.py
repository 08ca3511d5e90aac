"""Roles that own little: what a capability may do, and that it ends at the caller's tables."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from sbert_pg import catalog
from sbert_pg.errors import CatalogError
from sbert_pg.registry import use_encoder
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.sqlstates import translated
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder


def act_as(connection: Connection, role: str | None) -> None:
    connection.execute(sa.text(f"SET ROLE {role}" if role else "RESET ROLE"))


def grant(note: Any, role: str, capability: str, *privileges: str) -> None:
    """Give a role a capability, and privileges on the table; then act as it."""
    note.run("SELECT sbert.grant_v1(:r, :c)", r=role, c=capability)
    if privileges:
        note.run(f"GRANT {', '.join(privileges)} ON note TO {role}")
        note.run(f"GRANT USAGE ON SEQUENCE note_id_seq TO {role}")
    note.connection.commit()
    act_as(note.connection, role)


def denied(note: Any, statement: str, **parameters: Any) -> None:
    with pytest.raises(CatalogError), note.connection.begin_nested(), translated():
        note.run(statement, **parameters)


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
        note.run("SELECT * FROM sbert.failure")
    act_as(note.connection, None)
    assert note.pending() == ["1", "30"]


def test_a_writer_without_rights_is_told_whom_to_ask(note: Any, role: str) -> None:
    identity = note.binding.identity
    act_as(note.connection, role)
    with pytest.raises(CatalogError, match=rf"SELECT sbert\.grant_v1\('{role}', 'writer'\)"):
        catalog.binding_of(note.connection, identity)


def test_a_writer_seals_and_proves(note: Any, role: str) -> None:
    grant(note, role, "writer", "SELECT", "INSERT")
    encoder = DeterministicEncoder(dimensions=3)
    catalog.hold_encoder(note.connection, note.binding, encoder)
    assert note.binding.fingerprint == encoder.spec.fingerprint
    note.fill("a")
    act_as(note.connection, role)
    assert note.pending() == []
    for statement in (
        "DELETE FROM sbert.failure",
        "INSERT INTO sbert.claim VALUES (:id, 'w', '{}', now())",
        "INSERT INTO sbert.vector_cache (fingerprint, digest, vector) VALUES ('f', '', '')",
        "UPDATE sbert.binding SET state = 'replaced'",
        "INSERT INTO sbert.compatible_encoder VALUES (:id, 'x', '{}', '{}')",
        "DELETE FROM sbert.encoder",
        "SELECT sbert.unbind_v1('note', 'e')",
        "SELECT sbert.forget_v1(:id)",
        "SELECT sbert.set_state_v1(:id, 'active', 'replaced')",
        "SELECT sbert.rename_v1('note', 'title', 'body')",
    ):
        denied(note, statement, **({"id": note.id} if ":id" in statement else {}))


def test_a_writer_of_one_table_is_nobody_on_another(note: Any, make: Any, role: str) -> None:
    other = make("other (id bigserial PRIMARY KEY, title text, e vector(3))", ("title",))
    grant(note, role, "writer", "SELECT", "INSERT", "UPDATE")
    assert [b.table for b in catalog.all_bindings(note.connection)] == ["note"]
    seal = (
        "SELECT sbert.seal_v1(:id, 'f', NULL, jsonb_build_object('name', 'x', "
        "'dimensions', 3, 'similarity', 'cosine'), decode(repeat('00', 12), 'hex'))"
    )
    compatible = (
        "SELECT sbert.add_compatible_v1(:id, 'x', CAST('{}' AS jsonb), CAST('{}' AS jsonb))"
    )
    for statement in (seal, compatible):
        denied(note, statement, id=other.id)
    note.run(seal, id=note.id)
    note.run(compatible, id=note.id)


def test_a_reader_only_reads_what_is_its_own(note: Any, make: Any, role: str) -> None:
    make("other (id bigserial PRIMARY KEY, title text, e vector(3))", ("title",))
    for table in ("note", "other"):
        note.run(
            "INSERT INTO sbert.failure (binding_id, key, error) SELECT id, '[secret]', 'secret' "
            "FROM sbert.binding WHERE relation = CAST(:t AS regclass)", t=table,
        )  # fmt: skip
    note.run("INSERT INTO sbert.vector_cache (fingerprint, digest, vector) VALUES ('f', '', '')")
    grant(note, role, "reader", "SELECT")
    assert note.run("SELECT table_name FROM sbert.status").scalars().all() == ["note"]
    assert note.run("SELECT binding_id FROM sbert.failure").scalars().all() == [note.id]
    denied(note, "SELECT * FROM sbert.vector_cache")
    with pytest.raises(CatalogError, match="may not do that"):
        catalog.hold_encoder(note.connection, note.binding, DeterministicEncoder(dimensions=3))


def test_a_reader_without_any_table_sees_nothing(note: Any, role: str) -> None:
    note.run("INSERT INTO sbert.failure (binding_id, key) VALUES (:id, '[1]')", id=note.id)
    grant(note, role, "reader")
    for table in ("binding", "status", "failure", "claim", "reader", "compatible_encoder"):
        assert note.run(f"SELECT count(*) FROM sbert.{table}").scalar_one() == 0, table


def test_a_worker_works_on_what_it_may_write(note: Any, make: Any, role: str) -> None:
    other = make("other (id bigserial PRIMARY KEY, title text, e vector(3))", ("title",))
    note.run("INSERT INTO note (title) VALUES ('a')")
    note.run("INSERT INTO sbert.failure (binding_id, key) VALUES (:id, '[1]')", id=other.id)
    note.run("INSERT INTO sbert.vector_cache (fingerprint, digest, vector) VALUES ('f', '', '')")
    grant(note, role, "worker", "SELECT", "UPDATE")
    note.run("INSERT INTO sbert.claim VALUES (:id, 'w', '{}', now())", id=note.id)
    note.run("INSERT INTO sbert.failure (binding_id, key) VALUES (:id, '[1]')", id=note.id)
    note.run("UPDATE sbert.failure SET attempts = 3")
    note.run("SELECT sbert.note_v1(:id, now(), CAST('{}' AS jsonb))", id=note.id)
    note.run("SELECT sbert.set_state_v1(:id, 'active', 'filling')", id=note.id)
    said = note.run("SELECT caught_up_at FROM sbert.binding WHERE id = :id", id=note.id)
    assert said.scalar_one() is not None
    assert note.run("DELETE FROM sbert.failure RETURNING binding_id").scalars().all() == [note.id]
    # Its cached vectors are its own: nobody is given a vector that another role put there.
    assert note.run("SELECT count(*) FROM sbert.vector_cache").scalar_one() == 0
    note.run("INSERT INTO sbert.vector_cache (fingerprint, digest, vector) VALUES ('f', '', 'x')")
    for statement in (
        "INSERT INTO sbert.claim VALUES (:id, 'w', '{}', now())",
        "INSERT INTO sbert.failure (binding_id, key) VALUES (:id, '[2]')",
        "SELECT sbert.note_v1(:id, now())",
        "SELECT sbert.set_state_v1(:id, 'active', 'filling')",
    ):
        denied(note, statement, id=other.id)
    denied(
        note,
        "INSERT INTO sbert.vector_cache (role, fingerprint, digest, vector) "
        "VALUES ('postgres', 'g', '', '')",
    )
    act_as(note.connection, None)
    assert note.run("SELECT attempts FROM sbert.failure").scalars().all() == [0]


@pytest.fixture
def binder(note: Any, role: str) -> str:
    """A role that binds its own tables, while the other tables are somebody else's."""
    note.run(f"GRANT CREATE ON SCHEMA public TO {role}")
    grant(note, role, "binder")
    return role


def test_a_binder_binds_its_own_tables(note: Any, binder: str) -> None:
    note.run("CREATE TABLE mine (id int PRIMARY KEY, title text, e vector(3))")
    identity = ColumnIdentity(None, "mine", "e")
    declared, source = EncoderSpec(name="deterministic", dimensions=3), Source.of("title")
    mine = catalog.bind(note.connection, identity, declared, source)
    assert catalog.bind(note.connection, identity, declared, source).id == mine.id
    note.run("INSERT INTO mine (id, title) VALUES (1, 'a')")
    assert type(note)(note.connection, "mine", mine.id).pending() == ["1"]
    catalog.hold_encoder(note.connection, mine, DeterministicEncoder(dimensions=3))
    note.run("ALTER TABLE mine RENAME title TO heading")
    assert note.run("SELECT sbert.rename_v1('mine', 'title', 'heading')").scalar_one() == 1
    assert catalog.health(note.connection, mine) == []
    catalog.unbind(note.connection, identity)


BIND = (
    "SELECT sbert.{}({}'note', '{}', jsonb_build_object('name', 'd', 'dimensions', 3), "
    "jsonb_build_object('columns', ARRAY['title']), NULL)"
)


@pytest.mark.parametrize(
    "attack",
    [
        "UPDATE sbert.binding SET encoder_name = 'mine'",
        "UPDATE sbert.binding SET state = 'replaced'",
        "DELETE FROM sbert.binding",
        "DELETE FROM sbert.encoder",
        "INSERT INTO sbert.compatible_encoder VALUES (:id, 'x', '{}', '{}')",
        "INSERT INTO sbert.failure (binding_id, key) VALUES (:id, '[1]')",
        "SELECT sbert.unbind_v1('note', 'e')",
        BIND.format("bind_v1", "", "e"),
        BIND.format("record_v1", "", "e"),
        "SELECT sbert.forget_v1(:id)",
        "SELECT sbert.set_triggers_v1(:id)",
        "SELECT sbert.set_companion_v1(:id)",
        "SELECT sbert.rename_v1('note', 'title', 'body')",
        "SELECT sbert.end_replacement_v1(:id)",
        "SELECT sbert.resume_v1('note', 'e', 'e')",
        "SELECT sbert.set_state_v1(:id, 'active', 'replaced')",
        "SELECT sbert.note_v1(:id, now())",
        "SELECT sbert.add_compatible_v1(:id, 'x', CAST('{}' AS jsonb), CAST('{}' AS jsonb))",
        "SELECT sbert.require_same_v1(:id, NULL, NULL, NULL)",
        "SELECT sbert.grant_v1('public', 'binder')",
        "CREATE FUNCTION sbert.extra_v1() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE FUNCTION sbert.fence_v1(text) RETURNS bool LANGUAGE sql AS 'SELECT true'",
        "CREATE TABLE sbert.extra (x int)",
        "CREATE TRIGGER t BEFORE UPDATE ON sbert.binding EXECUTE FUNCTION sbert.wake_v1()",
        "ALTER TABLE sbert.binding DISABLE ROW LEVEL SECURITY",
    ],
)
@pytest.mark.parametrize("setting", ["", "sbert.maintenance", "sbert.attested", "row_security"])
def test_a_binder_reaches_nobody_elses_binding(
    note: Any, binder: str, attack: str, setting: str
) -> None:
    """Whatever it sets: no setting is a right."""
    identifier = note.id
    act_as(note.connection, None)
    before = note.run("SELECT * FROM sbert.binding").all()
    note.connection.commit()
    act_as(note.connection, binder)
    if setting:
        note.run("SELECT set_config(:s, 'on', true)", s=setting)
    try:
        with note.connection.begin_nested():
            note.run(attack, **({"id": identifier} if ":id" in attack else {}))
    except sa.exc.DBAPIError:
        pass
    act_as(note.connection, None)
    assert note.run("SELECT * FROM sbert.binding").all() == before
    for table in ("compatible_encoder", "encoder", "failure"):
        assert note.run(f"SELECT count(*) FROM sbert.{table}").scalar_one() == 0
    extra = "SELECT count(*) FROM pg_proc WHERE proname IN ('extra_v1', 'fence_v1')"
    assert note.run(extra).scalar_one() == 1
    assert catalog.health(note.connection, note.binding) == []


def test_borrowed_triggers_do_no_harm(note: Any, binder: str) -> None:
    """Anybody may put them on a table of theirs: one wakes, the others do nothing there."""
    note.run("CREATE TABLE trap (id int, title text, e vector(3))")
    note.run(
        "CREATE TRIGGER t AFTER INSERT ON trap FOR EACH ROW "
        f"EXECUTE FUNCTION sbert.refuse_v1('{note.id}')"
    )
    note.run("INSERT INTO trap VALUES (1)")
    note.run("DROP TRIGGER t ON trap")
    for argument in (str(uuid.uuid4()), "no id"):
        note.run(
            "CREATE TRIGGER t AFTER INSERT ON trap FOR EACH ROW "
            f"EXECUTE FUNCTION sbert.wake_v1('{argument}')"
        )
        note.run("INSERT INTO trap VALUES (1)")
        note.run("DROP TRIGGER t ON trap")


#: Each has a function of the role's own called where a right of the owner's might be in use.
TRAPS = {
    "a type with functions of the library's names": (
        (
            "CREATE TYPE trap AS (x int); CREATE FUNCTION subvector(trap, int, int) RETURNS vector "
            "LANGUAGE sql AS 'SELECT (who() || ''[1,0,0]'')::vector'"
        ),
        "SELECT sbert.proof_v1('note', 'e', 'f', 'text', ROW(1)::trap)",
    ),
    "a cast": (
        (
            "CREATE TYPE trap AS (x int); CREATE FUNCTION made(trap) RETURNS vector "
            "LANGUAGE sql AS 'SELECT (who() || ''[1,0,0]'')::vector'; "
            "CREATE CAST (trap AS vector) WITH FUNCTION made(trap) AS IMPLICIT"
        ),
        "SELECT sbert.proof_v1('note', 'e', 'f', 'text', ROW(1)::trap)",
    ),
    "a domain": (
        "CREATE DOMAIN trap AS vector CHECK (who() = '')",
        "SELECT sbert.proof_v1('note', 'e', 'f', 'text', CAST(NULL AS trap))",
    ),
    "a companion of another type": (
        (
            "CREATE TABLE own (id int PRIMARY KEY, title text, e vector(3)); "
            "CREATE TABLE other (id int, e_of text); INSERT INTO other VALUES (1); "
            "CREATE DOMAIN trap AS text CHECK (value IS NULL OR who() = ''); "
            "ALTER TABLE other ALTER e_of TYPE trap, ADD CHECK (id = 1)"
        ),
        (
            "SELECT sbert.bind_v1('own', 'e', jsonb_build_object('name', 'd', 'dimensions', 3), "
            "jsonb_build_object('columns', ARRAY['title'])); "
            "DO $$ BEGIN EXECUTE format('CREATE TRIGGER t BEFORE UPDATE ON other FOR EACH ROW "
            "EXECUTE FUNCTION sbert.disown_v1(%L)', sbert.binding_id_v1('own', 'e')); END $$; "
            "UPDATE other SET id = 2"
        ),
    ),
    "a column of a type called vector": (
        (
            "CREATE SCHEMA theirs; CREATE TYPE theirs.vector AS (x int); "
            "CREATE TABLE own (id int PRIMARY KEY, title text, e theirs.vector); "
            "CREATE FUNCTION subvector(theirs.vector, int, int) RETURNS vector "
            "LANGUAGE sql IMMUTABLE AS 'SELECT ''[1,0,0]''::vector'"
        ),
        (
            "SELECT sbert.bind_v1('own', 'e', jsonb_build_object('name', 'd', 'dimensions', 3), "
            "jsonb_build_object('columns', ARRAY['title'])); SELECT 'runs as owner'::int"
        ),
    ),
}


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_nothing_of_a_callers_runs_with_the_owners_rights(
    note: Any, binder: str, trap: tuple[str, str]
) -> None:
    act_as(note.connection, None)
    database = note.connection.engine.url.database
    note.run(f'GRANT CREATE ON DATABASE "{database}" TO {binder}')
    note.run(f"GRANT SELECT, INSERT ON note TO {binder}")
    note.run(
        "SELECT sbert.seal_v1(:id, 'f', NULL, jsonb_build_object('name', 'x', 'dimensions', 3, "
        "'similarity', 'cosine'), decode(repeat('00', 12), 'hex'))", id=note.id
    )  # fmt: skip
    act_as(note.connection, binder)
    run = note.connection.exec_driver_sql
    run(
        "CREATE FUNCTION who() RETURNS text LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'runs as %%', current_user; END $$"
    )
    prepare, spring = (part.replace("%L", "%%L") for part in trap)
    run(prepare)
    with pytest.raises(sa.exc.DBAPIError) as raised, note.connection.begin_nested():
        run(spring)
    said = str(raised.value.orig)
    assert "runs as" not in said or f"runs as {binder}" in said


def test_rights_on_some_columns_are_rights_on_these(note: Any, role: str) -> None:
    catalog.hold_encoder(note.connection, note.binding, DeterministicEncoder(dimensions=3))
    note.run(
        "INSERT INTO sbert.failure (binding_id, key, error) VALUES (:id, '[1]', 'x')", id=note.id
    )
    note.run(f"GRANT SELECT (views), INSERT (views), UPDATE (title, views) ON note TO {role}")
    grant(note, role, "worker")
    for statement in (
        "SELECT sbert.note_v1(:id, now())",
        "SELECT sbert.add_compatible_v1(:id, 'x', CAST('{}' AS jsonb), CAST('{}' AS jsonb))",
        "SELECT sbert.set_state_v1(:id, 'active', 'replaced')",
        "INSERT INTO sbert.claim VALUES (:id, 'w', '{}', now())",
        "INSERT INTO sbert.failure (binding_id, key) VALUES (:id, '[2]')",
    ):
        denied(note, statement, id=note.id)
    assert note.run("SELECT key FROM sbert.failure").all() == []
    assert note.run("DELETE FROM sbert.failure").rowcount == 0
    act_as(note.connection, None)
    note.run(f"GRANT UPDATE (e, e_of), SELECT ON note TO {role}")
    act_as(note.connection, role)
    note.run("SELECT sbert.note_v1(:id, now())", id=note.id)
    assert note.run("DELETE FROM sbert.failure").rowcount == 1


def test_rows_that_a_policy_hides_are_hidden_here_too(note: Any, role: str) -> None:
    note.run(
        "INSERT INTO sbert.failure (binding_id, key, error) VALUES (:id, '[1]', 'x')", id=note.id
    )
    note.run("INSERT INTO sbert.claim VALUES (:id, 'w', '{1}', now())", id=note.id)
    note.run("ALTER TABLE note ENABLE ROW LEVEL SECURITY")
    grant(note, role, "worker", "SELECT", "UPDATE")
    for table in ("failure", "claim"):
        assert note.run(f"SELECT count(*) FROM sbert.{table}").scalar_one() == 0


def test_no_message_says_what_a_table_of_others_belongs_to(note: Any, role: str) -> None:
    encoder = DeterministicEncoder("their encoder", dimensions=3)
    use_encoder(encoder, name="deterministic")
    catalog.hold_encoder(note.connection, note.binding, encoder)
    grant(note, role, "worker")
    assert note.run("SELECT count(*) FROM sbert.encoder").scalar_one() == 0
    for statement in (
        "SELECT sbert.fence_v1('note', 'e', 'x')",
        "SELECT sbert.proof_v1('note', 'e', 'x', 'text', CAST('[1,0,0]' AS vector))",
        "SELECT sbert.proof_v1('note', 'e', NULL, 'text', CAST('[1,0,0]' AS vector))",
        "SELECT sbert.asked_v1('note.e')",
        "SELECT sbert.seal_v1(:id, 'x', NULL, '{}', '')",
    ):
        with pytest.raises(sa.exc.DBAPIError) as raised, note.connection.begin_nested():
            note.run(statement, **({"id": note.id} if ":id" in statement else {}))
        assert "their" not in str(raised.value)
        assert encoder.spec.fingerprint not in str(raised.value)


def test_unbinding_anothers_column_is_refused_and_not_done_nothing(note: Any, binder: str) -> None:
    """Its binding is hidden from the role, which must not read as a column that is not bound."""
    for column in ("e", "title"):
        denied(note, f"SELECT sbert.unbind_v1('note', '{column}')")


def test_a_function_that_runs_as_its_owner_asks_for_the_callers_rights(
    note: Any, binder: str, connection: Connection
) -> None:
    """Also through a function of the application's own, and by whoever is logged in."""
    note.run(
        "CREATE FUNCTION public.helper(id uuid) RETURNS void LANGUAGE sql SECURITY DEFINER AS "
        "'SELECT sbert.forget_v1(id)'"
    )
    denied(note, "SELECT public.helper(:id)", id=note.id)


def test_a_search_path_of_the_writer_does_not_matter(note: Any, role: str) -> None:
    """A schema before pg_catalog, with functions and operators that lie."""
    note.run("CREATE SCHEMA evil")
    note.run("CREATE FUNCTION evil.substr(text, int, int) RETURNS text LANGUAGE sql AS 'SELECT $1'")
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
        pytest.raises(sa.exc.DBAPIError, match="nothing proves that"),
        note.connection.begin_nested(),
    ):
        note.run("UPDATE note SET e = '[1,0,0]'")
    act_as(note.connection, None)
    note.run("SET LOCAL search_path = public")
    assert note.pending() == ["1"]


def test_row_level_security_hides_nothing_from_the_rows_themselves(note: Any, role: str) -> None:
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
        binding = catalog.bind(connection, identity, spec, Source.of("t"))
        catalog.hold_encoder(connection, binding, DeterministicEncoder(dimensions=3))
        connection.execute(sa.text("INSERT INTO n (id, t) VALUES (1, 'a')"))
        n = binding.clause()
        assert connection.scalars(sa.select(n.c.id).where(binding.is_stale(n))).all() == [1]
        assert catalog.health(connection, binding) == []
        catalog.unbind(connection, identity)
        catalog.downgrade(connection, "base")
        assert catalog.current(connection) is None
        connection.commit()
        act_as(connection, None)
        connection.execute(sa.text(f"DROP OWNED BY {role} CASCADE"))
        connection.commit()
    engine.dispose()
