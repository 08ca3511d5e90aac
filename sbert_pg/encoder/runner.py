"""The hot loop: token ids to vectors, in batches.

A batch should be large enough to keep the machine busy and small enough for its activations to stay
in the cache, and its texts should be equally long, so that nothing is computed for padding. Token
counts decide all of it.

One onnxruntime session whose operators run on one thread, and as many Python threads as there are
cores that call it: onnxruntime leaves the interpreter while it computes, and a batch on one core
loses nothing to waiting for another core, as it does where an operator is divided among cores.

A GPU is the other way round: large batches, one at a time and from one thread, the next one made
ready meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sbert_pg.encoder.engines import ONNXRUNTIME, OPENVINO, Provider, Providers, compile_graph
from sbert_pg.errors import DamagedEncoderError, EncoderError
from sbert_pg.process import usable_cores
from sbert_pg.spec import Vectors

#: Inputs of a converted model, int64 of shape ``(batch, tokens)``, and its output.
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POOLING_MASK = "pooling_mask"
TOKEN_TYPE_IDS = "token_type_ids"
_KNOWN_INPUTS = frozenset({INPUT_IDS, ATTENTION_MASK, POOLING_MASK, TOKEN_TYPE_IDS})
OUTPUT = "embedding"
#: A second output that some models have: the vectors of queries, where these go through further
#: layers than documents do.
QUERY_OUTPUT = "query_embedding"

Ids = npt.NDArray[np.int64]
#: The inputs of the model for the texts at some positions.
Feeds = Callable[[Sequence[int]], dict[str, Any]]

#: Tokens in a batch, padding included. Measured: 512 is best on a core with 1 MiB
#: of second-level cache; 1,024 costs 3 %, 2,048 costs 7 %.
TOKEN_BUDGET = 512
#: The same for a GPU. Measured on an H200 in fp16, short texts: 8,192 costs 6 %, 65,536 gains 4 %.
GPU_TOKEN_BUDGET = 32_768
#: Part of a batch that may be padding. Texts of another length join a batch that is not full only
#: as far as this; a batch more costs less than computing padding.
_MAX_PADDING = 0.08
#: Up to so many tokens a batch takes what is near, whatever the padding: running it costs more than
#: what its tokens cost.
_SMALL = 96
#: A text that comes alone is padded to a multiple of so many tokens for OpenVINO, which needs a
#: millisecond or two to get used to a shape that it did not run just before. Measured: 8 is 9 %
#: faster than 1 for texts of 6 to 20 tokens and 14 % for 60 to 120, with a shorter tail.
_STEP = 8


def plan(lengths: Sequence[int], budget: int = TOKEN_BUDGET) -> list[list[int]]:
    """Positions of the texts in each batch, longest first, by their tokens and a budget of such.

    A text longer than the budget is a batch by itself.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = tokens = 0
    for position in order:
        length = lengths[position]
        if batch:
            padded = longest * (len(batch) + 1)
            padding = padded - tokens - length
            allowed = padding <= _MAX_PADDING * padded or padded <= _SMALL
            if padded > budget or not allowed:
                batches.append(batch)
                batch, tokens = [], 0
        if not batch:
            longest = length
        batch.append(position)
        tokens += length
    if batch:
        batches.append(batch)
    return batches


