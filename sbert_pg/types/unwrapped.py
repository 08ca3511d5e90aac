"""Let an error that is raised inside a statement arrive as what it is.

SQLAlchemy wraps what a bind processor raises in ``StatementError``, so ``except VectorError``
around a flush would catch nothing. It leaves alone what derives from its ``DontWrapMixin``. The
error tree itself cannot: encoding needs no SQLAlchemy, and importing it takes a tenth of a second.
So the class is given the mixin here, at the moment of raising.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from sqlalchemy.exc import DontWrapMixin

from sbert_pg.errors import SbertPgError


def unwrapped(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A bind processor whose errors of this project's tree reach the caller unwrapped."""

    @wraps(process)
    def raising(value: Any) -> Any:
        try:
            return process(value)
        except SbertPgError as error:
            kind: Any = type(error)  # a class is hashable, which mypy does not see
            error.__class__ = _not_wrapped(kind)
            raise

    return raising


@cache
def _not_wrapped(kind: Any) -> Any:
    """The class itself with the mixin; same name, and pickled as the class that it stands for."""
    if issubclass(kind, DontWrapMixin):
        return kind

    def as_declared(self: SbertPgError) -> tuple[Any, ...]:
        return _restored, (kind, self.args, vars(self))

    return type(
        kind.__name__,
        (kind, DontWrapMixin),
        {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce__": as_declared},
    )


def _restored(
    kind: type[SbertPgError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> SbertPgError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(attributes)
    return error


__all__ = ["unwrapped"]
