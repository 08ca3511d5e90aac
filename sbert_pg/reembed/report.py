"""The report of a verification: figures, thresholds, and what they say together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sbert_pg.errors import VerificationError
from sbert_pg.freshness.audit import Comparison
from sbert_pg.freshness.queue import Coverage


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a verification has to reach. ``None`` leaves a figure unjudged.

    Attributes:
        coverage: least share of the rows that wait for no vector. An application that leaves
            encoding to workers has some pending rows at any moment, so not all by default.
        max_pending: new and changed rows that may wait.
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

    coverage: float | None = 0.99
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
class IndexRecall:
    """Recall@k of the index under one filter, if any, that this share of the rows meets."""

    filter: str | None
    selectivity: float
    queries: int
    mean: float
    worst: float

    def __str__(self) -> str:
        under = f" where {self.filter} ({self.selectivity:.1%} of rows)" if self.filter else ""
        return (
            f"{self.mean:.3f}{under}, worst {self.worst:.2f}, {self.queries} rows against exact "
            "search"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Ranking quality of one column on labelled queries, by exact search."""

    column: str
    encoder: str
    queries: int
    ndcg: float
    recall: float
    mrr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was measured of a new column, beside the one that it replaces.

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
    agreement: Comparison | None = None
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
        data = asdict(replace(self, agreement=None))
        data["agreement"] = None if self.agreement is None else self.agreement.figures()
        data["coverage"]["share"] = self.coverage.share
        data["passed"] = self.passed
        return data

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        replaced = f", replacing {self.old} ({self.old_encoder})" if self.old else ""
        yield f"{self.table}.{self.new} ({self.new_encoder}){replaced}"
        yield f"  coverage   {self.coverage}"
        yield f"  index      {self.index or 'none'}"
        for recall in self.recalls:
            yield f"  recall@{self.k}  {recall}"
        if self.agreement is not None:
            yield f"  texts      encoded again: {self.agreement}"
        if self.agreement is not None and self.agreement.doubtful:
            yield f"             doubtful rows: {', '.join(self.agreement.doubtful[:20])}"
        if self.overlap is not None:
            yield f"  overlap@{self.k} {self.overlap:.3f} of neighbours are the old column's too"
        for q in self.quality:
            yield (
                f"  quality    {q.column}: nDCG@{self.k} {q.ndcg:.4f}, recall {q.recall:.4f}, "
                f"MRR {q.mrr:.4f} ({q.queries} labelled queries)"
            )
        yield from map("  note       {}".format, self.notes)
        yield from map("  FAILED     {}".format, self.failures)
        yield f"  {'passed' if self.passed else 'not passed'}, in {self.seconds:.1f} s"


def judge(report: Verification, thresholds: Thresholds, *, old_has_index: bool) -> tuple[str, ...]:
    """The thresholds that a verification misses, in words."""
    limits, coverage = thresholds, report.coverage
    missed = list(replace(coverage, backfill=0).reasons(limits.max_pending, limits.max_failed))
    missed += _uncovered(coverage, limits.coverage)
    if limits.need_index and old_has_index and report.index is None:
        missed.append("there is no valid index on the new column, and the old one has one")
    for what, value, least in _figures(report, limits):
        if value is not None and least is not None and value < least:
            missed.append(f"{what} is {value:.4g}, and {least:g} is asked for")
    missed += _worse(report, limits.quality_loss)
    return tuple(missed)


def _uncovered(coverage: Coverage, least: float | None) -> Iterator[str]:
    share = 1 - coverage.missing / coverage.rows if coverage.rows else 1.0
    if least is not None and share < least:
        yield (
            f"{coverage.count(coverage.missing)} rows wait for their vector (coverage {share:.4f}, "
            f"and {least:g} is asked for)"
        )


def _worse(report: Verification, most: float | None) -> Iterator[str]:
    """Whether the labelled queries lose more by the new column than they may."""
    if len(report.quality) < 2 or most is None:
        return
    loss = report.quality[1].ndcg - report.quality[0].ndcg
    if loss > most:
        yield (
            f"nDCG@{report.k} is {loss:.4f} below the old column's, and at most {most:g} may be "
            "lost"
        )


def _figures(
    report: Verification, limits: Thresholds
) -> Iterator[tuple[str, float | None, float | None]]:
    """What was measured, in words, and the least that it may be."""
    for recall in report.recalls:
        where = "" if recall.filter is None else f" where {recall.filter}"
        least = limits.recall if recall.filter is None else limits.filtered_recall
        yield f"recall@{report.k}{where}", recall.mean, least
    if report.agreement is not None:
        worst = report.agreement.worst
        yield "the cosine of a stored vector with its text", worst, limits.agreement
    yield f"overlap@{report.k}", report.overlap, limits.overlap
    if report.quality:
        yield f"nDCG@{report.k}", report.quality[0].ndcg, limits.ndcg
