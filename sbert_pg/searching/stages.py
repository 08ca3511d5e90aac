"""The first stage of a search of two stages: the keys of the rows that an index finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import sqlalchemy as sa

from sbert_pg.distance import HAMMING
from sbert_pg.searching.target import Target
from sbert_pg.types.comparator import apply_operator
from sbert_pg.types.indexed import IndexDescription, signs


class Candidates(NamedTuple):
    """The rows of the first stage.

    Attributes:
        rows: a subquery of their keys.
        matches: joins it to the searched rows.
        order: what they are ordered by before their distance.
    """

    rows: sa.Subquery
    matches: sa.ColumnElement[bool]
    order: list[sa.ColumnElement[Any]]


def served(
    index: IndexDescription, column: sa.ColumnElement[Any], right: sa.ColumnElement[Any]
) -> sa.ColumnElement[float]:
    """The distance that the index orders by."""
    if index.form == "binary":
        bits = signs(right, index.dimensions)
        return cast(
            "sa.ColumnElement[float]",
            signs(column, index.dimensions).op(HAMMING, precedence=5, return_type=sa.Float(53))(
                bits
            ),
        )
    left = index.indexed(column)
    if left is not column:
        right = sa.cast(right, left.type)
    return apply_operator(left, index.metric.operator, right)


def candidates_of(
    target: Target,
    order: sa.ColumnElement[Any],
    criteria: Sequence[sa.ColumnElement[bool]],
    wanted: int,
    block: int,
) -> Candidates:
    """The rows that the index finds nearest.

    An exact distance ranks them within blocks of one size, whatever the page, so that a row cannot
    move from one page to another because a later page looked at more rows.

    Args:
        target: what is searched.
        order: the distance that the index serves.
        criteria: what a row has to meet.
        wanted: rows that the pages up to this one have.
        block: rows that are ranked together.
    """
    blocks = -(-wanted // block)
    keys = [column.label(f"key_{i}") for i, column in enumerate(target.key)]
    rows = (
        sa.select(*keys)
        .where(*criteria)
        .order_by(order)
        .limit(blocks * block)
        .subquery("candidates")
    )
    ordered: list[sa.ColumnElement[Any]] = []
    if blocks > 1:
        number = sa.func.row_number(type_=sa.BigInteger()).over()
        # Cast, since "/" of SQLAlchemy is a division of real numbers.
        which = (number - 1).op("/", return_type=sa.BigInteger())(block).label("block")
        rows = sa.select(*rows.c, which).subquery("blocks")
        ordered = [rows.c.block]
    matches = sa.and_(*(column == rows.c[f"key_{i}"] for i, column in enumerate(target.key)))
    return Candidates(rows, matches, ordered)
