"""A plan says what is needed and what each statement locks, and changes nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import sqlalchemy as sa

from sbert_pg import errors, registry
from sbert_pg import reembed as ree
from sbert_pg.indexes import vector_indexes
from sbert_pg.reembed import plan
from sbert_pg.source import Source
from sbert_pg.testing import DeterministicEncoder


@pytest.fixture
def filled(world):
    world.create(100)
    world.fill("embedding")
    return world


def test_a_change_of_encoder(filled):
    found = plan(filled.engine, ree.request_of(filled.new_table.c.embedding_new))
    assert found.need == "re-embedding"
    assert found.rows == 100
    assert found.rows_per_second > 0
    assert found.growth > 100 * 48 * 4
    steps = [step for step, _, _ in found.statements]
    assert steps == ["begin", "begin", "begin", "backfill", "index", "finish"]
    assert (
        found.statements[0][1] == "ALTER TABLE public.articles ADD COLUMN embedding_new VECTOR(48)"
    )
    assert found.statements[4][1].startswith(
        "CREATE INDEX CONCURRENTLY ix_articles_embedding_new ON public.articles USING hnsw"
    )
    assert "lock: ACCESS EXCLUSIVE for an instant" in str(found)
    json.dumps(found.to_json())
    assert filled.columns()[-1] == "embedding"


def test_names_are_written_for_people_and_not_for_a_driver(filled):
    with filled.engine.begin() as connection:
        connection.exec_driver_sql('ALTER TABLE articles RENAME TO "Odd 100%% %%s"')
    old = filled.old_column._replace(table="Odd 100% %s")
    made = plan(filled.engine, ree.Request(old=old, new="new %", encoder=filled.new.spec))
    assert made.growth > 100 * 48 * 4
    added = 'ALTER TABLE public."Odd 100% %s" ADD COLUMN "new %" VECTOR(48)'
    assert made.statements[0][1] == added
    assert not [text for _, text, _ in made.statements if "%%" in text]


def test_the_plan_is_what_happens(filled):
    request = ree.request_of(filled.new_table.c.embedding_new)
    before = plan(filled.engine, request)
    ree.begin(filled.engine, request)
    filled.fill()
    ree.build_indexes(filled.engine, filled.new_column)
    with filled.engine.connect() as connection:
        (index,) = vector_indexes(connection, "articles", "embedding_new")
    assert index.name in before.statements[4][1]
    after = plan(filled.engine, request)
    assert any("under way already" in note for note in after.notes)


def test_what_needs_no_encoding_is_recognised(filled):
    class Cut(DeterministicEncoder):
        def _vector(self, text):
            return filled.old._vector(text)[: self.spec.dimensions]

    def need(encoder, storage="vector", source=None):
        registry.use_encoder(encoder)
        request = ree.Request(
            old=filled.old_column, new="x", encoder=encoder.spec, storage=storage, source=source
        )
        return plan(filled.engine, request, texts=10).need

    assert need(filled.old) == "rebind"
    assert need(filled.old, "halfvec") == "retype"
    assert need(Cut("cut", 16)) == "retype"
    assert need(filled.old, source=Source.of("title")) == "re-embedding"
    assert need(DeterministicEncoder("other", 16, salt="z")) == "re-embedding"


def test_without_the_encoder(filled, monkeypatch):
    monkeypatch.setattr(registry, "_loader", None)
    spec = dataclasses.replace(filled.new.spec, name="nowhere")
    found = plan(filled.engine, ree.Request(old=filled.old_column, new="x", encoder=spec))
    assert found.seconds is None
    assert any("cannot be loaded" in note for note in found.notes)


def test_who_holds_the_table_is_named(filled):
    with filled.engine.connect() as other:
        other.execute(sa.text("set application_name = 'report'"))
        other.execute(sa.text("select count(*) from articles"))
        found = plan(filled.engine, ree.request_of(filled.new_table.c.embedding_new))
        assert any("(report, idle in transaction" in note for note in found.notes)


def test_a_column_that_is_not_bound(world):
    with pytest.raises(errors.NotBoundError):
        plan(world.engine, ree.request_of(world.new_table.c.embedding_new))
