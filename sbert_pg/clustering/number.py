"""How many clusters k-means makes: the numbers that are tried, and by what one is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from sbert_pg.clustering.kmeans import Fit, fit_kmeans
from sbert_pg.progress import Advance
from sbert_pg.spec import Vectors

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

    def __init__(
        self,
        vectors: Vectors,
        options: dict[str, Any],
        progress: Advance | None,
    ) -> None:
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
