"""Encode texts again and compare with the vectors that are stored: the one place that does.

An audit, a verification, an adoption and a further encoder for a column ask the same question: is
this vector the one that this encoder gives for this text? They differ in the rows that they ask
about, and in what they do with the answer. What a row says of itself is proven by whoever wrote it;
an audit needs no trust in anything but the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from sbert_pg.catalog import Binding
from sbert_pg.catalog.holding import hold_encoder
from sbert_pg.catalog.rows import label as key_label
from sbert_pg.catalog.rows import sample as sample_rows
from sbert_pg.freshness.cutting import is_cut_as
from sbert_pg.freshness.encoding import encode_for
from sbert_pg.freshness.queue import shown
from sbert_pg.freshness.rows import Rows, rows_of
from sbert_pg.freshness.status import wake
from sbert_pg.probes import MAX_LENGTH_RATIO, PRECISION_MIN_COSINE, agreement_by_row
from sbert_pg.row_vectors import cut_so_far
from sbert_pg.spec import TextEncoder, Vectors
from sbert_pg.types import wire
from sbert_pg.types.vector import sent


@dataclass(frozen=True, slots=True)
class Comparison:
    """How stored vectors agree with those of their texts, row by row.

    ``cosines`` is a float64 array of shape ``(rows,)``, 0 where the widths differ; ``agrees``
    allows for the error of quantisation.
    """

    keys: tuple[Any, ...]
    cosines: npt.NDArray[np.float64]
    agrees: npt.NDArray[np.bool_]

    @property
    def rows(self) -> int:
        """Rows compared."""
        return len(self.keys)

    @property
    def agreeing(self) -> int:
        """Rows whose vector is their text's."""
        return int(self.agrees.sum())

    @property
    def share(self) -> float:
        """Agreeing share of the rows; 0 where there are none."""
        return self.agreeing / self.rows if self.rows else 0.0

    @property
    def mean(self) -> float | None:
        """Mean cosine, ``None`` where there are no rows."""
        return float(self.cosines.mean()) if self.rows else None

    @property
    def median(self) -> float | None:
        """Median cosine, ``None`` where there are no rows."""
        return float(np.median(self.cosines)) if self.rows else None

    @property
    def worst(self) -> float | None:
        """Lowest cosine, ``None`` where there are no rows."""
        return float(self.cosines.min()) if self.rows else None

    def figures(self) -> dict[str, Any]:
        """Plain data, with at most twenty of the doubtful rows."""
        return {
            "rows": self.rows,
            "agreeing": self.agreeing,
            "mean_cosine": self.mean,
            "median_cosine": self.median,
            "min_cosine": self.worst,
            "doubtful": [str(key) for key in self.doubtful[:20]],
        }

    def __str__(self) -> str:
        if not self.rows:
            return "no rows"
        return (
            f"{self.agreeing} of {self.rows} rows agree (cosine mean {self.mean:.4f}, median "
            f"{self.median:.4f}, worst {self.worst:.4f})"
        )

    @property
    def doubtful(self) -> tuple[Any, ...]:
        """Keys of the rows that do not agree."""
        return tuple(key for key, good in zip(self.keys, self.agrees, strict=True) if not good)


def compare(
    keys: Sequence[Any],
    stored: Sequence[Vectors],
    encoded: Vectors,
    *,
    by_length: bool = False,
) -> Comparison:
    """Compare stored vectors, of whatever width, with those of the same texts.

    ``PRECISION_MIN_COSINE`` allows another precision of the same weights; another pooling, prompt
    or encoder stays below it. ``by_length`` compares the lengths too, for encoders whose similarity
    is not the cosine.
    """
    cosines, ratios = np.zeros(len(keys)), np.full(len(keys), np.inf)
    same = [i for i, vector in enumerate(stored) if vector.shape == encoded.shape[1:]]
    if same:
        rows = np.stack([stored[i] for i in same])
        cosines[same], ratios[same] = agreement_by_row(rows, encoded[same])
    agrees = cosines >= PRECISION_MIN_COSINE
    if by_length:
        agrees &= ratios <= MAX_LENGTH_RATIO
    return Comparison(tuple(keys), cosines, agrees)


