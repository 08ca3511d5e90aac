"""Vectors to the server and back, and what is refused before they leave."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql.base import ischema_names

import sbert_pg
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import (
    DeclarationError,
    DimensionError,
    EncoderMismatchError,
    NonFiniteError,
    VectorError,
    ZeroVectorError,
)
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import HalfVector, Vector, drivers, register_reflection, wire

Type = "type[Vector] | type[HalfVector]"


def things(type_: Any, name: str = "thing") -> sa.Table:
    return sa.Table(
        name,
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("text", sa.Text),
        sa.Column("vec", type_),
    )


def embedding(**options: Any) -> Embedding:
    return Embedding("deterministic", "text", dimensions=384, **options)


@pytest.mark.parametrize("type_", [Vector, HalfVector])
def test_round_trip_is_binary_and_float32(type_: Type, bare_database_url: sa.URL) -> None:
    engine = sa.create_engine(bare_database_url)
    table = things(type_(5))
    values = np.array([0.5, -1.25, 3e-5, 65504, 0], dtype=np.float32)
    sent = []
    sa.event.listen(engine, "before_cursor_execute", lambda *a: sent.append((a[2], a[3])))
    with engine.begin() as connection:
        table.create(connection)
        returned = connection.execute(
            sa.insert(table).values(id=1, vec=values).returning(table.c.vec)
        ).scalar_one()
        connection.execute(
            sa.insert(table), [{"id": 2, "vec": [1, 2, 3, 4, 5]}, {"id": 3, "vec": None}]
        )
        found = connection.execute(sa.select(table.c.vec).order_by(table.c.id)).scalars().all()
        assert "vector_send" in sent[-1][0] or "halfvec_send" in sent[-1][0]
    expected = values.astype(np.float16 if type_ is HalfVector else np.float32)
    for array in (returned, found[0]):
        assert array.dtype == np.float32
        assert array.shape == (5,)
        assert np.array_equal(array, expected.astype(np.float32))
    assert found[1].tolist() == [1, 2, 3, 4, 5]
    assert found[2] is None
    parameters = next(p for s, p in sent if s.startswith("INSERT"))
    assert any(isinstance(value, drivers.WireVector) for value in parameters.values())
    engine.dispose()


def test_connections_opened_before_any_vector_type(bare_database_url: sa.URL) -> None:
    """A connection without the dumper sends the same vector as a list."""
    engine = sa.create_engine(bare_database_url)
    with engine.begin() as connection:
        driver: Any = connection.connection.driver_connection
        driver.adapters.register_dumper(drivers.WireVector, _list_dumper())
        found = connection.execute(sa.select(sa.literal([1, 2, 3], Vector(3)))).scalar_one()
        assert found.tolist() == [1, 2, 3]
    engine.dispose()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_engine_older_than_the_types(bare_database_url: sa.URL, asynchronous: bool) -> None:
    """Connected before the first vector type is made, as where models are imported after it."""
    code = f"""
import asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
URL = {bare_database_url.render_as_string(hide_password=False)!r}

def use(connection):
    from sbert_pg.types import Vector, drivers
    sent = []
    dump = drivers.WireDumper.dump
    drivers.WireDumper.dump = lambda self, obj: sent.append(obj) or dump(self, obj)
    table = sa.Table("t", sa.MetaData(), sa.Column("v", Vector(2)))
    table.create(connection)
    connection.execute(sa.insert(table), [{{"v": [1, 2]}}, {{"v": [3, 4]}}])
    connection.execute(sa.insert(table).values(v=[1, 2]))
    assert connection.scalar(sa.select(sa.func.count()).where(table.c.v == [1, 2])) == 2
    # The cursor of an asynchronous connection can be out of reach when its first statement comes.
    assert len(sent) in {(2, 4) if asynchronous else (4,)}, sent

async def main():
    engine = create_async_engine(URL)
    async with engine.begin() as connection:
        await connection.execute(sa.text("SELECT 1"))
        await connection.run_sync(use)
    await engine.dispose()

if {asynchronous}:
    asyncio.run(main())
else:
    with sa.create_engine(URL).begin() as connection:
        connection.execute(sa.text("SELECT 1"))
        use(connection)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def _list_dumper() -> Any:
    from psycopg.types.array import ListDumper

    return ListDumper