class Runner:
    """A converted model, ready to run. Safe to share between threads.

    A call whose texts fit into one batch runs in its own thread; larger ones are shared out among
    at most ``threads``, of a GPU one. Threads do not survive a fork: a child makes its own runner.
    """

    def __init__(
        self,
        model_path: str | Path,
        inputs: Sequence[str],
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        budget: int | None = None,
        engine: str = ONNXRUNTIME,
        precision: str = "fp32",
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
        self.engine, self._precision = engine, precision
        self._open()

    def run(
        self,
        token_ids: Sequence[Sequence[int]],
        begins: Sequence[int] | None = None,
        output: str = OUTPUT,
    ) -> Vectors:
        """Vectors of texts by their token ids, none empty, float32 ``(texts, dimensions)``.

        ``begins`` says where that begins in each which pooling sees, or the second text of a pair.
        """
        if not token_ids:
            return np.empty((0, self.dimensions), np.float32)
        batches = plan([len(ids) for ids in token_ids], self._budget)
        result = np.empty((len(token_ids), self.dimensions), np.float32)

        def feeds(batch: Sequence[int]) -> dict[str, Any]:
            some = None if begins is None else [begins[text] for text in batch]
            step = _STEP if self.engine == OPENVINO and len(batch) == 1 else 1
            return feeds_of([token_ids[text] for text in batch], self._inputs, some, step)

        if self._providers.on_gpu:
            self._run_in_turn(batches, feeds, result, output)
            return result
        if len(batches) == 1:
            result[batches[0]] = self._call(feeds(batches[0]), output)
            return result
        waiting = iter(batches)
        # Each thread takes the next batch when it is done with one. The longest come first, so that
        # at the end no thread waits for a long one.
        turn = threading.Lock()

        def work() -> None:
            while True:
                with turn:
                    batch = next(waiting, None)
                if batch is None:
                    return
                with self._slots:
                    result[batch] = self._call(feeds(batch), output)

        helpers = [self._pool.submit(work) for _ in range(min(self.threads, len(batches)) - 1)]
        try:
            work()
        finally:
            # Also where it failed: nothing may write into the result afterwards.
            with turn:
                for _ in waiting:
                    pass
            for helper in helpers:
                helper.cancel()
        for helper in helpers:
            if not helper.cancelled():
                helper.result()
        return result

    def _open(self) -> None:
        self._session, declared, outputs = compile_graph(
            self.engine, self._path, self._precision, self.threads, self._providers
        )
        width = outputs.get(OUTPUT)
        if declared != set(self._inputs) or not isinstance(width, int):
            raise DamagedEncoderError(
                f"{self._path} has the inputs {', '.join(sorted(declared))} and the outputs "
                f"{', '.join(sorted(outputs))}; expected were {', '.join(self._inputs)} and "
                f"{OUTPUT} of a fixed width. Convert the encoder again."
            )
        self.dimensions: int = width
        self._slots = threading.BoundedSemaphore(self.threads)
        # Threads start with the first call that needs them.
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="sbert-pg-run")

    def _run_in_turn(
        self, batches: Sequence[list[int]], feeds: Feeds, result: Vectors, output: str
    ) -> None:
        """Run batches in the one thread that calls the GPU; this one makes the next ones ready."""
        running: deque[tuple[list[int], Future[Vectors]]] = deque()
        try:
            for batch in batches:
                running.append((batch, self._pool.submit(self._call, feeds(batch), output)))
                if len(running) > 2:
                    done, vectors = running.popleft()
                    result[done] = vectors.result()
            for done, vectors in running:
                result[done] = vectors.result()
        except BaseException:
            for _, vectors in running:
                vectors.cancel()
            raise

    def _call(self, feeds: dict[str, Any], output: str) -> Vectors:
        try:
            vectors: Vectors = self._session.run([output], feeds)[0]
        # The engines' exceptions have no common base below Exception.
        except Exception as error:
            raise EncoderError(f"{self.engine} cannot run {self._path}: {error}") from error
        return vectors


def feeds_of(
    texts: Sequence[Sequence[int]],
    inputs: Collection[str],
    begins: Sequence[int] | None = None,
    step: int = 1,
) -> dict[str, Any]:
    """The inputs of a model for some texts, padded at the right to a multiple of ``step``."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    longest = -(-int(lengths.max()) // step) * step
    positions = np.arange(longest)
    mask = (positions < lengths[:, None]).astype(np.int64)
    ids: Ids = np.zeros((len(texts), longest), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    marked = mask
    if begins is not None:
        marked = mask * (positions >= np.array(begins)[:, None])
    values = {INPUT_IDS: ids, ATTENTION_MASK: mask, POOLING_MASK: marked, TOKEN_TYPE_IDS: marked}
    return {name: values[name] for name in inputs}
