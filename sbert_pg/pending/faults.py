"""What a database error is about: the server, the column, or a row.

The answer decides what is done: wait and try again, leave the column alone, or find the row.
"""

from __future__ import annotations

import enum

import sqlalchemy as sa

from sbert_pg.catalog.sqlstates import sqlstate_of
from sbert_pg.errors import SbertPgError


class Fault(enum.Enum):
    """Where the fault lies."""

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


#: Class 57 without 57014: the server shuts down, crashes, starts up, or drops the database.
_LOST = ("08", "57")
#: 40 rollback, 53 insufficient resources (53100 is a full disk), 55 not in prerequisite state
#: (locks), 58 system error (input and output), XX internal error.
_BUSY = ("40", "53", "55", "58", "XX")
#: 42 syntax error or access rule violation (missing table, missing right), 3D and 3F missing
#: catalog or schema, SB this library's own.
_COLUMN = ("42", "3D", "3F", "SB", "28", "0A")
_QUERY_CANCELED = "57014"
_TRANSACTION_TIMEOUT = "25P04"
_READ_ONLY = "25006"
_IDLE_TIMEOUTS = ("25P03", "57P05")


def fault_of(error: BaseException) -> Fault:
    """Classify what a statement raised.

    Args:
        error: an error of SQLAlchemy, the driver or this library. Others are the column's: they are
            not about one row, and waiting a little does no harm.
    """
    if isinstance(error, (sa.exc.TimeoutError, TimeoutError, ConnectionError)):
        return Fault.BUSY
    if not isinstance(error, sa.exc.DBAPIError):
        return Fault.COLUMN
    state = sqlstate_of(error.orig)
    if state == _QUERY_CANCELED:
        return Fault.SLOW
    if state in (_TRANSACTION_TIMEOUT, *_IDLE_TIMEOUTS):
        return Fault.LOST
    if error.connection_invalidated or state is None:
        lost = isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError))
        return Fault.LOST if lost or error.connection_invalidated else Fault.COLUMN
    if state == _READ_ONLY or state.startswith(_BUSY):
        return Fault.BUSY
    if state.startswith(_LOST):
        return Fault.LOST
    if state.startswith(_COLUMN):
        return Fault.COLUMN
    return Fault.ROW


def words_of(error: BaseException) -> str:
    """An error in one line, without SQLAlchemy's rendering of statement and parameters."""
    original = getattr(error, "orig", None) or error
    diagnostics = getattr(original, "diag", None)
    primary = getattr(diagnostics, "message_primary", None)
    state = sqlstate_of(original)
    words = " ".join(str(primary or original).split())
    if isinstance(error, SbertPgError):
        return words
    return f"{type(original).__name__}{f' {state}' if state else ''}: {words}"


__all__ = ["Fault", "fault_of", "words_of"]
