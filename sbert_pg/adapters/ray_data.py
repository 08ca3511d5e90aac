"""A table as a source and a sink of Ray Data; extra ``ray``.

A table is read by ranges of its pages (TID range scans: no index, no count), each by a task with a
connection of its own, and all under one exported snapshot, so that together they are the table at
one moment. It is written by ``load``: through binary COPY, with the proof of each vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from typing import Any

import numpy as np
import psycopg
import sqlalchemy as sa
from psycopg import sql

from sbert_pg import system
from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.distance import Storage
from sbert_pg.errors import DeclarationError, needing
from sbert_pg.freshness.queue import require_psycopg
from sbert_pg.loading import load
from sbert_pg.loading.copying import Existing
from sbert_pg.row_vectors import target_of
from sbert_pg.types.vector import VectorType
from sbert_pg.types.wire import from_wire_block, to_wire

with needing("ray", "ray", "read and write tables by Ray Data"):
    import pyarrow as pa
    from ray.data import Datasink, Datasource, ReadTask
    from ray.data.block import BlockAccessor, BlockMetadata
    from ray.data.extensions import ArrowTensorArray

#: Rows of a block: some megabytes of vectors.
_BLOCK_ROWS = 4096
#: Bytes of a task's share, at least: a task and its connection cost as much as some megabytes.
_LEAST_BYTES = 8 << 20
#: Arrow's types of PostgreSQL's; everything else travels as text.
_ARROW = {
    "bool": pa.bool_(), "int2": pa.int16(), "int4": pa.int32(), "int8": pa.int64(),
    "float4": pa.float32(), "float8": pa.float64(), "text": pa.string(), "varchar": pa.string(),
    "date": pa.date32(), "timestamp": pa.timestamp("us"), "timestamptz": pa.timestamp("us", "UTC"),
}  # fmt: skip


@dataclass(frozen=True)
class _Column:
    """A column as it is read: its name in the database and in blocks, and its type."""

    name: str
    key: str
    oid: int
    arrow: Any = None
    as_text: bool = False
    dimensions: int = 0
    storage: Storage = "vector"

    @property
    def expression(self) -> sql.Composable:
        """What is selected."""
        name = sql.Identifier(self.name)
        return sql.SQL("{}::text").format(name) if self.as_text else name

    def array(self, values: Sequence[Any]) -> Any:
        """Values as Arrow's array, vectors as a tensor of shape ``(dimensions,)`` each."""
        if not self.dimensions:
            return pa.array(values, self.arrow)
        missing = to_wire(np.full(self.dimensions, np.nan, dtype=np.float32), self.storage)
        payload = b"".join(missing if value is None else value for value in values)
        return ArrowTensorArray.from_numpy(from_wire_block(payload, self.dimensions, self.storage))


@dataclass(frozen=True)
class _Part:
    """A table, or a partition: its name, pages, and bytes with what is stored apart."""

    schema: str
    name: str
    pages: int
    bytes: int


@contextmanager
def table_source(
    engine: sa.Engine, table: Any, columns: Sequence[str] | None = None
) -> Iterator[TableDatasource]:
    """A table at one moment, for ``ray.data.read_datasource`` within the block.

    The snapshot lasts as long as the block, and with it vacuum keeps what it sees: read the dataset
    to its end inside, and write it somewhere.

    ::

        with table_source(engine, Article, ["id", "title", "embedding"]) as source:
            ray.data.read_datasource(source).write_parquet("articles")

    Args:
        engine: an engine with the driver psycopg 3; its URL has to hold on every node.
        table: a mapped class or a ``Table``, partitioned or not. Views have no pages.
        columns: names of attributes or columns; all by default.

    Yields:
        The source. Vectors are float32 tensors of shape ``(dimensions,)``, of NaN where a row has
        none. Types that Arrow lacks, such as UUIDs and JSON, are text.

    Raises:
        DeclarationError: there is no such column or table, a vector column has no known width, or
            the engine uses another driver.
    """
    require_psycopg(engine)
    target, names = target_of(table)
    unknown = [name for name in columns or () if name not in names]
    if unknown:
        raise DeclarationError(
            f"table_source: {target.fullname!r} has no column {unknown[0]!r}; it has "
            f"{', '.join(names)}."
        )
    url = engine.url.render_as_string(hide_password=False)
    chosen = {name: names[name] for name in columns or names}
    options: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with engine.connect().execution_options(**options) as connection:
        snapshot = connection.execute(sa.select(sa.func.pg_export_snapshot())).scalar_one()
        # Nobody moves the rows to other pages meanwhile, as VACUUM FULL would.
        connection.execute(system.ddl("LOCK TABLE %(fullname)s IN ACCESS SHARE MODE", target))
        read = _columns(connection, target, chosen)
        parts = _parts(connection, target)
        yield TableDatasource(url, snapshot, read, parts, target.name)


