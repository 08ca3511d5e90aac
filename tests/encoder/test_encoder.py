"""What ``Encoder`` promises about order, neighbours, memory, threads, odd texts and long ones."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import shutil
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sbert_pg import registry
from sbert_pg.encoder import Encoder, TokenCounter, converted_here
from sbert_pg.encoder import encoder as encoder_module
from sbert_pg.encoder.directory import BUILD, FORMAT
from sbert_pg.errors import (
    DeclarationError,
    EncoderNotFoundError,
    EncodingError,
    ProviderError,
)
from sbert_pg.probes import SAMPLE_TEXTS
from sbert_pg.spec import EncoderSpec, TextEncoder

#: How far a text's vector may move with its neighbours in fp32: nothing but rounding.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def encoder(fp32: Encoder) -> Encoder:
    # One of this module's own, for its counts.
    return Encoder.open(fp32.directory)


def numbered(count: int) -> list[str]:
    return [f"{SAMPLE_TEXTS[i % 30]} {i}" for i in range(count)]


def test_it_is_a_text_encoder(encoder: Encoder) -> None:
    assert isinstance(encoder, TextEncoder)
    assert encoder.spec.fingerprint is not None
    assert encoder.dimensions == 384
    assert encoder.max_seq_length == 256
    assert encoder.prompts == {"query": "", "document": ""}
    assert "fp32" in repr(encoder)


def test_results_stand_in_the_order_of_the_texts(encoder: Encoder) -> None:
    texts = list(SAMPLE_TEXTS)
    together = encoder.encode(texts)
    for position in (0, 7, len(texts) - 1):
        alone = encoder.encode([texts[position]])[0]
        np.testing.assert_allclose(together[position], alone, atol=ROUNDING)
    shuffled = np.random.default_rng(0).permutation(len(texts))
    again = encoder.encode([texts[i] for i in shuffled])
    np.testing.assert_allclose(again, together[shuffled], atol=ROUNDING)


def test_neighbours_in_int8(int8: Encoder) -> None:
    """A rounding of the last bit can move a value to the next of 256 steps; no more than that."""
    texts = [*SAMPLE_TEXTS, *numbered(60)]
    together = int8.encode(texts)
    alone = np.stack([int8.encode(text) for text in texts])
    cosine = (together * alone).sum(axis=1)
    assert cosine.min() > 0.998


def test_duplicates_are_encoded_once(encoder: Encoder) -> None:
    before = encoder.statistics
    vectors = encoder.encode(["one", "two", "one", "one"])
    after = encoder.statistics
    assert after.texts - before.texts == 4
    assert after.duplicates - before.duplicates == 2
    assert after.tokens - before.tokens == 6
    assert (vectors[0] == vectors[2]).all()
    assert not (vectors[0] == vectors[1]).all()


def test_odd_texts_have_vectors(encoder: Encoder) -> None:
    texts = ["", "   ", "\n\t", "a\x00b", "a\ud800b", "x" * 1_000_000, "word " * 200_000]
    vectors = encoder.encode(texts)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=ROUNDING)
    np.testing.assert_allclose(vectors[4], encoder.encode("a\ufffdb"), atol=ROUNDING)
    assert encoder.encode([]).shape == (0, 384)


@pytest.mark.parametrize("bad", [None, b"bytes", 1.5, ["nested"]])
def test_what_is_no_text_is_refused(encoder: Encoder, bad: object) -> None:
    with pytest.raises(EncodingError) as caught:
        encoder.encode(["good", bad])  # type: ignore[list-item]
    assert caught.value.index == 1
    with pytest.raises(EncodingError) as caught:
        list(encoder.encode_stream(iter(["good"] * 5 + [bad]), chunk_size=2))  # type: ignore[list-item]
    assert caught.value.index == 5


def test_unknown_prompts_are_refused(encoder: Encoder) -> None:
    with pytest.raises(EncodingError, match="nonsense"):
        encoder.encode(["a"], prompt_name="nonsense")
    np.testing.assert_allclose(
        encoder.encode(["a"], prompt="b: "), encoder.encode(["b: a"]), atol=ROUNDING
    )


def test_long_texts_are_counted_and_reported(
    encoder: Encoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder._pipeline.get().counter, "_warned_at", None)
    monkeypatch.setattr(encoder._pipeline.get().counter, "_unreported", 0)
    before = encoder.statistics.truncated
    with caplog.at_level(logging.WARNING, "sbert_pg.encoder"):
        encoder.encode(["word " * 300, "short", "word " * 400])
        encoder.encode(["word " * 500])
    assert encoder.statistics.truncated - before == 3
    (record,) = caplog.records
    assert "2 texts" in record.getMessage()
    assert "256" in record.getMessage()
    monkeypatch.setattr("sbert_pg.encoder.pipeline.WARN_EVERY", 0.0)
    with caplog.at_level(logging.WARNING, "sbert_pg.encoder"):
        encoder.encode(["fits"])
    assert "1 text" in caplog.records[-1].getMessage()
    assert encoder.count_tokens(["word " * 500, ""]) == [502, 2]


def test_a_stream_keeps_the_order_and_reads_no_further_than_it_must(encoder: Encoder) -> None:
    read = itertools.count()
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for taken in read:
            yield f"text number {taken}"

    stream = encoder.encode_stream(texts(), chunk_size=8)
    vectors = [next(stream) for _ in range(20)]
    assert taken < 8 * 6
    stream.close()
    expected = encoder.encode([f"text number {i}" for i in range(20)])
    np.testing.assert_allclose(np.stack(vectors), expected, atol=ROUNDING)
    assert list(encoder.encode_stream([])) == []


def test_a_stream_needs_memory_for_some_chunks_only(encoder: Encoder) -> None:
    def consume(count: int) -> int:
        tracemalloc.start()
        for _ in encoder.encode_stream((f"t{i}" for i in range(count)), chunk_size=64):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    consume(64)
    assert consume(1600) < 1.5 * consume(320) + 200_000


def test_progress_reaches_the_end(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "CHUNK", 16)
    seen: list[tuple[int, int | None]] = []
    texts = [*numbered(40), *numbered(10)]
    vectors = encoder.encode(texts, progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [50, 50, 50]
    assert [done for done, _ in seen] == [16, 32, 50]
    np.testing.assert_allclose(vectors[:10], vectors[40:], atol=0)
    seen.clear()
    list(
        encoder.encode_stream(
            numbered(20), chunk_size=8, progress=lambda done, total: seen.append((done, total))
        )
    )
    assert seen == [(8, None), (16, None), (20, None)]


def test_threads_share_one_encoder(encoder: Encoder) -> None:
    texts = [numbered(24)[i::4] for i in range(4)]
    expected = [encoder.encode(part) for part in texts]
    results: dict[int, np.ndarray] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                results[number] = encoder.encode(texts[number % 4])
                np.testing.assert_allclose(results[number], expected[number % 4], atol=ROUNDING)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 8


def test_an_event_loop_goes_on_meanwhile(encoder: Encoder) -> None:
    async def main() -> tuple[int, np.ndarray]:
        beats = 0
        done = asyncio.Event()

        async def heart() -> None:
            nonlocal beats
            while not done.is_set():
                beats += 1
                await asyncio.sleep(0.002)

        beating = asyncio.create_task(heart())
        vectors = await encoder.encode_async(numbered(200))
        await encoder.encode_query_async(["q"])
        await encoder.encode_document_async(["d"])
        done.set()
        await beating
        return beats, vectors

    beats, vectors = asyncio.run(main())
    assert beats > 5
    np.testing.assert_allclose(vectors[:3], encoder.encode(numbered(3)), atol=ROUNDING)


def _encode_in_child(encoder: Encoder, queue: multiprocessing.Queue[object]) -> None:
    queue.put((os.getpid(), encoder.encode(numbered(40))))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_encodes_too(encoder: Encoder) -> None:
    expected = encoder.encode(numbered(40))
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[int, np.ndarray]] = context.Queue()
    child = context.Process(target=_encode_in_child, args=(encoder, queue))
    child.start()
    pid, vectors = queue.get(timeout=180)
    child.join()
    assert child.exitcode == 0
    assert pid != os.getpid()
    np.testing.assert_allclose(vectors, expected, atol=ROUNDING)
    np.testing.assert_allclose(encoder.encode(numbered(40)), expected, atol=ROUNDING)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(encoder: Encoder, threads: int) -> None:
    other = Encoder.open(encoder.directory, threads=threads)
    texts = numbered(60)
    np.testing.assert_allclose(other.encode(texts), encoder.encode(texts), atol=ROUNDING)


def test_one_thread_is_one_thread(encoder: Encoder) -> None:
    one = Encoder.open(encoder.directory, threads=1)
    texts = numbered(300)
    one.encode(texts[:20])
    wall, cpu = time.perf_counter(), time.process_time()
    one.encode(texts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # The tokenizer's own threads come on top, for a few percent.
    assert cpu < 1.4 * wall


def test_providers_are_checked(encoder: Encoder) -> None:
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        Encoder.open(encoder.directory, providers=["CUDAExecutionProvider"])
    chosen = Encoder.open(encoder.directory, providers=["CPUExecutionProvider"])
    assert chosen.encode("a").shape == (384,)


@pytest.mark.parametrize("dimensions", [0, 385, -1])
def test_dimensions_are_checked(encoder: Encoder, dimensions: int) -> None:
    with pytest.raises(DeclarationError, match="384"):
        Encoder.open(encoder.directory, dimensions=dimensions)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderNotFoundError, match="nowhere"):
        Encoder.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderNotFoundError, match=r"modules\.json"):
        Encoder.load(tmp_path / "empty", cache_dir=tmp_path)


def test_columns_find_it_by_name(encoder: Encoder) -> None:
    spec = EncoderSpec.of(str(encoder.directory), dimensions=384)
    found = registry.get_encoder(spec)
    assert isinstance(found, Encoder)
    assert found.spec.fingerprint == encoder.spec.fingerprint
    assert registry.get_encoder(spec) is found


def test_a_declaration_of_fewer_dimensions_is_refused_where_truncation_was_not_asked_for(
    encoder: Encoder,
) -> None:
    name = str(encoder.directory)
    with pytest.raises(DeclarationError, match=r"128.*384.*use_encoder"):
        registry.get_encoder(EncoderSpec.of(name, dimensions=128))
    with pytest.raises(DeclarationError, match="384"):
        registry.get_encoder(EncoderSpec.of(name, dimensions=400))
    cut = Encoder.load(encoder.directory, dimensions=128)
    # By the spec of a truncated encoder, which says what is meant.
    assert registry.get_encoder(replace(cut.spec, name=name)).dimensions == 128
    registry.forget_encoders()
    registry.use_encoder(cut, name=name)
    assert registry.get_encoder(EncoderSpec.of(name, dimensions=128)) is cut


def test_probes_are_computed_anew_past_the_counts(encoder: Encoder) -> None:
    """One of them is longer than the limit on purpose, which is nobody's text to be warned of."""
    before = encoder.statistics
    np.testing.assert_allclose(encoder.recomputed_probes(), encoder.probe_vectors, atol=ROUNDING)
    assert encoder.statistics == before


