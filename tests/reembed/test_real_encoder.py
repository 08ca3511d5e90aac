"""With the real all-MiniLM-L6-v2: what shares its space, what does not, and what made a column."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import catalog, errors
from sbert_pg import reembed as ree
from sbert_pg.cli.demo_data import standard_library
from sbert_pg.encoder import Encoder
from sbert_pg.source import Source
from sbert_pg.system import ColumnIdentity
from sbert_pg.types import Vector

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
COLUMN = ColumnIdentity("public", "page", "embedding")


@pytest.fixture(scope="module")
def fp32(minilm_path) -> Encoder:
    return Encoder.load(MINILM, precision="fp32")


@pytest.fixture(scope="module")
def rows(fp32) -> list[dict[str, Any]]:
    documented = list(islice(standard_library(), 0, 1800, 60))
    vectors = fp32.encode_document([f"{d.name} {d.docstring}" for d in documented])
    return [
        {"id": i, "title": d.name, "body": d.docstring, "embedding": vector}
        for i, (d, vector) in enumerate(zip(documented, vectors, strict=True))
    ]


@pytest.fixture
def page(engine, rows) -> sa.Table:
    """A home-made table: fp32 vectors of title and docstring, joined by a blank."""
    table = sa.Table(
        "page",
        sa.MetaData(),
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("title", sa.Text),
        sa.Column("body", sa.Text),
        sa.Column("embedding", Vector(384)),
    )
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), rows)
    return table


def test_fp32_vectors_are_adopted_by_int8(engine, page, minilm):
    """The source is found by trying, and int8 is near enough to prove it."""
    done = ree.adopt(engine, COLUMN, [minilm])
    assert done.proof.source == Source(("title", "body"), " ")
    assert done.proof.best.comparison.share == 1
    assert done.pending == 0
    assert 0.97 < done.proof.best.comparison.worst < 1


def test_fp32_and_int8_share_a_column(engine, page, minilm, fp32):
    ree.adopt(engine, COLUMN, [fp32], [Source(("title", "body"), " ")])
    found = ree.rebind(engine, COLUMN, minilm)
    assert found.probes.compatible
    assert 0.97 < found.rows.worst <= found.rows.mean < 1
    with engine.connect() as connection:
        agreement = connection.execute(
            sa.text("SELECT agreement FROM sbert.compatible_encoder")
        ).scalar_one()
    assert agreement["stored"]["mean_cosine"] == pytest.approx(found.rows.mean)


def test_another_prompt_or_length_is_another_space(engine, page, minilm, fp32):
    """The same weights, and yet not the same vectors."""
    ree.adopt(engine, COLUMN, [fp32], [Source(("title", "body"), " ")])

    class Prompted:
        """As a version of the model whose configuration puts a prompt before each text."""

        spec = fp32.spec

        def __init__(self) -> None:
            from sbert_pg.probes import PROBES

            self.probe_vectors = self.encode_document(PROBES)

        def encode_document(self, texts):
            return fp32.encode_document([f"passage: {text}" for text in texts])

        encode_query = encode_document

    prompted = Prompted()
    prompted.spec = dataclasses.replace(fp32.spec, prompts=(("document", "passage: "),))
    with pytest.raises(errors.EncoderMismatchError):
        ree.rebind(engine, COLUMN, prompted)
    shorter = Prompted()
    shorter.spec = dataclasses.replace(fp32.spec, max_seq_length=16)
    with pytest.raises(errors.EncoderMismatchError):
        ree.rebind(engine, COLUMN, shorter)
    with engine.connect() as connection:
        assert catalog.require_binding(connection, COLUMN).fingerprint == fp32.spec.fingerprint
