"""What commands share: options, the database, output, exit codes."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sbert_pg.errors import DeclarationError

EXIT_OK = 0
#: Something was wrong: an error of this project, or a check that did not hold.
EXIT_FAILED = 1
#: The command line itself was wrong.
EXIT_USAGE = 2
#: The database could not be reached.
EXIT_UNREACHABLE = 3
#: Interrupted from the keyboard, as shells report it.
EXIT_INTERRUPTED = 130

#: Database that commands use on the embedded server.
EMBEDDED_DATABASE = "sbert_pg"

DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        "-d",
        envvar=["SBERT_PG_DATABASE_URL", "DATABASE_URL"],
        help="URL of the database. Without one, the embedded server is started for the command.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
AppOption = Annotated[
    str | None,
    typer.Option(
        "--app",
        help="Where the mapped classes are: 'package.module:Base' or 'package.module:metadata'.",
        show_default=False,
    ),
]

#: Results go here.
out = Console()
#: Progress, notes and errors go here, so that a pipe gets results alone.
err = Console(stderr=True)


def normalized_url(url: str) -> sa.URL:
    """A URL for psycopg 3, whatever dialect name the variable holds.

    Raises:
        DeclarationError: it is no PostgreSQL URL.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise DeclarationError(
            "The database URL cannot be read; give one like postgresql://user@host:5432/name."
        ) from error
    backend = parsed.drivername.partition("+")[0]
    if backend not in ("postgresql", "postgres"):
        raise DeclarationError(
            f"The database URL is for {backend!r}; embeddings are stored in PostgreSQL with "
            "pgvector. Give one like postgresql://user@host:5432/name."
        )
    return parsed.set(drivername="postgresql+psycopg")


@contextmanager
def database(url: str | None, data_dir: Path | None = None) -> Iterator[sa.Engine]:
    """An engine on the given database, or on the embedded server while the block runs.

    The embedded database is the user's own and gets the schema ``sbert`` at once; a given one is
    only changed by commands that say so.
    """
    if url is not None:
        engine = sa.create_engine(normalized_url(url))
        try:
            yield engine
        finally:
            engine.dispose()
        return
    from sbert_pg import catalog
    from sbert_pg.embedded import embedded_server

    with embedded_server(data_dir) as server:
        engine = sa.create_engine(server.ensure_database(EMBEDDED_DATABASE))
        try:
            with engine.begin() as connection:
                catalog.upgrade(connection)
            yield engine
        finally:
            engine.dispose()


def load_metadata(target: str) -> sa.MetaData:
    """The metadata of ``module:attribute``, where the attribute is one or has one.

    Raises:
        DeclarationError: the module or the attribute cannot be found, or holds no metadata.
    """
    module_name, colon, attribute = target.partition(":")
    if not colon or not attribute:
        raise DeclarationError(f"--app {target!r} has to be of the form package.module:Base.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise DeclarationError(f"--app {target!r}: cannot import {module_name}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise DeclarationError(f"--app {target!r}: {module_name} has no {attribute!r}.")
        found = getattr(found, name)
    metadata = found if isinstance(found, sa.MetaData) else getattr(found, "metadata", None)
    if not isinstance(metadata, sa.MetaData):
        raise DeclarationError(f"--app {target!r} is neither metadata nor a declarative base.")
    return metadata


def print_json(data: Any) -> None:
    """Print plain data as JSON, one document."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2, default=str) + "\n")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None
) -> None:
    """Print rows as a table; numbers to the right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for position, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[position]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    out.print(table)


def _is_number(value: Any) -> bool:
    """Whether a cell is a number, be it written for readers: ``~1,234`` or ``100,000+``."""
    if isinstance(value, str):
        return value == "?" or value.strip("~+").replace(",", "").isdecimal()
    return isinstance(value, (int, float))


def progress_bar() -> Progress:
    """A progress bar on standard error, and nothing where that is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    )


@contextmanager
def on_stop(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call the handler on SIGTERM and Ctrl-C while the block runs, in place of what did before."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def duration(seconds: float) -> str:
    """A span of time in its two largest units, as in ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def note(message: str) -> None:
    """Say something that is not a result."""
    err.print(message, highlight=False)