def test_tokens_are_counted_without_a_session(fp32: Encoder) -> None:
    """As the encoder counts them, from its converted directory alone."""
    counter = TokenCounter(fp32.directory)
    assert counter.count_tokens(SAMPLE_TEXTS) == fp32.count_tokens(SAMPLE_TEXTS)
    assert counter.spec == fp32.manifest.spec


def test_what_is_converted_here_is_known(
    minilm_path: Path, encoder_cache: Path, fp32: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBERT_PG_CACHE", str(encoder_cache))
    assert converted_here(str(minilm_path)) == fp32.directory
    assert converted_here(str(fp32.directory)) == fp32.directory
    assert converted_here("nobody/never-converted") is None
    assert converted_here("/no/such/directory") is None


@pytest.mark.parametrize("damage", ["manifest.json", "tokenizer.json", "no tokenizer", "name"])
def test_damaged_conversions_count_no_tokens(
    fp32: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A status goes on without the figure."""
    place = tmp_path / "nobody--damaged" / "default" / f"int8-{FORMAT}.{BUILD}"
    shutil.copytree(fp32.directory, place)
    monkeypatch.setenv("SBERT_PG_CACHE", str(tmp_path))
    assert registry.token_counter("nobody/damaged") is not None
    if damage == "no tokenizer":
        (place / "tokenizer.json").unlink()
    elif damage != "name":
        (place / damage).write_bytes(b"\xff{")
    name = "~nobody-of-this-name/damaged" if damage == "name" else "nobody/damaged"
    assert registry.token_counter(name) is None
