"""The algorithms: their parameters, as a run records them, and what they make of rows in memory.

Long, since k-means has its choice of a number beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from sbert_pg.clustering.kmeans import (
    Fit,
    Labels,
    fit_kmeans,
    in_metric,
    nearest_centroids,
    need,
    normalize,
    squared_distances,
)
from sbert_pg.errors import ClusteringError, DeclarationError
from sbert_pg.progress import Advance
from sbert_pg.spec import Vectors

Method = Literal["auto", "memory", "database", "blocks"]

#: Rows that the number is chosen by. More of them bear out ever finer clusters, too many to read.
CHOICE_ROWS = 5_000
#: Factor between two numbers that are tried when none is given.
_STEP = 1.5
#: Numbers tried in vain, one after the other, before larger ones are given up.
_IN_VAIN = 2
#: Share of a number up to which its neighbours are tried.
_NEAR = 0.1
#: Share of the rows' spread that is rounding.
_ROUNDING = 1e-6
#: Elements of one block's matrix of similarities.
_BLOCK_ELEMENTS = 1 << 25
#: Bytes that agglomerative clustering takes for each pair of rows.
_BYTES_PER_PAIR = 8


@dataclass(frozen=True, slots=True)
class KMeans:
    """k-means, spherical under cosine.

    Attributes:
        n_clusters: how many; or several numbers, or ``"auto"``, of which the one is
            chosen that describes a sample of 5,000 rows best: how much better than one cluster of
            all does, in nats, less what each further cluster takes to be described (the Bayesian
            information criterion). ``"auto"`` tries 2, 3, 4, 7, 10, 15... until that
            is in vain, and then the numbers near the best.
        method: where it is computed. ``"memory"`` reads the vectors into this process;
            ``"database"`` leaves them in the server; ``"blocks"`` clusters a sample and reads them
            all, in blocks, a few times. ``"auto"`` is memory where the vectors fit into
            ``max_memory`` of the run, else blocks.
        n_init: starts, of which the one with the least inertia wins.
        max_iter: iterations of a start at most; passes over the table for blocks.
        tol: a start ends when the centroids' squared shift falls below this share of the variance.
    """

    name: ClassVar[str] = "kmeans"

    n_clusters: int | Sequence[int] | Literal["auto"] = "auto"
    method: Method = "auto"
    n_init: int = 1
    max_iter: int = 300
    tol: float = 1e-4

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            methods = ", ".join(get_args(Method))
            raise DeclarationError(f"KMeans: method is {self.method!r}; use one of {methods}.")
        _at_least(self, "n_init", 1)
        _at_least(self, "max_iter", 1)
        _at_least(self, "tol", 0)
        if self.n_clusters == "auto":
            numbers: Sequence[int] = (2,)
        elif isinstance(self.n_clusters, int):
            numbers = (self.n_clusters,)
        else:
            numbers = tuple(sorted(set(self.n_clusters)))
        if not numbers or any(not isinstance(number, int) or number < 1 for number in numbers):
            raise DeclarationError(
                f"KMeans: n_clusters is {self.n_clusters!r}; give a number from 1, several, or "
                "'auto'."
            )
        if not isinstance(self.n_clusters, (int, str)):
            object.__setattr__(self, "n_clusters", numbers)
        if self.method == "database" and not isinstance(self.n_clusters, int):
            raise DeclarationError(
                f"KMeans: the method {self.method!r} needs one number of clusters, and n_clusters "
                f"is {self.n_clusters!r}. Choose it in memory or blocks first."
            )


@dataclass(frozen=True, slots=True)
class HDBSCAN:
    """HDBSCAN: finds its own number of clusters, and leaves rows out as outliers.

    Attributes:
        min_cluster_size: rows that make a cluster, at least.
        min_samples: neighbours that make a row dense. More of them, as many as
            ``min_cluster_size`` in other libraries, leave a large cluster of everything and a small
            one of sentences.
        components: principal components that the vectors are reduced to first, or ``None``. In
            hundreds of dimensions distances differ too little for densities to be distinguished.
            Where vectors count by their direction, that of the components does too.
    """

    name: ClassVar[str] = "hdbscan"

    min_cluster_size: int = 10
    min_samples: int = 2
    components: int | None = 15

    def __post_init__(self) -> None:
        _at_least(self, "min_cluster_size", 2)
        _at_least(self, "min_samples", 1)
        _at_least(self, "components", 1)


@dataclass(frozen=True, slots=True)
class Communities:
    """Communities above a similarity, as sentence-transformers' ``community_detection``.

    Every member of a community is at least this similar to its central row. Communities do not
    overlap; larger ones come first. Rows in none are outliers.

    Attributes:
        threshold: least cosine similarity.
        min_size: rows that make a community, at least.
    """

    name: ClassVar[str] = "communities"

    threshold: float = 0.75
    min_size: int = 10

    def __post_init__(self) -> None:
        _at_least(self, "min_size", 1)
        if not -1 <= self.threshold <= 1:
            raise DeclarationError(
                f"Communities: threshold is {self.threshold}; a cosine lies between -1 and 1."
            )


@dataclass(frozen=True, slots=True)
class Agglomerative:
    """Agglomerative clustering up to a distance. Memory grows with the square of the rows.

    Attributes:
        distance_threshold: mean distance of their rows above which clusters are not joined, in the
            run's metric.
    """

    name: ClassVar[str] = "agglomerative"

    distance_threshold: float = 0.6

    def __post_init__(self) -> None:
        _at_least(self, "distance_threshold", 0)


Algorithm = KMeans | HDBSCAN | Communities | Agglomerative


def _at_least(algorithm: Any, name: str, least: float) -> None:
    value = getattr(algorithm, name)
    if value is not None and value < least:
        raise DeclarationError(
            f"{type(algorithm).__name__}: {name} is {value}; it starts at {least}."
        )


def fit_in_memory(
    vectors: Vectors,
    algorithm: Algorithm,
    *,
    seed: int,
    spherical: bool,
    max_memory: int,
    progress: Advance | None = None,
) -> Fit:
    """Cluster float32 vectors of shape ``(n, dimensions)``, normalised in place where spherical.

    ``max_memory`` are the bytes that may be taken beside the vectors.
    """
    if spherical:
        normalize(vectors)
    if isinstance(algorithm, KMeans):
        options: dict[str, Any] = {"seed": seed, "spherical": spherical, "progress": progress}
        options |= {name: getattr(algorithm, name) for name in ("n_init", "max_iter", "tol")}
        if isinstance(algorithm.n_clusters, int):
            return fit_kmeans(vectors, algorithm.n_clusters, **options)
        return choose_number(vectors, algorithm.n_clusters, **options)
    if isinstance(algorithm, HDBSCAN):
        labels = _hdbscan(vectors, algorithm, seed, spherical)
    elif isinstance(algorithm, Communities):
        unit = vectors if spherical else normalize(vectors.copy())
        labels = find_communities(unit, algorithm.threshold, algorithm.min_size)
    else:
        labels = _agglomerative(vectors, algorithm, spherical, max_memory)
    return _from_labels(vectors, labels, spherical)


def _hdbscan(vectors: Vectors, algorithm: HDBSCAN, seed: int, spherical: bool) -> Labels:
    cluster = need("sklearn.cluster", "run HDBSCAN")
    if len(vectors) < max(algorithm.min_cluster_size, algorithm.min_samples):
        return np.full(len(vectors), -1, dtype=np.int32)
    reduced = vectors
    if algorithm.components is not None and algorithm.components < min(vectors.shape):
        decomposition = need("sklearn.decomposition", "run HDBSCAN")
        reduced = decomposition.PCA(algorithm.components, random_state=seed).fit_transform(vectors)
        if spherical:
            normalize(reduced)
    model = cluster.HDBSCAN(
        min_cluster_size=algorithm.min_cluster_size,
        min_samples=algorithm.min_samples,
        copy=False,
    ).fit(reduced)
    labels = np.where(model.labels_ < 0, -1, model.labels_).astype(np.int32)
    return _same_for_equal_rows(vectors, labels)


def _same_for_equal_rows(vectors: Vectors, labels: Labels) -> Labels:
    """Give equal rows the label that most of them have: distances of zero make densities infinite,
    and scikit-learn cuts many equal rows into several clusters.
    """
    _, group = np.unique(vectors, axis=0, return_inverse=True)
    pairs = np.stack([group.ravel(), labels], axis=1)
    votes, counts = np.unique(pairs, axis=0, return_counts=True)
    votes = votes[np.lexsort((-counts, votes[:, 0]))]
    _, first = np.unique(votes[:, 0], return_index=True)
    chosen: Labels = votes[first, 1].astype(np.int32)
    return chosen[group.ravel()]


def find_communities(vectors: Vectors, threshold: float, min_size: int) -> Labels:
    """Number the communities of unit vectors, from the largest, by blocks; -1 for rows in none.

    The same as sentence-transformers' ``util.community_detection``: rows with at least ``min_size``
    rows above the threshold are centres, larger communities come first, a row goes to the first
    that has it, and a centre that is taken does not make a community. Takes memory for the pairs
    above the threshold: 4 bytes each, both ways.
    """
    n = len(vectors)
    communities: list[tuple[int, npt.NDArray[np.int32]]] = []
    step = max(1, _BLOCK_ELEMENTS // max(n, 1))
    for start in range(0, n, step):
        similar = vectors[start : start + step] @ vectors.T >= threshold
        counts = similar.sum(axis=1)
        for offset in np.flatnonzero(counts >= min_size):
            members = np.flatnonzero(similar[offset]).astype(np.int32)
            communities.append((start + int(offset), members))
    communities.sort(key=lambda community: (-len(community[1]), community[0]))
    return _without_overlap(communities, n, min_size)


def _without_overlap(
    communities: list[tuple[int, npt.NDArray[np.int32]]], n: int, min_size: int
) -> Labels:
    labels: Labels = np.full(n, -1, dtype=np.int32)
    kept: list[npt.NDArray[np.int32]] = []
    for center, members in communities:
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
    model = cluster.AgglomerativeClustering(
        n_clusters=None,
        distance_threshold=algorithm.distance_threshold,
        linkage="average",
        metric="cosine" if spherical else "euclidean",
    ).fit(vectors)
    return np.asarray(model.labels_, dtype=np.int32)


def _from_labels(vectors: Vectors, labels: Labels, spherical: bool) -> Fit:
    """Centroids, as means, and distances to them; clusters are numbered from the largest."""
    counts = np.bincount(labels[labels >= 0])
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    rank = np.full(len(counts) + 1, -1, dtype=np.int32)
    rank[order] = np.arange(len(order))
    labels = rank[labels]
    details = {"method": "memory"}
    distances = np.ones(len(vectors), dtype=np.float32)
    if len(order) == 0:
        nothing = np.empty((0, vectors.shape[1]), dtype=np.float32)
        return Fit(labels, nothing, distances, 0.0, details=details)
    centroids = np.stack(
        [vectors[labels == number].mean(axis=0) for number in range(len(order))]
    ).astype(np.float32)
    if spherical:
        normalize(centroids)
    members = labels >= 0
    squared = squared_distances(vectors[members], centroids, labels[members])
    distances[members] = in_metric(squared, spherical)
    if not members.all():
        outside = np.ascontiguousarray(vectors[~members])
        distances[~members] = nearest_centroids(outside, centroids, spherical=spherical)[1]
    inertia = float(squared.sum(dtype=np.float64))
    return Fit(labels, centroids, distances, inertia, details=details)


def choose_number(
    vectors: Vectors,
    numbers: Sequence[int] | Literal["auto"],
    *,
    seed: int,
    spherical: bool,
    progress: Advance | None,
    **options: Any,
) -> Fit:
    """The best of several numbers of clusters, and the clusters of all rows, with the curve.

    The numbers are compared on a sample of 5,000 rows. ``"auto"`` tries 2, 3, 4, 7, 10, 15... until
    two of them are not better than the best so far, and then those near the best.
    """
    sample = vectors
    if len(vectors) > CHOICE_ROWS:
        chosen = np.random.default_rng(seed).choice(len(vectors), CHOICE_ROWS, replace=False)
        sample = vectors[np.sort(chosen)]
    options |= {"seed": seed, "spherical": spherical}
    choice = _Choice(sample, options, progress)
    if numbers == "auto":
        choice.climb()
        choice.refine()
    else:
        for number in numbers:
            choice.attempt(number, len(numbers))
    fit = choice.best
    if sample is not vectors:
        fit = fit_kmeans(vectors, choice.number, progress=progress, **options)
    curve = [choice.curve[number] for number in sorted(choice.curve)]
    return replace(fit, score=choice.curve[choice.number]["score"], curve=curve)


class _Choice:
    """What was tried so far."""

    def __init__(self, vectors: Vectors, options: dict[str, Any], progress: Advance | None) -> None:
        self._vectors, self._options, self._progress = vectors, options, progress
        self._whole = fit_kmeans(vectors, 1, **options)
        self.curve: dict[int, dict[str, Any]] = {}
        self.number = 0
        self.best: Fit

    def attempt(self, number: int, total: int | None = None) -> bool:
        """Try a number of clusters; whether it is the best so far."""
        fit = fit_kmeans(self._vectors, number, **self._options)
        score = _gain(fit, self._whole, self._options["spherical"])
        is_best = not self.curve or score > self.curve[self.number]["score"]
        if is_best:
            self.number, self.best = number, fit
        self.curve[number] = {"n_clusters": number, "score": score, "inertia": fit.inertia}
        if self._progress is not None:
            self._progress("numbers of clusters", len(self.curve), total)
        return is_best

    def climb(self) -> None:
        """Try larger and larger numbers, up to a quarter of the rows, until they are in vain."""
        number, in_vain = 2.0, 0
        while not self.curve or (in_vain < _IN_VAIN and round(number) <= len(self._vectors) // 4):
            in_vain = 0 if self.attempt(round(number)) else in_vain + 1
            number *= _STEP

    def refine(self) -> None:
        """Try the middle between the best and its neighbours, until they are near."""
        while True:
            tried = sorted(self.curve)
            place = tried.index(self.number)
            ends = tried[max(0, place - 1) : place + 2]
            near = max(1, int(_NEAR * self.number))
            middles = [(a + b) // 2 for a, b in pairwise(ends) if b - a > near]
            if not middles:
                return
            for number in middles:
                self.attempt(number)


def _gain(fit: Fit, whole: Fit, spherical: bool) -> float:
    """How much better clusters describe a row than one cluster of all rows does, in nats.

    Half the difference of the Bayesian information criteria of round normal distributions of one
    width (Pelleg and Moore 2000, "X-means"), for each row: what the rows lie nearer to their
    means, less what it takes to say which is theirs and where the means are.
    """
    spread, spread_of_whole = _spread(fit, spherical), _spread(whole, spherical)
    if spread_of_whole <= 0:
        return 0.0
    rows, dimensions = len(fit.labels), fit.centroids.shape[1]
    shares = np.bincount(fit.labels) / rows
    nearer = -dimensions / 2 * math.log(max(spread / spread_of_whole, _ROUNDING))
    whose = -float((shares * np.log(shares)).sum())
    where = (len(shares) - 1) * (dimensions + 1) * math.log(rows) / (2 * rows)
    return float(nearer - whose - where)


def _spread(fit: Fit, spherical: bool) -> float:
    """Squared distances of the rows to the means of their clusters, in all."""
    if not spherical:
        return fit.inertia
    # The mean of unit vectors is as long as their mean similarity to its direction.
    sizes = np.bincount(fit.labels)
    lengths = np.bincount(fit.labels, 1 - fit.distances.astype(np.float64)) / sizes
    return float((sizes * (1 - lengths**2)).sum())
