"""Vectors and arrays on their way: their binary and text forms, what is refused, what is read.

Binary form (pgvector's ``vector_send`` and ``halfvec_send``): two big-endian 16-bit integers,
dimensions and an unused zero, then the elements as big-endian 4-byte or 2-byte IEEE floats.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from psycopg.abc import AdaptContext
from psycopg.adapt import Dumper
from psycopg.pq import Format

from sbert_pg.distance import ELEMENT, HEADER, Similarity, Storage
from sbert_pg.errors import DimensionError, NonFiniteError, VectorError

#: float32, of shape ``(dimensions,)``.
Array = npt.NDArray[np.float32]

#: Rows converted at once: the copies in between stay in the cache, which is four times faster.
_TOGETHER = 64
#: Types of pgvector-python, by their names there.
_THEIRS: dict[str, Storage] = {"VECTOR": "vector", "HALFVEC": "halfvec"}
#: Largest finite value of the IEEE half-precision format.
HALF_MAX = 65_504.0


#: Numbers in brackets that may be meant as words; more are a vector.
WRITTEN = 16


def shape_of(type_: Any) -> tuple[Storage, int | None] | None:
    """How a type stores vectors, and of which width; ``None`` of one that stores none.

    pgvector-python's types are asked as well, where they are imported.
    """
    if hasattr(type_, "storage") and hasattr(type_, "dimensions"):
        return type_.storage, type_.dimensions
    theirs = sys.modules.get("pgvector.sqlalchemy")
    for name, storage in _THEIRS.items():
        kind: Any = getattr(theirs, name, ())
        if isinstance(type_, kind):
            return storage, type_.dim
    return None


def as_float32(value: Any, *, what: str = "a vector") -> Array:
    """A sequence of numbers, or what has ``to_numpy``, as a float32 array of one axis."""
    if isinstance(value, (str, bytes, bytearray)):
        raise VectorError(
            f"{what} was given as {type(value).__name__} {value[:40]!r}. Text is encoded where it "
            "is a query or a source; a vector is a sequence of numbers, such as a numpy array."
        )
    if not isinstance(value, np.ndarray) and hasattr(value, "to_numpy"):
        value = value.to_numpy()
    try:
        if np.iscomplexobj(value):
            raise TypeError("its numbers are complex")
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise VectorError(f"{what} is not a sequence of numbers: {error}") from error
    if array.ndim != 1:
        raise VectorError(f"{what} has shape {array.shape}; a vector has one axis.")
    return np.ascontiguousarray(array)


def check_vector(array: Array, dimensions: int | None, storage: Storage, what: str) -> None:
    """Refuse a vector that the server would refuse, or that would silently rank wrongly."""
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


def unfit(
    vectors: npt.NDArray[np.float32], storage: Storage, similarity: Similarity
) -> dict[int, str]:
    """Why rows of an array of shape ``(n, dimensions)`` cannot be stored or ranked, by position."""
    finite = np.isfinite(vectors).all(axis=1)
    reasons = dict.fromkeys(np.flatnonzero(~finite).tolist(), "holds NaN or an infinity")
    if similarity == "cosine":
        zero = np.flatnonzero(~vectors.any(axis=1)).tolist()
        reasons |= dict.fromkeys(zero, "is all zeros, and its cosine with anything is undefined")
    if storage == "halfvec":
        large = np.flatnonzero(finite & (np.abs(vectors) > HALF_MAX).any(axis=1)).tolist()
        reasons |= dict.fromkeys(
            large, f"holds a value beyond {HALF_MAX:g}, the largest of halfvec"
        )
    return reasons


def to_wire(array: Array, storage: Storage) -> bytes:
    """Bytes of one float32 array in pgvector's binary format."""
    return HEADER.pack(array.shape[0], 0) + array.astype(ELEMENT[storage]).tobytes()


def to_wire_rows(matrix: npt.NDArray[np.float32], storage: Storage) -> list[bytes]:
    """Bytes of every row of a float32 array of shape ``(n, dimensions)``."""
    header = HEADER.pack(matrix.shape[1], 0)
    element = ELEMENT[storage]
    width = matrix.shape[1] * element.itemsize
    rows = []
    for start in range(0, len(matrix), _TOGETHER):
        body = matrix[start : start + _TOGETHER].astype(element).tobytes()
        rows += [header + body[i : i + width] for i in range(0, len(body), width)]
    return rows