def test_in_subqueries_unions_and_functions(bare_database_url: sa.URL) -> None:
    engine = sa.create_engine(bare_database_url)
    table = things(Vector(2))
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(sa.insert(table), [{"id": 1, "vec": [1, 2]}, {"id": 2, "vec": [3, 4]}])
        inner = sa.select(table.c.vec).where(table.c.id == 1).subquery()
        assert connection.scalar(sa.select(inner.c.vec)).tolist() == [1, 2]
        cte = sa.select(table).cte()
        assert connection.scalar(sa.select(cte.c.vec).where(cte.c.id == 2)).tolist() == [3, 4]
        both = sa.union_all(sa.select(table.c.vec), sa.select(table.c.vec))
        assert len(connection.execute(both).scalars().all()) == 4
        for name, values in (("avg", [2, 3]), ("sum", [4, 6])):
            for vector in (table.c.vec, table.alias().c.vec):
                assert connection.scalar(sa.select(getattr(vector, name)())).tolist() == values
            mean = getattr(table.c.vec, name)().filter(table.c.id == 2)
            assert connection.scalar(sa.select(mean)).tolist() == [3, 4]
        assert connection.scalar(sa.text("SELECT '[1,2]'::vector").columns(v=Vector(2))) is not None
    engine.dispose()


@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 40),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
@settings(max_examples=100, deadline=None)
def test_wire_and_text_forms_lose_nothing(array: Any) -> None:
    assert np.array_equal(wire.from_wire(wire.to_wire(array, "vector"), "vector"), array)
    assert np.array_equal(wire.from_text(wire.to_text(array)), array)
    rows = wire.to_wire_rows(np.stack([array, array * 2]), "vector")
    assert rows[0] == wire.to_wire(array, "vector")


def test_block_is_read_as_written() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    payload = b"".join(wire.to_wire_rows(matrix, "halfvec"))
    assert np.array_equal(wire.from_wire_block(payload, 4, "halfvec"), matrix)


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ([1.0, float("nan"), 2.0], NonFiniteError, "position 1"),
        ([1.0, float("inf"), 2.0], NonFiniteError, "inf"),
        ([1.0, 2.0], DimensionError, "2 dimensions and 3"),
        ([0.0, 0.0, 0.0], ZeroVectorError, "zeros"),
        ("[1,2,3]", VectorError, "Text is encoded"),
        (b"123", VectorError, "bytes"),
        ([[1.0, 2.0, 3.0]], VectorError, "one axis"),
        ({"a": 1}, VectorError, "not a sequence"),
        ([], DimensionError, "0 dimensions"),
    ],
)
def test_bad_vectors_never_reach_the_server(value: Any, error: type[Exception], says: str) -> None:
    """Bound to an engine that cannot connect: an attempt to execute would be another error."""
    type_ = Embedding("small", "text", dimensions=3)
    process = type_.bind_processor(pg.psycopg.dialect())
    with pytest.raises(error, match=says) as raised:
        process(value)
    assert isinstance(raised.value, ValueError)
    if not isinstance(value, str):
        with pytest.raises(error):
            things(type_).c.vec.cosine_distance(value)


def test_halfvec_range_and_zero_without_cosine() -> None:
    with pytest.raises(NonFiniteError, match="65504"):
        HalfVector(1).checked([70000])
    assert Embedding("small", "text", dimensions=2, similarity="dot").checked([0, 0]).tolist() == [
        0,
        0,
    ]


def test_text_where_no_encoder_is_declared() -> None:
    with pytest.raises(DeclarationError, match="has no encoder"):
        things(Vector(3)).c.vec.distance("a text")


def test_none_is_not_a_query() -> None:
    with pytest.raises(DeclarationError, match="None"):
        things(Vector(3)).c.vec.distance(None)


@pytest.mark.parametrize(
    ("one", "other"),
    [("one", "two"), ("/models/v1/encoder", "/models/v2/encoder"), ("acme/base", "other/base")],
)
def test_columns_of_two_encoders_are_not_compared(one: str, other: str) -> None:
    a = things(Embedding(one, "text", dimensions=3)).c.vec
    b = things(Embedding(other, "text", dimensions=3), "other").c.vec
    with pytest.raises(EncoderMismatchError, match=rf"'{one}'.*'{other}'"):
        a.cosine_distance(b)
    wider = things(Embedding(one, "text", dimensions=4), "third").c.vec
    with pytest.raises(EncoderMismatchError, match=r"3 dimensions.*\(4\)"):
        a.cosine_distance(wider)


def test_columns_of_one_encoder_are_compared_whatever_its_name() -> None:
    short = things(Embedding("all-MiniLM-L6-v2", "text")).c.vec
    long = things(Embedding("sentence-transformers/all-MiniLM-L6-v2", "text"), "other").c.vec
    short.cosine_distance(long)


OPERATORS: list[tuple[str, str, Callable[[Any, Any], float]]] = [
    ("l2_distance", "<->", lambda a, b: float(np.linalg.norm(a - b))),
    (
        "cosine_distance",
        "<=>",
        lambda a, b: float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
    ),
    ("max_inner_product", "<#>", lambda a, b: float(-(a @ b))),
    ("l1_distance", "<+>", lambda a, b: float(np.abs(a - b).sum())),
]


