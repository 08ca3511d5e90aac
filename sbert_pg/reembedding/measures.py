"""What a verification measures, as pure functions of keys, similarities and gains.

Recall with ties as in ann-benchmarks: an answer counts where it is as near as the k-th exact one,
so that duplicates of a text cannot make a perfect index look wrong. nDCG with linear gains and
``1 / log2(rank + 1)``, as in BEIR and MTEB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

#: Similarities this close are equal: float32 sums in another order differ by less than this.
TIE = 1e-5


class Nearest:
    """The ``k`` most similar rows of each query, collected block by block in bounded memory.

    Args:
        queries: number of queries.
        k: rows kept for each.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        #: Shape ``(queries, k)``, most similar first; ``-inf`` where fewer rows were seen.
        self.similarities: Floats = np.full((queries, k), -np.inf, dtype=np.float32)
        #: Position of each row in the order of reading; ``-1`` where there is none.
        self.positions: Positions = np.full((queries, k), -1, dtype=np.int64)

    def add(
        self, similarities: Floats, first: int, keep: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """Take one block.

        Args:
            similarities: shape ``(queries, rows)``, larger for nearer; NaN is never found.
            first: position of the block's first row.
            keep: rows of the block that count, all of them by default.
        """
        block = np.where(np.isnan(similarities), -np.inf, similarities)
        if keep is not None:
            block = np.where(keep[None, :], block, -np.inf)
        rows = np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)
        joined = np.concatenate([self.similarities, block], axis=1)
        positions = np.concatenate([self.positions, rows], axis=1)
        best = np.argpartition(-joined, self.k - 1, axis=1)[:, : self.k]
        order = np.argsort(-np.take_along_axis(joined, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        self.similarities = np.take_along_axis(joined, best, axis=1)
        positions = np.take_along_axis(positions, best, axis=1)
        self.positions = np.where(np.isneginf(self.similarities), -1, positions)


def recall(found: Sequence[float], exact: Floats, k: int) -> float | None:
    """Share of the ``k`` exact neighbours that an index found, ties counted as found.

    Args:
        found: similarities of the rows that the index returned, at most ``k``.
        exact: similarities of the exact neighbours, most similar first.
        k: neighbours wanted.

    Returns:
        Between 0 and 1, or ``None`` where no row can be found at all.
    """
    known = exact[np.isfinite(exact)][:k]
    if known.size == 0:
        return None
    threshold = float(known[-1]) - TIE
    return min(sum(value >= threshold for value in found[:k]), known.size) / known.size


def overlap(a: Positions, b: Positions) -> float | None:
    """Share of neighbours that two answers have in common; ``-1`` is no neighbour."""
    left, right = set(a[a >= 0].tolist()), set(b[b >= 0].tolist())
    size = max(len(left), len(right))
    return len(left & right) / size if size else None


def ndcg(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """nDCG@k of one answer against the gain of each relevant key."""
    ideal = sorted(gains.values(), reverse=True)[:k]
    best = sum(gain / np.log2(rank + 2) for rank, gain in enumerate(ideal))
    got = sum(gains.get(key, 0.0) / np.log2(rank + 2) for rank, key in enumerate(ranked[:k]))
    return float(got / best) if best else 0.0


def recall_of(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Share of the relevant keys among the first ``k``, of at most ``k`` that fit there."""
    relevant = {key for key, gain in gains.items() if gain > 0}
    return len(relevant & set(ranked[:k])) / min(len(relevant), k) if relevant else 0.0


def reciprocal_rank(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """One over the rank of the first relevant key, 0 where the first ``k`` hold none."""
    for rank, key in enumerate(ranked[:k], start=1):
        if gains.get(key, 0.0) > 0:
            return 1 / rank
    return 0.0


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are known, ``None`` where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
