"""``worker``, ``backfill``, ``failed`` and ``audit``: columns kept fresh, by hand or not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import sqlalchemy as sa
import typer

from sbert_pg.cli import common
from sbert_pg.cli.target import change_or_column, column_of, declared_change, resolve
from sbert_pg.errors import DeclarationError
from sbert_pg.progress import bar
from sbert_pg.registry import get_encoder

if TYPE_CHECKING:
    from sbert_pg.freshness import Companion, Filler, WorkerSettings
    from sbert_pg.reembed import Filling

Index = Literal["keep", "aside"]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting of sbert_pg.WorkerSettings, such as batch_size=64, encoders=1, lease=30 "
        "(seconds), rows_per_second=500, max_replica_lag=5, poll_interval=1, max_attempts=3, "
        "backoff=5 or cache_rows=100000. May be repeated.",
        metavar="NAME=VALUE",
    ),
]

LogOption = Annotated[
    str,
    typer.Option(
        "--log",
        help="What to log, and as what: debug, info, warning or error, with :json one JSON object "
        "a line.",
        envvar="SBERT_PG_LOG",
        metavar="LEVEL[:json]",
    ),
]


def worker(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET]...",
            help="Columns to keep fresh, as table or table.column; all bound ones by default.",
        ),
    ] = None,
    database: common.DatabaseOption = None,
    once: Annotated[
        bool, typer.Option("--once", help="Embed what is pending now and leave, for cron.")
    ] = False,
    app: common.AppOption = None,
    http: common.HttpOption = None,
    settings: SetOption = None,
    json: common.JsonOption = False,
    log: LogOption = "info",
) -> None:
    """Embed what is pending, as it comes, until it is stopped.

    Run as many as you like, on as many machines: they share the work. SIGTERM or Ctrl-C finishes
    what is in hand; even SIGKILL loses nothing. With --once it exits with 1 if a column cannot be
    served or a row has ended as failed. With --app MODULE:BASE it also places new and changed rows
    in the clusters that the application declares; with --http it serves /health, /ready and
    /metrics.

    [b]sbert-pg worker -d postgresql://localhost/shop --http 127.0.0.1:9187 --log info:json[/]
    [b]*/5 * * * * sbert-pg worker --once -d postgresql://localhost/shop --log warning[/]
    """
    from sbert_pg.freshness import Worker
    from sbert_pg.serving.questions import Answers

    address = None if http is None else common.address_of(http)
    metadata = common.prepare(app, log)
    chosen = _settings(settings, columns=tuple(targets or ()))
    with common.database(database, lasting=True) as engine, ExitStack() as stack:
        companions = _companions(engine, app, metadata)
        if once:
            if address is not None:
                common.note("--http is for a worker that stays; with --once nothing is served.")
            _run_once(engine, chosen, companions, json)
            return
        running = Worker(engine, chosen, [*companions, Answers(engine)])
        if address is not None:
            from sbert_pg.serving.server import serving_http

            port = stack.enter_context(serving_http(running, *address))
            common.note(f"Health and metrics on http://{address[0]}:{port}")
        stack.enter_context(common.stoppable(running.stop, _log_signal))
        running.run()


def _run_once(
    engine: sa.Engine, settings: WorkerSettings, companions: Sequence[Companion], json: bool
) -> None:
    from sbert_pg.freshness import refresh

    done = refresh(engine, settings, companions=companions)
    if json:
        assigned = sum(getattr(companion, "assigned", 0) for companion in companions)
        common.print_json(asdict(done) | {"assigned": assigned})
    else:
        common.out.print(
            f"{done.embedded:,} rows embedded, {done.errors:,} errors, {done.left:,} still pending"
        )
        for name, reason in done.blocked.items():
            common.note(f"{name}: {reason}")
    common.fail_if(done.blocked or done.failed)


def _settings(values: Sequence[str] | None, **chosen: Any) -> WorkerSettings:
    """Settings from ``--set name=value``; durations are in seconds."""
    from sbert_pg.freshness import WorkerSettings

    default = WorkerSettings()
    known = {field.name: getattr(default, field.name) for field in fields(default)}
    del known["columns"]
    for text in values or ():
        name, equals, value = text.partition("=")
        if name in known and not equals:
            raise DeclarationError(f"--set {text!r}: a value is missing, as in --set {name}=60.")
        if name not in known:
            raise DeclarationError(
                f"--set {text!r}: there is no setting {name!r}; there are {', '.join(known)}."
            )
        try:
            chosen[name] = _value(known[name], value)
        except (ValueError, OverflowError) as error:
            raise DeclarationError(f"--set {text!r}: {error}.") from error
    return WorkerSettings(**chosen)


def _value(default: object, text: str) -> object:
    """A value of the kind of the default."""
    if isinstance(default, bool) and text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    kinds: dict[type, Callable[[str], object]] = {
        bool: lambda text: text.lower() == "true",
        timedelta: lambda text: timedelta(seconds=float(text)),
        int: int,
        str: str,
    }
    return kinds.get(type(default), float)(text)


def _companions(
    engine: sa.Engine, app: str | None, metadata: sa.MetaData | None
) -> Sequence[Companion]:
    if metadata is None:
        return ()
    from sbert_pg.clustering import ClusterKeeper, declared_clusterings

    declared = declared_clusterings(metadata)
    if not declared:
        raise DeclarationError(
            f"--app {app!r} declares no clusterings; declare one with clusters_of(), or give the "
            "module alone where it only registers encoders."
        )
    return (ClusterKeeper(engine, declared),)


def _log_signal(name: str) -> None:
    logging.getLogger("sbert_pg.worker").info(
        "Stopping: finishing what is in hand", extra={"fields": {"signal": name}}
    )


def backfill(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    app: common.AppOption = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Have processes of a Ray cluster encode: its address, auto for the one that runs, "
            "or local for one of this machine.",
            metavar="ADDRESS",
        ),
    ] = None,
    actors: Annotated[int, typer.Option(help="With --ray, how many.", min=1)] = 2,
    index: Annotated[
        Index,
        typer.Option(
            help="Whether the column's vector indexes stay (keep), or are dropped where 10,000 "
            "rows or more wait, and built at the end (aside). Searches compare every row meanwhile."
        ),
    ] = "keep",
    settings: SetOption = None,
    json: common.JsonOption = False,
) -> None:
    """Fill the vectors of rows that were there before, with progress.

    A backfill is a long queue, which running workers drain as well; this does it in the foreground.
    Run as many as you like, stop and start them at will; what is written stays. Exits with 1 if
    rows are left, or could not be embedded, and with 130 when it was stopped.

    Of a table in a change of encoder it fills the new column: vectors that can be computed from the
    old ones are, the others are encoded. Then it builds the new column's index, which is like the
    old one's, or the one that --app declares; a graph that fits maintenance_work_mem builds several
    times faster.

    [b]sbert-pg backfill article.embedding --set rows_per_second=500 --set max_replica_lag=5[/]
    [b]PGOPTIONS='-c maintenance_work_mem=2GB' sbert-pg backfill article[/]
    [b]sbert-pg backfill article --ray auto --actors 16 --index aside[/]
    """
    from sbert_pg import reembed

    metadata = common.prepare(app)
    chosen = _settings(settings)
    fill = _filler(ray, actors, partial(common.prepare, app), index)
    with (
        common.database(database, lasting=True) as engine,
        common.stoppable() as stop,
        bar("loading the encoder") as advance,
    ):
        binding = change_or_column(engine, target)
        if binding.replaces is None:
            show = reembed.as_step(advance)
            filling = reembed.Filling(
                fill(engine, binding, chosen, on_progress=show, stop=stop), 0, ()
            )
        else:
            change = None
            if app is not None and metadata is not None:
                change = declared_change(app, metadata, f"{binding.table}.{binding.column}")
            filling = reembed.backfill(
                engine,
                binding.identity,
                chosen,
                encode_by=fill,
                indexes=None if change is None else change[1],
                on_progress=advance,
                stop=stop,
            )
    done = filling.encoded
    data = {"column": str(binding), "computed": filling.computed, "indexes": filling.indexes}
    common.show(_report(filling), asdict(done) | data, json)
    if stop.is_set():
        raise typer.Exit(common.EXIT_INTERRUPTED)
    common.fail_if(not done.complete or done.failed)


def _filler(ray: str | None, actors: int, setup: Callable[[], object], index: Index) -> Filler:
    """What encodes: this process, or a fleet."""
    if ray is None:
        from sbert_pg.freshness import backfill

        return partial(backfill, index=index)
    from sbert_pg.adapters.ray import backfill as by_fleet

    return partial(by_fleet, actors=actors, address=ray, setup=setup, index=index)


def _report(filling: Filling) -> str:
    done = filling.encoded
    rate = done.rows / done.seconds if done.seconds else 0.0
    computed = f"{filling.computed:,} computed from the old column, " if filling.computed else ""
    index = f"; index {', '.join(filling.indexes)}" if filling.indexes else ""
    return (
        f"{done.rows:,} rows filled in {done.seconds:.1f} s ({rate:,.0f} a second), {computed}"
        f"{done.failed:,} could not be embedded; "
        + ("complete" if done.complete else "not complete: run it again to go on")
        + index
    )


def _state(failure: Any) -> str:
    return ("skipped" if failure.skipped else "failed") if failure.failed else "again"


def failed(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Have workers try them again (skipped ones by --key).")
    ] = False,
    skip: Annotated[
        bool, typer.Option("--skip", help="Leave them without a vector until their text changes.")
    ] = False,
    key: Annotated[
        list[str] | None,
        typer.Option(help="Key of a row; all that failed by default. May be repeated."),
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Show rows that could not be embedded and why; try them again, or leave them.

    [b]sbert-pg failed article.embedding[/]
    [b]sbert-pg failed article.embedding --retry --key 17 --key 42[/]
    """
    from sbert_pg import freshness

    if retry and skip:
        raise DeclarationError("Rows are either tried again or skipped; give --retry or --skip.")
    with common.database(database) as engine, engine.begin() as connection:
        binding = resolve(connection, target).binding
        if retry or skip:
            count = (freshness.retry if retry else freshness.skip)(connection, binding, key)
            text = f"{count:,} rows {'to be tried again' if retry else 'skipped'}"
            common.show(text, {"column": str(binding), "rows": count}, json)
            return
        failures = freshness.failures(connection, binding, skipped=True)
    if json:
        common.print_json([asdict(failure) for failure in failures])
        return
    rows = [[f.key, f.attempts, _state(f), f.error] for f in failures]
    common.print_table(["key", "attempts", "state", "error"], rows)


