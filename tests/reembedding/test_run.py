"""A whole change in one call: resumed wherever it stopped, and nothing dropped without a pass."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from sbert_pg import errors, registry
from sbert_pg import reembedding as ree
from sbert_pg.pending.backfill import BackfillSettings
from sbert_pg.source import Source
from sbert_pg.testing import DeterministicEncoder

from .test_steps import QUIET, request, snapshot

FINISH = ree.Settings(finish=True, quiet=QUIET)


def test_all_at_once(world):
    world.create(200)
    told = []
    done = ree.run(world.engine, request(world), tell=told.append)
    assert (done.way, done.rows, done.finished) == ("encoded", 200, False)
    assert done.verification.passed
    assert "embedding" in world.columns()
    steps = list(dict.fromkeys(each.step for each in told))
    assert steps == ["expand", "backfill", "index", "verify"]
    again = ree.run(world.engine, request(world), FINISH)
    assert (again.rows, again.finished) == (0, True)
    assert "embedding" not in world.columns()
    over = ree.run(world.engine, request(world), FINISH)
    assert (over.rows, over.finished) == (0, True)


@pytest.mark.parametrize("step", ["expand", "backfill", "index", "verify"])
def test_stopped_in_each_step(world, step):
    world.create(200)
    stop = threading.Event()

    def tell(told: ree.Told) -> None:
        if told.step == step:
            stop.set()

    slow = ree.Settings(backfill=BackfillSettings(batch_size=16), finish=True, quiet=QUIET)
    with pytest.raises(errors.StepStoppedError, match="again"):
        ree.run(world.engine, request(world), slow, tell=tell, stop=stop)
    assert "embedding" in world.columns()
    done = ree.run(world.engine, request(world), FINISH)
    assert done.verification.passed
    assert done.finished


def test_what_changed_meanwhile_is_drained(world):
    """Between the backfill and the index somebody writes, and no worker runs."""
    world.create(50)
    drained = []

    def drain(binding):
        if not drained:
            with world.engine.begin() as connection:
                connection.execute(sa.text("update articles set body = 'new' where id < 9"))
        drained.append(world.fill(binding.column))

    ree.run(world.engine, request(world), drain=drain)
    assert drained == [8, 0]


def test_a_miss_drops_nothing(world):
    world.create(60)
    settings = ree.Settings(finish=True, quiet=QUIET, thresholds=ree.Thresholds(overlap=1.0))
    with pytest.raises(errors.VerificationError, match="overlap@10"):
        ree.run(world.engine, request(world), settings)
    assert "embedding" in world.columns()
    only_told = ree.Settings(thresholds=ree.Thresholds(overlap=1.0))
    assert not ree.run(world.engine, request(world), only_told).verification.passed


def test_an_encoder_that_is_not_there_touches_nothing(world):
    world.create(5)
    before = snapshot(world)
    registry.set_loader(None)
    registry.forget_encoders()
    with pytest.raises(errors.EncoderNotFoundError):
        ree.run(world.engine, request(world))
    assert snapshot(world) == before


def test_vectors_that_can_be_computed_are(world):
    world.create(100)
    world.fill("embedding")
    before = len(world.old.encoded)
    asked = ree.Request(old=world.old_column, new="half", encoder=world.old.spec, storage="halfvec")
    done = ree.run(world.engine, asked)
    assert (done.way, done.rows) == ("computed", 100)
    # Only what the verification encodes again.
    assert len(world.old.encoded) - before <= 64


def test_the_same_space_needs_nothing(world):
    world.create(20)
    world.fill("embedding")
    asked = ree.Request(old=world.old_column, new="other", encoder=world.old.spec)
    with pytest.raises(errors.ReembeddingError, match="needs no new vectors"):
        ree.run(world.engine, asked)
    assert "other" not in world.columns()
    assert ree.run(world.engine, asked, ree.Settings(encode=True)).rows == 20


def test_another_source_is_another_space(world):
    world.create(20)
    world.fill("embedding")
    asked = ree.Request(
        old=world.old_column, new="titles", encoder=world.old.spec, source=Source.of("title")
    )
    done = ree.run(world.engine, asked)
    assert (done.way, done.rows) == ("encoded", 20)


def test_truncated_dimensions(world):
    class Cut(DeterministicEncoder):
        def _vector(self, text):
            return world.old._vector(text)[: self.spec.dimensions]

    world.create(100)
    world.fill("embedding")
    cut = Cut("cut", 16)
    registry.use_encoder(cut)
    done = ree.run(world.engine, ree.Request(old=world.old_column, new="cut", encoder=cut.spec))
    assert done.way == "computed"
    assert done.verification.agreement.worst > 0.999
