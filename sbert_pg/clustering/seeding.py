"""k-means++ on a sample: the same seeds for vectors in memory and for vectors that stay in the
server.

Greedy k-means++ (Arthur and Vassilvitskii 2007, with the several trials a step of scikit-learn)
needs the distances of one candidate to all rows, k times over; on all rows of a large table that
costs more than the iterations that follow. A sample of at least ten rows for each cluster gives
seeds that are as good; benchmarks/clustering.py shows both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
#: Squared distances of some rows of the sample to every row of it, shape ``(len(rows), sample)``,
#: in an array that may be written to.
Distances = Callable[[Positions], npt.NDArray[np.floating]]

#: Rows of the sample, at least: this many for each cluster, and in all.
SAMPLE_PER_CLUSTER = 10
SAMPLE_ROWS = 4_096
#: Squared distances below this share of their mean are rounding, not distance.
_SAME = 1e-6


def generator(seed: int, start: int) -> np.random.Generator:
    """Random numbers of one start of a run."""
    return np.random.default_rng([seed, start])


def sample_positions(random: np.random.Generator, rows: int, n_clusters: int) -> Positions:
    """Which rows to seed from, as sorted positions in the order of the keys."""
    size = max(SAMPLE_PER_CLUSTER * n_clusters, SAMPLE_ROWS)
    if rows <= size:
        return np.arange(rows, dtype=np.int64)
    return np.sort(random.choice(rows, size, replace=False)).astype(np.int64)


def choose_seeds(
    random: np.random.Generator, sample: int, n_clusters: int, distances: Distances
) -> Positions:
    """Rows of the sample that the clusters start from.

    Args:
        random: where every draw comes from.
        sample: rows in the sample.
        n_clusters: seeds wanted.
        distances: gives squared distances.

    Returns:
        Positions in the sample; fewer than asked where the sample has no more different rows.
    """
    trials = 2 + int(math.log(n_clusters))
    first = int(random.integers(sample))
    chosen = [first]
    nearest = distances(np.array([first]))[0]
    floor = _SAME * float(nearest.mean(dtype=np.float64))
    nearest[nearest <= floor] = 0.0
    while len(chosen) < n_clusters:
        cumulated = np.cumsum(nearest, dtype=np.float64)
        if not cumulated[-1] > 0:
            break
        draws = random.random(trials) * cumulated[-1]
        candidates = np.minimum(np.searchsorted(cumulated, draws, side="right"), sample - 1)
        found = distances(candidates)
        np.minimum(found, nearest, out=found)
        found[found <= floor] = 0.0
        best = int(found.sum(axis=1, dtype=np.float64).argmin())
        nearest = found[best]
        chosen.append(int(candidates[best]))
    return np.array(chosen, dtype=np.int64)


def distances_in(sample: npt.NDArray[np.float32]) -> Distances:
    """Squared distances among the rows of a matrix."""
    squares = np.einsum("ij,ij->i", sample, sample)

    def distances(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        found: npt.NDArray[np.float32] = (-2 * sample[rows]) @ sample.T
        found += squares
        found += squares[rows][:, None]
        np.maximum(found, 0, out=found)
        return found

    return distances
