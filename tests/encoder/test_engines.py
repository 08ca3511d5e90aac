"""Engines: which one runs what, how the fastest is chosen and kept, and OpenVINO's vectors."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import sbert_pg
from encoder_models import SMALL, TEXTS, Wish, worst, write_cross_encoder
from tiny_model import write_tiny

from sbert_pg import EncoderSpec
from sbert_pg.cli.encoder import split_name
from sbert_pg.encoder import Encoder, Reranker, pipeline
from sbert_pg.encoder.engines import (
    CPU,
    CUDA,
    ENGINE_VARIABLE,
    ONNXRUNTIME,
    OPENVINO,
    Compiled,
    Providers,
    able,
    installed,
    processor,
    versions,
)
from sbert_pg.errors import DeclarationError, MissingExtraError, ProviderError
from sbert_pg.probes import agreement_of, compatible

needs_openvino = pytest.mark.skipif(
    not installed(OPENVINO), reason="OpenVINO is not here: pip install 'sbert-pg[openvino]'"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def converted(model: Path, tmp_path: Path) -> Path:
    """Its conversion, of which nothing was measured."""
    directory = Encoder.load(model, precision="fp32", cache_dir=tmp_path).directory
    (directory / "engines.json").unlink(missing_ok=True)
    return directory


@pytest.fixture(scope="module", autouse=True)
def _nothing_in_the_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv(ENGINE_VARIABLE, raising=False)
        yield


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.mark.parametrize(
    ("precision", "provider", "engines"),
    [
        ("int8", CPU, [ONNXRUNTIME, OPENVINO]),
        ("fp32", CPU, [ONNXRUNTIME, OPENVINO]),
        ("bf16", CPU, [OPENVINO]),
        ("fp16", CPU, [ONNXRUNTIME]),
        ("fp32", CUDA, [ONNXRUNTIME]),
    ],
)
def test_which_engines_run_a_form(precision: str, provider: str, engines: list[str]) -> None:
    assert able(precision, Providers.of([provider])) == engines


def test_bf16_is_a_precision() -> None:
    assert EncoderSpec.of("all-MiniLM-L6-v2", precision="bf16").precision == "bf16"
    assert split_name("org/name:bf16") == ("org/name", "bf16")


@pytest.mark.usefixtures("without_openvino")
def test_a_missing_extra_is_named(
    model: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = r"pip install 'sbert-pg\[openvino\]'"
    with pytest.raises(MissingExtraError, match=install):
        Encoder.load(model, precision="bf16", cache_dir=tmp_path / "other")
    assert not list((tmp_path / "other").glob("**/model.onnx")), "said before the work"
    with pytest.raises(MissingExtraError, match=install):
        Encoder.open(converted, engine=OPENVINO)
    monkeypatch.setenv(ENGINE_VARIABLE, OPENVINO)
    with pytest.raises(MissingExtraError, match=install):
        Encoder.open(converted)


def test_an_engine_that_cannot_be(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeclarationError, match="no engine 'tensorrt'; there are onnxruntime, open"):
        Encoder.open(converted, engine="tensorrt")
    monkeypatch.setenv(ENGINE_VARIABLE, "tensorrt")
    with pytest.raises(DeclarationError, match="tensorrt"):
        Encoder.open(converted)
    assert Encoder.open(converted, engine=ONNXRUNTIME).engine == ONNXRUNTIME, "code goes first"


def test_no_engine_changes_the_precision(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match=r"openvino does not run.*fp16.*onnxruntime can"):
        Encoder.load(model, precision="fp16", cache_dir=tmp_path, engine=OPENVINO)


def remember(directory: Path, engine: object, kind: str | None = None) -> None:
    data = {kind or processor(): {"fastest": engine, "versions": versions()}}
    (directory / "engines.json").write_text(json.dumps(data))


@needs_openvino
class TestChoice:
    """Which engine an encoder gets."""

    def test_what_was_fastest_here_is_used(self, converted: Path) -> None:
        assert Encoder.open(converted).engine == ONNXRUNTIME, "nothing was measured"
        remember(converted, OPENVINO)
        assert Encoder.open(converted).engine == OPENVINO
        assert Encoder.open(converted, engine=ONNXRUNTIME).engine == ONNXRUNTIME

    def test_what_was_fastest_elsewhere_is_not(self, converted: Path) -> None:
        remember(converted, OPENVINO, "another processor avx2")
        assert Encoder.open(converted).engine == ONNXRUNTIME

    @pytest.mark.parametrize("other", [{ONNXRUNTIME: "1.0"}, {OPENVINO: "2020.1"}, None])
    def test_what_was_fastest_in_another_version_is_not(
        self, converted: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str] | None
    ) -> None:
        remember(converted, OPENVINO)
        installed_now = versions()
        assert installed_now.keys() == {ONNXRUNTIME, OPENVINO}
        changed = None if other is None else installed_now | other
        monkeypatch.setattr(pipeline, "versions", lambda: changed)
        assert Encoder.open(converted).engine == ONNXRUNTIME

    @pytest.mark.parametrize("engine", ["tensorrt", 7, None, [OPENVINO], {"a": 1}])
    def test_what_nobody_wrote_is_not(self, converted: Path, engine: object) -> None:
        remember(converted, engine)
        assert Encoder.open(converted).engine == ONNXRUNTIME
        for text in ("[]", "no JSON", json.dumps({processor(): OPENVINO})):
            (converted / "engines.json").write_text(text)
            assert Encoder.open(converted).engine == ONNXRUNTIME

    def test_not_where_it_is_not_installed(self, converted: Path, without_openvino: None) -> None:
        remember(converted, OPENVINO)
        assert Encoder.open(converted).engine == ONNXRUNTIME

    @pytest.mark.parametrize("fastest", [ONNXRUNTIME, OPENVINO])
    def test_conversion_measures_and_remembers(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastest: str
    ) -> None:
        monkeypatch.setattr(
            pipeline, "_seconds", lambda runner, _: 1.0 if runner.engine == fastest else 2.0
        )
        encoder = Encoder.load(model, precision="fp32", cache_dir=tmp_path)
        assert encoder.engine == fastest
        speeds = json.loads((encoder.directory / "engines.json").read_text())[processor()]
        assert speeds["tokens_per_cpu_second"][fastest].keys() == pipeline.CASES.keys()
        assert "engines.json" not in encoder.manifest.files, "another machine may have another"
        assert Encoder.load(model, precision="fp32", cache_dir=tmp_path).engine == fastest

    def test_nothing_is_measured_where_the_choice_is_made(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(ENGINE_VARIABLE, OPENVINO)
        encoder = Encoder.load(model, precision="fp32", cache_dir=tmp_path)
        assert encoder.engine == OPENVINO
        assert not (encoder.directory / "engines.json").exists()

    def test_a_little_faster_is_noise(self) -> None:
        usual = {"query": 100.0, "short": 100.0}
        for factor, fastest in ((1.04, ONNXRUNTIME), (1.06, OPENVINO)):
            faster = {case: factor * speed for case, speed in usual.items()}
            assert pipeline.fastest_of({ONNXRUNTIME: usual, OPENVINO: faster}) == fastest

    def test_an_engine_that_computes_something_else(
        self, converted: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = Compiled.run

        def other(self: Compiled, *arguments: Any) -> list[Any]:
            return [values[:, ::-1] for values in run(self, *arguments)]

        monkeypatch.setattr(Compiled, "run", other)
        encoder = Encoder.open(converted)
        assert list(pipeline.measure(converted, encoder.manifest)) == [ONNXRUNTIME]
        assert Encoder.open(converted).engine == ONNXRUNTIME
        with pytest.raises(ProviderError, match="engine='onnxruntime'"):
            Encoder.open(converted, engine=OPENVINO)

    def test_the_command(self, converted: Path) -> None:
        result = sbert_pg("encoder", "show", "--speed", str(converted), "--json")
        assert result.returncode == 0, result.stderr
        measured = json.loads(result.stdout)
        assert measured["tokens_per_cpu_second"].keys() == {ONNXRUNTIME, OPENVINO}
        assert Encoder.open(converted).engine == measured["fastest"]
        assert measured["fastest"] in sbert_pg("encoder", "show", str(converted)).stdout


@pytest.fixture(scope="module")
def bf16(minilm_path: Path, encoder_cache: Path) -> Encoder:
    return Encoder.load(minilm_path, precision="bf16", cache_dir=encoder_cache)


@needs_openvino
class TestVectors:
    """The real model."""

    def test_bf16_is_fp32_to_the_fourth_digit(self, bf16: Encoder, fp32: Encoder) -> None:
        assert (bf16.engine, bf16.manifest.precision) == (OPENVINO, "bf16")
        agreement = agreement_of(bf16.encode(TEXTS), fp32.encode(TEXTS))
        assert agreement.mean_cosine > 0.9999
        assert agreement.min_cosine > 0.9995
        assert bf16.statistics.truncated == fp32.statistics.truncated > 0, "long texts among them"
        assert bf16.spec.fingerprint != fp32.spec.fingerprint

    def test_it_shares_a_column_with_fp32_and_int8(
        self, bf16: Encoder, fp32: Encoder, int8: Encoder
    ) -> None:
        for other in (fp32, int8):
            assert compatible(bf16, other)
        assert compatible(bf16, fp32).agreement.mean_cosine > 0.9999  # type: ignore[union-attr]

    def test_fp32_is_fp32(self, fp32: Encoder) -> None:
        other = Encoder.open(fp32.directory, engine=OPENVINO)
        cosine, difference = worst(other.encode(TEXTS), fp32.encode(TEXTS))
        assert cosine > 0.999999
        assert difference < 1e-5

    def test_int8_rounds_in_the_same_way(self, int8: Encoder) -> None:
        other = Encoder.open(int8.directory, engine=OPENVINO)
        agreement = agreement_of(other.encode(TEXTS), int8.encode(TEXTS))
        assert agreement.mean_cosine > 0.9995
        assert agreement.min_cosine > 0.995


@needs_openvino
@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta", "albert"])
def test_scores_of_a_reranker(tmp_path: Path, architecture: str) -> None:
    """By OpenVINO as by onnxruntime; the bf16 of scores is held to the floor of their int8."""
    pytest.importorskip("sentence_transformers", reason="it writes the model")
    config = {**SMALL, "embedding_size": 16} if architecture == "albert" else dict(SMALL)
    write_cross_encoder(Wish(architecture, config=config), tmp_path / "model")
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))

    def scores(precision: str, engine: str) -> Any:
        reranker = Reranker.load(
            tmp_path / "model", precision=precision, engine=engine, cache_dir=tmp_path
        )
        assert reranker.engine == engine
        return reranker.score_pairs(pairs)

    exact = scores("fp32", ONNXRUNTIME)
    np.testing.assert_allclose(scores("fp32", OPENVINO), exact, atol=1e-5)
    assert np.corrcoef(scores("int8", OPENVINO), scores("int8", ONNXRUNTIME))[0, 1] > 0.999
    assert np.corrcoef(scores("bf16", OPENVINO), exact)[0, 1] > 0.99


@needs_openvino
def test_an_engine_that_scores_otherwise(tmp_path: Path) -> None:
    """OpenVINO computes something else of ModernBERT in int8."""
    pytest.importorskip("sentence_transformers", reason="it writes the model")
    write_cross_encoder(Wish("modernbert", config=dict(SMALL)), tmp_path / "model")
    ours = Reranker.load(tmp_path / "model", cache_dir=tmp_path)
    assert (ours.engine, ours.manifest.precision) == (ONNXRUNTIME, "int8")
    with pytest.raises(ProviderError, match="engine='onnxruntime'"):
        Reranker.open(ours.directory, engine=OPENVINO)


@needs_openvino
class TestProcesses:
    """Threads, forks, pickles."""

    @pytest.fixture
    def encoder(self, converted: Path) -> Encoder:
        return Encoder.open(converted, engine=OPENVINO, threads=2)

    def test_threads(self, encoder: Encoder, converted: Path) -> None:
        """No more compiled copies than threads, whatever number of callers."""
        texts = [f"hello {'world ' * (number % 20)}{number}" for number in range(300)]
        expected = Encoder.open(converted).encode(texts)
        wrong: list[int] = []
        running = threading.Barrier(4)

        def work(_: int) -> None:
            running.wait(60)
            for text, vector in zip(texts[:50], expected, strict=False):
                if not np.allclose(encoder.encode(text), vector, atol=1e-5):
                    wrong.append(1)
            np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert not wrong
        session = encoder._pipeline.get().runner._session
        assert isinstance(session, Compiled)
        assert session._idle.qsize() <= 2

    def test_a_pickle(self, encoder: Encoder) -> None:
        copy: Encoder = pickle.loads(pickle.dumps(encoder))
        assert copy.engine == OPENVINO
        np.testing.assert_allclose(copy.encode(["hello"]), encoder.encode(["hello"]), atol=1e-6)

    @pytest.mark.skipif(sys.platform == "win32", reason="no fork here")
    @pytest.mark.parametrize("child", ["encoder.encode(['hello'])", "del encoder", "pass"])
    def test_a_forked_child_ends(self, converted: Path, child: str) -> None:
        """OpenVINO's own threads would make it hang or abort, also where it encodes nothing."""
        program = f"""
import os, sys
import numpy as np
from sbert_pg.encoder import Encoder
encoder = Encoder.open({str(converted)!r}, engine="openvino", threads=2)
expected = encoder.encode(["hello"])
encoder.encode([f"hello {{number}}" for number in range(200)])
child = os.fork()
if not child:
    {child}
    sys.exit(7)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.stdout.split() == ["7"], done.stderr


def test_the_kind_of_a_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    core = "processor\t: {}\nmodel name\t: Acme 9\nflags\t\t: sse avx2 amx_bf16 fma\n\n"
    cpuinfo.write_text(core.format(0) + core.format(1))
    assert processor(cpuinfo) == "Acme 9 avx2 amx_bf16"
    assert processor(tmp_path / "none")