def _columns(
    connection: sa.Connection, table: sa.Table, chosen: dict[str, sa.Column[Any]]
) -> tuple[_Column, ...]:
    name = system.name_of(table.schema, table.name)
    stored = system.stored_types(connection, name)
    read = []
    for key, column in chosen.items():
        if column.name not in stored:
            raise DeclarationError(f"table_source: table {name} has no column {column.name!r}.")
        kind, oid = stored[column.name].typname, stored[column.name].oid
        declared = column.type
        if isinstance(declared, VectorType):
            if declared.dimensions is None:
                raise DeclarationError(
                    f"table_source: {table.name}.{column.name} has no known width; declare it, as "
                    "in Vector(384), or leave the column out."
                )
            own: Any = {"dimensions": declared.dimensions, "storage": declared.storage}
            # Its bytes as they are, for all rows at once.
            read.append(_Column(column.name, key, psycopg.adapters.types["bytea"].oid, **own))
        elif kind in _ARROW:
            read.append(_Column(column.name, key, oid, _ARROW[kind]))
        else:
            text = psycopg.adapters.types["text"].oid
            read.append(_Column(column.name, key, text, pa.string(), as_text=True))
    return tuple(read)


def _parts(connection: sa.Connection, table: sa.Table) -> list[_Part]:
    """The table, or its partitions."""
    relation = system.oid_of(system.name_of(table.schema, table.name))
    klass, size = system.CLASS.c, sa.func.current_setting("block_size").cast(sa.Integer)
    here = klass.oid.in_(catalog_rows.parts_of_table(relation))
    statement = (
        sa.select(
            system.NAMESPACE.c.nspname,
            klass.relname,
            sa.func.div(sa.func.pg_relation_size(klass.oid), size).cast(sa.Integer),
            sa.func.pg_table_size(klass.oid),
        )
        .join(system.NAMESPACE, system.NAMESPACE.c.oid == klass.relnamespace)
        .where(klass.relkind == "r", here)
        .order_by(system.NAMESPACE.c.nspname, klass.relname)
    )
    parts = [_Part(*row) for row in connection.execute(statement)]
    if not parts:
        raise DeclarationError(f"table_source: {table.fullname} is no table with pages of its own.")
    return parts


class TableDatasource(Datasource):  # type: ignore[misc]
    """A table at one moment, as Ray Data reads it; made by ``table_source``."""

    def __init__(
        self,
        url: str,
        snapshot: str,
        columns: tuple[_Column, ...],
        parts: Sequence[_Part],
        name: str,
    ) -> None:
        super().__init__()
        self._read = partial(_blocks, url, snapshot, columns)
        self._parts = parts
        self._name = name

    def get_name(self) -> str:
        """What Ray calls the tasks."""
        return f"table {self._name}"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of the table, with what is stored apart."""
        return sum(part.bytes for part in self._parts)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[Any]:
        """Tasks that read a range of pages each, at most about as many as are asked for."""
        total = sum(part.pages for part in self._parts)
        number = min(parallelism, self.estimate_inmemory_data_size() // _LEAST_BYTES)
        step = max(1, -(-total // max(1, number)))
        tasks = []
        for part in self._parts:
            for first in range(0, part.pages, step):
                last = min(first + step, part.pages)
                share = (last - first) / part.pages
                metadata = BlockMetadata(
                    num_rows=None,
                    size_bytes=int(part.bytes * share),
                    exec_stats=None,
                    input_files=None,
                )
                read = partial(self._read, part, first, last)
                tasks.append(ReadTask(read, metadata, per_task_row_limit=per_task_row_limit))
        return tasks


@cache
def _engine(url: str) -> sa.Engine:
    """One for all tasks of a process, which asks once what server there is; no pool."""
    return sa.create_engine(url, poolclass=sa.NullPool)


def _blocks(
    url: str, snapshot: str, columns: tuple[_Column, ...], part: _Part, first: int, last: int
) -> Iterator[Any]:
    """The rows of some pages, as tables of Arrow's."""
    with _engine(url).connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        driver.read_only = True
        try:
            driver.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        except psycopg.Error as error:
            raise DeclarationError(
                f"The snapshot of the table is gone ({error}): a dataset of table_source() is read "
                "inside its `with` block, to its end."
            ) from error
        statement = sql.SQL(
            "COPY (SELECT {} FROM ONLY {} WHERE ctid >= {} AND ctid < {}) TO STDOUT (FORMAT BINARY)"
        ).format(
            sql.SQL(", ").join(column.expression for column in columns),
            sql.Identifier(part.schema, part.name),
            sql.Literal(f"({first},0)"),
            sql.Literal(f"({last},0)"),
        )
        names = [column.key for column in columns]
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types([column.oid for column in columns])
            rows = copy.rows()
            while some := list(islice(rows, _BLOCK_ROWS)):
                values = zip(columns, zip(*some, strict=True), strict=True)
                yield pa.Table.from_arrays([c.array(v) for c, v in values], names=names)


