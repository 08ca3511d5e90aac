"""The audit: what is proven and wrong all the same is found, named, and mended on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from sbert_pg import catalog, registry
from sbert_pg.errors import EncoderMismatchError
from sbert_pg.freshness import audit, counts, status
from sbert_pg.source import Source, digest
from sbert_pg.spec import EncoderSpec, Vectors
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import wire

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
    """A row that is proven, whatever its vector is of: as after a false vouching."""
    binding = catalog.require_binding(connection, ColumnIdentity(None, "note", "e"))
    shown = None if vector is None else wire.to_text(vector)
    payload = None if vector is None else wire.to_wire(vector, binding.storage)
    connection.execute(
        sa.text(
            "INSERT INTO note (id, day, title, e, e_of) "
            f"VALUES (:i, '2024-01-01', :t, CAST(:v AS {binding.storage}), :d)"
        ),
        {
            "i": number,
            "t": text,
            "v": shown,
            "d": digest(binding.id, text, payload, binding.storage),
        },
    )


def key(number: int) -> str:
    return f'["{number}", "2024-01-01"]'


def corrupt(connection: Connection, encoder: DeterministicEncoder, rows: int = 40) -> None:
    for number in range(rows):
        text = f"text {number} about nothing"
        put(connection, number, text, encoder.encode_document([text])[0])
    put(connection, 102, "new text", encoder.encode_document(["old words entirely"])[0])
    put(connection, 103, None, None)
    put(connection, 104, "BAD", encoder.encode_document(["bad"])[0])
    put(connection, 100, "failed", None)
    connection.exec_driver_sql(
        "INSERT INTO note (id, day, title) VALUES (105, '2024-01-01', 'pending')"
    )
    connection.commit()


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
        key(102): "stale",
        key(104): "unencodable",
    }
    assert (result.rows, result.waiting, result.wrong) == (43, 2, 2)
    assert result.min_cosine > 0.999
    assert result.whole
    assert result.requeued == 0
    assert steps[-1] == 43
    assert len(steps) == (7 if batch == 7 else 1)
    assert counts(note, binding_of(note)).pending == 1, "nothing is requeued unless asked"


def test_what_is_wrong_is_made_pending_on_request(
    note: Connection, engine: sa.Engine, encoder: DeterministicEncoder
) -> None:
    corrupt(note, encoder)
    result = audit(engine, binding_of(note), encoder, sample=None, requeue=True)
    assert result.requeued == 1
    found = counts(note, binding_of(note))
    assert (found.pending, found.failed) == (2, 1)
    note.rollback()
    again = audit(engine, binding_of(note), encoder, sample=None)
    assert (again.wrong, again.waiting) == (0, 3)
    kept = "SELECT count(e) FROM note WHERE id = 102"
    assert note.exec_driver_sql(kept).scalar_one() == 1, "it is searched until it is mended"


def test_a_sample(note: Connection, engine: sa.Engine, encoder: DeterministicEncoder) -> None:
    corrupt(note, encoder, rows=90)
    for number in range(1000, 1300):
        note.exec_driver_sql(f"INSERT INTO note (id, day) VALUES ({number}, '2024-01-01')")
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
    catalog.hold_encoder(note, binding_of(note), encoder)
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
    assert status(note)[0].truncated == round(45 * 40 / 43)


def test_status_estimates_cut_texts_without_an_audit(note: Connection) -> None:
    """By some texts of the table, where an encoder of the column's name is at hand."""

    class Counting(DeterministicEncoder):
        def count_tokens(self, texts: Sequence[str]) -> list[int]:
            return [len(text.split()) for text in texts]

    note.exec_driver_sql(
        "INSERT INTO note (id, day, title, body) SELECT n, '2024-01-01', 'a title', "
        "CASE WHEN mod(n, 4) = 0 THEN repeat('word ', 40) END FROM generate_series(1, 400) n"
    )
    note.commit()
    encoder = Counting(dimensions=WIDTH)
    encoder._spec = replace(encoder.spec, max_seq_length=20)
    registry.use_encoder(encoder)
    try:
        assert status(note)[0].truncated is None, "nothing is known of the table yet"
        note.exec_driver_sql("ANALYZE note")
        assert status(note)[0].truncated == 100
    finally:
        registry.forget_encoders()
    assert status(note)[0].truncated is None, "no encoder is at hand"


class Mute(DeterministicEncoder):
    """Its vectors are compared by the dot product, and zero where a text says nothing."""

    @property
    def spec(self) -> EncoderSpec:
        return replace(super().spec, similarity="dot")

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        vectors = super().encode_document(texts)
        vectors[[text == "..." for text in texts]] = 0
        return vectors


def test_a_zero_vector_is_the_one_of_its_text(engine: sa.Engine) -> None:
    """An encoder may give one, unless the cosine is what compares."""
    encoder = Mute(dimensions=WIDTH)
    with engine.connect() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE note (id int, day date, title text, e vector({WIDTH}), "
            "PRIMARY KEY (id, day))"
        )
        column = ColumnIdentity(None, "note", "e")
        binding = catalog.bind(connection, column, encoder.spec, Source.of("title"))
        for number, text in enumerate(["...", "some words"]):
            put(connection, number, text, encoder.encode_document([text])[0])
        put(connection, 2, "...", encoder.encode_document(["some words"])[0])
        connection.commit()
    result = audit(engine, binding, encoder, sample=None)
    assert [(finding.key, finding.kind) for finding in result.findings] == [(key(2), "stale")]
