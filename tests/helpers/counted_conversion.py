"""A process that loads an encoder and says how often it converted: spawned ones import it."""

from __future__ import annotations

import multiprocessing

from sbert_pg.encoder import Encoder, conversion


def counted_conversion(path: str, cache: str, queue: multiprocessing.Queue[object]) -> None:
    """Put the number of conversions and the fingerprint into the queue."""
    made = []
    original = conversion.convert
    conversion.convert = lambda *args: made.append(1) or original(*args)  # type: ignore[assignment]
    encoder = Encoder.load(path, precision="fp32", cache_dir=cache)
    queue.put((len(made), encoder.spec.fingerprint))
