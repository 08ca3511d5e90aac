"""Fill a column within a migration, with a progress bar where somebody is looking."""

from __future__ import annotations

import datetime as dt
import logging

import sqlalchemy as sa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sbert_pg.catalog import Binding
from sbert_pg.errors import BackfillIncompleteError
from sbert_pg.pending import backfill as filling
from sbert_pg.pending import progress as told

#: How long rows that a killed migration had in hand are left alone when it is run again. Shorter
#: than among workers: there is mostly one process, and encoding rows twice does no harm.
LEASE = dt.timedelta(seconds=30)

log = logging.getLogger("sbert_pg.alembic")


def fill_column(engine: sa.Engine, binding: Binding) -> None:
    """Fill a column, together with whoever else is doing it.

    Args:
        engine: where; further connections are taken from it.
        binding: the column.

    Raises:
        EncoderError: the encoder cannot be loaded.
        BackfillIncompleteError: rows are left.
    """
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(f"embedding {binding}", total=None)

        def show(progress: told.Progress) -> None:
            bar.update(task, completed=progress.rows, total=progress.total)

        filled = filling.backfill(
            engine, binding, settings=filling.BackfillSettings(lease=LEASE), on_progress=show
        )
    log.info("%s rows of %s embedded in %.0f s", filled.rows, binding, filled.seconds)
    if not filled.complete:
        raise BackfillIncompleteError(
            f"The backfill of {binding} is not complete: {filled.marked:,} rows could not be "
            "written and are pending or failed. See 'sbert-pg status', then run the same "
            "migration again."
        )
