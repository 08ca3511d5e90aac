"""Texts, vectors, names and statements that nobody should send, drawn by Hypothesis.

Each is refused by an error of our tree, or does what it says; the connection goes on either way.
Encoder directories are in ``tests/encoder/test_hostile.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sbert_pg import catalog, nearest
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import DeclarationError, SbertPgError
from sbert_pg.registry import use_encoder
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.sqlstates import sqlstate_of, translated
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

FUZZ = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
#: Errors of the server that name what the *caller* may not do or has not got.
CALLERS = ("42501", "42P01", "42704", "3F000")

NUMBERS = st.floats(width=32) | st.integers() | st.sampled_from([1e39, -1e39, 65_520.0, 1e-46])
VECTORS = (
    st.lists(NUMBERS, max_size=5)
    | st.lists(st.lists(NUMBERS, max_size=3), max_size=3)
    | hnp.arrays(
        st.sampled_from(
            [np.float64, np.float16, np.int64, np.complex64, np.bool_, "U3", "O", "M8[s]"]
        ),
        st.sampled_from([(), (0,), (2,), (3,), (1, 3), (3, 1)]),
    )
    | st.binary(max_size=20)
    | st.text(max_size=20)
    | st.lists(NUMBERS, min_size=3, max_size=3).map(str)
    | st.dictionaries(st.text(max_size=2), NUMBERS, max_size=3)
    | st.sampled_from([True, 3, object(), float, (1, 2, None), {1.0, 2.0, 3.0}, range(3)])
)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
#: Of what the server reads as JSON at all.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS | st.sampled_from(["title", "id", "e", "nothing"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
DECLARED = JSON | st.fixed_dictionaries({"name": JSON, "dimensions": JSON | st.just(3)})
SOURCES = JSON | st.fixed_dictionaries(
    {"columns": JSON | st.just(["title"]), "separator": JSON, "pattern": JSON | st.just("{title}")}
)


@pytest.fixture
def world(make: Any) -> Any:
    """A bound table with two rows, and its declaration."""
    encoder = use_encoder(DeterministicEncoder(dimensions=3))
    note = make("note (id int PRIMARY KEY, title text, e vector(3))", ("title",))
    catalog.hold_encoder(note.connection, note.binding, encoder)
    note.run("INSERT INTO note (id, title) VALUES (1, 'a'), (2, 'b')")
    note.connection.commit()
    note.table = sa.Table(
        "note",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("title", sa.Text),
        sa.Column("e", Embedding("deterministic", source="title", dimensions=3)),
    )
    return note


def own_error_or_nothing(note: Any, do: Callable[[], object], also: tuple[str, ...] = ()) -> None:
    """Do it; what it raises is our own, and the connection goes on."""
    try:
        with suppress(SbertPgError), note.connection.begin_nested(), translated():
            do()
    except sa.exc.DBAPIError as error:
        if sqlstate_of(error) not in (*CALLERS, *also):
            raise
    assert note.connection.scalar(sa.select(sa.literal(1))) == 1
    note.connection.rollback()


def vectors(note: Any, value: Any, number: int) -> None:
    """Stored, and compared with; some are refused when the statement is made."""
    t, run = note.table, note.connection.execute
    make: list[Callable[[], Any]] = [
        lambda: sa.insert(t).values(id=9, title="x", e=value),
        lambda: sa.update(t).values(title="x", e=value).where(t.c.id == 1),
        lambda: sa.select(t.c.id).order_by(t.c.e.distance(value)),
        lambda: sa.select(t.c.id).where(t.c.e.cosine_distance(value) < 1),
        lambda: nearest(t.c.e, value, limit=2),
    ]
    own_error_or_nothing(note, lambda: run(make[number]()))


def texts(note: Any, text: str) -> None:
    """As a question, and as the text of a row and of its vector."""
    t = note.table
    own_error_or_nothing(note, lambda: note.connection.execute(nearest(t.c.e, text, limit=2)).all())
    own_error_or_nothing(
        note,
        lambda: note.connection.execute(
            sa.insert(t).values(id=9, title=text, e=np.ones(3, np.float32))
        ),
        # What a text of PostgreSQL cannot hold is between the application and its driver.
        also=("22021", None) if "\0" in text or not text.isprintable() else (),  # type: ignore[arg-type]
    )


def names(note: Any, schema: str | None, table: str, column: str, source: str) -> None:
    identity = ColumnIdentity(schema, table, column)
    spec = EncoderSpec(name="deterministic", dimensions=3)

    def bind() -> None:
        catalog.bind(note.connection, identity, spec, Source.of(source))

    own_error_or_nothing(note, bind)
    own_error_or_nothing(note, lambda: catalog.unbind(note.connection, identity))
    own_error_or_nothing(note, lambda: catalog.binding_of(note.connection, identity))


STATEMENTS = [
    "SELECT sbert.bind_v1('note', 'e', CAST(:a AS jsonb), CAST(:b AS jsonb))",
    "SELECT sbert.bind_v1('free', 'e', CAST(:a AS jsonb), CAST(:b AS jsonb))",
    "SELECT sbert.bind_v1('free', 'e', CAST(:a AS jsonb), CAST(:b AS jsonb), :c)",
    "SELECT sbert.seal_v1(:id, :c, :c, CAST(:a AS jsonb), decode('00', 'hex'))",
    "SELECT sbert.rename_v1('note', :c, :d)",
    "SELECT sbert.unbind_v1('note', :c)",
    "SELECT sbert.grant_v1(:c, :d)",
    "SELECT sbert.proof_v1('note', :c, :d, :c, CAST('[1,2,3]' AS vector))",
    "SELECT sbert.fence_v1('note', 'e', :c)",
    "SELECT sbert.set_state_v1(:id, :c, :d)",
    "SELECT sbert.resume_v1('note', :c, :d)",
]


def statements(note: Any, statement: str, a: Any, b: Any, c: str, d: str) -> None:
    """The functions that plain SQL and migrations call, with whatever comes."""
    values = {"a": json.dumps(a), "b": json.dumps(b), "c": c, "d": d, "id": note.id}
    used = {name: value for name, value in values.items() if f":{name}" in statement}
    own_error_or_nothing(note, lambda: note.run(statement, **used))


def _fuzz(examples: int) -> Any:
    return settings(FUZZ, max_examples=examples)


@pytest.mark.parametrize("examples", [20, pytest.param(250, marks=pytest.mark.slow)])
class TestWhateverComes:
    def test_vectors(self, world: Any, examples: int) -> None:
        @_fuzz(examples)
        @given(VECTORS, st.integers(0, 4))
        def test(value: Any, number: int) -> None:
            vectors(world, value, number)

        test()

    def test_texts(self, world: Any, examples: int) -> None:
        @_fuzz(examples)
        @given(st.text(max_size=40) | st.text("[]0123456789.,e- ", max_size=12))
        def test(text: str) -> None:
            texts(world, text)

        test()

    def test_names(self, world: Any, examples: int) -> None:
        anything = WORDS | st.text(max_size=70)

        @_fuzz(examples)
        @given(
            st.none() | anything,
            st.just("note") | anything,
            st.just("e") | anything,
            st.just("title") | anything,
        )
        def test(schema: str | None, table: str, column: str, source: str) -> None:
            names(world, schema, table, column, source)

        test()

    def test_statements(self, world: Any, examples: int) -> None:
        world.run("CREATE TABLE free (id int PRIMARY KEY, title text, e vector(3))")
        world.connection.commit()

        @_fuzz(examples)
        @given(st.sampled_from(STATEMENTS), DECLARED, SOURCES, WORDS, WORDS)
        def test(statement: str, a: Any, b: Any, c: str, d: str) -> None:
            statements(world, statement, a, b, c, d)

        test()


@pytest.mark.parametrize(
    "name", ["\0", "e\0", "\ud800", "e\udfff"], ids=["nul", "e nul", "half", "e half"]
)
@pytest.mark.parametrize("part", ["schema", "table", "column", "source"])
def test_what_can_be_no_name(world: Any, name: str, part: str) -> None:
    spec = EncoderSpec(name="deterministic", dimensions=3)
    given = {"schema": "public", "table": "note", "column": "e", "source": "title", part: name}
    names(world, **{**given, "source": "title"})
    with pytest.raises(DeclarationError, match="cannot store"):
        catalog.bind(
            world.connection,
            ColumnIdentity(given["schema"], given["table"], given["column"]),
            spec,
            Source.of(given["source"]),
        )