def compare_rows(
    connection: sa.Connection, binding: Binding, encoder: TextEncoder, *, size: int, seed: int = 0
) -> Comparison:
    """Encode the texts of some of a column's fresh rows again, and compare.

    Rows that are pending or have failed are left out: they say so themselves. Between reading and
    the return the transaction stays open, while the texts are encoded.
    """
    table = binding.clause()
    vector, text = table.c[binding.column], binding.expressions.on(table, "text")
    drawn = sample_rows(
        connection,
        table,
        binding.key_columns,
        [
            key_label([table.c[name] for name in binding.key_columns]),
            text,
            sent(vector, binding.storage),
        ],
        where=[vector.is_not(None), text.is_not(None), binding.is_fresh(table)],
        size=size,
        seed=seed,
    )
    return compare(
        [row[0] for row in drawn],
        [wire.from_wire(row[2], binding.storage) for row in drawn],
        encoder.encode_document([row[1] for row in drawn]),
        by_length=encoder.spec.similarity != "cosine",
    )


Kind = Literal["missing", "superfluous", "stale", "unencodable"]

#: Findings that are kept with their keys; beyond it they are only counted.
MAX_EXAMPLES = 1_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One row whose vector is not its text's.

    Attributes:
        key: the row's key; a JSON array where it has several parts.
        kind: ``"missing"`` a text without vector, ``"superfluous"`` a vector without text,
            ``"stale"`` a vector of something else, or of a document other passages than its text
            has, ``"unencodable"`` a text that the encoder
            refuses.
        cosine: cosine of the stored and the right vector, where there are both.
    """

    key: str
    kind: Kind
    cosine: float | None = None


@dataclass(slots=True)
class Audit:
    """What an audit found.

    Attributes:
        column: schema, table and column.
        rows: rows looked at, apart from those that were pending or failed at the time.
        waiting: rows that were pending or failed, which is known and no finding.
        missing: see ``Finding.kind``.
        superfluous: see ``Finding.kind``.
        stale: see ``Finding.kind``.
        unencodable: see ``Finding.kind``.
        truncated: texts longer than the encoder reads; ``None`` where it does not count them.
        requeued: rows that were made pending again.
        min_cosine: least cosine of a stored vector that was accepted; 1 where there was none.
        whole: whether every row was looked at, not a sample.
        findings: the first 1,000.
    """

    column: str
    rows: int = 0
    waiting: int = 0
    missing: int = 0
    superfluous: int = 0
    stale: int = 0
    unencodable: int = 0
    truncated: int | None = None
    requeued: int = 0
    min_cosine: float = 1.0
    whole: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """Rows with a finding."""
        return self.missing + self.superfluous + self.stale + self.unencodable

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the findings."""
        data = asdict(self)
        del data["findings"]
        return data


def audit(
    engine: sa.Engine,
    binding: Binding,
    encoder: TextEncoder,
    *,
    sample: int | None = 1_000,
    requeue: bool = False,
    batch: int = 512,
    progress: Callable[[Audit], None] | None = None,
) -> Audit:
    """Encode texts again and compare with the stored vectors.

    Reads in short transactions, holds none while encoding, and changes nothing unless asked to. A
    cosine of .97 is enough, as another precision of the same weights has it; a text with one word
    changed usually stays below it, one with a comma changed may not.

    Args:
        engine: an engine; its role sees every row.
        binding: the column.
        encoder: the column's encoder, or a compatible one.
        sample: rows to look at, chosen by chance; ``None`` for all, which takes as long as a
            backfill.
        requeue: make what is wrong pending, for a worker to mend.
        batch: rows encoded at once.
        progress: called after each batch with the result so far.

    Raises:
        EncoderMismatchError: the encoder is not the column's.
        BindingError: row-level security hides rows from this role.
    """
    with engine.begin() as connection:
        hold_encoder(connection, binding, encoder)
        rows = rows_of(connection, binding)
    result = Audit(str(binding), whole=sample is None)
    before = cut_so_far(encoder)
    for page in _pages(engine, rows, sample, batch):
        findings = _compare(page, rows, encoder, result)
        if requeue and findings:
            labels = [label for label, _ in findings]
            with engine.begin() as connection:
                rows.prepare(connection)
                result.requeued += rows.requeue(connection, rows.label.in_(labels))
                wake(connection, binding)
        if progress is not None:
            progress(result)
    if before is not None:
        result.truncated = (cut_so_far(encoder) or before) - before
    with engine.begin() as connection:
        # Kept for ``status``.
        at = connection.execute(sa.select(sa.func.now())).scalar_one()
        figures = sa.cast(result.to_json() | {"at": at.isoformat()}, pg.JSONB)
        connection.execute(sa.select(sa.func.sbert.note_v1(binding.id, sa.null(), figures)))
    return result


