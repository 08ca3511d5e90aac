"""A process, or a thread, that keeps embedding columns fresh."""

from sbert_pg.worker.embedded import Refreshed, refresh, worker_thread
from sbert_pg.worker.settings import WorkerSettings
from sbert_pg.worker.tally import Tally
from sbert_pg.worker.worker import Health, Worker

__all__ = ["Health", "Refreshed", "Tally", "Worker", "WorkerSettings", "refresh", "worker_thread"]
