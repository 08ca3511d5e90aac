"""Backfill: fill a change's new column, and build its index; encode only what has to be.

*Rebind* lets a column accept a further encoder whose vectors are the same. Another type, or fewer
dimensions, are computed from the vectors that are there. Everything else is encoded. Each step can
be run again, so the whole can be: what a row says of itself is how far it has come.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import Literal, NamedTuple

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.catalog.holding import compatibility, recorded_encoder
from sbert_pg.distance import unit
from sbert_pg.errors import EncoderError, EncoderMismatchError, ReembeddingError, StepStoppedError
from sbert_pg.freshness import Filled, Filler, Progress, WorkerSettings
from sbert_pg.freshness import backfill as encode_rows
from sbert_pg.freshness.audit import Comparison, compare_rows
from sbert_pg.probes import (
    MAX_LENGTH_RATIO,
    PRECISION_MIN_COSINE,
    Compatibility,
    agreement_of,
    measured,
)
from sbert_pg.progress import Advance
from sbert_pg.reembed.change import Request, build_indexes
from sbert_pg.reembed.digests import BLOCK, write_digests
from sbert_pg.reembed.status import change_of
from sbert_pg.registry import get_encoder
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec, TextEncoder
from sbert_pg.system import ColumnIdentity
from sbert_pg.types.vector import plain_type

#: Rows whose text a further encoder encodes again.
SAMPLE = 100

#: How the new vector comes from the old one: its first elements, scaled to length one or not.
Scaling = Literal["as it is", "length one"]


class Filling(NamedTuple):
    """What a backfill of a change did.

    Attributes:
        encoded: the rows that were encoded, and how the column stands after it.
        computed: rows whose vector was computed from the old one.
        indexes: names of the new column's indexes.
    """

    encoded: Filled
    computed: int
    indexes: tuple[str, ...]


def backfill(
    engine: sa.Engine,
    column: ColumnIdentity,
    settings: WorkerSettings | None = None,
    *,
    encode: bool = False,
    encode_by: Filler = encode_rows,
    indexes: Sequence[sa.Index] | None = None,
    maintenance_work_mem: str | None = None,
    on_progress: Advance | None = None,
    stop: threading.Event | None = None,
) -> Filling:
    """Fill a change's new column, and build its index.

    Where the new vectors can be computed from the old ones (``halfvec``, truncated dimensions) they
    are, by what each old row says of itself at that moment; every other text is encoded, together
    with whoever else does it. What the application changes while the index is built is encoded as
    well. Killed or stopped at any moment it is called again and continues.

    Args:
        engine: an engine with the driver psycopg 3.
        column: the new column, or the old one.
        settings: of the encoding; see ``WorkerSettings``.
        encode: encode every text, even where the vectors could be computed from the old ones.
        encode_by: what encodes, ``freshness.backfill`` or one with its interface, such as that of
            ``sbert_pg.adapters.ray`` with its fleet.
        indexes: indexes to build, as declared; by default one like each of the old column's.
        maintenance_work_mem: memory for the build of the index, as in ``"2GB"``.
        on_progress: called as it proceeds, in several threads, with the step, what is done, and of
            how many where that is known.
        stop: once it is set, what is in hand is finished or cancelled.

    Raises:
        NotBoundError: the column is not bound.
        ReembeddingError: it takes part in no change.
        StepStoppedError: ``stop`` was set.
        EncoderError: the new encoder cannot be loaded; nothing was written.
        TableBusyError: a lock could not be had.
    """
    with engine.connect() as connection:
        new, old = change_of(connection, column)
        encoder = get_encoder(new.declared)
        way = way_of(connection, old, encoder, source=new.source, storage=new.storage)
    stop, advance = stop or threading.Event(), on_progress or (lambda step, done, total: None)

    def copied(rows: int) -> None:
        # Between two transactions, so that leaving here leaves nothing half done.
        _require_not_stopped(stop, "backfill")
        advance("compute", rows, None)

    def encoded(by: Filler) -> Filled:
        """Encode what waits, together with whoever else does it."""
        filled = by(engine, new, settings, on_progress=as_step(advance), stop=stop)
        _require_not_stopped(stop, "backfill")
        return filled

    advance("backfill", 0, None)
    computed = 0
    if way.scaling is not None and not encode:
        computed = copy_vectors(engine, old, new, encoder, way.scaling, progress=copied)
    first = encoded(encode_by)
    advance("index", 0, None)
    names = build_indexes(
        engine,
        new.identity,
        indexes=indexes,
        maintenance_work_mem=maintenance_work_mem,
        wait=math.inf,
        on_progress=lambda phase, done, total: advance("index", done, total or None),
        stop=stop,
    )
    _require_not_stopped(stop, "index")
    # What the application has changed meanwhile.
    last = encoded(encode_rows)
    both = replace(
        last,
        rows=first.rows + last.rows,
        texts=first.texts + last.texts,
        seconds=first.seconds + last.seconds,
    )
    return Filling(both, computed, tuple(names))


def _require_not_stopped(stop: threading.Event, step: str) -> None:
    if stop.is_set():
        raise StepStoppedError(
            f"Stopped in the step {step!r}. What was done stays; run the same command again to "
            "continue."
        )


def as_step(advance: Advance) -> Callable[[Progress], None]:
    """The progress of a backfill, as a step of something longer."""

    def show(progress: Progress) -> None:
        paused = f" (paused: {progress.paused})" if progress.paused else ""
        advance(f"backfill{paused}", progress.rows, progress.total)

    return show


@dataclass(frozen=True, slots=True)
class Rebinding:
    """An encoder that a column accepts from now on.

    Attributes:
        column: the column.
        encoder: the encoder.
        probes: verdict and agreement on the probes.
        rows: stored vectors, against the encoder's of their texts.
    """

    column: str
    encoder: str
    probes: Compatibility
    rows: Comparison

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        names = {"column": self.column, "encoder": self.encoder, "reason": self.probes.reason}
        return names | self.rows.figures()

    def __str__(self) -> str:
        return f"{self.column} accepts {self.encoder}: {self.probes.reason}; {self.rows}"


def rebind(engine: sa.Engine, column: ColumnIdentity, encoder: TextEncoder) -> Rebinding:
    """Accept a further encoder for a column if it shares the column's space: int8 beside fp32.

    The document sides decide: two encoders whose document sides agree share a column's vectors,
    even where they encode queries differently. The probes give the verdict, and rows of the column
    confirm it. What was measured is written beside the accepted fingerprint, in
    ``sbert.compatible_encoder``. Vectors stay as they are. A change of pooling, of the prompt of
    documents, of ``max_seq_length``, source or weights is a change of space and is refused.

    Args:
        column: the column; it has an encoder already.
        encoder: the further encoder.

    Raises:
        NotBoundError: the column is not bound.
        EncoderMismatchError: the spaces differ, by the probes or by the rows; use
            ``sbert-pg reembed begin``.
    """
    with engine.begin() as connection:
        binding = catalog.require_columns(connection, catalog.require_binding(connection, column))
        rows = compare_rows(connection, binding, encoder, size=SAMPLE)
        verdict = catalog.rebind(connection, binding, encoder, stored=rows.figures())
        # A stale row or two may disagree; a different space disagrees throughout. Raised within the
        # transaction, so that nothing of the verdict stays.
        if rows.median is not None and rows.median < PRECISION_MIN_COSINE:
            raise EncoderMismatchError(
                f"{binding}: by its probes {encoder.spec.name!r} shares the column's space, and "
                f"the rows say otherwise: of texts encoded again {rows}. Audit the column "
                f"(sbert-pg audit {quote(str(binding))})."
            )
        return Rebinding(str(binding), encoder.spec.name, verdict, rows)


class Way(NamedTuple):
    """How a change gets its new vectors: by ``"re-embedding"``; ``"retype"``, computed from the old
    ones with ``scaling``; or ``"rebind"``, where the space is the same.
    """

    need: str
    reason: str
    scaling: Scaling | None = None


def need_of(engine: sa.Engine, request: Request) -> Way:
    """What a change needs; nothing is written."""
    with engine.connect() as connection:
        old = catalog.require_binding(connection, request.old)
        encoder = encoder_of(request.encoder)[0]
        return way_of(connection, old, encoder, source=request.source, storage=request.storage)


def encoder_of(spec: EncoderSpec) -> tuple[TextEncoder | None, str]:
    """The encoder, or why it is not at hand."""
    try:
        return get_encoder(spec), ""
    except EncoderError as error:
        return None, str(error)


def way_of(
    connection: sa.Connection,
    old: Binding,
    encoder: TextEncoder | None,
    *,
    source: Source | None,
    storage: str | None,
) -> Way:
    """As ``need_of``, of a column, its new encoder where that is at hand, source and storage."""
    if source is not None and source != old.source:
        return Way("re-embedding", f"the text changes, from {old.source} to {source}")
    if old.source.passages is not None:
        return Way("re-embedding", "its documents are cut into passages, which only a worker does")
    if encoder is None or old.fingerprint is None:
        return Way("re-embedding", "as far as can be said without the encoders' probe vectors")
    verdict = compatibility(connection, old, encoder)
    storage = storage or old.storage
    try:
        scaling = scaling_of(connection, old, encoder)
    except EncoderMismatchError:
        return Way("re-embedding", verdict.reason)
    if not verdict:
        return Way("retype", "its vectors are the old ones, cut", scaling)
    if storage == old.storage:
        return Way("rebind", f"{verdict.reason} (the column can accept it: rebind)", scaling)
    return Way("retype", f"{old.storage} to {storage} of the same space", scaling)


def copy_vectors(
    engine: sa.Engine,
    old: Binding,
    new: Binding,
    encoder: TextEncoder,
    scaling: Scaling,
    *,
    block: int = BLOCK,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Fill a new column from the old one without encoding a text; digests are computed with it.

    Rows that lack an old vector, have a stale one, or were locked are left to be encoded.
    ``encoder`` is the new column's, for fewer dimensions the truncated one; returns how many were
    copied.
    """
    with engine.begin() as connection:
        catalog.hold_encoder(connection, new, encoder)
    table = new.clause()
    for name in (old.column, old.companion):
        table.append_column(sa.column(name))
    return write_digests(
        engine,
        new,
        table,
        _computed(table.c[old.column], old, new, scaling),
        [
            new.is_stale(table),
            new.expressions.on(table, "text").is_not(None),
            table.c[old.column].is_not(None),
            old.is_fresh(table),
        ],
        block=block,
        progress=progress,
    )


