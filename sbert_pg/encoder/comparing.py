"""Encoders side by side on given texts: what ``sbert-pg encoder compare`` and ``bench`` print."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbert_pg.encoder.encoder import Encoder
from sbert_pg.encoder.quality import retrieval, score_pairs
from sbert_pg.encoder.samples import SAMPLE_TEXTS
from sbert_pg.spec import EncoderSpec, Vectors

#: Queries whose latency is measured, after some to warm up.
QUERIES = 200
WARM_UP = 20


class _Timed:
    """An encoder that adds up the time it takes."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.seconds = 0.0
        self.texts = 0

    @property
    def spec(self) -> EncoderSpec:
        return self._encoder.spec

    @property
    def probe_vectors(self) -> Vectors:
        return self._encoder.probe_vectors

    def encode_query(self, texts: Sequence[str]) -> Vectors:
        started = time.perf_counter()
        vectors = self._encoder.encode_query(texts)
        self.seconds += time.perf_counter() - started
        self.texts += len(texts)
        return vectors

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        started = time.perf_counter()
        vectors = self._encoder.encode_document(texts)
        self.seconds += time.perf_counter() - started
        self.texts += len(texts)
        return vectors


def compare_on_pairs(
    name: str, encoder: Encoder, rows: Sequence[tuple[str, str, float]]
) -> dict[str, Any]:
    """Spearman's correlation with given scores, and speed.

    Args:
        name: how the encoder was asked for.
        encoder: the encoder.
        rows: two texts and their score.
    """
    left, right, scores = zip(*rows, strict=True)
    timed = _Timed(encoder)
    return _row(name, encoder, {"spearman": score_pairs(timed, left, right, scores)}, timed)


def compare_on_questions(
    name: str, encoder: Encoder, rows: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """How well each question finds its answer among all answers, and speed.

    Args:
        name: how the encoder was asked for.
        encoder: the encoder.
        rows: question and answer.
    """
    questions, answers = zip(*rows, strict=True)
    timed = _Timed(encoder)
    found = retrieval(timed, questions, answers)
    quality = {
        "ndcg@10": found.ndcg_at_10,
        "recall@1": found.recall_at_1,
        "recall@10": found.recall_at_10,
        "mrr": found.reciprocal_rank,
    }
    return _row(name, encoder, quality, timed)


def _row(name: str, encoder: Encoder, quality: dict[str, float], timed: _Timed) -> dict[str, Any]:
    files = [encoder.directory / file for file in encoder.manifest.files]
    return {
        "encoder": name,
        "precision": encoder.manifest.precision,
        "dimensions": encoder.dimensions,
        **quality,
        "texts/s": timed.texts / max(timed.seconds, 1e-9),
        "truncated": encoder.statistics.truncated,
        "MB": round(sum(file.stat().st_size for file in files) / 1e6, 1),
    }


def measure_speed(encoder: Encoder, seconds: float) -> dict[str, Any]:
    """Throughput on short, medium and long texts, and the latency of one query.

    Args:
        encoder: the encoder.
        seconds: least time for each length.
    """
    words = " ".join(SAMPLE_TEXTS).split()
    throughput = [
        _throughput(encoder, words, label, length, seconds)
        for label, length in (("short", 9), ("medium", 55), ("long", 180))
    ]
    taken = []
    for number in range(QUERIES + WARM_UP):
        text = _passage(words, number, 8)
        started = time.perf_counter()
        encoder.encode_query([text])
        taken.append(1000 * (time.perf_counter() - started))
    p50, p95 = np.percentile(taken[WARM_UP:], [50, 95])
    return {
        "precision": encoder.manifest.precision,
        "throughput": throughput,
        "query_ms": {"p50": float(p50), "p95": float(p95)},
    }


def _passage(words: Sequence[str], number: int, length: int) -> str:
    """Words from somewhere, with a number that makes the text one of its kind."""
    begin = number * 7 % max(1, len(words) - length)
    return f"{number} {' '.join(words[begin : begin + length])}"


def _throughput(
    encoder: Encoder, words: Sequence[str], label: str, length: int, seconds: float
) -> dict[str, Any]:
    size = max(64, 12_000 // length)
    encoder.encode_document([_passage(words, i, length) for i in range(32)])
    before, texts, elapsed = encoder.statistics, 0, 0.0
    while elapsed < seconds:
        batch = [_passage(words, texts + i, length) for i in range(size)]
        started = time.perf_counter()
        encoder.encode_document(batch)
        elapsed += time.perf_counter() - started
        texts += size
    tokens = encoder.statistics.tokens - before.tokens
    return {
        "texts": label,
        "tokens_per_text": tokens / texts,
        "texts_per_s": texts / elapsed,
        "tokens_per_s": tokens / elapsed,
    }
