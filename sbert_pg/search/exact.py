"""Exact neighbours of many vectors by one pass over a table, and what answers are measured by.

Vectors are read in blocks, in bounded memory, and compared here: for a few hundred queries that is
many times faster than as many sequential scans by the server.

Recall counts ties as ann-benchmarks does: an answer counts where it is as near as the k-th exact
one, so that duplicates of a text cannot make a perfect index look wrong. nDCG has linear gains and
``1 / log2(rank + 1)``, as in BEIR and MTEB.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from sbert_pg.catalog.embedding import Embedding
from sbert_pg.spec import Vectors
from sbert_pg.types import wire
from sbert_pg.types.vector import sent

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

#: Rows of one block: at 384 dimensions it is 8 MB a column.
BLOCK = 5_000
#: Similarities this close are equal: float32 sums in another order differ by less than this.
TIE = 1e-5


@dataclass(frozen=True)
class LabelledQuery:
    """A query with the rows that answer it.

    Attributes:
        text: the query.
        gains: key of each relevant row, as text, with its gain; a JSON array for several columns.
        name: what files call it, ``""`` for its number.
        attributes: what else is known of it, for slices of a report.
    """

    text: str
    gains: Mapping[str, float]
    name: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def answers(self) -> dict[str, float]:
        """The rows that answer it; one with a gain of 0 is known to be wrong."""
        return {key: gain for key, gain in self.gains.items() if gain > 0}

    def answers_in(self, rows: Container[str]) -> dict[str, float]:
        """The answers that are among some rows."""
        return {key: gain for key, gain in self.answers.items() if key in rows}


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a table: labels, vectors ``(rows, dimensions)`` or zeros by column, flags met."""

    labels: list[str]
    vectors: list[Vectors]
    flags: list[npt.NDArray[np.bool_]]


def blocks(
    connection: sa.Connection,
    label: sa.ColumnElement[str],
    columns: Sequence[sa.Column[Any]],
    where: sa.ColumnElement[bool],
    flags: Sequence[sa.ColumnElement[bool]] = (),
) -> Iterator[Block]:
    """The vectors of rows that meet a criterion, block by block, and which others they meet."""
    met = [sa.func.coalesce(flag, False) for flag in flags]
    vectors = [sent(column, getattr(column.type, "storage", "vector")) for column in columns]
    statement = sa.select(label, *vectors, *met).where(where)
    result = connection.execute(statement, execution_options={"yield_per": BLOCK})
    end = 1 + len(columns)
    for page in result.partitions():
        labels, *values = zip(*page, strict=True)
        payloads = zip(values[: end - 1], columns, strict=True)
        yield Block(
            labels=list(labels),
            vectors=[_vectors(parts, column) for parts, column in payloads],
            flags=[np.asarray(flag, bool) for flag in values[end - 1 :]],
        )


def _vectors(payloads: Sequence[bytes | None], column: sa.Column[Any]) -> Vectors:
    type_ = column.type
    assert isinstance(type_, Embedding)
    present = np.array([payload is not None for payload in payloads])
    vectors = np.zeros((len(payloads), type_.encoder.dimensions), dtype=np.float32)
    if present.any():
        block = b"".join(payload for payload in payloads if payload is not None)
        vectors[present] = wire.from_wire_block(block, type_.encoder.dimensions, type_.storage)
    return vectors


class Nearest:
    """The ``k`` most similar rows of each query, collected block by block in bounded memory."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        #: Shape ``(queries, k)``, most similar first; ``-inf`` where fewer rows were seen.
        self.similarities: Floats = np.full((queries, k), -np.inf, dtype=np.float32)
        #: Position of each row in the order of reading; ``-1`` where there is none.
        self.positions: Positions = np.full((queries, k), -1, dtype=np.int64)

    def add(
        self, similarities: Floats, first: int, keep: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """Take a block of similarities, ``(queries, rows)``, from a position on; NaN is no row."""
        block = np.where(np.isnan(similarities), -np.inf, similarities)
        if keep is not None:
            block = np.where(keep[None, :], block, -np.inf)
        numbers = np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)
        joined = np.concatenate([self.similarities, block], axis=1)
        positions = np.concatenate([self.positions, numbers], axis=1)
        best = np.argpartition(-joined, self.k - 1, axis=1)[:, : self.k]
        order = np.argsort(-np.take_along_axis(joined, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        self.similarities = np.take_along_axis(joined, best, axis=1)
        positions = np.take_along_axis(positions, best, axis=1)
        self.positions = np.where(np.isneginf(self.similarities), -1, positions)


def recall(answer: Sequence[float], exact: Floats, k: int) -> float | None:
    """Share of the ``k`` exact neighbours, by similarities, that an index found; ties count as
    found.

    ``None`` where no row can be found at all.
    """
    known = exact[np.isfinite(exact)][:k]
    if known.size == 0:
        return None
    threshold = float(known[-1]) - TIE
    return min(sum(value >= threshold for value in answer[:k]), known.size) / known.size


def overlap(a: Positions, b: Positions) -> float | None:
    """Share of neighbours that two answers have in common; ``-1`` is not a neighbour."""
    left, right = set(a[a >= 0].tolist()), set(b[b >= 0].tolist())
    size = max(len(left), len(right))
    return len(left & right) / size if size else None


def ndcg(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """nDCG@k of one answer against the gain of each relevant row."""
    ideal = sorted(gains.values(), reverse=True)[:k]
    best = sum(gain / np.log2(rank + 2) for rank, gain in enumerate(ideal))
    got = sum(gains.get(row, 0.0) / np.log2(rank + 2) for rank, row in enumerate(ranked[:k]))
    return float(got / best) if best else 0.0


def recall_of(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Share of the relevant rows among the first ``k``, of at most ``k`` that fit there."""
    relevant = {row for row, gain in gains.items() if gain > 0}
    return len(relevant & set(ranked[:k])) / min(len(relevant), k) if relevant else 0.0


def reciprocal_rank(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """One over the rank of the first relevant row, 0 where the first ``k`` hold none."""
    for rank, row in enumerate(ranked[:k], start=1):
        if gains.get(row, 0.0) > 0:
            return 1 / rank
    return 0.0


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are known, ``None`` where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
