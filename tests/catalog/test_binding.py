"""Bindings from Python: declared, sealed, held against, found compatible or refused."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import catalog, embedding_column
from sbert_pg.catalog.holding import fingerprint_of, hold, recorded_encoder
from sbert_pg.errors import AlreadyBoundError, BindingError, EncoderMismatchError, NotBoundError
from sbert_pg.probes import PROBES
from sbert_pg.registry import forget_encoders, use_encoder
from sbert_pg.source import NIL, Source
from sbert_pg.spec import EncoderSpec, Vectors
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

IDENTITY = ColumnIdentity(None, "note", "e")
SPEC = EncoderSpec(name="deterministic", dimensions=3)


class Rounded(DeterministicEncoder):
    """The same weights in a coarser precision."""

    def __init__(self, precision: str = "int8", decimals: int = 2) -> None:
        super().__init__(dimensions=3)
        from dataclasses import replace

        self._spec = replace(self._spec, precision=precision)
        self._decimals = decimals

    @property
    def probe_vectors(self) -> Vectors:  # type: ignore[override]
        return np.round(np.stack([self._vector(text) for text in PROBES]), self._decimals)


class Anonymous(DeterministicEncoder):
    """An encoder of an application's own, which knows no digests."""

    def __init__(self, salt: str = "", name: str = "deterministic") -> None:
        super().__init__(name, 3, salt=salt)
        self._spec = EncoderSpec(name=name, dimensions=3)


def encoder() -> DeterministicEncoder:
    return DeterministicEncoder(dimensions=3)


def answer(connection: Connection) -> tuple[object, bool]:
    held = hold(connection, IDENTITY, SPEC)
    assert held is not None
    return held.binding.id, held.final


def test_a_binding_reads_back(note: Any, connection: Connection) -> None:
    binding = note.binding
    assert str(binding) == "public.note.e"
    assert binding.identity == ("public", "note", "e")
    assert binding.declared == SPEC
    assert binding.source == Source.of(["title", "body"])
    assert binding.key_columns == ("id",)
    assert binding.key_types == ("bigint",)
    assert (binding.state, binding.storage, binding.partitioned) == ("active", "vector", False)
    assert (binding.companion, binding.null_text, binding.utf8) == ("e_of", True, True)
    assert (binding.sealed, binding.fingerprint, binding.replaces) == (None, None, None)
    assert catalog.binding_of(connection, IDENTITY) == binding
    assert catalog.all_bindings(connection) == [binding]


def test_columns_that_are_not_bound(connection: Connection, bare_database_url: sa.URL) -> None:
    assert catalog.binding_of(connection, ColumnIdentity(None, "nowhere", "e")) is None
    assert catalog.binding_of(connection, ColumnIdentity("no schema", "nowhere", "e")) is None
    with pytest.raises(NotBoundError, match="A migration binds it"):
        catalog.require_binding(connection, ColumnIdentity(None, "nowhere", "e"))
    bare = sa.create_engine(bare_database_url)
    with bare.connect() as without_catalog:
        assert catalog.binding_of(without_catalog, IDENTITY) is None
        assert catalog.all_bindings(without_catalog) == []
        assert hold(without_catalog, IDENTITY, SPEC) is None
    bare.dispose()


def test_binding_again(note: Any, connection: Connection) -> None:
    same = catalog.bind(connection, IDENTITY, SPEC, note.binding.source)
    assert same == note.binding
    with pytest.raises(AlreadyBoundError, match=r"belongs to one encoder and source for life"):
        catalog.bind(connection, IDENTITY, SPEC, Source.of("title"))


def test_binding_again_takes_no_lock(note: Any, engine: sa.Engine) -> None:
    with engine.connect() as other:
        other.execute(sa.text("BEGIN; LOCK TABLE note IN ROW EXCLUSIVE MODE"))
        note.run("SET LOCAL lock_timeout = '2s'")
        catalog.bind(note.connection, IDENTITY, SPEC, note.binding.source)


