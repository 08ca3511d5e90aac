"""The hot loop: token numbers to vectors, on all cores that the process may use.

Texts of one batch have one length, so that there is no padding to compute, no mask to apply, and no
neighbour that could change a vector. Batches are cut by a budget of tokens small enough for the
activations to stay in the processor's cache. One session with one thread inside, run by one Python
thread for each core, beats a session that spreads every operator over the cores: nobody waits for
the slowest at each of a hundred operators.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sbert_pg.errors import DamagedEncoderError, ProviderError

Vectors = npt.NDArray[np.float32]

#: Tokens of one batch. Measured on 384 dimensions: throughput is flat from 512 to 1,024.
TOKEN_BUDGET = 768
CPU = "CPUExecutionProvider"
#: A graphics processor is filled by far larger batches.
GPU_TOKEN_BUDGET = 32_768

_TOKEN_IDS = "input_ids"
_ATTENTION_MASK = "attention_mask"
_TOKEN_TYPES = "token_type_ids"
_POOLING_MASK = "pooling_mask"


class Runner:
    """A model's session and the threads that run it. Safe to share between threads.

    Args:
        path: the ONNX model. Its inputs are int64 of shape ``(batch, tokens)``.
        inputs: names of its inputs, among ``input_ids``, ``attention_mask``, ``token_type_ids`` and
            ``pooling_mask``.
        threads: threads of inference; as many as the process may use by default.
        providers: onnxruntime execution providers in order of preference; the CPU by default.
        token_budget: tokens of one batch.

    Raises:
        ProviderError: a provider is not in this installation of onnxruntime, or does not start.
        DamagedEncoderError: onnxruntime cannot read the model.
    """

    def __init__(
        self,
        path: str | Path,
        inputs: Sequence[str],
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        token_budget: int | None = None,
    ) -> None:
        self.threads = max(1, threads if threads is not None else usable_cores())
        self.providers = tuple(providers or (CPU,))
        self._inputs = tuple(inputs)
        self._session = _session(Path(path), self.providers)
        on_cpu = self.providers[0] == CPU
        self._budget = token_budget or (TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET)
        # However many threads call, no more than this run the model at a time.
        self._permits = threading.BoundedSemaphore(self.threads)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()

    def run(
        self, tokens: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None
    ) -> Vectors:
        """Vectors of tokenised texts, in their order.

        Args:
            tokens: token numbers of each text, special tokens included, at least one a text.
            prompt_lengths: for models whose pooling leaves the prompt out, the number of tokens at
                the beginning of each text that it does not see.

        Returns:
            float32 of shape ``(len(tokens), dimensions)``.
        """
        batches = cut([len(text) for text in tokens], self._budget)
        if not batches:
            width = self._session.get_outputs()[0].shape[1]
            return np.empty((0, width), dtype=np.float32)
        pending = iter(batches)
        lock = threading.Lock()
        found: list[tuple[npt.NDArray[np.int64], Vectors]] = []

        def work() -> None:
            while True:
                with lock:
                    batch = next(pending, None)
                if batch is None:
                    return
                feed = self._feed(tokens, prompt_lengths, batch)
                with self._permits:
                    vectors = self._session.run(None, feed)[0]
                found.append((batch, vectors))

        helpers = self._helpers(min(self.threads, len(batches)) - 1, work)
        try:
            work()
        finally:
            # After an error the helpers must not go on to batches that nobody wants.
            with lock:
                pending = iter(())
            wait(helpers)
        for helper in helpers:
            helper.result()
        matrix = np.empty((len(tokens), found[0][1].shape[1]), dtype=np.float32)
        for batch, vectors in found:
            matrix[batch] = vectors
        return matrix

    def stream(self, chunks: Iterable[Sequence[Sequence[int]]]) -> Iterator[Vectors]:
        """``run`` for each chunk in turn; memory is bounded by the largest chunk."""
        for chunk in chunks:
            yield self.run(chunk)

    def _helpers(self, count: int, work: Any) -> list[Future[None]]:
        if count < 1:
            return []
        with self._pool_lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    self.threads, thread_name_prefix="sbert-pg-inference"
                )
        return [self._pool.submit(work) for _ in range(count)]

    def _feed(
        self,
        tokens: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None,
        batch: npt.NDArray[np.int64],
    ) -> dict[str, npt.NDArray[np.int64]]:
        ids = np.array([tokens[position] for position in batch], dtype=np.int64)
        feed = {}
        for name in self._inputs:
            if name == _TOKEN_IDS:
                feed[name] = ids
            elif name == _ATTENTION_MASK:
                feed[name] = np.ones_like(ids)
            elif name == _TOKEN_TYPES:
                feed[name] = np.zeros_like(ids)
            elif name == _POOLING_MASK:
                seen = np.ones_like(ids)
                if prompt_lengths is not None:
                    for row, position in enumerate(batch):
                        seen[row, : prompt_lengths[position]] = 0
                feed[name] = seen
            else:
                raise DamagedEncoderError(
                    f"The model has an input {name!r} that this version does not know; convert the "
                    "encoder anew."
                )
        return feed


def cut(lengths: Sequence[int], budget: int) -> list[npt.NDArray[np.int64]]:
    """Positions of texts, batch by batch: one length a batch, ``budget`` tokens at most.

    The longest come first, so that no thread begins a large batch when the others are done. Texts
    of one length are spread evenly over their batches.
    """
    if not lengths:
        return []
    array = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-array, kind="stable")
    borders = np.flatnonzero(np.diff(array[order])) + 1
    batches = []
    for group in np.split(order, borders):
        length = int(array[group[0]])
        number = math.ceil(len(group) / max(1, budget // max(1, length)))
        batches.extend(np.array_split(group, number))
    return batches


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    quota = _quota()
    return max(1, min(cores, math.ceil(quota)) if quota is not None else cores)


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores by the control group's quota (version 2, then 1), or ``None`` without one."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _session(path: Path, providers: Sequence[str]) -> Any:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    missing = [name for name in providers if name not in available]
    if missing:
        raise ProviderError(
            f"onnxruntime has no {', '.join(missing)} in this installation; it has "
            f"{', '.join(available)}. Install the package that brings it, for example "
            "onnxruntime-gpu or onnxruntime-openvino, in place of onnxruntime."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:
        # onnxruntime's exceptions have no common base of their own.
        raise DamagedEncoderError(f"onnxruntime cannot read {path}: {error}") from error
    # A provider that does not start is left out with a log line; that must not pass unseen.
    left_out = [name for name in providers if name not in session.get_providers()]
    if left_out:
        raise ProviderError(
            f"{', '.join(left_out)} is installed but does not start here; onnxruntime would run "
            f"on {', '.join(session.get_providers())}. Check its drivers, or choose "
            f"providers=[{CPU!r}]."
        )
    return session
