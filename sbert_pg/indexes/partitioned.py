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
    """Whether a table is partitioned, by its name as text for ``to_regclass``."""
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
    """Build what an index lacks that is on a partitioned table alone; every statement commits."""
    index = connection.execute(
        sa.select(system.INDEX.c.indexrelid, sa.func.pg_get_indexdef(system.INDEX.c.indexrelid))
        .join(system.CLASS, system.CLASS.c.oid == system.INDEX.c.indexrelid)
        .where(system.INDEX.c.indrelid == system.oid_of(relation), system.CLASS.c.relname == name)
    ).one()
    head, _, body = index[1].partition(" USING ")
    unique = head.startswith("CREATE UNIQUE ")

    def oid_of(relation: str) -> Any:
        return connection.execute(sa.select(system.oid_of(relation))).scalar()

    def fill(index: tuple[str | None, str], index_oid: int, table: Any) -> None:
        for part in _without(connection, index_oid, table):
            digest = hashlib.blake2s(f"{index_oid} {part.oid}".encode(), digest_size=4).hexdigest()
            name = f"{index[1].encode()[:50].decode(errors='ignore')}_{digest}"
            # As it is: what a driver needs to have percent signs doubled does so itself.
            definition = f"{system.name_of(part.schema, part.name)} USING {body}"
            if part.partitioned:
                own = system.name_of(part.schema, name)
                if oid_of(own) is None:
                    execute(create_as(name, "{} ON ONLY", definition, unique))
                fill((part.schema, name), oid_of(own) or 0, part.oid)
            else:
                build(part.schema, part.name, name, f"ON {definition}", unique)
            execute(_attach(index, (part.schema, name)))

    fill((schema, name), index[0], system.oid_of(relation))


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


def create_only(index: sa.Index) -> system.Statement:
    """``CREATE INDEX ... ON ONLY``."""

    def write(compiler: Any) -> str:
        text: str = compiler.visit_create_index(sa.schema.CreateIndex(index))
        name = compiler.preparer.quote(index.name)
        return text.replace(" CONCURRENTLY ", " ", 1).replace(
            f" {name} ON ", f" {name} ON ONLY ", 1
        )

    return system.Statement(write)


def create_as(name: str, form: str, definition: str, unique: bool) -> system.Statement:
    """``CREATE INDEX`` by its definition as SQL; ``form`` stands around the name: ``"ONLY {}"``."""

    def write(compiler: Any) -> str:
        # A literal column is SQL as it is, in which percent signs are what the driver needs.
        text = compiler.sql_compiler.process(sa.literal_column(definition))
        kind = "UNIQUE INDEX" if unique else "INDEX"
        return f"CREATE {kind} {form.format(compiler.preparer.quote(name))} {text}"

    return system.Statement(write)


def _attach(index: tuple[str | None, str], part: tuple[str | None, str]) -> system.Statement:
    def write(compiler: Any) -> str:
        whole, own = (system.ddl_name(compiler, *one) for one in (index, part))
        return f"ALTER INDEX {whole} ATTACH PARTITION {own}"

    return system.Statement(write)
