"""``worker`` and ``refresh``: keep columns fresh, for as long as it runs or once."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import sqlalchemy as sa
import typer

from sbert_pg.cli import common
from sbert_pg.errors import DeclarationError

if TYPE_CHECKING:
    from sbert_pg.clustering import Clustering
    from sbert_pg.worker import Worker

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        "-c",
        help="Column to keep fresh, as table.column; all bound ones by default. May be repeated.",
        show_default=False,
    ),
]
ImportOption = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        help="Module to import first, such as one that calls use_encoder(). May be repeated.",
        show_default=False,
    ),
]
BatchOption = Annotated[int, typer.Option(help="Rows claimed and written at a time.", min=1)]
ClustersOption = Annotated[
    str | None,
    typer.Option(
        "--clusters",
        help="Place new and changed rows in the clusters declared in 'package.module:Base', too.",
        show_default=False,
    ),
]
EncodersOption = Annotated[
    int, typer.Option(help="Threads that call the encoder; with two it never waits.", min=1)
]
CacheOption = Annotated[
    int,
    typer.Option(
        help="Keep up to so many vectors in sbert.vector_cache, so that a text is encoded once "
        "across rows and tables; 0 for none.",
        min=0,
    ),
]
LogJsonOption = Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")]
LogLevelOption = Annotated[
    str, typer.Option(help="debug, info, warning or error.", envvar="SBERT_PG_LOG_LEVEL")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(worker)
    app.command()(refresh)


def worker(
    database: common.DatabaseOption = None,
    column: ColumnsOption = None,
    modules: ImportOption = None,
    clusters: ClustersOption = None,
    http: Annotated[
        str | None,
        typer.Option(
            help="Serve /health, /ready and /metrics on HOST:PORT, such as 127.0.0.1:9187.",
            envvar="SBERT_PG_HTTP",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchOption = 256,
    encoders: EncodersOption = 2,
    lease: Annotated[float, typer.Option(help="Seconds that claimed rows are kept.", min=1)] = 60,
    poll: Annotated[
        float, typer.Option(help="Seconds between looks when nothing is heard.", min=0.01)
    ] = 5,
    max_attempts: Annotated[
        int, typer.Option(help="Attempts after which a row is failed.", min=1)
    ] = 5,
    backoff: Annotated[
        float, typer.Option(help="Seconds before the second attempt; doubles each time.", min=0)
    ] = 10,
    no_listen: Annotated[bool, typer.Option("--no-listen", help="Poll only.")] = False,
    cache: CacheOption = 0,
    log_json: LogJsonOption = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Embed what is pending, as it comes, until told to stop.

    Run as many as you like, on as many machines: they share the work. SIGTERM or Ctrl-C finishes
    what is in hand; even SIGKILL loses nothing.

    [b]sbert-pg worker -d postgresql://localhost/shop --http 127.0.0.1:9187 --log-json[/]
    [b]sbert-pg worker --clusters shop.models:Base[/]
    """
    from sbert_pg.worker import Worker, WorkerSettings
    from sbert_pg.worker.http import serving_http

    address = None if http is None else _address(http)
    prepare(modules, log_json=log_json, log_level=log_level)
    clusterings = clusterings_of(clusters)
    settings = WorkerSettings(
        columns=tuple(column or ()),
        batch_size=batch_size,
        encoders=encoders,
        lease=timedelta(seconds=lease),
        poll_interval=poll,
        max_attempts=max_attempts,
        backoff=timedelta(seconds=backoff),
        listen=not no_listen,
        cache_rows=cache,
    )
    with long_lived_database(database) as engine, ExitStack() as stack:
        made = Worker(engine, settings, clusterings)
        if address is not None:
            port = stack.enter_context(serving_http(made, *address))
            common.note(f"Health and metrics on http://{address[0]}:{port}")
        stack.enter_context(_stopping(made))
        made.run()