def from_wire(payload: bytes | memoryview, storage: Storage) -> Array:
    """float32 array of one vector in pgvector's binary format."""
    return np.frombuffer(payload, dtype=ELEMENT[storage], offset=HEADER.size).astype(np.float32)


def from_wire_block(payload: bytes | memoryview, dimensions: int, storage: Storage) -> Array:
    """float32 array of shape ``(n, dimensions)`` of ``n`` vectors, one directly after the other."""
    element = ELEMENT[storage]
    row = np.dtype([("header", ">u2", (2,)), ("vector", element, (dimensions,))])
    return np.ascontiguousarray(np.frombuffer(payload, dtype=row)["vector"], dtype=np.float32)


def from_text(text: str) -> Array:
    """float32 array of pgvector's text form, ``[1,2,3]``."""
    return np.array(text.strip("[] ").split(","), dtype=np.float32)


def to_text(array: Array) -> str:
    """Text form of a vector; every float32 survives the round trip."""
    # Nine digits tell any two floats apart; written and read faster than the equal doubles.
    return f"[{','.join(['%.9g'] * len(array)) % tuple(array.tolist())}]"


def vector_in(text: str, dimensions: int) -> Array | None:
    """The vector that a text spells in pgvector's form, as ``func.avg()`` gives it; or ``None``."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return None
    parts = stripped[1:-1].split(",")
    if len(parts) != dimensions and (len(parts) <= WRITTEN or not dimensions):
        return None
    try:
        vector = np.array([float(part) for part in parts], dtype=np.float32)
    except ValueError:
        return None
    check_vector(vector, dimensions, "vector", "the text is a vector that")
    return vector if dimensions > 1 else None


class WireVector(list[float]):
    """One checked vector on its way to the server.

    psycopg looks dumpers up by class and then by its bases. On a connection that knows this class
    the prepared bytes are sent as they are; on one that does not, such as an asynchronous one at
    its first statement, the value is a list of floats, which the server casts. Both give the same
    vector; the first is faster. The floats are made when they are asked for: a thousand vectors
    of a flush as lists are half a million references, which the garbage collector walks through.
    """

    __slots__ = ("array", "payload")

    def __init__(self, array: Array, storage: Storage) -> None:
        super().__init__()
        self.array = array
        #: The vector in pgvector's binary format.
        self.payload = to_wire(array, storage)

    def _filled(self) -> WireVector:
        if not super().__len__():
            self.extend(self.array.tolist())
        return self

    def __iter__(self) -> Iterator[float]:
        self._filled()
        return super().__iter__()

    def __len__(self) -> int:
        return len(self.array)

    def __repr__(self) -> str:
        return to_text(self.array)

    def __reduce__(self) -> Any:
        return _restored_vector, (self.array, self.payload)


def _restored_vector(array: Array, payload: bytes) -> WireVector:
    vector = WireVector.__new__(WireVector)
    vector.array, vector.payload = array, payload
    return vector


class WireDumper(Dumper):
    """Send what brings its bytes in binary, without a type: the cast around it names the type."""

    format = Format.BINARY
    oid = 0

    def dump(self, obj: Any) -> bytes:
        """The bytes that the value brings."""
        payload: bytes = obj.payload
        return payload


class VectorValue(np.ndarray[Any, np.dtype[np.float32]]):
    """A float32 array of shape ``(dimensions,)``, as columns are read.

    It is an ``numpy.ndarray`` in all respects but those in which frameworks stumble over one. It is
    true, as any object is, so that ``if article.embedding:`` asks whether there is a vector; numpy
    raises. Pydantic serialises it as a list of numbers,
    and takes it as the annotation of a field, which accepts any sequence of numbers. What is
    computed from it is a plain array, and it is pickled as one.

    Args:
        value: any flat sequence of numbers.

    Raises:
        VectorError: it is none.
    """

    # Without it each value would have a dictionary, which encoders of JSON take for its content.
    __slots__ = ()
    __module__ = "sbert_pg.types"

    def __new__(cls, value: Any) -> VectorValue:  # noqa: D102 - documented by the class
        array: VectorValue = as_float32(value).view(cls)
        return array

    def __bool__(self) -> bool:
        return (self.ndim == 1 and self.dtype.kind == "f") or super().__bool__()

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        plain = np.asarray(array)
        return plain if plain.ndim else plain[()]

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()

    @property
    def __pydantic_serializer__(self) -> Any:
        """What pydantic serialises a value by where the field says nothing of its type."""
        return _serializer()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """A field of this type: any sequence of numbers comes in, a list of numbers goes out."""
        from pydantic_core import core_schema

        floats, written = core_schema.list_schema(core_schema.float_schema()), np.ndarray.tolist
        out = core_schema.plain_serializer_function_ser_schema(written, return_schema=floats)
        return core_schema.no_info_plain_validator_function(
            _validated, serialization=out, json_schema_input_schema=floats
        )


def _validated(value: Any) -> VectorValue:
    try:
        with np.errstate(over="ignore"):
            vector = VectorValue(value)
        check_vector(vector, None, "vector", "the vector")
        return vector
    except VectorError as error:
        raise ValueError(str(error)) from error


@cache
def _serializer() -> Any:
    from pydantic_core import SchemaSerializer, core_schema

    schema = core_schema.any_schema(
        serialization=core_schema.plain_serializer_function_ser_schema(np.ndarray.tolist)
    )
    return SchemaSerializer(schema)


def as_value(array: npt.NDArray[np.float32]) -> VectorValue:
    """The same array, without a copy."""
    value: VectorValue = array.view(VectorValue)
    return value


def reader(storage: Storage) -> Callable[[Any], VectorValue | None]:
    """A function from what a cursor returns to a ``VectorValue``, ``NULL`` to ``None``.

    A cursor returns bytes for a column that is read in binary, text in a textual statement, and
    whatever an adapter makes of it that someone else registered with the driver.
    """

    def read(value: Any) -> VectorValue | None:
        if isinstance(value, (bytes, memoryview)):
            return as_value(from_wire(value, storage))
        if value is None:
            return None
        if not isinstance(value, str):
            return VectorValue(value)
        if not value.startswith("["):
            raise VectorError(
                f"A vector was read as {value[:20]!r}. This driver does not take arrays of vectors "
                "apart; give the function its type, as in func.array_agg(column, "
                "type_=sbert_pg.types.VectorArray(column.type, dimensions=1))."
            )
        return as_value(from_text(value))

    return read


#: Types of elements that every server numbers alike.
TEXT_OID, UUID_OID = 25, 2950
#: ``array_send``: dimensions, whether there are NULLs, type of the elements; length, lower bound.
_ARRAY_HEADER = struct.Struct(">iiIii")
_LENGTH = struct.Struct(">i")
_NULL = _LENGTH.pack(-1)


class WireArray:
    """The bytes of one array on their way to the server."""

    __slots__ = ("payload",)

    def __init__(self, elements: Sequence[bytes | None], element_oid: int) -> None:
        pack = _LENGTH.pack
        parts = [_NULL if element is None else pack(len(element)) + element for element in elements]
        has_null = None in elements
        axes = 1 if elements else 0
        header = _ARRAY_HEADER.pack(axes, has_null, element_oid, len(elements), 1)
        self.payload = header if axes else header[:12]
        if axes:
            self.payload += b"".join(parts)


class TextArray:
    """Texts on their way to the server, in the connection's encoding."""

    __slots__ = ("values",)

    def __init__(self, values: Iterable[str | None]) -> None:
        self.values = values if isinstance(values, (list, tuple)) else list(values)


class TextArrayDumper(Dumper):
    """Send ``TextArray`` in binary; the cast around it names the type."""

    format = Format.BINARY
    oid = 0

    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        connection = None if context is None else context.connection
        encoding = "utf-8" if connection is None else connection.info.encoding
        # A database without its own encoding takes bytes as they are.
        self._encoding = "utf-8" if encoding == "ascii" else encoding

    def dump(self, obj: Any) -> bytes:
        """Return the array of texts."""
        encoding = self._encoding
        elements = [None if value is None else value.encode(encoding) for value in obj.values]
        return WireArray(elements, TEXT_OID).payload


def element_of(sent: bytes) -> tuple[int, bytes]:
    """Type and bytes of the element of an array of one, as ``array_send`` gives it.

    So a value of any type comes and goes again exactly, whatever the session's formats are.
    """
    _, _, oid, _, _ = _ARRAY_HEADER.unpack_from(sent)
    return oid, sent[_ARRAY_HEADER.size + _LENGTH.size :]
