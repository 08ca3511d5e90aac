"""The encoders of ``live_change.py``, imported by its worker processes.

They need no model. All have the same width, so that a vector of one in the column of another raises
no error anywhere but in this library.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from sbert_pg.registry import use_encoder
from sbert_pg.spec import EncoderSpec, Vectors
from sbert_pg.testing import DeterministicEncoder

DIMENSIONS = 48
#: More changes than a run gets through.
SPACES = 60
#: Seconds a text, so that things happen while texts are encoded.
DELAY = float(os.environ.get("LIVE_CHANGE_DELAY", "0"))


class SpaceEncoder(DeterministicEncoder):
    """One vector space of many; as slow as it is told to be."""

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """As the base class, without keeping the texts."""
        time.sleep(DELAY * len(texts))
        vectors = super().encode_document(texts)
        self.encoded.clear()
        return vectors


def name_of(space: int) -> str:
    """Name of an encoder."""
    return f"live-{space}"


def encoder(space: int) -> SpaceEncoder:
    """An encoder, anew."""
    return SpaceEncoder(name_of(space), DIMENSIONS, salt=str(space))


def spec(space: int) -> EncoderSpec:
    """What a class would declare of it."""
    return EncoderSpec(name=name_of(space), dimensions=DIMENSIONS)


for _space in range(SPACES):
    use_encoder(encoder(_space))
