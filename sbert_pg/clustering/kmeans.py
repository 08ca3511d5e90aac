"""k-means on vectors in memory, and the seeds that every form of it starts from.

Lloyd's algorithm, spherical under cosine, by blocks of matrix products on as many threads as the
process may use. Two things keep it fast: rows whose nearest centroid cannot have changed are passed
over (Hamerly 2010, "Making k-means even faster"), and sums are updated by the rows that moved. It
is written here and not taken from scikit-learn since scikit-learn's has no spherical form and seeds
on all rows; the rules (tolerance, empty clusters) are scikit-learn's, and ``out_of_core`` follows
them too.

Seeds are drawn by greedy k-means++ (Arthur and Vassilvitskii 2007, with the several trials a step
of scikit-learn) on a sample. It needs the distances of one candidate to all rows, k times over; on
all rows of a large table that costs more than the iterations that follow. A sample of at least ten
rows for each cluster gives seeds that are as good; benchmarks/clustering.py shows both.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sbert_pg.errors import needing
from sbert_pg.process import usable_cores
from sbert_pg.progress import Advance
from sbert_pg.spec import Vectors

Labels = npt.NDArray[np.int32]
Positions = npt.NDArray[np.int64]
#: Squared distances of some rows of the sample to every row of it, shape ``(len(rows), sample)``,
#: in an array that may be written to.
Distances = Callable[[Positions], npt.NDArray[np.floating]]

#: Rows of the sample that seeds are drawn from, at least: this many for each cluster, and in all.
SAMPLE_PER_CLUSTER = 10
SAMPLE_ROWS = 4_096
#: Squared distances below this share of their mean are rounding, not distance.
_SAME = 1e-6
#: Elements of one block's matrix of similarities; it stays in a core's cache.
_BLOCK_ELEMENTS = 1 << 18
#: Rows whose sums are added at a time in single precision.
_SUM_ROWS = 8192
#: Distances nearer than this are not distinguished by single precision.
_SLACK = 1e-5
#: Packages of modules that are not called as their package is.
_PACKAGES = {"sklearn": "scikit-learn", "umap": "umap-learn"}


@dataclass(frozen=True, slots=True)
class Fit:
    """Clusters of rows.

    Attributes:
        labels: cluster of each row, or -1.
        centroids: float32 array of shape ``(k, dimensions)``, of length one where spherical.
        distances: distance of each row to its centroid, of outliers to the nearest: cosine where
            spherical, else euclidean.
        inertia: sum of squared euclidean distances to the centroids, outliers left out.
    """

    labels: Labels
    centroids: Vectors
    distances: npt.NDArray[np.float32]
    inertia: float
    score: float | None = None
    curve: list[dict[str, Any]] | None = None
    details: dict[str, Any] = field(default_factory=dict)


def need(module: str, purpose: str, extra: str = "clustering") -> Any:
    """Import a module of an optional dependency, at its first use."""
    root = module.partition(".")[0]
    with needing(_PACKAGES.get(root, root), extra, purpose):
        return importlib.import_module(module)


def normalize(vectors: Vectors) -> Vectors:
    """Bring rows to length one, in place; rows of zeros stay."""
    for start in range(0, len(vectors), _SUM_ROWS):
        block = vectors[start : start + _SUM_ROWS]
        norms = np.sqrt(np.einsum("ij,ij->i", block, block))
        # Squares of very small and very large values leave the range of single precision.
        rough = np.flatnonzero(~((norms > 1e-15) & (norms < 1e15)))
        if len(rough):
            scale = np.abs(block[rough]).max(axis=1, keepdims=True)
            block[rough] /= np.where(scale > 0, scale, 1.0)
            norms[rough] = np.linalg.norm(block[rough], axis=1)
        block /= np.where(norms > 0, norms, 1.0)[:, None]
    return vectors


@contextmanager
def worker_threads(purpose: str) -> Iterator[ThreadPoolExecutor]:
    """One thread for each usable core, each with its own BLAS, while the block runs."""
    limits = need("threadpoolctl", purpose).threadpool_limits
    with limits(1, "blas"), ThreadPoolExecutor(usable_cores()) as pool:
        yield pool


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
    """Rows of the sample that the clusters start from; fewer where there are no more different
    ones.
    """
    trials = 2 + int(math.log(n_clusters))
    first = int(random.integers(sample))
    chosen = [first]
    nearest = distances(np.array([first]))[0]
    floor = _SAME * float(nearest.mean(dtype=np.float64))
    nearest[nearest <= floor] = nearest[first] = 0.0
    while len(chosen) < n_clusters:
        cumulated = np.cumsum(nearest, dtype=np.float64)
        if not cumulated[-1] > 0:
            break
        draws = random.random(trials) * cumulated[-1]
        candidates = np.minimum(np.searchsorted(cumulated, draws, side="right"), sample - 1)
        reach = distances(candidates)
        # Of vectors that are all alike, rounding is more than that share: no row is drawn twice.
        reach[np.arange(trials), candidates] = 0.0
        np.minimum(reach, nearest, out=reach)
        reach[reach <= floor] = 0.0
        best = int(reach.sum(axis=1, dtype=np.float64).argmin())
        nearest = reach[best]
        chosen.append(int(candidates[best]))
    return np.array(chosen, dtype=np.int64)


def distances_in(sample: npt.NDArray[np.float32]) -> Distances:
    """Squared distances among the rows of a matrix."""
    squares = np.einsum("ij,ij->i", sample, sample)

    def distances(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        squared: npt.NDArray[np.float32] = (-2 * sample[rows]) @ sample.T
        squared += squares
        squared += squares[rows][:, None]
        np.maximum(squared, 0, out=squared)
        return squared

    return distances


def fit_kmeans(
    vectors: Vectors,
    n_clusters: int,
    *,
    seed: int = 0,
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    spherical: bool = True,
    progress: Advance | None = None,
) -> Fit:
    """Cluster vectors; the best of several starts.

    The result depends on the rows' order, so it should be that of their keys; fewer clusters are
    found where there are fewer different rows. A start ends when the squared shift of the centroids
    falls below ``tol`` of the mean variance of the columns, or after ``max_iter`` iterations.
    """
    best: Fit | None = None
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
    with worker_threads("compute clusters") as pool:
        state.assign(pool)
    squared = squared_distances(vectors, state.centroids, state.labels)
    return state.labels, in_metric(squared, spherical)


def squared_distances(
    vectors: Vectors, centroids: Vectors, labels: Labels
) -> npt.NDArray[np.float32]:
    """Squared euclidean distance of each row to the centroid of its label."""
    squared = np.empty(len(vectors), dtype=np.float32)
    for start in range(0, len(squared), _SUM_ROWS):
        stop = start + _SUM_ROWS
        difference = vectors[start:stop] - centroids[labels[start:stop]]
        squared[start:stop] = np.einsum("ij,ij->i", difference, difference)
    return squared


def in_metric(squared: npt.NDArray[np.float32], spherical: bool) -> npt.NDArray[np.float32]:
    """Distances of squared euclidean ones: cosine where spherical, else euclidean."""
    # Of unit vectors, the squared euclidean distance is twice the cosine distance.
    return (squared / 2 if spherical else np.sqrt(squared)).astype(np.float32, copy=False)


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

    def run(self, max_iter: int, tol: float, progress: Advance | None) -> Fit:
        """Iterate until the centroids rest."""
        variance = self._variance()
        iterations = 0
        with worker_threads("compute clusters") as pool:
            for iterations in range(1, max_iter + 1):
                moved, old = self.assign(pool)
                self._add(moved, old)
                shift = self._update()
                if progress is not None:
                    progress("iterations", iterations, max_iter)
                if shift <= tol * variance:
                    break
            self.assign(pool)
        return self._result(iterations)

    def _variance(self) -> float:
        """Mean variance of the columns, by blocks: numpy's takes twice the matrix in addition."""
        total = np.zeros(self.vectors.shape[1])
        for start in range(0, len(self.vectors), _SUM_ROWS):
            total += self.vectors[start : start + _SUM_ROWS].sum(axis=0, dtype=np.float64)
        mean = total / len(self.vectors)
        squares = float(self.squares.sum(dtype=np.float64)) / len(self.vectors)
        return max(0.0, squares - float(mean @ mean)) / len(mean)

    def assign(self, pool: ThreadPoolExecutor) -> tuple[Positions, Labels]:
        """Give every row its nearest centroid; return the rows that moved, and from where."""
        half = 0.5 * np.einsum("ij,ij->i", self.centroids, self.centroids)
        transposed = np.ascontiguousarray(self.centroids.T)

        def work(start: int) -> tuple[Positions, Labels]:
            return self._assign_block(start, half, transposed)

        nothing = np.empty(0, np.int64), np.empty(0, np.int32)
        moved = [nothing, *pool.map(work, range(0, len(self.vectors), self.block))]
        rows, old = zip(*moved, strict=True)
        return np.concatenate(rows), np.concatenate(old)

    def _assign_block(
        self, start: int, half: Vectors, transposed: Vectors
    ) -> tuple[Positions, Labels]:
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

    def _add(self, rows: Positions, old: Labels) -> None:
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

    def _furthest(self, number: int) -> Positions:
        """Rows furthest from their centroids, in which empty clusters start again."""
        squared = squared_distances(self.vectors, self.centroids, self.labels)
        return np.argsort(-squared, kind="stable")[:number]

    def _result(self, iterations: int) -> Fit:
        squared = squared_distances(self.vectors, self.centroids, self.labels)
        present, labels = np.unique(self.labels, return_inverse=True)
        distances, inertia = in_metric(squared, self.spherical), squared.sum(dtype=np.float64)
        fit = Fit(labels.astype(np.int32), self.centroids[present], distances, float(inertia))
        return replace(fit, details={"method": "memory", "iterations": iterations})