@pytest.mark.parametrize(("name", "operator", "expected"), OPERATORS)
@pytest.mark.parametrize("type_", [Vector, HalfVector])
def test_operators(
    name: str,
    operator: str,
    expected: Callable[[Any, Any], float],
    type_: Type,
    bare_database_url: sa.URL,
) -> None:
    engine = sa.create_engine(bare_database_url)
    table = things(type_(3))
    a, b = np.array([1, 2, 3], np.float32), np.array([3, -1, 2], np.float32)
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(sa.insert(table), {"id": 1, "vec": a})
        expression = getattr(table.c.vec, name)(b)
        assert operator in str(expression.compile(dialect=engine.dialect))
        assert connection.scalar(sa.select(expression)) == pytest.approx(expected(a, b), abs=1e-6)
        # Against another column, and with the operator's precedence.
        self_distance = getattr(table.c.vec, name)(table.c.vec) + 1
        assert connection.scalar(sa.select(self_distance)) == pytest.approx(
            expected(a, a) + 1, abs=1e-6
        )
    engine.dispose()


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_is_sentence_transformers(similarity: Any, bare_database_url: sa.URL) -> None:
    from sbert_pg.distance import similarity_matrix

    engine = sa.create_engine(bare_database_url)
    table = things(Embedding("small", "text", dimensions=3, similarity=similarity))
    a, b = np.array([1, 2, 3], np.float32), np.array([3, -1, 2], np.float32)
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(sa.insert(table), {"id": 1, "vec": a})
        column = table.c.vec
        found = connection.execute(sa.select(column.similarity(b), column.distance(b))).one()
    expected = similarity_matrix(a[None], b[None], similarity)[0, 0]
    assert found[0] == pytest.approx(expected, abs=1e-6)
    offset = 1 if similarity == "cosine" else 0
    assert found[1] == pytest.approx(offset - expected, abs=1e-6)
    engine.dispose()


def test_query_text_is_encoded_once_per_execution(
    bare_database_url: sa.URL, fake_encoder: DeterministicEncoder
) -> None:
    engine = sa.create_engine(bare_database_url)
    table = things(embedding())
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(
            sa.insert(table), {"id": 1, "vec": fake_encoder.encode_document(["a b"])[0]}
        )
        fake_encoder.encoded.clear()
        statement = sa.select(table.c.vec.distance("a b"), table.c.vec.similarity("a b"))
        assert fake_encoder.encoded == []
        for _ in range(3):
            distance, similarity = connection.execute(statement).one()
            assert distance == pytest.approx(0, abs=1e-6)
            assert similarity == pytest.approx(1, abs=1e-6)
        assert fake_encoder.encoded == ["a b"]
        # A compiled statement is reused for another text, and the text is that one's.
        other = connection.execute(sa.select(table.c.vec.distance("c d"))).scalar_one()
        assert other > 0.5
        bound = sa.select(table.c.vec.distance(sa.bindparam("q")))
        assert connection.execute(bound, {"q": "a b"}).scalar_one() == pytest.approx(0, abs=1e-6)
    engine.dispose()


def test_literal_rendering(bare_database_url: sa.URL, fake_encoder: DeterministicEncoder) -> None:
    engine = sa.create_engine(bare_database_url)
    table = things(embedding())
    statement = sa.select(sa.func.count()).where(table.c.vec.distance("a b") < 0.1)
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(
            sa.insert(table), {"id": 1, "vec": fake_encoder.encode_document(["a b"])[0]}
        )
        # Then it is known that this database has no catalog to ask.
        assert connection.execute(statement).scalar_one() == 1
        sql = str(statement.compile(engine, compile_kwargs={"literal_binds": True}))
        assert "::VECTOR(384)" in sql
        assert "%(" not in sql
        assert connection.exec_driver_sql(sql).scalar_one() == 1
    engine.dispose()


def test_statements_are_cached(bare_database_url: sa.URL) -> None:
    """An uncacheable type costs a compilation for each execution, and SQLAlchemy warns."""
    table = things(embedding())
    one = sa.select(table).where(table.c.vec.distance([1.0] * 384) < 1)._generate_cache_key()
    two = sa.select(table).where(table.c.vec.distance([2.0] * 384) < 1)._generate_cache_key()
    assert one is not None
    assert one == two
    assert Vector(3)._static_cache_key != Vector(4)._static_cache_key
    assert Vector(3)._static_cache_key != HalfVector(3)._static_cache_key