class TableDatasink(Datasink[int]):  # type: ignore[misc]
    """Writes a dataset into a table, for ``Dataset.write_datasink``.

    Each task loads its blocks in one transaction, as ``load`` does it: vectors that come along are
    stored with their proof, texts without one are encoded where the task runs. Rows are known
    by their primary key, so that a task that Ray tries again changes nothing.

    ::

        ray.data.read_parquet("articles").write_datasink(TableDatasink(engine, Article))

    Args:
        engine: an engine with the driver psycopg 3; its URL has to hold on every node.
        table: a mapped class or a ``Table``; the dataset's columns have its attributes' or columns'
            names, the primary key among them.
        existing: what becomes of rows whose key is in the table: ``"replace"`` writes those that
            differ, ``"keep"`` leaves them as they are.
        setup: called first in each task, to register encoders with ``use_encoder``.

    Attributes:
        rows: rows written, once the dataset is written; those of a repeated task count once.

    Raises:
        DeclarationError: the engine uses another driver, or ``existing`` is ``"refuse"``.
    """

    def __init__(
        self,
        engine: sa.Engine,
        table: Any,
        *,
        existing: Existing = "replace",
        setup: Callable[[], object] | None = None,
    ) -> None:
        require_psycopg(engine)
        if existing not in ("replace", "keep"):
            raise DeclarationError(
                f"TableDatasink: existing is {existing!r}; a task that is tried again meets its "
                "own rows, so use 'replace' or 'keep'."
            )
        self._url = engine.url.render_as_string(hide_password=False)
        target, names = target_of(table)
        self._table, self._keys = target, {name: column.key for name, column in names.items()}
        self._existing, self._setup = existing, setup
        self.rows = 0

    def write(self, blocks: Iterable[Any], ctx: Any) -> int:
        """Load blocks in one transaction; returns their rows."""
        if self._setup is not None:
            self._setup()
        tables = (BlockAccessor.for_block(block).to_arrow() for block in blocks)
        filled = (table for table in tables if table.num_rows)
        first = next(filled, None)
        if first is None:
            return 0
        names = [self._keys.get(name, name) for name in first.column_names]
        rows = _rows(chain([first], filled), first.column_names)
        with _engine(self._url).begin() as connection:
            return load(connection, self._table, rows, columns=names, existing=self._existing)

    @property
    def min_bytes_per_write(self) -> int:
        """What Ray puts together for a task."""
        return _LEAST_BYTES

    def on_write_complete(self, write_result: Any) -> None:
        """Note how many rows there were."""
        self.rows = sum(write_result.write_returns)


def _rows(tables: Iterable[Any], names: list[str]) -> Iterator[Sequence[Any]]:
    for table in tables:
        if set(table.column_names) != set(names):
            raise DeclarationError(
                f"TableDatasink: a block has the columns {', '.join(table.column_names)}, and the "
                f"first of its task has {', '.join(names)}. Give all rows the same, as "
                "Dataset.select_columns() does."
            )
        yield from zip(*(_values(table, name) for name in names), strict=True)


def _values(table: Any, name: str) -> Sequence[Any]:
    """A column's values; of numbers in lists of one length, arrays."""
    column = table[name]
    type_ = column.type
    if isinstance(type_, pa.BaseExtensionType) and type_.extension_name.startswith("ray.data"):
        matrix: Any = BlockAccessor.for_block(table.select([name])).to_numpy(name)
        return list(matrix)
    listed = pa.types.is_fixed_size_list(type_) or pa.types.is_list(type_)
    if listed and pa.types.is_floating(type_.value_type) and not column.null_count and len(column):
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        lengths = set(np.diff(column.combine_chunks().offsets)) if pa.types.is_list(type_) else {0}
        if len(lengths) == 1:
            return list(flat.reshape(len(column), -1))
    values: list[Any] = column.to_pylist()
    return values


__all__ = ["TableDatasink", "TableDatasource", "table_source"]
