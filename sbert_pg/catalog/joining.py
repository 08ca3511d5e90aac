"""What ``types.guard`` asks of the catalog: hold an encoder once, vouch for it in each transaction.

A process remembers the numbers of the bindings that it has held an encoder against. A number is
never used again, so a column that has been unbound and bound anew is held anew, and one name that
means another table in another transaction (a search path, a map of schemas) is not mistaken for it.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect

from sbert_pg.catalog import tables
from sbert_pg.catalog.holding import Held, attest, hold, including
from sbert_pg.catalog.reading import relation_of
from sbert_pg.catalog.tables import ATTESTED
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.guard import ColumnIdentity

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


def attest_column(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> None:
    """Vouch for the writer of this transaction; one round trip where the column has been held.

    Raises:
        EncoderMismatchError: the column belongs to another encoder.
    """
    known = _held.get(connection.dialect, {}).get(spec)
    if known:
        c = tables.embedding_column.c
        found = connection.execute(
            sa.select(including(ATTESTED, sa.cast(c.id, sa.Text))).where(
                c.relation == relation_of(connection, identity),
                c.column_name == identity.column,
                c.id.in_(known),
            )
        ).first()
        if found is not None:
            return
    held = _hold(connection, identity, spec)
    if held is not None:
        attest(connection, held.binding_id)


def _hold(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> Held | None:
    held = hold(connection, identity, spec)
    if held is not None and held.final:
        with _lock:
            of_engine = _held.setdefault(connection.dialect, {})
            of_engine[spec] = of_engine.get(spec, frozenset()) | {held.binding_id}
    return held


__all__ = ["attest_column", "check_column"]
