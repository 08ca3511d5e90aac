"""Which engine runs a converted encoder fastest on this kind of processor: measured, remembered.

Measured where a conversion is made and by ``sbert-pg encoder measure``, never while an application
loads an encoder. What was measured is in ``engines.json`` beside the model, by processor, so that a
directory may be copied to other machines; nothing of the encoder itself depends on it. A processor
that is not in it uses the usual engine of the form.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.engines import CPU, Provider, Providers, able, asked_for, installed, processor
from sbert_pg.encoder.runner import Runner
from sbert_pg.encoder.tokenizing import TextTokenizer
from sbert_pg.errors import EncoderError
from sbert_pg.probes import (
    EXPORT_MIN_COSINE,
    PRECISION_MIN_COSINE,
    SAMPLE_TEXTS,
    agreement_of,
)
from sbert_pg.spec import Vectors

logger = logging.getLogger("sbert_pg.encoder")

#: What is run: tokens of the texts of each call. Queries come one by one, each of another length.
CASES: Mapping[str, Sequence[Sequence[int]]] = {
    "query": [[11], [13], [12], [14]],
    "short": [[12] * 40],
    "medium": [[78] * 6],
    "long": [[256] * 2],
}
#: Rounds after the one that warms up; fewer where one takes long.
_ROUNDS = 4
_SECONDS = 10.0
#: By how much another engine has to be faster than the usual one: less is noise.
_ENOUGH = 1.05

#: Tokens per second of CPU time, by case.
Speeds = Mapping[str, float]
#: Token ids of the texts of one call.
Texts = Sequence[Sequence[int]]


def engine_for(
    directory: Path, manifest: Manifest, engine: str | None, providers: Sequence[Provider] | None
) -> str:
    """The engine that runs an encoder: the one asked for, else the fastest here, else the usual.

    Raises:
        DeclarationError: there is no engine of the name asked for.
        ProviderError: it does not run this form.
    """
    chosen = Providers.of(providers)
    asked = asked_for(engine, manifest.precision, chosen)
    if asked is not None:
        return asked
    engines = able(manifest.precision, chosen)
    remembered = _read(directory).get(processor(), {}) if len(engines) > 1 else {}
    fastest = remembered.get("fastest") if isinstance(remembered, dict) else None
    return fastest if fastest in engines and installed(fastest) else engines[0]


def measure(directory: Path, manifest: Manifest) -> dict[str, Speeds]:
    """Speeds of the engines that are installed, on one thread, remembered where it is possible.

    An engine that cannot run the encoder, or whose vectors are others, is left out and logged.

    Returns:
        By engine; empty where fewer than two are installed that run this form.
    """
    engines = list(filter(installed, able(manifest.precision, Providers.of([CPU]))))
    if len(engines) < 2:
        return {}
    speeds = _speeds(directory, manifest, engines)
    _remember(directory, {"fastest": fastest_of(speeds), "tokens_per_cpu_second": speeds})
    return speeds


def fastest_of(speeds: Mapping[str, Speeds]) -> str:
    """The engine with the largest mean (geometric) over all cases; the first one unless clearly."""
    usual = next(iter(speeds))
    means = {name: math.prod(each.values()) ** (1 / len(each)) for name, each in speeds.items()}
    best = max(means, key=means.__getitem__)
    return best if means[best] > _ENOUGH * means[usual] else usual


def _speeds(directory: Path, manifest: Manifest, engines: Sequence[str]) -> dict[str, Speeds]:
    calls = _calls(directory, manifest)
    runners = _runners(directory, manifest, engines, list(chain(*calls.values())))
    taken: dict[tuple[str, str], float] = {}
    begin = time.monotonic()
    for done in range(_ROUNDS):
        if done and time.monotonic() - begin > _SECONDS:
            break
        for case, engine in product(calls, runners):
            seconds = _seconds(runners[engine], calls[case])
            taken[engine, case] = min(seconds, taken.get((engine, case), seconds))
    tokens = {case: sum(map(len, chain(*texts))) for case, texts in calls.items()}
    return {
        engine: {case: tokens[case] / taken[engine, case] for case in calls} for engine in runners
    }


def _runners(
    directory: Path, manifest: Manifest, engines: Sequence[str], calls: Sequence[Texts]
) -> dict[str, Runner]:
    """The engines that run the encoder and compute what the first one does, warmed up."""
    runners: dict[str, Runner] = {}
    usual: list[Vectors] = []
    for engine in engines:
        try:
            runner = Runner(
                directory / converted.MODEL, manifest.inputs, threads=1, providers=[CPU],
                engine=engine, precision=manifest.precision,
            )  # fmt: skip
            vectors = [runner.run(ids) for ids in calls]
        except EncoderError as error:
            logger.info("%s cannot run %s: %s", engine, directory, error)
            continue
        usual = usual or vectors
        if _agree(vectors, usual, manifest):
            runners[engine] = runner
        else:
            logger.warning("%s computes other vectors of %s and is not used", engine, directory)
    return runners


def _seconds(runner: Runner, calls: Sequence[Texts]) -> float:
    """CPU time of some calls: what else runs on the machine changes it least."""
    begin = time.process_time()
    for ids in calls:
        runner.run(ids)
    return max(time.process_time() - begin, 1e-9)


def _calls(directory: Path, manifest: Manifest) -> dict[str, list[list[list[int]]]]:
    """Token ids of the texts of each call of each case, cut out of the sample texts."""
    spec = manifest.spec
    content = (directory / converted.TOKENIZER).read_text(encoding="utf-8")
    tokens = list(chain(*TextTokenizer(content, None).encode(list(SAMPLE_TEXTS)).ids))
    most = spec.max_seq_length or 256

    def cut(begin: int, length: int) -> list[int]:
        repeated = chain(tokens[begin % len(tokens) :], tokens * (1 + length // len(tokens)))
        return list(islice(repeated, min(length, most)))

    return {
        case: [[cut(7 * at, length) for at, length in enumerate(call)] for call in calls]
        for case, calls in CASES.items()
    }


def _agree(vectors: Sequence[Vectors], usual: Sequence[Vectors], manifest: Manifest) -> bool:
    """Whether two engines compute the same but for rounding."""
    least = PRECISION_MIN_COSINE if manifest.precision == "int8" else EXPORT_MIN_COSINE
    # A cross-encoder's scores are compared over all texts.
    pairs = list(zip(vectors, usual, strict=True))
    if manifest.kind != "encoder":
        pairs = [(a.T, b.T) for a, b in pairs]
    return all(agreement_of(a, b).min_cosine >= least for a, b in pairs)


def _read(directory: Path) -> dict[str, Any]:
    """What was remembered, by processor; nothing where it cannot be read."""
    try:
        data = json.loads((directory / converted.ENGINES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _remember(directory: Path, measured: Mapping[str, Any]) -> None:
    data = {**_read(directory), processor(): measured}
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=directory, prefix=".engines-", encoding="utf-8", delete=False
        ) as file:
            json.dump(data, file, indent=2)
        os.chmod(file.name, 0o644)
        os.replace(file.name, directory / converted.ENGINES)
    except OSError as error:
        raise EncoderError(
            f"What was measured cannot be kept in {directory}: {error}. Measure as a user that "
            "can write there, or name the engine with engine= or $SBERT_PG_ENGINE."
        ) from error
