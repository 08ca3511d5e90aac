"""Converted directories: self-describing, verified, made once, never half."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from counted_conversion import counted_conversion
from filelock import FileLock
from tiny_model import write_tiny

from sbert_pg.encoder import Encoder, Manifest, writer
from sbert_pg.encoder.directory import cache_root, publish, slot, state_of
from sbert_pg.errors import (
    DamagedEncoderError,
    DeclarationError,
    EncoderNotFoundError,
    UnsupportedEncoderError,
)

FILES = ("manifest.json", "model.onnx", "tokenizer.json", "probes.npy")


@pytest.fixture(scope="session")
def converted(fp32: Encoder) -> Path:
    return fp32.directory


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    target = tmp_path / "encoder"
    shutil.copytree(converted, target)
    return target


def test_it_stands_alone(copy: Path, minilm_path: Path) -> None:
    encoder = Encoder.load(copy)
    assert sorted(path.name for path in copy.iterdir()) == sorted(FILES)
    manifest = Manifest.read(copy)
    assert manifest.spec == encoder.spec
    assert set(manifest.files) == set(FILES) - {"manifest.json"}
    assert manifest.spec.name == str(minilm_path)
    assert manifest.spec.fingerprint
    agreement = np.abs(encoder.recomputed_probes() - encoder.probe_vectors).max()
    assert agreement < 1e-5


def test_digests_do_not_depend_on_where_files_lie(converted: Path, minilm_path: Path,
                                                  tmp_path: Path) -> None:  # fmt: skip
    """Another layout of the same weights is the same encoder."""
    from safetensors.numpy import load_file, save_file

    moved = tmp_path / "moved"
    shutil.copytree(minilm_path, moved)
    tensors = load_file(moved / "model.safetensors")
    names = sorted(tensors)
    (moved / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": names[:40],
             "model-00002-of-00002.safetensors": names[40:]}  # fmt: skip
    for file, keys in parts.items():
        save_file({f"bert.{key}": tensors[key] for key in keys}, moved / file)
    index = {"weight_map": {f"bert.{key}": file for file, keys in parts.items() for key in keys}}
    (moved / "model.safetensors.index.json").write_text(json.dumps(index))
    again = Encoder.load(moved, precision="fp32", cache_dir=tmp_path / "cache")
    assert again.spec.fingerprint == Manifest.read(converted).spec.fingerprint


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    error = EncoderNotFoundError if name == "manifest.json" else DamagedEncoderError
    with pytest.raises(error, match=str(copy)):
        Encoder.load(copy)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_flipped_bit_is_named(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(DamagedEncoderError, match=name):
        Encoder.load(copy)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_half_written_file_is_named(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedEncoderError, match=name):
        Encoder.load(copy)


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"max_seq_length": 256', '"max_seq_length": 255'))
    with pytest.raises(DamagedEncoderError, match="own digest"):
        Encoder.load(copy)


def test_another_format_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format": 999}))
    with pytest.raises(UnsupportedEncoderError, match="999"):
        Encoder.load(copy)


def test_the_precision_of_a_converted_directory_is_fixed(copy: Path) -> None:
    with pytest.raises(DeclarationError, match="fp32"):
        Encoder.load(copy, precision="int8")


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.setenv("SBERT_PG_CACHE", str(tmp_path / "env"))
    assert cache_root() == tmp_path / "env"
    monkeypatch.delenv("SBERT_PG_CACHE")
    assert cache_root().parts[-2:] == ("sbert-pg", "encoders")
    place = slot(tmp_path, "org/../name:x", None, "fp32")
    assert place.relative_to(tmp_path).parts[0] == "org--..--name-x"
    assert ".." not in place.parts


def test_a_changed_source_is_converted_anew(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = state_of(tmp_path)
    assert state_of(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"three")
    assert state_of(tmp_path) != before


def test_nothing_is_left_of_a_failed_conversion(tmp_path: Path) -> None:
    place = tmp_path / "place"

    def write(made: Path) -> None:
        (made / "half").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        publish(place, write)
    assert list(tmp_path.iterdir()) == []
    publish(place, lambda made: (made / "a").write_text("1") and None)
    with pytest.raises(RuntimeError):
        publish(place, write)
    assert (place / "a").read_text() == "1"
    publish(place, lambda made: (made / "b").write_text("2") and None)
    assert [path.name for path in place.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_processes_that_start_together_convert_once(minilm_path: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[tuple[int, str]] = context.Queue()
    workers = [
        context.Process(target=counted_conversion, args=(str(minilm_path), str(tmp_path), queue))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        # Each imports and loads; on a busy machine that takes as long as it takes.
        worker.join(900)
        assert worker.exitcode == 0
    results = [queue.get(timeout=60) for _ in workers]
    assert sum(made for made, _ in results) == 1
    assert len({fingerprint for _, fingerprint in results}) == 1


def test_a_killed_conversion_leaves_nothing_half(tmp_path: Path) -> None:
    model, cache = write_tiny(tmp_path / "model"), tmp_path / "cache"
    code = (
        "import sys, pathlib, time\n"
        "from sbert_pg.encoder import conversion, Encoder\n"
        "from sbert_pg.encoder import directory\n"
        "def slow(directory, manifest):\n"
        "    print('working', flush=True); time.sleep(60)\n"
        "directory.write_manifest = slow\n"
        "Encoder.load(sys.argv[1], precision='fp32', cache_dir=sys.argv[2])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(model), str(cache)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (lock,) = cache.rglob("*.lock")
    with FileLock(lock, blocking=False):
        pass  # The lock of a dead process is not waited for.
    encoder = Encoder.load(model, precision="fp32", cache_dir=cache)
    assert encoder.encode("text").shape == (6,)
    places = [path for path in cache.rglob("*") if path.is_dir() and path.name.startswith(".")]
    assert places == []


def test_a_second_load_is_fast_and_needs_no_onnx(converted: Path) -> None:
    code = (
        "import sys, time\n"
        "import numpy, onnxruntime, tokenizers\n"
        "imported = time.process_time()\n"
        "from sbert_pg.encoder import Encoder\n"
        "encoder = Encoder.load(sys.argv[1])\n"
        "encoder.encode_query(['hello'])\n"
        "print((time.process_time() - imported) / imported)\n"
        "heavy = {'onnx', 'torch', 'transformers', 'huggingface_hub', 'sqlalchemy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    ratios = [
        float(
            subprocess.run(
                [sys.executable, "-c", code, str(converted)],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
            ).stdout
        )
        for _ in range(3)
    ]
    # Loading and the first query cost about as much as importing what they need.
    assert min(ratios) < 5.0


def test_weights_too_large_for_one_message_lie_beside_the_model(
    fp32: Encoder, minilm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "EXTERNAL_FROM", 1_000_000)
    encoder = Encoder.load(minilm_path, precision="fp32", cache_dir=tmp_path)
    assert set(encoder.manifest.files) == {*FILES, writer.WEIGHTS} - {"manifest.json"}
    assert (encoder.directory / "model.onnx").stat().st_size < 1_000_000
    assert encoder.megabytes > 80
    np.testing.assert_allclose(encoder.probe_vectors, fp32.probe_vectors, atol=1e-6)
    assert encoder.spec.fingerprint == fp32.spec.fingerprint
    with (encoder.directory / writer.WEIGHTS).open("r+b") as file:
        file.seek(10_000_000)
        file.write(b"\xff")
    with pytest.raises(DamagedEncoderError, match=writer.WEIGHTS):
        Encoder.open(encoder.directory)
