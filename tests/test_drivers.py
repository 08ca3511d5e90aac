"""Errors and locks are the same over every driver: SQLSTATE, the server's words, waiting."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import sqlstates
from sbert_pg.errors import CatalogMissingError, EncoderMismatchError, SbertPgError, TableBusyError
from sbert_pg.system import in_short_transactions

DRIVERS = ("psycopg", "psycopg2", "pg8000", "asyncpg")
RAISE = (
    "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'SB001', MESSAGE = 'another space', "
    "DETAIL = 'Ours: a.', HINT = 'Use b.'; END $$"
)


def engine_of(url: sa.URL, driver: str) -> sa.Engine:
    """An engine of a driver; pg8000 is told of sockets in a way of its own."""
    pytest.importorskip(driver)
    target = url.set(drivername=f"postgresql+{driver}")
    host = url.query.get("host", url.host)
    if driver == "pg8000" and isinstance(host, str) and host.startswith("/"):
        socket = f"{host}/.s.PGSQL.{url.port or url.query.get('port', 5432)}"
        target = target.set(host=None, port=None, query={})
        return sa.create_engine(target, connect_args={"unix_sock": socket})
    return sa.create_engine(target)


def error_of(url: sa.URL, driver: str, statement: str) -> sa.exc.DBAPIError:
    """What a statement raises over a driver."""
    pytest.importorskip(driver)
    with pytest.raises(sa.exc.DBAPIError) as raised:
        _execute(url, driver, statement)
    return raised.value


def _execute(url: sa.URL, driver: str, statement: str) -> None:
    if driver == "asyncpg":
        asyncio.run(_over_asyncpg(url.set(drivername="postgresql+asyncpg"), statement))
        return
    engine = engine_of(url, driver)
    try:
        with engine.begin() as connection:
            connection.execute(sa.text(statement))
    finally:
        engine.dispose()


async def _over_asyncpg(url: sa.URL, statement: str) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            await connection.execute(sa.text(statement))
    finally:
        await engine.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_sqlstate_and_the_servers_words(driver: str, bare_database_url: sa.URL) -> None:
    error = error_of(bare_database_url, driver, RAISE)
    assert sqlstates.sqlstate_of(error) == sqlstates.sqlstate_of(error.orig) == "SB001"
    own = sqlstates.as_error(error)
    assert type(own) is EncoderMismatchError
    assert str(own) == "Another space. Ours: a. Use b."
    assert sqlstates.words_of(error).endswith(" SB001: another space")
    with pytest.raises(EncoderMismatchError), sqlstates.translated():
        raise error


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("statement", "state", "fault"),
    [
        ("SELECT 1/0", "22012", sqlstates.Fault.ROW),
        ("SELECT * FROM no_such_table", "42P01", sqlstates.Fault.COLUMN),
        ("SET LOCAL statement_timeout = 30; SELECT pg_sleep(5)", "57014", sqlstates.Fault.SLOW),
        ("SET LOCAL transaction_read_only = on; CREATE TABLE t ()", "25006", sqlstates.Fault.BUSY),
    ],
)
def test_where_the_fault_lies(
    driver: str, statement: str, state: str, fault: Any, bare_database_url: sa.URL
) -> None:
    if ";" in statement:
        # asyncpg prepares statements, one at a time.
        first, _, second = statement.partition("; ")
        statement = f"DO $$ BEGIN {first}; PERFORM 1; EXECUTE '{second}'; END $$"
        if "timeout" in first:
            # A time-out counts from the statement's beginning, so it is set before.
            bare_database_url = bare_database_url.set(
                database=_with_timeout(bare_database_url, "500ms")
            )
            statement = second
    error = error_of(bare_database_url, driver, statement)
    assert sqlstates.sqlstate_of(error) == state
    assert sqlstates.fault_of(error) is fault


def _with_timeout(url: sa.URL, value: str) -> str:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        name = engine.dialect.identifier_preparer.quote(str(url.database))
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET statement_timeout = '{value}'")
    engine.dispose()
    return str(url.database)


@pytest.mark.parametrize("driver", DRIVERS)
def test_missing_catalog_is_said(driver: str, bare_database_url: sa.URL) -> None:
    error = error_of(bare_database_url, driver, "SELECT sbert.health_v1(NULL)")
    assert type(sqlstates.as_error(error)) is CatalogMissingError


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
def test_locks_are_tried_for_again(driver: str, bare_database_url: sa.URL) -> None:
    holder_engine = sa.create_engine(bare_database_url)
    engine = engine_of(bare_database_url, driver)
    attempts: list[int] = []

    def alter(connection: sa.Connection) -> None:
        attempts.append(len(attempts))
        connection.exec_driver_sql("ALTER TABLE t ADD COLUMN x int")

    with holder_engine.connect() as holder:
        holder.exec_driver_sql("CREATE TABLE t (id int)")
        holder.commit()
        holder.exec_driver_sql("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(TableBusyError, match=r"held by: process \d+") as raised:
            in_short_transactions(engine, alter, relation="t", lock_timeout=0.1, attempts=3)
        holder.rollback()
        assert isinstance(raised.value, SbertPgError)
        assert len(attempts) == 3
        in_short_transactions(engine, alter, relation="t", lock_timeout=0.1, attempts=3)
    assert [column["name"] for column in sa.inspect(holder_engine).get_columns("t")] == ["id", "x"]
    engine.dispose()
    holder_engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
def test_time_outs_of_a_role_do_not_end_a_step(driver: str, bare_database_url: sa.URL) -> None:
    """One that is shorter than the lock's would end the wait with another error, tried no more."""
    url = bare_database_url.set(database=_with_timeout(bare_database_url, "1min"))
    engine = engine_of(url, driver)

    def shown(connection: sa.Connection) -> list[Any]:
        names = ("statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout")
        return [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names]

    assert in_short_transactions(engine, shown, lock_timeout=0.1) == ["0", "0", "100ms"]
    with engine.connect() as connection:
        assert shown(connection) == ["1min", "0", "0"]
    engine.dispose()


def test_an_error_that_a_client_caused_says_its_own_words() -> None:
    cause = RuntimeError("429")
    cause.message = "of the client"  # type: ignore[attr-defined]
    error = ValueError("text 17 is\ntoo long")
    error.__cause__ = cause
    assert sqlstates.words_of(error) == "ValueError: text 17 is too long"
    assert sqlstates.words_of(ValueError()) == "ValueError"
