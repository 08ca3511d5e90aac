"""A change of encoder without a wrong answer: begin, backfill, verify, switch, finish."""

from sbert_pg.reembed.adopt import Adoption, Proof, adopt, examine
from sbert_pg.reembed.backfill import Filling, Rebinding, as_step, backfill, rebind
from sbert_pg.reembed.change import Request, begin, build_indexes, request_of
from sbert_pg.reembed.finish import abort, finish
from sbert_pg.reembed.plan import Plan, plan
from sbert_pg.reembed.report import Thresholds, Verification
from sbert_pg.reembed.status import QUIET, Status, require_ready, status
from sbert_pg.reembed.verify import verify
from sbert_pg.search.exact import LabelledQuery

__all__ = [
    "QUIET",
    "Adoption",
    "Filling",
    "LabelledQuery",
    "Plan",
    "Proof",
    "Rebinding",
    "Request",
    "Status",
    "Thresholds",
    "Verification",
    "abort",
    "adopt",
    "as_step",
    "backfill",
    "begin",
    "build_indexes",
    "examine",
    "finish",
    "plan",
    "rebind",
    "request_of",
    "require_ready",
    "status",
    "verify",
]
