"""Clusters of real texts against ground truth, beside scikit-learn on the same vectors."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg.clustering import cluster as run
from sbert_pg.clustering.algorithms import HDBSCAN, Communities, KMeans, fit_in_memory
from sbert_pg.clustering.kmeans import fit_kmeans, normalize

cluster = pytest.importorskip("sklearn.cluster")
metrics = pytest.importorskip("sklearn.metrics")
make_app = sys.modules["clustering_app"].make_app


def read(path: Path, text: str, label: str, delimiter: str) -> tuple[list[str], list[str]]:
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))
    return [row[text] for row in rows], [row[label] for row in rows]


def compare(vectors: np.ndarray, labels: list[str], seeds: int) -> tuple[float, float]:
    """Mean V-measure over seeds: ours, scikit-learn's."""
    number = len(set(labels))
    ours, theirs = [], []
    for seed in range(seeds):
        fit = fit_kmeans(vectors, number, seed=seed)
        ours.append(metrics.v_measure_score(labels, fit.labels))
        found = cluster.KMeans(number, n_init=1, random_state=seed).fit(vectors)
        theirs.append(metrics.v_measure_score(labels, found.labels_))
    return float(np.mean(ours)), float(np.mean(theirs))


def topics(rows: int, number: int, spread: float) -> np.ndarray:
    """Rows around random directions, some of them far away."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((number, 64))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    far = spread * random.exponential(1, (rows, 1)) * random.standard_normal((rows, 64))
    return normalize((directions[np.arange(rows) % number] + far).astype(np.float32))


def clustered(vectors: np.ndarray, algorithm: Any) -> Any:
    return fit_in_memory(vectors, algorithm, seed=0, spherical=True, max_memory=2 << 30)


def test_the_best_number_is_none_of_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbert_pg.clustering.algorithms.CHOICE_ROWS", 600)
    fit = clustered(topics(1_800, 12, 0.1), KMeans())
    numbers = [point["n_clusters"] for point in fit.curve]
    assert numbers == sorted(set(numbers))
    best = numbers.index(len(fit.centroids))
    assert 10 <= numbers[best] <= 14
    # Its neighbours were tried, and what is larger was given up before a quarter of the rows.
    assert numbers[best + 1] - numbers[best - 1] <= 3
    assert numbers[-1] < 60
    assert len(fit.labels) == 1_800


def test_density_leaves_few_rows_of_plain_topics_out() -> None:
    fit = clustered(topics(1_200, 30, 0.15), HDBSCAN())
    assert len(fit.centroids) == 30
    assert (fit.labels >= 0).mean() > 0.8


@pytest.mark.slow
def test_banking77(minilm: Any, data_dir: Path) -> None:
    texts, labels = read(data_dir / "banking77" / "test.csv", "text", "category", ",")
    vectors = normalize(minilm.encode_document(texts))
    ours, theirs = compare(vectors, labels, 10)
    found = {"ours": ours, "scikit-learn": theirs}
    for algorithm in (KMeans(77), HDBSCAN(5), Communities(0.75, 5)):
        fit = clustered(vectors, algorithm)
        inside = fit.labels >= 0
        found[algorithm.name] = metrics.v_measure_score(labels, fit.labels)
        found[f"{algorithm.name} covers"] = float(inside.mean())
    print("banking77", {name: round(value, 4) for name, value in found.items()})
    assert ours >= theirs - 0.01
    assert ours > 0.77


def test_more_clusters_than_rows_that_are_nearly_alike() -> None:
    """Distances of a row to itself, which rounding leaves, made one row the seed of several."""
    random = np.random.default_rng(0)
    near = normalize((1 + 0.2 * random.standard_normal((50, 384))).astype(np.float32))
    fit = fit_kmeans(near, 1_000)
    assert sorted(fit.labels) == list(range(50))
    assert fit.inertia < 1e-4


@pytest.mark.slow
def test_blocks_stay_within_their_bound(
    engine: sa.Engine, minilm: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbert_pg.clustering.out_of_core.BLOCK_SAMPLE", 1_000)
    texts, _ = read(data_dir / "banking77" / "test.csv", "text", "category", ",")
    vectors = normalize(minilm.encode_document(texts))
    app = make_app(dimensions=vectors.shape[1])
    app.fill(engine, vectors)
    for number in (5, 20, 77):
        full = min(fit_kmeans(vectors, number, seed=seed).inertia for seed in range(3))
        for seed in range(3):
            found = run(engine, app.topics, KMeans(number, method="blocks"), seed=seed)
            bound, sample = (found.parameters[name] for name in ("excess_bound", "sample"))
            assert 800 < sample < 1_200
            print(number, found.inertia / full - 1, bound)
            assert found.inertia / full - 1 <= bound < 1.5


@pytest.mark.slow
def test_sib200(minilm: Any, data_dir: Path) -> None:
    for language, floor in (("eng", 0.4), ("fra", 0.27)):
        texts, labels = [], []
        for path in sorted((data_dir / "sib200").glob(f"*{language}*.tsv")):
            more, theirs = read(path, "text", "category", "\t")
            texts += more
            labels += theirs
        assert len(texts) > 900
        vectors = normalize(minilm.encode_document(texts))
        # One start's V-measure has a standard deviation of .04 here: ten of them say nothing about
        # hundredths, for either side.
        ours, reference = compare(vectors, labels, 60)
        print("sib200", language, round(ours, 4), round(reference, 4))
        assert ours >= reference - 0.01
        assert ours > floor
        fit = clustered(vectors, HDBSCAN())
        sizes = np.bincount(fit.labels[fit.labels >= 0])
        assert sizes.max() < len(vectors) / 4, "one cluster of everything"
