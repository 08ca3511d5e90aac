"""Keeps embedding columns fresh: workers and backfills, failures, audits, status.

Whether a row is fresh is a state of the row, and a partial index is the queue of those that are not
(``docs/freshness.md``). Everything here reads that queue and writes what a row says of itself.
"""

from sbert_pg.freshness.audit import Audit, Finding, audit
from sbert_pg.freshness.queue import Counts, counts
from sbert_pg.freshness.running import Filled, Filler, Progress, backfill, worker_thread
from sbert_pg.freshness.settings import Companion, Tally, WorkerSettings
from sbert_pg.freshness.status import ColumnStatus, Failure, failures, retry, skip, status
from sbert_pg.freshness.worker import Health, Refreshed, Worker, refresh

__all__ = [
    "Audit",
    "ColumnStatus",
    "Companion",
    "Counts",
    "Failure",
    "Filled",
    "Filler",
    "Finding",
    "Health",
    "Progress",
    "Refreshed",
    "Tally",
    "Worker",
    "WorkerSettings",
    "audit",
    "backfill",
    "counts",
    "failures",
    "refresh",
    "retry",
    "skip",
    "status",
    "worker_thread",
]