def test_rows_that_are_there_are_a_backfills_and_new_ones_come_first(
    connection: Connection,
) -> None:
    connection.execute(sa.text("CREATE TABLE note (id int PRIMARY KEY, t text, e vector(3))"))
    connection.execute(
        sa.text("INSERT INTO note VALUES (1, 'a', NULL), (2, NULL, NULL), (3, 'c', '[1,0,0]')")
    )
    binding = catalog.bind(connection, IDENTITY, SPEC, Source.of("t"))
    connection.execute(sa.text("INSERT INTO note (id, t) VALUES (4, 'd')"))
    t = binding.clause()
    rows = sa.select(t.c.id, binding.class_of(t)).where(binding.is_stale(t)).order_by(t.c.id)
    assert connection.execute(rows).all() == [(1, 1), (3, 1), (4, 0)]


def test_a_companion_that_is_there_is_taken(connection: Connection) -> None:
    connection.execute(
        sa.text("CREATE TABLE note (id int PRIMARY KEY, t text, e vector(3), e_of uuid)")
    )
    catalog.bind(connection, IDENTITY, SPEC, Source.of("t"))
    connection.execute(sa.text("INSERT INTO note (id, t) VALUES (1, 'd')"))
    assert connection.scalar(sa.text("SELECT e_of FROM note")) == NIL


def test_a_column_in_the_companions_place_is_refused(connection: Connection) -> None:
    connection.execute(
        sa.text("CREATE TABLE note (id int PRIMARY KEY, t text, e vector(3), e_of text)")
    )
    with pytest.raises(BindingError, match="has type text; it has to be a uuid"):
        catalog.bind(connection, IDENTITY, SPEC, Source.of("t"))


def test_the_indexes_can_be_left_to_be_built_concurrently(
    connection: Connection, engine: sa.Engine
) -> None:
    connection.execute(sa.text("CREATE TABLE note (id int PRIMARY KEY, t text, e vector(3))"))
    binding = catalog.bind(connection, IDENTITY, SPEC, Source.of("t"), build=False)
    assert len(catalog.health(connection, binding)) == 2
    connection.commit()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as alone:
        for index in catalog.queue_indexes(alone, binding):
            assert (index.existing, index.valid) == (None, False)
            alone.exec_driver_sql(
                f"CREATE INDEX CONCURRENTLY {index.name} {index.definition}".replace("%", "%%")
            )
    assert catalog.health(connection, binding) == []
    assert all(index.valid for index in catalog.queue_indexes(connection, binding))


def test_a_successor_names_what_it_replaces(note: Any, connection: Connection) -> None:
    note.run("ALTER TABLE note ADD COLUMN e2 vector(3)")
    second = IDENTITY._replace(column="e2")
    with pytest.raises(NotBoundError, match="is to replace"), connection.begin_nested():
        catalog.bind(connection, second, SPEC, note.binding.source, replaces="title")
    made = catalog.bind(connection, second, SPEC, note.binding.source, replaces="e")
    assert (made.replaces, made.state) == ("e", "filling")
    note.run("ALTER TABLE note ADD COLUMN e3 vector(3)")
    third = IDENTITY._replace(column="e3")
    with pytest.raises(AlreadyBoundError, match="itself the new column"), connection.begin_nested():
        catalog.bind(connection, third, SPEC, note.binding.source, replaces="e2")
    catalog.unbind(connection, IDENTITY)
    assert catalog.require_binding(connection, second).replaces is None


def test_a_class_keeps_what_its_column_replaced(engine: sa.Engine) -> None:
    """As the docs say, also in a database that never had the old column."""

    class Base(DeclarativeBase):
        pass

    class Page(Base):
        __tablename__ = "page"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        second = embedding_column(SPEC, source="title", replaces="first", nullable=True)

    for _ in range(2):
        with engine.begin() as connection:
            (binding,) = catalog.create_all(connection, Base.metadata)
        assert (binding.replaces, binding.state) == (None, "active")
    first = ColumnIdentity(None, "page", "first")
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE page ADD third text, ADD first vector(3)"))
        catalog.bind(connection, first, SPEC, Source.of("third"))
        catalog.unbind(connection, binding.identity)
        assert catalog.bind(connection, Page.__table__.c.second).replaces == "first"


