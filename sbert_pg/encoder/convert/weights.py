"""Tensors of a safetensors file, by name, as float32."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sbert_pg.errors import DamagedEncoderError

Array = npt.NDArray[np.float32]

#: Element types of the safetensors format that a transformer's weights come in. bfloat16, which
#: numpy has not, is the upper half of a float32.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_HEADER_LIMIT = 100_000_000


class Weights:
    """The floating tensors of a model.

    Files are mapped into memory, so a tensor that nobody asks for is not read.

    Args:
        paths: the safetensors files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        self._maps: dict[Path, npt.NDArray[np.uint8]] = {}
        self._paths = tuple(paths)
        for path in self._paths:
            self._read_header(path)

    def names(self) -> Sequence[str]:
        """Names of the floating tensors."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Array:
        """A tensor, copied.

        Raises:
            DamagedEncoderError: it is missing or has another shape.
        """
        if name not in self._places:
            files = ", ".join(str(path) for path in self._paths)
            raise DamagedEncoderError(f"{files} holds no tensor {name!r}, which the model needs.")
        path, dtype, found, begin, end = self._places[name]
        if shape is not None and found != shape:
            raise DamagedEncoderError(
                f"{path} holds {name!r} with shape {found}; by its configuration the model needs "
                f"{shape}."
            )
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r")
        raw = self._maps[path][begin:end].view(_DTYPES[dtype])
        if dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return np.array(raw, dtype=np.float32).reshape(found)

    def _read_header(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length < _HEADER_LIMIT:
                    raise ValueError("the length of its header is out of range")
                header = json.loads(file.read(length))
            size = path.stat().st_size
            for name, entry in header.items():
                if name == "__metadata__" or entry["dtype"] not in _DTYPES:
                    continue
                shape = tuple(int(n) for n in entry["shape"])
                begin, end = (8 + length + int(at) for at in entry["data_offsets"])
                width = np.dtype(_DTYPES[entry["dtype"]]).itemsize
                if end > size or end - begin != int(np.prod(shape, dtype=np.int64)) * width:
                    raise ValueError(f"the place of {name!r} is wrong")
                self._places[name] = (path, entry["dtype"], shape, begin, end)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedEncoderError(
                f"{path} cannot be read as safetensors: {error}. Fetch the model anew."
            ) from error