def refresh(
    database: common.DatabaseOption = None,
    column: ColumnsOption = None,
    modules: ImportOption = None,
    clusters: ClustersOption = None,
    batch_size: BatchOption = 256,
    encoders: EncodersOption = 2,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds after which no more rows are claimed.", show_default=False),
    ] = None,
    cache: CacheOption = 0,
    json: common.JsonOption = False,
    log_json: LogJsonOption = False,
    log_level: LogLevelOption = "warning",
) -> None:
    """Embed what is pending now and leave, for cron.

    Exits with 1 if a column cannot be served or a row has ended as failed.

    [b]*/5 * * * * sbert-pg refresh -d postgresql://localhost/shop[/]
    """
    from sbert_pg.worker import WorkerSettings
    from sbert_pg.worker import refresh as run

    prepare(modules, log_json=log_json, log_level=log_level)
    clusterings = clusterings_of(clusters)
    settings = WorkerSettings(
        columns=tuple(column or ()), batch_size=batch_size, encoders=encoders, cache_rows=cache
    )
    with long_lived_database(database) as engine:
        done = run(engine, settings, timeout=timeout, clusterings=clusterings)
    if json:
        common.print_json(asdict(done))
    else:
        common.out.print(
            f"{done.embedded:,} rows embedded, {done.errors:,} errors, {done.left:,} still pending"
        )
        for name, reason in done.blocked.items():
            common.note(f"{name}: {reason}")
    if done.blocked or done.failed:
        raise typer.Exit(common.EXIT_FAILED)


def clusterings_of(target: str | None) -> Sequence[Clustering]:
    """The clusterings that an application declares.

    Raises:
        DeclarationError: the target cannot be imported, or declares none.
    """
    if target is None:
        return ()
    from sbert_pg.clustering.declaration import declared_clusterings

    found = declared_clusterings(common.load_metadata(target))
    if not found:
        raise DeclarationError(
            f"--clusters {target!r} declares no clusterings; declare one with clusters_of()."
        )
    return found


def prepare(modules: Sequence[str] | None, *, log_json: bool, log_level: str) -> None:
    """Logging, and modules that the user wants imported.

    Raises:
        DeclarationError: there is no such level or module.
    """
    from sbert_pg.worker import logs

    level = logging.getLevelName(log_level.upper())
    if not isinstance(level, int):
        raise DeclarationError(f"There is no log level {log_level!r}; use debug, info or warning.")
    logs.configure(as_json=log_json, level=level)
    if "" not in sys.path:
        sys.path.insert(0, "")
    for module in modules or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise DeclarationError(f"--import {module}: {error}") from error


@contextmanager
def long_lived_database(url: str | None) -> Iterator[sa.Engine]:
    """As ``common.database``, with what a process needs that lives for months.

    Keepalives find a peer that is gone without a word. Statements are not prepared on the server,
    which poolers in transaction mode do not bear, and which would gain nothing here.
    """
    with common.database(url) as engine:
        if url is None:
            yield engine
            return
        made = sa.create_engine(
            engine.url,
            pool_pre_ping=True,
            connect_args={
                "prepare_threshold": None,
                "connect_timeout": 10,
                "keepalives_idle": 30,
                "keepalives_interval": 10,
                "keepalives_count": 3,
                "application_name": "sbert-pg",
            },
        )
        try:
            yield made
        finally:
            made.dispose()


@contextmanager
def _stopping(worker: Worker) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C finishes what is in hand; the second does not wait for it."""
    asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        logging.getLogger("sbert_pg.worker").info(
            "Stopping: finishing what is in hand",
            extra={"fields": {"signal": signal.Signals(number).name}},
        )
        worker.stop()

    with common.on_stop(stop):
        yield


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise typer.BadParameter(f"{text!r} is not HOST:PORT", param_hint="--http")
    return host.strip("[]") or "127.0.0.1", int(port)


__all__ = ["clusterings_of", "long_lived_database", "prepare", "refresh", "register", "worker"]
