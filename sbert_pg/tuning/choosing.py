"""``choose``: which encoder a table should use, answered on its own texts and questions.

Quality is nDCG@k against the same rows for all; what it costs is measured on this machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.errors import DeclarationError, SbertPgError, TooFewPairsError
from sbert_pg.progress import duration
from sbert_pg.registry import get_encoder
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.source import Source
from sbert_pg.spec import known_encoder
from sbert_pg.tuning.adapters import Candidates
from sbert_pg.tuning.evaluation import CONFIDENCE, Figure, grouped_figures
from sbert_pg.tuning.files import in_columns, pairs_of
from sbert_pg.tuning.limits import limits_of, share
from sbert_pg.types.comparator import base_of, clause_of

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

logger = logging.getLogger("sbert_pg.tuning")

#: Rows that questions are ranked against: a sample, with all that are labelled.
SAMPLE = 2_000
#: Questions that are asked one by one to time them, and texts by which limits are looked at.
_TIMED, _TEXTS = 40, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosable:
    """An encoder, as it does on a table.

    Attributes:
        difference: nDCG@k less that of the column's own encoder, or of the best of all.
        milliseconds: to encode a question alone, the median.
        limits: share of the library's hard triples that it gets right.
        cut: share of the texts that are longer than it reads.
        seconds: to encode every row; 0 where the rows' vectors stay.
        within: whether it keeps to the budget.
    """

    encoder: str
    current: bool
    ndcg: Figure
    difference: Figure
    milliseconds: float
    texts_per_second: float
    dimensions: int
    megabytes: float
    languages: str
    limits: Figure
    cut: float
    seconds: float
    within: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Encoders side by side, best first, and which to use; printed, a table and the reason.

    ``chosen`` is ``None`` where none keeps to the budget, milliseconds that a question may take.
    """

    column: str
    k: int
    questions: int
    rows: int
    total: int
    budget: float | None
    encoders: tuple[Choosable, ...]
    chosen: str | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        own = any(e.current for e in self.encoders)
        header = [
            "encoder", f"nDCG@{self.k}", "vs the column's" if own else "vs the best", "ms/question",
            "texts/s", "dims", "MB", "languages", "limits", "cut", "change" if own else "all rows",
        ]  # fmt: skip
        rows = [
            [
                f"{'* ' if e.encoder == self.chosen else ''}{e.encoder}",
                str(e.ndcg),
                "its own" if e.current else f"{e.difference:+}",
                f"{e.milliseconds:.1f}{'' if e.within else ' (over)'}",
                f"{e.texts_per_second:.0f}",
                str(e.dimensions),
                f"{e.megabytes:.0f}",
                e.languages,
                str(e.limits),
                f"{e.cut:.0%}",
                duration(e.seconds) if e.seconds else "none",
            ]
            for e in self.encoders
        ]
        among = f"{self.rows:,} of {self.total:,} rows"
        head = f"{self.column}: {self.questions} questions among {among}, on this machine"
        return "\n".join([head, *in_columns([header, *rows]), self.reason])


