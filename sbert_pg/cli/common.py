"""What commands share: options, application, database, output, interruption, exit codes."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sbert_pg import catalog
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

#: Variables of libpq that say which database is meant.
_OF_LIBPQ = ("PGHOST", "PGHOSTADDR", "PGDATABASE", "PGSERVICE")
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        "-d",
        envvar=["SBERT_PG_DATABASE_URL", "DATABASE_URL"],
        help="URL of the database. Without one it is that of PGHOST, PGDATABASE and the like, as "
        "for psql; else the embedded server is started for the command.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Exit with 1 unless all is well; the command says what.")
]
TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="Table, or table.column where it has several embedding columns; "
        "a schema may stand in front.",
    ),
]
AppOption = Annotated[
    str | None,
    typer.Option(
        "--app",
        help="Your application: 'package.module', which is imported first and may register "
        "encoders, or 'package.module:Base' where its mapped classes are asked for too.",
        metavar="MODULE[:BASE]",
    ),
]
WhereOption = Annotated[
    str | None, typer.Option("--where", help="Rows that count, in SQL, as in \"lang = 'en'\".")
]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, help="Lines to show, at most.")]
_ENCODER: Any = typer.Option(
    "--encoder",
    "-e",
    help="An encoder, by name or directory; ':fp32' after it asks for a precision.",
)
EncoderOption = Annotated[str, _ENCODER]
SomeEncoderOption = Annotated[str | None, _ENCODER]
EncodersOption = Annotated[list[str] | None, _ENCODER]
NeededEncodersOption = Annotated[list[str], _ENCODER]
SourceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        "-s",
        help="A column that the text is made of, or the text as a template, as in 'Title: "
        "{title}'. Columns may be repeated.",
    ),
]
CreateOption = Annotated[
    bool, typer.Option("--create", help="Create the tables that the command needs.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")
]
FiltersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        help="A filter that the application uses, in SQL; recall is measured under it. May be "
        "repeated.",
    ),
]
_PAIRS: Any = typer.Option(
    "--pairs",
    help="Labelled questions: a file (.csv and .tsv with the header question,id and perhaps gain; "
    ".jsonl; TREC qrels beside their .topics), or a query in SQL that gives those columns.",
)
PairsOption = Annotated[str, _PAIRS]
SomePairsOption = Annotated[str | None, _PAIRS]
ExploreOption = Annotated[bool, typer.Option("--explore", help="Show pages in a browser instead.")]
HttpOption = Annotated[
    str | None, typer.Option("--http", help="HOST:PORT to listen on.", envvar="SBERT_PG_HTTP")
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        help="What clients send as 'Authorization: Bearer ...', and browsers as the password; "
        "needed where HOST is not this machine alone. Better given by the variable, which no list "
        "of processes shows.",
        envvar="SBERT_PG_TOKEN",
    ),
]
#: What a process needs that lives for months. Keepalives find a peer that is gone without a word.
#: Statements are not prepared on the server, which poolers in transaction mode do not bear, and
#: which would gain nothing here.
LASTING: dict[str, Any] = {
    "prepare_threshold": None,
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "application_name": "sbert-pg",
}

#: What a URL looks like.
_LIKE = (
    "Give one like postgresql://user@host:5432/name, or with several hosts "
    "postgresql://user@/name?host=one:5432&host=two:5432."
)
#: Results go here.
out = Console()
#: Notes and errors go here, so that a pipe gets results alone.
err = Console(stderr=True)


def normalized_url(url: str) -> sa.URL:
    """A URL for psycopg 3, whatever dialect name the variable holds."""
    try:
        url.encode()
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        # Without its cause, which may show a part of the URL, and so of a password.
        raise DeclarationError(f"The database URL cannot be read. {_LIKE}") from None
    if "@" in f"{parsed.host}{parsed.database}":
        # The end of a password, which an error of the connection would show as a host's name.
        raise DeclarationError(
            f"The database URL has an @ too many; one in a user or password is written %40. {_LIKE}"
        )
    backend = parsed.drivername.partition("+")[0]
    if backend not in ("postgresql", "postgres"):
        raise DeclarationError(
            f"The database URL is for {backend!r}; embeddings are stored in PostgreSQL with "
            "pgvector. Give one like postgresql://user@host:5432/name."
        )
    return parsed.set(drivername="postgresql+psycopg")


@contextmanager
def database(
    url: str | None, *, lasting: bool = False, variables: bool = True
) -> Iterator[sa.Engine]:
    """An engine on the given database, or on the embedded server while the block runs.

    The embedded database is the user's own and gets the schema ``sbert`` at once; a given one is
    only changed by commands that say so. ``variables``: whether PGHOST and the like are asked
    first; ``lasting``: whether the command may run for months (``LASTING``).
    """
    if url is None and variables and any(os.environ.get(name) for name in _OF_LIBPQ):
        url = "postgresql://"  # libpq takes the rest from its variables too
    with ExitStack() as stack:
        if url is None:
            from sbert_pg.embedded import embedded_server

            server = stack.enter_context(embedded_server())
            engine = sa.create_engine(server.ensure_database(EMBEDDED_DATABASE))
        else:
            # Said, since from a database in SQL_ASCII psycopg gives texts as bytes otherwise.
            arguments = {"client_encoding": "utf8", **(LASTING if lasting else {})}
            engine = sa.create_engine(
                normalized_url(url), pool_pre_ping=lasting, connect_args=arguments
            )
        stack.callback(engine.dispose)
        if url is None:
            with engine.begin() as connection:
                catalog.upgrade(connection)
        yield engine


def prepare(
    app: str | None, log: str | None = None, *, usual: str = "warning"
) -> sa.MetaData | None:
    """Set logging up and import the application.

    Args:
        app: ``module``, or ``module:attribute`` where the attribute is metadata or has it.
        log: a level, with ``:json`` for one object a line; ``$SBERT_PG_LOG`` by default.
        usual: the level where neither says one.

    Returns:
        The metadata, ``None`` where no attribute is named.

    Raises:
        DeclarationError: there is no such level, module or attribute, or it holds no metadata.
    """
    from sbert_pg.freshness.settings import configure_logs

    log = log or os.environ.get("SBERT_PG_LOG") or usual
    name, _, form = log.partition(":")
    level = logging.getLevelName(name.upper())
    if not isinstance(level, int) or form not in ("", "json"):
        raise DeclarationError(
            f"--log or $SBERT_PG_LOG {log!r} is none of debug, info, warning, error, or info:json."
        )
    configure_logs(as_json=form == "json", level=level)
    return None if app is None else _application(app)


def _application(app: str) -> sa.MetaData | None:
    module_name, _, path = app.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        declared: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise DeclarationError(f"--app {app!r}: cannot import {module_name}: {error}") from error
    if not path:
        return None
    for name in path.split("."):
        if not hasattr(declared, name):
            raise DeclarationError(f"--app {app!r}: {module_name} has no {path!r}.")
        declared = getattr(declared, name)
    metadata = getattr(declared, "metadata", declared)
    if not isinstance(metadata, sa.MetaData):
        raise DeclarationError(f"--app {app!r} is neither metadata nor a declarative base.")
    return metadata


def load_metadata(app: str) -> sa.MetaData:
    """The metadata of an application, where a command needs it; see ``prepare``."""
    metadata = prepare(app)
    if metadata is None:
        raise DeclarationError(f"--app {app!r} has to be of the form package.module:Base.")
    return metadata


def criterion(where: str | None) -> Any:
    """A criterion given as SQL, in which a colon is SQL's and no parameter's."""
    return None if where is None else sa.text("(" + where.replace(":", "\\:") + ")")


def criteria(where: str | None) -> list[Any]:
    """The same as a list, empty where nothing is given."""
    return [] if where is None else [criterion(where)]


def address_of(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise typer.BadParameter(
            f"{text!r} is not HOST:PORT, of a port up to 65535", param_hint="--http"
        )
    return host.strip("[]") or "127.0.0.1", int(port)


def fail_if(wrong: object) -> None:
    """Leave with the exit code of a check that did not hold."""
    if wrong:
        raise typer.Exit(EXIT_FAILED)


def show(report: Any, data: Any, json: bool) -> None:
    """Print a report for people, or its plain data."""
    if json:
        print_json(data)
    elif str(report):
        say(str(report))


def print_json(data: Any) -> None:
    """Print plain data as JSON, one document."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2, default=str) + "\n")


