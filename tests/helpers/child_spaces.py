"""Imported by commands of the tests: registers encoders that need no model.

``SBERT_PG_TEST_DELAY`` makes the new one slow (seconds per text).
"""

from __future__ import annotations

import dataclasses
import os
import time

from sbert_pg.registry import use_encoder
from sbert_pg.testing import DeterministicEncoder

DELAY = float(os.environ.get("SBERT_PG_TEST_DELAY", "0"))


class SlowEncoder(DeterministicEncoder):
    def encode_document(self, texts):
        time.sleep(DELAY * len(texts))
        return super().encode_document(texts)


class TwinEncoder(DeterministicEncoder):
    """The old space, a little off, as another precision of the same weights is."""

    @property
    def spec(self):
        return dataclasses.replace(super().spec, precision="int8")

    def _vector(self, text):
        vector = super()._vector(text)
        vector = vector + 0.01 * vector[::-1]
        return vector / (vector @ vector) ** 0.5


use_encoder(DeterministicEncoder("old", 32))
use_encoder(SlowEncoder("new", 32, salt="new"))
use_encoder(TwinEncoder("old-twin", 32))
