"""What a fitted encoder is worth: its gain on questions kept back, said, refused and recorded."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from sbert_pg.errors import NoGainError
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.spec import json_digest
from sbert_pg.tuning.evaluation import CONFIDENCE, Figure
from sbert_pg.tuning.task import Task


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proof:
    """How a fitted encoder does on the questions kept back.

    Attributes:
        task: what it was fitted to and judged by.
        method: how it was fitted.
        side: ``"query"`` where documents keep their vectors, else ``"both"``.
        settings: of the method.
        compared: the name of the encoder that it is compared with.
        before: nDCG@k of that one.
        after: nDCG@k of the fitted one.
        gain: the difference.
        learned_from: questions, or made ones, that it was learned from.
        notes: what else was measured.
        hint: of a refusal, what else is known.
    """

    task: Task
    method: str
    side: str
    settings: Mapping[str, Any]
    compared: str
    before: Figure
    after: Figure
    gain: Figure
    learned_from: int
    notes: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""

    def require_gain(self) -> None:
        """Refuse an encoder of which nothing is proven.

        Raises:
            NoGainError: the interval of the gain includes zero, or lies below.
        """
        if self.gain.low > 0:
            return
        raise NoGainError(
            f"{self.method} does not make {self.compared!r} better for {self.task.rows.name}: "
            f"nDCG@{self.task.k} {self.before} before, {self.after} after, gain {self.gain:+}, an "
            f"interval of {CONFIDENCE:.0%} that includes zero or lies below; {self.judged()}. "
            f"{self.hint}Nothing was written. Label more questions, try another method, or compare "
            "other encoders and the words arm by 'sbert-pg evaluate'."
        )

    def judged(self) -> str:
        """By what and among what it was judged."""
        split, rows = self.task.split, len(self.task.candidates.keys)
        return judged_by(len(split.held_out), split.by, rows, self.task.rows.total)

    def record(self) -> dict[str, Any]:
        """How the encoder came about, for its manifest: digests of texts and no text."""
        task, spec = self.task, self.task.encoder.spec
        figures = {"before": self.before, "after": self.after, "gain": self.gain}
        return {
            "method": self.method,
            "side": self.side,
            "base": {"name": spec.name, "fingerprint": spec.fingerprint},
            "compared_with": self.compared,
            "column": task.rows.name,
            "source": task.rows.base.type.source.to_json(),
            "settings": dict(self.settings),
            "seed": task.seed,
            "split": {"by": task.split.by, "groups": int(task.split.groups.max()) + 1},
            "learned_from": {
                "questions": len(task.learning),
                "digest": _digest(task.learning),
                "examples": self.learned_from,
            },
            "kept_back": {"questions": len(task.judged), "digest": _digest(task.judged)},
            "rows": {
                "ranked": len(task.candidates.keys),
                "all": task.rows.total,
                "digest": task.digest_of_rows(),
            },
            f"ndcg@{task.k}": {name: asdict(figure) for name, figure in figures.items()},
            "notes": dict(self.notes),
            "versions": {
                "sbert-pg": version("sbert-pg"),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }


def judged_by(held_out: int, split: str, rows: int, total: int) -> str:
    """By how many questions an encoder was judged, and among how many rows."""
    among = f"{rows:,} rows" if rows == total else f"{rows:,} of {total:,} rows"
    return f"judged by {held_out} questions kept back by {split}, among {among}"


def _digest(queries: Sequence[LabelledQuery]) -> str:
    """SHA-256 of questions and their answers, 32 hexadecimal digits, in whatever order they are."""
    return json_digest(sorted([q.text, sorted(q.gains.items())] for q in queries))[:32]
