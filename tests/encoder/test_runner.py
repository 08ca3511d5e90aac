"""Batches and the loop that runs them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbert_pg.encoder import Encoder
from sbert_pg.encoder.engines import lacks_vnni
from sbert_pg.encoder.runner import Runner, plan
from sbert_pg.errors import DamagedEncoderError, EncoderError, ProviderError
from sbert_pg.process import usable_cores

TOKENS = [[101, *range(2000, 2000 + n), 102] for n in (1, 5, 5, 40, 3, 90, 5, 200, 0, 17)]


@given(st.lists(st.integers(1, 600), max_size=200), st.integers(16, 1024))
def test_every_text_is_in_one_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= max(
            budget, max(lengths[i] for i in batch)
        )


def test_equal_lengths_go_together() -> None:
    lengths = [100, 60] * 10
    assert all(len({lengths[i] for i in batch}) == 1 for batch in plan(lengths, 512))


@pytest.fixture
def directory(int8: Encoder) -> Path:
    return int8.directory


def runner(directory: Path, inputs: tuple[str, ...] = ("input_ids", "attention_mask"), **options):
    return Runner(directory / "model.onnx", inputs, **options)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 64, 512, 10_000])
def test_neighbours_threads_and_batches_change_rounding_only(
    directory: Path, threads: int, budget: int
) -> None:
    alone = runner(directory, threads=1)
    expected = np.concatenate([alone.run([ids]) for ids in TOKENS])
    found = runner(directory, threads=threads, budget=budget).run(TOKENS)
    # A value on a border between two steps of int8 may fall on either side.
    assert (found * expected).sum(1).min() > 0.9995


def test_many_threads_share_a_runner(directory: Path) -> None:
    engine = runner(directory, threads=2)
    expected = engine.run(TOKENS)
    wrong = []

    def work() -> None:
        for _ in range(3):
            if not np.allclose(engine.run(TOKENS), expected, atol=1e-6):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_an_error_in_a_batch_reaches_the_caller(directory: Path) -> None:
    engine = runner(directory, threads=2, budget=64)
    with pytest.raises(Exception, match=r"(?i)indices|bounds"):
        engine.run([*TOKENS, [10**6]])
    assert engine.run(TOKENS).shape == (len(TOKENS), 384)


def test_a_provider_that_does_not_start_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the package is installed and the driver is not."""
    import onnxruntime

    available = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        runner(directory, providers=["CUDAExecutionProvider"])


def test_what_cannot_be_opened_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="NoSuchProvider"):
        runner(directory, providers=["NoSuchProvider"])
    with pytest.raises(DamagedEncoderError, match="pooling_mask"):
        runner(directory, inputs=("input_ids", "pooling_mask"))
    with pytest.raises(DamagedEncoderError, match="known are"):
        runner(directory, inputs=("words",))
    with pytest.raises(EncoderError, match="0 threads"):
        runner(directory, threads=0)
    (tmp_path / "model.onnx").write_bytes(b"half a mod")
    with pytest.raises(DamagedEncoderError, match=r"model\.onnx"):
        runner(tmp_path)


def test_no_text_gives_no_row(directory: Path) -> None:
    assert runner(directory).run([]).shape == (0, 384)


@pytest.mark.parametrize(
    ("content", "cores"), [("max 100000", None), ("50000 100000", 1), ("100000 100000", 1)]
)
def test_a_containers_limit_counts(tmp_path: Path, content: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert usable_cores(tmp_path) == (cores or usable_cores(tmp_path / "none"))


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni"])
def test_vnni_is_read_from_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t\t: sse avx2 {flag}\n")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert not lacks_vnni(cpuinfo)
    cpuinfo.write_text("flags\t\t: sse avx2\n")
    assert lacks_vnni(cpuinfo)
    assert lacks_vnni(tmp_path / "none")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not lacks_vnni(cpuinfo)
