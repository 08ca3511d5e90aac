"""What a row says about its vector: the digest in the companion column of an embedding column.

Beside each embedding column ``e`` stands a column ``e_of`` of type ``uuid``. Its first half proves
the vector, its second half names the text that the vector was made from; both depend on the
binding's identity, so what was written for another binding proves nothing. The server computes the
same in SQL, in the predicate of the index that is the queue (``sbert.expressions_v1``); a test
compares the two.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from functools import cache

from sbert_pg.distance import Storage

#: Default of the companion column: a new row is pending.
NIL = uuid.UUID(int=0)
#: Dimensions of a vector that its proof covers.
PROVEN_DIMENSIONS = 8
#: Hexadecimal digits of either half.
HALF = 16
#: Bytes of the longest name that PostgreSQL keeps whole.
_LONGEST_NAME = 63

_HEADER = struct.Struct(">HH")
_ELEMENT_BYTES: dict[Storage, int] = {"vector": 4, "halfvec": 2}


def digest(
    binding_id: uuid.UUID, text: str | None, wire: bytes | None, storage: Storage
) -> uuid.UUID | None:
    """What the companion column of a fresh row holds.

    Args:
        text: the text that the vector was made from, as the source gives it.
        wire: the vector in pgvector's binary format, ``None`` for "failed for this text".
        storage: ``"vector"`` or ``"halfvec"``, the type of the column.

    Returns:
        ``None`` where there is no text. The server hashes texts in its own encoding, so the value
        is of use only where that is UTF8.
    """
    if text is None:
        return None
    return uuid.UUID(bytes=_proof(binding_id, wire, storage) + _hash(binding_id, text.encode()))


def proof(binding_id: uuid.UUID, wire: bytes | None, storage: Storage) -> str:
    """The half that proves a vector: 16 hexadecimal digits over its first eight dimensions."""
    return _proof(binding_id, wire, storage).hex()


def of(binding_id: uuid.UUID, text: str) -> str:
    """The half that names a text: 16 hexadecimal digits."""
    return _hash(binding_id, text.encode()).hex()


def companion_name(column: str) -> str:
    """Name of the companion of an embedding column: ``embedding_of`` for ``embedding``.

    Where that would be longer than PostgreSQL's 63 bytes it is made of a digest of the name.
    """
    encoded = column.encode()
    if len(encoded) + len("_of") <= _LONGEST_NAME:
        return f"{column}_of"
    return f"of_{hashlib.sha256(encoded).hexdigest()[:HALF]}"


def _proof(binding_id: uuid.UUID, wire: bytes | None, storage: Storage) -> bytes:
    return _hash(binding_id, b"-" if wire is None else _leading(wire, storage).hex().encode())


def _leading(wire: bytes, storage: Storage) -> bytes:
    """The first dimensions of a vector, in the same format."""
    if len(wire) < _HEADER.size:
        return wire  # which is not a vector, and is refused when it is sent
    width = min(_HEADER.unpack_from(wire)[0], PROVEN_DIMENSIONS)
    end = _HEADER.size + width * _ELEMENT_BYTES[storage]
    return _HEADER.pack(width, 0) + wire[_HEADER.size : end]


def _hash(binding_id: uuid.UUID, content: bytes) -> bytes:
    return hashlib.sha256(_seed(binding_id) + content).digest()[: HALF // 2]


@cache
def _seed(binding_id: uuid.UUID) -> bytes:
    """The identity as text, which every hash begins with; made once, as it costs more than one."""
    return str(binding_id).encode()
