"""Encode texts again and compare with the vectors that are stored: the one place that does.

An audit, a verification, an adoption and a further encoder for a column ask the same question: is
this vector the one that this encoder gives for this text? They differ in the rows that they ask
about, and in what they do with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from sbert_pg.catalog import Binding, rows
from sbert_pg.probes import MAX_LENGTH_RATIO, PRECISION_MIN_COSINE
from sbert_pg.spec import TextEncoder, Vectors
from sbert_pg.types import wire
from sbert_pg.types.vector import sent


@dataclass(frozen=True, slots=True)
class Comparison:
    """How stored vectors agree with those of their texts, row by row.

    Attributes:
        keys: what each row is called.
        cosines: float64 array of shape ``(rows,)``; 0 where the widths differ.
        agrees: whether each stored vector is its text's, within the error of quantisation.
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
    min_cosine: float = PRECISION_MIN_COSINE,
    by_length: bool = False,
) -> Comparison:
    """Compare stored vectors with those of the same texts.

    Args:
        keys: what each row is called.
        stored: the rows' vectors, of whatever width they have.
        encoded: the vectors of their texts, shape ``(rows, dimensions)``.
        min_cosine: least cosine of two vectors that count as the same. The default allows another
            precision of the same weights; another pooling, prompt or encoder stays below it.
        by_length: whether the lengths have to agree too, as they do for encoders whose similarity
            is not the cosine.
    """
    cosines, ratios = np.zeros(len(keys)), np.full(len(keys), np.inf)
    for i, (vector, wanted) in enumerate(zip(stored, encoded, strict=True)):
        if vector.shape != wanted.shape:
            continue
        left, right = float(np.linalg.norm(vector)), float(np.linalg.norm(wanted))
        dot = float(np.dot(vector.astype(np.float64), wanted.astype(np.float64)))
        cosines[i] = dot / max(left * right, 1e-12)
        ratios[i] = max(left, right) / max(min(left, right), 1e-12)
    agrees = cosines >= min_cosine
    if by_length:
        agrees &= ratios <= MAX_LENGTH_RATIO
    return Comparison(tuple(keys), cosines, agrees)


def compare_rows(
    connection: sa.Connection,
    binding: Binding,
    encoder: TextEncoder,
    *,
    size: int,
    seed: int = 0,
) -> Comparison:
    """Encode the texts of some of a column's fresh rows again, and compare.

    Rows that are pending or have failed are left out: they say so themselves. Between reading and
    the return the transaction stays open, while the texts are encoded.

    Args:
        size: rows to compare; fewer where the column has fewer.
        seed: another seed compares other rows.
    """
    table = binding.clause()
    vector, text = table.c[binding.column], binding.expressions.on(table, "text")
    drawn = rows.sample(
        connection,
        table,
        binding.key_columns,
        [
            rows.label([table.c[name] for name in binding.key_columns]),
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
