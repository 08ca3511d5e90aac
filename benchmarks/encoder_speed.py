"""Speed of encoding beside what else can be picked, interleaved in one run.

    python benchmarks/encoder_speed.py DIRECTORY [--rounds 5] [--threads 1 2] [--profile]
        [--only NAME ...] [--lengths short medium long] [--part 1.0] [--json FILE]

DIRECTORY is a sentence-transformers directory. Texts are made of the words of the sample texts, in
three lengths (about 12, 78 and 256 tokens). With one thread, tokens per second of the process's CPU
time, which other work on the machine does not change much; with more, per second of real time.
Every contestant does the whole of ``encode``, tokenizing included. The ratio is that to
sentence-transformers with its defaults (torch fp32, batches of 32), by rounds, the median of them.

Contestants, each left out with a note where what it needs is not installed:

- sentence-transformers with torch: its defaults; tuned, that is bfloat16 and the best of some batch
  sizes;
- sentence-transformers with onnx (``sentence-transformers[onnx]``): fp32, O3, qint8 for VNNI;
- fastembed with the same weights, fp32 and qint8 (it reads 128 tokens of a text at most, so it has
  no part in long ones);
- this library: fp32 and int8 by onnxruntime, and with the extra ``openvino`` both by OpenVINO, and
  bf16.

Then, for each length, the latency of one query; for fresh processes, the time from their start to
their first vector and the largest memory; and the machine's peak: by loops in C that do nothing but
multiply (where there is a compiler), and by what the largest products of numpy and onnxruntime
reach. ``--profile`` prints where the time of the int8 form goes, by operator; ``--part`` takes a
part of the texts, for a machine with little time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbert_pg.encoder import Encoder
from sbert_pg.encoder.engines import ONNXRUNTIME, OPENVINO
from sbert_pg.probes import SAMPLE_TEXTS

LENGTHS = {"short": (12, 340), "medium": (78, 104), "long": (256, 32)}
#: Forms of this library and what runs them.
FORMS = (
    ("fp32", ONNXRUNTIME),
    ("int8", ONNXRUNTIME),
    ("fp32", OPENVINO),
    ("int8", OPENVINO),
    ("bf16", OPENVINO),
)
BATCH = 32
BASE = "sentence-transformers"
OURS = "sbert-pg"
#: Tokens that fastembed reads of a text.
FASTEMBED_LIMIT = 128

Encode = Callable[[list[str]], Any]


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


def torch_contestants(directory: Path, threads: int) -> Iterator[tuple[str, Encode]]:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(directory), device="cpu")
    yield BASE, lambda texts: model.encode(texts, batch_size=BATCH)
    half = SentenceTransformer(
        str(directory), device="cpu", model_kwargs={"torch_dtype": torch.bfloat16}
    )
    for size in (8, 128):
        yield (
            f"{BASE}, bf16, batches of {size}",
            lambda texts, size=size: half.encode(texts, batch_size=size, convert_to_tensor=True),
        )


def onnx_contestants(
    directory: Path, threads: int, scratch: Path
) -> Iterator[tuple[str, Encode, Path]]:
    """sentence-transformers' own ONNX forms; with the file of each, for fastembed."""
    import onnxruntime
    from sentence_transformers import (
        SentenceTransformer,
        export_dynamic_quantized_onnx_model,
        export_optimized_onnx_model,
    )

    exported = scratch / "onnx"
    if not exported.is_dir():
        model = SentenceTransformer(
            str(directory), backend="onnx", device="cpu", model_kwargs={"export": True}
        )
        model.save_pretrained(str(exported), create_model_card=False)
        export_optimized_onnx_model(model, "O3", str(exported))
        export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(exported))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, file in (
        ("fp32", "model.onnx"),
        ("O3", "model_O3.onnx"),
        ("qint8", "model_qint8_avx512_vnni.onnx"),
    ):
        model = SentenceTransformer(
            str(exported), backend="onnx", device="cpu",
            model_kwargs={"file_name": f"onnx/{file}", "provider": "CPUExecutionProvider",
                          "session_options": options},
        )  # fmt: skip
        yield (
            f"{BASE}, onnx {name}",
            lambda texts, model=model: model.encode(texts, batch_size=BATCH),
            exported / "onnx" / file,
        )


