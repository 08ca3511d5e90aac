"""From rows in memory to clusters: every algorithm gives the same kind of result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sbert_pg.clustering.algorithms import (
    HDBSCAN,
    Agglomerative,
    Algorithm,
    Communities,
    KMeans,
)
from sbert_pg.clustering.communities import find_communities
from sbert_pg.clustering.extras import need
from sbert_pg.clustering.kmeans import fit_kmeans, nearest_centroids, normalize
from sbert_pg.errors import ClusteringError

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Progress = Callable[[str, int, int | None], None]

#: Rows by which the silhouette is measured.
CRITERION_ROWS = 5_000
#: Bytes that agglomerative clustering takes for each pair of rows.
_BYTES_PER_PAIR = 8


@dataclass(frozen=True, slots=True)
class Fit:
    """Clusters of rows.

    Attributes:
        labels: cluster of each row, or -1.
        centroids: float32 array of shape ``(k, dimensions)``.
        distances: distance of each row to its centroid, of outliers to the nearest.
        inertia: sum of squared euclidean distances to the centroids, outliers left out.
        score: value of the criterion, where the number of clusters was chosen by it.
        curve: the numbers that were tried.
        details: what a run records beside the parameters.
    """

    labels: Labels
    centroids: Vectors
    distances: npt.NDArray[np.float32]
    inertia: float
    score: float | None = None
    curve: list[dict[str, Any]] | None = None
    details: dict[str, Any] = field(default_factory=dict)


def fit_in_memory(
    vectors: Vectors,
    algorithm: Algorithm,
    *,
    seed: int,
    spherical: bool,
    max_memory: int,
    progress: Progress | None = None,
) -> Fit:
    """Cluster vectors with any of the algorithms.

    Args:
        vectors: float32 array of shape ``(n, dimensions)``; normalised in place where spherical.
        algorithm: the algorithm.
        seed: seed of its draws.
        spherical: whether vectors count by their direction.
        max_memory: bytes that may be taken beside the vectors.
        progress: called with what is done, how much of it, and of how much.

    Raises:
        ClusteringError: the algorithm needs more memory than it may take.
        MissingExtraError: scikit-learn is needed and not installed.
    """
    if spherical:
        normalize(vectors)
    if isinstance(algorithm, KMeans):
        return _kmeans(vectors, algorithm, seed, spherical, progress)
    if isinstance(algorithm, HDBSCAN):
        labels = _hdbscan(vectors, algorithm, seed)
    elif isinstance(algorithm, Communities):
        unit = vectors if spherical else normalize(vectors.copy())
        labels = find_communities(unit, algorithm.threshold, algorithm.min_size)
    else:
        labels = _agglomerative(vectors, algorithm, spherical, max_memory)
    return _from_labels(vectors, labels, spherical)


def _kmeans(
    vectors: Vectors,
    algorithm: KMeans,
    seed: int,
    spherical: bool,
    progress: Progress | None,
) -> Fit:
    candidates = algorithm.candidates(len(vectors))
    best: Fit | None = None
    curve: list[dict[str, Any]] = []
    for number, n_clusters in enumerate(candidates):
        found = fit_kmeans(
            vectors,
            n_clusters,
            seed=seed,
            n_init=algorithm.n_init,
            max_iter=algorithm.max_iter,
            tol=algorithm.tol,
            spherical=spherical,
            progress=progress if len(candidates) == 1 else None,
        )
        fit = Fit(
            found.labels,
            found.centroids,
            found.distances,
            found.inertia,
            details={"method": "memory", "iterations": found.iterations},
        )
        if len(candidates) == 1:
            return fit
        score = _score(vectors, found.labels, algorithm, seed, spherical)
        curve.append({"n_clusters": n_clusters, "score": score, "inertia": found.inertia})
        if progress is not None:
            progress("numbers of clusters", number + 1, len(candidates))
        if best is None or score > (best.score or -np.inf):
            best = replace(fit, score=score)
    assert best is not None
    return replace(best, curve=curve)


def _score(
    vectors: Vectors, labels: Labels, algorithm: KMeans, seed: int, spherical: bool
) -> float:
    metrics = need("sklearn.metrics", "choose the number of clusters")
    if algorithm.criterion == "calinski_harabasz":
        if not 1 < len(np.unique(labels)) < len(vectors):
            return 0.0
        return float(metrics.calinski_harabasz_score(vectors, labels))
    if len(vectors) > CRITERION_ROWS:
        chosen = np.random.default_rng(seed).choice(len(vectors), CRITERION_ROWS, replace=False)
        vectors, labels = vectors[chosen], labels[chosen]
    if not 1 < len(np.unique(labels)) < len(vectors):
        return -1.0
    metric = "cosine" if spherical else "euclidean"
    return float(metrics.silhouette_score(vectors, labels, metric=metric))


def _hdbscan(vectors: Vectors, algorithm: HDBSCAN, seed: int) -> Labels:
    cluster = need("sklearn.cluster", "run HDBSCAN")
    if len(vectors) < max(algorithm.min_cluster_size, algorithm.min_samples or 2):
        return np.full(len(vectors), -1, dtype=np.int32)
    reduced = vectors
    if algorithm.components is not None and algorithm.components < min(vectors.shape):
        decomposition = need("sklearn.decomposition", "run HDBSCAN")
        reduced = decomposition.PCA(algorithm.components, random_state=seed).fit_transform(vectors)
    found = cluster.HDBSCAN(
        min_cluster_size=algorithm.min_cluster_size,
        min_samples=algorithm.min_samples,
        cluster_selection_method=algorithm.selection,
        copy=False,
    ).fit(reduced)
    return np.where(found.labels_ < 0, -1, found.labels_).astype(np.int32)


def _agglomerative(
    vectors: Vectors, algorithm: Agglomerative, spherical: bool, max_memory: int
) -> Labels:
    cluster = need("sklearn.cluster", "run agglomerative clustering")
    needed = len(vectors) ** 2 * _BYTES_PER_PAIR
    if needed > max_memory:
        raise ClusteringError(
            f"Agglomerative clustering of {len(vectors):,} rows takes about {needed / 1e9:.1f} GB, "
            f"and max_memory is {max_memory / 1e9:.1f} GB. Filter the rows, raise max_memory, or "
            "use Communities(), which takes no distance matrix."
        )
    if len(vectors) < 2:
        return np.zeros(len(vectors), dtype=np.int32)
    found = cluster.AgglomerativeClustering(
        n_clusters=None,
        distance_threshold=algorithm.distance_threshold,
        linkage=algorithm.linkage,
        metric="cosine" if spherical else "euclidean",
    ).fit(vectors)
    return np.asarray(found.labels_, dtype=np.int32)


def _from_labels(vectors: Vectors, labels: Labels, spherical: bool) -> Fit:
    """Centroids, as means, and distances to them; clusters are numbered from the largest."""
    counts = np.bincount(labels[labels >= 0])
    order = np.argsort(-counts, kind="stable")
    rank = np.full(len(counts) + 1, -1, dtype=np.int32)
    rank[order] = np.arange(len(counts))
    labels = rank[labels]
    details = {"method": "memory"}
    if len(counts) == 0:
        nothing = np.empty((0, vectors.shape[1]), dtype=np.float32)
        far = np.ones(len(vectors), dtype=np.float32)
        return Fit(labels, nothing, far, 0.0, details=details)
    centroids = np.stack(
        [vectors[labels == number].mean(axis=0) for number in range(len(counts))]
    ).astype(np.float32)
    if spherical:
        normalize(centroids)
    distances = _distances(vectors, centroids, labels, spherical)
    inside = distances[labels >= 0].astype(np.float64)
    inertia = float((2 * inside if spherical else inside**2).sum())
    return Fit(labels, centroids, distances, inertia, details=details)


def _distances(
    vectors: Vectors, centroids: Vectors, labels: Labels, spherical: bool
) -> npt.NDArray[np.float32]:
    distances = np.empty(len(vectors), dtype=np.float32)
    members = labels >= 0
    difference = vectors[members] - centroids[labels[members]]
    squared = np.einsum("ij,ij->i", difference, difference)
    distances[members] = squared / 2 if spherical else np.sqrt(squared)
    if not members.all():
        outside = np.ascontiguousarray(vectors[~members])
        distances[~members] = nearest_centroids(outside, centroids, spherical=spherical)[1]
    return distances
