"""The hot loop: token ids to vectors.

One onnxruntime session whose operators run on one thread, and as many Python threads as there are
cores that call it: onnxruntime leaves the interpreter while it computes, and a batch on one core
loses nothing to waiting for another core, as it does where an operator is divided among cores.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from sbert_pg.encoder.batches import TOKEN_BUDGET, plan
from sbert_pg.encoder.cores import lacks_vnni, usable_cores
from sbert_pg.errors import DamagedEncoderError, EncoderError, ProviderError
from sbert_pg.spec import Vectors

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POOLING_MASK = "pooling_mask"
_KNOWN_INPUTS = frozenset({INPUT_IDS, ATTENTION_MASK, POOLING_MASK})
OUTPUT = "embedding"

CPU = "CPUExecutionProvider"

Ids = npt.NDArray[np.int64]


class Runner:
    """A converted model, ready to run. Safe to share between threads.

    A call whose texts fit into one batch runs in its own thread; larger ones are shared out among
    at most ``threads`` threads. After a fork the child opens a session of its own at its first
    call.

    Args:
        model_path: the ONNX file.
        inputs: names of its inputs, some of ``input_ids``, ``attention_mask``, ``pooling_mask``.
        threads: batches that run at the same time; by default as many as this process may use
            cores (affinity and the container's limit counted).
        providers: onnxruntime's execution providers in order of preference; the CPU by default.
            onnxruntime runs on the CPU what the others do not take.
        budget: tokens in a batch, padding included.

    Raises:
        ProviderError: a provider is not in this onnxruntime, or does not start.
        DamagedEncoderError: the file cannot be read as a model with these inputs.
    """

    def __init__(
        self,
        model_path: str | Path,
        inputs: Sequence[str],
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        budget: int = TOKEN_BUDGET,
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
        self._providers = tuple(providers) if providers else (CPU,)
        self._budget = budget
        self.threads = threads or usable_cores()
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
        self._session = _session(self._path, self._providers)
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

    def _run_batch(
        self,
        batch: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None,
        result: Vectors,
    ) -> None:
        """Run some texts and put their vectors in their places."""
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
        result[list(batch)] = self._session.run([OUTPUT], feeds)[0]


def _session(path: Path, providers: Sequence[str]) -> onnxruntime.InferenceSession:
    available = onnxruntime.get_available_providers()
    missing = [name for name in providers if name not in available]
    if missing:
        raise ProviderError(
            f"This onnxruntime has no {', '.join(missing)}; it has {', '.join(available)}. "
            "CUDAExecutionProvider comes with the package onnxruntime-gpu, "
            "OpenVINOExecutionProvider with onnxruntime-openvino, each in place of onnxruntime."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if lacks_vnni():
        # Products of uint8 and int8 overflow 16 bits there; onnxruntime has a form that does not.
        # With VNNI it must not be asked for: it halves the speed.
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Errors are raised; warnings about the graph help nobody who uses it.
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            os.fspath(path), sess_options=options, providers=[*providers]
        )
    # onnxruntime's exceptions have no common base below Exception.
    except Exception as error:
        if set(providers) != {CPU}:
            raise ProviderError(
                f"{', '.join(providers)} cannot run {path}: {error}. Its driver or libraries may "
                "be missing or of another version, or it may lack an operator of this form: "
                "precision='fp32-plain' has only those that every provider knows."
            ) from error
        raise DamagedEncoderError(
            f"onnxruntime cannot open {path}: {error}. Convert the encoder anew."
        ) from error
    lost = [name for name in providers if name not in session.get_providers()]
    if lost:
        raise ProviderError(
            f"{', '.join(lost)} is part of this onnxruntime but does not start here; its driver "
            "or its libraries are missing or of another version."
        )
    return session
