"""Speed of encoding, interleaved with sentence-transformers (torch fp32, batches of 32).

    python benchmarks/encoder_speed.py DIRECTORY [--rounds 5] [--threads 1] [--profile]

DIRECTORY is a sentence-transformers directory. Texts are made of the words of the sample texts, in
three lengths (about 12, 78 and 256 tokens). With one thread, tokens per second of the process's CPU
time, which other work on the machine does not change much; with more, per second of real time.
Every contestant does the whole of ``encode``, tokenizing included. ``--profile`` prints where the
time of the int8 form goes, by operator.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sbert_pg.encoder import Encoder
from sbert_pg.encoder.samples import SAMPLE_TEXTS

LENGTHS = {"short": (12, 340), "medium": (78, 104), "long": (256, 32)}
PRECISIONS = ("fp32", "int8", "int8-blocks")
BATCH = 32


def texts_of(encoder: Encoder, tokens: int, count: int) -> list[str]:
    """Different texts of nearly the same number of tokens."""
    words = " ".join(SAMPLE_TEXTS[:32]).split()
    shuffled = random.Random(tokens)
    texts = []
    for number in range(count):
        picked = [f"{number}", *shuffled.choices(words, k=tokens)]
        while len(picked) > 1 and encoder.count_tokens([" ".join(picked)])[0] > tokens:
            picked.pop()
        texts.append(" ".join(picked))
    return texts


def peaks() -> str:
    """What numpy's matrix product reaches, as a yardstick for fp32."""
    a = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    best = 0.0
    for _ in range(10):
        begin = time.process_time()
        a @ a
        best = max(best, 2 * 1024**3 / max(time.process_time() - begin, 1e-9))
    return f"numpy fp32 product, per CPU second: {best / 1e9:.0f} GFLOP"


def profile(encoder: Encoder, texts: list[str]) -> None:
    """Share of each operator. An If contains others and is left out."""
    import onnxruntime

    from sbert_pg.encoder.runner import Runner

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = f"{scratch}/profile"
        runner = Runner(encoder.directory / "model.onnx", encoder.manifest.inputs, threads=1)
        runner._session = onnxruntime.InferenceSession(
            str(encoder.directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        tokens = encoder._ready().tokenizer.encode(texts).ids
        for _ in range(3):
            runner.run(tokens)
        events = json.loads(Path(runner._session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        operator = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and operator != "If" and "kernel_time" in event["name"]:
            spent[operator] += event["dur"]
    total = sum(spent.values())
    for operator, microseconds in spent.most_common(8):
        print(f"    {operator:24} {microseconds / total:6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    reference = SentenceTransformer(str(options.directory), device="cpu")
    encoders = {
        precision: Encoder.load(options.directory, precision=precision, threads=options.threads)
        for precision in PRECISIONS
    }
    contestants: dict[str, Callable[[list[str]], object]] = {
        "sentence-transformers": lambda texts: reference.encode(texts, batch_size=BATCH),
        **{name: encoder.encode for name, encoder in encoders.items()},
    }
    print(peaks())
    for length, (tokens, count) in LENGTHS.items():
        texts = texts_of(encoders["fp32"], tokens, count)
        total = sum(encoders["fp32"].count_tokens(texts))
        speeds: dict[str, list[float]] = {name: [] for name in contestants}
        for round_number in range(options.rounds + 1):
            for name, run in contestants.items():
                begin = clock()
                run(texts)
                if round_number:
                    speeds[name].append(total / (clock() - begin))
        base = speeds["sentence-transformers"]
        print(f"{length}: {len(texts)} texts, {total} tokens")
        for name, found in speeds.items():
            ratios = [a / b for a, b in zip(found, base, strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            speed, ratio = statistics.median(found), statistics.median(ratios)
            print(f"  {name:22} {speed:8.0f} tokens/s {ratio:6.2f} x ({spread})")
        if options.profile:
            profile(encoders["int8"], texts)
        queries = []
        for text in texts[:32] * 4:
            begin = time.perf_counter()
            encoders["int8"].encode_query([text])
            queries.append((time.perf_counter() - begin) * 1e3)
        p50, p95 = np.percentile(queries, [50, 95])
        print(f"  int8, one query: p50 {p50:.1f} ms, p95 {p95:.1f} ms")


if __name__ == "__main__":
    main()
