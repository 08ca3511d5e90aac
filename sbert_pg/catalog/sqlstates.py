"""Errors that the schema's functions raise, as the classes of the error tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from sbert_pg.errors import (
    AlreadyBoundError,
    BindingError,
    CatalogError,
    CatalogMissingError,
    EncoderMismatchError,
    NotBoundError,
    SbertPgError,
)

#: SQLSTATEs of the class SB, which no server uses.
SQLSTATES: dict[str, type[SbertPgError]] = {
    "SB001": EncoderMismatchError,
    "SB002": AlreadyBoundError,
    "SB003": BindingError,
    "SB004": NotBoundError,
    "SB005": BindingError,
}
_INSUFFICIENT_PRIVILEGE = "42501"
_UNDEFINED_FUNCTION = "42883"
_INVALID_SCHEMA = "3F000"


def sqlstate_of(error: BaseException | None) -> str | None:
    """The SQLSTATE of a driver's error; psycopg, psycopg2 and asyncpg name it differently."""
    for name in ("sqlstate", "pgcode"):
        found = getattr(error, name, None)
        if found is not None:
            return str(found)
    return None


def as_error(error: sa.exc.DBAPIError) -> SbertPgError | None:
    """The error of this library that a driver's error stands for, or ``None``."""
    original = error.orig
    state = sqlstate_of(original)
    message, detail, hint = _words(original)
    if state in SQLSTATES:
        said = (f"{message[:1].upper()}{message[1:]}.", detail, hint)
        return SQLSTATES[state](" ".join(part for part in said if part))
    if state in (_UNDEFINED_FUNCTION, _INVALID_SCHEMA) and "sbert" in message:
        return CatalogMissingError(
            f"The schema 'sbert' is not installed in this database, or is older than this code: "
            f"{message}. Run 'sbert-pg migrate'."
        )
    if state == _INSUFFICIENT_PRIVILEGE:
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
    diagnostics = getattr(error, "diag", error)
    message = getattr(diagnostics, "message_primary", None) or getattr(error, "message", None)
    hint = getattr(diagnostics, "message_hint", None) or getattr(error, "hint", None)
    detail = getattr(diagnostics, "message_detail", None) or getattr(error, "detail", None)
    return str(message or error), str(detail or ""), str(hint or "")


__all__ = ["SQLSTATES", "as_error", "sqlstate_of", "translated"]
