"""What ``types.guard`` asks of the catalog: hold an encoder once, vouch for it in each transaction.

A process remembers the numbers of the bindings that it has held an encoder against. A number is
never used again, so a column that has been unbound and bound anew is held anew, and one name that
means another table in another transaction (a search path, a map of schemas) is not mistaken for it.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection, Dialect

from sbert_pg.catalog import system, tables
from sbert_pg.catalog.holding import Held, attest, hold, including
from sbert_pg.catalog.reading import relation_of
from sbert_pg.catalog.tables import ATTESTED
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.guard import ColumnIdentity

#: Bits of ``pg_trigger.tgtype``.
_ROW = 1
_BEFORE = 2

_held: WeakKeyDictionary[Dialect, dict[EncoderSpec, frozenset[int]]] = WeakKeyDictionary()
_lock = threading.Lock()


def check_column(
    connection: Connection, identity: ColumnIdentity, spec: EncoderSpec
) -> bool | None:
    """Whether the column is bound, ``None`` where it is but may still be rolled back.

    Raises:
        EncoderMismatchError: the column belongs to another encoder.
    """
    held = _hold(connection, identity, spec)
    if held is None:
        return False
    return True if held.final else None


def attest_column(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> int:
    """Vouch for the writer of this transaction; one round trip where the column has been held.

    The same statement looks for triggers that may rewrite what is written. So the answer is that of
    the transaction, whatever table its search path means, and costs no statement of its own.

    Returns:
        The events on which a ``BEFORE`` row trigger of the table, or of a partition, is called:
        bits of ``pg_trigger.tgtype``, 0 where there is no such trigger.

    Raises:
        EncoderMismatchError: the column belongs to another encoder.
    """
    known = _held.get(connection.dialect, {}).get(spec)
    if known:
        c = tables.embedding_column.c
        found = connection.execute(
            sa.select(
                including(ATTESTED, sa.cast(c.id, sa.Text)), _rewriting(connection, identity)
            ).where(
                c.relation == relation_of(connection, identity),
                c.column_name == identity.column,
                c.id.in_(known),
            )
        ).first()
        if found is not None:
            return int(found[1])
    held = _hold(connection, identity, spec)
    if held is None:
        return 0
    attest(connection, held.binding_id)
    return int(connection.execute(sa.select(_rewriting(connection, identity))).scalar_one())


def _rewriting(connection: Connection, identity: ColumnIdentity) -> sa.ColumnElement[int]:
    """Events of the ``BEFORE`` row triggers of a table and its partitions, all in one number.

    None of them is the library's: its triggers on tables of an application come after.
    """
    root = sa.cast(relation_of(connection, identity), pg.OID)
    # Not pg_partition_tree(), which locks every partition until the transaction ends.
    family = sa.select(root.label("oid")).cte("family", recursive=True)
    family = family.union_all(
        sa.select(system.INHERITS.c.inhrelid).where(system.INHERITS.c.inhparent == family.c.oid)
    )
    of_row = system.TRIGGER.c.tgtype.op("&")(_ROW | _BEFORE) == _ROW | _BEFORE
    return (
        sa.select(sa.func.coalesce(sa.func.bit_or(system.TRIGGER.c.tgtype), 0))
        .join_from(family, system.TRIGGER, system.TRIGGER.c.tgrelid == family.c.oid)
        .where(of_row, ~system.TRIGGER.c.tgisinternal, system.TRIGGER.c.tgenabled != "D")
        .scalar_subquery()
    )


def _hold(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> Held | None:
    held = hold(connection, identity, spec)
    if held is not None and held.final:
        with _lock:
            of_engine = _held.setdefault(connection.dialect, {})
            of_engine[spec] = of_engine.get(spec, frozenset()) | {held.binding_id}
    return held


__all__ = ["attest_column", "check_column"]
