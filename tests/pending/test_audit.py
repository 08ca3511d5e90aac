"""The sweep: whatever got past the triggers is found, named, and mended on request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from sbert_pg import catalog
from sbert_pg.catalog import tables
from sbert_pg.errors import EncoderMismatchError
from sbert_pg.pending.audit import audit
from sbert_pg.pending.spaces import LEAST, Space
from sbert_pg.pending.status import status
from sbert_pg.source import Source
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import wire
from sbert_pg.types.guard import ColumnIdentity

WIDTH = 16


@pytest.fixture
def encoder() -> DeterministicEncoder:
    return DeterministicEncoder(dimensions=WIDTH)


@pytest.fixture(params=["vector", "halfvec"])
def note(
    engine: sa.Engine, encoder: DeterministicEncoder, request: pytest.FixtureRequest
) -> Iterator[Connection]:
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE note (id int, day date, title text, body text, "
            f"e {request.param}({WIDTH}), PRIMARY KEY (id, day))"
        )
        catalog.bind(
            connection,
            ColumnIdentity(None, "note", "e"),
            encoder.spec,
            Source.of(["title", "body"]),
        )
        connection.commit()
        yield connection


def binding_of(connection: Connection) -> catalog.Binding:
    found = catalog.require_binding(connection, ColumnIdentity(None, "note", "e"))
    connection.rollback()
    return found


def put(connection: Connection, number: int, text: str | None, vector: Any) -> None:
    """A row as it arrives while triggers are disabled."""
    connection.execute(
        sa.text("INSERT INTO note VALUES (:i, '2024-01-01', :t, NULL, :v)"),
        {"i": number, "t": text, "v": None if vector is None else wire.to_text(vector)},
    )


def key(number: int) -> str:
    return f'["{number}", "2024-01-01"]'


def corrupt(connection: Connection, encoder: DeterministicEncoder, rows: int = 40) -> None:
    connection.exec_driver_sql("ALTER TABLE note DISABLE TRIGGER USER")
    for number in range(rows):
        text = f"text {number} about nothing"
        put(connection, number, text, encoder.encode_document([text])[0])
    put(connection, 100, "no vector", None)
    put(connection, 101, None, encoder.encode_document(["gone"])[0])
    put(connection, 102, "new text", encoder.encode_document(["old words entirely"])[0])
    put(connection, 103, None, None)
    put(connection, 104, "BAD", encoder.encode_document(["bad"])[0])
    put(connection, 105, "pending", None)
    connection.exec_driver_sql("ALTER TABLE note ENABLE TRIGGER USER")
    connection.execute(
        sa.insert(tables.pending).values(column_id=binding_of_open(connection), key=key(105))
    )
    connection.commit()


def binding_of_open(connection: Connection) -> int:
    return catalog.require_binding(connection, ColumnIdentity(None, "note", "e")).id


@pytest.mark.parametrize("batch", [7, 512])
def test_everything_wrong_is_found_and_nothing_else(
    note: Connection, engine: sa.Engine, encoder: DeterministicEncoder, batch: int
) -> None:
    corrupt(note, encoder)
    strict = DeterministicEncoder(dimensions=WIDTH, refuse="BAD")
    steps: list[int] = []
    result = audit(
        engine,
        binding_of(note),
        strict,
        sample=None,
        batch=batch,
        progress=lambda so_far: steps.append(so_far.rows),
    )
    found = {finding.key: finding.kind for finding in result.findings}
    assert found == {
        key(100): "missing",
        key(101): "superfluous",
        key(102): "stale",
        key(104): "unencodable",
    }
    assert (result.rows, result.waiting, result.wrong) == (45, 1, 4)
    assert result.min_cosine > 0.999
    assert result.whole
    assert result.marked == 0
    assert steps[-1] == 45
    assert len(steps) == (7 if batch == 7 else 1)
    waiting = sa.select(sa.func.count()).select_from(tables.pending)
    assert note.scalar(waiting) == 1, "nothing is marked unless asked"


def test_what_is_wrong_is_marked_on_request(
    note: Connection, engine: sa.Engine, encoder: DeterministicEncoder
) -> None:
    corrupt(note, encoder)
    result = audit(engine, binding_of(note), encoder, sample=None, mark=True)
    assert result.marked == 3
    c = tables.pending.c
    assert set(note.scalars(sa.select(c.key))) == {key(100), key(101), key(102), key(105)}
    again = audit(engine, binding_of(note), encoder, sample=None)
    assert (again.wrong, again.waiting) == (0, 4)


def test_a_sample(note: Connection, engine: sa.Engine, encoder: DeterministicEncoder) -> None:
    corrupt(note, encoder, rows=90)
    for number in range(1000, 1300):
        note.exec_driver_sql(f"INSERT INTO note VALUES ({number}, '2024-01-01', NULL)")
    note.exec_driver_sql("ANALYZE note")
    note.commit()
    result = audit(engine, binding_of(note), encoder, sample=20)
    assert result.rows + result.waiting == 20
    assert not result.whole
    few = audit(engine, binding_of(note), encoder, sample=5)
    assert 0 < few.rows + few.waiting <= 5, "a large table is sampled by blocks"


def test_another_encoder_is_refused(
    note: Connection, engine: sa.Engine, encoder: DeterministicEncoder
) -> None:
    catalog.seal(note, binding_of(note), encoder)
    note.commit()
    with pytest.raises(EncoderMismatchError):
        audit(engine, binding_of(note), DeterministicEncoder(dimensions=WIDTH, salt="other"))


def test_truncated_texts_reach_the_status(
    note: Connection, engine: sa.Engine, encoder: DeterministicEncoder
) -> None:
    class Statistics:
        truncated = 7

    class Counting(DeterministicEncoder):
        statistics = Statistics()

        def encode_document(self, texts: Any) -> Any:
            self.statistics.truncated += sum("about" in text for text in texts)
            return super().encode_document(texts)

    corrupt(note, encoder)
    note.exec_driver_sql("ANALYZE note")
    note.commit()
    assert status(note)[0].truncated is None
    note.commit()
    result = audit(engine, binding_of(note), Counting(dimensions=WIDTH), sample=None)
    assert result.truncated == 40
    assert status(note)[0].truncated == round(46 * 40 / 45)


def test_vectors_of_another_space_are_told_from_those_of_another_text() -> None:
    """Two spaces of 384 dimensions, each with its own few directions, as encoders have them."""
    random = np.random.default_rng(3)

    def space_of() -> Any:
        basis = random.standard_normal((40, 384)) * np.linspace(1, 0.2, 40)[:, None]
        offset = random.standard_normal(384) * 0.5

        def draw(n: int) -> Any:
            noise = random.standard_normal((n, 384)) * 0.8
            v = random.standard_normal((n, 40)) @ basis + offset + noise
            return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)

        return draw

    own, other = space_of(), space_of()
    space = Space(384)
    space.learn(own(LEAST - 1))
    assert not space.is_foreign(other(1)[0]), "too little is known yet"
    space.learn(own(600))
    assert sum(space.is_foreign(v) for v in own(300)) <= 3
    assert sum(space.is_foreign(v) for v in other(300)) >= 290
    assert space.is_foreign(own(1)[0] * 3), "the length is another"


def test_real_vectors_of_another_space(minilm: Any, data_dir: Any) -> None:
    import csv

    with (data_dir / "banking77" / "train.csv").open() as file:
        # Sorted by intent in the file.
        texts = [row[0] for row in csv.reader(file)][1::10]
    vectors = minilm.encode_document(texts)
    space = Space(vectors.shape[1])
    space.learn(vectors[:600])
    own = vectors[600:]
    permuted = own[:, np.random.default_rng(0).permutation(own.shape[1])]
    assert np.mean([space.is_foreign(v) for v in own]) < 0.02
    assert np.mean([space.is_foreign(v) for v in permuted]) > 0.95
