"""What a database error is about, whichever driver raised it.

psycopg, psycopg2, asyncpg and pg8000 keep the SQLSTATE and the server's words in four places, so
everything that reads them asks here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from sbert_pg.errors import (
    AlreadyBoundError,
    BackfillIncompleteError,
    BindingError,
    CatalogError,
    CatalogMissingError,
    DeclarationError,
    EncoderMismatchError,
    NotBoundError,
    SbertPgError,
)

#: SQLSTATEs of the class SB, which no server uses: what the functions of the schema raise.
SQLSTATES: dict[str, type[SbertPgError]] = {
    "SB001": EncoderMismatchError,
    "SB002": AlreadyBoundError,
    "SB003": BindingError,
    "SB004": NotBoundError,
    "SB005": BindingError,
    "SB006": BackfillIncompleteError,
}
DEADLOCK_DETECTED = "40P01"
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"
INSUFFICIENT_PRIVILEGE = "42501"
_UNDEFINED_FUNCTION = "42883"
_INVALID_SCHEMA = "3F000"
FEATURE_NOT_SUPPORTED = "0A000"
UNDEFINED_OBJECT = "42704"


def sqlstate_of(error: BaseException | None) -> str | None:
    """The five-character SQLSTATE of an error of SQLAlchemy or of a driver, where it has one."""
    original = getattr(error, "orig", None) or error
    # psycopg and asyncpg say sqlstate, psycopg2 pgcode.
    for name in ("sqlstate", "pgcode"):
        state = getattr(original, name, None)
        if state is not None:
            return str(state)
    state = _fields(original).get("C")
    return None if state is None else str(state)


class Fault(enum.Enum):
    """Where the fault of a statement lies.

    The answer decides what is done: wait and try again, leave the column alone, or find the row.
    """

    #: The connection or the server is gone: restart, fail-over, dropped connection.
    LOST = "lost"
    #: The server cannot just now: full disk, too many connections, read-only, deadlock.
    BUSY = "busy"
    #: The statement took too long: smaller batches may pass.
    SLOW = "slow"
    #: Nothing can be written to this column: it is gone, bound otherwise, or not permitted.
    COLUMN = "column"
    #: A row is refused: a constraint or a trigger of the application's.
    ROW = "row"


#: By the SQLSTATE, or by the class that it begins with; the first that fits.
_FAULTS: tuple[tuple[Fault, tuple[str, ...]], ...] = (
    (Fault.SLOW, (QUERY_CANCELED,)),
    # Timeouts of a transaction and of an idle session.
    (Fault.LOST, ("25P03", "25P04", "57P05")),
    # 25006 read-only, 40 rollback, 53 insufficient resources (53100 is a full disk), 55 not in
    # prerequisite state (locks), 58 system error (input and output), XX internal error.
    (Fault.BUSY, ("25006", "40", "53", "55", "58", "XX")),
    # 57 without 57014: the server shuts down, crashes, starts up, or drops the database.
    (Fault.LOST, ("08", "57")),
    # 42 syntax error or access rule violation (missing table, missing right), 3D and 3F missing
    # catalog or schema, SB this library's own.
    (Fault.COLUMN, ("42", "3D", "3F", "SB", "28", "0A")),
)


def fault_of(error: BaseException) -> Fault:
    """Classify what a statement raised. Errors of neither SQLAlchemy, driver nor library are the
    column's: they are not about one row, and waiting a little does no harm.
    """
    if isinstance(error, (sa.exc.TimeoutError, TimeoutError, ConnectionError)):
        return Fault.BUSY
    if not isinstance(error, sa.exc.DBAPIError):
        return Fault.COLUMN
    state = sqlstate_of(error)
    if error.connection_invalidated:
        return Fault.SLOW if state == QUERY_CANCELED else Fault.LOST
    if state is None:
        lost = isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError))
        return Fault.LOST if lost else Fault.COLUMN
    return next((fault for fault, states in _FAULTS if state.startswith(states)), Fault.ROW)


def words_of(error: BaseException) -> str:
    """An error in one line, without SQLAlchemy's rendering of statement and parameters."""
    if isinstance(error, SbertPgError):
        return " ".join(str(error).split())
    original = getattr(error, "orig", None) or error
    state = sqlstate_of(original)
    # An encoder's error speaks for itself, whatever caused it.
    of_driver = state is not None or isinstance(error, sa.exc.DBAPIError)
    words = " ".join((_words(original)[0] if of_driver else str(original)).split())
    kind = f"{type(original).__name__}{f' {state}' if state else ''}"
    return f"{kind}: {words}" if words else kind


def as_error(error: sa.exc.DBAPIError) -> SbertPgError | None:
    """The error of this library that a driver's error stands for, or ``None``."""
    state = sqlstate_of(error)
    message, detail, hint = _words(error.orig)
    if state in SQLSTATES:
        said = (f"{message[:1].upper()}{message[1:]}.", detail, hint)
        return SQLSTATES[state](" ".join(part for part in said if part))
    if state in (_UNDEFINED_FUNCTION, _INVALID_SCHEMA) and "sbert" in message:
        return CatalogMissingError(
            f"The schema 'sbert' is not installed in this database, or is older than this code: "
            f"{message}. Run 'sbert-pg migrate'."
        )
    if state == FEATURE_NOT_SUPPORTED and "TABLESAMPLE" in message:
        return DeclarationError(
            "An index is declared on what is a view in this database, or a foreign table, and a "
            "search with criteria tries rows of the table that holds the index. Declare the index "
            "on that table and search it; without an index the rows of a view are compared."
        )
    if state == UNDEFINED_OBJECT:
        return DeclarationError(
            f"The language of a search by words is one of the database's text search "
            f"configurations: {message}. The catalog pg_ts_config lists them (\\dF in psql); every "
            "server has 'simple' and 'english', and CREATE TEXT SEARCH CONFIGURATION makes others."
        )
    if state == INSUFFICIENT_PRIVILEGE:
        return CatalogError(
            f"This role may not do that: {message}. Let the owner of the schema sbert run "
            "SELECT sbert.grant_v1(role, capability), where capability is 'reader', 'writer', "
            "'worker' or 'binder'; to bind a column a role has to own its table."
        )
    return None


@contextmanager
def translated() -> Iterator[None]:
    """Raise the library's own error in place of the driver's, where there is one."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        own = as_error(error)
        if own is None:
            raise
        raise own from error


def _words(error: BaseException | None) -> tuple[str, str, str]:
    """Message, detail and hint of a driver's error."""
    fields = _fields(error)
    if fields:
        return str(fields.get("M") or error), str(fields.get("D", "")), str(fields.get("H", ""))
    # SQLAlchemy raises its own error for asyncpg, with asyncpg's as its cause.
    for source in (getattr(error, "diag", None), error, getattr(error, "__cause__", None)):
        message = getattr(source, "message_primary", None) or getattr(source, "message", None)
        if message:
            detail = getattr(source, "message_detail", None) or getattr(source, "detail", None)
            hint = getattr(source, "message_hint", None) or getattr(source, "hint", None)
            return str(message), str(detail or ""), str(hint or "")
    return str(error), "", ""


def _fields(error: BaseException | None) -> dict[str, Any]:
    """The fields of the server's message by their letters, as pg8000 hands them on."""
    first = error.args[0] if error is not None and error.args else None
    return first if isinstance(first, dict) else {}
