"""A sweep over a bound column: does each vector belong to its row's text?

Triggers notice every change they see. They do not see what happens while they are disabled, what a
restore or a replication brings, or what a writer wrote on a false attestation. The sweep encodes
texts anew and compares; it needs no trust in anything but the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog import Binding, tables
from sbert_pg.catalog.holding import hold_encoder
from sbert_pg.catalog.keys import Named
from sbert_pg.errors import DimensionError
from sbert_pg.pending import marks
from sbert_pg.pending.rows import rows_of
from sbert_pg.pending.spaces import Space
from sbert_pg.pending.texts import encode_each
from sbert_pg.probes import PRECISION_MIN_COSINE
from sbert_pg.spec import TextEncoder, Vectors
from sbert_pg.types import wire

Kind = Literal["missing", "superfluous", "stale", "foreign", "unencodable"]

#: Findings that are kept with their keys; beyond it they are only counted.
MAX_EXAMPLES = 1_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One row whose vector is not its text's.

    Attributes:
        key: the row's key, as ``sbert.pending`` has it.
        kind: ``"missing"`` a text without vector, ``"superfluous"`` a vector without text,
            ``"stale"`` a vector of some other text, ``"foreign"`` a vector that does not look like
            one of this encoder, ``"unencodable"`` a text that the encoder refuses.
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
        foreign: see ``Finding.kind``; a judgement by statistics, ``stale`` where in doubt.
        unencodable: see ``Finding.kind``.
        truncated: texts longer than the encoder reads; ``None`` where it does not count them.
        marked: rows marked pending.
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
    foreign: int = 0
    unencodable: int = 0
    truncated: int | None = None
    marked: int = 0
    min_cosine: float = 1.0
    whole: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """Rows with a finding."""
        return self.missing + self.superfluous + self.stale + self.foreign + self.unencodable

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the findings."""
        data = asdict(self)
        del data["findings"]
        return data


Progress = Callable[[Audit], None]


def audit(
    engine: sa.Engine,
    binding: Binding,
    encoder: TextEncoder,
    *,
    sample: int | None = 1_000,
    mark: bool = False,
    min_cosine: float = PRECISION_MIN_COSINE,
    batch: int = 512,
    progress: Progress | None = None,
) -> Audit:
    """Encode texts anew and compare with the stored vectors.

    Reads in short transactions, holds none while encoding, and changes nothing unless asked to.

    Args:
        engine: an engine; its role sees every row.
        binding: the column.
        encoder: the column's encoder, or a compatible one.
        sample: rows to look at, chosen by chance; ``None`` for all, which takes as long as a
            backfill.
        mark: mark what is wrong pending, for a worker to mend.
        min_cosine: least cosine with the fresh vector. The default, .97, allows another precision
            of the same weights; a text with one word changed usually stays below it, one with a
            comma changed may not. With the precision that made the vectors, use .999.
        batch: rows encoded at once.
        progress: called after each batch with the result so far.

    Raises:
        EncoderMismatchError: the encoder is not the column's.
        BindingError: row-level security hides rows from this role.
    """
    with engine.begin() as connection:
        hold_encoder(connection, binding, encoder)
        reader = _Reader(connection, binding)
    result = Audit(str(binding), whole=sample is None)
    space = Space(binding.dimensions)
    before = _truncated(encoder)
    pages = reader.all(engine, batch) if sample is None else reader.some(engine, sample, batch)
    for page in pages:
        found = _compare(page, reader, encoder, space, min_cosine, result)
        if mark and found:
            with engine.begin() as connection:
                wrong = [finding.key for finding in found]
                result.marked += marks.mark(connection, binding, wrong)
        if progress is not None:
            progress(result)
    if before is not None:
        result.truncated = (_truncated(encoder) or before) - before
    _record(engine, binding, result)
    return result


