"""The directory of a converted encoder: self-describing, verified, made once.

::

    manifest.json   format, spec, precision, inputs of the graph, agreement, digests of the files
    model.onnx      output "embedding", float32 of shape (batch, dimensions)
    tokenizer.json  without truncation, which the manifest has as max_seq_length
    probes.npy      float32 of shape (len(PROBES), dimensions)
    engines.json    which engine is fastest on which processor, where that was measured

A directory is written under another name beside its place and renamed when it is whole, so a
process that is killed leaves no half directory under the right name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sbert_pg.encoder.files import read_json
from sbert_pg.encoder.hub import home_of, sha256_of
from sbert_pg.errors import (
    DamagedEncoderError,
    DeclarationError,
    EncoderError,
    UnsupportedEncoderError,
)
from sbert_pg.probes import PROBES, Agreement
from sbert_pg.spec import EncoderSpec, Vectors, json_digest

T = TypeVar("T")

FORMAT = 3
#: Raised when conversion gives another graph, so that cached conversions are made again.
BUILD = 1

MANIFEST = "manifest.json"
MODEL = "model.onnx"
TOKENIZER = "tokenizer.json"
PROBE_VECTORS = "probes.npy"
#: Which engine is fastest on which processor: of machines, not of the encoder, and in no digest.
ENGINES = "engines.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a converted directory says about itself.

    Attributes:
        kind: ``"encoder"`` or ``"reranker"``, a cross-encoder whose vectors are its scores.
        full_dimensions: width of the graph's output; the spec's own where nothing is truncated.
        agreement: by text set (``"probes"``, ``"samples"``), how closely the vectors agree with
            those of the fp32 reference; empty for the reference itself.
        training: of an encoder that was fitted here, how: method, settings, seed, digests of the
            pairs and of their parts, figures, versions; empty otherwise.
    """

    spec: EncoderSpec
    precision: str
    full_dimensions: int
    inputs: tuple[str, ...]
    kind: str = "encoder"
    truncation_side: str = "right"
    exporter: str = "graph"
    agreement: Mapping[str, Agreement] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def truncated(self, dimensions: int | None) -> EncoderSpec:
        """The spec with the dimensions that a caller asks for; ``None`` for the model's own."""
        spec, full = self.spec, self.full_dimensions
        if dimensions is None or dimensions == spec.dimensions:
            return spec
        if not 1 <= dimensions <= full:
            raise DeclarationError(
                f"Encoder {spec.name!r} gives {full} dimensions and cannot give {dimensions}."
            )
        normalized = dimensions == full and spec.layers[-1:] == ("Normalize",)
        return replace(spec, dimensions=dimensions, normalized=normalized)

    def to_json(self) -> dict[str, Any]:
        """Plain data with a digest of itself."""
        spec = {"spec": self.spec.to_json(), "fingerprint": self.spec.fingerprint}
        data = {**asdict(self), **spec, "format": FORMAT}
        return {**data, "digest": json_digest(data)}

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a directory."""
        path = directory / MANIFEST
        data = dict(read_json(path))
        if data.get("format") != FORMAT:
            raise UnsupportedEncoderError(
                f"{path} has format {data.get('format')!r}; this version reads {FORMAT}. Convert "
                "the encoder again with 'sbert-pg encoder convert', or use the version that made "
                "it."
            )
        digest = data.pop("digest", None)
        if digest != json_digest(data):
            raise DamagedEncoderError(
                f"{path} does not match its own digest; it was changed after it was written. "
                "Convert the encoder again."
            )
        try:
            values = {part.name: data[part.name] for part in fields(cls) if part.name in data}
            agreement = {key: Agreement(**value) for key, value in data["agreement"].items()}
            spec, inputs = EncoderSpec.from_json(data["spec"]), tuple(data["inputs"])
            return cls(**{**values, "spec": spec, "inputs": inputs, "agreement": agreement})
        # Its digest is right, so this is not an accident of a disk.
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedEncoderError(
                f"{path} was not written by this library: {type(error).__name__}: {error}."
            ) from error


def is_converted(path: Path) -> bool:
    """Whether a directory was made by this project."""
    return os.path.isfile(path / MANIFEST) and not os.path.isfile(path / "modules.json")


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file with its digest."""
    for name in (MODEL, TOKENIZER, PROBE_VECTORS):
        if name not in manifest.files:
            raise DamagedEncoderError(f"{directory / MANIFEST} names no {name}.")
    for name, digest in manifest.files.items():
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise DamagedEncoderError(
                f"{path} is missing; the directory is incomplete. Convert the encoder again."
            )
        if sha256_of(path) != digest:
            raise DamagedEncoderError(
                f"{path} does not match its digest in {MANIFEST}: it is damaged or was changed. "
                "Convert the encoder again."
            )


