"""Structured logs: a sentence for people, fields for machines, one record a line.

Names of columns, keys and errors are data. What is not printable in them is written as an escape,
so that no row can end a line, begin another, or drive a terminal.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

#: Logger of everything a worker says.
LOGGER = "sbert_pg.worker"


def say(
    logger: logging.Logger, level: int, message: str, fields: Mapping[str, Any] | None = None
) -> None:
    """Log a sentence with fields; they are ``record.fields`` for handlers of the application's."""
    # The sentence may hold a per cent sign, and is not a format.
    logger.log(level, "%s", message, extra={"fields": dict(fields or {})})


def printable(text: str) -> str:
    r"""The text with everything that is not printable as ``\x1b``, ``\u2028`` and so on."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.000Z INFO message (name=value ...)``.

    A value with a blank, a quote or an equals sign in it is quoted as in JSON.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, and further ones for a traceback only."""
        fields = getattr(record, "fields", {})
        shown = " ".join(f"{printable(str(name))}={_value(v)}" for name, v in fields.items())
        line = f"{_time(record)} {record.levelname} {printable(record.getMessage())}"
        line += f" ({shown})" if shown else ""
        if record.exc_info is None:
            return line
        trace = [f"  {printable(one)}" for one in _traceback(self, record)]
        return "\n".join([line, *trace])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        data: dict[str, Any] = {
            **getattr(record, "fields", {}),
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info is not None:
            data["traceback"] = "\n".join(_traceback(self, record))
        line = json.dumps(data, ensure_ascii=False, default=str)
        # JSON leaves line separators and characters of control beyond ASCII as they are.
        return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def configure(*, as_json: bool = False, level: int = logging.INFO) -> None:
    """Send what workers say to standard error; for processes that are workers and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logger = logging.getLogger("sbert_pg")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def _value(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not any(c in ' "=\\' for c in text) and text != ""
    return text if plain else printable(json.dumps(text, ensure_ascii=False))


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    # Not splitlines(), which also ends lines at characters that data may hold.
    return [] if record.exc_info is None else formatter.formatException(record.exc_info).split("\n")


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, timezone.utc)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