def test_unbinding(note: Any, connection: Connection) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    catalog.unbind(connection, IDENTITY)
    note.run("UPDATE note SET title = 'b', e = '[1,0,0]'")
    left = (
        "SELECT count(*) FROM pg_trigger WHERE tgrelid = CAST('note' AS regclass)",
        "SELECT count(*) - 1 FROM pg_index WHERE indrelid = CAST('note' AS regclass)",
        "SELECT count(*) FROM pg_class WHERE relkind = 'S' AND relname LIKE 'read\\_%'",
    )
    assert [note.run(statement).scalar_one() for statement in left] == [0, 0, 0]
    with pytest.raises(NotBoundError, match="nothing to undo"):
        catalog.unbind(connection, IDENTITY)
    again = catalog.bind(connection, IDENTITY, SPEC, Source.of(["title", "body"]))
    assert again.id != note.id, "an identity is never used again"
    t = again.clause()
    assert connection.scalars(sa.select(t.c.id).where(again.is_stale(t))).all() == [1]


def test_a_dropped_table_is_forgotten(note: Any, connection: Connection) -> None:
    note.run("INSERT INTO note (title) VALUES ('a')")
    note.run("DROP TABLE note")
    assert catalog.all_bindings(connection) == []
    assert note.run("SELECT * FROM sbert.status").all() == []
    assert note.run("SELECT * FROM sbert.health_v1(:i)", i=note.id).scalars().all() == [
        "the table is gone: sbert.prune_v1() forgets it"
    ]
    assert note.run("SELECT sbert.prune_v1()").scalar_one() == 1
    assert note.run("SELECT count(*) FROM sbert.binding").scalar_one() == 0


def test_renames(note: Any, connection: Connection) -> None:
    note.run("ALTER TABLE note RENAME TO memo")
    note.run("CREATE SCHEMA other")
    note.run("ALTER TABLE memo SET SCHEMA other")
    note.run("INSERT INTO other.memo (title) VALUES ('a')")
    assert note.pending() == ["1"]
    for old, new in (("title", "heading"), ("id", "number"), ("e", "vector"), ("e_of", "made_of")):
        note.run(f"ALTER TABLE other.memo RENAME COLUMN {old} TO {new}")
        assert len(catalog.health(connection, note.binding)) >= 1
        assert note.run("SELECT sbert.rename_v1('other.memo', :a, :b)", a=old, b=new).scalar() == 1
        assert catalog.health(connection, note.binding) == []
    note.run("INSERT INTO other.memo (heading) VALUES ('b')")
    note.run("UPDATE other.memo SET number = 10 WHERE number = 1")
    assert note.pending() == ["2", "10"]
    binding = catalog.require_binding(connection, ColumnIdentity("other", "memo", "vector"))
    assert binding.source.columns == ("heading", "body")
    assert (binding.key_columns, binding.companion) == (("number",), "made_of")
    assert note.run("SELECT sbert.rename_v1('other.memo', 'x', 'heading')").scalar() == 0
    with pytest.raises(sa.exc.DBAPIError, match="has no column nothing"):
        note.run("SELECT sbert.rename_v1('other.memo', 'heading', 'nothing')")


def test_a_template_follows_a_rename(make: Any) -> None:
    note = make()
    note.run("ALTER TABLE note ADD COLUMN e2 vector(3)")
    source = Source.template("{title}{title}: {body} {{title}} {{{title}}}")
    second = IDENTITY._replace(column="e2")
    catalog.bind(note.connection, second, SPEC, source)
    note.run("ALTER TABLE note RENAME COLUMN title TO heading")
    note.run("SELECT sbert.rename_v1('note', 'title', 'heading')")
    found = catalog.require_binding(note.connection, second).source
    assert found.text({"heading": "a", "body": "b"}) == "aa: b {title} {a}"


def test_the_first_encoder_seals(note: Any, connection: Connection) -> None:
    use_encoder(encoder())
    first = hold(connection, IDENTITY, SPEC)
    assert first is not None
    assert first.fingerprint == encoder().spec.fingerprint
    assert answer(connection) == (note.id, False), "this transaction may be rolled back"
    connection.commit()
    assert answer(connection) == (note.id, True)
    sealed = catalog.require_binding(connection, IDENTITY)
    assert sealed.fingerprint == encoder().spec.fingerprint
    assert sealed.sealed == encoder().spec
    _, spec, probes = recorded_encoder(connection, sealed)
    assert spec == encoder().spec
    np.testing.assert_array_equal(probes, encoder().probe_vectors)