def scaling_of(connection: sa.Connection, old: Binding, encoder: TextEncoder) -> Scaling:
    """Prove by the probes that the new vectors can be computed, and how.

    sentence-transformers truncates after normalising, so that truncated vectors are shorter than
    one; other code scales them again. The encoder's own probe vectors say what it does.
    """
    if old.fingerprint is None:
        raise ReembeddingError(
            f"{old} has not met its encoder yet, so nothing is known of its vectors. Use it once, "
            "or let a worker run, and try again."
        )
    _, _, probes = recorded_encoder(connection, old)
    width, expected = encoder.spec.dimensions, measured(encoder)
    if width > probes.shape[1] or len(probes) != len(expected):
        raise EncoderMismatchError(
            f"{encoder.spec.name!r} gives {width} dimensions and {old} has {probes.shape[1]}: its "
            "vectors cannot be computed from what is there. It has to be encoded."
        )
    cut = probes[:, :width]
    agreement = agreement_of(cut, expected)
    if agreement.min_cosine < PRECISION_MIN_COSINE:
        raise EncoderMismatchError(
            f"The vectors of {encoder.spec.name!r} are not those of {old}, cut to {width}: on the "
            f"probes {agreement}. This is a change of encoder."
        )
    if agreement.max_length_ratio <= MAX_LENGTH_RATIO:
        return "as it is"
    if agreement_of(unit(cut), expected).max_length_ratio <= MAX_LENGTH_RATIO:
        return "length one"
    raise EncoderMismatchError(
        f"The vectors of {encoder.spec.name!r} have another length than those of {old}, cut to "
        f"{width} ({agreement}), scaled to one or not. It has to be encoded."
    )


def _computed(
    column: sa.ColumnElement[object], old: Binding, new: Binding, scaling: Scaling
) -> sa.ColumnElement[object]:
    """The new vector as an expression over the old one."""
    vector = column
    if new.dimensions < old.dimensions:
        vector = sa.func.subvector(vector, 1, new.dimensions)
    if scaling == "length one":
        vector = sa.func.l2_normalize(vector)
    return sa.cast(vector, plain_type(new.storage, new.dimensions))
