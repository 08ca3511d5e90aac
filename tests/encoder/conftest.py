"""Models to compare with, written once a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from encoder_models import Wish, write_model

from sbert_pg.encoder import Encoder

NO_TORCH = "torch and sentence-transformers are the reference: pip install 'sbert-pg[export]'"


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Wish], Path]:
    """Write a model as sentence-transformers writes it; equal wishes are written once."""
    pytest.importorskip("torch", reason=NO_TORCH)
    pytest.importorskip("sentence_transformers", reason=NO_TORCH)
    made: dict[str, Path] = {}

    def make(wish: Wish) -> Path:
        key = repr(wish)
        if key not in made:
            path = tmp_path_factory.mktemp(wish.architecture)
            write_model(wish, path / "transformer", path / "model")
            made[key] = path / "model"
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference() -> Iterator[Callable[[Path], Any]]:
    """The same directory in sentence-transformers, torch fp32 on the CPU; the last one is kept."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=NO_TORCH)
    # Models this small only wait for each other on several threads.
    torch.set_num_threads(1)
    kept: dict[Path, Any] = {}

    def load(path: Path) -> Any:
        if path not in kept:
            kept.clear()
            kept[path] = sentence_transformers.SentenceTransformer(
                str(path), device="cpu", local_files_only=True
            )
        return kept[path]

    yield load
    kept.clear()


@pytest.fixture(scope="session")
def encoder_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of conversions for this run, of all its processes."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "encoders"


@pytest.fixture(scope="session")
def fp32(minilm_path: Path, encoder_cache: Path) -> Encoder:
    """The real all-MiniLM-L6-v2 in fp32, converted once a run."""
    return Encoder.load(minilm_path, precision="fp32", cache_dir=encoder_cache)


@pytest.fixture(scope="session")
def int8(minilm_path: Path, encoder_cache: Path) -> Encoder:
    """The same in int8."""
    return Encoder.load(minilm_path, precision="int8", cache_dir=encoder_cache)
