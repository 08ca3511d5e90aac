"""The files of a model: JSON and safetensors, read within bounds and believed in nothing.

Directories come from strangers. Whatever is wrong with one is said by an error that names the file
and the entry, before memory or time is spent on it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from sbert_pg.errors import DamagedEncoderError, EncoderNotFoundError, UnsupportedEncoderError

Array = npt.NDArray[np.float32]
T = TypeVar("T")
K = TypeVar("K")

#: Largest JSON file that is read, in bytes; tokenizers with 250,000 pieces have some 35 million.
JSON_LIMIT = 64_000_000
#: The same for all others.
SETTINGS_LIMIT = 10_000_000
#: Objects and lists within each other; configurations have some ten.
_DEPTH_LIMIT = 200
#: Largest number that a configuration may hold where none is named: no width, no number of layers,
#: tokens or positions comes near it.
_LARGEST = 100_000_000

#: Floating types of the safetensors format by numpy's names. bfloat16, which numpy has not, is the
#: upper half of a float32.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
#: Integers that static models have. Their values are exact in a float32.
_INTEGERS = {"I8": "|i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}

#: What a checkpoint of a task model puts before the names of its transformer.
_PREFIX = re.compile(r"^(?:bert|roberta|distilbert|mpnet|camembert|electra|albert|model|new|gte)\.")
_REQUIRED: Any = object()
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


def parse_json(content: bytes, what: str) -> Any:
    """JSON from untrusted bytes."""
    try:
        if _depth(content) > _DEPTH_LIMIT:
            raise ValueError(f"it is nested more than {_DEPTH_LIMIT} deep")
        value = json.loads(content.decode("utf-8-sig"), parse_constant=_no_number)
        if _SURROGATE.search(content):
            # A pair is one character; half of one is not a text that could be written or encoded.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise DamagedEncoderError(f"{what} cannot be read as JSON: {error}.") from error


def _depth(content: bytes) -> int:
    depth = deepest = 0
    for match in _BRACKETS.finditer(content):
        if match[0] in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > _DEPTH_LIMIT:
                break
        elif match[0] in b"]}":
            depth -= 1
    return deepest


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def read_bytes(path: Path, limit: int = SETTINGS_LIMIT) -> bytes:
    """The content of a file."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise DamagedEncoderError(f"{path} is not an ordinary file.")
        if size > limit:
            raise DamagedEncoderError(
                f"{path} has {size:,} bytes; no file of its kind has more than {limit:,}."
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedEncoderError(f"{path} is missing; the directory is incomplete.") from error
    except OSError as error:
        raise DamagedEncoderError(f"{path} cannot be read: {error}.") from error


class Settings(Mapping[str, Any]):
    """A JSON object from a file, whose entries are asked for by type.

    Each method takes the entry's name and what holds where it is missing or null; without that, a
    missing entry is an error.
    """

    def __init__(self, data: Mapping[str, Any], path: Path) -> None:
        self._data = data
        self.path = path

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def integer(
        self, key: str, default: T = _REQUIRED, *, least: int = 1, most: int = _LARGEST
    ) -> int | T:
        """A whole number between ``least`` and ``most``."""
        value = self._data.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(key, f"a whole number from {least} to {most:,}")
        return value

    def number(self, key: str, default: float, *, above: float, below: float) -> float:
        """A number between two others."""
        value = self._data.get(key)
        if value is None:
            return default
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not above < value < below:
            self.refuse(key, f"a number between {above} and {below}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._one(key, default, bool, "true or false")

    def text(self, key: str, default: T = _REQUIRED) -> str | T:
        """A text."""
        return self._one(key, default, str, "a text")

    def _one(self, key: str, default: T, kind: type[K], expected: str) -> K | T:
        value = self._data.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if not isinstance(value, kind):
            self.refuse(key, expected)
        return value

    def object(self, key: str) -> Settings:
        """An object; an empty one where it is missing."""
        return Settings(self._one(key, {}, dict, "an object"), self.path)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Say that an entry is not what it should be."""
        shown = _shown(self._data.get(key))
        raise DamagedEncoderError(f"{self.path}: {key!r} is {shown}; it has to be {expected}.")

    def only(self, key: str, supported: Collection[T], default: T = _REQUIRED) -> T:
        """An entry that has one of a few values."""
        value: T = self._data.get(key)  # type: ignore[assignment]  # believed only below
        if value is None and default is not _REQUIRED:
            return default
        if value not in tuple(supported):
            raise UnsupportedEncoderError(
                f"{self.path}: {key!r} is {_shown(value)}, which is not supported; supported "
                f"{'is' if len(supported) == 1 else 'are'} {', '.join(map(str, supported))}."
            )
        return value

    def refuse_code(self) -> None:
        """Refuse a configuration that names code of the model's repository."""
        if self._data.get("auto_map"):
            raise UnsupportedEncoderError(
                f"{self.path}: 'auto_map' names code of the model repository, without which the "
                "model is not what its author means. Code from model repositories is never run. "
                "Take a model whose architecture is part of transformers."
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_json(path: Path, limit: int = SETTINGS_LIMIT) -> Settings:
    """A JSON object from a file."""
    data = parse_json(read_bytes(path, limit), str(path))
    if not isinstance(data, dict):
        raise DamagedEncoderError(f"{path} holds no JSON object.")
    return Settings(data, path)


def read_list(path: Path, most: int) -> list[Any]:
    """A JSON list from a file, with at most so many entries."""
    data = parse_json(read_bytes(path), str(path))
    if not isinstance(data, list) or len(data) > most:
        raise DamagedEncoderError(f"{path} holds no list of at most {most} modules.")
    return data


def is_there(path: Path) -> bool:
    """Whether a file has this name, a link to nothing included, which is not the same as no file.

    The hub's cache consists of links; where what one points to is gone, a setting is lost.
    """
    return os.path.lexists(path)


def read_if_there(path: Path) -> Settings:
    """As ``read_json``; an empty object where there is no such file."""
    return read_json(path) if is_there(path) else Settings({}, path)


def require_model(root: Path) -> None:
    """Refuse a path that holds no model, before anything is made of its files."""
    if not root.is_dir():
        raise EncoderNotFoundError(
            f"There is no directory {str(root)!r}. Give the path of a sentence-transformers "
            "directory or of a converted encoder, or a hub name such as 'all-MiniLM-L6-v2'."
        )
    if not (root / "modules.json").is_file() and not (root / "config.json").is_file():
        raise EncoderNotFoundError(
            f"{root} holds neither modules.json nor config.json, so it is not a "
            "sentence-transformers directory."
        )


def inside(root: Path, name: str) -> Path:
    """A path below ``root``; a model must not point elsewhere."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name or len(name) > 200:
        raise UnsupportedEncoderError(
            f"{root} names the path {name[:200]!r}, which lies outside it or cannot be one."
        )
    return root / relative


#: What a message says of weights that are there as pickle alone.
NO_PICKLE = (
    "as pickle only, which can run code when it is read. Take a revision of the model that has "
    "model.safetensors, or save it again with SentenceTransformer(...).save_pretrained(...) where "
    "you trust it."
)


def _refuse_pickle(directory: Path) -> None:
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (directory / name).is_file():
            raise UnsupportedEncoderError(f"{directory} holds its weights ({name}) {NO_PICKLE}")


def find_weights(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a module, one or a sharded set."""
    index = directory / "model.safetensors.index.json"
    files: tuple[Path, ...] = (directory / "model.safetensors",)
    if index.is_file():
        shards = read_json(index).object("weight_map")
        files = tuple(inside(directory, name) for name in sorted({shards.text(k) for k in shards}))
    missing = [file.name for file in files if not file.is_file()]
    if files and not missing:
        return files
    if not index.is_file():
        _refuse_pickle(directory)
    raise DamagedEncoderError(
        f"{directory} lacks {', '.join(missing) or 'its weights'}; the directory is incomplete."
    )


class Weights:
    """The floating tensors of a model by name, as float32; with ``integers`` those as well.

    Names go without the prefix that a checkpoint of a task model has before its transformer. Files
    are mapped into memory, so a tensor that is not asked for is not read.
    """

    def __init__(self, paths: Iterable[Path], *, integers: bool = False) -> None:
        self._types = _FLOATS | _INTEGERS if integers else _FLOATS
        self._places: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        self._maps: dict[Path, npt.NDArray[np.uint8]] = {}
        self._paths = tuple(paths)
        for path in self._paths:
            try:
                self._read_header(path)
            except (OSError, ValueError, SafetensorError) as error:
                raise DamagedEncoderError(
                    f"{path} cannot be read as safetensors: {error}. Fetch the model again."
                ) from error

    def names(self) -> Sequence[str]:
        """Names of the floating tensors."""
        return list(self._places)

    def size(self, name: str) -> int:
        """Number of a tensor's elements."""
        return math.prod(self._places[name][2])

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; empty where there is none of that name."""
        return self._places[name][2] if name in self._places else ()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Array:
        """A tensor, copied."""
        if name not in self._places:
            files = ", ".join(str(path) for path in self._paths)
            raise DamagedEncoderError(f"{files} holds no tensor {name!r}, which the model needs.")
        path, dtype, stored, begin, end = self._places[name]
        if shape is not None and stored != shape:
            raise DamagedEncoderError(
                f"{path} holds {name!r} with shape {stored}; by its configuration the model needs "
                f"{shape}."
            )
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r")
        raw = self._maps[path][begin:end].view(self._types[dtype])
        if dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return np.array(raw, dtype=np.float32).reshape(stored)

    def _read_header(self, path: Path) -> None:
        # The library checks every offset, shape and size of the header, and reads no tensor. Of
        # numpy's types it has no bfloat16, so tensors are taken from the file here.
        with safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if dtype in self._types:
                self._places[_PREFIX.sub("", name)] = (path, dtype, shape, begin, end)
