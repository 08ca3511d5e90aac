"""Texts to vectors in bulk, in a pipeline or from the cache; one bad text costs no other its own.

The encoder is the slowest part by far, so it must never wait: while it has one batch, the next is
being read (by whoever calls ``Flow.put``) and the last is being written (by a thread). Encoding
runs in two threads by default, so that one batch is tokenised while the other is computed. They
take turns at the device as it comes, so a batch that another overtook keeps no later one from being
written; in order, all would wait for it, and then the encoder for all.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import ClassVar, Generic, TypeVar

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog import Binding, tables
from sbert_pg.catalog.holding import fingerprint_of, hold_encoder
from sbert_pg.errors import DeclarationError, DimensionError, EncoderError, EncodingError
from sbert_pg.freshness.passages import Cut
from sbert_pg.freshness.queue import Row
from sbert_pg.freshness.settings import Database
from sbert_pg.probes import STORED, measured
from sbert_pg.registry import get_encoder
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors, vectors_of
from sbert_pg.sqlstates import words_of
from sbert_pg.system import array, unnested
from sbert_pg.types import wire


@dataclass(slots=True)
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
    result.texts = len(texts)
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
    return result


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

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # Where the reader failed, or a stage did, what waits is not encoded any more.
        failed = error is not None or self._error is not None
        self._pool.shutdown(wait=True, cancel_futures=failed)
        self._encoded.put(None)
        self._writer.join()
        if error is None:
            self._raise()


#: Bytes of a text's digest in the cache. 2**64 texts until a collision is likely.
_DIGEST_BYTES = 16
#: How stale ``used_at`` may be: a hit writes at most once in this time.
_TOUCH_AFTER = timedelta(hours=1)
_cache = tables.vector_cache


class CachedEncoder:
    """An encoder that first looks for a text in ``sbert.vector_cache``.

    A restored row, the same paragraph in two tables, a column that is filled again: a look-up of a
    thousand texts costs milliseconds, encoding them seconds. Each call uses connections of its own
    and holds none while encoding. A text that the encoder refuses is refused as without a cache. Of
    this role ``max_rows`` are kept, over all encoders; the least recently used go first. A row of
    384 dimensions takes about 1.7 kB.
    """

    measures_its_probes: ClassVar[bool] = True

    def __init__(self, encoder: TextEncoder, engine: sa.Engine, *, max_rows: int) -> None:
        if max_rows < 1:
            raise DeclarationError(f"A cache of {max_rows} rows keeps nothing; give at least 1.")
        self._encoder = encoder
        self._engine = engine
        self._max_rows = max_rows
        self._fingerprint = fingerprint_of(encoder)
        self._untrimmed = 0
        self._lock = threading.Lock()

    @property
    def spec(self) -> EncoderSpec:
        """The encoder's."""
        return self._encoder.spec

    @property
    def probe_vectors(self) -> Vectors:
        """The encoder's, encoded and not looked up."""
        return measured(self._encoder)

    def encode_query(self, texts: Sequence[str]) -> Vectors:
        """Vectors of queries; encoded at once, since a query's latency is the look-up's as well."""
        return self._encoder.encode_query(texts)

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts, float32 of shape ``(len(texts), dimensions)``."""
        with self._engine.begin() as connection:
            known = self._get(connection, texts)
        missing = list(dict.fromkeys(text for text in texts if text not in known))
        if missing:
            try:
                output = self._encoder.encode_document(missing)
            except EncodingError as error:
                if error.index is not None:
                    error.index = texts.index(missing[error.index])
                raise
            encoded = vectors_of(self.spec, output, len(missing))
            self._keep(missing, encoded)
            known |= dict(zip(missing, encoded, strict=True))
        if not texts:
            return np.empty((0, self.spec.dimensions), dtype=np.float32)
        return np.stack([known[text] for text in texts])

    def _get(self, connection: Connection, texts: Sequence[str]) -> dict[str, Vectors]:
        text_of = {_digest_of(text): text for text in texts}
        c = _cache.c
        rows = connection.execute(
            sa.select(
                c.digest, c.vector, (c.used_at < sa.func.now() - _TOUCH_AFTER).label("untouched")
            ).where(self._mine(), _is_one_of(text_of))
        ).all()
        untouched = sorted(bytes(row.digest) for row in rows if row.untouched)
        if untouched:
            self._touch(connection, untouched)
        known = {}
        for row in rows:
            vector = np.frombuffer(row.vector, dtype=STORED)
            if vector.shape == (self.spec.dimensions,):
                known[text_of[bytes(row.digest)]] = vector.astype(np.float32)
        return known

    def _keep(self, texts: list[str], vectors: Vectors) -> None:
        stored = np.ascontiguousarray(vectors, dtype=STORED)
        # In the order of digests, so that two processes cannot wait for each other in a circle.
        payloads = dict(
            sorted(
                (_digest_of(text), stored[i].tobytes())
                for i, text in enumerate(texts)
                if np.isfinite(stored[i]).all()
            )
        )
        with self._lock:
            self._untrimmed += len(payloads)
            # Counting the table at every batch would cost more than a somewhat larger table.
            due = self._untrimmed >= max(self._max_rows // 20, 1_000)
            if due:
                self._untrimmed = 0
        payload = unnested(
            "given",
            digest=array(payloads, sa.LargeBinary),
            vector=array(payloads.values(), sa.LargeBinary),
        )
        rows = sa.select(sa.literal(self._fingerprint, sa.Text), payload.c.digest, payload.c.vector)
        insert = pg.insert(_cache).from_select(["fingerprint", "digest", "vector"], rows)
        with self._engine.begin() as connection:
            connection.execute(insert.on_conflict_do_nothing())
            if due:
                self._trim(connection)

    def _trim(self, connection: Connection) -> None:
        """Remove what exceeds ``max_rows``; two processes that do so do not wait for each other."""
        c = _cache.c
        mine = sa.select(sa.func.count()).where(c.role == sa.func.current_user())
        count = connection.execute(mine).scalar_one()
        oldest = (
            sa.select(c.role, c.fingerprint, c.digest)
            .where(c.role == sa.func.current_user())
            .order_by(c.used_at)
            .limit(max(count - self._max_rows, 0))
            .with_for_update(skip_locked=True)
            .cte("oldest")
        )
        same = [c[column.name] == column for column in oldest.c]
        connection.execute(sa.delete(_cache).where(*same))

    def _mine(self) -> sa.ColumnElement[bool]:
        """Entries of this role and encoder: who writes a vector decides what others take for it."""
        c = _cache.c
        return sa.and_(c.role == sa.func.current_user(), c.fingerprint == self._fingerprint)

    def _touch(self, connection: Connection, digests: list[bytes]) -> None:
        c = _cache.c
        free = (
            sa.select(c.digest)
            .where(self._mine(), _is_one_of(digests))
            .with_for_update(skip_locked=True)
            .cte("free")
        )
        connection.execute(
            sa.update(_cache)
            .values(used_at=sa.func.now())
            .where(self._mine(), c.digest == free.c.digest)
        )


def _digest_of(text: str) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"document")
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()


def _is_one_of(digests: Iterable[bytes]) -> sa.ColumnElement[bool]:
    return _cache.c.digest == sa.any_(array(digests, sa.LargeBinary))
