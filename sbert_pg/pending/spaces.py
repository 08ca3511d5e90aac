"""Whether a vector looks like one of an encoder's, without knowing the text it was made from."""

from __future__ import annotations

import numpy as np

from sbert_pg.spec import Vectors

#: Vectors needed before a judgement; fewer describe nothing.
LEAST = 128
#: Vectors that are remembered.
MOST = 2_048
#: Directions that the space is described by.
DIRECTIONS = 32
#: A vector is foreign if the directions hold less of it than of this share of the encoder's own,
#: and less than half of what they hold of the median.
LOWEST_SHARE = 0.002
#: Factor by which the length may leave the range of the encoder's own.
LENGTH_FACTOR = 1.5


class Space:
    """The directions that an encoder's vectors prefer, learned from some of them.

    Texts of one database lie in a small part of the space: some 32 directions of 384 hold half of a
    sentence encoder's vectors, and a twelfth of another encoder's. That tells a vector of another
    encoder from one of another text, in the mean and not for certain, so in doubt it is not called
    foreign. The half of the vectors that the directions are not taken from says what is usual.

    Args:
        dimensions: width of the vectors.
    """

    def __init__(self, dimensions: int) -> None:
        self._seen = np.empty((0, dimensions), dtype=np.float32)
        self._judge: tuple[Vectors, Vectors, float, float, float] | None = None

    def learn(self, vectors: Vectors) -> None:
        """Take vectors of shape ``(n, dimensions)`` that are the encoder's into account."""
        room = MOST - len(self._seen)
        if room > 0 and len(vectors):
            self._seen = np.concatenate([self._seen, vectors[:room]])
            self._judge = None

    def is_foreign(self, vector: Vectors) -> bool:
        """Whether a vector of shape ``(dimensions,)`` is unlike all that was learned."""
        if len(self._seen) < LEAST or not np.isfinite(vector).all():
            return False
        if self._judge is None:
            self._judge = self._learned()
        mean, directions, least, shortest, longest = self._judge
        length = float(np.linalg.norm(vector))
        if not shortest / LENGTH_FACTOR <= length <= longest * LENGTH_FACTOR:
            return True
        return float(_held(vector[None, :], mean, directions)[0]) < least

    def _learned(self) -> tuple[Vectors, Vectors, float, float, float]:
        even, odd = self._seen[::2], self._seen[1::2]
        mean: Vectors = even.mean(axis=0)
        count = min(DIRECTIONS, len(even) // 4, even.shape[1] // 4)
        directions: Vectors = np.linalg.svd(even - mean, full_matrices=False)[2][: max(count, 1)]
        usual = _held(odd, mean, directions)
        least = min(float(np.quantile(usual, LOWEST_SHARE)), float(np.median(usual)) / 2)
        lengths = np.linalg.norm(self._seen, axis=1)
        return mean, directions, least, float(lengths.min()), float(lengths.max())


def _held(vectors: Vectors, mean: Vectors, directions: Vectors) -> Vectors:
    """The share of each vector, seen from the mean, that the directions hold."""
    centred = vectors - mean
    whole = np.maximum((centred**2).sum(axis=1), 1e-12)
    share: Vectors = ((centred @ directions.T) ** 2).sum(axis=1) / whole
    return share


__all__ = ["Space"]
