"""The encoder of ``soak.py``, imported by its worker processes.

It needs no model and takes some time, so that things happen while a text is encoded. A text that
contains ``unencodable`` is refused.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from sbert_pg.registry import use_encoder
from sbert_pg.spec import Vectors
from sbert_pg.testing import DeterministicEncoder

DIMENSIONS = 32


class SlowEncoder(DeterministicEncoder):
    """Up to 30 ms a batch."""

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """As the base class, and slower."""
        time.sleep(random.uniform(0, 0.03))
        vectors = super().encode_document(texts)
        self.encoded.clear()
        return vectors


def encoder() -> SlowEncoder:
    return SlowEncoder(dimensions=DIMENSIONS, refuse="unencodable")


use_encoder(encoder())
