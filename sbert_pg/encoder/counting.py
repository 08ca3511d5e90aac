"""What an encoder has done, and the warning that texts were cut."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

logger = logging.getLogger("sbert_pg.encoder")

#: Seconds between two warnings about texts that were cut.
WARN_EVERY = 60.0


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an encoder has done since it was loaded.

    Attributes:
        texts: texts encoded.
        duplicates: of these, texts that stood in the same call before and cost nothing.
        tokens: tokens that went through the model, special tokens included.
        truncated: texts longer than ``max_seq_length``, of which only the beginning was read.
    """

    texts: int = 0
    duplicates: int = 0
    tokens: int = 0
    truncated: int = 0


class Counter:
    """Statistics that threads add to, and the report of truncated texts.

    Args:
        name: the encoder's name, for messages.
        limit: tokens that it reads of a text.
    """

    def __init__(self, name: str, limit: int | None) -> None:
        self._name = name
        self._limit = limit
        self._lock = threading.Lock()
        self._statistics = Statistics()
        self._warned_at: float | None = None
        self._unreported = 0

    @property
    def statistics(self) -> Statistics:
        """The counts so far."""
        with self._lock:
            return self._statistics

    def add(
        self, *, texts: int = 0, duplicates: int = 0, tokens: int = 0, truncated: int = 0
    ) -> None:
        """Add to the counts, and warn of truncated texts, at most once in ``WARN_EVERY``."""
        report = 0
        with self._lock:
            seen = self._statistics
            self._statistics = Statistics(
                seen.texts + texts,
                seen.duplicates + duplicates,
                seen.tokens + tokens,
                seen.truncated + truncated,
            )
            self._unreported += truncated
            now = time.monotonic()
            due = self._warned_at is None or now - self._warned_at >= WARN_EVERY
            if self._unreported and due:
                report, self._unreported, self._warned_at = self._unreported, 0, now
        if report:
            logger.warning(
                "%d %s longer than the %s tokens that encoder %r reads and cut; "
                "embed long texts in parts. This is reported at most once a minute, and "
                "Encoder.statistics.truncated counts all.",
                report, "text was" if report == 1 else "texts were", self._limit, self._name,
            )  # fmt: skip
