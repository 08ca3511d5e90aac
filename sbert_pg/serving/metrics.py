"""What is counted, as Prometheus reads it: of a worker, and of the HTTP server itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sbert_pg.errors import needing
from sbert_pg.freshness.monitoring import BUCKETS, ColumnTally, Durations, Tally

with needing("prometheus-client", "serve", "serve metrics"):
    from prometheus_client import CollectorRegistry, Counter, Histogram
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    from prometheus_client.registry import Collector

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
    ("write", "sbert_pg_write_seconds", "Time to write a batch."),
)
_BACKLOG = (
    ("pending", "sbert_pg_pending_rows", "New and changed rows that wait for their vector."),
    ("backfill", "sbert_pg_backfill_rows", "Rows of a backfill that wait for their vector."),
    ("age", "sbert_pg_caught_up_seconds", "Seconds since nothing new was pending."),
    ("failed", "sbert_pg_failed_rows", "Rows that are failed, until their text changes."),
)


class WorkerMetrics(Collector):  # type: ignore[misc]
    """The tally of a worker; each scrape reads the counts as they are."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
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
                value = getattr(backlog, attribute)
                gauge.add_metric([column], float("nan") if value is None else value)
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


class ServerMetrics:
    """What an HTTP server counts, in its own registry: no application's is touched."""

    def __init__(self, collector: Collector | None = None) -> None:
        self.registry = CollectorRegistry()
        if collector is not None:
            self.registry.register(collector)
        self._requests = Counter(
            "sbert_pg_http_requests", "Requests answered.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "sbert_pg_http_seconds", "Time to answer a request.", ["path"],
            buckets=BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._texts = Counter(
            "sbert_pg_http_texts_encoded", "Texts encoded.", registry=self.registry
        )
        self._batches = Counter(
            "sbert_pg_http_batches", "Batches that they were encoded in.", registry=self.registry
        )

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_batch(self, requests: int, texts: int) -> None:
        """Count a batch."""
        self._batches.inc()
        self._texts.inc(texts)

    def page(self) -> tuple[int, bytes, str]:
        """What Prometheus scrapes: status, body and content type."""
        return 200, generate_latest(self.registry), CONTENT_TYPE_LATEST