def choose_encoder(
    engine: sa.Engine,
    column: Any,
    pairs: Any,
    encoders: Sequence[Encoder],
    *,
    budget: float | None = None,
    where: Sequence[sa.ColumnElement[bool]] = (),
    sample: int = SAMPLE,
    k: int = 10,
) -> Choice:
    """Compare encoders on a table's own texts and questions, and say which to use.

    Of an embedding column the best within the budget is chosen; but its own encoder where it keeps
    to the budget and no other one is better with 95 % confidence, since a change costs work and
    proves nothing. Before there is one, of those that are not worse than the best with that
    confidence the fastest is chosen.

    Args:
        engine: where; nothing is changed there, and nothing of this library need be there.
        column: an embedding column, whose own encoder is always among those compared; or the
            column of the texts, or a list of several, of a table that has none yet.
        pairs: labelled questions, as for ``evaluate``.
        encoders: converted encoders.
        budget: milliseconds that encoding a question may take.
        where: criteria of the rows.
        sample: rows to rank against, and all that are labelled.
        k: rows of an answer that count.

    Raises:
        DeclarationError: there is no encoder to compare, or no primary key that names rows.
        TooFewPairsError: no question names a row that has a text, and a vector where it should.
        LoadError: the pairs are not readable, or there are none.
    """
    listed = column if isinstance(column, list) else [column]
    columns: list[Any] = [base_of(clause_of(one)) for one in listed]
    own = _own_encoder(columns)
    compared = _different([own, *encoders] if own is not None else encoders)
    if not compared:
        raise DeclarationError(
            "There is no encoder to compare: none has been converted on this machine. Name some, "
            "or convert one: sbert-pg encoder convert all-MiniLM-L6-v2."
        )
    rows = _texts(engine, columns, pairs_of(engine, pairs), where, sample)
    results = [_measure(encoder, rows, k) for encoder in compared]
    best = _baseline(own, [values for values, _ in results])
    measured = []
    for encoder, (values, cost) in zip(compared, results, strict=True):
        both = np.stack([values, values - results[best][0]], axis=1)
        quality, difference = grouped_figures(both, np.arange(len(rows.queries)), 0)
        measured.append(
            Choosable(
                encoder=f"{encoder.spec.name}:{encoder.manifest.precision}",
                current=encoder is own,
                ndcg=quality,
                difference=difference,
                seconds=0.0 if _keeps(encoder, own) else rows.total / cost["texts_per_second"],
                within=budget is None or cost["milliseconds"] <= budget,
                **cost,
            )
        )
    ranked = sorted(measured, key=lambda each: (not each.within, -each.ndcg.value))
    chosen, reason = _decide(ranked, budget)
    return Choice(
        column=rows.name,
        k=k,
        questions=len(rows.queries),
        rows=len(rows.texts),
        total=rows.total,
        budget=budget,
        encoders=tuple(ranked),
        chosen=chosen,
        reason=reason,
    )


def _own_encoder(columns: Sequence[Any]) -> Encoder | None:
    """The encoder of an embedding column; ``None`` for columns of texts."""
    from sbert_pg.encoder import Encoder

    spec = getattr(columns[0].type, "encoder", None)
    if spec is None:
        return None
    own = get_encoder(spec)
    if not isinstance(own, Encoder):
        raise DeclarationError(
            f"The encoder of {columns[0]} is no converted one; nothing compares it."
        )
    return own


def _baseline(own: Encoder | None, values: Sequence[Any]) -> int:
    """Which encoder the others are compared with: the column's, the first, or else the best."""
    return 0 if own is not None else int(np.argmax([each.mean() for each in values]))


def _keeps(encoder: Encoder, own: Encoder | None) -> bool:
    """Whether the vectors that rows have are those of the encoder as well."""
    mine = encoder.spec.document_fingerprint
    return own is not None and mine == own.spec.document_fingerprint


class _Texts(NamedTuple):
    """Texts of a table by key, of ``total`` rows that have one, and the questions about them."""

    name: str
    total: int
    texts: dict[str, str]
    queries: list[LabelledQuery]


def _texts(
    engine: sa.Engine,
    columns: Sequence[Any],
    queries: Sequence[LabelledQuery],
    where: Sequence[sa.ColumnElement[bool]],
    most: int,
) -> _Texts:
    """A sample of the rows, with all that are labelled."""
    table, embedding = columns[0].table, columns[0]
    if not table.primary_key:
        raise DeclarationError(f"{table.fullname} has no primary key, by which pairs name rows.")
    name = ", ".join(f"{table.fullname}.{column.name}" for column in columns)
    source, present = Source.of([column.name for column in columns]), [*where]
    if getattr(embedding.type, "encoder", None) is not None:
        source, present = embedding.type.source, [embedding.is_not(None), *where]
    text = source.expression(table)
    present.append(text != "")
    label = catalog_rows.label(list(table.primary_key))
    with engine.connect() as connection:
        total = connection.execute(sa.select(sa.func.count()).where(*present)).scalar_one()
        labelled = catalog_rows.is_one_of(label, {key for query in queries for key in query.gains})
        chosen = sa.or_(catalog_rows.drawn(label, most, total), labelled)
        rows = connection.execute(sa.select(label, text).where(*present, chosen).order_by(label))
        texts = dict(rows.all())
    kept = [replace(q, gains=gains) for q in queries if (gains := q.answers_in(texts))]
    if not kept:
        raise TooFewPairsError(
            f"None of the {len(queries)} labelled questions names a row of {name} that is there to "
            "be found. Pairs name rows by their primary key."
        )
    return _Texts(name, total, texts, kept)