def test_reflection(bare_database_url: sa.URL, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vector", "halfvec"):
        monkeypatch.setitem(ischema_names, name, None)  # what was there comes back afterwards
    register_reflection()
    engine = sa.create_engine(bare_database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE r (a vector(3), b halfvec(4), c vector)")
        table = sa.Table("r", sa.MetaData(), autoload_with=connection)
    assert isinstance(table.c.a.type, Vector)
    assert table.c.a.type.dimensions == 3
    assert isinstance(table.c.b.type, HalfVector)
    assert table.c.b.type.dimensions == 4
    assert isinstance(table.c.c.type, Vector)
    assert table.c.c.type.dimensions is None
    engine.dispose()


def test_reflection_stays_when_pgvector_is_imported_later() -> None:
    code = """
from sqlalchemy.dialects.postgresql.base import ischema_names
from sbert_pg.types.vector import HalfVector, Vector, register_reflection
register_reflection()
import pgvector.sqlalchemy
assert ischema_names["vector"] is Vector
assert ischema_names["halfvec"] is HalfVector
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_declaring_changes_nothing_for_others() -> None:
    """Neither what reflection gives, nor what psycopg does with values; in a fresh process."""
    code = """
import copy
import psycopg
from psycopg.adapt import AdaptersMap
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

def state():
    formats = psycopg.adapt.PyFormat
    def known(kind):
        try:
            return psycopg.adapters.get_dumper(kind, formats.AUTO)
        except psycopg.ProgrammingError:
            return None
    return dict(ischema_names), [known(kind) for kind in (list, bytes, str, int)]

before = state()
from sbert_pg import Embedding, Vector, embedding_column
from sbert_pg.types.wire import WireDumper, WireVector
class Base(DeclarativeBase): pass
class A(Base):
    __tablename__ = "a"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column("all-MiniLM-L6-v2", source="title")
A.embedding.distance([1.0] * 384)
assert state() == before
assert psycopg.adapters.get_dumper(WireVector, psycopg.adapt.PyFormat.AUTO) is not WireDumper
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    "type_",
    [
        Vector(3),
        Vector(),
        HalfVector(7),
        Embedding("all-MiniLM-L6-v2", "text"),
        Embedding("m", ["a", "b"], dimensions=3, storage="halfvec", separator=" ", replaces="old"),
        Embedding("m", sbert_pg.Source.template("{a}: {b}"), dimensions=3, similarity="dot"),
    ],
)
def test_repr_is_what_alembic_writes(type_: Any) -> None:
    """Alembic writes the type's module and repr; with ``import sbert_pg`` it is Python again."""
    prefix = type(type_).__module__
    assert prefix == "sbert_pg"
    copy = eval(f"{prefix}.{type_!r}", {"sbert_pg": sbert_pg})
    assert copy._static_cache_key == type_._static_cache_key
    assert pickle.loads(pickle.dumps(type_)).get_col_spec() == type_.get_col_spec()


def test_alembic_renders_it_itself() -> None:
    from alembic.autogenerate.api import AutogenContext
    from alembic.autogenerate.render import _repr_type
    from alembic.migration import MigrationContext

    context = MigrationContext.configure(dialect=pg.psycopg.dialect())
    auto = AutogenContext(context, opts={"user_module_prefix": None})
    assert _repr_type(Vector(3), auto) == "sbert_pg.Vector(3)"


def test_declarations_that_make_no_sense() -> None:
    with pytest.raises(DeclarationError, match="dimensions"):
        Embedding("unheard-of", "text")
    with pytest.raises(DeclarationError, match="stored as"):
        Embedding("all-MiniLM-L6-v2", "text", storage="bit")  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match="cannot give"):
        Embedding("all-MiniLM-L6-v2", "text", dimensions=100)
    with pytest.raises(DeclarationError, match="twice"):
        Embedding("all-MiniLM-L6-v2", ["text", "text"])
    with pytest.raises(DeclarationError):
        Vector(0)


@pytest.mark.parametrize("storage", ["vector", "halfvec"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_many_vectors_are_refused_as_each_alone_is(storage: Any, similarity: Any) -> None:
    """Workers and the loader ask for many at once, a statement for one."""
    type_ = Embedding("m", "text", dimensions=2, storage=storage, similarity=similarity)
    rows = [[1, 2], [0, 0], [np.nan, 1], [0, -np.inf], [70_000, 0], [0, -65_504], [1e-30, 0]]
    refused = set()
    for number, row in enumerate(rows):
        try:
            type_.checked(row)
        except VectorError:
            refused.add(number)
    assert set(wire.unfit(np.array(rows, np.float32), storage, similarity)) == refused
    assert {2, 3} <= refused