def audit(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    sample: Annotated[
        int, typer.Option(help="Rows to look at, by chance; 0 for all.", min=0)
    ] = 1_000,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="Make pending what is wrong, for workers to mend.")
    ] = False,
    app: common.AppOption = None,
    json: common.JsonOption = False,
) -> None:
    """Encode texts again and compare with the stored vectors; exits with 1 if any is wrong.

    [b]sbert-pg audit article.embedding --sample 0 --requeue[/]
    """
    from sbert_pg.freshness import audit as run

    common.prepare(app)
    with common.database(database, lasting=True) as engine, bar("loading the encoder") as advance:
        binding = column_of(engine, target).binding
        result = run(
            engine,
            binding,
            get_encoder(binding.declared),
            sample=sample or None,
            requeue=requeue,
            progress=lambda so_far: advance(
                "comparing", so_far.rows + so_far.waiting, sample or None
            ),
        )
    text = (
        f"{result.rows:,} rows compared, {result.waiting:,} pending or failed, "
        f"{result.wrong:,} wrong ({result.stale:,} stale, {result.missing:,} missing, "
        f"{result.superfluous:,} superfluous, {result.unencodable:,} unencodable), "
        f"{result.requeued:,} made pending"
    )
    common.show(text, result.to_json() | {"findings": [asdict(f) for f in result.findings]}, json)
    if result.findings and not json:
        rows = [[finding.key, finding.kind, finding.cosine] for finding in result.findings[:20]]
        common.print_table(["key", "finding", "cosine"], rows)
    common.fail_if(result.wrong)
