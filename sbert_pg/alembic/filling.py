"""Fill a column within a migration, with a progress bar where somebody is looking."""

from __future__ import annotations

import sqlalchemy as sa

from sbert_pg.catalog import Binding


def fill_column(engine: sa.Engine, binding: Binding) -> None:
    """Fill a column."""
    raise NotImplementedError
