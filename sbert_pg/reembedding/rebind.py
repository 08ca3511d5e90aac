"""Changes that need no re-embedding: another encoder of the same space, with the figures kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from sbert_pg import catalog
from sbert_pg.catalog.holding import compatibility, fingerprint_of
from sbert_pg.catalog.sqlstates import translated
from sbert_pg.errors import EncoderMismatchError
from sbert_pg.probes import PRECISION_MIN_COSINE, Compatibility, agreement_of
from sbert_pg.reembedding.pair import pair_of
from sbert_pg.reembedding.reading import sample as sample_rows
from sbert_pg.spec import TextEncoder
from sbert_pg.types.guard import ColumnIdentity

#: Rows whose text the new encoder encodes again.
SAMPLE = 100


@dataclass(frozen=True, slots=True)
class Rebinding:
    """An encoder that a column accepts from now on.

    Attributes:
        column: the column.
        encoder: the encoder.
        probes: verdict and agreement on the probes.
        rows: rows of the column whose text it encoded again.
        mean: mean cosine with the vectors stored, ``None`` where there was no row.
        worst: lowest cosine.
    """

    column: str
    encoder: str
    probes: Compatibility
    rows: int
    mean: float | None
    worst: float | None

    def __str__(self) -> str:
        stored = (
            f"; {self.rows} stored vectors: cosine mean {self.mean:.4f}, worst {self.worst:.4f}"
            if self.mean is not None
            else ""
        )
        return f"{self.column} accepts {self.encoder}: {self.probes.reason}{stored}"


def rebind(
    engine: sa.Engine, column: ColumnIdentity, encoder: TextEncoder, *, sample: int = SAMPLE
) -> Rebinding:
    """Accept a further encoder for a column if it shares the column's space: int8 beside fp32.

    The probes decide, and rows of the column confirm it. What was measured is written beside the
    accepted fingerprint, in ``sbert.compatible_encoder``. Vectors stay as they are. A change of
    pooling, prompts, ``max_seq_length``, source or weights is a change of space and is refused.

    Args:
        engine: where.
        column: the column; it has an encoder already.
        encoder: the further encoder.
        sample: rows to encode again.

    Raises:
        NotBoundError: the column is not bound.
        EncoderMismatchError: the spaces differ, by the probes or by the rows; use
            ``sbert-pg reembed start``.
    """
    with engine.begin() as connection:
        binding = catalog.require_binding(connection, column)
        if binding.fingerprint is None:
            verdict = catalog.rebind(connection, binding, encoder)
            return Rebinding(str(binding), encoder.spec.name, verdict, 0, None, None)
        verdict = compatibility(connection, binding.fingerprint, encoder)
        if not verdict:
            # Raises, with both names and what differs.
            catalog.rebind(connection, binding, encoder)
        cosines = _cosines(connection, column, encoder, sample)
        mean, worst = (cosines.mean(), cosines.min()) if cosines.size else (None, None)
        # A stale row or two may disagree; a different space disagrees throughout.
        if mean is not None and np.median(cosines) < PRECISION_MIN_COSINE:
            raise EncoderMismatchError(
                f"{binding}: by its probes {encoder.spec.name!r} shares the column's space, and "
                f"the rows say otherwise: {cosines.size} texts encoded again have a mean cosine of "
                f"{mean:.4f} with the vectors stored. Audit the column (sbert-pg audit {binding})."
            )
        found = Rebinding(
            str(binding),
            encoder.spec.name,
            verdict,
            int(cosines.size),
            None if mean is None else float(mean),
            None if worst is None else float(worst),
        )
        if fingerprint_of(encoder) != binding.fingerprint:
            _record(connection, binding.id, encoder, found)
        return found


def _cosines(
    connection: sa.Connection, column: ColumnIdentity, encoder: TextEncoder, size: int
) -> np.typing.NDArray[np.float64]:
    pair = pair_of(connection, column)
    side = pair.new if pair.new.binding.column == column.column or pair.old is None else pair.old
    table, source = pair.table, side.binding.source
    rows = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
    found = sample_rows(
        connection,
        table,
        side.binding,
        [side.column, *(table.c[name] for name in source.columns)],
        [side.column.is_not(None)],
        size,
        rows,
    )
    if not found:
        return np.empty(0)
    join = source.joiner()
    made = encoder.encode_document([join(row[2:]) for row in found])
    pairs = zip((row[1] for row in found), made, strict=True)
    return np.array([agreement_of(a[None], b[None]).mean_cosine for a, b in pairs])


def _record(
    connection: sa.Connection, column_id: int, encoder: TextEncoder, found: Rebinding
) -> None:
    agreement: dict[str, object] = {"reason": found.probes.reason}
    if found.probes.agreement is not None:
        agreement |= asdict(found.probes.agreement)
    agreement["stored"] = {"rows": found.rows, "mean_cosine": found.mean, "min_cosine": found.worst}
    with translated():
        connection.execute(
            sa.select(
                sa.func.sbert.add_compatible_v1(
                    column_id,
                    fingerprint_of(encoder),
                    sa.cast(encoder.spec.to_json(), JSONB),
                    sa.cast(agreement, JSONB),
                )
            )
        )
