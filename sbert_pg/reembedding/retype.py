"""Another type for the same vectors, without encoding: ``halfvec``, or fewer dimensions.

The new column stands beside the old one as in every change, so old and new code run side by side,
and a rollback is deploying the old code. Its vectors are computed from the old column's by the
server, in short transactions that lock only free rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert

from sbert_pg import catalog
from sbert_pg.catalog import Binding, tables
from sbert_pg.catalog.holding import recorded_encoder
from sbert_pg.errors import EncoderMismatchError, ReembeddingError
from sbert_pg.probes import MAX_LENGTH_RATIO, PRECISION_MIN_COSINE, agreement_of
from sbert_pg.reembedding.expand import Request, start
from sbert_pg.reembedding.locks import pause
from sbert_pg.spec import TextEncoder, Vectors
from sbert_pg.types.vector import plain_type

#: Rows of one transaction.
BLOCK = 2_000
#: Passes over rows that others held locked, before those are left to a worker.
_PASSES = 20

#: How the new vector comes from the old one: its first elements, scaled to length one or not.
Scaling = Literal["as it is", "length one"]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Retyped:
    """What became of the rows.

    Attributes:
        binding: the new column's binding.
        copied: rows whose vector was computed from the old one.
        left: rows that lack an old vector, have a stale one, or were locked; workers embed them.
    """

    binding: Binding
    copied: int
    left: int


def retype(
    engine: sa.Engine,
    request: Request,
    encoder: TextEncoder,
    *,
    block: int = BLOCK,
    progress: Progress | None = None,
) -> Retyped:
    """Expand, and fill the new column from the old one without encoding a text.

    Killed half-way it is run again and goes on with the rows that still lack a vector. The index
    comes afterwards (``build_indexes``), then *verify*, *switch* and *contract* as in every change.

    Args:
        engine: where.
        request: the change: ``storage="halfvec"``, or an encoder of fewer dimensions, or both.
        encoder: the new column's encoder, loaded; for fewer dimensions the truncated one.
        block: rows of one transaction.
        progress: told the number of rows copied so far.

    Returns:
        How many rows were copied, and how many are left to workers.

    Raises:
        EncoderMismatchError: the encoder's vectors are not the old encoder's, or their beginning.
        ReembeddingError: the old column has no encoder yet, or another source.
    """
    with engine.connect() as connection:
        old = catalog.require_binding(connection, request.old)
        scaling = _scaling(connection, old, encoder)
        connection.rollback()
    if request.source is not None and request.source != old.source:
        raise ReembeddingError(
            f"{old} has the source {old.source}, and {request.source} is another text: its vectors "
            "cannot be computed from what is there. Use 'sbert-pg reembed start'."
        )
    new = start(engine, request)
    with engine.begin() as connection:
        catalog.seal(connection, new, encoder)
    copied = 0
    for attempt in range(1, _PASSES + 1):
        copied = _pass(engine, old, new, scaling, block, copied, progress)
        if not _remaining(engine, old, new):
            break
        pause(attempt)
    with engine.begin() as connection:
        left = _leave_to_workers(connection, old, new)
    return Retyped(new, copied, left)


def _scaling(connection: sa.Connection, old: Binding, encoder: TextEncoder) -> Scaling:
    """Prove by the probes that the new vectors can be computed, and how.

    sentence-transformers truncates after normalising, so that truncated vectors are shorter than
    one; other code scales them again. The encoder's own probe vectors say what it does.
    """
    if old.fingerprint is None:
        raise ReembeddingError(
            f"{old} has not met its encoder yet, so nothing is known of its vectors. Use it once, "
            "or let a worker run, and try again."
        )
    _, probes = recorded_encoder(connection, old.fingerprint)
    width, made = encoder.spec.dimensions, encoder.probe_vectors
    if width > probes.shape[1] or len(probes) != len(made):
        raise EncoderMismatchError(
            f"{encoder.spec.name!r} gives {width} dimensions and {old} has {probes.shape[1]}: its "
            "vectors cannot be computed from what is there. Use 'sbert-pg reembed start'."
        )
    cut = probes[:, :width]
    agreement = agreement_of(cut, made)
    if agreement.min_cosine < PRECISION_MIN_COSINE:
        raise EncoderMismatchError(
            f"The vectors of {encoder.spec.name!r} are not those of {old}, cut to {width}: on the "
            f"probes {agreement}. This is a change of encoder: 'sbert-pg reembed start'."
        )
    if agreement.max_length_ratio <= MAX_LENGTH_RATIO:
        return "as it is"
    if agreement_of(_unit(cut), made).max_length_ratio <= MAX_LENGTH_RATIO:
        return "length one"
    raise EncoderMismatchError(
        f"The vectors of {encoder.spec.name!r} have another length than those of {old}, cut to "
        f"{width} ({agreement}), scaled to one or not. Use 'sbert-pg reembed start'."
    )


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


def _pass(
    engine: sa.Engine,
    old: Binding,
    new: Binding,
    scaling: Scaling,
    block: int,
    copied: int,
    progress: Progress | None,
) -> int:
    """One walk over the table in blocks; returns the rows copied so far."""
    last: list[object] | None = None
    while True:
        with engine.begin() as connection:
            catalog.attest(connection, new, verified=True)
            keys, last = _lock_block(connection, old, new, block, last)
            if keys:
                copied += _copy(connection, old, new, scaling, keys)
        if progress is not None:
            progress(copied)
        if last is None:
            return copied


def _table(old: Binding, new: Binding) -> sa.TableClause:
    table = new.clause()
    if old.column not in table.c:
        table.append_column(sa.column(old.column))
    return table


def _lock_block(
    connection: sa.Connection, old: Binding, new: Binding, block: int, last: list[object] | None
) -> tuple[list[str], list[object] | None]:
    """Lock the next rows to be copied, those that are free; their keys, and where to go on."""
    table = _table(old, new)
    columns = [table.c[name] for name in new.key_columns]
    statement = (
        sa.select(new.key_text(table), *columns)
        .where(table.c[new.column].is_(None), table.c[old.column].is_not(None))
        .order_by(*columns)
        .limit(block)
        .with_for_update(key_share=True, skip_locked=True)
    )
    if last is not None:
        left, right = (
            sa.tuple_(*columns),
            sa.tuple_(*(sa.literal(v, c.type) for v, c in zip(last, columns, strict=True))),
        )
        statement = statement.where(left > right)
    rows = connection.execute(statement).all()
    keys = [row[0] for row in rows]
    return keys, list(rows[-1][1:]) if len(rows) == block else None


def _copy(
    connection: sa.Connection, old: Binding, new: Binding, scaling: Scaling, keys: list[str]
) -> int:
    """Copy locked rows whose old vector belongs to their text; their marks go with it.

    The marks are read by a statement of its own, after the rows were locked: a change of a row that
    was committed before that is seen, and none can come before the transaction ends.
    """
    table, pending = _table(old, new), tables.pending
    wanted = new.unpacked(keys)
    stale = sa.exists().where(pending.c.column_id == old.id, pending.c.key == wanted.c.key)
    vector = _expression(table.c[old.column], old, new, scaling)
    statement = (
        sa.update(table)
        .values({table.c[new.column]: vector})
        .where(new.matches(table, wanted), sa.not_(stale))
        .returning(wanted.c.key)
    )
    done = list(connection.execute(statement).scalars())
    connection.execute(
        sa.delete(pending).where(
            pending.c.column_id == new.id,
            pending.c.key == sa.any_(sa.bindparam(None, done, type_=ARRAY(sa.Text))),
        )
    )
    return len(done)


def _expression(
    column: sa.ColumnClause[object], old: Binding, new: Binding, scaling: Scaling
) -> sa.ColumnElement[object]:
    vector: sa.ColumnElement[object] = column
    if new.dimensions < old.dimensions:
        vector = sa.func.subvector(vector, 1, new.dimensions)
    if scaling == "length one":
        vector = sa.func.l2_normalize(vector)
    return sa.cast(vector, plain_type(new.storage, new.dimensions))


def _open(old: Binding, new: Binding) -> tuple[sa.TableClause, sa.ColumnElement[bool]]:
    """Rows that have an old vector and no new one, and are not waiting for a new one."""
    table, pending = _table(old, new), tables.pending
    marked = sa.exists().where(
        pending.c.column_id.in_([old.id, new.id]), pending.c.key == new.key_text(table)
    )
    return table, sa.and_(
        table.c[new.column].is_(None), table.c[old.column].is_not(None), sa.not_(marked)
    )


def _remaining(engine: sa.Engine, old: Binding, new: Binding) -> bool:
    table, is_open = _open(old, new)
    with engine.connect() as connection:
        found = connection.execute(
            sa.select(sa.literal(1)).select_from(table).where(is_open).limit(1)
        ).first()
        connection.rollback()
    return found is not None


def _leave_to_workers(connection: sa.Connection, old: Binding, new: Binding) -> int:
    """Mark the rows that still lack a vector, so that none is forgotten; returns how many."""
    table = _table(old, new)
    has_text = sa.or_(*(table.c[name].is_not(None) for name in new.source.columns))
    lacking = sa.and_(table.c[new.column].is_(None), has_text)
    rows = sa.select(sa.literal(new.id), new.key_text(table)).where(lacking)
    connection.execute(
        insert(tables.pending).from_select(["column_id", "key"], rows).on_conflict_do_nothing()
    )
    count = sa.select(sa.func.count()).select_from(table).where(lacking)
    return connection.execute(count).scalar_one()
