"""pgvector's binary wire format, and how psycopg is taught to send it.

Format (pgvector ``vector_send``/``halfvec_send``): two big-endian 16-bit integers, dimensions and
an unused zero, then the elements as big-endian 4-byte or 2-byte IEEE floats.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

from sbert_pg.distance import Storage
from sbert_pg.errors import DimensionError, NonFiniteError, VectorError

Vector1 = npt.NDArray[np.float32]

_HEADER = struct.Struct(">HH")
HEADER_BYTES = _HEADER.size
ELEMENT: dict[Storage, np.dtype[Any]] = {
    "vector": np.dtype(">f4"),
    "halfvec": np.dtype(">f2"),
}
#: Rows converted at once: the copies in between stay in the cache, which is four times faster.
_TOGETHER = 64
#: Largest finite value of the IEEE half-precision format.
HALF_MAX = 65_504.0

_registration = threading.Lock()
_registered = False


class WireVector(list[float]):
    """One vector on its way to the server.

    psycopg looks dumpers up by class and then by its bases. On a connection that knows this class
    the prepared bytes are sent as they are; on one that does not, because it was opened before the
    dumper was registered, the value is a list of floats, which the server casts. Both give the same
    vector; the first is faster. The floats are made when somebody asks for them: a thousand vectors
    of a flush as lists are half a million references, which the garbage collector walks through.
    """

    __slots__ = ("_array", "payload")

    def __init__(self, payload: bytes, array: Vector1) -> None:
        super().__init__()
        self.payload = payload
        self._array: Vector1 | None = array

    def filled(self) -> WireVector:
        """The same, with its floats, for a driver that reads lists without asking."""
        if self._array is not None:
            self.extend(self._array.tolist())
            self._array = None
        return self

    def __iter__(self) -> Iterator[float]:
        self.filled()
        return super().__iter__()

    def __len__(self) -> int:
        self.filled()
        return super().__len__()

    def __repr__(self) -> str:
        self.filled()
        return super().__repr__()

    def __reduce__(self) -> Any:
        array = np.array(list(self), dtype=np.float32)
        return type(self), (self.payload, array)


class WireVectorDumper(Dumper):
    """Send ``WireVector`` in binary, with no type of its own: the cast around it names the type."""

    format = Format.BINARY
    oid = 0

    def dump(self, obj: Any) -> bytes:
        """Return the bytes prepared by ``wire_vector``."""
        payload: bytes = obj.payload
        return payload


def register(adapters: psycopg.adapt.AdaptersMap | None = None) -> None:
    """Teach psycopg to send ``WireVector``: every later connection, or one adapters map.

    Types call it when they are first constructed or first used with an engine. It adds a dumper for
    a class of this module and changes nothing for any other.
    """
    global _registered
    if adapters is not None:
        adapters.register_dumper(WireVector, WireVectorDumper)
    if not _registered:
        with _registration:
            psycopg.adapters.register_dumper(WireVector, WireVectorDumper)
            _registered = True


def as_float32(value: Any, *, what: str = "a vector") -> Vector1:
    """Take anything that is a sequence of numbers as a contiguous float32 array of one axis.

    Raises:
        VectorError: it is text or bytes, or not a flat sequence of numbers.
    """
    if isinstance(value, (str, bytes, bytearray)):
        raise VectorError(
            f"{what} was given as {type(value).__name__} {value[:40]!r}. Text is encoded where it "
            "is a query or a source; a vector is a sequence of numbers, such as a numpy array."
        )
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise VectorError(f"{what} is not a sequence of numbers: {error}") from error
    if array.ndim != 1:
        raise VectorError(f"{what} has shape {array.shape}; a vector has one axis.")
    return np.ascontiguousarray(array)


def check_vector(array: Vector1, dimensions: int | None, storage: Storage, what: str) -> None:
    """Refuse a vector that the server would refuse, or that would silently rank wrongly.

    Raises:
        DimensionError: its width is not ``dimensions``.
        NonFiniteError: it holds NaN, an infinity, or a value beyond half precision in ``halfvec``.
    """
    if dimensions is not None and array.shape[0] != dimensions:
        raise DimensionError(
            f"{what} has {array.shape[0]} dimensions and {dimensions} are expected; it comes from "
            "another encoder, or was cut."
        )
    if array.shape[0] == 0:
        raise DimensionError(f"{what} has no dimensions; pgvector stores at least one.")
    if not np.isfinite(array).all():
        position = int(np.flatnonzero(~np.isfinite(array))[0])
        raise NonFiniteError(f"{what} holds {array[position]} at position {position}.")
    if storage == "halfvec" and float(np.abs(array).max()) > HALF_MAX:
        raise NonFiniteError(
            f"{what} holds a value beyond {HALF_MAX:g}, the largest of halfvec; store it as vector."
        )


def to_wire(array: Vector1, storage: Storage) -> bytes:
    """Bytes of one float32 array in pgvector's binary format."""
    return _HEADER.pack(array.shape[0], 0) + array.astype(ELEMENT[storage]).tobytes()


def to_wire_rows(matrix: npt.NDArray[np.float32], storage: Storage) -> list[bytes]:
    """Bytes of every row of a float32 array of shape ``(n, dimensions)``."""
    header = _HEADER.pack(matrix.shape[1], 0)
    element = ELEMENT[storage]
    width = matrix.shape[1] * element.itemsize
    rows = []
    for start in range(0, len(matrix), _TOGETHER):
        body = matrix[start : start + _TOGETHER].astype(element).tobytes()
        rows += [header + body[i : i + width] for i in range(0, len(body), width)]
    return rows


def wire_vector(array: Vector1, storage: Storage) -> WireVector:
    """One checked float32 array, ready to be a statement's parameter."""
    return WireVector(to_wire(array, storage), array)


def passing(driver: str) -> Callable[[WireVector], WireVector]:
    """What a vector goes through on its way to a driver: nothing with psycopg 3."""
    return WireVector.filled if driver == "psycopg2" else lambda vector: vector


def from_wire(payload: bytes | memoryview, storage: Storage) -> Vector1:
    """float32 array of one vector in pgvector's binary format."""
    return np.frombuffer(payload, dtype=ELEMENT[storage], offset=HEADER_BYTES).astype(np.float32)


def from_wire_block(payload: bytes | memoryview, dimensions: int, storage: Storage) -> Vector1:
    """float32 array of shape ``(n, dimensions)`` of ``n`` vectors, one directly after the other."""
    element = ELEMENT[storage]
    row = np.dtype([("header", ">u2", (2,)), ("vector", element, (dimensions,))])
    return np.ascontiguousarray(np.frombuffer(payload, dtype=row)["vector"], dtype=np.float32)


def from_text(text: str) -> Vector1:
    """float32 array of pgvector's text form, ``[1,2,3]``."""
    return np.array(text.strip("[] ").split(","), dtype=np.float32)


def to_text(array: Vector1) -> str:
    """Text form of a vector, for literals; every float32 survives the round trip."""
    return "[" + ",".join(np.format_float_positional(x, unique=True, trim="0") for x in array) + "]"


def reader(storage: Storage) -> Callable[[Any], Vector1 | None]:
    """A function from what a cursor returns, bytes or text or NULL, to a float32 array."""

    def read(value: Any) -> Vector1 | None:
        if value is None or isinstance(value, np.ndarray):
            return value
        if isinstance(value, str):
            return from_text(value)
        return from_wire(value, storage)

    return read
