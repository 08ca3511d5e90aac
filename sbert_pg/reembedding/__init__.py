"""A change of encoder without a wrong answer: expand, backfill, verify, switch, contract."""

from sbert_pg.reembedding.adopt import Adoption, Proof, adopt, examine
from sbert_pg.reembedding.checks import (
    Status,
    require_complete,
    require_unused,
    status,
)
from sbert_pg.reembedding.contract import abort, finish
from sbert_pg.reembedding.expand import Request, build_indexes, request_of, start
from sbert_pg.reembedding.locks import in_short_transactions
from sbert_pg.reembedding.plan import Plan, plan
from sbert_pg.reembedding.ready import assert_ready
from sbert_pg.reembedding.rebind import Rebinding, rebind
from sbert_pg.reembedding.report import Thresholds, Verification
from sbert_pg.reembedding.retype import Retyped, retype
from sbert_pg.reembedding.run import Changed, Settings, Told, run
from sbert_pg.reembedding.usage import QUIET
from sbert_pg.reembedding.vector_index import VectorIndex, build_index, vector_indexes
from sbert_pg.reembedding.verify import LabelledQuery, verify

__all__ = [
    "QUIET",
    "Adoption",
    "Changed",
    "LabelledQuery",
    "Plan",
    "Proof",
    "Rebinding",
    "Request",
    "Retyped",
    "Settings",
    "Status",
    "Thresholds",
    "Told",
    "VectorIndex",
    "Verification",
    "abort",
    "adopt",
    "assert_ready",
    "build_index",
    "build_indexes",
    "examine",
    "finish",
    "in_short_transactions",
    "plan",
    "rebind",
    "request_of",
    "require_complete",
    "require_unused",
    "retype",
    "run",
    "start",
    "status",
    "vector_indexes",
    "verify",
]
