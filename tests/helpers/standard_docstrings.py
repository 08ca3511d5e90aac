"""Docstrings of the standard library, parsed once in a process."""

from __future__ import annotations

from functools import cache
from itertools import islice

from sbert_pg.cli.demo_data import Documented, searchable, standard_library


@cache
def documented(number: int) -> tuple[Documented, ...]:
    """The first entries, without parsing the rest."""
    return tuple(islice(standard_library(), number))


@cache
def toured() -> tuple[Documented, ...]:
    """What the demo embeds."""
    return tuple(searchable())


__all__ = ["documented", "toured"]
