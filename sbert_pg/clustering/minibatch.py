"""Mini-batch k-means over blocks from the server, for tables larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from sbert_pg.clustering.algorithms import KMeans
from sbert_pg.clustering.extras import need
from sbert_pg.clustering.kmeans import nearest_centroids, normalize
from sbert_pg.clustering.rowset import RowSet
from sbert_pg.clustering.seeding import (
    SAMPLE_PER_CLUSTER,
    SAMPLE_ROWS,
    choose_seeds,
    distances_in,
    generator,
)
from sbert_pg.clustering.transfer import Keys, Rows, read_blocks, read_rows

Vectors = npt.NDArray[np.float32]
Progress = Callable[[str, int, int | None], None]

#: Rows of one step.
BATCH_ROWS = 4_096
#: Rows that are mixed before they are cut into batches: neighbours in a table are alike.
POOL_ROWS = 65_536
#: Passes over the table at most, whatever ``max_iter`` says: each reads every vector again.
MAX_PASSES = 5
#: Passes after that, each a whole iteration of Lloyd's: they take back what the batches' noise
#: costs.
POLISH_PASSES = 2
#: The passes end when one improves the mean inertia by less than this share.
_IMPROVEMENT = 1e-3
#: Buckets that keys are hashed into, for the sample.
_BUCKETS = 1_000_000


@dataclass(frozen=True, slots=True)
class MiniBatchFit:
    """The result: centroids, and where every row goes.

    Attributes:
        keys: keys of the rows.
        labels: cluster of each row.
        centroids: float32 array of shape ``(k, dimensions)``.
        distances: distance of each row to its centroid.
        passes: passes over the table that were made.
    """

    keys: Keys
    labels: npt.NDArray[np.int32]
    centroids: Vectors
    distances: npt.NDArray[np.float32]
    passes: int


def fit_mini_batch(
    connection: sa.Connection,
    rows: RowSet,
    algorithm: KMeans,
    *,
    seed: int,
    total: int,
    progress: Progress | None = None,
) -> MiniBatchFit:
    """Cluster rows block by block with scikit-learn's ``MiniBatchKMeans``.

    Memory is that of ``POOL_ROWS`` vectors, of the seeding sample, and of a key, a label and a
    distance for each row.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    cluster = need("sklearn.cluster", "run mini-batch k-means")
    random = generator(seed, 0)
    seeds = _seeds(connection, rows, algorithm, seed, total, random)
    model = cluster.MiniBatchKMeans(
        len(seeds),
        init=seeds,
        n_init=1,
        batch_size=BATCH_ROWS,
        random_state=seed % (1 << 32),
        reassignment_ratio=0,
    )
    before, passes, limit = np.inf, 0, min(algorithm.max_iter, MAX_PASSES)
    for passes in range(1, limit + 1):
        inertia, seen = 0.0, 0
        for batch in _batches(connection, rows, random):
            model.partial_fit(batch)
            inertia += _inertia(batch, model.cluster_centers_)
            seen += len(batch)
            if progress is not None:
                progress(f"pass {passes}", seen, total)
        if inertia > (1 - _IMPROVEMENT) * before:
            break
        before = inertia
    centroids = np.asarray(model.cluster_centers_, dtype=np.float32)
    for _ in range(POLISH_PASSES):
        if rows.spherical:
            normalize(centroids)
        centroids = _assigned(connection, rows, centroids, passes)[1]
        passes += 1
    if rows.spherical:
        normalize(centroids)
    return _assigned(connection, rows, centroids, passes)[0]


def _inertia(batch: Vectors, centroids: Vectors) -> float:
    """Sum of squared distances of a batch to its nearest centroids."""
    half = 0.5 * np.einsum("ij,ij->i", centroids, centroids)
    scores = batch @ centroids.T.astype(np.float32) - half
    return float(np.einsum("ij,ij->", batch, batch) - 2 * scores.max(axis=1).sum())


def _seeds(
    connection: sa.Connection,
    rows: RowSet,
    algorithm: KMeans,
    seed: int,
    total: int,
    random: np.random.Generator,
) -> Vectors:
    """Seeds from a sample that hashing the keys draws, the same on every machine."""
    assert isinstance(algorithm.n_clusters, int)
    wanted = max(SAMPLE_PER_CLUSTER * algorithm.n_clusters, SAMPLE_ROWS)
    criteria = list(rows.criteria)
    if total > wanted:
        key = sa.func.concat_ws(" ", *rows.clustering.keys)
        bucket = sa.func.hashtextextended(key, sa.literal(seed, sa.BigInteger)) % _BUCKETS
        criteria.append(sa.func.abs(bucket) < int(_BUCKETS * wanted / total) + 1)
    sample = read_rows(connection, rows.clustering.keys, rows.clustering.column, criteria).vectors
    if rows.spherical:
        normalize(sample)
    chosen = choose_seeds(random, len(sample), algorithm.n_clusters, distances_in(sample))
    return sample[chosen]


def _batches(
    connection: sa.Connection, rows: RowSet, random: np.random.Generator
) -> Iterator[Vectors]:
    pool: list[Vectors] = []
    held = 0
    for block in _blocks(connection, rows):
        pool.append(block.vectors)
        held += len(block.vectors)
        if held >= POOL_ROWS:
            yield from _mixed(pool, random)
            pool, held = [], 0
    if held:
        yield from _mixed(pool, random)


def _mixed(pool: list[Vectors], random: np.random.Generator) -> Iterator[Vectors]:
    vectors = np.concatenate(pool)
    order = random.permutation(len(vectors))
    for start in range(0, len(order), BATCH_ROWS):
        yield vectors[order[start : start + BATCH_ROWS]]


def _blocks(connection: sa.Connection, rows: RowSet) -> Iterator[Rows]:
    clustering = rows.clustering
    for block in read_blocks(connection, clustering.keys, clustering.column, rows.criteria):
        if rows.spherical:
            normalize(block.vectors)
        yield block


def _assigned(
    connection: sa.Connection, rows: RowSet, centroids: Vectors, passes: int
) -> tuple[MiniBatchFit, Vectors]:
    """Where every row goes; and the means of the clusters that this gives."""
    keys: list[Keys] = []
    labels: list[Any] = [np.empty(0, np.int32)]
    distances: list[Any] = [np.empty(0, np.float32)]
    sums = np.zeros(centroids.shape)
    counts = np.zeros(len(centroids), dtype=np.int64)
    for block in _blocks(connection, rows):
        found, distance = nearest_centroids(block.vectors, centroids, spherical=rows.spherical)
        keys.append(block.keys)
        labels.append(found)
        distances.append(distance)
        counts += np.bincount(found, minlength=len(centroids))
        for number in np.unique(found):
            sums[number] += block.vectors[found == number].sum(axis=0, dtype=np.float64)
    means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
    fit = MiniBatchFit(
        Keys.joined(keys, len(rows.clustering.keys)),
        np.concatenate(labels),
        centroids,
        np.concatenate(distances),
        passes,
    )
    return fit, means.astype(np.float32)


__all__ = ["MiniBatchFit", "fit_mini_batch"]
