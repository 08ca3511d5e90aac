"""Structured logs: a sentence for people, fields for machines."""

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
    logger.log(level, message, extra={"fields": dict(fields or {})})


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00Z INFO message (name=value ...)``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields = getattr(record, "fields", {})
        shown = " ".join(f"{name}={value}" for name, value in fields.items())
        line = f"{_time(record)} {record.levelname} {record.getMessage()}"
        line += f" ({shown})" if shown else ""
        return (
            line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"
        )


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        data: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        data.update(getattr(record, "fields", {}))
        if record.exc_info is not None:
            data["traceback"] = self.formatException(record.exc_info)
        return json.dumps(data, ensure_ascii=False, default=str)


def configure(*, as_json: bool = False, level: int = logging.INFO) -> None:
    """Send what workers say to standard error; for processes that are workers and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logger = logging.getLogger("sbert_pg")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, timezone.utc)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


__all__ = ["LOGGER", "JsonFormatter", "TextFormatter", "configure", "say"]
