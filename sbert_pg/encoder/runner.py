"""The hot loop: token ids to vectors.

One onnxruntime session whose operators run on one thread, and as many Python threads as there are
cores that call it: onnxruntime leaves the interpreter while it computes, and a batch on one core
loses nothing to waiting for another core, as it does where an operator is divided among cores.

A GPU is the other way round: large batches, one at a time and from one thread, the next one made
ready meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sbert_pg.encoder.batches import GPU_TOKEN_BUDGET, TOKEN_BUDGET, plan
from sbert_pg.encoder.cores import usable_cores
from sbert_pg.encoder.providers import Provider, Providers
from sbert_pg.errors import DamagedEncoderError, EncoderError
from sbert_pg.spec import Vectors

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POOLING_MASK = "pooling_mask"
_KNOWN_INPUTS = frozenset({INPUT_IDS, ATTENTION_MASK, POOLING_MASK})
OUTPUT = "embedding"

Ids = npt.NDArray[np.int64]


class Runner:
    """A converted model, ready to run. Safe to share between threads.

    A call whose texts fit into one batch runs in its own thread; larger ones are shared out among
    at most ``threads`` threads. A GPU is called by one thread for all. After a fork the child opens
    a session of its own at its first call.

    Args:
        model_path: the ONNX file.
        inputs: names of its inputs, some of ``input_ids``, ``attention_mask``, ``pooling_mask``.
        threads: batches that run at the same time; by default as many as this process may use
            cores (affinity and the container's limit counted). A GPU runs one.
        providers: onnxruntime's execution providers in order of preference, see ``Providers.of``.
            onnxruntime runs on the CPU what the others do not take.
        budget: tokens in a batch, padding included; what suits the provider by default.

    Raises:
        ProviderError: a provider is not in this onnxruntime, or does not start.
        DamagedEncoderError: the file cannot be read as a model with these inputs.
    """

    def __init__(
        self,
        model_path: str | Path,
        inputs: Sequence[str],
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        budget: int | None = None,
    ) -> None:
        unknown = set(inputs) - _KNOWN_INPUTS
        if unknown or INPUT_IDS not in inputs:
            raise DamagedEncoderError(
                f"{model_path} is said to have the inputs {', '.join(inputs)}; known are "
                f"{', '.join(sorted(_KNOWN_INPUTS))}."
            )
        if threads is not None and threads < 1:
            raise EncoderError(f"An encoder cannot run on {threads} threads; give 1 or more.")
        self._path = Path(model_path)
        self._inputs = tuple(inputs)
        self._providers = Providers.of(providers)
        on_gpu = self._providers.on_gpu
        self._budget = budget or (GPU_TOKEN_BUDGET if on_gpu else TOKEN_BUDGET)
        self.threads = 1 if on_gpu else threads or usable_cores()
        self._lock = threading.Lock()
        self._open()

    def run(
        self, token_ids: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None
    ) -> Vectors:
        """Vectors of texts, in their order.

        Args:
            token_ids: token ids of each text, special tokens included; none may be empty.
            prompt_lengths: tokens at the beginning of each text that pooling leaves out, for models
                that do so.

        Returns:
            float32 of shape ``(len(token_ids), dimensions)``.
        """
        self._after_fork()
        if not token_ids:
            return np.empty((0, self.dimensions), np.float32)
        batches = plan([len(ids) for ids in token_ids], self._budget)
        result = np.empty((len(token_ids), self.dimensions), np.float32)
        if self._providers.on_gpu:
            self._run_in_turn(batches, token_ids, prompt_lengths, result)
            return result
        if len(batches) == 1:
            self._run_batch(batches[0], token_ids, prompt_lengths, result)
            return result
        waiting = iter(batches)
        # Each thread takes the next batch when it is done with one. The longest come first, so that
        # at the end nobody waits for a long one.
        turn = threading.Lock()

        def work() -> None:
            while True:
                with turn:
                    batch = next(waiting, None)
                if batch is None:
                    return
                with self._slots:
                    self._run_batch(batch, token_ids, prompt_lengths, result)

        helpers = [self._pool.submit(work) for _ in range(min(self.threads, len(batches)) - 1)]
        try:
            work()
        finally:
            # Also where it failed: nobody may write into the result afterwards.
            with turn:
                for _ in waiting:
                    pass
            for helper in helpers:
                helper.cancel()
        for helper in helpers:
            if not helper.cancelled():
                helper.result()
        return result

    def stream(
        self, token_ids: Iterable[Sequence[int]], chunk_size: int = 2048
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Vectors one by one in the order of the texts, in bounded memory.

        Args:
            token_ids: token ids of each text; read one chunk ahead, in the caller's thread.
            chunk_size: texts that are sorted by length together.
        """
        iterator = iter(token_ids)
        chunk = list(islice(iterator, chunk_size))
        with ThreadPoolExecutor(1, thread_name_prefix="sbert-pg-stream") as pool:
            while chunk:
                running: Future[Vectors] = pool.submit(self.run, chunk)
                chunk = list(islice(iterator, chunk_size))
                yield from running.result()

    @property
    def providers(self) -> list[str]:
        """Execution providers that the session uses."""
        found: list[str] = self._session.get_providers()
        return found

    def _open(self) -> None:
        self._pid = os.getpid()
        self._session = self._providers.open(self._path)
        declared = {value.name for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        width = outputs[OUTPUT].shape[-1] if OUTPUT in outputs else None
        if declared != set(self._inputs) or not isinstance(width, int):
            raise DamagedEncoderError(
                f"{self._path} has the inputs {', '.join(sorted(declared))} and the outputs "
                f"{', '.join(sorted(outputs))}; expected were {', '.join(self._inputs)} and "
                f"{OUTPUT} of a fixed width. Convert the encoder anew."
            )
        self.dimensions: int = width
        self._slots = threading.BoundedSemaphore(self.threads)
        # Threads start with the first call that needs them.
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="sbert-pg-run")

    def _after_fork(self) -> None:
        if self._pid != os.getpid():
            # The parent's threads do not exist here, and its locks may be held by one of them.
            self._lock = threading.Lock() if self._lock.locked() else self._lock
            with self._lock:
                if self._pid != os.getpid():
                    self._open()

    def _run_in_turn(
        self,
        batches: Sequence[Sequence[int]],
        token_ids: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None,
        result: Vectors,
    ) -> None:
        """Run batches in the one thread that calls the GPU; this one makes the next ones ready."""
        running: deque[tuple[Sequence[int], Future[list[Any]]]] = deque()
        try:
            for batch in batches:
                feeds = self._feeds(batch, token_ids, prompt_lengths)
                running.append((batch, self._pool.submit(self._session.run, [OUTPUT], feeds)))
                if len(running) > 2:
                    done, vectors = running.popleft()
                    result[list(done)] = vectors.result()[0]
            for done, vectors in running:
                result[list(done)] = vectors.result()[0]
        except BaseException:
            for _, vectors in running:
                vectors.cancel()
            raise

    def _run_batch(
        self,
        batch: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None,
        result: Vectors,
    ) -> None:
        """Run some texts and put their vectors in their places."""
        feeds = self._feeds(batch, token_ids, prompt_lengths)
        result[list(batch)] = self._session.run([OUTPUT], feeds)[0]

    def _feeds(
        self,
        batch: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None,
    ) -> dict[str, Any]:
        """The inputs of some texts, padded at the right."""
        texts = [token_ids[position] for position in batch]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        longest = int(lengths.max())
        positions = np.arange(longest)
        mask = (positions < lengths[:, None]).astype(np.int64)
        ids: Ids = np.zeros((len(texts), longest), np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        feeds: dict[str, Any] = {INPUT_IDS: ids}
        if ATTENTION_MASK in self._inputs:
            feeds[ATTENTION_MASK] = mask
        if POOLING_MASK in self._inputs:
            pooled = mask
            if prompt_lengths is not None:
                prompts = np.array([prompt_lengths[position] for position in batch])
                pooled = mask * (positions >= prompts[:, None])
            feeds[POOLING_MASK] = pooled
        return feeds