def test_a_column_that_is_unbound_while_a_process_compares_itself(
    note: Any, connection: Connection
) -> None:
    catalog.hold_encoder(connection, note.binding, encoder())
    known = note.binding
    catalog.unbind(connection, IDENTITY)
    with pytest.raises(EncoderMismatchError, match="unbound or bound again just before"):
        catalog.hold_encoder(connection, known, encoder())


def test_another_space_is_refused_and_both_are_named(note: Any, connection: Connection) -> None:
    catalog.hold_encoder(connection, note.binding, encoder())
    connection.commit()
    other = use_encoder(DeterministicEncoder(dimensions=3, salt="other"))
    with pytest.raises(EncoderMismatchError) as caught:
        hold(connection, IDENTITY, SPEC)
    message = str(caught.value)
    assert encoder().spec.fingerprint in message
    assert other.spec.fingerprint in message
    assert "public.note.e" in message
    assert "replaces=" in message


def test_another_precision_is_found_compatible_and_recorded(
    note: Any, connection: Connection
) -> None:
    catalog.hold_encoder(connection, note.binding, encoder())
    connection.commit()
    use_encoder(Rounded())
    assert answer(connection) == (note.id, False), "what is recorded may be rolled back"
    connection.commit()
    recorded = note.run("SELECT fingerprint, agreement FROM sbert.compatible_encoder").one()
    assert recorded.fingerprint == Rounded().spec.fingerprint
    assert recorded.agreement["min_cosine"] > 0.99
    assert answer(connection) == (note.id, True)


def test_one_with_a_recorded_fingerprint_is_measured_too(note: Any, connection: Connection) -> None:
    catalog.hold_encoder(connection, note.binding, encoder())
    catalog.rebind(connection, catalog.require_binding(connection, IDENTITY), Rounded())
    connection.commit()
    use_encoder(Rounded(decimals=0))
    with pytest.raises(EncoderMismatchError, match="do not agree"):
        hold(connection, IDENTITY, SPEC)


class PassedOn:
    """An application's encoder with the spec, and so the fingerprint, of another one."""

    def __init__(self, inner: DeterministicEncoder) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        return -self.inner.encode_document(texts)


def test_a_spec_that_is_passed_on_is_not_believed(note: Any, connection: Connection) -> None:
    catalog.hold_encoder(connection, note.binding, encoder())
    connection.commit()
    use_encoder(PassedOn(encoder()))
    with pytest.raises(EncoderMismatchError, match="fingerprints are equal"):
        hold(connection, IDENTITY, SPEC)


def test_what_a_spec_that_is_passed_on_seals_is_what_it_computes(
    note: Any, connection: Connection
) -> None:
    catalog.hold_encoder(connection, note.binding, PassedOn(encoder()))
    connection.commit()
    use_encoder(encoder())
    with pytest.raises(EncoderMismatchError):
        hold(connection, IDENTITY, SPEC)


def test_too_coarse_a_precision_is_refused(note: Any, connection: Connection) -> None:
    catalog.hold_encoder(connection, note.binding, encoder())
    with pytest.raises(EncoderMismatchError, match="do not agree"):
        catalog.rebind(
            connection, catalog.require_binding(connection, IDENTITY), Rounded("int2", 0)
        )


def test_rebind_tells_the_figures(note: Any, connection: Connection) -> None:
    assert catalog.rebind(connection, note.binding, encoder())
    verdict = catalog.rebind(connection, catalog.require_binding(connection, IDENTITY), Rounded())
    assert verdict
    assert verdict.agreement is not None


def test_an_encoder_without_digests_is_known_by_its_probes(
    note: Any, connection: Connection
) -> None:
    catalog.hold_encoder(connection, note.binding, Anonymous())
    sealed = catalog.require_binding(connection, IDENTITY)
    assert sealed.fingerprint == fingerprint_of(Anonymous())
    assert sealed.fingerprint.startswith("probes-")
    with pytest.raises(EncoderMismatchError):
        catalog.hold_encoder(connection, sealed, Anonymous(salt="other"))


