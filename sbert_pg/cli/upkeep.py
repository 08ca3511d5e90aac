"""``backfill``, ``retry``, ``skip`` and ``audit``: one column, by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import sqlalchemy as sa
import typer
from sqlalchemy.engine import Connection

from sbert_pg.catalog import Binding
from sbert_pg.cli import common
from sbert_pg.cli.worker import (
    BatchOption,
    CacheOption,
    EncodersOption,
    ImportOption,
    LogJsonOption,
    LogLevelOption,
    long_lived_database,
    prepare,
)
from sbert_pg.errors import NotBoundError
from sbert_pg.pending.progress import Progress

ColumnArgument = Annotated[
    str, typer.Argument(help="The column, as table.column or schema.table.column.")
]
KeysOption = Annotated[
    list[str] | None,
    typer.Option("--key", "-k", help="Key of a row; all that failed by default. May be repeated."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (backfill, retry, skip, audit):
        app.command()(command)


def backfill(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    modules: ImportOption = None,
    batch_size: BatchOption = 256,
    span: Annotated[int, typer.Option(help="Rows that a process takes at a time.", min=1)] = 20_000,
    encoders: EncodersOption = 2,
    rate: Annotated[
        float | None, typer.Option(help="Most rows a second.", show_default=False)
    ] = None,
    max_replica_lag: Annotated[
        float | None,
        typer.Option(help="Pause while a replica is so many seconds behind.", show_default=False),
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(help="Pause while the probe takes so many milliseconds.", show_default=False),
    ] = None,
    latency_probe: Annotated[
        str | None,
        typer.Option(help="A typical query to time; a row by its key by default.", metavar="SQL"),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget ranges and begin anew.")] = (
        False
    ),
    cache: CacheOption = 0,
    json: common.JsonOption = False,
    log_json: LogJsonOption = False,
    log_level: LogLevelOption = "warning",
) -> None:
    """Fill the vectors of rows that were there before.

    Run as many as you like: they share the table by key ranges. Stop and start them at will; what
    is written stays.

    [b]sbert-pg backfill article.embedding --rate 500 --max-latency 20[/]
    """
    from sbert_pg.pending.backfill import BackfillSettings, Limits
    from sbert_pg.pending.backfill import backfill as run
    from sbert_pg.worker.settings import worker_name

    prepare(modules, log_json=log_json, log_level=log_level)
    probe = None if latency_probe is None else _probe(latency_probe)
    latency = None if max_latency is None else max_latency / 1000
    settings = BackfillSettings(
        batch_size=batch_size,
        span=span,
        encoders=encoders,
        rows_per_second=rate,
        limits=Limits(replica_lag=max_replica_lag, latency=latency, probe=probe),
        restart=restart,
        name=worker_name(),
        cache_rows=cache,
    )
    with long_lived_database(database) as engine, _stop_event() as stop, _bar() as show:
        binding = find(engine, column)
        done = run(engine, binding, settings, on_progress=show, stop=stop)
    if json:
        common.print_json(asdict(done))
    else:
        rate_done = done.rows / done.seconds if done.seconds else 0.0
        common.out.print(
            f"{done.rows:,} rows filled in {done.seconds:.1f} s ({rate_done:,.0f} a second), "
            f"{done.marked:,} left to the worker; "
            + ("complete" if done.complete else "not complete: run it again to go on")
        )
    if not done.complete:
        raise typer.Exit(common.EXIT_FAILED)


def retry(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    key: KeysOption = None,
    json: common.JsonOption = False,
) -> None:
    """Let workers try failed rows again.

    [b]sbert-pg retry article.embedding[/]              all that failed
    [b]sbert-pg retry article.embedding -k 17 -k 42[/]  these, skipped ones too
    """
    from sbert_pg.pending import marks

    _change(database, column, json, "to be tried again", lambda c, b: marks.retry(c, b, key))


def skip(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    key: KeysOption = None,
    json: common.JsonOption = False,
) -> None:
    """Leave rows that cannot be embedded without a vector, until their text changes.

    [b]sbert-pg skip article.embedding -k 17[/]
    """
    from sbert_pg.pending import marks

    _change(database, column, json, "skipped", lambda c, b: marks.skip(c, b, key))


def audit(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    modules: ImportOption = None,
    sample: Annotated[int, typer.Option(help="Rows to look at, by chance.", min=1)] = 1_000,
    everything: Annotated[bool, typer.Option("--all", help="Look at every row.")] = False,
    mark: Annotated[
        bool, typer.Option("--mark", help="Mark what is wrong pending, for workers to mend.")
    ] = False,
    json: common.JsonOption = False,
    log_json: LogJsonOption = False,
    log_level: LogLevelOption = "warning",
) -> None:
    """Encode texts anew and compare with the stored vectors; exits with 1 if any is wrong.

    For when triggers were disabled, as in a restore or logical replication.

    [b]sbert-pg audit article.embedding --all --mark[/]
    """
    from sbert_pg.pending.audit import audit as run
    from sbert_pg.registry import get_encoder

    prepare(modules, log_json=log_json, log_level=log_level)
    with long_lived_database(database) as engine:
        binding = find(engine, column)
        encoder = get_encoder(binding.declared)
        found = run(engine, binding, encoder, sample=None if everything else sample, mark=mark)
    if json:
        common.print_json(found.to_json() | {"findings": [asdict(one) for one in found.findings]})
    else:
        common.print_table(["", "rows"], [list(pair) for pair in found.to_json().items()])
        if found.findings:
            rows = [[one.key, one.kind, one.cosine] for one in found.findings[:20]]
            common.print_table(["key", "finding", "cosine"], rows)
    if found.wrong:
        raise typer.Exit(common.EXIT_FAILED)


def find(engine: sa.Engine, name: str) -> Binding:
    """The binding that a name on the command line means.

    Raises:
        NotBoundError: none is called so, or several are.
    """
    from sbert_pg import catalog

    with engine.begin() as connection:
        catalog.require_current(connection)
        bindings = catalog.all_bindings(connection)
    found = [b for b in bindings if name in (str(b), f"{b.table}.{b.column}", b.table)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(str(b) for b in bindings) or "none"
    what = "Several bound columns are" if found else "No bound column is"
    raise NotBoundError(
        f"{what} called {name!r}; name one as schema.table.column. Bound columns: {known}."
    )


def _change(
    database: str | None,
    column: str,
    json: bool,
    words: str,
    do: Callable[[Connection, Binding], int],
) -> None:
    with common.database(database) as engine:
        binding = find(engine, column)
        with engine.begin() as connection:
            count = do(connection, binding)
    if json:
        common.print_json({"column": str(binding), "rows": count})
    else:
        common.out.print(f"{count:,} rows {words}")


def _probe(statement: str) -> Callable[[Connection], object]:
    return lambda connection: connection.execute(sa.text(statement)).first()


@contextmanager
def _stop_event() -> Iterator[threading.Event]:
    """Set by the first SIGTERM or Ctrl-C; the second does not wait for what is in hand."""
    event = threading.Event()

    def stop(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    with common.on_stop(stop):
        yield event


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    with common.progress_bar() as bar:
        task = bar.add_task("filling", total=None, rate="")

        def show(progress: Progress) -> None:
            words = f"{progress.rows_per_second:,.0f}/s"
            if progress.paused:
                words += f" (paused: {progress.paused})"
            bar.update(task, completed=progress.rows, total=progress.total, rate=words)

        yield show


__all__ = ["audit", "backfill", "find", "register", "retry", "skip"]
