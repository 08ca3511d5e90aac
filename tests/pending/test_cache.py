from __future__ import annotations

import threading

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg.catalog import tables
from sbert_pg.errors import DeclarationError, EncodingError
from sbert_pg.pending.cache import CachedEncoder, VectorCache, digest_of
from sbert_pg.spec import TextEncoder
from sbert_pg.testing import DeterministicEncoder

TEXTS = ["", "a", "naïve", "a" * 5000, "日本"]


def test_what_goes_in_comes_out(engine: sa.Engine) -> None:
    encoder = DeterministicEncoder(dimensions=8)
    vectors = encoder.encode_document(TEXTS)
    cache = VectorCache("f", 8)
    with engine.begin() as connection:
        assert cache.get(connection, TEXTS) == {}
        assert cache.get(connection, []) == {}
        cache.put(connection, TEXTS, vectors)
        cache.put(connection, TEXTS, vectors * 2)
        found = cache.get(connection, [*TEXTS, "not there"])
        assert list(found) != []
        for text, vector in zip(TEXTS, vectors, strict=True):
            np.testing.assert_array_equal(found[text], vector)
        assert cache.get(connection, TEXTS, "query") == {}
        assert VectorCache("another encoder", 8).get(connection, TEXTS) == {}
        assert VectorCache("f", 4).get(connection, TEXTS) == {}


def test_what_is_not_finite_is_not_kept(engine: sa.Engine) -> None:
    cache = VectorCache("f", 2)
    with engine.begin() as connection:
        cache.put(connection, ["a", "b"], np.array([[1, np.nan], [1, 2]], np.float32))
        assert list(cache.get(connection, ["a", "b"])) == ["b"]


def test_the_least_recently_used_go_first(engine: sa.Engine) -> None:
    cache = VectorCache("f", 2, max_rows=3)
    c = tables.vector_cache.c
    with engine.begin() as connection:
        for age, text in enumerate("abcde"):
            cache.put(connection, [text], np.ones((1, 2), np.float32))
            connection.execute(
                sa.update(tables.vector_cache)
                .where(c.digest == digest_of(text))
                .values(used_at=sa.func.now() - sa.text(f"interval '{10 - age} hours'"))
            )
    with engine.begin() as connection:
        cache.get(connection, ["a"])
        assert cache.trim(connection) == 2
        assert sorted(cache.get(connection, list("abcde"))) == ["a", "d", "e"]
        assert cache.trim(connection) == 0


def test_a_size_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(DeclarationError, match="keeps nothing"):
        VectorCache("f", 2, max_rows=0)


def test_an_encoder_with_a_cache_gives_the_same_and_encodes_once(engine: sa.Engine) -> None:
    plain = DeterministicEncoder(dimensions=8)
    expected = plain.encode_document([*TEXTS, "a"])
    encoder = DeterministicEncoder(dimensions=8)
    cached = CachedEncoder(encoder, engine)
    assert isinstance(cached, TextEncoder)
    assert cached.spec == plain.spec
    np.testing.assert_array_equal(cached.probe_vectors, plain.probe_vectors)
    np.testing.assert_array_equal(cached.encode_document([*TEXTS, "a"]), expected)
    assert encoder.encoded == TEXTS
    other = CachedEncoder(encoder, engine)
    np.testing.assert_array_equal(other.encode_document([*TEXTS, "a"]), expected)
    assert encoder.encoded == TEXTS
    assert (cached.hits, cached.misses, other.hits, other.misses) == (1, 5, 6, 0)
    assert cached.encode_document([]).shape == (0, 8)
    np.testing.assert_array_equal(cached.encode_query(["a"]), plain.encode_query(["a"]))


def test_short_texts_may_be_left_out(engine: sa.Engine) -> None:
    encoder = DeterministicEncoder(dimensions=8)
    cached = CachedEncoder(encoder, engine, min_characters=3)
    cached.encode_document(["a", "naïve"])
    cached.encode_document(["a", "naïve"])
    assert encoder.encoded == ["a", "naïve", "a"]


def test_a_refused_text_is_named_by_its_place_in_the_call(engine: sa.Engine) -> None:
    encoder = DeterministicEncoder(dimensions=8, refuse="bad")
    cached = CachedEncoder(encoder, engine)
    cached.encode_document(["one", "two"])
    with pytest.raises(EncodingError) as caught:
        cached.encode_document(["one", "two", "two", "three", "bad"])
    assert caught.value.index == 4


def test_it_stays_within_its_bound(engine: sa.Engine) -> None:
    cached = CachedEncoder(DeterministicEncoder(dimensions=4), engine, max_rows=500)
    for start in range(0, 4000, 250):
        cached.encode_document([f"text {i}" for i in range(start, start + 250)])
    with engine.connect() as connection:
        count = connection.scalar(sa.select(sa.func.count()).select_from(tables.vector_cache))
    assert count == 500


def test_many_at_once(engine: sa.Engine) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            cached = CachedEncoder(DeterministicEncoder(dimensions=4), engine, max_rows=300)
            random = np.random.default_rng(seed)
            for _ in range(20):
                texts = [f"text {i}" for i in random.integers(0, 500, 60)]
                plain = DeterministicEncoder(dimensions=4).encode_document(texts)
                np.testing.assert_array_equal(cached.encode_document(texts), plain)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