@pytest.mark.parametrize("name", ["other", "./models/deterministic", "Deterministic"])
def test_before_the_seal_the_declared_name_decides(
    note: Any, connection: Connection, name: str
) -> None:
    """The whole name, not the last part of a path."""
    with pytest.raises(EncoderMismatchError, match=f"'deterministic'.*declares '{name}'"):
        catalog.hold_encoder(connection, note.binding, DeterministicEncoder(name, dimensions=3))
    assert catalog.require_binding(connection, IDENTITY).fingerprint is None
    catalog.hold_encoder(connection, note.binding, DeterministicEncoder("deterministic", 3))


def test_after_the_seal_the_name_does_not_matter(note: Any, connection: Connection) -> None:
    catalog.hold_encoder(connection, note.binding, encoder())
    sealed = catalog.require_binding(connection, IDENTITY)
    catalog.hold_encoder(connection, sealed, DeterministicEncoder("renamed", 3))


def test_vectors_from_elsewhere_go_by_the_declaration(
    note: Any, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has no encoder: only what both declare can be compared."""
    from sbert_pg import registry

    monkeypatch.setattr(registry, "_loader", None)
    forget_encoders()
    assert answer(connection) == (note.id, False)
    with pytest.raises(EncoderMismatchError, match="dimensions"):
        hold(connection, IDENTITY, EncoderSpec(name="deterministic", dimensions=4))
    catalog.hold_encoder(connection, note.binding, encoder())
    connection.commit()
    assert answer(connection) == (note.id, True)


def test_a_reading_transaction_seals_nothing(note: Any, engine: sa.Engine) -> None:
    use_encoder(encoder())
    with engine.connect() as connection:
        connection.execute(sa.text("SET TRANSACTION READ ONLY"))
        assert answer(connection) == (note.id, False)
        connection.rollback()
        assert catalog.require_binding(connection, IDENTITY).fingerprint is None
        catalog.hold_encoder(connection, note.binding, encoder())
        connection.commit()
        forget_encoders()
        use_encoder(Rounded())
        connection.execute(sa.text("SET TRANSACTION READ ONLY"))
        assert answer(connection) == (note.id, False), "compared, and recorded by the next writer"


def test_many_processes_seal_at_once_and_one_wins(note: Any, engine: sa.Engine) -> None:
    """Half of them come with another encoder: all of that half, or all of the other, fail."""
    refused: list[str] = []
    barrier = threading.Barrier(8)

    def start(salt: str) -> None:
        barrier.wait()
        try:
            with engine.begin() as connection:
                catalog.hold_encoder(
                    connection, note.binding, DeterministicEncoder(dimensions=3, salt=salt)
                )
        except EncoderMismatchError:
            refused.append(salt)

    threads = [threading.Thread(target=start, args=("ab"[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused in (["a"] * 4, ["b"] * 4)
    sealed = catalog.require_binding(note.connection, IDENTITY).fingerprint
    winner = "b" if refused[0] == "a" else "a"
    assert sealed == DeterministicEncoder(dimensions=3, salt=winner).spec.fingerprint


def test_schemas_that_are_translated(note: Any, engine: sa.Engine) -> None:
    note.run("CREATE SCHEMA tenant")
    note.run("CREATE TABLE tenant.note (id int PRIMARY KEY, title text, body text, e vector(3))")
    tenant = catalog.bind(
        note.connection, ColumnIdentity("tenant", "note", "e"), SPEC, note.binding.source
    )
    note.connection.commit()
    mapped = engine.execution_options(schema_translate_map={None: "tenant"})
    with mapped.connect() as connection:
        assert catalog.require_binding(connection, IDENTITY).id == tenant.id
    with engine.connect() as connection:
        assert catalog.require_binding(connection, IDENTITY).id == note.binding.id
        connection.execute(sa.text("SET search_path = tenant, public"))
        assert catalog.require_binding(connection, IDENTITY).id == tenant.id
