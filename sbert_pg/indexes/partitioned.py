"""An index on a partitioned table, built beside live traffic.

PostgreSQL has no ``CREATE INDEX CONCURRENTLY`` for such a table. So the index is made on the table
alone, where it is not valid yet, then on each partition concurrently, and attached; with the last
partition it becomes valid. A build that was ended continues where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles

from sbert_pg import system

#: Builds an index on a table that is not partitioned: schema, table, name, what follows its name,
#: and whether it is unique.
Build = Callable[[str, str, str, str, bool], None]
#: Executes a statement, as often as it takes to get its lock.
Execute = Callable[[sa.Executable], None]


class _Partition(NamedTuple):
    """A partition without its part of an index."""

    oid: int
    schema: str
    name: str
    partitioned: bool


def is_partitioned(connection: sa.Connection, relation: str) -> bool:
    """Whether a table is partitioned.

    Args:
        relation: its name, as text for ``to_regclass``.
    """
    kind = sa.select(system.CLASS.c.relkind).where(system.CLASS.c.oid == system.oid_of(relation))
    return connection.execute(kind).scalar() == "p"


def build_on_partitions(
    connection: sa.Connection,
    schema: str | None,
    relation: str,
    name: str,
    build: Build,
    execute: Execute,
) -> None:
    """Build what an index that is on a partitioned table alone lacks.

    Args:
        connection: where; every statement commits itself.
        schema: of the table and the index, ``None`` for the search path's.
        relation: the table, as text for ``to_regclass``.
        execute: executes what is not built.
    """
    index = connection.execute(
        sa.select(system.INDEX.c.indexrelid, sa.func.pg_get_indexdef(system.INDEX.c.indexrelid))
        .join(system.CLASS, system.CLASS.c.oid == system.INDEX.c.indexrelid)
        .where(system.INDEX.c.indrelid == system.oid_of(relation), system.CLASS.c.relname == name)
    ).one()
    head, _, body = index[1].partition(" USING ")
    unique = head.startswith("CREATE UNIQUE ")
    filling = _Filling(connection, body, unique, build, execute)
    filling.fill((schema, name), index[0], system.oid_of(relation))


class _Filling(NamedTuple):
    """What the partitions of all levels have in common."""

    connection: sa.Connection
    body: str
    unique: bool
    build: Build
    execute: Execute

    def fill(self, index: tuple[str | None, str], index_oid: int, table: Any) -> None:
        """Build and attach what an index of one table lacks."""
        for part in _without(self.connection, index_oid, table):
            digest = hashlib.blake2s(f"{index_oid} {part.oid}".encode(), digest_size=4).hexdigest()
            name = f"{index[1].encode()[:50].decode(errors='ignore')}_{digest}"
            # As it is: what a driver needs to have percent signs doubled does so itself.
            relation = system.name_of(part.schema, part.name)
            definition = f"{relation} USING {self.body}"
            if part.partitioned:
                own = system.name_of(part.schema, name)
                if self._oid(own) is None:
                    self.execute(CreateOnly(name, definition, self.unique))
                self.fill((part.schema, name), self._oid(own) or 0, part.oid)
            else:
                self.build(part.schema, part.name, name, f"ON {definition}", self.unique)
            self.execute(_Attach(index, (part.schema, name)))

    def _oid(self, relation: str) -> int | None:
        return self.connection.execute(sa.select(system.oid_of(relation))).scalar()


def _without(connection: sa.Connection, index_oid: int, table: Any) -> list[_Partition]:
    """Partitions, one level down, that have no part of an index."""
    inherits, klass, own = system.INHERITS, system.CLASS, system.INHERITS.alias("own")
    has = (
        sa.select(sa.literal(1))
        .select_from(own)
        .join(system.INDEX, system.INDEX.c.indexrelid == own.c.inhrelid)
        .where(own.c.inhparent == index_oid, system.INDEX.c.indrelid == klass.c.oid)
        .exists()
    )
    statement = (
        sa.select(klass.c.oid, system.NAMESPACE.c.nspname, klass.c.relname, klass.c.relkind == "p")
        .join(inherits, inherits.c.inhrelid == klass.c.oid)
        .join(system.NAMESPACE, system.NAMESPACE.c.oid == klass.c.relnamespace)
        .where(inherits.c.inhparent == table, sa.not_(has))
        .order_by(klass.c.relname)
    )
    return [_Partition(*row) for row in connection.execute(statement)]


class CreateOnly(sa.schema.ExecutableDDLElement):
    """``CREATE INDEX ... ON ONLY``, of an index or by what follows the name of its table."""

    def __init__(self, name: str, definition: str | sa.Index, unique: bool = False) -> None:
        self.name, self.definition, self.unique = name, definition, unique


@compiles(CreateOnly, "postgresql")
def _create_only(element: CreateOnly, compiler: Any, **kw: Any) -> str:
    if isinstance(element.definition, sa.Index):
        create = sa.schema.CreateIndex(element.definition)
        text: str = compiler.visit_create_index(create, **kw)
        text = text.replace(" CONCURRENTLY ", " ", 1)
        name = compiler.preparer.quote(element.name)
        return text.replace(f" {name} ON ", f" {name} ON ONLY ", 1)
    # A literal column is SQL as it is, in which percent signs are what the driver needs.
    definition = compiler.sql_compiler.process(sa.literal_column(element.definition))
    kind = "UNIQUE INDEX" if element.unique else "INDEX"
    return f"CREATE {kind} {compiler.preparer.quote(element.name)} ON ONLY {definition}"


class _Attach(sa.schema.ExecutableDDLElement):
    """``ALTER INDEX ... ATTACH PARTITION``."""

    def __init__(self, index: tuple[str | None, str], part: tuple[str | None, str]) -> None:
        self.index, self.part = index, part


@compiles(_Attach, "postgresql")
def _attach(element: _Attach, compiler: Any, **_: Any) -> str:
    index, part = (system.ddl_name(compiler, *one) for one in (element.index, element.part))
    return f"ALTER INDEX {index} ATTACH PARTITION {part}"
