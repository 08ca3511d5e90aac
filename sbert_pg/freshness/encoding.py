"""Texts to vectors in bulk, in a pipeline; one bad text does not cost the others theirs.

The encoder is the slowest part by far, so it must never wait: while it has one batch, the next is
being read (by whoever calls ``Flow.put``) and the last is being written (by a thread). Encoding
runs in two threads by default, so that one batch is tokenised while the other is computed. They
take turns at the device as it comes, so a batch that another overtook keeps no later one from being
written; in order, all would wait for it, and then the encoder for all.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np

from sbert_pg.catalog import Binding
from sbert_pg.catalog.holding import hold_encoder
from sbert_pg.errors import DimensionError, EncoderError, EncodingError
from sbert_pg.freshness.passages import Cut
from sbert_pg.freshness.queue import Row
from sbert_pg.freshness.settings import Database
from sbert_pg.probes import measured
from sbert_pg.registry import get_encoder
from sbert_pg.spec import TextEncoder, Vectors, vectors_of
from sbert_pg.sqlstates import words_of
from sbert_pg.types import wire


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vectors of a batch in pgvector's binary format by label, ``None`` where a row has no
    text; why others have none; how many different texts were encoded; and passages of documents.
    """

    vectors: dict[str, bytes | None] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    texts: int = 0
    cuts: dict[str, Cut] = field(default_factory=dict)
    passages: dict[str, bytes] = field(default_factory=dict)


def held_encoder(database: Database, binding: Binding) -> TextEncoder:
    """The encoder of a column, held against what the column was sealed with."""
    encoder = get_encoder(binding.declared)
    # What it takes to encode the probes is not spent in a transaction.
    measured(encoder)
    with database.begin() as connection:
        hold_encoder(connection, binding, encoder)
    return encoder


def embed(binding: Binding, encoder: TextEncoder, batch: Sequence[Row]) -> Embedded:
    """Encode the texts of rows, each different text once.

    ``EncoderError`` where it fails whatever the text, so that the texts are not to blame.
    """
    labels_of: dict[str, list[str]] = {}
    result = Embedded()
    for row in batch:
        if row.of is None:
            result.vectors[row.label] = None
        elif row.text is None:
            result.failures[row.label] = "its document has changed since it was cut"
        else:
            labels_of.setdefault(row.text, []).append(row.label)
    texts = list(labels_of)
    vectors, faults = encode_for(binding, encoder, texts)
    payloads = wire.to_wire_rows(vectors, binding.storage)
    unfit = wire.unfit(vectors, binding.storage, binding.declared.similarity)
    faults = {i: f"the encoder gave a vector that {why}" for i, why in unfit.items()} | faults
    for position, labels in enumerate(labels_of.values()):
        fault = faults.get(position)
        for label in labels:
            if fault is None:
                result.vectors[label] = payloads[position]
            else:
                result.failures[label] = fault
    return Embedded(result.vectors, result.failures, len(texts))


def encode_for(
    binding: Binding, encoder: TextEncoder, texts: Sequence[str]
) -> tuple[Vectors, dict[int, str]]:
    """As ``encode_each``; ``DimensionError`` where the column has another width."""
    vectors, faults = encode_each(encoder, texts)
    if vectors.shape[1] != binding.dimensions:
        raise DimensionError(
            f"Encoder {encoder.spec.name!r} gives {vectors.shape[1]} dimensions where column "
            f"{binding} has {binding.dimensions}. Use the encoder that the column was declared for."
        )
    return vectors, faults


def encode_each(encoder: TextEncoder, texts: Sequence[str]) -> tuple[Vectors, dict[int, str]]:
    """Encode all texts that can be encoded; reasons by position for the rows that mean nothing.

    An encoder that says which text it refuses is asked again without it; else the batch is halved
    until the bad ones stand alone. ``EncoderError`` where it fails whatever the text.
    """
    vectors: Vectors = np.zeros((len(texts), encoder.spec.dimensions), dtype=np.float32)
    faults: dict[int, str] = {}
    if not texts:
        return vectors, faults
    last: Exception | None = None
    spans = [list(range(len(texts)))]
    while spans:
        span = spans.pop()
        try:
            output = encoder.encode_document([texts[i] for i in span])
        except Exception as error:  # Whatever an encoder raises, one text may be the reason for it.
            if isinstance(error, EncoderError) and not isinstance(error, EncodingError):
                raise
            last = error
            spans += _without(span, error, faults)
            continue
        vectors[span] = vectors_of(encoder.spec, output, len(span))
    if last is not None and not isinstance(last, EncodingError) and 1 < len(texts) == len(faults):
        raise EncoderError(
            f"Encoder {encoder.spec.name!r} fails for every text: {words_of(last)}"
        ) from last
    return vectors, faults


def _without(span: list[int], error: Exception, faults: dict[int, str]) -> list[list[int]]:
    """What is left to try of a span that failed."""
    index = error.index if isinstance(error, EncodingError) else None
    if len(span) == 1:
        index = 0
    if index is not None and 0 <= index < len(span):
        faults[span[index]] = words_of(error)
        rest = span[:index] + span[index + 1 :]
        return [rest] if rest else []
    middle = len(span) // 2
    return [span[middle:], span[:middle]]


Batch = TypeVar("Batch")
Result = TypeVar("Result")


class Flow(Generic[Batch, Result]):
    """A pipeline of three stages; use it as a context manager.

    Args:
        encode: makes the result of a batch; called in several threads.
        write: takes batch and result, as they are encoded; called in one thread.
        encoders: threads that encode.
    """

    def __init__(
        self,
        encode: Callable[[Batch], Result],
        write: Callable[[Batch, Result], None],
        *,
        encoders: int,
    ) -> None:
        self._encode = encode
        self._write = write
        self._pool = ThreadPoolExecutor(encoders, thread_name_prefix="sbert-pg-encode")
        # One batch waits and one is being written, beside those that are being encoded.
        self._most = encoders + 2
        self._encoded: queue.SimpleQueue[tuple[Batch, Future[Result]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="sbert-pg-write", daemon=True)
        self._lock = threading.Condition()
        self._open = 0
        self._error: BaseException | None = None

    def __enter__(self) -> Flow[Batch, Result]:
        self._writer.start()
        return self

    def put(self, batch: Batch) -> None:
        """Hand a batch over; waits while enough are under way.

        Raises:
            Exception: what a stage raised; nothing is taken after that.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._open < self._most or self._error is not None)
            self._raise()
            self._open += 1
        future = self._pool.submit(self._encode, batch)
        future.add_done_callback(lambda done: self._encoded.put((batch, done)))

    @property
    def under_way(self) -> int:
        """Batches that were put and are not written yet."""
        with self._lock:
            return self._open

    def drain(self) -> None:
        """Wait until everything that was put is written.

        Raises:
            Exception: what a stage raised.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._open == 0 or self._error is not None)
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        while (entry := self._encoded.get()) is not None:
            batch, future = entry
            try:
                if self._error is None and not future.cancelled():
                    self._write(batch, future.result())
            except BaseException as error:  # Handed to the thread that puts.
                self._error = error
            finally:
                with self._lock:
                    self._open -= 1
                    self._lock.notify_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Where the reader failed, or a stage did, what waits is not encoded any more.
        failed = error is not None or self._error is not None
        self._pool.shutdown(wait=True, cancel_futures=failed)
        self._encoded.put(None)
        self._writer.join()
        if error is None:
            self._raise()
