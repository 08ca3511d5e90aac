"""Rows as the queue has them, and what they are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

#: New and changed rows, and rows of the backfill. Claims take them in this order.
Class = Literal[0, 1]
CHANGED: Class = 0
BACKFILL: Class = 1

#: One value of a key: type and binary form.
Part = tuple[int, bytes]
Key = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pending row as the queue has it.

    Attributes:
        label: what the row is called: a JSON array of its key's parts as text.
        failed_before: whether there is a record of a failure under this label.
    """

    key: Key
    label: str
    failed_before: bool = False


@dataclass(frozen=True, slots=True)
class Row(Candidate):
    """A pending row as it was read.

    Attributes:
        text: what is to be embedded; ``None`` where the row has no text, and is to have no vector.
        of: the half of its digest that names the text, as the server computes it; ``None`` without
            a text.
    """

    text: str | None = None
    of: str | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What became of rows that were to be written.

    Attributes:
        rows: labels of the rows that are fresh now.
        changed: labels of rows that are gone or have another text; pending, or none of ours.
        busy: labels of rows that someone else held locked; they stay pending.
        again: labels of rows that were written and are pending again, by a trigger.
        left_out: labels of rows that a trigger left out of the write; they stay pending.
    """

    rows: tuple[str, ...]
    changed: tuple[str, ...]
    busy: tuple[str, ...]
    again: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __add__(self, other: Written) -> Written:
        return Written(
            self.rows + other.rows,
            self.changed + other.changed,
            self.busy + other.busy,
            self.again + other.again,
            self.left_out + other.left_out,
        )


def label_of(keys: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[str]:
    """What a row is called in leases and failures: a JSON array of its key's parts as text."""
    return sa.cast(sa.func.jsonb_build_array(*(sa.cast(k, sa.Text) for k in keys)), sa.Text)


def shown(label: str) -> str:
    """A label for people: the key itself where it has one part."""
    parts = json.loads(label)
    return str(parts[0]) if len(parts) == 1 else label


def label_from(text: str) -> str:
    """The label that somebody means by a key: ``17``, or ``["eu", "17"]`` where it has parts."""
    try:
        parts = json.loads(text)
    except ValueError:
        parts = text
    if not isinstance(parts, list):
        parts = [text]
    # As PostgreSQL writes jsonb.
    return "[" + ", ".join(json.dumps(str(part), ensure_ascii=False) for part in parts) + "]"