def local_encoders() -> list[Encoder]:
    """The encoders that have been converted on this machine: those of the cache that open here."""
    from sbert_pg.encoder import Encoder
    from sbert_pg.encoder.directory import BUILD, FORMAT, Manifest, cache_root, is_converted

    # Not what other versions of this library left there.
    places = sorted(p.parent for p in cache_root().glob(f"*/*/*-{FORMAT}.{BUILD}/manifest.json"))
    encoders = []
    for place in filter(is_converted, places):
        try:
            if Manifest.read(place).kind == "encoder":
                encoders.append(Encoder.open(place))
        except SbertPgError as error:
            logger.warning("%s is not compared: %s", place, error)
    return encoders


def _different(encoders: Sequence[Encoder]) -> list[Encoder]:
    """Each encoder once, the first of those with one fingerprint."""
    different: dict[str | None, Encoder] = {}
    for encoder in encoders:
        different.setdefault(encoder.spec.fingerprint, encoder)
    return list(different.values())


def _measure(encoder: Encoder, rows: _Texts, k: int) -> tuple[Any, dict[str, Any]]:
    """nDCG@k of each question, and what the encoder costs and cannot do."""
    own, queries = list(rows.texts.values()), rows.queries
    vectors, seconds = _timed(partial(encoder.encode_document, own))
    asked = encoder.encode_query([query.text for query in queries])
    values = Candidates(list(rows.texts), vectors, encoder.spec.similarity).ndcg(asked, queries, k)
    singles = [_timed(partial(encoder.encode_query, [q.text]))[1] for q in queries[:_TIMED]]
    report = limits_of(encoder, own[:_TEXTS])
    tried = [limit for limit in report.limits if limit.of == "library"]
    right = sum(round(limit.score.value * limit.triples) for limit in tried)
    known = known_encoder(encoder.spec.name)
    return values, {
        "milliseconds": 1000 * median(singles),
        "texts_per_second": len(own) / seconds,
        "dimensions": encoder.dimensions,
        "megabytes": encoder.megabytes,
        "languages": known.languages if known else "not known",
        "limits": share(right, sum(limit.triples for limit in tried)),
        "cut": report.own.cut if report.own else 0.0,
    }


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _decide(ranked: Sequence[Choosable], budget: float | None) -> tuple[str | None, str]:
    """Which to use, and why."""
    within = [each for each in ranked if each.within]
    if not within:
        fastest = min(ranked, key=lambda each: each.milliseconds)
        return None, (
            f"None keeps to {budget:g} ms a question; {fastest.encoder} comes nearest with "
            f"{fastest.milliseconds:.1f} ms. Allow more, or distil a smaller one: 'sbert-pg tune "
            "--method distill'."
        )
    own = next((each for each in ranked if each.current), None)
    return _first_choice(within) if own is None else _change_or_stay(within, own, budget)


def _first_choice(within: Sequence[Choosable]) -> tuple[str, str]:
    """Where nothing has been embedded yet: the fastest of those that may be the best."""
    best = within[0]
    # The differences are to the best of all, which may take longer than the budget allows.
    alike = [each for each in within if each.difference.high >= best.difference.value]
    chosen = min(alike, key=lambda each: each.milliseconds)
    cost = f"Encoding every row takes {duration(chosen.seconds)}."
    if chosen is best:
        return chosen.encoder, f"Use {chosen.encoder}: none within the budget finds more. {cost}"
    return chosen.encoder, (
        f"Use {chosen.encoder}: the fastest of those that may be as good as {best.encoder}, by "
        f"intervals of {CONFIDENCE:.0%}. {cost}"
    )


def _change_or_stay(
    within: Sequence[Choosable], own: Choosable, budget: float | None
) -> tuple[str, str]:
    best = within[0]
    if own.within:
        # The first that is better for certain; where none is, the first may be so by chance.
        best = next((each for each in within if each.difference.low > 0), best)
    if best.current:
        return best.encoder, f"Stay with {best.encoder}: none within the budget finds more."
    if not own.within:
        return best.encoder, (
            f"Use {best.encoder}: the best within {budget:g} ms, which {own.encoder} does not keep "
            f"to; nDCG {best.difference:+} against it. The change takes {duration(best.seconds)}."
        )
    if best.difference.low > 0:
        return best.encoder, (
            f"Use {best.encoder}: nDCG {best.difference:+} against {own.encoder}. The change takes "
            f"{duration(best.seconds)}."
        )
    return own.encoder, (
        f"Stay with {own.encoder}: {best.encoder} looks better by {best.difference:+}, an interval "
        f"of {CONFIDENCE:.0%} that includes zero. More questions would tell."
    )