class _Reader:
    """Pages of rows: key, text, stored vector, and whether the row waits already."""

    def __init__(self, connection: Connection, binding: Binding) -> None:
        self.binding = binding
        self._rows = rows_of(connection, binding)
        self._mark = tables.pending
        self._estimate = max(float(connection.execute(self._planned()).scalar_one() or 0), 0.0)

    def _planned(self) -> sa.Select[Any]:
        status = tables.status.c
        return sa.select(status.estimated_rows).where(status.id == self.binding.id)

    def _select(self, table: sa.FromClause) -> sa.Select[Any]:
        binding = self.binding
        send = sa.func.vector_send if binding.storage == "vector" else sa.func.halfvec_send
        key = binding.key_text(table)
        mark = self._mark.c
        waiting = sa.exists().where(mark.column_id == binding.id, mark.key == key)
        texts: list[Any] = [sa.cast(table.c[name], sa.Text) for name in binding.source.columns]
        parts: list[Any] = [sa.cast(table.c[name], sa.Text) for name in binding.key_columns]
        columns: tuple[Any, ...] = (
            key.label("key"),
            send(table.c[binding.column], type_=sa.LargeBinary).label("vector"),
            waiting.label("waiting"),
            pg.array(texts).label("texts"),
            pg.array(parts).label("parts"),
        )
        return sa.select(*columns)

    def all(self, engine: sa.Engine, batch: int) -> Iterator[Sequence[sa.Row[Any]]]:
        """Every row, in the order of the key, one transaction a page."""
        table = self.binding.clause()
        columns = [table.c[name] for name in self.binding.key_columns]
        page: sa.Select[Any] = self._select(table).order_by(*columns).limit(batch)
        last: sa.Row[Any] | None = None
        while True:
            here = page
            if last is not None:
                here = page.where(sa.tuple_(*columns) > sa.tuple_(*self._typed(last.parts)))
            with engine.connect() as connection:
                rows = connection.execute(here).all()
            if not rows:
                return
            yield rows
            last = rows[-1]

    def some(self, engine: sa.Engine, sample: int, batch: int) -> Iterator[Sequence[sa.Row[Any]]]:
        """A sample of rows. Of a large table whole blocks are drawn, so that it is not read."""
        table = self.binding.clause()
        rows: Sequence[sa.Row[Any]] = ()
        with engine.connect() as connection:
            if self._estimate > 50 * sample:
                share = min(100.0, 100.0 * 4 * sample / self._estimate)
                rows = self._drawn(connection, table.tablesample(sa.func.system(share)), sample)
            if len(rows) < sample:
                # The table is small, or the blocks drawn happened to hold too little.
                rows = self._drawn(connection, table, sample)
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch]

    def _drawn(
        self, connection: Connection, table: sa.FromClause, sample: int
    ) -> Sequence[sa.Row[Any]]:
        chosen = self._select(table).order_by(sa.func.random()).limit(sample)
        return connection.execute(chosen).all()

    def _typed(self, parts: Sequence[str]) -> list[sa.ColumnElement[Any]]:
        types = self.binding.key_types
        return [
            sa.cast(sa.literal(part, sa.Text), Named(type_))
            for part, type_ in zip(parts, types, strict=True)
        ]

    def text(self, row: sa.Row[Any]) -> str | None:
        """The text of a row, ``None`` where every source column is ``NULL``."""
        return self._rows.row(row.key, "", row.texts).text


def _compare(
    page: Sequence[sa.Row[Any]],
    reader: _Reader,
    encoder: TextEncoder,
    space: Space,
    min_cosine: float,
    result: Audit,
) -> list[Finding]:
    """Compare one page; returns and counts what is wrong."""
    found: list[Finding] = []
    checked: list[tuple[str, str, bytes | None]] = []
    for row in page:
        if row.waiting:
            result.waiting += 1
            continue
        result.rows += 1
        text = reader.text(row)
        if text is not None:
            checked.append((row.key, text, row.vector))
        elif row.vector is not None:
            found.append(Finding(row.key, "superfluous"))
    fresh, faults = encode_each(encoder, [text for _, text, _ in checked])
    if fresh.shape[1] != reader.binding.dimensions:
        raise DimensionError(
            f"Encoder {encoder.spec.name!r} gives {fresh.shape[1]} dimensions where column "
            f"{reader.binding} has {reader.binding.dimensions}."
        )
    space.learn(fresh[[i for i in range(len(checked)) if i not in faults]])
    for position, (key, _, payload) in enumerate(checked):
        if position in faults:
            # A refused text that has no vector would have been marked as failed.
            found.append(Finding(key, "unencodable"))
        elif payload is None:
            found.append(Finding(key, "missing"))
        else:
            stored = wire.from_wire(payload, reader.binding.storage)
            agreement = _cosine(stored, fresh[position])
            if agreement >= min_cosine:
                result.min_cosine = min(result.min_cosine, agreement)
            else:
                kind: Kind = "foreign" if space.is_foreign(stored) else "stale"
                found.append(Finding(key, kind, agreement))
    for finding in found:
        setattr(result, finding.kind, getattr(result, finding.kind) + 1)
    result.findings += found[: max(MAX_EXAMPLES - len(result.findings), 0)]
    return found


def _cosine(a: Vectors, b: Vectors) -> float:
    length = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.dot(a, b)) / length if length > 0 else 0.0


def _truncated(encoder: TextEncoder) -> int | None:
    """Texts that the encoder has cut off so far, where it counts them."""
    counted = getattr(getattr(encoder, "statistics", None), "truncated", None)
    return counted if isinstance(counted, int) else None


def _record(engine: sa.Engine, binding: Binding, result: Audit) -> None:
    """Keep the figures for ``status``."""
    with engine.begin() as connection:
        figures = result.to_json() | {"at": connection.scalar(sa.select(sa.func.now()))}
        figures["at"] = figures["at"].isoformat()
        connection.execute(
            sa.update(tables.embedding_column)
            .where(tables.embedding_column.c.id == binding.id)
            .values(last_audit=figures)
        )


__all__ = ["Audit", "Finding", "audit"]
