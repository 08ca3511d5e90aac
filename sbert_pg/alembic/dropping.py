"""Tables that are dropped together: those that refer to others before those that they refer to.

Alembic sorts the tables that it creates; those that are gone from the models it drops in no
particular order. A clustering has three tables that refer to one another, so its order counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from graphlib import CycleError, TopologicalSorter

from alembic.operations.ops import DropTableOp, MigrateOperation, ModifyTableOps

Key = tuple[str | None, str]


def in_drop_order(
    operations: Sequence[MigrateOperation], key: Callable[[str | None, str], Key]
) -> list[MigrateOperation]:
    """The operations, those on dropped tables together and in an order in which they work.

    Args:
        operations: what Alembic found.
        key: names a table by its schema and name.
    """
    drops = {key(op.schema, op.table_name): op for op in operations if isinstance(op, DropTableOp)}
    ordered = _sorted({table: _referred(op, key) & set(drops) for table, op in drops.items()})
    groups: dict[Key, list[MigrateOperation]] = {table: [] for table in ordered}
    found: list[MigrateOperation] = []
    place: int | None = None
    for op in operations:
        # What is done to a table before it goes, such as dropping its indexes, stays before it.
        if isinstance(op, (DropTableOp, ModifyTableOps)):
            group = groups.get(key(op.schema, op.table_name))
            if group is not None:
                place = len(found) if place is None else place
                group.append(op)
                continue
        found.append(op)
    if place is not None:
        found[place:place] = [op for table in ordered for op in groups[table]]
    return found


def _referred(op: DropTableOp, key: Callable[[str | None, str], Key]) -> set[Key]:
    """Other tables that a table's foreign keys refer to."""
    found = set()
    for foreign_key in op.to_table().foreign_keys:
        schema, _, name = foreign_key.target_fullname.rpartition(".")[0].rpartition(".")
        found.add(key(schema or None, name))
    return found - {key(op.schema, op.table_name)}


def _sorted(referred: dict[Key, set[Key]]) -> list[Key]:
    """Tables before those that they refer to; by name where tables refer in a circle."""
    names = sorted(referred, key=lambda table: (table[0] or "", table[1]))
    sorter: TopologicalSorter[Key] = TopologicalSorter()
    for table in names:
        sorter.add(table)
        for other in sorted(referred[table], key=str):
            sorter.add(other, table)
    try:
        return list(sorter.static_order())
    except CycleError:
        return names
