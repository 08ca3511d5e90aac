"""Speed of a cross-encoder beside sentence-transformers, interleaved in one run, on one thread.

    python benchmarks/reranking.py DIRECTORY [--rounds 5]

DIRECTORY is a sentence-transformers directory of a BERT, as all-MiniLM-L6-v2: its layers get the
head of a cross-encoder with random weights, which makes the size of ms-marco-MiniLM-L6. Scored are
100 pairs of 100 tokens; seconds of CPU time, the median of the rounds, and of the rounds' ratios to
sentence-transformers' onnx backend, or to torch where ``sentence-transformers[onnx]`` is missing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from encoder_speed import _noted, texts_of

from sbert_pg.encoder import Encoder, Reranker
from sbert_pg.encoder.engines import ONNXRUNTIME, OPENVINO

PAIRS, QUESTION, TEXT = 100, 12, 85
TORCH, ONNX = "sentence-transformers, torch fp32", "sentence-transformers, onnx fp32"
Score = Callable[[list[tuple[str, str]]], Any]


def write(directory: Path, target: Path) -> None:
    """A cross-encoder with the layers of an encoder."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(str(directory), num_labels=1)
    model.save_pretrained(str(target))
    AutoTokenizer.from_pretrained(str(directory)).save_pretrained(str(target))


def theirs(path: Path) -> Iterator[tuple[str, Score]]:
    """sentence-transformers by torch and by its onnx backend."""
    import onnxruntime
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(1)
    yield TORCH, CrossEncoder(str(path), device="cpu").predict
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    settings = {"provider": "CPUExecutionProvider", "session_options": options, "export": True}
    yield ONNX, CrossEncoder(str(path), device="cpu", backend="onnx", model_kwargs=settings).predict


def main() -> None:
    """Score in turn, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    words = Encoder.load(options.directory, precision="fp32", threads=1)
    questions, texts = (texts_of(words, length, PAIRS) for length in (QUESTION, TEXT))
    pairs = list(zip(questions, texts, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write(options.directory, path)
        entrants: dict[str, Score] = {}
        with _noted("sentence-transformers"):
            entrants.update(theirs(path))
        for precision, engine in (
            ("fp32", ONNXRUNTIME), ("int8", ONNXRUNTIME),
            ("int8", OPENVINO), ("bf16", OPENVINO),
        ):  # fmt: skip
            with _noted(f"{precision} by {engine}"):
                ours = Reranker.load(
                    path, precision=precision, engine=engine, threads=1, cache_dir=folder
                )
                entrants[f"sbert-pg, {precision} by {engine}"] = ours.score_pairs
        taken: dict[str, list[float]] = {name: [] for name in entrants}
        scores = {}
        for number in range(options.rounds + 1):
            for name, score in entrants.items():
                begin = time.process_time()
                scores[name] = np.asarray(score(pairs))
                if number:
                    taken[name].append(time.process_time() - begin)
    base = ONNX if ONNX in entrants else next(iter(entrants))
    for name, seconds in taken.items():
        ratios = sorted(a / b for a, b in zip(taken[base], seconds, strict=True))
        alike = np.corrcoef(scores[name], scores[base])[0, 1]
        print(
            f"{name:40} {statistics.median(seconds):6.2f} s, {statistics.median(ratios):5.2f} "
            f"times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f}), correlation {alike:.6f}"
        )


if __name__ == "__main__":
    main()
