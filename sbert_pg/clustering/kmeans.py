"""k-means on vectors in memory.

Lloyd's algorithm, spherical under cosine, by blocks of matrix products on as many threads as the
process may use. Two things keep it fast: rows whose nearest centroid cannot have changed are passed
over (Hamerly 2010, "Making k-means even faster"), and sums are updated by the rows that moved. It
is written here and not taken from scikit-learn since scikit-learn's has no spherical form and seeds
on all rows; the rules (tolerance, empty clusters) are scikit-learn's, and ``kmeans_sql`` follows
them too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sbert_pg.clustering.extras import need
from sbert_pg.clustering.seeding import choose_seeds, distances_in, generator, sample_positions

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Progress = Callable[[str, int, int | None], None]

#: Elements of one block's matrix of similarities; it stays in a core's cache.
_BLOCK_ELEMENTS = 1 << 18
#: Rows whose sums are added at a time in single precision.
_SUM_ROWS = 8192
#: Distances nearer than this are not told apart by single precision.
_SLACK = 1e-5


@dataclass(frozen=True, slots=True)
class KMeansFit:
    """The result of k-means.

    Attributes:
        centroids: float32 array of shape ``(k, dimensions)``, of length one where spherical.
        labels: cluster of each row.
        distances: distance of each row to its centroid: cosine where spherical, else euclidean.
        inertia: sum of squared euclidean distances to the centroids.
        iterations: iterations that were made.
    """

    centroids: Vectors
    labels: Labels
    distances: npt.NDArray[np.float32]
    inertia: float
    iterations: int


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def normalize(vectors: Vectors) -> Vectors:
    """Bring rows to length one, in place; rows of zeros stay."""
    for start in range(0, len(vectors), _SUM_ROWS):
        block = vectors[start : start + _SUM_ROWS]
        norms = np.sqrt(np.einsum("ij,ij->i", block, block))
        block /= np.where(norms > 0, norms, 1.0)[:, None]
    return vectors


def fit_kmeans(
    vectors: Vectors,
    n_clusters: int,
    *,
    seed: int = 0,
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    spherical: bool = True,
    progress: Progress | None = None,
) -> KMeansFit:
    """Cluster vectors; the best of several starts.

    Args:
        vectors: float32 array of shape ``(n, dimensions)``, rows of length one where spherical. The
            result depends on their order, so it should be that of their keys.
        n_clusters: clusters wanted; fewer are found where there are fewer different rows.
        seed: seed of the draws.
        n_init: starts; the one with the least inertia wins.
        max_iter: iterations of a start at most.
        tol: a start ends when the squared shift of the centroids falls below this share of the mean
            variance of the columns.
        spherical: whether centroids are kept at length one.
        progress: called with what is done, how much of it, and of how much.
    """
    best: KMeansFit | None = None
    for start in range(n_init):
        random = generator(seed, start)
        positions = sample_positions(random, len(vectors), n_clusters)
        sample = vectors if len(positions) == len(vectors) else vectors[positions]
        seeds = choose_seeds(random, len(sample), n_clusters, distances_in(sample))
        state = _Lloyd(vectors, sample[seeds], spherical)
        fit = state.run(max_iter, tol, progress)
        if best is None or fit.inertia < best.inertia:
            best = fit
    assert best is not None
    return best


def nearest_centroids(
    vectors: Vectors, centroids: Vectors, *, spherical: bool
) -> tuple[Labels, npt.NDArray[np.float32]]:
    """The nearest centroid of each row, and its distance: cosine where spherical, else
    euclidean.
    """
    state = _Lloyd(vectors, centroids, spherical)
    with state.threads():
        state.assign()
    return state.labels, state.distances()


class _Lloyd:
    """One start: the state that the iterations share."""

    def __init__(self, vectors: Vectors, centroids: Vectors, spherical: bool) -> None:
        n, k = len(vectors), len(centroids)
        self.vectors, self.spherical = vectors, spherical
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.labels: Labels = np.full(n, -1, dtype=np.int32)
        self.squares = np.einsum("ij,ij->i", vectors, vectors)
        # Hamerly's bounds: a row's distance is at most upper, every other centroid's at least
        # lower.
        self.upper = np.full(n, np.inf, dtype=np.float32)
        self.lower = np.full(n, -np.inf, dtype=np.float32)
        self.sums = np.zeros((k, vectors.shape[1]))
        self.block = min(4096, max(128, _BLOCK_ELEMENTS // k))
        self._sparse = need("scipy.sparse", "compute clusters")
        self._limits = need("threadpoolctl", "compute clusters").threadpool_limits
        self._pool: ThreadPoolExecutor | None = None

    def threads(self) -> Any:
        """One thread a core, each with a BLAS of its own, while the block runs."""
        return _Threads(self)

    def run(self, max_iter: int, tol: float, progress: Progress | None) -> KMeansFit:
        """Iterate until the centroids rest."""
        variance = self._variance()
        iterations = 0
        with self.threads():
            for iterations in range(1, max_iter + 1):
                moved, old = self.assign()
                self._add(moved, old)
                shift = self._update()
                if progress is not None:
                    progress("iterations", iterations, max_iter)
                if shift <= tol * variance:
                    break
            self.assign()
        return self._result(iterations)

    def _variance(self) -> float:
        """Mean variance of the columns, by blocks: numpy's takes twice the matrix in addition."""
        total = np.zeros(self.vectors.shape[1])
        for start in range(0, len(self.vectors), _SUM_ROWS):
            total += self.vectors[start : start + _SUM_ROWS].sum(axis=0, dtype=np.float64)
        mean = total / len(self.vectors)
        squares = float(self.squares.sum(dtype=np.float64)) / len(self.vectors)
        return max(0.0, squares - float(mean @ mean)) / len(mean)

    def assign(self) -> tuple[npt.NDArray[np.int64], Labels]:
        """Give every row its nearest centroid; return the rows that moved, and from where."""
        half = 0.5 * np.einsum("ij,ij->i", self.centroids, self.centroids)
        transposed = np.ascontiguousarray(self.centroids.T)

        def work(start: int) -> tuple[npt.NDArray[np.int64], Labels]:
            return self._assign_block(start, half, transposed)

        starts = range(0, len(self.vectors), self.block)
        found = list(self._pool.map(work, starts)) if self._pool else list(map(work, starts))
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int32)
        return np.concatenate([rows for rows, _ in found]), np.concatenate(
            [old for _, old in found]
        )

    def _assign_block(
        self, start: int, half: Vectors, transposed: Vectors
    ) -> tuple[npt.NDArray[np.int64], Labels]:
        stop = start + self.block
        upper, lower = self.upper[start:stop], self.lower[start:stop]
        active = np.flatnonzero(upper + _SLACK >= lower)
        if len(active) == 0:
            return active, self.labels[active]
        rows = start + active
        block = self.vectors[start:stop] if len(active) == len(upper) else self.vectors[rows]
        # The nearest centroid has the largest product minus half its squared length.
        scores = block @ transposed
        scores -= half
        number = np.arange(len(active))
        nearest = scores.argmax(axis=1)
        first = scores[number, nearest]
        squares = self.squares[rows]
        upper[active] = np.sqrt(np.maximum(squares - 2 * first, 0))
        if scores.shape[1] > 1:
            scores[number, nearest] = -np.inf
            second = scores.max(axis=1)
            lower[active] = np.sqrt(np.maximum(squares - 2 * second, 0))
        else:
            lower[active] = np.inf
        old = self.labels[rows]
        changed = np.flatnonzero(old != nearest)
        self.labels[rows] = nearest
        return rows[changed], old[changed]

    def _add(self, rows: npt.NDArray[np.int64], old: Labels) -> None:
        """Move rows from the sums of their old clusters to those of their new ones."""
        k = len(self.centroids)
        for start in range(0, len(rows), _SUM_ROWS):
            part = rows[start : start + _SUM_ROWS]
            before = old[start : start + _SUM_ROWS]
            block = self.vectors[part]
            self.sums += self._one_hot(self.labels[part], k) @ block
            left = before >= 0
            if left.any():
                self.sums -= self._one_hot(before[left], k) @ block[left]

    def _one_hot(self, labels: Labels, k: int) -> Any:
        ones = np.ones(len(labels), dtype=np.float32)
        pointers = np.arange(len(labels) + 1)
        return self._sparse.csr_matrix((ones, labels, pointers), shape=(len(labels), k)).T

    def _update(self) -> float:
        """Move the centroids; return the sum of their squared shifts."""
        counts = np.bincount(self.labels, minlength=len(self.centroids))
        moved = (self.sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            moved[empty] = self.vectors[self._furthest(len(empty))]
        if self.spherical:
            # A mean of zeros has no direction; such a centroid stays where it is.
            nothing = ~moved.any(axis=1)
            moved[nothing] = self.centroids[nothing]
            normalize(moved)
        shifts = np.sqrt(((moved - self.centroids) ** 2).sum(axis=1))
        self.centroids = moved
        self.upper += shifts[self.labels]
        self.lower -= shifts.max()
        return float((shifts**2).sum())

    def _furthest(self, number: int) -> npt.NDArray[np.int64]:
        """Rows furthest from their centroids, in which empty clusters start again."""
        return np.argsort(-self._squared_distances(), kind="stable")[:number]

    def _squared_distances(self) -> npt.NDArray[np.float32]:
        found = np.empty(len(self.vectors), dtype=np.float32)
        for start in range(0, len(found), _SUM_ROWS):
            stop = start + _SUM_ROWS
            difference = self.vectors[start:stop] - self.centroids[self.labels[start:stop]]
            found[start:stop] = np.einsum("ij,ij->i", difference, difference)
        return found

    def distances(self) -> npt.NDArray[np.float32]:
        """Distance of each row to its centroid."""
        return self._in_metric(self._squared_distances())

    def _in_metric(self, squared: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        # Of unit vectors, the squared euclidean distance is twice the cosine distance.
        found = squared / 2 if self.spherical else np.sqrt(squared)
        return found.astype(np.float32, copy=False)

    def _result(self, iterations: int) -> KMeansFit:
        squared = self._squared_distances()
        present, labels = np.unique(self.labels, return_inverse=True)
        return KMeansFit(
            centroids=self.centroids[present],
            labels=labels.astype(np.int32),
            distances=self._in_metric(squared),
            inertia=float(squared.sum(dtype=np.float64)),
            iterations=iterations,
        )


class _Threads:
    """The threads of one computation."""

    def __init__(self, state: _Lloyd) -> None:
        self.state = state

    def __enter__(self) -> None:
        self.limits = self.state._limits(1, "blas")
        self.limits.__enter__()
        self.pool = self.state._pool = ThreadPoolExecutor(cores())

    def __exit__(self, *error: object) -> None:
        self.state._pool = None
        self.pool.shutdown()
        self.limits.__exit__(None, None, None)
