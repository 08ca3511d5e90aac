"""Speed of encoding on a GPU beside sentence-transformers on the same one, interleaved in one run.

    python benchmarks/encoder_gpu.py DIRECTORY [--rounds 3] [--texts 20000]

DIRECTORY is a sentence-transformers directory; needed are a GPU, ``onnxruntime-gpu[cuda,cudnn]``
and sentence-transformers with torch for CUDA. Texts are made of the words of the sample texts, of
mixed lengths around 12, 76 and 220 tokens; of the longer ones there are fewer. Texts per second of
the whole of ``encode``, tokenizing included; each ratio is the median of its rounds.

Contestants: sentence-transformers in fp32 and in fp16, in batches of 32 (its default) and 256; this
library in fp16 (its default on CUDA) and fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sbert_pg.encoder import Encoder
from sbert_pg.encoder.engines import CUDA
from sbert_pg.probes import SAMPLE_TEXTS

#: Tokens of a text, and part of the number of texts.
LENGTHS = {"short": (12, 1.0), "medium": (78, 0.4), "long": (240, 0.15)}
BASE = "sentence-transformers, fp32, batches of 32"

Encode = Callable[[list[str]], Any]


def texts_of(tokens: int, count: int) -> list[str]:
    """Different texts; a word has about 1.6 tokens."""
    words = " ".join(SAMPLE_TEXTS[:32]).split()
    chance = random.Random(tokens)
    return [
        f"{i} " + " ".join(chance.choices(words, k=int(tokens / 1.6 * chance.uniform(0.6, 1.4))))
        for i in range(count)
    ]


def contestants(directory: Path) -> Iterator[tuple[str, Encode]]:
    from sentence_transformers import SentenceTransformer

    for kind in ("fp32", "fp16"):
        model = SentenceTransformer(str(directory), device="cuda")
        if kind == "fp16":
            model = model.half()
        for size in (32, 256):
            yield (
                f"sentence-transformers, {kind}, batches of {size}",
                lambda texts, model=model, size=size: model.encode(
                    texts, batch_size=size, show_progress_bar=False
                ),
            )
    for precision in ("fp16", "fp32"):
        encoder = Encoder.load(directory, precision=precision, providers=[CUDA])
        yield f"sbert-pg, {precision}", encoder.encode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=20_000)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    made = list(contestants(options.directory))
    report: dict[str, Any] = {}
    for name, (tokens, part) in LENGTHS.items():
        texts = texts_of(tokens, int(options.texts * part))
        exact = np.asarray(made[0][1](texts[:200]))
        seconds: dict[str, list[float]] = {who: [] for who, _ in made}
        for round_ in range(-1, options.rounds):
            for who, encode in made:
                started = time.perf_counter()
                vectors = np.asarray(encode(texts))
                took = time.perf_counter() - started
                if round_ >= 0:
                    seconds[who].append(took)
                elif (cosine := (vectors[:200] * exact).sum(1).min()) < 0.999:
                    raise SystemExit(f"{who} gives other vectors, by a cosine of {cosine}.")
        report[name] = {
            who: {
                "texts/s": round(len(texts) / statistics.median(of)),
                "ratio": round(
                    statistics.median(a / b for a, b in zip(seconds[BASE], of, strict=True)), 2
                ),
            }
            for who, of in seconds.items()
        }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
