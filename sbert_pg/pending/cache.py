"""An optional cache of vectors in the database: a text is encoded once, across rows and tables.

Texts come back: a row is restored, two tables hold the same paragraph, a column is rebuilt by
another worker. A look-up of a thousand texts costs a few milliseconds, encoding them seconds.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog import tables
from sbert_pg.catalog.holding import fingerprint_of
from sbert_pg.errors import DeclarationError, EncodingError
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors

Kind = Literal["document", "query"]

#: Bytes of a text's digest. 2**64 texts until a collision is likely.
DIGEST_BYTES = 16
_STORED = np.dtype("<f4")
#: How stale ``used_at`` may be: a hit writes at most once in this time.
_TOUCH_AFTER = timedelta(hours=1)

_cache = tables.vector_cache


class VectorCache:
    """The table ``sbert.vector_cache`` for one encoder.

    Args:
        fingerprint: fingerprint of the encoder; vectors of one are never given to another.
        dimensions: width of its vectors.
        max_rows: rows kept, over all encoders; the least recently used go first. A row of 384
            dimensions takes about 1.7 kB.
    """

    def __init__(self, fingerprint: str, dimensions: int, *, max_rows: int = 1_000_000) -> None:
        if max_rows < 1:
            raise DeclarationError(f"A cache of {max_rows} rows keeps nothing; give at least 1.")
        self.fingerprint = fingerprint
        self.dimensions = dimensions
        self.max_rows = max_rows

    def get(
        self, connection: Connection, texts: Sequence[str], kind: Kind = "document"
    ) -> dict[str, Vectors]:
        """The vectors that are there, float32 of shape ``(dimensions,)`` by text.

        Args:
            connection: a connection; the caller commits, since hits are noted.
            texts: the texts.
            kind: documents and queries are encoded differently by some encoders.
        """
        wanted = {digest_of(text, kind): text for text in texts}
        if not wanted:
            return {}
        c = _cache.c
        rows = connection.execute(
            sa.select(
                c.digest,
                c.vector,
                (c.used_at < sa.func.now() - _TOUCH_AFTER).label("untouched"),
            ).where(c.fingerprint == self.fingerprint, _is_one_of(list(wanted)))
        ).all()
        untouched = sorted(bytes(row.digest) for row in rows if row.untouched)
        if untouched:
            self._touch(connection, untouched)
        found = {}
        for row in rows:
            vector = np.frombuffer(row.vector, dtype=_STORED)
            if vector.shape == (self.dimensions,):
                found[wanted[bytes(row.digest)]] = vector.astype(np.float32)
        return found

    def put(
        self,
        connection: Connection,
        texts: Sequence[str],
        vectors: Vectors,
        kind: Kind = "document",
    ) -> None:
        """Add vectors of shape ``(len(texts), dimensions)``; the caller commits.

        Text that is there already stays as it is.
        """
        stored = np.ascontiguousarray(vectors, dtype=_STORED)
        # In the order of digests, so that two processes cannot wait for each other in a circle.
        payloads = dict(
            sorted(
                (digest_of(text, kind), stored[i].tobytes())
                for i, text in enumerate(texts)
                if np.isfinite(stored[i]).all()
            )
        )
        if not payloads:
            return
        given = (
            sa.func.unnest(_bytes(list(payloads)), _bytes(list(payloads.values())))
            .table_valued(sa.column("digest"), sa.column("vector"), name="given")
            .render_derived()
        )
        rows = sa.select(sa.literal(self.fingerprint, sa.Text), given.c.digest, given.c.vector)
        insert = pg.insert(_cache).from_select(["fingerprint", "digest", "vector"], rows)
        connection.execute(insert.on_conflict_do_nothing())

    def trim(self, connection: Connection) -> int:
        """Remove what exceeds ``max_rows``, least recently used first; the caller commits.

        Counts the table: some 100 ms for a million rows. Two processes that trim at once do not
        wait for each other.

        Returns:
            The number of rows removed.
        """
        count = connection.execute(sa.select(sa.func.count()).select_from(_cache)).scalar_one()
        excess = count - self.max_rows
        if excess <= 0:
            return 0
        c = _cache.c
        oldest = (
            sa.select(c.fingerprint, c.digest)
            .order_by(c.used_at)
            .limit(excess)
            .with_for_update(skip_locked=True)
            .cte("oldest")
        )
        gone = sa.delete(_cache).where(
            c.fingerprint == oldest.c.fingerprint, c.digest == oldest.c.digest
        )
        return connection.execute(gone).rowcount

    def _touch(self, connection: Connection, digests: list[bytes]) -> None:
        c = _cache.c
        free = (
            sa.select(c.digest)
            .where(c.fingerprint == self.fingerprint, _is_one_of(digests))
            .with_for_update(skip_locked=True)
            .cte("free")
        )
        connection.execute(
            sa.update(_cache)
            .values(used_at=sa.func.now())
            .where(c.fingerprint == self.fingerprint, c.digest == free.c.digest)
        )


class CachedEncoder:
    """An encoder that looks into the cache first; give it to a worker or ``use_encoder``.

    Each call uses connections of its own and holds none while encoding. A text that the encoder
    refuses is refused as without a cache.

    Args:
        encoder: the encoder.
        engine: an engine of the database whose cache is used.
        max_rows: rows kept; see ``VectorCache``.
        min_characters: shorter texts are not looked up, since encoding them costs less.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        engine: sa.Engine,
        *,
        max_rows: int = 1_000_000,
        min_characters: int = 0,
    ) -> None:
        self._encoder = encoder
        self._engine = engine
        self._min_characters = min_characters
        self.cache = VectorCache(
            fingerprint_of(encoder), encoder.spec.dimensions, max_rows=max_rows
        )
        #: Texts that were not encoded, being there or twice in one call, and those that were.
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
        return self._encoder.probe_vectors

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts, float32 of shape ``(len(texts), dimensions)``.

        Raises:
            EncodingError: a text cannot be encoded; ``index`` is its position.
        """
        return self._through(texts, "document")

    def encode_query(self, texts: Sequence[str]) -> Vectors:
        """Vectors of queries; encoded at once, since a query's latency is the look-up's as well."""
        return self._encoder.encode_query(texts)

    def _through(self, texts: Sequence[str], kind: Kind) -> Vectors:
        looked_up = [text for text in texts if len(text) >= self._min_characters]
        with self._engine.begin() as connection:
            found = self.cache.get(connection, looked_up, kind)
        missing = list(dict.fromkeys(text for text in texts if text not in found))
        if missing:
            try:
                encoded = np.asarray(self._encoder.encode_document(missing), dtype=np.float32)
            except EncodingError as error:
                if error.index is not None:
                    error.index = texts.index(missing[error.index])
                raise
            self._keep(missing, encoded, kind)
            found |= dict(zip(missing, encoded, strict=True))
        with self._lock:
            self.misses += len(missing)
            self.hits += len(texts) - len(missing)
        if not texts:
            return np.empty((0, self.spec.dimensions), dtype=np.float32)
        return np.stack([found[text] for text in texts])

    def _keep(self, texts: list[str], vectors: Vectors, kind: Kind) -> None:
        keep = [i for i, text in enumerate(texts) if len(text) >= self._min_characters]
        with self._lock:
            self._untrimmed += len(keep)
            # Counting the table at every batch would cost more than a somewhat larger table.
            due = self._untrimmed >= max(self.cache.max_rows // 20, 1_000)
            if due:
                self._untrimmed = 0
        with self._engine.begin() as connection:
            self.cache.put(connection, [texts[i] for i in keep], vectors[keep], kind)
            if due:
                self.cache.trim(connection)


def cached(encoder: TextEncoder, engine: sa.Engine, max_rows: int) -> TextEncoder:
    """The encoder with a cache of so many rows, or as it is where that is 0."""
    return CachedEncoder(encoder, engine, max_rows=max_rows) if max_rows else encoder


def digest_of(text: str, kind: Kind = "document") -> bytes:
    """What a text is found by, 16 bytes."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=kind.encode())
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()


def _bytes(values: list[bytes]) -> sa.ColumnElement[object]:
    kind = pg.ARRAY(sa.LargeBinary)
    return sa.cast(sa.bindparam(None, values, type_=kind), kind)


def _is_one_of(digests: list[bytes]) -> sa.ColumnElement[bool]:
    return _cache.c.digest == sa.any_(_bytes(digests))


__all__ = ["DIGEST_BYTES", "CachedEncoder", "VectorCache", "cached", "digest_of"]
