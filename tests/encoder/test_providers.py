"""Execution providers: which are asked for, what suits them, and CUDA's where there is a GPU."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from encoder_models import TEXTS, Make, Wish, worst
from tiny_model import write_tiny

from sbert_pg.encoder import Encoder
from sbert_pg.encoder.engines import CPU, CUDA, PROVIDERS_VARIABLE, Providers
from sbert_pg.encoder.runner import Runner
from sbert_pg.errors import ProviderError

OPENVINO = "OpenVINOExecutionProvider"
#: Half precision has 11 bits; what a few layers lose of them.
HALF = 0.99995


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROVIDERS_VARIABLE, raising=False)
    assert Providers.of(None).names == [CPU]
    monkeypatch.setenv(PROVIDERS_VARIABLE, f" {CUDA}, {CPU}")
    assert Providers.of(None).names == Providers.of([]).names == [CUDA, CPU]
    # What code says goes before what the environment says.
    assert Providers.of([OPENVINO]).names == [OPENVINO]


def test_fp32_is_not_tf32_unless_asked_for() -> None:
    [(_, options)] = Providers.of([(CUDA, {"device_id": 1})]).chosen
    assert options == {"use_tf32": "0", "device_id": 1}
    [(_, options)] = Providers.of([(CUDA, {"use_tf32": "1"})]).chosen
    assert options == {"use_tf32": "1"}


@pytest.mark.parametrize(
    ("given", "precision", "on_gpu"),
    [
        ([CPU], "int8", False),
        ([CUDA, CPU], "fp16", True),
        ([CPU, CUDA], "int8", False),
        ([OPENVINO], "fp32-plain", False),
    ],
)
def test_what_suits_them(given: list[str], precision: str, on_gpu: bool) -> None:
    providers = Providers.of(given)
    assert (providers.precision, providers.on_gpu) == (precision, on_gpu)


def test_int8_is_for_the_cpu(int8: Encoder) -> None:
    with pytest.raises(ProviderError, match="precision='fp16' or none"):
        Encoder.open(int8.directory, providers=[CUDA])
    assert Encoder.open(int8.directory, providers=[CPU, CUDA][:1]).encode("a").shape == (384,)


def test_the_environment_reaches_a_load_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that suits the provider is converted, and then the provider is missed."""
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("it is not missed here")
    monkeypatch.setenv(PROVIDERS_VARIABLE, CUDA)
    with pytest.raises(ProviderError, match=r"onnxruntime-gpu\[cuda,cudnn\]"):
        Encoder.load(write_tiny(tmp_path / "model"), cache_dir=tmp_path)
    assert [path.parent.name[:5] for path in tmp_path.glob("**/manifest.json")] == ["fp16-"]


@pytest.fixture(scope="session")
def half(minilm_path: Path, encoder_cache: Path) -> Encoder:
    """The real all-MiniLM-L6-v2 in fp16, on the CPU, which is slow but right."""
    return Encoder.load(minilm_path, precision="fp16", cache_dir=encoder_cache, providers=[CPU])


def test_fp16_is_fp32_rounded(half: Encoder, fp32: Encoder) -> None:
    cosine, _ = worst(half.encode(TEXTS), fp32.encode(TEXTS))
    assert cosine > HALF
    assert half.manifest.agreement["samples"].mean_cosine > 0.99999
    model = "model.onnx"
    size, whole = ((one.directory / model).stat().st_size for one in (half, fp32))
    assert size < 0.52 * whole


@pytest.mark.parametrize("architecture", ["distilbert", "mpnet", "xlm-roberta"])
def test_fp16_of_other_architectures(
    make_model: Make, encoder_cache: Path, architecture: str
) -> None:
    path = make_model(Wish(architecture))
    ours, exact = (
        Encoder.load(path, precision=precision, cache_dir=encoder_cache, providers=[CPU])
        for precision in ("fp16", "fp32")
    )
    cosine, _ = worst(ours.encode(TEXTS), exact.encode(TEXTS))
    assert cosine > HALF


class TestInTurn:
    """The way in which a GPU is called, on the CPU."""

    TOKENS = [[101, *range(2000, 2000 + n), 102] for n in (1, 5, 5, 40, 3, 90, 5, 200, 0, 17)]

    @pytest.fixture
    def runner(self, fp32: Encoder, monkeypatch: pytest.MonkeyPatch) -> Runner:
        monkeypatch.setattr(Providers, "on_gpu", property(lambda self: True))
        runner = Runner(
            fp32.directory / "model.onnx",
            fp32.manifest.inputs,
            threads=8,
            budget=64,
            providers=[CPU],
        )
        assert runner.threads == 1
        return runner

    def test_same_vectors(self, runner: Runner, fp32: Encoder) -> None:
        expected = Runner(fp32.directory / "model.onnx", fp32.manifest.inputs).run(self.TOKENS)
        np.testing.assert_allclose(runner.run(self.TOKENS), expected, atol=1e-5)

    def test_one_thread_calls_it(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = runner.run(self.TOKENS)
        seen: set[int] = set()
        session = runner._session

        class Watched:
            def run(self, *args: Any) -> Any:
                seen.add(threading.get_ident())
                return session.run(*args)

        monkeypatch.setattr(runner, "_session", Watched())
        wrong = []

        def work() -> None:
            if not np.allclose(runner.run(self.TOKENS), expected, atol=1e-6):
                wrong.append(1)

        callers = [threading.Thread(target=work) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not wrong
        assert len(seen) == 1

    def test_an_error_reaches_the_caller(self, runner: Runner) -> None:
        with pytest.raises(Exception, match=r"(?i)indices|bounds"):
            runner.run([[10**6], *self.TOKENS])
        assert runner.run(self.TOKENS).shape == (len(self.TOKENS), 384)


def _has_gpu() -> bool:
    if CUDA not in onnxruntime.get_available_providers():
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))


@pytest.mark.skipif(not _has_gpu(), reason="onnxruntime-gpu and a GPU are not here")
class TestCuda:
    """On a real GPU."""

    @pytest.fixture(params=["bert", "distilbert", "xlm-roberta", "mpnet"])
    def path(self, request: pytest.FixtureRequest, make_model: Make) -> Path:
        return make_model(Wish(request.param))

    @pytest.mark.parametrize(
        ("precision", "least"), [("fp16", HALF), ("fp32", 0.99999), ("fp32-plain", 0.99999)]
    )
    def test_agrees_with_the_cpu(
        self, path: Path, encoder_cache: Path, precision: str, least: float
    ) -> None:
        exact = Encoder.load(path, precision="fp32", cache_dir=encoder_cache, providers=[CPU])
        ours = Encoder.load(path, precision=precision, cache_dir=encoder_cache, providers=[CUDA])
        cosine, difference = worst(ours.encode(TEXTS), exact.encode(TEXTS))
        assert cosine > least
        if precision != "fp16":
            assert difference < 1e-5

    def test_the_default_is_fp16(self, minilm_path: Path, encoder_cache: Path) -> None:
        ours = Encoder.load(minilm_path, cache_dir=encoder_cache, providers=[CUDA])
        assert ours.manifest.precision == "fp16"
        found = ours.encode([f"{text} {i}" for i in range(300) for text in TEXTS[:20]])
        assert np.isfinite(found).all()
