"""The name of a row in ``sbert.pending``, from Python: the same text that the triggers write.

One key column gives its text, several give a JSON array of their texts; the other half is
``sql/key_expression_v1.sql``, and a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.types import UserDefinedType

#: Dates and times go through ISO 8601 in UTC, so that the text does not depend on a session.
_ISO = frozenset({"date", "timestamp without time zone"})
_WITH_ZONE = "timestamp with time zone"


class Named(UserDefinedType[object]):
    """A column type by the name that ``format_type`` gives it, for casting a key back.

    Args:
        name: SQL name of the type, quoted where it has to be, as the server spelt it.
    """

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: object) -> str:
        """The type as DDL spells it."""
        return self.name


def key_text(
    columns: Sequence[sa.ColumnElement[object]], types: Sequence[str]
) -> sa.ColumnElement[str]:
    """The key of a row as an SQL expression.

    Args:
        columns: the key columns, in the order of the binding.
        types: their base types, as ``Binding.key_types`` has them.
    """
    parts = [_part(column, type_) for column, type_ in zip(columns, types, strict=True)]
    if len(parts) == 1:
        return parts[0]
    return sa.cast(sa.func.jsonb_build_array(*parts), sa.Text)


def unpacked(
    keys: Sequence[str] | sa.ColumnElement[str], names: Sequence[str], types: Sequence[str]
) -> sa.Subquery:
    """Keys as rows that a table can be joined with.

    Args:
        keys: texts of keys, or an expression of type ``text[]``.
        names: names of the key columns.
        types: their types, as ``Binding.key_types`` has them.

    Returns:
        A subquery with the column ``key``, the text, and one column for each key column, named
        ``k0``, ``k1``... in the order of ``names`` and of its column's type.
    """
    array: sa.ColumnElement[Any] = (
        keys if isinstance(keys, sa.ColumnElement)
        else sa.cast(sa.bindparam(None, list(keys), type_=pg.ARRAY(sa.Text)), pg.ARRAY(sa.Text))
    )  # fmt: skip
    texts = sa.func.unnest(array).table_valued(sa.column("key", sa.Text), name="wanted")
    texts = texts.render_derived()
    key = texts.c.key
    if len(names) == 1:
        parts: list[sa.ColumnElement[str]] = [key]
    else:
        document = sa.cast(key, pg.JSONB)
        parts = [document[i].astext for i in range(len(names))]
    columns = [
        sa.cast(part, Named(type_)).label(f"k{i}")
        for i, (part, type_) in enumerate(zip(parts, types, strict=True))
    ]
    return sa.select(key.label("key"), *columns).subquery("wanted_keys")


def _part(column: sa.ColumnElement[object], type_: str) -> sa.ColumnElement[str]:
    if type_ in _ISO:
        return _json_text(sa.func.to_jsonb(column))
    if type_ == _WITH_ZONE:
        utc = sa.func.timezone("UTC", column)
        zone = sa.case((sa.func.isfinite(column), "Z"), else_="")
        return _json_text(sa.func.to_jsonb(utc)).concat(zone)
    if type_ == "bytea":
        return sa.literal("\\x", sa.Text).concat(sa.func.encode(column, "hex", type_=sa.Text))
    return sa.cast(column, sa.Text)


def _json_text(document: sa.ColumnElement[object]) -> sa.ColumnElement[str]:
    return document.op("#>>")(sa.cast(sa.literal("{}", sa.Text), pg.ARRAY(sa.Text))).cast(sa.Text)
