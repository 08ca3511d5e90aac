"""The bulk loader: rows of any number, encoded and written at the same time."""

from sbert_pg.loading.loader import Loaded, load

__all__ = ["Loaded", "load"]
