"""Filling in one call: resumed wherever it stopped, by the cheapest way that gives the vectors."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from sbert_pg import errors, registry
from sbert_pg import reembed as ree
from sbert_pg.freshness import WorkerSettings
from sbert_pg.source import Source
from sbert_pg.testing import DeterministicEncoder

from .test_steps import QUIET, request


def begun(world, asked=None):
    """A change that has begun; its new column."""
    return ree.begin(world.engine, asked or request(world)).identity


def test_backfill_fills_and_builds_the_index(world):
    world.create(200)
    steps = []
    column = begun(world)
    done = ree.backfill(world.engine, column, on_progress=lambda *seen: steps.append(seen[0]))
    assert (done.encoded.rows, done.computed, done.encoded.complete) == (200, 0, True)
    assert done.indexes == ("ix_articles_embedding_new",)
    assert list(dict.fromkeys(steps)) == ["backfill", "index"]
    assert ree.status(world.engine, world.new_column).state == "ready"
    with pytest.raises(errors.ReembeddingError, match="replaces no column"):
        ree.abort(world.engine, world.old_column)
    ree.verify(world.engine, column).require()
    assert "embedding" in world.columns()
    again = ree.backfill(world.engine, world.old_column)
    assert again.encoded.rows == 0
    assert ree.finish(world.engine, column, quiet=QUIET) is True
    assert "embedding" not in world.columns()
    assert ree.finish(world.engine, column, quiet=QUIET) is False
    with pytest.raises(errors.ReembeddingError, match="no change to continue"):
        ree.backfill(world.engine, column)


@pytest.mark.parametrize("step", ["backfill", "index"])
def test_stopped_in_each_step(world, step):
    world.create(200)
    column = begun(world)
    stop = threading.Event()

    def show(now: str, done: int, total: int | None) -> None:
        if now == step:
            stop.set()

    slow = WorkerSettings(batch_size=16)
    with pytest.raises(errors.StepStoppedError, match="again"):
        ree.backfill(world.engine, column, slow, on_progress=show, stop=stop)
    assert "embedding" in world.columns()
    assert ree.backfill(world.engine, column).encoded.complete
    ree.verify(world.engine, column).require()
    assert ree.finish(world.engine, column, quiet=QUIET) is True


def test_what_changed_meanwhile_is_encoded(world):
    """While the index is built somebody writes, and no worker runs."""
    world.create(50)
    column = begun(world)

    def show(step: str, done: int, total: int | None) -> None:
        if step == "index" and not changed:
            changed.append(True)
            with world.engine.begin() as connection:
                connection.execute(sa.text("update articles set body = 'new' where id < 9"))

    changed: list[bool] = []
    done = ree.backfill(world.engine, column, on_progress=show)
    assert done.encoded.rows == 58
    assert world.pending("embedding_new") == []
    assert ree.verify(world.engine, column).passed


def test_a_miss_is_raised_before_anything_is_dropped(world):
    world.create(60)
    column = begun(world)
    ree.backfill(world.engine, column)
    report = ree.verify(world.engine, column, thresholds=ree.Thresholds(overlap=1.0))
    assert not report.passed
    with pytest.raises(errors.VerificationError, match="overlap@10"):
        report.require()
    assert "embedding" in world.columns()


def test_an_encoder_that_is_not_there_writes_nothing(world, monkeypatch):
    world.create(5)
    column = begun(world)
    monkeypatch.setattr(registry, "_loader", None)
    registry.forget_encoders()
    with pytest.raises(errors.EncoderNotFoundError):
        ree.backfill(world.engine, column)
    assert world.pending("embedding_new") == [1, 2, 3, 4, 5]
    assert world.scalar("select count(embedding_new) from articles") == 0


def test_vectors_that_can_be_computed_are(world):
    world.create(100)
    world.fill("embedding")
    asked = ree.Request(old=world.old_column, new="half", encoder=world.old.spec, storage="halfvec")
    column = begun(world, asked)
    before = len(world.old.encoded)
    done = ree.backfill(world.engine, column)
    assert (done.computed, done.encoded.rows) == (100, 0)
    assert len(world.old.encoded) == before
    assert ree.verify(world.engine, column).passed


def test_all_can_be_encoded_where_it_could_be_computed(world):
    world.create(20)
    world.fill("embedding")
    asked = ree.Request(old=world.old_column, new="other", encoder=world.old.spec)
    done = ree.backfill(world.engine, begun(world, asked), encode=True)
    assert (done.computed, done.encoded.rows) == (0, 20)


def test_another_source_is_another_space(world):
    world.create(20)
    world.fill("embedding")
    asked = ree.Request(
        old=world.old_column, new="titles", encoder=world.old.spec, source=Source.of("title")
    )
    done = ree.backfill(world.engine, begun(world, asked))
    assert (done.computed, done.encoded.rows) == (0, 20)


def test_truncated_dimensions(world):
    class Cut(DeterministicEncoder):
        def _vector(self, text):
            return world.old._vector(text)[: self.spec.dimensions]

    world.create(100)
    world.fill("embedding")
    cut = Cut("cut", 16)
    registry.use_encoder(cut)
    column = begun(world, ree.Request(old=world.old_column, new="cut", encoder=cut.spec))
    assert ree.backfill(world.engine, column).computed == 100
    assert ree.verify(world.engine, column).agreement.worst > 0.999


def test_vectors_of_another_length_are_encoded(world):
    """As near as the old ones by angle, and yet not to be computed from them."""

    class Longer(DeterministicEncoder):
        def _vector(self, text):
            return 3 * world.old._vector(text)[:16]

    world.create(20)
    world.fill("embedding")
    longer = registry.use_encoder(Longer("longer", 16))
    asked = ree.Request(old=world.old_column, new="longer", encoder=longer.spec)
    done = ree.backfill(world.engine, begun(world, asked))
    assert (done.computed, done.encoded.rows) == (0, 20)
