"""A converted directory in use: tokenizer, session and counts of a process; which prompt counts."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.engines import Provider, Providers
from sbert_pg.encoder.measuring import engine_for
from sbert_pg.encoder.runner import OUTPUT, Runner
from sbert_pg.encoder.tokenizing import TextTokenizer, Tokens
from sbert_pg.errors import EncodingError
from sbert_pg.process import PerProcess
from sbert_pg.spec import DOCUMENT, QUERY, Vectors

logger = logging.getLogger("sbert_pg.encoder")

#: Seconds between two warnings about texts that were cut.
WARN_EVERY = 60.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an encoder has done in this process.

    Attributes:
        texts: texts encoded.
        duplicates: of these, texts that stood in the same call before and cost nothing.
        tokens: tokens that went through the model, special tokens included.
        truncated: texts longer than ``max_seq_length``, of which only the beginning was read.
    """

    texts: int = 0
    duplicates: int = 0
    tokens: int = 0
    truncated: int = 0


class Counter:
    """Statistics that threads add to, and the report of truncated texts.

    Args:
        name: the encoder's name, for messages.
        limit: tokens that it reads of a text.
    """

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

    def add(
        self, *, texts: int = 0, duplicates: int = 0, tokens: int = 0, truncated: int = 0
    ) -> None:
        """Add to the counts, and warn of truncated texts, at most once in ``WARN_EVERY``."""
        report = 0
        with self._lock:
            seen = self._statistics
            self._statistics = Statistics(
                seen.texts + texts,
                seen.duplicates + duplicates,
                seen.tokens + tokens,
                seen.truncated + truncated,
            )
            self._unreported += truncated
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
        self.add(
            texts=len(tokens.ids),
            tokens=sum(map(len, tokens.ids)),
            truncated=len(tokens.truncated),
        )


class Pipeline:
    """What has to be made again after a fork: a child uses nothing of it that its parent made.

    Args:
        threads: threads of inference; as many as the process may use by default.
        providers: see ``Encoder.load``.
    """

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
        """Vectors of each chunk; while one is encoded, the next is read and tokenized.

        Args:
            chunks: clean texts, read in the caller's thread.
            prompt: put before each.
            place: where a text of this number stands in the caller's call, for messages.
            output: which of the model's outputs to take.

        Raises:
            EncodingError: a text has no tokens.
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
                _require_process(process)
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


def _require_process(process: int) -> None:
    """Refuse to go on with what a thread of another process was making."""
    if os.getpid() != process:
        raise EncodingError(
            "These vectors are made by a thread of the process that began with them, which a fork "
            "does not take along. Begin again in the child."
        )


class Converted:
    """A converted directory in use: what an encoder and a reranker have in common."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        engine: str | None = None,
    ) -> None:
        self._directory = directory
        self._manifest = manifest
        self._arguments: dict[str, Any] = {
            "threads": threads, "providers": providers, "engine": engine
        }  # fmt: skip
        self._engine = engine_for(directory, manifest, engine, providers)
        self._pipeline = PerProcess(
            lambda: Pipeline(directory, manifest, threads, providers, self._engine)
        )
        # Whatever is wrong with the directory is said now and not at the first text.
        self._pipeline.get()

    @property
    def manifest(self) -> Manifest:
        """What the converted directory says about itself."""
        return self._manifest

    @property
    def directory(self) -> Path:
        """The converted directory."""
        return self._directory

    @property
    def megabytes(self) -> float:
        """Size of its files, in millions of bytes."""
        files = (self._directory / name for name in self._manifest.files)
        return sum(file.stat().st_size for file in files) / 1e6

    @property
    def engine(self) -> str:
        """What runs it, ``"onnxruntime"`` or ``"openvino"``."""
        return self._engine

    @property
    def max_seq_length(self) -> int | None:
        """Tokens that are read of a text or pair, special tokens included."""
        return self._manifest.spec.max_seq_length

    @property
    def statistics(self) -> Statistics:
        """Counts since it was loaded or the process forked, truncated texts among them."""
        return self._pipeline.get().counter.statistics


def opened(
    directory: str | Path,
    kind: str,
    providers: Sequence[Provider] | None,
    make: Callable[[Path, Manifest], T],
) -> T:
    """What ``make`` makes of a converted directory, verified against its digests.

    Raises:
        UnsupportedEncoderError: it is of another kind.
        DamagedEncoderError: files are missing or do not match their digests.
        ProviderError: an execution provider is missing, or not made for this form.
    """
    path = Path(directory)
    manifest = Manifest.read(path)
    converted.require_kind(path, manifest, kind)
    Providers.of(providers).require_suited(path, manifest.precision)
    return converted.verified(path, manifest, lambda: make(path, manifest))


def resolve_prompt(
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
    prompt_name: str | None,
    prompt: str | None,
) -> str:
    """The text to put before every text of a call, empty for none.

    Decided as sentence-transformers decides it (``_resolve_prompt``, ``encode_query`` and
    ``encode_document`` of 6.2): every model has the prompts ``query`` and ``document``, empty
    unless it says otherwise.

    Args:
        prompts: the encoder's prompts.
        default_prompt_name: name of the prompt used where neither argument is given.
        prompt: text asked for; it wins.

    Raises:
        EncodingError: there is no prompt of that name.
    """
    if prompt is not None:
        return prompt
    if prompt_name is None:
        return prompts.get(default_prompt_name, "") if default_prompt_name else ""
    if prompt_name in prompts:
        return prompts[prompt_name]
    if prompt_name in (QUERY, DOCUMENT):
        return ""
    raise EncodingError(
        f"There is no prompt named {prompt_name!r}; this encoder has "
        f"{', '.join(sorted({*prompts, QUERY, DOCUMENT}))}. Pass the text itself as prompt=."
    )
