"""The transactions in which pending rows are claimed and written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.engine import Connection


class Database:
    """An engine used at READ COMMITTED, whatever its own isolation level is.

    Each statement has to see what was committed before it: the check that a row is unchanged comes
    after the row is locked. The isolation level goes back with the connection to the pool.

    Args:
        engine: the application's engine.

    Attributes:
        engine: the same.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """A connection, for several transactions one after the other."""
        with self.engine.connect() as connection:
            yield connection.execution_options(isolation_level="READ COMMITTED")

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A connection in a transaction that is committed at the end."""
        with self.connect() as connection, connection.begin():
            yield connection


__all__ = ["Database"]