def fastembed_contestants(
    directory: Path, threads: int, files: dict[str, Path], scratch: Path
) -> Iterator[tuple[str, Encode]]:
    """Contestants on the files that sentence-transformers exported."""
    import shutil

    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    for precision, file in files.items():
        name, place = f"local/{precision}-{threads}", scratch / f"fastembed-{precision}"
        if not place.is_dir():
            shutil.copytree(directory, place, ignore=shutil.ignore_patterns("*.safetensors"))
            shutil.copy(file, place / "model.onnx")
        TextEmbedding.add_custom_model(
            model=name, pooling=PoolingType.MEAN, normalization=True,
            sources=ModelSource(hf="local/model"), dim=384, model_file="model.onnx",
        )  # fmt: skip
        model = TextEmbedding(name, specific_model_path=str(place), threads=threads)
        yield (
            f"fastembed, {precision}",
            lambda texts, model=model: np.stack(list(model.embed(texts, batch_size=BATCH))),
        )


def contestants(directory: Path, threads: int, scratch: Path) -> dict[str, Encode]:
    """By name; what is not installed is left out with a note."""
    found: dict[str, Encode] = {}
    with _noted("sentence-transformers with torch"):
        found.update(torch_contestants(directory, threads))
    files: dict[str, Path] = {}
    with _noted("sentence-transformers with onnx"):
        for name, encode, file in onnx_contestants(directory, threads, scratch):
            found[name] = encode
            files[name.rpartition(" ")[2]] = file
    files.pop("O3", None)
    with _noted("fastembed"):
        found.update(fastembed_contestants(directory, threads, files, scratch))
    for precision, engine in FORMS:
        name = f"{OURS}, {precision}" + (" by OpenVINO" if engine == OPENVINO else "")
        with _noted(name):
            encoder = Encoder.load(directory, precision=precision, threads=threads, engine=engine)
            found[name] = encoder.encode
    return found


