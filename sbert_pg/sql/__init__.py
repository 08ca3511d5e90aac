"""The bodies of the library's SQL functions and views, one file each, and their loader.

A function's name ends in its version. A released file never changes: old and new code share a
database during a deploy, so a change is a new function beside the old one.
"""

from __future__ import annotations

from importlib import resources


def load(name: str) -> str:
    """The statement in ``sql/<name>.sql``.

    Args:
        name: name of a file of this package, without its suffix.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return resources.files(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8")


__all__ = ["load"]
