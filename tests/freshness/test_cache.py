"""The cache of vectors: answers for texts that were encoded before."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg.catalog import tables
from sbert_pg.errors import DeclarationError, EncodingError
from sbert_pg.freshness.encoding import CachedEncoder
from sbert_pg.spec import TextEncoder
from sbert_pg.testing import DeterministicEncoder

TEXTS = ["", "a", "naïve", "a" * 5000, "日本"]


def cached(encoder: DeterministicEncoder, engine: sa.Engine, max_rows: int = 1000) -> CachedEncoder:
    return CachedEncoder(encoder, engine, max_rows=max_rows)


def size(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        count = sa.select(sa.func.count()).select_from(tables.vector_cache)
        return connection.execute(count).scalar_one()


def test_it_gives_the_same_and_encodes_once(engine: sa.Engine) -> None:
    plain = DeterministicEncoder(dimensions=8)
    expected = plain.encode_document([*TEXTS, "a"])
    encoder = DeterministicEncoder(dimensions=8)
    first = cached(encoder, engine)
    assert isinstance(first, TextEncoder)
    assert first.spec == plain.spec
    np.testing.assert_array_equal(first.probe_vectors, plain.probe_vectors)
    encoder.encoded.clear()
    np.testing.assert_array_equal(first.encode_document([*TEXTS, "a"]), expected)
    assert encoder.encoded == TEXTS
    second = cached(encoder, engine)
    np.testing.assert_array_equal(second.encode_document([*TEXTS, "a"]), expected)
    assert encoder.encoded == TEXTS
    assert first.encode_document([]).shape == (0, 8)
    np.testing.assert_array_equal(first.encode_query(["a"]), plain.encode_query(["a"]))


def test_no_encoder_is_given_anothers_vectors(engine: sa.Engine) -> None:
    other = DeterministicEncoder(dimensions=8, salt="another")
    expected = other.encode_document(TEXTS)
    cached(DeterministicEncoder(dimensions=8), engine).encode_document(TEXTS)
    np.testing.assert_array_equal(cached(other, engine).encode_document(TEXTS), expected)
    wider = DeterministicEncoder(dimensions=16)
    assert cached(wider, engine).encode_document(TEXTS).shape == (5, 16)


def test_what_is_not_finite_is_not_kept(engine: sa.Engine) -> None:
    class Odd(DeterministicEncoder):
        def encode_document(self, texts):
            vectors = super().encode_document(texts)
            vectors[[text == "odd" for text in texts]] = np.nan
            return vectors

    encoder = cached(Odd(dimensions=8), engine)
    encoder.encode_document(["odd", "even"])
    assert size(engine) == 1


def test_the_least_recently_used_go_first(engine: sa.Engine) -> None:
    encoder = DeterministicEncoder(dimensions=8)
    many = [f"text {i}" for i in range(1_500)]
    with engine.begin() as connection:
        cached(encoder, engine).encode_document(["old", "used"])
        hours = sa.func.make_interval(0, 0, 0, 0, 5)
        connection.execute(sa.update(tables.vector_cache).values(used_at=sa.func.now() - hours))
    cached(encoder, engine).encode_document(["used"])
    cached(encoder, engine, 1_501).encode_document(many)
    assert size(engine) == 1_501
    encoder.encoded.clear()
    cached(encoder, engine).encode_document(["used", "old"])
    assert encoder.encoded == ["old"]


def test_a_size_that_keeps_nothing_is_refused(engine: sa.Engine) -> None:
    with pytest.raises(DeclarationError, match="keeps nothing"):
        cached(DeterministicEncoder(dimensions=8), engine, 0)


def test_a_refused_text_is_named_by_its_place_in_the_call(engine: sa.Engine) -> None:
    encoder = cached(DeterministicEncoder(dimensions=8, refuse="bad"), engine)
    encoder.encode_document(["one", "two"])
    with pytest.raises(EncodingError) as caught:
        encoder.encode_document(["one", "two", "two", "three", "bad"])
    assert caught.value.index == 4


def test_it_stays_within_its_bound(engine: sa.Engine) -> None:
    encoder = cached(DeterministicEncoder(dimensions=4), engine, 500)
    for start in range(0, 4000, 250):
        encoder.encode_document([f"text {i}" for i in range(start, start + 250)])
    assert size(engine) <= 500 + 1000, "it is trimmed from time to time"


def test_many_at_once(engine: sa.Engine) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            encoder = cached(DeterministicEncoder(dimensions=4), engine, 300)
            random = np.random.default_rng(seed)
            for _ in range(20):
                texts = [f"text {i}" for i in random.integers(0, 500, 60)]
                plain = DeterministicEncoder(dimensions=4).encode_document(texts)
                np.testing.assert_array_equal(encoder.encode_document(texts), plain)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
