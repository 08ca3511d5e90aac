"""Blocks of rows through COPY, in binary; through INSERT where a type has no binary form here."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence, Set
from typing import Any, Literal

import psycopg
import sqlalchemy as sa
from psycopg import sql
from psycopg.adapt import Dumper
from psycopg.pq import Format
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from sbert_pg import system
from sbert_pg.catalog.record import qualified
from sbert_pg.errors import DeclarationError, LoadError
from sbert_pg.system import ColumnIdentity
from sbert_pg.types.wire import WireVector

#: What becomes of a row whose key is in the table: an error, the table's stays, or it is rewritten.
Existing = Literal["refuse", "keep", "replace"]

#: What a COPY says of where it was: "COPY article, line 3, column title".
_LINE = re.compile(r"^COPY .*, line (\d+)", re.MULTILINE)
#: Types that SQLAlchemy takes as text and psycopg's binary form as objects only.
_NOT_BY_VALUE = frozenset({"inet", "cidr"})
_TEXT_OID = psycopg.adapters.types["text"].oid


def _create_staging(
    name: str, schema: str | None, table: str, columns: list[str]
) -> system.Statement:
    """An empty temporary table with some columns of another."""

    def write(compiler: Any) -> str:
        quote = compiler.preparer.quote
        source = system.ddl_name(compiler, schema, table)
        selected = ", ".join(map(quote, columns))
        of_no_rows = f"SELECT {selected} FROM {source} WITH NO DATA"  # noqa: S608 - all are quoted
        return f"CREATE TEMPORARY TABLE {quote(name)} AS {of_no_rows}"

    return system.Statement(write)


def _require_key(table: sa.Table, columns: Sequence[sa.Column[Any]]) -> None:
    missing = [column.name for column in table.primary_key if column not in columns]
    if missing or not list(table.primary_key):
        raise DeclarationError(
            f"Rows of {table.fullname!r} that are there already are known by the primary key, and "
            f"{', '.join(missing) or 'it'} is not among what is loaded. Give it, or leave out "
            "`existing`."
        )


def _is_json(type_: Any) -> bool:
    """Whether a type is ``json`` in the database, by itself or in arrays, or may be."""
    type_ = getattr(type_, "impl_instance", type_)
    type_ = getattr(type_, "item_type", type_)
    return isinstance(type_, sa.JSON) and not isinstance(type_, postgresql.JSONB)


class _BytesDumper(Dumper):
    """Vectors and digests arrive in their wire form already; identities may be objects."""

    format = Format.BINARY

    def dump(self, obj: Any) -> Any:
        if isinstance(obj, bytes):
            return obj
        return obj.payload if isinstance(obj, WireVector) else obj.bytes


class Writer:
    """Writes blocks of rows into one table.

    Where rows may be there already, a block is copied into a temporary table and inserted from
    that.
    """

    def __init__(
        self,
        connection: Connection,
        table: sa.Table,
        columns: Sequence[sa.Column[Any]],
        replaced: Set[sa.Column[Any] | None] = frozenset(),
        *,
        inserts: bool = False,
        existing: Existing = "refuse",
    ) -> None:
        self._connection = connection
        self._table = table
        self._columns = columns
        self._existing = existing
        self._replaced = replaced
        if existing != "refuse":
            _require_key(table, columns)
        self._driver: Any = connection.connection.driver_connection
        self._dumpers: list[type[Dumper]] = []
        copies = isinstance(self._driver, (psycopg.Connection, psycopg.AsyncConnection))
        self._oids = self._find_types() if copies and not inserts else None
        self._schema = system.schema_in(connection, table.schema)
        self._staging: sa.TableClause | None = None
        self._statement = self._copying(self._schema, table.name)

    def _copying(self, schema: str | None, name: str) -> sql.Composed:
        return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
            sql.Identifier(*([name] if schema is None else [schema, name])),
            sql.SQL(", ").join(sql.Identifier(column.name) for column in self._columns),
        )

    @property
    def copies(self) -> bool:
        """Whether rows go through COPY."""
        return self._oids is not None

    def write(self, rows: Sequence[Sequence[Any]], first: int) -> None:
        """Write a block, vectors in their wire form; ``first`` is the number of its first row."""
        if not rows:
            return
        if self._oids is None:
            self._insert(rows, first)
            return
        if self._staging is None and self._existing != "refuse":
            try:
                with self._connection.begin_nested():
                    self._copied(rows, first)
                return
            except LoadError:
                # A key that is there, or something that is said again below.
                self._staging = self._staged()
        self._copied(rows, first)
        if self._staging is not None:
            self._merge(self._staging, first, first + len(rows) - 1)

    def _copied(self, rows: Sequence[Sequence[Any]], first: int) -> None:
        at = [first]
        try:
            if isinstance(self._driver, psycopg.AsyncConnection):
                from sqlalchemy.util import await_only

                await_only(self._copy_async(rows, at))
            else:
                self._copy(rows, at)
        except (psycopg.Error, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._named(error, first, at[0]) from error
        except BaseException:
            # An interrupt can leave the connection within the COPY, where no rollback is taken.
            if self._driver.info.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:
                self._connection.invalidate()
            raise

    def _staged(self) -> sa.TableClause:
        """A temporary table, into which blocks are copied from now on."""
        name = f"sbert_load_{uuid.uuid4().hex[:12]}"
        written = [column.name for column in self._columns]
        self._connection.execute(_create_staging(name, self._schema, self._table.name, written))
        self._statement = self._copying("pg_temp", name)
        columns = (sa.column(column.name, column.type) for column in self._columns)
        return sa.table(name, *columns, schema="pg_temp")

    def close(self) -> None:
        """Drop what was made for the load."""
        if self._staging is not None:
            staging = sa.Table(self._staging.name, sa.MetaData(), schema=self._staging.schema)
            self._connection.execute(sa.schema.DropTable(staging))

    def _merge(self, staging: sa.TableClause, first: int, last: int) -> None:
        """Insert the rows of the temporary table, which is empty afterwards."""
        rows = sa.select(*(staging.c[column.name] for column in self._columns))
        keys = [column.key for column in self._columns]
        statement = postgresql.insert(self._table).from_select(keys, rows, include_defaults=False)
        try:
            self._connection.execute(self._beside_existing(statement))
        except sa.exc.DBAPIError as error:
            raise self._named(error.orig or error, first, last) from error
        self._connection.execute(sa.delete(staging))

    def _beside_existing(self, statement: Any) -> Any:
        """An insert that says what becomes of rows that are there; equal ones are not rewritten."""
        if self._existing == "refuse":
            return statement
        key = list(self._table.primary_key)
        replaced = self._replaced - set(key)
        rest = [column for column in self._columns if column in replaced]
        if self._existing == "keep" or not rest:
            return statement.on_conflict_do_nothing(index_elements=key)
        new, differs = statement.excluded, None
        # The type json alone cannot be compared.
        if not any(_is_json(column.type) for column in rest):
            differs = sa.or_(*(column.is_distinct_from(new[column.key]) for column in rest))
        return statement.on_conflict_do_update(
            index_elements=key, set_={column.key: new[column.key] for column in rest}, where=differs
        )

    def _copy(self, rows: Sequence[Sequence[Any]], at: list[int]) -> None:
        with self._driver.cursor() as cursor:
            self._prepare(cursor)
            with cursor.copy(self._statement) as copy:
                copy.set_types(self._oids)
                write_row = copy.write_row
                for number, row in enumerate(rows, at[0]):
                    at[0] = number
                    write_row(row)

    async def _copy_async(self, rows: Sequence[Sequence[Any]], at: list[int]) -> None:
        async with self._driver.cursor() as cursor:
            self._prepare(cursor)
            async with cursor.copy(self._statement) as copy:
                copy.set_types(self._oids)
                for number, row in enumerate(rows, at[0]):
                    at[0] = number
                    await copy.write_row(row)

    def _prepare(self, cursor: Any) -> None:
        """Let this one cursor send vectors as they are."""
        for dumper in self._dumpers:
            cursor.adapters.register_dumper(bytes, dumper)

    def _insert(self, rows: Sequence[Sequence[Any]], first: int) -> None:
        names = [column.key for column in self._columns]
        plain = [dict(zip(names, row, strict=True)) for row in rows]
        statement = self._beside_existing(postgresql.insert(self._table))
        try:
            with self._connection.begin_nested():
                self._connection.execute(statement, plain)
        except sa.exc.SQLAlchemyError:
            # Which row it was is found by inserting one by one; this block is lost anyway.
            for number, row in enumerate(plain, first):
                try:
                    self._connection.execute(statement, row)
                except sa.exc.SQLAlchemyError as error:
                    raise self._named(getattr(error, "orig", None) or error, number, number) from (
                        error
                    )
            raise

    def _find_types(self) -> list[int] | None:
        """Types of the columns in the database; ``None`` where one cannot be sent in binary."""
        identity = ColumnIdentity(self._table.schema, self._table.name, "")
        name = qualified(self._connection, identity)
        attributes = system.stored_types(self._connection, name)
        oids = []
        if not attributes:
            raise LoadError(f"There is no table {name} in this database; create it first.")
        for column in self._columns:
            if column.name not in attributes:
                raise LoadError(f"Table {self._table.fullname!r} has no column {column.name!r}.")
            oid = self._sendable(attributes[column.name])
            if oid is None:
                return None
            oids.append(oid)
        return oids

    def _sendable(self, row: Any) -> int | None:
        """The type whose binary form a value is sent in."""
        if row.typname in ("vector", "halfvec", "uuid"):
            self._dumpers.append(type("VectorDumper", (_BytesDumper,), {"oid": row.oid}))
            return int(row.oid)
        if row.typname in _NOT_BY_VALUE:
            return None
        oid = row.typbasetype if row.typtype == "d" else row.oid
        try:
            self._driver.adapters.get_dumper_by_oid(oid, Format.BINARY)
        except psycopg.ProgrammingError:
            # Labels of an enum, and text types of extensions, are sent as text is.
            return _TEXT_OID if row.typtype == "e" or row.typcategory == "S" else None
        return int(oid)

    def _named(self, error: Exception, first: int, reached: int) -> LoadError:
        """The error with the row that it is about."""
        row: int | None = reached
        message = str(error)
        if isinstance(error, psycopg.Error) and error.diag.message_primary:
            line = _LINE.search(error.diag.context or "")
            # The server is behind the driver; it says itself how far it came.
            at_most = first if first == reached else None
            row = first + int(line.group(1)) - 1 if line else at_most
            detail = error.diag.message_detail
            message = error.diag.message_primary + (f" ({detail})" if detail else "")
        which = f"Row {row}" if row is not None else f"A row between {first} and {reached}"
        return LoadError(
            f"{which} cannot be loaded into {self._table.fullname!r}: {message}", row=row
        )
