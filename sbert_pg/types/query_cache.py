"""The vectors of recent queries, per encoder, in this process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from weakref import WeakKeyDictionary

import numpy as np

from sbert_pg.registry import find_encoder, get_encoder
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors
from sbert_pg.types.offload import off_loop

#: Queries kept for each encoder; at 384 dimensions they take about 2 MB.
SIZE = 1024

_lock = threading.Lock()
_recent: WeakKeyDictionary[TextEncoder, OrderedDict[str, Vectors]] = WeakKeyDictionary()


def query_vector(spec: EncoderSpec, text: str) -> Vectors:
    """The vector of one query, from the cache or encoded now.

    Args:
        spec: the encoder, as the column declares it.
        text: the query.

    Returns:
        Read-only float32 array of shape ``(dimensions,)``.

    Raises:
        EncoderError: the encoder cannot be loaded or refuses the text.
    """
    encoder = find_encoder(spec) or off_loop(lambda: get_encoder(spec))
    with _lock:
        recent = _recent.setdefault(encoder, OrderedDict())
        vector = recent.get(text)
        if vector is not None:
            recent.move_to_end(text)
            return vector
    # Outside the lock: two threads may encode the same new text, and neither waits for another.
    vector = np.array(off_loop(lambda: encoder.encode_query([text])[0]), dtype=np.float32)
    vector.setflags(write=False)
    with _lock:
        recent[text] = vector
        while len(recent) > SIZE:
            recent.popitem(last=False)
    return vector
