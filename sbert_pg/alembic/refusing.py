"""A refusal within a migration is told by Alembic as its own are: one message, no traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from alembic.util import CommandError

from sbert_pg.errors import SbertPgError

P = ParamSpec("P")
R = TypeVar("R")


def refusing(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose errors of this library are Alembic's ``CommandError`` as well.

    Alembic's command line, and Flask-Migrate's, print the message of such an error and exit; any
    other one ends in a traceback of the migration's innards.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except CommandError:
            raise
        except SbertPgError as error:
            raise _told(error).with_traceback(error.__traceback__) from error.__cause__

    return call


def _told(error: SbertPgError) -> SbertPgError:
    """The same error, and a ``CommandError``."""
    kind = type(error)
    both = type(kind.__name__, (kind, CommandError), {"__module__": kind.__module__})
    told: SbertPgError = both.__new__(both, *error.args)
    told.__dict__.update(error.__dict__)
    return told


__all__ = ["refusing"]
