"""The one table from a similarity function to pgvector's operator and operator classes.

Distances are smaller for nearer, similarities larger, as in sentence-transformers'
``SimilarityFunction``: cosine and dot are themselves, euclidean and manhattan negated distances.
Operators and operator classes: pgvector's README, "Querying" and "Indexing".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from sbert_pg.errors import DeclarationError

Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
Storage = Literal["vector", "halfvec"]
IndexMethod = Literal["hnsw", "ivfflat", "diskann", "vchordrq"]

SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)
STORAGES: tuple[Storage, ...] = get_args(Storage)
#: Access methods of pgvector, pgvectorscale and VectorChord.
INDEX_METHODS: tuple[IndexMethod, ...] = get_args(IndexMethod)

#: Widest column that an index takes, by what is indexed (pgvector 0.8).
MAX_INDEXED_DIMENSIONS = {"vector": 2_000, "halfvec": 4_000, "bit": 64_000}
#: Widest column that can be stored (pgvector 0.8).
MAX_DIMENSIONS = 16_000

#: pgvector's binary form: dimensions and an unused zero, and then elements of these types.
HEADER = struct.Struct(">HH")
ELEMENT: dict[Storage, np.dtype[Any]] = {"vector": np.dtype(">f4"), "halfvec": np.dtype(">f2")}

L2 = "<->"
INNER_PRODUCT = "<#>"
COSINE = "<=>"
L1 = "<+>"
HAMMING = "<~>"


@dataclass(frozen=True, slots=True)
class Metric:
    """How one similarity function is computed by pgvector.

    Attributes:
        operator: distance operator; ``ORDER BY column operator query`` is served by an index.
        offset: ``similarity = offset - distance``.
    """

    similarity: Similarity
    operator: str
    opclass_suffix: str
    index_methods: tuple[IndexMethod, ...]
    offset: float

    def opclass(self, storage: Storage) -> str:
        """Operator class for a column or expression of type ``storage``."""
        return f"{storage}_{self.opclass_suffix}"


METRICS: dict[Similarity, Metric] = {
    "cosine": Metric("cosine", COSINE, "cosine_ops", INDEX_METHODS, 1.0),
    "dot": Metric("dot", INNER_PRODUCT, "ip_ops", INDEX_METHODS, 0.0),
    "euclidean": Metric("euclidean", L2, "l2_ops", INDEX_METHODS, 0.0),
    "manhattan": Metric("manhattan", L1, "l1_ops", ("hnsw",), 0.0),
}

#: Similarity functions that rank unit vectors alike, so that an index for one serves another.
RANK_UNIT_VECTORS_ALIKE: frozenset[Similarity] = frozenset({"cosine", "dot", "euclidean"})


def metric_of(similarity: str) -> Metric:
    """Look up a metric by the name of its similarity function."""
    for name, metric in METRICS.items():
        if name == similarity:
            return metric
    raise DeclarationError(
        f"Unknown similarity function {similarity!r}; use one of {', '.join(SIMILARITIES)}."
    )


def unit(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Rows at length one, float32; rows of zeros stay."""
    return np.asarray(vectors / lengths(vectors), dtype=np.float32)


def lengths(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Lengths of rows, of shape ``(n, 1)`` and at least 1e-12, so that one may divide by them."""
    return np.asarray(np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def similarity_matrix(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], similarity: Similarity
) -> npt.NDArray[np.float32]:
    """Similarity of every row of ``a`` with every row of ``b``, larger for nearer, float32."""
    if similarity == "cosine":
        return np.asarray(unit(a) @ unit(b).T, dtype=np.float32)
    if similarity == "dot":
        return np.asarray(a @ b.T, dtype=np.float32)
    if similarity == "euclidean":
        # In single precision the difference of two large squares hides small distances.
        a, b = a.astype(np.float64), b.astype(np.float64)
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * (a @ b.T)
        return np.asarray(-np.sqrt(np.maximum(squared, 0)), dtype=np.float32)
    metric_of(similarity)
    return np.stack([-np.abs(b - row).sum(axis=1) for row in a]).astype(np.float32)
