"""Rows of any table: a random sample, where the next page begins, and what messages call a row.

Keys travel as they are, in columns of their own types; as text they only name rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import OID

from sbert_pg import system
from sbert_pg.errors import LoadError

#: A sample is drawn from the rows of some pages where it is below this share of the table.
_DRAWN_BELOW = 0.5
#: Rows drawn for each row wanted, since criteria leave some out and the draw is by chance.
_DRAWN = 8


def after(columns: Sequence[sa.ColumnElement[Any]], last: Sequence[Any]) -> sa.ColumnElement[bool]:
    """Whether a row comes after a key, as one comparison that the key's index serves."""
    values = [sa.literal(value, c.type) for c, value in zip(columns, last, strict=True)]
    if len(columns) == 1:
        return columns[0] > values[0]
    return sa.tuple_(*columns) > sa.tuple_(*values)


def label(columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[str]:
    """What reports and files call a row: its key as text, a JSON array where it has several parts.

    For people; nothing is decided by it.
    """
    return sa.cast(columns[0], sa.Text) if len(columns) == 1 else system.array_label(columns)


def is_one_of(label: sa.ColumnElement[str], keys: Iterable[str]) -> sa.ColumnElement[bool]:
    """Whether a row is called one of these."""
    return label == sa.any_(system.array(sorted(keys)))


def require_one_of(
    connection: sa.Connection, label: sa.ColumnElement[str], keys: Iterable[str]
) -> None:
    """Refuse keys of labelled questions of which none is a row of the table: all would score 0."""
    names = sorted(keys)
    rows = sa.select(label)
    if connection.scalar(rows.where(is_one_of(label, names)).limit(1)) is None:
        one = connection.scalar(rows.limit(1))
        raise LoadError(
            f"The pairs name {len(names)} rows, such as {names[0]!r}, and the table has none of "
            f"them. {'It is empty' if one is None else f'Its keys look like {one!r}'}."
        )


def parts_of_table(relation: sa.ColumnElement[int]) -> sa.Select[Any]:
    """The oids of a table and of its partitions."""
    tree = sa.func.pg_partition_tree(relation).table_valued(sa.column("relid", OID))
    # Of a table that has nothing to do with partitions there is no tree.
    both = sa.union(sa.select(relation.label("relid")), sa.select(sa.cast(tree.c.relid, OID)))
    return sa.select(both.subquery().c.relid)


def estimated_rows(connection: sa.Connection, table: sa.TableClause) -> float:
    """Rows of a table and its partitions as the planner estimates them; 0 where never analysed."""
    relation = system.oid_of(system.name_in(connection, table.schema, table.name))
    counted = sa.func.sum(sa.func.greatest(system.CLASS.c.reltuples, 0), type_=sa.Float())
    statement = sa.select(counted).where(
        system.CLASS.c.relkind != "p", system.CLASS.c.oid.in_(parts_of_table(relation))
    )
    return float(connection.execute(statement).scalar() or 0.0)


def counted(connection: sa.Connection, table: sa.TableClause, most: int) -> int:
    """Rows of a table, up to a number."""
    some = sa.select(sa.literal(1)).select_from(table).limit(most).subquery()
    return connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()


def _hashed(label: sa.ColumnElement[str], seed: int) -> sa.ColumnElement[int]:
    return sa.func.hashtextextended(label, sa.literal(seed, sa.BigInteger))


def drawn(
    label: sa.ColumnElement[str], most: int, total: int, seed: int = 0
) -> sa.ColumnElement[bool]:
    """Whether a row is in a sample of about so many; the same rows on every machine."""
    return sa.func.abs(_hashed(label, seed) % max(total, 1)) < most


def sample(
    connection: sa.Connection,
    table: sa.TableClause,
    keys: Sequence[str],
    columns: Sequence[sa.ColumnElement[Any]],
    *,
    where: Sequence[sa.ColumnElement[bool]] = (),
    size: int,
    seed: int = 0,
) -> list[Any]:
    """Random rows of a table that meet criteria, at most ``size``: the same for the same seed."""
    key_columns = [table.c[name] for name in keys]
    order = _hashed(label(key_columns), seed)
    statement = sa.select(*columns).select_from(table).where(*where).order_by(order).limit(size)
    share = _DRAWN * size / max(estimated_rows(connection, table), 1.0)
    if share < _DRAWN_BELOW:
        # The keys of some rows, so that a large table is not sorted for a small sample.
        some = table.tablesample(
            sa.func.bernoulli(sa.literal_column(f"{100 * share:.6f}", sa.Float())),
            name="some",
            seed=sa.literal_column(str(int(seed)), sa.Integer()),
        )
        chosen = sa.select(*(some.c[name] for name in keys))
        narrowed = statement.where(sa.tuple_(*key_columns).in_(chosen))
        rows = list(connection.execute(narrowed).all())
        if len(rows) >= size:
            return rows
    return list(connection.execute(statement).all())