def _columns(rows: Rows) -> list[sa.ColumnElement[Any]]:
    binding, table, cut = rows.binding, rows.table, []
    if rows.passages is not None:
        # Of documents, the passages that they have, and what their source columns hold.
        source = [table.c[name] for name in binding.source.columns]
        cut = [rows.passages.as_json(table).label("passages"), *source]
    waiting = sa.or_(binding.is_stale(table), binding.expressions.on(table, "failed"))
    return [
        rows.label.label("label"),
        binding.expressions.on(table, "text").label("text"),
        sent(table.c[binding.column], binding.storage).label("vector"),
        waiting.label("waiting"),
        *cut,
    ]


def _pages(
    engine: sa.Engine, rows: Rows, sample: int | None, batch: int
) -> Iterator[Sequence[sa.Row[Any]]]:
    """Rows as ``_columns`` says: a sample, or all in the order of their keys."""
    if sample is not None:
        with engine.begin() as connection:
            # The labels depend on the session's formats, and the plan is the sample's own affair.
            rows.prepare(connection, plans=False)
            drawn = sample_rows(
                connection, rows.table, rows.binding.key_columns, _columns(rows), size=sample
            )
        yield from (drawn[start : start + batch] for start in range(0, len(drawn), batch))
        return
    after = None
    while True:
        with engine.begin() as connection:
            rows.prepare(connection)
            page, after = rows.page(connection, _columns(rows), batch, after)
        if not page:
            return
        yield page


#: By label what is wrong with a row, and the cosine that says so.
_Wrong = dict[str, tuple[Kind, float | None]]


def _texts_of(
    page: Sequence[sa.Row[Any]], rows: Rows, result: Audit, wrong: _Wrong
) -> list[tuple[str, str, bytes | None]]:
    """Label, text and vector of the rows to encode; notes what is wrong without encoding."""
    width = 5 + len(rows.binding.source.columns)
    texts: list[tuple[str, str, bytes | None]] = []
    for row in page:
        if row.waiting:
            result.waiting += 1
            continue
        result.rows += 1
        if rows.passages is not None and not is_cut_as(rows.passages, row[5:width], row.passages):
            wrong[row.label] = ("stale", None)
        elif row.text is not None:
            texts.append((row.label, row.text, row.vector))
        elif row.vector is not None:
            wrong[row.label] = ("superfluous", None)
    return texts


def _compare(
    page: Sequence[sa.Row[Any]], rows: Rows, encoder: TextEncoder, result: Audit
) -> list[tuple[str, Finding]]:
    """Compare one page; returns and counts what is wrong, by label."""
    binding = rows.binding
    wrong: _Wrong = {}
    texts = _texts_of(page, rows, result, wrong)
    encoded, faults = encode_for(binding, encoder, [text for _, text, _ in texts])
    good = []
    for position, (label, _, payload) in enumerate(texts):
        if position in faults:
            wrong[label] = ("unencodable", None)
        elif payload is None:
            wrong[label] = ("missing", None)
        else:
            good.append(position)
    stored = [wire.from_wire(texts[i][2], binding.storage) for i in good]  # type: ignore[arg-type]
    compared = compare([texts[i][0] for i in good], stored, encoded[good])
    for label, cosine, agrees in zip(
        compared.keys, compared.cosines.tolist(), compared.agrees, strict=True
    ):
        if agrees:
            result.min_cosine = min(result.min_cosine, cosine)
        else:
            wrong[label] = ("stale", cosine)
    return _noted(wrong, result)


def _noted(wrong: _Wrong, result: Audit) -> list[tuple[str, Finding]]:
    findings = [(label, Finding(shown(label), *what)) for label, what in wrong.items()]
    for _, finding in findings:
        setattr(result, finding.kind, getattr(result, finding.kind) + 1)
    room = max(MAX_EXAMPLES - len(result.findings), 0)
    result.findings += [finding for _, finding in findings[:room]]
    return findings
