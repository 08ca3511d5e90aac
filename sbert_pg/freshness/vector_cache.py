"""Vectors kept in the database: no text is encoded twice that was encoded before."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import ClassVar

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog import tables
from sbert_pg.catalog.holding import fingerprint_of
from sbert_pg.errors import DeclarationError, EncodingError
from sbert_pg.probes import STORED, measured
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors, vectors_of
from sbert_pg.system import array

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
    384 dimensions takes about 1.7 kB. ``hits`` were there, or twice in one call.
    """

    measures_its_probes: ClassVar[bool] = True

    def __init__(self, encoder: TextEncoder, engine: sa.Engine, *, max_rows: int) -> None:
        if max_rows < 1:
            raise DeclarationError(f"A cache of {max_rows} rows keeps nothing; give at least 1.")
        self._encoder = encoder
        self._engine = engine
        self._max_rows = max_rows
        self._fingerprint = fingerprint_of(encoder)
        self.hits = 0
        self.misses = 0
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
        with self._lock:
            self.misses += len(missing)
            self.hits += len(texts) - len(missing)
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
        payload = (
            sa.func.unnest(
                array(payloads, sa.LargeBinary), array(payloads.values(), sa.LargeBinary)
            )
            .table_valued(sa.column("digest"), sa.column("vector"), name="given")
            .render_derived()
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
