"""Forks, pickles, containers, homes: what a process brings with it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import edit, write_tiny

from sbert_pg import registry
from sbert_pg.encoder import Encoder, directory
from sbert_pg.errors import (
    DamagedEncoderError,
    EncoderError,
    EncoderMismatchError,
    EncodingError,
)
from sbert_pg.process import PerProcess, ProcessLock, usable_cores
from sbert_pg.spec import EncoderSpec


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    path = tmp_path_factory.mktemp("tiny")
    return Encoder.load(
        write_tiny(path / "model"), precision="fp32", threads=1, cache_dir=path / "cache"
    )


def in_a_child(work: Callable[[], object], seconds: float = 180) -> bool:
    """Whether a forked child does its work and ends; a child that hangs is killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


LOCKS: dict[str, Callable[[Encoder], Any]] = {
    "the encoder's": lambda encoder: encoder._pipeline._lock,
    "the counter's": lambda encoder: encoder._pipeline.get().counter._lock,
    "the registry's": lambda encoder: registry._lock,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_that_another_thread_holds_at_the_fork(tiny: Encoder, lock: str) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with LOCKS[lock](tiny):
            held.set()
            done.wait(300)

    registry.use_encoder(tiny, name="tiny")
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)

    def work() -> None:
        registry.forget_encoders()
        registry.use_encoder(tiny, name="tiny")
        assert registry.get_encoder("tiny").encode_document(["hello"]).shape == (1, 6)
        assert tiny.statistics.texts == 1, "counts of this process alone"

    try:
        assert in_a_child(work)
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_while_threads_encode(tiny: Encoder) -> None:
    stop = threading.Event()

    def encode() -> None:
        while not stop.is_set():
            tiny.encode(["hello world", "the"])

    threads = [threading.Thread(target=encode) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        expected = tiny.encode(["fox"])
        assert all(
            in_a_child(lambda: np.testing.assert_allclose(tiny.encode(["fox"]), expected, 1e-5))
            for _ in range(5)
        )
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("begun", [0, 1, 2])
def test_a_stream_that_was_begun_before_a_fork_is_refused_in_the_child(
    tiny: Encoder, begun: int
) -> None:
    """The thread that makes the next vectors stays with the parent."""
    stream = tiny.encode_stream(["hello world"] * 64, chunk_size=8)
    for _ in range(begun):
        next(stream)

    def work() -> None:
        if not begun:
            assert len(list(stream)) == 64
            return
        with pytest.raises(EncodingError, match="fork"):
            list(stream)

    assert in_a_child(work)
    assert len(list(stream)) == 64 - begun


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_of_a_child(tiny: Encoder) -> None:
    tiny.encode(["hello"])

    def work() -> None:
        tiny.encode(["hello"])
        assert in_a_child(lambda: tiny.encode(["hello"]), 60)

    assert in_a_child(work)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_pool_of_processes_encodes(tiny: Encoder, tmp_path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    # A file, since what it starts may import it.
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, sys; from sbert_pg import Encoder\n"
        "if __name__ == '__main__':\n"
        "    encoder = Encoder.open(sys.argv[2], threads=1)\n"
        "    encoder.encode('a')\n"
        "    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:\n"
        "        print([vector.tolist() for vector in pool.map(encoder.encode, ['a', 'b'])])\n"
    )
    command = [sys.executable, str(program), method, str(tiny.directory)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    np.testing.assert_allclose(eval(ended.stdout), tiny.encode(["a", "b"]), atol=1e-5)


def test_another_encoder_in_the_directory_of_a_pickled_one(tiny: Encoder, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(tiny.directory, place)
    pickled = pickle.dumps(Encoder.open(place, threads=1)._named("mine"))
    assert pickle.loads(pickled).spec.name == "mine"
    model = write_tiny(tmp_path / "model")
    edit(model / "sentence_bert_config.json", max_seq_length=8)
    other = Encoder.load(model, precision="fp32", cache_dir=tmp_path / "cache")
    shutil.rmtree(place)
    with pytest.raises(EncoderError, match=str(place)):
        pickle.loads(pickled)
    shutil.copytree(other.directory, place)
    with pytest.raises(EncoderMismatchError, match="another encoder"):
        pickle.loads(pickled)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_child_refuses_what_its_parent_did_not_load(tmp_path: Path, replaced: bool) -> None:
    """Another encoder has been put in its place since, or nothing: no vectors of another space."""
    model = write_tiny(tmp_path / "model")
    encoder = Encoder.load(model, precision="fp32", threads=1, cache_dir=tmp_path / "cache")
    before = encoder.encode(["hello"])
    shutil.rmtree(encoder.directory)
    if replaced:
        edit(model / "config.json", layer_norm_eps=0.1)
        other = Encoder.load(model, precision="fp32", threads=1, cache_dir=tmp_path / "cache")
        shutil.copytree(other.directory, encoder.directory)

    def work() -> None:
        with pytest.raises(DamagedEncoderError, match=r"manifest\.json|something else"):
            encoder.encode(["hello"])

    assert in_a_child(work)
    np.testing.assert_array_equal(encoder.encode(["hello"]), before)


def test_a_value_is_made_once_in_a_process() -> None:
    made: list[int] = []
    value = PerProcess(lambda: made.append(1) or object())
    values: list[object] = []
    threads = [threading.Thread(target=lambda: values.append(value.get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(set(map(id, values))) == 1


def test_a_process_lock_is_a_lock() -> None:
    lock, entered = ProcessLock(), threading.Event()

    def enter() -> None:
        with lock:
            entered.set()

    thread = threading.Thread(target=enter)
    with lock, lock:
        thread.start()
        assert not entered.wait(0.1)
    thread.join()
    assert entered.is_set()


def test_a_pickled_encoder_is_the_same(tiny: Encoder) -> None:
    tiny = tiny._named("models/tiny")
    for encoder in (tiny, Encoder.open(tiny.directory, dimensions=3, threads=1)):
        again = pickle.loads(pickle.dumps(encoder))
        assert again.spec == encoder.spec
        np.testing.assert_allclose(again.encode("hello"), encoder.encode("hello"), atol=1e-6)


def test_another_process_takes_a_pickled_encoder(tiny: Encoder, tmp_path: Path) -> None:
    (tmp_path / "encoder").write_bytes(pickle.dumps(tiny))
    code = (
        "import pickle, sys; from pathlib import Path\n"
        "print(pickle.loads(Path(sys.argv[1]).read_bytes()).encode('hello').tolist())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "encoder")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    np.testing.assert_allclose(eval(output), tiny.encode("hello"), atol=1e-5)


def test_get_encoder_takes_a_name(tiny: Encoder) -> None:
    registry.use_encoder(tiny, name="/models/v1/encoder")
    assert registry.get_encoder("/models//v1/encoder/") is tiny
    assert registry.get_encoder(EncoderSpec(name="/models/v1/encoder", dimensions=6)) is tiny
    with pytest.raises(EncoderError):
        registry.get_encoder("/models/v2/encoder")
    loaded = registry.get_encoder(str(tiny.directory))
    assert loaded.spec.fingerprint == tiny.spec.fingerprint
    assert registry.get_encoder(str(tiny.directory)) is loaded


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/a", {"other/cpu.max": "100000 100000"}, None),
        ("0::/../a", {"a/cpu.max": "100000 100000"}, None),
        ("4:cpu,cpuacct:/docker/x", {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "100000",
                                     "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:memory:/m\nnonsense", {"m/cpu.max": "100000 100000"}, None),
        ("0::/a", {"a/cpu.max": "nonsense"}, None),
        ("0::/a", {"a/cpu.max": "1 0"}, None),
    ],
)  # fmt: skip
def test_a_containers_share_wherever_it_is_set(
    tmp_path: Path, group: str, files: dict[str, str], cores: int | None
) -> None:
    (tmp_path / "own").write_text(group + "\n")
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(content)
    free = usable_cores(tmp_path / "none", tmp_path / "none")
    assert usable_cores(tmp_path / "cgroup", tmp_path / "own") == (cores or free)


@pytest.mark.parametrize("root", ["/proc/sbert-pg", "/dev/null/cache", "{file}/cache"])
def test_a_cache_that_cannot_be_written_is_explained(
    tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SBERT_PG_CACHE", root.format(file=tmp_path / "file"))
    with pytest.raises(EncoderError, match="SBERT_PG_CACHE"):
        Encoder.load(write_tiny(tmp_path / "model"), precision="fp32")


@pytest.mark.parametrize("error", [RuntimeError("no home"), KeyError(12345), None])
def test_no_home_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception | None
) -> None:
    def place(*_: object, **__: object) -> Path:
        if error is not None:
            raise error
        return Path("~/.cache/sbert-pg")

    monkeypatch.delenv("SBERT_PG_CACHE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", place)
    with pytest.raises(EncoderError, match="SBERT_PG_CACHE"):
        Encoder.load(write_tiny(tmp_path / "model"), precision="fp32")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="switches users")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_another_user_reads_what_is_converted(tmp_path: Path) -> None:
    """A read-only cache serves what is in it, without a home and without a lock."""
    model, cache = write_tiny(tmp_path / "model"), tmp_path / "cache"
    Encoder.load(model, precision="fp32", cache_dir=cache)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    subprocess.run(["chmod", "-R", "a+rX", str(tmp_path)], check=True)
    code = (
        "import sys; from sbert_pg import Encoder\n"
        "print(Encoder.load(sys.argv[1], precision='fp32', threads=1).encode('a').shape)"
    )
    command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", sys.executable]
    output = subprocess.run(
        [*command, "-B", "-c", code, str(model)], capture_output=True, text=True, cwd="/",
        env={"PATH": os.environ["PATH"], "SBERT_PG_CACHE": str(cache), "HOME": "/nonexistent",
             "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )  # fmt: skip
    assert "(6,)" in output.stdout, output.stderr


def test_telemetry_is_off_wherever_a_session_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    calls: list[str] = []
    original = onnxruntime.InferenceSession

    def opened(*arguments: Any, **options: Any) -> Any:
        calls.append("opened")
        return original(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: calls.append("off"))
    model = write_tiny(tmp_path / "model")
    Encoder.load(model, precision="fp32", cache_dir=tmp_path / "cache", threads=1)
    assert "opened" in calls
    assert all(calls[number - 1] == "off" for number, call in enumerate(calls) if call == "opened")
    sources = directory.__file__ and Path(directory.__file__).parent
    opening = [
        path.name for path in sources.rglob("*.py") if ".InferenceSession(" in path.read_text()
    ]
    assert sorted(opening) == ["engines.py", "writer.py"]
