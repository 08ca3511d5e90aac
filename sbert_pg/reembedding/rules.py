"""Where a change of encoder stands, and which step may follow: pure functions of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sbert_pg.reembedding.report import Coverage

#: Seconds for which a row may be pending before it counts against a column.
LAG = 60.0
#: Share of the rows with text, and a number of rows, that are excused for being pending that short
#: a time. More of them is a column that is being filled, not an application that writes.
_EXCUSED_SHARE, _EXCUSED_ROWS = 0.1, 10

#: ``expanded``: rows lack a vector; ``filled``: the index is missing; ``ready``: nothing is.
State = Literal["expanded", "filled", "ready"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the rules look at.

    Attributes:
        table: the table, for messages.
        old: the old column.
        new: the new column.
        coverage: of the new column.
        old_indexes: names of the old column's valid indexes.
        new_indexes: names of the new column's valid indexes.
        invalid_indexes: names of the new column's indexes that are not valid and not being built.
        building: names of the new column's indexes that are being built.
    """

    table: str
    old: str
    new: str
    coverage: Coverage
    old_indexes: tuple[str, ...]
    new_indexes: tuple[str, ...]
    invalid_indexes: tuple[str, ...] = ()
    building: tuple[str, ...] = ()

    @property
    def index_missing(self) -> bool:
        """Whether the old column has an index and the new one has none."""
        return bool(self.old_indexes) and not self.new_indexes


def overdue_of(with_text: int, embedded: int, recent: int) -> int:
    """How many of the rows that lack a vector count against a column.

    Rows that became pending less than ``LAG`` seconds ago are excused while they are few: a tenth
    of the rows with text, or ten where at least as many have their vectors. All rows of a new
    column may have been marked in this minute.

    Args:
        with_text: rows with text.
        embedded: of these, rows with a vector.
        recent: of these, rows without a vector that became pending less than ``LAG`` seconds ago.
    """
    excused = max(_EXCUSED_SHARE * with_text, min(_EXCUSED_ROWS, embedded))
    missing = with_text - embedded
    return missing - recent if recent <= excused else missing


def state_of(facts: Facts) -> State:
    """Where a change stands. Rows that just changed do not count: there are some at any time."""
    if facts.coverage.late:
        return "expanded"
    return "filled" if facts.index_missing else "ready"


def next_step(facts: Facts) -> str:
    """What to do next, with the command."""
    names = f"{facts.table}.{facts.new}"
    state = state_of(facts)
    if state == "expanded":
        return (
            f"let workers fill {facts.new}, or run: sbert-pg backfill {names} "
            f"({facts.coverage.late:,} rows to go)"
        )
    if state == "filled":
        if facts.building:
            return f"wait for index {facts.building[0]}, which is being built"
        return f"build its index: sbert-pg reembed index {names}"
    return (
        f"sbert-pg reembed verify {names}; then deploy the code that declares {facts.new}; when no "
        f"older version runs any more: sbert-pg reembed finish {names}"
    )


def unready(facts: Facts, *, max_failed: int = 0) -> list[str]:
    """Why the new column cannot stand alone yet, in words; empty where it can."""
    reasons, c = [], facts.coverage
    if c.late:
        reasons.append(f"{c.late:,} of {c.with_text:,} rows have no vector in {facts.new} yet")
    if c.failed > max_failed:
        reasons.append(
            f"the text of {c.failed:,} rows could not be encoded (sbert-pg retry or skip)"
        )
    if facts.index_missing:
        state = "is being built" if facts.building else "does not exist"
        reasons.append(f"{facts.old} has an index, and the one on {facts.new} {state}")
    return reasons


def joined(reasons: Sequence[str]) -> str:
    """Reasons as one clause of a sentence."""
    return "; ".join(reasons)
