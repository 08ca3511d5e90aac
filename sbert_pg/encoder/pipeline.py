"""Tokenizer, session and counts of a converted directory; and which engine runs it fastest.

An engine is measured where a conversion is made and by ``sbert-pg encoder show --speed``, never
while an application loads an encoder. What was measured is in ``engines.json`` beside the model, by
kind of processor, so that a directory may be copied to other machines; nothing of the encoder
itself depends on it. A processor that is not in it uses the usual engine of the form.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import numpy as np

from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.engines import (
    CPU,
    Provider,
    Providers,
    able,
    asked_for,
    installed,
    processor,
    versions,
)
from sbert_pg.encoder.runner import OUTPUT, Runner
from sbert_pg.encoder.tokenizing import TextTokenizer, Tokens
from sbert_pg.errors import EncoderError, EncodingError
from sbert_pg.probes import (
    EXPORT_MIN_COSINE,
    PRECISION_MIN_COSINE,
    SAMPLE_TEXTS,
    Agreement,
    agreement_of,
)
from sbert_pg.spec import Vectors

logger = logging.getLogger("sbert_pg.encoder")

#: Seconds between two warnings about texts that were cut.
WARN_EVERY = 60.0


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

#: Least correlation of a cross-encoder's scores by two engines.
SAME_SCORES = 0.99

#: Tokens per second of CPU time, by case.
Speeds = Mapping[str, float]
#: Token ids of the texts of one call.
Texts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an encoder has done in this process.

    Attributes:
        duplicates: of these, texts that stood in the same call before and cost nothing.
        truncated: texts longer than ``max_seq_length``, of which only the beginning was read.
    """

    texts: int = 0
    duplicates: int = 0
    tokens: int = 0
    truncated: int = 0


class Counter:
    """Statistics that threads add to, and the report of truncated texts."""

    def __init__(self, name: str, limit: int | None) -> None:
        self._engine = name
        self._limit = limit
        self._lock = threading.Lock()
        self._statistics = Statistics()
        self._warned_at: float | None = None
        self._unreported = 0

    @property
    def statistics(self) -> Statistics:
        """The counts so far."""
        with self._lock:
            return self._statistics

    def add(self, more: Statistics) -> None:
        """Add to the counts, and warn of truncated texts, at most once in ``WARN_EVERY``."""
        report = 0
        with self._lock:
            pairs = zip(astuple(self._statistics), astuple(more), strict=True)
            self._statistics = Statistics(*map(sum, pairs))
            self._unreported += more.truncated
            now = time.monotonic()
            due = self._warned_at is None or now - self._warned_at >= WARN_EVERY
            if self._unreported and due:
                report, self._unreported, self._warned_at = self._unreported, 0, now
        if report:
            logger.warning(
                "%d %s longer than the %s tokens that encoder %r reads and cut; "
                "passages_of() embeds long texts in parts. This is reported at most once a minute, "
                "and Encoder.statistics.truncated counts all.",
                report, "text was" if report == 1 else "texts were", self._limit, self._engine,
            )  # fmt: skip

    def add_tokens(self, tokens: Tokens) -> None:
        """Add the texts, or pairs, of one call."""
        lengths = list(map(len, tokens.ids))
        self.add(Statistics(len(lengths), 0, sum(lengths), len(tokens.truncated)))


