"""The worker's counts as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sbert_pg.errors import MissingExtraError
from sbert_pg.worker.tally import BUCKETS, ColumnTally, Durations, Tally

if TYPE_CHECKING:
    from prometheus_client.core import Metric

#: Counters: attribute of ``ColumnTally``, name, help.
_COUNTERS = (
    ("embedded", "sbert_pg_rows_embedded", "Rows whose vector was written."),
    ("texts", "sbert_pg_texts_encoded", "Texts encoded; one that rows of a batch share is one."),
    ("errors", "sbert_pg_row_errors", "Attempts to embed a row that ended with an error."),
    ("failed", "sbert_pg_rows_failed", "Rows that ended as failed after their last attempt."),
    ("changed", "sbert_pg_rows_changed", "Rows whose text changed while it was encoded."),
    ("busy", "sbert_pg_rows_busy", "Rows put off because another transaction held them locked."),
    ("batches", "sbert_pg_batches", "Batches claimed."),
)
_HISTOGRAMS = (
    ("claim", "sbert_pg_claim_seconds", "Time to claim a batch and read its texts."),
    ("encode", "sbert_pg_encode_seconds", "Time to encode a batch."),
    ("write", "sbert_pg_write_seconds", "Time to write a batch and remove its marks."),
)
_BACKLOG = (
    ("pending", "sbert_pg_pending_rows", "Rows whose vector does not belong to their text yet."),
    ("oldest_seconds", "sbert_pg_oldest_pending_seconds", "Age of the oldest pending row."),
    ("failed", "sbert_pg_failed_rows", "Rows that are failed, until their text changes."),
)


class TallyCollector:
    """Gives a tally to ``prometheus_client``; each scrape reads the counts as they are."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        columns = self._tally.columns()
        for attribute, name, words in _COUNTERS:
            counter = CounterMetricFamily(name, words, labels=["column"])
            for column, tally in columns.items():
                counter.add_metric([column], getattr(tally, attribute))
            yield counter
        for attribute, name, words in _HISTOGRAMS:
            histogram = HistogramMetricFamily(name, words, labels=["column"])
            for column, tally in columns.items():
                durations = _durations(tally, attribute)
                histogram.add_metric([column], _buckets(durations), durations.total)
            yield histogram
        for attribute, name, words in _BACKLOG:
            gauge = GaugeMetricFamily(name, words, labels=["column"])
            for column, backlog in self._tally.backlog().items():
                gauge.add_metric([column], getattr(backlog, attribute))
            yield gauge
        yield GaugeMetricFamily(
            "sbert_pg_listening", "Whether LISTEN works.", value=int(self._tally.listening)
        )
        yield CounterMetricFamily(
            "sbert_pg_database_errors",
            "Times that the database was away or could not write.",
            value=self._tally.database_errors,
        )


def _durations(tally: ColumnTally, attribute: str) -> Durations:
    durations: Durations = getattr(tally, attribute)
    return durations


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    """Cumulated counts by upper bound, as Prometheus wants them."""
    bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip(bounds, list(durations.counts), strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


class Exposition:
    """The text that Prometheus scrapes.

    Raises:
        MissingExtraError: ``prometheus-client`` is not installed.
    """

    def __init__(self, tally: Tally) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError as error:
            raise MissingExtraError("prometheus-client", "metrics", "serve metrics") from error
        # A registry of its own: the application's is left alone.
        self._registry = CollectorRegistry()
        self._registry.register(TallyCollector(tally))

    def text(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


__all__ = ["Exposition", "TallyCollector"]
