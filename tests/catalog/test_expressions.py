"""What rows say: Python and the server agree, and the planner finds the queue by it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.orm import DeclarativeBase, aliased, mapped_column

from sbert_pg import catalog
from sbert_pg.source import HALF, NIL, Source, companion_name, digest, proof
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.types.wire import to_wire

#: Texts that would differ if bytes, escapes or collations came in between.
NASTY = [
    "",
    " ",
    "a",
    "\\",
    "\\\\x41",
    "\\x41",
    "\\101",
    "it's",
    'say "hi"',
    "%s %(name)s %% :name",
    "$body$ $1",
    "{curly} {{double}}",
    "line\nbreak\r\n\ttab\x0b",
    "Straße İı ﬁ e\u0301 \u00e9",
    "\u200d\u00ad\ufeff",
    "日本語 🚀 \U0010ffff",
    "\x01\x7f",
    "x" * 100_000,
]
VECTORS = [
    [0.0] * 12,
    [-0.0] * 12,
    [1.0, -1.0, 0.5, 0.25, 1e-3, 3.14, 60000.0, -2.0, 9.0, 9.0, 9.0, 9.0],
    [1 / 3] * 12,
]
SOURCES = {
    "one": Source.of("title"),
    "joined": Source.of(("title", "body")),
    "odd separator": Source.of(("title", "body"), "\\'%: {x} $1 "),
    "no separator": Source.of(("title", "body"), ""),
    "template": Source.template("T: {title}\\n{{x}} 'it''s' 100% :p {body}{title}"),
}


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection


def bound(
    connection: Connection,
    source: Source,
    storage: str = "vector",
    *,
    dimensions: int = 12,
    null: bool = True,
    name: str = "t",
) -> catalog.Binding:
    """A bound table of nasty rows."""
    not_null = "" if null else " NOT NULL"
    connection.exec_driver_sql(
        f"CREATE TABLE {name} (id int PRIMARY KEY, title text, body text, "
        f"e {storage}({dimensions}){not_null})"
    )
    spec = EncoderSpec(name="deterministic", dimensions=dimensions)
    return catalog.bind(connection, ColumnIdentity(None, name, "e"), spec, source)


@pytest.mark.parametrize("storage", ["vector", "halfvec"])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_python_and_server_agree(connection: Connection, source: Source, storage: str) -> None:
    binding = bound(connection, source, storage)
    rows = [
        {"i": i * 10 + j, "title": title, "body": body, "e": vector}
        for i, title in enumerate([None, *NASTY])
        for j, (body, vector) in enumerate(
            [(None, VECTORS[i % 4]), (NASTY[-i] if i else "", None), ("b", VECTORS[i % 3])]
        )
    ]
    connection.execute(
        sa.text("INSERT INTO t (id, title, body, e, e_of) VALUES (:i, :title, :body, :e, NULL)"),
        [row | {"e": row["e"] and str(row["e"])} for row in rows],
    )
    t = binding.clause()
    expressions = binding.expressions
    found = connection.execute(
        sa.select(
            t.c.id,
            *(expressions.on(t, name).label(name) for name in ("text", "proof", "of", "digest")),
            sa.literal_column(expressions.bare("digest"), sa.Uuid).label("bare"),
        )
    )  # fmt: skip
    by_id = {row.id: row for row in found}
    join = source.joiner()
    for row in rows:
        values = [row[name] for name in source.columns]
        text = None if all(value is None for value in values) else join(values)
        wire = row["e"] and to_wire(np.array(row["e"], np.float32), storage)  # type: ignore[arg-type]
        server = by_id[row["i"]]
        assert server.text == text
        assert server.digest == server.bare == digest(binding.id, text, wire, storage)  # type: ignore[arg-type]
        assert server.proof == proof(binding.id, wire, storage)  # type: ignore[arg-type]
        assert server.of == (None if text is None else server.digest.hex[HALF:])


def test_a_vector_of_fewer_dimensions_than_the_proof_covers(connection: Connection) -> None:
    binding = bound(connection, Source.of("title"), dimensions=3)
    connection.exec_driver_sql("INSERT INTO t (id, title) VALUES (1, 'a')")
    wire = to_wire(np.array([1, 2, 3], np.float32), "vector")
    value = digest(binding.id, "a", wire, "vector")
    connection.exec_driver_sql("UPDATE t SET e = '[1,2,3]', e_of = %s", (value,))
    assert fresh(connection, binding) == [1]


def test_a_column_that_must_have_a_vector_has_a_text_for_every_row(connection: Connection) -> None:
    binding = bound(connection, Source.of(("title", "body")), null=False)
    assert not binding.null_text
    connection.exec_driver_sql("INSERT INTO t (id, e, e_of) VALUES (1, %s, NULL)", (str([1] * 12),))
    t = binding.clause()
    assert connection.scalar(sa.select(binding.expressions.on(t, "text"))) == ""


def fresh(connection: Connection, binding: catalog.Binding) -> list[int]:
    t = binding.clause()
    return list(connection.scalars(sa.select(t.c.id).where(binding.is_fresh(t)).order_by(t.c.id)))


def test_what_a_row_says(connection: Connection) -> None:
    binding = bound(connection, Source.of("title"))
    wire = to_wire(np.ones(12, np.float32), "vector")
    one = str([1.0] * 12)
    states = [
        ("fresh", "a", one, digest(binding.id, "a", wire, "vector"), True),
        ("failed for this text", "a", None, digest(binding.id, "a", None, "vector"), True),
        ("no text", None, None, None, True),
        ("backfill", "a", None, None, False),
        ("new", "a", None, NIL, False),
        ("new without text", None, None, NIL, True),
        ("failed, text taken away", None, None, digest(uuid.uuid4(), "a", None, "vector"), True),
        ("text changed", "b", one, digest(binding.id, "a", wire, "vector"), False),
        ("text taken away", None, one, digest(binding.id, "a", wire, "vector"), False),
        ("vector changed", "a", str([2.0] * 12), digest(binding.id, "a", wire, "vector"), False),
        ("vector taken away", "a", None, digest(binding.id, "a", wire, "vector"), False),
        ("another binding", "a", one, digest(uuid.uuid4(), "a", wire, "vector"), False),
        ("vector without text", None, one, None, False),
        ("failed, text changed", "b", None, digest(binding.id, "a", None, "vector"), False),
    ]
    connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
    connection.exec_driver_sql(
        "INSERT INTO t (id, title, e, e_of) VALUES (%s, %s, %s, %s)",
        [(i, text, vector, value) for i, (_, text, vector, value, _) in enumerate(states)],
    )
    said = fresh(connection, binding)
    assert [s[0] for i, s in enumerate(states) if i in said] == [s[0] for s in states if s[4]]
    t = binding.clause()
    failed = sa.select(t.c.id).where(binding.expressions.on(t, "failed"))
    assert [states[i][0] for i in connection.scalars(failed)] == ["failed for this text"]
    proven = sa.select(t.c.id).where(binding.is_proven(t)).order_by(t.c.id)
    assert [states[i][0] for i in connection.scalars(proven)] == [
        "fresh", "text changed", "text taken away"
    ]  # fmt: skip
    # Made pending by hand a row stays proven and is of the first class.
    connection.execute(
        sa.update(t).where(t.c.id == 0).values(e_of=binding.expressions.on(t, "requeue"))
    )
    assert 0 not in fresh(connection, binding)
    assert 0 in connection.scalars(proven).all()
    assert connection.scalar(sa.select(binding.class_of(t)).where(t.c.id == 0)) == 0


def plan(connection: Connection, statement: sa.Select[tuple[int]]) -> str:
    compiled = statement.compile(connection, compile_kwargs={"literal_binds": True})
    rows = connection.exec_driver_sql("EXPLAIN (FORMAT JSON) " + str(compiled).replace("%%", "%"))
    return json.dumps(rows.scalar_one())


@pytest.mark.parametrize("analysed", [False, True], ids=["new", "analysed"])
@pytest.mark.parametrize("pending", [0, 100, 20_000])
def test_the_planner_uses_the_queue(connection: Connection, analysed: bool, pending: int) -> None:
    binding = bound(connection, Source.of(("title", "body"), ": "), dimensions=3)
    connection.exec_driver_sql(
        "INSERT INTO t (id, title) SELECT g, 'x' FROM generate_series(1, 20000) g"
    )
    connection.exec_driver_sql(
        f"UPDATE t SET e = '[1,2,3]', e_of = (SELECT sbert_digest FROM (SELECT "
        f"substr(encode(sha256(('{binding.id}' || encode(vector_send('[1,2,3]'), 'hex'))::bytea), "
        f"'hex'), 1, 16) || substr(encode(sha256(('{binding.id}' || 'x')::bytea), 'hex'), 1, 16)) "
        f"AS d (sbert_digest))::uuid WHERE id > {pending}"
    )
    if analysed:
        connection.exec_driver_sql("ANALYZE t")
    [queue, failed] = catalog.queue_indexes(connection, binding)
    t = binding.clause().alias("row")
    stale, key = binding.is_stale(t), t.c.id
    claim = sa.select(key).where(stale, binding.class_of(t) == 0).order_by(key).limit(100)
    backfill = (
        sa.select(key)
        .where(stale, binding.class_of(t) == 1, key > sa.literal_column("500"))
        .order_by(key)
        .limit(100)
    )
    count = sa.select(sa.func.count()).select_from(
        sa.select(key).where(stale).order_by(binding.class_of(t), key).limit(10_001).subquery()
    )
    for statement in (claim, backfill, count):
        assert str(queue.existing) in plan(connection, statement), statement
    listed = sa.select(key).where(binding.expressions.on(t, "failed")).order_by(key).limit(100)
    assert str(failed.existing) in plan(connection, listed)
    assert connection.scalar(count) == min(pending, 10_001)


def test_expressions_over_an_alias_of_a_mapped_class(connection: Connection) -> None:
    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "t"
        id = mapped_column(sa.Integer, primary_key=True)
        title = mapped_column(sa.Text)
        body = mapped_column(sa.Text)
        e = mapped_column(sa.Text)
        e_of = mapped_column(sa.Uuid)

    binding = bound(connection, Source.of("title"))
    connection.exec_driver_sql("INSERT INTO t (id, title) VALUES (1, 'a'), (2, NULL)")
    connection.exec_driver_sql("UPDATE t SET e_of = NULL")
    one, two = aliased(Note), aliased(Note)
    statement = (
        sa.select(one.id, two.id)
        .join(two, sa.true())
        .where(
            binding.is_fresh(sa.inspect(one).selectable),
            binding.is_stale(sa.inspect(two).selectable),
        )
    )
    for _ in range(2):  # compiled, then from the cache
        assert connection.execute(statement).all() == [(2, 1)]


@pytest.mark.parametrize(
    "name", ["e", "E", "a b", "é" * 30, "n" * 60, "n" * 61, "é" * 31, '"', "%"]
)
def test_the_companion_has_one_name(connection: Connection, name: str) -> None:
    assert connection.scalar(sa.select(sa.func.sbert.companion_v1(name))) == companion_name(name)
    assert len(companion_name(name).encode()) <= 63
    assert companion_name(name) != name