class Pipeline:
    """What has to be made again after a fork: a child uses nothing of it that its parent made."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        threads: int | None,
        providers: Sequence[Provider] | None,
        engine: str,
    ) -> None:
        spec = manifest.spec
        self._include_prompt = spec.include_prompt
        content = (directory / converted.TOKENIZER).read_text(encoding="utf-8")
        self.tokenizer = TextTokenizer(content, spec.max_seq_length, manifest.truncation_side)
        self.runner = Runner(
            directory / converted.MODEL, manifest.inputs, threads=threads, providers=providers,
            engine=engine, precision=manifest.precision,
        )  # fmt: skip
        self.counter = Counter(spec.name, spec.max_seq_length)

    def blocks(
        self,
        chunks: Iterator[list[str]],
        prompt: str,
        place: Callable[[int], int] = int,
        output: str = OUTPUT,
    ) -> Iterator[Vectors]:
        """Vectors of each chunk of clean texts; while one is encoded, the next is read and
        tokenized.

        ``place`` says for messages where a text stands in the caller's call.
        """
        first = next(chunks, None)
        if first is None:
            return
        tokens = self._some_tokens(first, prompt, 0, place)
        second = next(chunks, None)
        if second is None:
            yield self._counted(tokens, prompt, output)
            return
        begin, process = len(first), os.getpid()
        with ThreadPoolExecutor(1, thread_name_prefix="sbert-pg-encode") as pool:
            running: Future[Vectors] = pool.submit(self._counted, tokens, prompt, output)
            following: list[str] | None = second
            while following is not None:
                tokens = self._some_tokens(following, prompt, begin, place)
                begin += len(following)
                following = next(chunks, None)
                vectors = running.result()
                running = pool.submit(self._counted, tokens, prompt, output)
                yield vectors
                if os.getpid() != process:
                    raise EncodingError(
                        "These vectors are made by a thread of the process that began with them, "
                        "which a fork does not take along. Begin again in the child."
                    )
            yield running.result()

    def _some_tokens(
        self, texts: list[str], prompt: str, begin: int, place: Callable[[int], int]
    ) -> Tokens:
        tokens = self._tokenize(texts, prompt)
        if not all(tokens.ids):
            number = tokens.ids.index([])
            index = place(begin + number)
            raise EncodingError(
                f"Text {index}, {texts[number][:40]!r}, has no tokens: the encoder's tokenizer "
                "adds none of its own, so there is nothing to compute a vector from. Leave such "
                "texts out.",
                index=index,
            )
        return tokens

    def _counted(self, tokens: Tokens, prompt: str, output: str) -> Vectors:
        vectors = self._run(tokens, prompt, output)
        self.counter.add_tokens(tokens)
        return vectors

    def _tokenize(self, texts: Sequence[str], prompt: str) -> Tokens:
        return self.tokenizer.encode([prompt + text for text in texts] if prompt else texts)

    def _run(self, tokens: Tokens, prompt: str, output: str = OUTPUT) -> Vectors:
        lengths = None
        if prompt and not self._include_prompt:
            prompt_length = self.tokenizer.prompt_length(prompt)
            lengths = [min(prompt_length, len(ids)) for ids in tokens.ids]
        return self.runner.run(tokens.ids, lengths, output)

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        """A cross-encoder's scores of clean pairs, ``(len(pairs), labels)``, which are counted."""
        scores, tokens = self.scores_any(pairs)
        self.counter.add_tokens(tokens)
        return scores

    def scores_any(self, pairs: Sequence[tuple[str, str]]) -> tuple[Vectors, Tokens]:
        """As ``scores``, with the tokens; they are not counted."""
        tokens = self.tokenizer.encode_pairs(pairs)
        return self.runner.run(tokens.ids, tokens.second), tokens

    def run_any(self, texts: Sequence[str], prompt: str) -> Vectors:
        """Vectors of clean texts, which are not counted; those without a token have zeros."""
        tokens = self._tokenize(texts, prompt)
        some = [position for position, ids in enumerate(tokens.ids) if ids]
        vectors = np.zeros((len(texts), self.runner.dimensions), np.float32)
        vectors[some] = self._run(Tokens([tokens.ids[position] for position in some], []), prompt)
        return vectors


def engine_for(
    directory: Path, manifest: Manifest, engine: str | None, providers: Sequence[Provider] | None
) -> str:
    """The engine that runs an encoder: the one asked for, else the fastest here, else the usual."""
    chosen = Providers.of(providers)
    asked = asked_for(engine, manifest.precision, chosen)
    if asked is not None:
        return asked
    engines = able(manifest.precision, chosen)
    remembered = _read(directory).get(processor(), {}) if len(engines) > 1 else {}
    if not isinstance(remembered, dict) or remembered.get("versions") != versions():
        return engines[0]
    fastest = remembered.get("fastest")
    return fastest if fastest in engines and installed(fastest) else engines[0]


def measure(directory: Path, manifest: Manifest) -> dict[str, Speeds]:
    """Speeds of the engines that are installed, on one thread, remembered where it is possible.

    An engine that cannot run the encoder, or whose vectors are others, is left out and logged.
    Nothing is measured where fewer than two run this form.
    """
    engines = list(filter(installed, able(manifest.precision, Providers.of([CPU]))))
    if len(engines) < 2:
        return {}
    speeds = _speeds(directory, manifest, engines)
    fastest = fastest_of(speeds)
    measured = {"fastest": fastest, "versions": versions(), "tokens_per_cpu_second": speeds}
    _remember(directory, measured)
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
    if manifest.kind != "encoder":
        agreement = agreement_of_scores(np.concatenate(vectors), np.concatenate(usual))
        return agreement.min_cosine >= SAME_SCORES
    least = PRECISION_MIN_COSINE if manifest.precision == "int8" else EXPORT_MIN_COSINE
    pairs = zip(vectors, usual, strict=True)
    return all(agreement_of(a, b).min_cosine >= least for a, b in pairs)


def agreement_of_scores(scores: Vectors, reference: Vectors) -> Agreement:
    """Agreement of a cross-encoder's scores, a label at a time: their correlation.

    What they are for is an order, which neither their height nor their scale decides.
    """
    a, b = ((side - side.mean(axis=0)).T for side in (_unbounded(scores), _unbounded(reference)))
    return agreement_of(np.asarray(a), np.asarray(b))


def _unbounded(scores: Vectors) -> Vectors:
    """Scores before their sigmoid, where they have one."""
    if scores.min() <= 0 or scores.max() >= 1:
        return scores
    return np.asarray(np.log(scores / (1 - scores)), np.float32)


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
