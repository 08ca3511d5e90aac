"""The report of a verification: figures, thresholds, and what they say together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from sbert_pg.errors import VerificationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a verification has to reach. ``None`` leaves a figure unjudged.

    Attributes:
        coverage: least share of the rows with text that have a vector, or became pending just now.
        max_pending: rows that may be pending, as they are while an application writes.
        max_failed: rows that may have failed or been skipped.
        recall: least recall of the index against exact search, averaged over the sampled rows.
        filtered_recall: the same for each filter.
        agreement: least cosine between a stored vector and its text encoded again.
        overlap: least share of neighbours that old and new column have in common. Two good encoders
            may well agree on half, so there is none by default.
        quality_loss: how far nDCG on the labelled queries may fall below the old column's.
        ndcg: least nDCG on the labelled queries.
        need_index: whether the new column has to have a valid index where the old one has.
    """

    coverage: float | None = 1.0
    max_pending: int | None = None
    max_failed: int | None = 0
    recall: float | None = 0.95
    filtered_recall: float | None = 0.9
    agreement: float | None = 0.97
    overlap: float | None = None
    quality_loss: float | None = 0.02
    ndcg: float | None = None
    need_index: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How many rows have what they should have.

    Attributes:
        rows: rows of the table.
        with_text: rows whose source is not ``NULL`` throughout.
        embedded: of these, rows with a vector.
        overdue: rows with text and without a vector that are not pending, or have been pending for
            longer than a moment, or are too many for rows that just changed (``rules.overdue_of``).
        pending: rows that wait for a new vector, whether or not they have an older one.
        failed: rows whose text could not be encoded, skipped ones included.
    """

    rows: int
    with_text: int
    embedded: int
    overdue: int
    pending: int
    failed: int

    @property
    def share(self) -> float:
        """Embedded share of the rows with text; 1 for a table without any."""
        return self.embedded / self.with_text if self.with_text else 1.0

    @property
    def missing(self) -> int:
        """Rows with text and without a vector."""
        return self.with_text - self.embedded

    @property
    def late(self) -> int:
        """Overdue rows without the failed ones, which are judged on their own."""
        return max(0, self.overdue - self.failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRecall:
    """Recall@k of the index under one filter.

    Attributes:
        filter: the filter's name, ``None`` for no filter.
        selectivity: share of the embedded rows that meet it.
        queries: sampled rows that were searched for.
        mean: recall averaged over them.
        worst: lowest recall of one of them.
    """

    filter: str | None
    selectivity: float
    queries: int
    mean: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Ranking quality of one column on labelled queries, by exact search.

    Attributes:
        column: the column.
        encoder: its encoder.
        queries: labelled queries.
        ndcg: nDCG@k.
        recall: recall@k.
        mrr: MRR@k.
    """

    column: str
    encoder: str
    queries: int
    ndcg: float
    recall: float
    mrr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAgreement:
    """How stored vectors agree with their texts encoded again.

    Attributes:
        rows: rows that were encoded again, pending ones left out.
        mean: mean cosine.
        worst: lowest cosine.
        doubtful: keys of rows below the threshold, at most twenty.
    """

    rows: int
    mean: float
    worst: float
    doubtful: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found about a new column, beside the one that it replaces.

    Attributes:
        table: the table.
        old: the replaced column, ``None`` where there is none.
        new: the new column.
        old_encoder: encoder of the old column.
        new_encoder: encoder of the new column.
        k: neighbours compared.
        coverage: rows, embedded, pending, failed.
        index: name of the new column's valid index, ``None`` where there is none.
        recalls: recall of the index, first without a filter.
        agreement: stored vectors against their texts, where the encoder was at hand.
        overlap: share of neighbours that both columns' exact answers have in common.
        quality: on labelled queries, new column first.
        notes: what could not be measured, and why.
        seconds: time taken.
        failures: thresholds that were missed, in words.
    """

    table: str
    old: str | None
    new: str
    old_encoder: str | None
    new_encoder: str
    k: int
    coverage: Coverage
    index: str | None
    recalls: tuple[IndexRecall, ...] = ()
    agreement: TextAgreement | None = None
    overlap: float | None = None
    quality: tuple[Quality, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    failures: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether every threshold was reached."""
        return not self.failures

    def require(self) -> None:
        """Do nothing where every threshold was reached.

        Raises:
            VerificationError: one was missed; the message names each, with its figure.
        """
        if self.failures:
            raise VerificationError(
                f"{self.table}.{self.new} does not pass its verification: "
                f"{'; '.join(self.failures)}."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the verdict."""
        data = asdict(self)
        data["coverage"]["share"] = self.coverage.share
        data["passed"] = self.passed
        return data

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        replaced = f", replacing {self.old} ({self.old_encoder})" if self.old else ""
        yield f"{self.table}.{self.new} ({self.new_encoder}){replaced}"
        c = self.coverage
        yield (
            f"  coverage   {c.share:.2%}: {c.embedded:,} of {c.with_text:,} rows with text; "
            f"{c.pending:,} pending, {c.failed:,} failed"
        )
        yield f"  index      {self.index or 'none'}"
        for r in self.recalls:
            under = f" where {r.filter} ({r.selectivity:.1%} of rows)" if r.filter else ""
            yield (
                f"  recall@{self.k}  {r.mean:.3f}{under}, worst {r.worst:.2f}, "
                f"{r.queries} rows against exact search"
            )
        if self.agreement is not None:
            a = self.agreement
            yield (
                f"  texts      {a.rows} encoded again: cosine mean {a.mean:.4f}, "
                f"worst {a.worst:.4f}"
            )
            if a.doubtful:
                yield f"             doubtful rows: {', '.join(a.doubtful)}"
        if self.overlap is not None:
            yield f"  overlap@{self.k} {self.overlap:.3f} of neighbours are the old column's too"
        for q in self.quality:
            yield (
                f"  quality    {q.column}: nDCG@{self.k} {q.ndcg:.4f}, recall {q.recall:.4f}, "
                f"MRR {q.mrr:.4f} ({q.queries} labelled queries)"
            )
        for note in self.notes:
            yield f"  note       {note}"
        for failure in self.failures:
            yield f"  FAILED     {failure}"
        yield f"  {'passed' if self.passed else 'not passed'}, in {self.seconds:.1f} s"


def judge(found: Verification, thresholds: Thresholds, *, old_has_index: bool) -> tuple[str, ...]:
    """The thresholds that a verification misses, in words."""
    t, c = thresholds, found.coverage
    missed: list[str] = []

    def least(what: str, value: float | None, limit: float | None) -> None:
        if value is not None and limit is not None and value < limit:
            missed.append(f"{what} is {value:.4g}, and {limit:g} is asked for")

    def most(what: str, value: int, limit: int | None) -> None:
        if limit is not None and value > limit:
            missed.append(f"{value:,} rows are {what}, and at most {limit:,} may be")

    if t.coverage is not None and c.with_text and 1 - c.late / c.with_text < t.coverage:
        missed.append(
            f"{c.late:,} of {c.with_text:,} rows with text have no vector (coverage "
            f"{c.share:.4f}, and {t.coverage:g} is asked for)"
        )
    most("pending", c.pending, t.max_pending)
    most("failed or skipped", c.failed, t.max_failed)
    if t.need_index and old_has_index and found.index is None:
        missed.append("there is no valid index on the new column, and the old one has one")
    for r in found.recalls:
        if r.filter is None:
            least(f"recall@{found.k}", r.mean, t.recall)
        else:
            least(f"recall@{found.k} where {r.filter}", r.mean, t.filtered_recall)
    if found.agreement is not None:
        least("the cosine of a stored vector with its text", found.agreement.worst, t.agreement)
    least(f"overlap@{found.k}", found.overlap, t.overlap)
    if found.quality:
        least(f"nDCG@{found.k}", found.quality[0].ndcg, t.ndcg)
        if len(found.quality) > 1 and t.quality_loss is not None:
            loss = found.quality[1].ndcg - found.quality[0].ndcg
            if loss > t.quality_loss:
                missed.append(
                    f"nDCG@{found.k} is {loss:.4f} below the old column's, and at most "
                    f"{t.quality_loss:g} may be lost"
                )
    return tuple(missed)