def show_records(records: Sequence[dict[str, Any]], json: bool) -> None:
    """Print plain data, or a table of it; nothing where there is none."""
    if json:
        print_json(records)
    elif records:
        print_table(list(records[0]), [list(record.values()) for record in records])


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None
) -> None:
    """Print rows as a table; numbers to the right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for position, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[position]) for row in rows)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else escape(str(value)) for value in row))
    out.print(table)


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows of any table: as a table where each column has room, else one block a row."""
    cells = [[_on_one_line(value) for value in row] for row in rows]
    # Three characters a column for its borders; below twelve a column of text is not readable.
    room = out.width // max(len(columns), 1) - 3
    widest = max((len(str(cell)) for row in cells for cell in row), default=0)
    if room >= min(widest, 12):
        print_table(columns, [[shortened(cell, 100) for cell in row] for row in cells])
        return
    for row in cells:
        _print_block(columns, row)


def _print_block(columns: Sequence[str], row: Sequence[Any]) -> None:
    """Print what a row holds, a line for each of its columns."""
    label = max(map(len, columns))
    for column, cell in zip(columns, row, strict=True):
        if cell not in (None, ""):
            text = escape(str(shortened(cell, max(out.width - label - 2, 20))))
            out.print(f"[bold]{escape(column.rjust(label))}[/]  {text}", highlight=False)
    out.print()


def _on_one_line(value: Any) -> Any:
    plain = value is None or isinstance(value, (int, float))
    return value if plain else " ".join(str(value).split())


def shortened(value: Any, width: int) -> Any:
    """A text, cut where it is longer; anything else as it is."""
    long = isinstance(value, str) and len(value) > width
    return f"{value[: width - 1]}…" if long else value


def _is_number(value: Any) -> bool:
    """Whether a cell is a number, be it written for readers: ``~1,234`` or ``100,000+``."""
    if isinstance(value, str):
        return value == "?" or value.strip("~+").replace(",", "").isdecimal()
    return isinstance(value, (int, float))


@contextmanager
def stoppable(
    stop: Callable[[], None] | None = None, say: Callable[[str], None] | None = None
) -> Iterator[threading.Event]:
    """An event that the first SIGTERM or Ctrl-C sets; the second does not wait.

    The first one also calls ``stop``, and ``say`` with the signal's name, in place of a note.
    """
    event = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        if say is None:
            note("Stopping: finishing what is in hand (again to leave at once).")
        else:
            say(signal.Signals(number).name)
        if stop is not None:
            stop()

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def say(text: str) -> None:
    """Print a result that is a text, as it is."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def note(message: str) -> None:
    """Say something that is not a result."""
    err.print(message, highlight=False)
