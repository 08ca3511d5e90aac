"""Changes that need no encoding: another type, fewer dimensions, an encoder of the same space."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, errors, registry
from sbert_pg import reembed as ree
from sbert_pg.reembed import digests, rebind
from sbert_pg.reembed.backfill import copy_vectors, need_of, scaling_of
from sbert_pg.source import Source
from sbert_pg.testing import DeterministicEncoder


class Cut(DeterministicEncoder):
    """The first dimensions of an encoder, scaled to length one or not."""

    def __init__(self, whole: DeterministicEncoder, dimensions: int, unit: bool) -> None:
        super().__init__(whole.spec.name, dimensions)
        self.whole, self.unit = whole, unit

    def _vector(self, text):
        vector = self.whole._vector(text)[: self.spec.dimensions]
        return vector / np.linalg.norm(vector) if self.unit else vector


class Rounded(DeterministicEncoder):
    """As int8 is to fp32: the same weights, nearly the same vectors."""

    def __init__(self, whole: DeterministicEncoder, noise: float = 0.02) -> None:
        super().__init__(whole.spec.name, whole.spec.dimensions)
        self.noise = noise
        self._spec = dataclasses.replace(whole.spec, precision="int8")
        self.whole = whole

    def _vector(self, text):
        exact = self.whole._vector(text)
        seed = zlib.crc32(text.encode())
        noise = np.random.default_rng(seed).standard_normal(len(exact)).astype(np.float32)
        vector = exact + self.noise * noise
        return vector / np.linalg.norm(vector)


def stored(world, column):
    with world.engine.connect() as connection:
        rows = connection.execute(sa.text(f"select {column}::text from articles order by id"))
        return np.array([[float(x) for x in row[0][1:-1].split(",")] for row in rows])


def request(world, encoder, storage="vector"):
    return ree.Request(
        old=world.old_column, new="embedding_new", encoder=encoder.spec, storage=storage
    )


def retype(engine, request, encoder, **options):
    """Begin a change, and compute what can be computed, as a backfill does."""
    with engine.connect() as connection:
        old = catalog.require_binding(connection, request.old)
        scaling = scaling_of(connection, old, encoder)
        connection.rollback()
    new = ree.begin(engine, request)
    return copy_vectors(engine, old, new, encoder, scaling, **options)


@pytest.fixture
def filled(world):
    world.create(500)
    world.fill("embedding")
    with world.engine.begin() as connection:
        binding = catalog.require_binding(connection, world.old_column)
        catalog.hold_encoder(connection, binding, world.old)
    world.old.encoded.clear()
    return world


def test_half_precision(filled):
    copied = retype(filled.engine, request(filled, filled.old, "halfvec"), filled.old, block=64)
    assert (copied, len(filled.pending("embedding_new"))) == (500, 0)
    assert filled.old.encoded == []
    assert np.abs(stored(filled, "embedding_new") - stored(filled, "embedding")).max() < 1e-3
    assert filled.scalar("select pg_typeof(embedding_new)::text from articles limit 1") == "halfvec"
    assert filled.pending("embedding_new") == []
    with filled.engine.connect() as connection:
        new = catalog.require_binding(connection, filled.new_column)
        old = catalog.require_binding(connection, filled.old_column)
        assert new.fingerprint == old.fingerprint
    ree.build_indexes(filled.engine, filled.new_column)
    report = ree.verify(filled.engine, filled.new_column, sample_size=30)
    assert report.passed, report
    assert report.overlap > 0.98
    assert ree.finish(filled.engine, filled.new_column) is True


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("storage", ["vector", "halfvec"])
def test_fewer_dimensions(filled, unit, storage):
    encoder = registry.use_encoder(Cut(filled.old, 20, unit))
    copied = retype(filled.engine, request(filled, encoder, storage), encoder)
    assert copied == 500
    expected = stored(filled, "embedding")[:, :20]
    if unit:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(stored(filled, "embedding_new") - expected).max() < 1e-3


def test_stale_rows_are_not_copied(filled):
    with filled.engine.begin() as connection:
        connection.execute(sa.text("update articles set body = 'changed' where id in (3, 5)"))
        connection.execute(sa.text("insert into articles (id, body) values (501, 'new')"))
    copied = retype(filled.engine, request(filled, filled.old, "halfvec"), filled.old)
    assert (copied, len(filled.pending("embedding_new"))) == (498, 3)
    for column in ("embedding", "embedding_new"):
        assert filled.pending(column) == [3, 5, 501]


def test_vectors_that_nothing_proves_are_not_copied(filled):
    """As a careless restore brings them: no trigger saw it, and the row says it itself."""
    with filled.engine.begin() as connection:
        connection.execute(sa.text("set local session_replication_role = replica"))
        connection.execute(
            sa.text(
                "update articles set embedding = (select embedding from articles where id = 9) "
                "where id in (3, 5)"
            )
        )
    copied = retype(filled.engine, request(filled, filled.old, "halfvec"), filled.old)
    assert (copied, len(filled.pending("embedding_new"))) == (498, 2)
    assert filled.pending("embedding_new") == [3, 5]


def test_rows_without_a_text_are_passed_over(world):
    """In a column that is NOT NULL they have the text '', in the new one none."""
    world.create(10)
    with world.engine.begin() as connection:
        catalog.unbind(connection, world.old_column)
        connection.execute(sa.text("alter table articles alter embedding set not null"))
        catalog.bind(connection, world.old_table.c.embedding)
    world.fill("embedding")
    with world.engine.begin() as connection:
        connection.execute(sa.text("update articles set title = null, body = null where id = 3"))
        world.write(connection, "embedding", world.old, {3: ""})
    assert world.pending("embedding") == []
    assert retype(world.engine, request(world, world.old, "halfvec"), world.old) == 9
    assert world.scalar("select embedding_new is null from articles where id = 3")


def test_a_text_that_changes_meanwhile_is_pending(filled):
    """Digest and vector are written for the text that the row has at that moment."""

    def change(copied: int) -> None:
        if copied == 100:
            with filled.engine.begin() as connection:
                connection.execute(
                    sa.text("update articles set body = 'changed' where id in (7, 400)")
                )

    copied = retype(
        filled.engine,
        request(filled, filled.old, "halfvec"),
        filled.old,
        block=100,
        progress=change,
    )
    assert (copied, len(filled.pending("embedding_new"))) == (499, 2)
    assert filled.pending("embedding_new") == [7, 400]


def test_a_change_by_the_old_version_meanwhile_is_copied(filled):
    """Fresh in the old column and pending in the new one: the copy makes it fresh in both."""
    ree.begin(filled.engine, request(filled, filled.old, "halfvec"))
    with filled.engine.begin() as connection:
        connection.execute(sa.text("update articles set body = 'x' where id = 9"))
        filled.write(connection, "embedding", filled.old, {9: "t8\n\nx"})
    assert filled.pending("embedding") == []
    assert retype(filled.engine, request(filled, filled.old, "halfvec"), filled.old) == 500
    assert filled.pending("embedding_new") == []


def test_locked_rows_do_not_hold_it_up(filled, monkeypatch):
    ree.begin(filled.engine, request(filled, filled.old, "halfvec"))
    with filled.engine.connect() as other:
        other.execute(sa.text("update articles set lang = 'fr' where id = 11"))
        monkeypatch.setattr(digests, "PASSES", 2)
        copied = retype(filled.engine, request(filled, filled.old, "halfvec"), filled.old)
        assert (copied, len(filled.pending("embedding_new"))) == (499, 1)
        other.rollback()
    copied = retype(filled.engine, request(filled, filled.old, "halfvec"), filled.old)
    assert (copied, len(filled.pending("embedding_new"))) == (1, 0)


def test_killed_half_way_it_goes_on(filled):
    class Killed(Exception):
        pass

    def kill(copied: int) -> None:
        if copied >= 200:
            raise Killed

    wanted = request(filled, filled.old, "halfvec")
    with pytest.raises(Killed):
        retype(filled.engine, wanted, filled.old, block=50, progress=kill)
    assert filled.scalar("select count(embedding_new) from articles") == 200
    assert retype(filled.engine, wanted, filled.old, block=50) == 300


def test_another_space_is_refused(filled):
    with pytest.raises(errors.EncoderMismatchError, match="This is a change of encoder"):
        retype(
            filled.engine,
            request(filled, DeterministicEncoder("old", 20, salt="x")),
            DeterministicEncoder("old", 20, salt="x"),
        )
    with pytest.raises(errors.EncoderMismatchError, match="48 dimensions"):
        retype(filled.engine, request(filled, filled.new), filled.new)
    other = dataclasses.replace(request(filled, filled.old), source=Source.of("title"))
    way = need_of(filled.engine, other)
    assert (way.need, way.scaling) == ("re-embedding", None)
    assert "the text changes" in way.reason
    assert filled.columns()[-1] == "embedding"


class TestRebind:
    def test_another_precision_is_accepted_and_written_down(self, filled):
        encoder = Rounded(filled.old)
        found = rebind(filled.engine, filled.old_column, encoder)
        assert found.rows.rows == 100
        assert found.rows.worst > 0.97
        row = filled.scalar("select agreement from sbert.compatible_encoder")
        assert row["stored"]["rows"] == 100
        assert row["stored"]["mean_cosine"] == pytest.approx(found.rows.mean)
        assert row["stored"]["min_cosine"] == pytest.approx(found.rows.worst)
        assert row["mean_cosine"] < 1
        assert "the same weights in another precision" in str(found)

    def test_the_same_encoder_needs_nothing(self, filled):
        found = rebind(filled.engine, filled.old_column, filled.old)
        assert found.rows.mean == pytest.approx(1, abs=1e-5)
        assert filled.scalar("select count(*) from sbert.compatible_encoder") == 0

    def test_another_space_is_refused(self, filled):
        other = DeterministicEncoder("old", 32, salt="x")
        with pytest.raises(errors.EncoderMismatchError, match="re-embed"):
            rebind(filled.engine, filled.old_column, other)
        assert filled.scalar("select count(*) from sbert.compatible_encoder") == 0

    def test_rows_of_another_space_are_noticed(self, filled):
        """As an encoder wrote them that is not what it says it is: the proofs are in order."""
        with filled.engine.begin() as connection:
            binding = catalog.require_binding(connection, filled.old_column)
            wrong = "(select embedding from articles where id = 1)"
            digest = binding.expressions.bare("digest").replace("embedding", wrong)
            connection.execute(sa.text("set local session_replication_role = replica"))
            connection.execute(
                sa.text(f"update articles set embedding = {wrong}, embedding_of = {digest}")
            )
        with pytest.raises(errors.EncoderMismatchError, match="the rows say otherwise"):
            rebind(filled.engine, filled.old_column, Rounded(filled.old))
        assert filled.scalar("select count(*) from sbert.compatible_encoder") == 0
