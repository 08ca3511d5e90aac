"""The algorithms and their parameters; a run records them as they stand here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from sbert_pg.errors import DeclarationError

Method = Literal["auto", "memory", "database", "mini-batch"]
Criterion = Literal["silhouette", "calinski_harabasz"]
Linkage = Literal["average", "complete", "single"]

#: Factor between two numbers of clusters that are tried when none is given.
_STEP = 1.5
#: Most clusters that are tried when none is given.
_MOST = 200


@dataclass(frozen=True, slots=True)
class KMeans:
    """k-means, spherical under cosine.

    Attributes:
        n_clusters: clusters wanted; or several numbers, or ``"auto"``, among which the criterion
            chooses. ``"auto"`` tries 2, 3, 5, 8, 12... up to 200 and to a tenth of the rows.
        method: where it is computed. ``"memory"`` reads the vectors into this process;
            ``"database"`` leaves them in the server; ``"mini-batch"`` reads them in blocks, again
            and again. ``"auto"`` is memory where the vectors fit into ``max_memory`` of the run,
            else mini-batch.
        n_init: starts, of which the one with the least inertia wins.
        max_iter: iterations of a start at most; passes over the table for mini-batch.
        tol: a start ends when the centroids' squared shift falls below this share of the variance.
        criterion: ``"silhouette"`` (mean of a sample of 5,000 rows) or ``"calinski_harabasz"``.
    """

    name: ClassVar[str] = "kmeans"

    n_clusters: int | Sequence[int] | Literal["auto"] = "auto"
    method: Method = "auto"
    n_init: int = 1
    max_iter: int = 300
    tol: float = 1e-4
    criterion: Criterion = "silhouette"

    def __post_init__(self) -> None:
        _one_of(self, "method", get_args(Method))
        _one_of(self, "criterion", get_args(Criterion))
        _at_least(self, "n_init", 1)
        _at_least(self, "max_iter", 1)
        _at_least(self, "tol", 0)
        if self.n_clusters == "auto":
            numbers: Sequence[int] = (2,)
        elif isinstance(self.n_clusters, int):
            numbers = (self.n_clusters,)
        else:
            numbers = tuple(self.n_clusters)
            object.__setattr__(self, "n_clusters", numbers)
        if not numbers or any(not isinstance(number, int) or number < 1 for number in numbers):
            raise DeclarationError(
                f"KMeans: n_clusters is {self.n_clusters!r}; give a number from 1, several, or "
                "'auto'."
            )
        if self.method in ("database", "mini-batch") and not isinstance(self.n_clusters, int):
            raise DeclarationError(
                f"KMeans: the method {self.method!r} needs one number of clusters, and n_clusters "
                f"is {self.n_clusters!r}. Choose it in memory first, on a part of the rows."
            )

    def candidates(self, rows: int) -> tuple[int, ...]:
        """Numbers of clusters to try; one if it is given."""
        if isinstance(self.n_clusters, int):
            return (self.n_clusters,)
        if self.n_clusters != "auto":
            return tuple(sorted(set(self.n_clusters)))
        found, number = [], 2.0
        while round(number) <= max(2, min(_MOST, rows // 10)):
            found.append(round(number))
            number *= _STEP
        return tuple(found)


@dataclass(frozen=True, slots=True)
class HDBSCAN:
    """HDBSCAN: finds its own number of clusters, and leaves rows out as outliers.

    Attributes:
        min_cluster_size: rows that make a cluster, at least.
        min_samples: neighbours that make a row dense; ``min_cluster_size`` by default.
        components: principal components that the vectors are reduced to first, or ``None``. In
            hundreds of dimensions distances differ too little for densities to be told apart.
        selection: ``"eom"`` prefers few large clusters, ``"leaf"`` many small ones.
    """

    name: ClassVar[str] = "hdbscan"

    min_cluster_size: int = 10
    min_samples: int | None = None
    components: int | None = 15
    selection: Literal["eom", "leaf"] = "eom"

    def __post_init__(self) -> None:
        _at_least(self, "min_cluster_size", 2)
        _at_least(self, "min_samples", 1)
        _at_least(self, "components", 1)
        _one_of(self, "selection", ("eom", "leaf"))


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
        distance_threshold: distance above which clusters are not joined, in the run's metric.
        linkage: ``"average"``, ``"complete"`` or ``"single"`` distance of two clusters' rows.
    """

    name: ClassVar[str] = "agglomerative"

    distance_threshold: float = 0.6
    linkage: Linkage = "average"

    def __post_init__(self) -> None:
        _at_least(self, "distance_threshold", 0)
        _one_of(self, "linkage", get_args(Linkage))


Algorithm = KMeans | HDBSCAN | Communities | Agglomerative
ALGORITHMS: dict[str, type[Any]] = {
    cls.name: cls for cls in (KMeans, HDBSCAN, Communities, Agglomerative)
}


def parameters_of(algorithm: Algorithm) -> dict[str, Any]:
    """The parameters as a run records them."""
    return asdict(algorithm)


def _one_of(algorithm: Any, name: str, allowed: Sequence[str]) -> None:
    value = getattr(algorithm, name)
    if value not in allowed:
        raise DeclarationError(
            f"{type(algorithm).__name__}: {name} is {value!r}; use one of {', '.join(allowed)}."
        )


def _at_least(algorithm: Any, name: str, least: float) -> None:
    value = getattr(algorithm, name)
    if value is not None and value < least:
        raise DeclarationError(
            f"{type(algorithm).__name__}: {name} is {value}; it starts at {least}."
        )
