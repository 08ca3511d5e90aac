"""Imported by worker processes of the tests: registers an encoder that needs no model.

``SBERT_PG_TEST_DELAY`` makes it slow (seconds per text), and a text with the word ``kill`` ends the
process, as a text that crashes a native library would.
"""

from __future__ import annotations

import os
import signal
import time

import sbert_pg.registry
from sbert_pg.testing import DeterministicEncoder

DELAY = float(os.environ.get("SBERT_PG_TEST_DELAY", "0"))
REFUSE = os.environ.get("SBERT_PG_TEST_REFUSE")


class SlowEncoder(DeterministicEncoder):
    def encode_document(self, texts):
        if any("kill" in text.split() for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(DELAY * len(texts))
        vectors = super().encode_document(texts)
        self.encoded.clear()
        return vectors


sbert_pg.registry.use_encoder(SlowEncoder(dimensions=32, refuse=REFUSE))
