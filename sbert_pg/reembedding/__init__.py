"""A change of encoder without a wrong answer: expand, backfill, verify, switch, contract."""

from sbert_pg.reembedding.checks import (
    Status,
    require_complete,
    require_unused,
    status,
)
from sbert_pg.reembedding.contract import abort, finish
from sbert_pg.reembedding.expand import Request, build_indexes, request_of, start
from sbert_pg.reembedding.locks import in_short_transactions
from sbert_pg.reembedding.ready import assert_ready
from sbert_pg.reembedding.report import Thresholds, Verification
from sbert_pg.reembedding.vector_index import VectorIndex, build_index, vector_indexes
from sbert_pg.reembedding.verify import LabelledQuery, verify

__all__ = [
    "LabelledQuery",
    "Request",
    "Status",
    "Thresholds",
    "VectorIndex",
    "Verification",
    "abort",
    "assert_ready",
    "build_index",
    "build_indexes",
    "finish",
    "in_short_transactions",
    "request_of",
    "require_complete",
    "require_unused",
    "start",
    "status",
    "vector_indexes",
    "verify",
]