def verified(directory: Path, manifest: Manifest, opened: Callable[[], T]) -> T:
    """What ``opened`` makes of a directory, while its files are compared with their digests."""
    with ThreadPoolExecutor(1, thread_name_prefix="sbert-pg-verify") as pool:
        # Hashing and making the session both leave the interpreter to others.
        checked = pool.submit(verify_files, directory, manifest)
        try:
            encoder = opened()
        except Exception:
            # Damage explains whatever else went wrong.
            checked.result()
            raise
        checked.result()
    return encoder


def read_probes(directory: Path, dimensions: int) -> Vectors:
    """The stored probe vectors, shape ``(len(PROBES), dimensions)``."""
    try:
        vectors: Vectors = np.load(directory / PROBE_VECTORS, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DamagedEncoderError(
            f"{directory / PROBE_VECTORS} cannot be read: {error}."
        ) from error
    if vectors.dtype != np.float32 or vectors.shape != (len(PROBES), dimensions):
        raise DamagedEncoderError(
            f"{directory / PROBE_VECTORS} holds {vectors.dtype} of shape {vectors.shape}; "
            f"expected float32 of shape {(len(PROBES), dimensions)}."
        )
    return vectors


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a directory whose other files are in place, with their digests."""
    names = sorted(
        path.name for path in directory.iterdir() if path.name not in (MANIFEST, ENGINES)
    )
    files = {name: sha256_of(directory / name) for name in names}
    complete = replace(manifest, files=files)
    text = json.dumps(complete.to_json(), indent=2, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return complete


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Where converted encoders are kept.

    ``cache_dir``, else ``$SBERT_PG_CACHE``, else ``encoders`` in the user's cache directory.
    """
    chosen = cache_dir or os.environ.get("SBERT_PG_CACHE")
    if chosen:
        return home_of(chosen)
    import platformdirs

    try:
        place = platformdirs.user_cache_path("sbert-pg", appauthor=False)
    except (RuntimeError, KeyError, OSError) as error:
        raise EncoderError(no_cache(f"this user has no home directory ({error})")) from error
    if not place.is_absolute():
        raise EncoderError(no_cache("this user has no home directory"))
    return place / "encoders"


def no_cache(reason: str) -> str:
    """The message that there is no place for converted encoders, and what to do."""
    return (
        f"There is no place for converted encoders: {reason}. Set SBERT_PG_CACHE to a directory "
        "that this user can write to; or convert the encoder beforehand with 'sbert-pg encoder "
        "convert NAME -o DIRECTORY' and load it by that path."
    )


def slot(
    root: Path, name: str, revision: str | None, precision: str, kind: str = "encoder"
) -> Path:
    """The place of a conversion in the cache; a directory's revision is the state of its files."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name.replace("/", "--"))
    version = f"{FORMAT}.{BUILD}"
    form = precision if kind == "encoder" else f"{kind}-{precision}"
    return root / safe.strip("-")[-120:] / (revision or "default") / f"{form}-{version}"


def state_of(path: Path) -> str:
    """A digest of names, sizes and times of a directory's files; it changes when they do."""
    digest = hashlib.sha256(str(path).encode())
    for file in sorted(path.rglob("*")):
        if file.is_file():
            status = file.stat()
            line = f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode())
    return digest.hexdigest()[:16]


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold the lock of one place among all processes of this machine."""
    from filelock import FileLock

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{place}.lock")
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise EncoderError(no_cache(f"{place.parent} cannot be written to ({error})")) from error
    try:
        yield
    finally:
        lock.release()


def refuse_taken(place: Path) -> None:
    """Refuse a file or directory that exists: nothing of a user's is ever replaced."""
    if place.exists():
        raise DeclarationError(
            f"{place} exists, and is never overwritten. Give a directory that does not exist, nor "
            "anything that is written beside it."
        )


def publish(place: Path, write: Callable[[Path], object]) -> None:
    """Have a fresh directory filled and put in its place, over what was there; under its lock."""
    with scratch(place) as folder:
        write(folder)
        # mkdtemp makes it private; a cache may be shared.
        folder.chmod(0o755)
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if place.exists():
            old = folder.with_name(f"{folder.name}-old")
            place.rename(old)
            folder.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.rename(place)


@contextmanager
def scratch(place: Path, prefix: str = ".") -> Iterator[Path]:
    """A fresh directory beside a place, under its lock: so what killed processes have left goes."""
    place.parent.mkdir(parents=True, exist_ok=True)
    start = f"{prefix}{place.name}-"
    # The eight letters of mkdtemp, so that what is under way for "name-2" is none of "name".
    ours = re.compile(rf"{re.escape(start)}[a-z0-9_]{{8}}(-old)?")
    for left in place.parent.iterdir():
        if ours.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=start, dir=place.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
