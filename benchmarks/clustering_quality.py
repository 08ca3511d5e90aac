"""Clusters of real texts against ground truth, beside scikit-learn's on the same vectors.

    python benchmarks/clustering_quality.py [--data DIR] [--packages N] [--cache DIR] [--json FILE]

V-measure of k-means with as many clusters as there are labels, over ten seeds, with one start and
with ten; and of the methods that find their own number, with the share of rows that they put into a
cluster and the V-measure of these rows alone.

Texts: the test questions of Banking77 (77 intents) and SIB-200 (7 topics) from ``--data`` or
``$SBERT_PG_DATA``, and the short descriptions of Debian's packages by section, where ``apt-cache``
has them. Vectors are those of all-MiniLM-L6-v2 in its default precision.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import KMeans as TheirKMeans
from sklearn.metrics import v_measure_score

from sbert_pg.clustering.algorithms import (
    HDBSCAN,
    Agglomerative,
    Communities,
    KMeans,
    fit_in_memory,
)
from sbert_pg.clustering.kmeans import fit_kmeans, normalize

SEEDS = 10
METHODS = {
    "banking77": (KMeans(), HDBSCAN(5), Communities(0.75, 5), Agglomerative(0.45)),
    "sib200": (KMeans(), HDBSCAN(10), Communities(0.4, 10), Agglomerative(0.8)),
    "packages": (KMeans(), HDBSCAN(10), Communities(0.6, 10), Agglomerative(0.7)),
}


def package_texts(rows: int) -> tuple[list[str], list[str]]:
    dump = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True)
    texts, sections = [], []
    for entry in dump.stdout.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in entry.split("\n") if ": " in line[:40])
        text, section = fields.get("Description"), fields.get("Section")
        if text and section and text not in texts[-50:]:
            texts.append(text)
            sections.append(section.rpartition("/")[2])
    order = np.random.default_rng(0).permutation(len(texts))[:rows]
    return [texts[n] for n in order], [sections[n] for n in order]


def read(path: Path, text: str, label: str, delimiter: str) -> tuple[list[str], list[str]]:
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))
    return [row[text] for row in rows], [row[label] for row in rows]


def corpora(data: Path, packages: int) -> Iterator[tuple[str, list[str], list[str]]]:
    yield ("banking77", *read(data / "banking77" / "test.csv", "text", "category", ","))
    for language in ("eng", "fra", "deu"):
        texts, labels = [], []
        for path in sorted((data / "sib200").glob(f"{language}*.tsv")):
            more, theirs = read(path, "text", "category", "\t")
            texts += more
            labels += theirs
        yield f"sib200 {language}", texts, labels
    if packages:
        yield ("packages", *package_texts(packages))


def encoded(name: str, texts: list[str], cache: Path | None) -> np.ndarray:
    file = None if cache is None else cache / f"{name.replace(' ', '-')}-{len(texts)}.npy"
    if file is not None and file.exists():
        return np.load(file)
    from sbert_pg.encoder import Encoder

    encoder = Encoder.load("sentence-transformers/all-MiniLM-L6-v2")
    vectors = normalize(np.array(encoder.encode_document(texts), dtype=np.float32))
    if file is not None:
        np.save(file, vectors)
    return vectors


def k_means(vectors: np.ndarray, labels: list[str], n_init: int) -> dict[str, Any]:
    k = len(set(labels))
    ours, theirs = [], []
    for seed in range(SEEDS):
        fit = fit_kmeans(vectors, k, seed=seed, n_init=n_init)
        ours.append(v_measure_score(labels, fit.labels))
        other = TheirKMeans(k, n_init=n_init, random_state=seed).fit(vectors)
        theirs.append(v_measure_score(labels, other.labels_))
    return {
        "method": f"k-means, {n_init} start{'s' if n_init > 1 else ''}",
        "clusters": k,
        "V-measure": round(float(np.mean(ours)), 4),
        "deviation": round(float(np.std(ours, ddof=1)), 4),
        "scikit-learn": round(float(np.mean(theirs)), 4),
        "its deviation": round(float(np.std(theirs, ddof=1)), 4),
    }


def own_number(vectors: np.ndarray, labels: list[str], algorithm: Any) -> dict[str, Any]:
    fit = fit_in_memory(vectors.copy(), algorithm, seed=0, spherical=True, max_memory=4 << 30)
    inside = fit.labels >= 0
    return {
        "method": repr(algorithm),
        "clusters": len(fit.centroids),
        "V-measure": round(v_measure_score(labels, fit.labels), 4),
        "share in clusters": round(float(inside.mean()), 3),
        "V-measure inside": round(v_measure_score(np.array(labels)[inside], fit.labels[inside]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("SBERT_PG_DATA", "../shared/data"))
    )
    parser.add_argument("--packages", type=int, default=5_000)
    parser.add_argument("--cache", type=Path, help="directory to keep vectors in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for name, texts, labels in corpora(options.data, options.packages):
        vectors = encoded(name, texts, options.cache)
        rows = [k_means(vectors, labels, n_init) for n_init in (1, 10)]
        for algorithm in METHODS[name.split()[0]]:
            rows.append(own_number(vectors, labels, algorithm))
        for row in rows:
            results.append({"texts": name, "rows": len(texts), "labels": len(set(labels)), **row})
            print(results[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
