"""Communities above a similarity, by blocks of matrix products.

The same communities as sentence-transformers' ``util.community_detection``: rows with at least
``min_size`` rows above the threshold are centres, larger communities come first, a row goes to the
first that has it, and a centre that is taken makes no community of its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]

#: Elements of one block's matrix of similarities.
_BLOCK_ELEMENTS = 1 << 25


def find_communities(vectors: Vectors, threshold: float, min_size: int) -> Labels:
    """Number the communities of unit vectors, from the largest.

    Takes memory for the pairs above the threshold: 4 bytes each, both ways.

    Args:
        vectors: float32 array of shape ``(n, dimensions)``, rows of length one.
        threshold: least cosine similarity to the central row.
        min_size: rows that make a community, at least.

    Returns:
        The community of each row, or -1.
    """
    n = len(vectors)
    found: list[tuple[int, npt.NDArray[np.int32]]] = []
    step = max(1, _BLOCK_ELEMENTS // max(n, 1))
    for start in range(0, n, step):
        similar = vectors[start : start + step] @ vectors.T >= threshold
        counts = similar.sum(axis=1)
        for offset in np.flatnonzero(counts >= min_size):
            members = np.flatnonzero(similar[offset]).astype(np.int32)
            found.append((start + int(offset), members))
    found.sort(key=lambda community: (-len(community[1]), community[0]))
    return _without_overlap(found, n, min_size)


def _without_overlap(
    found: list[tuple[int, npt.NDArray[np.int32]]], n: int, min_size: int
) -> Labels:
    labels: Labels = np.full(n, -1, dtype=np.int32)
    kept: list[npt.NDArray[np.int32]] = []
    for center, members in found:
        if labels[center] >= 0:
            continue
        free = members[labels[members] < 0]
        if len(free) >= min_size:
            labels[free] = len(kept)
            kept.append(free)
    # Taking rows away can make a later community larger than an earlier one.
    rank = np.empty(len(kept) + 1, dtype=np.int32)
    rank[np.argsort([-len(rows) for rows in kept], kind="stable")] = np.arange(len(kept))
    rank[-1] = -1
    return rank[labels] if len(kept) else labels
