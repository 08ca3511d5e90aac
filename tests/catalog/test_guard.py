"""From a statement of the application to the catalog: every read is fenced, every write proven."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

from sbert_pg import catalog
from sbert_pg.catalog import guard
from sbert_pg.catalog.embedding import Embedding, companion_of
from sbert_pg.errors import CatalogError, EncoderMismatchError
from sbert_pg.orm import embed_on_flush, embedding_column
from sbert_pg.registry import forget_encoders, use_encoder
from sbert_pg.search import hybrid, matching, nearest
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.text import text_column


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str | None]
    embedding = embedding_column("deterministic", source="body", dimensions=384)
    search = text_column("body")


COLUMN = Note.__table__.c.embedding


@pytest.fixture
def bound(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> sa.Engine:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        catalog.bind(connection, COLUMN)
    return engine


@pytest.fixture
def statements(bound: sa.Engine) -> list[str]:
    """What the engine sends from now on."""
    sent: list[str] = []

    @event.listens_for(bound, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        sent.append(statement)

    return sent


def note_session(engine: sa.Engine) -> Session:
    session = Session(engine)
    embed_on_flush(session)
    return session


def write(engine: sa.Engine, *bodies: str) -> None:
    with note_session(engine) as session:
        session.add_all(Note(body=body) for body in bodies)
        session.commit()


def stale(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        binding = catalog.require_binding(connection, COLUMN)
        t = binding.clause()
        return list(connection.scalars(sa.select(t.c.id).where(binding.is_stale(t))))


def rebind(engine: sa.Engine, encoder: DeterministicEncoder | None = None) -> None:
    """In another process: unbind, bind, and seal."""
    other = sa.create_engine(engine.url)
    with other.begin() as connection:
        catalog.unbind(connection, COLUMN)
        binding = catalog.bind(connection, COLUMN)
        if encoder is not None:
            catalog.hold_encoder(connection, binding, encoder)
    other.dispose()


def read(engine: sa.Engine, statement: Any = None) -> list[Any]:
    if statement is None:
        statement = sa.select(Note.id).order_by(Note.embedding.cosine_distance("apple"))
    with Session(engine) as session:
        return list(session.execute(statement))


def test_the_first_write_seals_and_what_is_written_is_fresh(bound: sa.Engine) -> None:
    write(bound, "a")
    write(bound, "b")
    with bound.connect() as connection:
        assert catalog.require_binding(connection, COLUMN).fingerprint is not None
    assert stale(bound) == []


def test_a_seal_that_is_rolled_back_is_made_again(bound: sa.Engine) -> None:
    with note_session(bound) as session:
        session.add(Note(body="a"))
        session.flush()
        session.add(Note(body="again in the same transaction"))
        session.flush()
        session.rollback()
        session.add(Note(body="b"))
        session.commit()
    with bound.connect() as connection:
        assert catalog.require_binding(connection, COLUMN).fingerprint is not None
    assert stale(bound) == []


def test_another_process_with_another_encoder_is_refused(bound: sa.Engine) -> None:
    write(bound, "a")
    forget_encoders()
    use_encoder(DeterministicEncoder(salt="another"))
    other = sa.create_engine(bound.url)
    with pytest.raises(
        EncoderMismatchError, match=r"note\.embedding belongs to encoder .deterministic."
    ):
        write(other, "b")
    with pytest.raises(EncoderMismatchError):
        read(other)
    other.dispose()


def test_a_writer_notices_that_the_column_changed_hands(bound: sa.Engine) -> None:
    write(bound, "a")
    rebind(bound, DeterministicEncoder(salt="another"))
    with pytest.raises(EncoderMismatchError):
        write(bound, "b")


def test_a_writer_goes_on_where_the_column_was_bound_again_to_its_encoder(bound: sa.Engine) -> None:
    write(bound, "a")
    rebind(bound)
    write(bound, "b")
    assert stale(bound) == [1]


def test_a_writer_in_the_middle_of_a_transaction(bound: sa.Engine) -> None:
    """It knows the old binding; the database does not take it, and the next attempt succeeds."""
    write(bound, "a")
    with note_session(bound) as session:
        session.add(Note(body="b"))
        session.flush()
        session.commit()
    rows = [{"body": "c", "embedding": np.ones(384, np.float32)}]
    connection = bound.connect().execution_options(isolation_level="AUTOCOMMIT")
    connection.execute(sa.insert(Note), rows)
    rebind(bound)
    with pytest.raises(EncoderMismatchError, match="tries once more"):
        connection.execute(sa.insert(Note), rows)
    connection.close()
    write(bound, "d")


@pytest.mark.parametrize(
    "statement",
    [
        sa.select(Note.id).order_by(Note.embedding.cosine_distance("apple")),
        sa.select(Note.id).order_by(Note.embedding.l2_distance(np.ones(384, np.float32))),
        sa.select(Note.id).where(Note.embedding.distance("apple") < 2),
        sa.select(Note.embedding.similarity("apple")),
        sa.select(Note.id).order_by(Note.embedding.op("<=>")(np.ones(384, np.float32))),
        sa.select(sa.func.l2_distance(COLUMN, sa.literal(np.ones(384, np.float32), COLUMN.type))),
        sa.select(aliased(Note).embedding.max_inner_product("apple")),
        sa.update(Note).values(body="x").where(Note.embedding.distance("apple") > 5),
        sa.delete(Note).where(Note.embedding.distance("apple") > 5),
        sa.select(Note.id).union_all(sa.select(Note.id).where(Note.embedding.distance("q") < 2)),
        nearest(Note.embedding, "apple", limit=3),
        nearest(Note.embedding, ["apple", "pear"], limit=3),
        nearest(Note.embedding, np.ones(384, np.float32), where=Note.body != "x"),
        nearest(aliased(Note).embedding, "apple", exact=True),
        hybrid(Note.embedding, Note.search, "apple"),
        hybrid(Note.embedding, Note.search, ["apple", "a"], fusion="rrf"),
        matching(Note.search, "apple").where(Note.embedding.distance("apple") < 3),
        sa.select(sa.select(Note.id).where(Note.embedding.distance("q") < 2).scalar_subquery()),
        sa.insert(Note).from_select(
            ["body"], sa.select(Note.body).where(Note.embedding.distance("q") < 2)
        ),
    ],
    ids=[
        *("order", "vector", "where", "select", "op", "func", "alias", "update", "delete", "union"),
        *("nearest", "several", "ready made", "exact", "hybrid", "several hybrid", "matching"),
        *("subquery", "insert"),
    ],
)
def test_a_reader_notices_that_the_column_changed_hands(bound: sa.Engine, statement: Any) -> None:
    write(bound, "apple")
    for _ in range(2):
        with bound.begin() as connection:
            connection.execute(statement)
    rebind(bound, DeterministicEncoder(salt="another"))
    for _ in range(2):  # by the fence, then since it has forgotten
        with pytest.raises(EncoderMismatchError), bound.begin() as connection:
            connection.execute(statement)


@pytest.mark.parametrize("at_hand", [True, False])
def test_a_column_that_is_bound_after_a_reader_looked(bound: sa.Engine, at_hand: bool) -> None:
    """What was not bound a moment ago is asked about by every statement."""
    write(bound, "a")
    with bound.begin() as connection:
        catalog.unbind(connection, COLUMN)
    vector = np.ones(384, np.float32)
    statement = sa.select(Note.id).order_by(Note.embedding.cosine_distance(vector))
    if not at_hand:
        forget_encoders()
    for _ in range(2):
        assert len(read(bound, statement)) == 1
    other = sa.create_engine(bound.url)
    with other.begin() as connection:
        binding = catalog.bind(connection, COLUMN)
        catalog.hold_encoder(connection, binding, DeterministicEncoder(salt="another"))
    other.dispose()
    with pytest.raises(EncoderMismatchError):
        read(bound, statement)


def test_a_column_that_changes_hands_while_its_binding_is_read(bound: sa.Engine) -> None:
    """Whatever comes between two statements, it is bound throughout."""
    write(bound, "a")
    reader = sa.create_engine(bound.url)

    @event.listens_for(reader, "before_cursor_execute")
    def change_hands(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "sbert.binding" in statement:
            rebind(bound, DeterministicEncoder(salt="another"))

    with reader.connect() as connection:
        assert catalog.binding_of(connection, COLUMN) is not None
    reader.dispose()


@pytest.mark.parametrize("knows", [False, True], ids=["new process", "asks again"])
def test_a_column_that_changes_hands_while_a_reader_compares_itself(
    bound: sa.Engine, knows: bool
) -> None:
    """Its first search cannot ask by itself; nothing comes between the two unnoticed."""
    write(bound, "a")
    reader = sa.create_engine(bound.url)
    if knows:
        read(reader)
        guard.forget(reader.dialect)
    before = []

    @event.listens_for(reader, "after_cursor_execute")
    def change_hands(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "probes" in statement and not before:
            before.append(statement)
            rebind(bound, DeterministicEncoder(salt="another"))

    for _ in range(2):
        with pytest.raises(EncoderMismatchError):
            read(reader)
    assert before
    reader.dispose()


def test_a_reader_that_compiled_before_there_was_a_catalog(
    bare_database_url: sa.URL, fake_encoder: DeterministicEncoder
) -> None:
    engine = sa.create_engine(bare_database_url)
    Base.metadata.create_all(engine)
    assert read(engine) == []
    with engine.begin() as connection:
        catalog.upgrade(connection)
        binding = catalog.bind(connection, COLUMN)
        catalog.hold_encoder(connection, binding, DeterministicEncoder(salt="another"))
    guard.forget(engine.dialect)  # as half a minute later
    with pytest.raises(EncoderMismatchError):
        read(engine)
    engine.dispose()


def test_a_reader_with_a_cache_of_its_own(bound: sa.Engine) -> None:
    cache: dict[Any, Any] = {}
    engine = bound.execution_options(compiled_cache=cache)
    write(bound, "a")
    guard.forget(bound.dialect)
    assert len(read(engine)) == 1
    rebind(bound, DeterministicEncoder(salt="another"))
    with pytest.raises(EncoderMismatchError):
        read(engine)


def test_a_table_in_another_ones_place(bound: sa.Engine) -> None:
    write(bound, "a")
    read(bound)
    other = sa.create_engine(bound.url)
    with other.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE note_new (LIKE note INCLUDING ALL); "
            "INSERT INTO note_new (body, embedding, embedding_of) "
            "SELECT body, embedding, embedding_of FROM note; "
            "ALTER TABLE note RENAME TO note_old; "
            "ALTER TABLE note_new RENAME TO note"
        )
    other.dispose()
    with pytest.raises(EncoderMismatchError, match="is not the one that was bound"):
        read(bound)
    with pytest.raises(EncoderMismatchError, match="is not the one that was bound"):
        write(bound, "b")


def test_a_fence_costs_no_statement_of_its_own(bound: sa.Engine, statements: list[str]) -> None:
    write(bound, "a")
    read(bound)
    read(bound)
    del statements[:]
    read(bound)
    assert len(statements) == 1
    assert "sbert.fence_v1(" in statements[0]


def test_a_writing_transaction_costs_one_statement(bound: sa.Engine, statements: list[str]) -> None:
    write(bound, "a")
    write(bound, "a")
    del statements[:]
    with note_session(bound) as session:
        for body in ("b", "c"):
            session.add(Note(body=body))
            session.flush()
        session.commit()
    assert len([s for s in statements if "INSERT" not in s]) == 1


def test_schemas_that_are_translated(bound: sa.Engine) -> None:
    odd = "te\"na'nt %s $1"
    write(bound, "a")
    metadata = sa.MetaData()
    tenant = Note.__table__.to_metadata(metadata, schema=odd)
    with bound.begin() as connection:
        connection.execute(sa.schema.CreateSchema(odd))
        metadata.create_all(connection)
        binding = catalog.bind(connection, tenant.c.embedding)
        catalog.hold_encoder(connection, binding, DeterministicEncoder(salt="another"))
    mapped = bound.execution_options(schema_translate_map={None: odd})
    for _ in range(3):
        assert len(read(bound)) == 1
        with pytest.raises(EncoderMismatchError):
            read(mapped)
        with pytest.raises(EncoderMismatchError):
            write(mapped, "b")


def test_a_reader_without_rights(bound: sa.Engine) -> None:
    """Whether the process knows the column already, or not; and rights on the table are its own."""
    write(bound, "apple")
    role = f"web_{uuid.uuid4().hex[:8]}"
    with bound.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role}")
        connection.commit()
        try:
            for grant, message in (
                (f"GRANT SELECT ON note TO {role}", r"SELECT sbert\.grant_v1"),
                (f"SELECT sbert.grant_v1('{role}', 'reader')", "permission denied for table note"),
            ):
                for search in (
                    nearest(Note.embedding, "apple"),
                    sa.select(Note.embedding.cosine_distance("a")),
                ):
                    connection.exec_driver_sql(grant)
                    connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
                    with pytest.raises((CatalogError, sa.exc.ProgrammingError), match=message):
                        connection.execute(search)
                    connection.rollback()
            # A grant of this library's would not help here, whatever the table is called.
            connection.exec_driver_sql("CREATE TABLE sbert_secret (id int)")
            connection.exec_driver_sql(f"GRANT SELECT ON note TO {role}")
            connection.exec_driver_sql(f"SELECT sbert.grant_v1('{role}', 'reader')")
            connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
            known = sa.select(sa.table("sbert_secret", sa.column("id")).c.id)
            with pytest.raises(sa.exc.ProgrammingError, match="denied for table sbert_secret"):
                connection.execute(nearest(Note.embedding, "apple").where(Note.id.in_(known)))
            connection.rollback()
        finally:
            connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")
            connection.commit()


@pytest.mark.parametrize("swapped", [False, True])
def test_tenants_of_one_schema_map(
    engine: sa.Engine, fake_encoder: DeterministicEncoder, swapped: bool
) -> None:
    """A name that only the map knows, and two schemas that it stands for in turn, or swaps."""

    class TenantBase(DeclarativeBase):
        metadata = sa.MetaData(schema="per_tenant")

    class Page(TenantBase):
        __tablename__ = "Page"
        id: Mapped[int] = mapped_column("Id", primary_key=True)
        body: Mapped[str]
        embedding = embedding_column("deterministic", source="body", dimensions=384, nullable=True)
        words = text_column("body")

    names = ("a", 'b"%s$1')
    maps = [{"per_tenant": name} | ({name: "per_tenant"} if swapped else {}) for name in names]
    tenants = [engine.execution_options(schema_translate_map=each) for each in maps]
    for name, tenant in zip(names, tenants, strict=True):
        with tenant.begin() as connection:
            connection.execute(sa.schema.CreateSchema(name))
            catalog.create_all(connection, TenantBase.metadata)
        with note_session(tenant) as session:
            session.add_all(Page(body=body) for body in (f"apple {name}", "pear"))
            session.commit()
            session.execute(sa.update(Page).where(Page.body == "pear").values(body="plum"))
            session.commit()
    searches = {
        "meaning": nearest(Page.embedding, "apple", limit=10),
        "words": matching(Page.words, "apple", limit=10),
        "both": hybrid(Page.embedding, Page.words, "apple", limit=10),
        "plain": sa.select(Page).order_by(Page.embedding.cosine_distance("apple")),
    }
    for _ in range(2):
        for name, tenant in zip(names, tenants, strict=True):
            for search in searches.values():
                bodies = {row.Page.body for row in read(tenant, search)}
                assert f"apple {name}" in bodies
                assert bodies <= {f"apple {name}", "plum"}


def test_a_search_path_that_means_another_table(bound: sa.Engine) -> None:
    write(bound, "a")
    with bound.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA tenant")
        connection.exec_driver_sql("CREATE TABLE tenant.note (LIKE note INCLUDING DEFAULTS)")
        connection.exec_driver_sql("ALTER TABLE tenant.note ADD PRIMARY KEY (id)")
        connection.exec_driver_sql("SET LOCAL search_path = tenant, public")
        catalog.bind(connection, COLUMN)
    for body in ("b", "c"):
        with note_session(bound) as session:
            session.execute(sa.text("SET LOCAL search_path = tenant, public"))
            session.add(Note(body=body))
            session.commit()
        write(bound, body)
    assert stale(bound) == []
    with bound.begin() as connection:
        connection.exec_driver_sql("SET LOCAL search_path = tenant, public")
        binding = catalog.require_binding(connection, COLUMN)
        t = binding.clause()
        rows = sa.select(sa.func.count()).where(binding.is_proven(t), binding.is_fresh(t))
        assert connection.scalar(rows) == 2


@pytest.fixture
def foreign(bound: sa.Engine) -> sa.Engine:
    """A proven row, a foreign vector that no trigger saw, and a row without a vector."""
    write(bound, "a")
    with bound.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql(
            "INSERT INTO note (id, body, embedding) VALUES (2, 'x', %s), (3, 'y', NULL)",
            (str([1.0] * 384),),
        )
    return bound


def test_what_is_not_proven_can_be_left_out(foreign: sa.Engine) -> None:
    read(foreign)
    companion = companion_of(COLUMN)
    assert companion is not None
    proven = sa.select(Note.id).where(guard.proven(COLUMN, companion)).order_by(Note.id)
    assert [row.id for row in read(foreign, proven)] == [1, 3]
    note = Note.__table__.alias()
    over_alias = sa.select(note.c.id).where(
        guard.proven(note.c.embedding, note.c.embedding_of), note.c.embedding.is_not(None)
    )
    for _ in range(2):
        assert [row.id for row in read(foreign, over_alias)] == [1]


@pytest.mark.parametrize(
    "how",
    ["execute", "session", "stream", "own cache", "parameter", "list", "in the text", "pairs"],
)
def test_the_first_search_of_a_process_leaves_it_out_too(foreign: sa.Engine, how: str) -> None:
    """It was compiled before anything was known of a catalog."""
    reader = sa.create_engine(foreign.url)
    statement: Any = nearest(Note.embedding, "a", limit=9)
    options: dict[str, Any] = {}
    values: dict[str, Any] = {}
    if how == "parameter":
        statement = statement.where(Note.body != sa.bindparam("other"))
        values["other"] = "zzz"
    elif how == "list":
        statement = statement.where(Note.body.in_(sa.bindparam("bodies", expanding=True)))
        values["bodies"] = ["a", "x"]
    elif how == "in the text":
        statement = statement.where(Note.body == sa.bindparam("own", literal_execute=True))
        values["own"] = "a"
    elif how == "pairs":
        pair = sa.tuple_(Note.id, Note.body)
        statement = statement.where(pair.in_(sa.bindparam("pairs", expanding=True)))
        values["pairs"] = [(1, "a"), (2, "x")]
    elif how == "stream":
        options["yield_per"] = 1
    elif how == "own cache":
        options["compiled_cache"] = {}
    for _ in range(2):
        with Session(reader) as session, reader.connect() as connection:
            execute = connection.execute if how == "execute" else session.execute
            rows = execute(statement, values, execution_options=options)
            assert [getattr(row[0], "id", row[0]) for row in rows] == [1]
    reader.dispose()


@pytest.mark.parametrize("how", ["update", "delete", "returning", "insert", "session"])
def test_a_write_over_the_first_search_of_a_process(foreign: sa.Engine, how: str) -> None:
    writer = sa.create_engine(foreign.url)
    near = nearest(Note.embedding, "a", limit=9).with_only_columns(Note.id)
    statement: Any = sa.delete(Note).where(Note.id.in_(near))
    if how in ("update", "session"):
        statement = sa.update(Note).where(Note.id.in_(near)).values(body="changed")
    elif how == "returning":
        statement = statement.returning(Note.id)
    elif how == "insert":
        bare = sa.table("note", sa.column("id"), sa.column("body"))
        copied = near.with_only_columns(Note.id + 10, Note.body)
        statement = bare.insert().from_select(["id", "body"], copied)
    with Session(writer) as session:
        execute = session.connection().execute if how != "session" else session.execute
        result: Any = execute(statement)
        if how == "returning":
            assert result.scalars().all() == [1]
        elif how == "insert":
            assert session.scalars(sa.select(Note.id).where(Note.id > 10)).all() == [11]
        else:
            assert result.rowcount == 1
    writer.dispose()


@pytest.mark.parametrize("how", ["read", "list", "in the text", "delete"])
def test_the_first_search_where_there_is_no_catalog(bare_database_url: sa.URL, how: str) -> None:
    """It asks a catalog that is not there; what cannot be made once more is not sent."""
    engine = sa.create_engine(bare_database_url)
    Base.metadata.create_all(engine)
    vector = DeterministicEncoder().encode_document(["a"])[0]
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO note (id, body, embedding) VALUES (1, 'a', %s)", (str(vector.tolist()),)
        )
    engine.dispose()
    reader = sa.create_engine(bare_database_url)
    statement: Any = nearest(Note.embedding, vector, limit=9).with_only_columns(Note.id)
    values: dict[str, Any] = {}
    if how == "list":
        statement = statement.where(Note.body.in_(sa.bindparam("bodies", expanding=True)))
        values["bodies"] = ["a"]
    elif how == "in the text":
        statement = statement.where(Note.body == sa.bindparam("own", literal_execute=True))
        values["own"] = "a"
    elif how == "delete":
        statement = sa.delete(Note).where(Note.id.in_(statement)).returning(Note.id)
    with reader.begin() as connection:
        if how in ("in the text", "delete"):
            with pytest.raises(CatalogError, match="once more"):
                connection.execute(statement, values)
        assert connection.execute(statement, values).scalars().all() == [1]
    reader.dispose()


def test_a_catalog_that_comes_while_a_process_runs(bare_database_url: sa.URL) -> None:
    engine = sa.create_engine(bare_database_url)
    Base.metadata.create_all(engine)
    statement = nearest(Note.embedding, [1.0] * 384, limit=9)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO note (id, body, embedding) VALUES (1, 'x', %s)", (str([1.0] * 384),)
        )
        assert len(connection.execute(statement).all()) == 1
    with engine.begin() as connection:
        catalog.upgrade(connection)
        binding = catalog.bind(connection, COLUMN)
        catalog.hold_encoder(connection, binding, DeterministicEncoder())
    guard.forget(engine.dialect)
    for _ in range(2):
        with engine.begin() as connection:
            assert connection.execute(statement).all() == [], "nothing proves the vector"
    engine.dispose()


def test_without_a_catalog_everything_is_proven(bare_database_url: sa.URL) -> None:
    engine = sa.create_engine(bare_database_url)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO note (id, body, embedding) VALUES (1, 'x', %s)", (str([1.0] * 384),)
        )
    companion = companion_of(COLUMN)
    assert companion is not None
    assert len(read(engine, sa.select(Note.id).where(guard.proven(COLUMN, companion)))) == 1
    engine.dispose()


def traces(engine: sa.Engine) -> list[tuple[str, bool]]:
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(
            "SELECT b.column_name, r.wrote FROM sbert.reader r JOIN sbert.binding b "
            "ON b.id = r.binding_id ORDER BY 1, 2"
        )
        return [tuple(row) for row in rows]


def test_who_uses_a_column_that_is_being_replaced_leaves_word(bound: sa.Engine) -> None:
    write(bound, "a")
    read(bound)
    read(bound)
    assert traces(bound) == [], "only while there is something to be known"
    with bound.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE note ADD COLUMN e2 vector(384)")
        binding = catalog.require_binding(connection, COLUMN)
        catalog.bind(
            connection,
            binding.identity._replace(column="e2"),
            binding.declared,
            binding.source,
            replaces="embedding",
        )
    other = sa.create_engine(bound.url)
    last = sa.select(sa.func.sbert.last_read_v1(binding.id))
    with bound.connect() as connection:
        assert connection.scalar(last) is None
        now = connection.scalar(sa.select(sa.func.now()))
        read(other)
        read(other)  # a session that is closed without a commit
        assert connection.scalar(last) >= now.replace(microsecond=0)
    assert traces(bound) == []
    write(other, "b")
    assert traces(bound) == [("embedding", True)]
    with other.connect() as connection:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        connection.execute(sa.select(Note.id).order_by(Note.embedding.distance("a")))
    other.dispose()


def test_a_plain_table_is_fenced_too(bound: sa.Engine) -> None:
    table = sa.Table(
        "note",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("body", sa.Text),
        sa.Column("embedding", Embedding("deterministic", source="body", dimensions=384)),
    )
    write(bound, "a")
    statement = sa.select(table.c.id).order_by(table.c.embedding.distance("apple"))
    assert len(read(bound, statement)) == 1
    rebind(bound, DeterministicEncoder(salt="another"))
    with pytest.raises(EncoderMismatchError):
        read(bound, statement)
