"""The bulk loader: rows of any number, encoded and written at the same time."""

from sbert_pg.loading.aside import indexes_aside
from sbert_pg.loading.loader import load
from sbert_pg.loading.rows import Loaded

__all__ = ["Loaded", "indexes_aside", "load"]
