"""What an encoder, in each precision, is worth on published tasks, beside the published figures.

    python benchmarks/encoder_quality.py [--data DIRECTORY] [--json FILE] [ENCODER ...]

An ENCODER is a name or path, with ``:int8`` or ``:fp32`` after it; by default both of
all-MiniLM-L6-v2; ``st:NAME`` is sentence-transformers itself, where it is installed. The data (STS
2017, XQuAD, Banking77) is not part of the project: $SBERT_PG_DATA or ../shared/data.

The tasks follow MTEB: Spearman's correlation of cosines for STS; nDCG@10 of questions against
paragraphs for XQuAD; for Banking77 the accuracy of logistic regression on 8 texts a class, mean of
10 draws with MTEB's seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbert_pg.probes import agreement_of
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors
from sbert_pg.tuning.evaluation import score_pairs, score_retrieval

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
#: Published for all-MiniLM-L6-v2 (MTEB results, CC0), with the tolerance of a reproduction.
PUBLISHED = {
    "sts17 en-en": (0.87588, 0.001),
    "sts17 es-es": (0.76116, 0.001),
    "xquad en": (0.94357, 0.001),
    "banking77": (0.80042, 0.002),
}
DRAWS = 10
TEXTS_PER_CLASS = 8
SEED = 42


def sts17(data: Path, track: str) -> tuple[list[str], list[str], list[float]]:
    """Pairs and scores of one track, such as ``"track5.en-en"``."""
    lines = (data / "sts17" / f"STS.input.{track}.txt").read_text(encoding="utf-8").splitlines()
    gold = (data / "sts17" / f"STS.gs.{track}.txt").read_text().split()
    left, right = zip(*(line.split("\t")[:2] for line in lines), strict=True)
    return list(left), list(right), [float(score) for score in gold]


def xquad(data: Path, language: str) -> tuple[list[str], list[str], list[set[int]]]:
    """Unique questions, unique paragraphs, and the paragraph of each question."""
    content = json.loads((data / "xquad" / f"xquad.{language}.json").read_text(encoding="utf-8"))
    paragraphs: dict[str, int] = {}
    relevant: dict[str, set[int]] = {}
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            text = paragraph["context"].strip()
            position = paragraphs.setdefault(text, len(paragraphs))
            for question in paragraph["qas"]:
                relevant.setdefault(question["question"].strip(), set()).add(position)
    return list(relevant), list(paragraphs), list(relevant.values())


def banking77(data: Path, part: str) -> tuple[list[str], list[str]]:
    """Texts and their categories; ``part`` is ``"train"`` or ``"test"``."""
    with (data / "banking77" / f"{part}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["category"] for row in rows]


def score_sts(encoder: TextEncoder, data: Path, track: str) -> float:
    return score_pairs(encoder, *sts17(data, track))


def score_xquad(encoder: TextEncoder, data: Path, language: str) -> float:
    questions, paragraphs, relevant = xquad(data, language)
    return score_retrieval(
        encoder.encode_query(questions),
        encoder.encode_document(paragraphs),
        relevant,
        encoder.spec.similarity,
    )["ndcg@10"]


def score_banking77(encoder: TextEncoder, data: Path) -> float:
    from sklearn.linear_model import LogisticRegression

    texts, labels = banking77(data, "train")
    test_texts, test_labels = banking77(data, "test")
    vectors, test_vectors = encoder.encode_document(texts), encoder.encode_document(test_texts)
    order = np.arange(len(labels))
    scores = []
    for _ in range(DRAWS):
        # As MTEB: one generator's seed for each draw, on the order that the last draw left.
        np.random.RandomState(SEED).shuffle(order)
        taken: dict[str, int] = defaultdict(int)
        chosen = []
        for position in order:
            if taken[labels[position]] < TEXTS_PER_CLASS:
                chosen.append(position)
                taken[labels[position]] += 1
        model = LogisticRegression(random_state=SEED, max_iter=100)
        model.fit(vectors[chosen], [labels[i] for i in chosen])
        scores.append(model.score(test_vectors, test_labels))
    return float(np.mean(scores))


TASKS: dict[str, Callable[[TextEncoder, Path], float]] = {
    "sts17 en-en": lambda encoder, data: score_sts(encoder, data, "track5.en-en"),
    "sts17 es-es": lambda encoder, data: score_sts(encoder, data, "track3.es-es"),
    "xquad en": lambda encoder, data: score_xquad(encoder, data, "en"),
    "banking77": score_banking77,
}


class Reference:
    """sentence-transformers as a ``TextEncoder``, torch fp32."""

    def __init__(self, path: str) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(path, device="cpu")
        self.spec = EncoderSpec(
            name=path,
            dimensions=int(self._model.get_sentence_embedding_dimension() or 0),
            similarity=self._model.similarity_fn_name,
        )
        self.probe_vectors: Vectors = np.empty((0, self.spec.dimensions), dtype=np.float32)

    def encode_query(self, texts: Sequence[str]) -> Vectors:
        """Vectors by ``SentenceTransformer.encode``."""
        return np.asarray(self._model.encode(list(texts), show_progress_bar=False))

    encode_document = encode_query


def load(name: str) -> TextEncoder:
    from sbert_pg.encoder import Encoder
    from sbert_pg.encoder.hub import find

    if name.startswith("st:"):
        return Reference(str(find(name.removeprefix("st:")).path))
    base, _, precision = name.rpartition(":")
    return Encoder.load(base, precision=precision) if base else Encoder.load(name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoders", nargs="*", default=[f"{MINILM}:fp32", f"{MINILM}:int8"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    default = os.environ.get("SBERT_PG_DATA", str(Path(__file__).parents[2] / "shared" / "data"))
    data = options.data or Path(default)
    if not data.is_dir():
        print(f"no data at {data}; set SBERT_PG_DATA", file=sys.stderr)
        return 1
    results: list[dict[str, Any]] = []
    for name in options.encoders:
        encoder = load(name)
        started = time.perf_counter()
        row: dict[str, Any] = {"encoder": name}
        row |= {task: round(score(encoder, data), 5) for task, score in TASKS.items()}
        row["seconds"] = round(time.perf_counter() - started, 1)
        results.append(row)
        print(row, flush=True)
    texts = [
        *xquad(data, "en")[1][:150],
        *sts17(data, "track5.en-en")[0],
        *xquad(data, "de")[0][:100],
    ]
    vectors = [load(name).encode_document(texts) for name in options.encoders]
    for name, others in zip(options.encoders[1:], vectors[1:], strict=True):
        print(f"{name} against {options.encoders[0]}: {agreement_of(others, vectors[0])}")
    print("published:", {task: value for task, (value, _) in PUBLISHED.items()})
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
