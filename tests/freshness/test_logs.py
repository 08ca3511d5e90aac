"""What data brings into a log line stays data."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbert_pg.freshness.settings import JsonFormatter, TextFormatter, say

HOSTILE = "note\n2026-01-01T00:00:00Z INFO all is well\x1b[2J\u2028\x85\r"


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("sbert_pg.worker", logging.INFO, "", 1, "%s", (message,), None)
    made.fields = fields
    return made


@given(st.text(), st.dictionaries(st.text(), st.text(), max_size=3))
def test_a_record_is_one_printable_line(message: str, fields: dict[str, str]) -> None:
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(
            record(message, **{}) if not fields else with_fields(message, fields)
        )
        assert line.isprintable()
        assert len(line.splitlines()) == 1


def with_fields(message: str, fields: dict[str, str]) -> logging.LogRecord:
    made = record(message)
    made.fields = fields
    return made


@given(st.text(), st.text())
def test_json_says_exactly_what_was_said(message: str, value: str) -> None:
    data = json.loads(JsonFormatter().format(record(message, column=value)))
    assert (data["message"], data["column"]) == (message, value)


def test_fields_do_not_forge_others() -> None:
    line = TextFormatter().format(record("x", key='1 reason="fine") INFO', reason=HOSTILE))
    assert line.isprintable()
    assert 'key="1 reason=' in line
    forged = JsonFormatter().format(with_fields("said", {"message": "forged", "level": "error"}))
    assert json.loads(forged)["message"] == "said"


def test_a_traceback_keeps_its_lines_and_escapes_the_data() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        made = logging.LogRecord(
            "x", logging.ERROR, "", 1, "%s", ("m",), (ValueError, error, error.__traceback__)
        )
    lines = TextFormatter().format(made).split("\n")
    assert all(line.isprintable() for line in lines)
    assert json.loads(JsonFormatter().format(made))["traceback"].startswith("Traceback")


@pytest.mark.parametrize("name", ["100%s", "%(fields)s", "{}"])
def test_names_are_no_formats(name: str, caplog: pytest.LogCaptureFixture) -> None:
    say(logging.getLogger("sbert_pg.worker"), logging.ERROR, f"Cannot keep {name} fresh")
    assert name in caplog.text