@contextlib.contextmanager
def _noted(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # sentence-transformers says so by a plain Exception.
        if not isinstance(error, ImportError) and "requires installing" not in str(error):
            raise
        print(f"{what} is left out: {error}")


def compare(
    entrants: dict[str, Encode], texts: list[str], total: int, threads: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens a second and ratios to the first entrant, by name."""
    clock = time.process_time if threads == 1 else time.perf_counter
    speeds: dict[str, list[float]] = {name: [] for name in entrants}
    for round_number in range(rounds + 1):
        for name, run in entrants.items():
            begin = clock()
            run(texts)
            if round_number:
                speeds[name].append(total / (clock() - begin))
    base = speeds[BASE if BASE in speeds else next(iter(speeds))]
    found = {}
    for name, measured in speeds.items():
        ratios = sorted(a / b for a, b in zip(measured, base, strict=True))
        found[name] = {
            "tokens_per_s": statistics.median(measured),
            "ratio": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
        }
    return found


def latency(encode: Encode, texts: Sequence[str], count: int = 100) -> dict[str, float]:
    """Milliseconds of one query, p50 and p95; and those of CPU time, which a busy machine bears."""
    taken = []
    for number in range(count):
        begin = time.perf_counter(), time.process_time()
        encode([texts[number % len(texts)]])
        taken.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    (p50, cpu_p50), (p95, cpu_p95) = np.percentile(np.array(taken) * 1e3, [50, 95], axis=0)
    return {"p50": p50, "p95": p95, "cpu_p50": cpu_p50, "cpu_p95": cpu_p95}


#: Programs that encode one text; the first argument is a directory.
STARTS = {
    **{
        f"{OURS}, {precision}{name}": (
            "from sbert_pg.encoder import Encoder\n"
            f"Encoder.open(sys.argv[1], engine={engine!r}).encode(['a text'])"
        )
        for precision, engine, name in (
            ("int8", ONNXRUNTIME, ""),
            ("fp32", ONNXRUNTIME, ""),
            ("int8", OPENVINO, " by OpenVINO"),
            ("bf16", OPENVINO, " by OpenVINO"),
        )
    },
    BASE: (
        "from sentence_transformers import SentenceTransformer\n"
        "SentenceTransformer(sys.argv[1], device='cpu').encode(['a text'])"
    ),
    f"{BASE}, onnx": (
        "from sentence_transformers import SentenceTransformer\n"
        "SentenceTransformer(sys.argv[1] + '/onnx', backend='onnx', device='cpu', model_kwargs="
        "{'provider': 'CPUExecutionProvider', 'file_name': 'onnx/model.onnx'}).encode(['a text'])"
    ),
    "fastembed": (
        "from fastembed import TextEmbedding\n"
        "from fastembed.common.model_description import ModelSource, PoolingType\n"
        "TextEmbedding.add_custom_model(model='local/m', pooling=PoolingType.MEAN, "
        "normalization=True, sources=ModelSource(hf='local/m'), dim=384, model_file='model.onnx')\n"
        "list(TextEmbedding('local/m', specific_model_path=sys.argv[1] + '/fastembed-fp32')"
        ".embed(['a text']))"
    ),
}


# Not ``ru_maxrss``, which a process inherits from the one that started it.
_MEMORY = (
    "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
)


def starts(directory: Path, scratch: Path, times: int) -> dict[str, dict[str, float]]:
    """Seconds of CPU and of real time from a process's start to its first vector, and MB."""
    found = {}
    for name, code in STARTS.items():
        place = directory
        if name.startswith(OURS):
            precision = name.removeprefix(f"{OURS}, ").partition(" ")[0]
            with _noted(name):
                place = Encoder.load(directory, precision=precision).directory
        elif "onnx" in name or name == "fastembed":
            place = scratch
        measured = []
        for _ in range(times):
            program = f"import sys\n{code}\n{_MEMORY}"
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", program, str(place)], capture_output=True, text=True
            )
            wall = time.perf_counter() - begin
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode:
                break
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            measured.append((wall, cpu, int(done.stdout.split()[-1]) / 1024))
        if measured:
            wall, cpu, memory = (min(column) for column in zip(*measured, strict=True))
            found[name] = {"seconds": wall, "cpu_seconds": cpu, "megabytes": memory}
    return found


def profile(encoder: Encoder, texts: list[str]) -> dict[str, float]:
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
        tokens = encoder._pipeline.get().tokenizer.encode(texts).ids
        for _ in range(3):
            runner.run(tokens)
        events = json.loads(Path(runner._session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        operator = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and operator != "If" and "kernel_time" in event["name"]:
            spent[operator] += event["dur"]
    total = sum(spent.values())
    return {operator: time_ / total for operator, time_ in spent.most_common(10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--part", type=float, default=1.0, help="part of the texts to encode")
    parser.add_argument("--only", nargs="+", help="contestants whose names begin so")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of each kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from encoder_peaks import peaks

    report: dict[str, Any] = {"peaks": peaks()}
    print("peak of one core, GOP per CPU second:", report["peaks"])
    counted = Encoder.load(options.directory, precision="fp32", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for threads in options.threads:
            entrants = contestants(options.directory, threads, scratch)
            if options.only:
                entrants = {
                    name: run for name, run in entrants.items()
                    if any(name.startswith(wanted) for wanted in options.only)
                }  # fmt: skip
            for length in options.lengths:
                part = one_length(options, entrants, counted, threads, length)
                report[f"{length}, {threads} threads"] = part
        if options.starts:
            report["starts"] = starts(options.directory, scratch, options.starts)
            for name, row in report["starts"].items():
                print(name, {key: round(value, 2) for key, value in row.items()})
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def one_length(
    options: argparse.Namespace, entrants: dict[str, Encode], counted: Encoder, threads: int,
    length: str,
) -> dict[str, Any]:  # fmt: skip
    """Throughput and latency for one length of text, printed."""
    tokens, count = LENGTHS[length]
    count = max(1, round(count * options.part))
    texts = texts_of(counted, tokens, count)
    total = sum(counted.count_tokens(texts))
    taking_part = {
        name: run for name, run in entrants.items()
        if tokens <= FASTEMBED_LIMIT or not name.startswith("fastembed")
    }  # fmt: skip
    print(f"{length}, {threads} threads: {len(texts)} texts, {total} tokens", flush=True)
    part: dict[str, Any] = {
        "throughput": compare(taking_part, texts, total, threads, options.rounds)
    }
    for name, row in part["throughput"].items():
        print(
            f"  {name:40} {row['tokens_per_s']:8.0f} tokens/s "
            f"{row['tokens_per_s'] * count / total:7.0f} texts/s {row['ratio']:6.2f} x "
            f"({row['lowest']:.2f} to {row['highest']:.2f})",
            flush=True,
        )
    part["query_ms"] = {}
    for name in taking_part:
        if name in (BASE, f"{BASE}, onnx qint8") or name.startswith(OURS):
            row = latency(taking_part[name], texts, max(10, round(100 * options.part)))
            part["query_ms"][name] = row
            shown = ", ".join(f"{key} {value:.1f}" for key, value in row.items())
            print(f"  {name}, one query, ms: {shown}", flush=True)
    if options.profile and threads == 1:
        part["profile"] = profile(Encoder.load(options.directory, precision="int8"), texts)
        for operator, share in part["profile"].items():
            print(f"    {operator:24} {share:6.1%}")
    return part


if __name__ == "__main__":
    main()
