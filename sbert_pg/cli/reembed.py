"""``reembed``: a change of encoder, step by step or in one go."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated, Any

import typer

from sbert_pg import reembedding as lib
from sbert_pg.cli import changing, common, reembed_whole
from sbert_pg.cli.changing import (
    SEPARATOR,
    AppOption,
    ColumnArgument,
    DimensionsOption,
    EncoderOption,
    SeparatorOption,
    SourceOption,
    StorageOption,
    TemplateOption,
    ToOption,
)
from sbert_pg.cli.upkeep import find
from sbert_pg.cli.worker import ImportOption, long_lived_database, prepare

WatchOption = Annotated[
    float, typer.Option(help="Seconds to watch the use of the old column.", min=0)
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A usual filter of the application, in SQL: recall is measured under it too. May be "
        "repeated.",
        show_default=False,
    ),
]
QueriesOption = Annotated[
    Path | None,
    typer.Option(
        help='Labelled queries, a JSON object a line: {"query": "...", "relevant": ["17"]}.',
        exists=True,
        dir_okay=False,
        show_default=False,
    ),
]
MinRecallOption = Annotated[float, typer.Option(help="Least recall@10 of the index.", min=0, max=1)]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="maintenance_work_mem for the build; a graph that fits builds several times faster.",
        show_default=False,
        metavar="SIZE",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Drop the old column although it is still in use.")
]
QuietOption = Annotated[
    float, typer.Option(help="Seconds that the old column must not have been used for.", min=0)
]
LockOption = Annotated[
    float, typer.Option("--lock-timeout", help="Seconds to wait for a lock at a time.", min=0.01)
]
AttemptsOption = Annotated[int, typer.Option(help="How often to try for a lock.", min=1)]

_QUIET = lib.QUIET.total_seconds()

commands = typer.Typer(
    name="reembed",
    help="A change of encoder: expand, backfill, verify, switch, contract.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (plan, start, status, index, verify, ready, finish, abort):
        commands.command()(command)
    reembed_whole.register(commands)
    app.add_typer(commands)


def plan(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    to: ToOption = None,
    encoder: EncoderOption = None,
    dimensions: DimensionsOption = None,
    source: SourceOption = None,
    separator: SeparatorOption = SEPARATOR,
    template: TemplateOption = None,
    storage: StorageOption = None,
    app: AppOption = None,
    texts: Annotated[
        int, typer.Option(help="Rows to encode for an estimate of the time; 0 for none.", min=0)
    ] = 200,
    modules: ImportOption = None,
    json: common.JsonOption = False,
) -> None:
    """Show what a change will do, lock and cost. Changes nothing.

    [b]sbert-pg reembed plan article.embedding --to embedding_mpnet -e all-mpnet-base-v2[/]
    [b]sbert-pg reembed plan article.embedding_mpnet --app shop.models:Base[/]
    """
    prepare(modules, log_json=False, log_level="warning")
    text = changing.source_of(source, separator, template)
    with common.database(database) as engine:
        wanted = changing.asked(
            engine, column, to=to, encoder=encoder, dimensions=dimensions, source=text,
            storage=storage, app=app, same_encoder=storage is not None or text is not None,
        )  # fmt: skip
        found = lib.plan(engine, wanted.request, texts=texts)
    _print(found.to_json() if json else str(found))


def start(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    to: ToOption = None,
    encoder: EncoderOption = None,
    dimensions: DimensionsOption = None,
    source: SourceOption = None,
    separator: SeparatorOption = SEPARATOR,
    template: TemplateOption = None,
    storage: StorageOption = None,
    app: AppOption = None,
    modules: ImportOption = None,
    lock_timeout: LockOption = 1.0,
    attempts: AttemptsOption = 40,
    json: common.JsonOption = False,
) -> None:
    """Expand: add the new column beside the old one. Both are kept fresh from now on.

    An application with an Alembic history does this in a migration instead, which autogenerate
    writes.

    [b]sbert-pg reembed start article.embedding --to embedding_mpnet -e all-mpnet-base-v2[/]
    [b]sbert-pg reembed start article.embedding_mpnet --app shop.models:Base[/]
    """
    prepare(modules, log_json=False, log_level="warning")
    text = changing.source_of(source, separator, template)
    with common.database(database) as engine:
        wanted = changing.asked(
            engine, column, to=to, encoder=encoder, dimensions=dimensions, source=text,
            storage=storage, app=app, same_encoder=storage is not None or text is not None,
        )  # fmt: skip
        made = lib.start(engine, wanted.request, lock_timeout=lock_timeout, attempts=attempts)
    if json:
        common.print_json({"column": str(made), "replaces": made.replaces})
        return
    common.note(
        f"{made} is there beside {made.replaces}, and both are kept fresh. Fill it: sbert-pg "
        f"backfill {made}"
    )


def status(
    column: Annotated[
        str | None,
        typer.Argument(help="The old column or the new one; all changes by default."),
    ] = None,
    database: common.DatabaseOption = None,
    watch: WatchOption = 0.0,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 unless each new column is ready.")
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """Show where changes stand, who still uses the old column, and what to do next.

    [b]sbert-pg reembed status[/]
    [b]sbert-pg reembed status article.embedding_mpnet --check[/]
    """
    with common.database(database) as engine:
        if column is not None:
            columns = [find(engine, column).identity]
        else:
            columns = [binding.identity for binding in changing.changes(engine)]
        found = [lib.status(engine, each, watch=watch) for each in columns]
    if json:
        common.print_json([each.to_json() for each in found])
    elif not found:
        common.note("No change is under way.")
    for each in [] if json else found:
        common.out.print(str(each), highlight=False, markup=False)
    if check and any(each.state != "ready" for each in found):
        raise typer.Exit(common.EXIT_FAILED)


def index(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    app: AppOption = None,
    memory: MemoryOption = None,
    workers: Annotated[
        int | None,
        typer.Option(help="max_parallel_maintenance_workers for the build.", min=0),
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Build the new column's index while readers and writers go on: one like the old column's.

    [b]sbert-pg reembed index article.embedding_mpnet --memory 2GB[/]
    """
    interrupts = changing.Interrupts()
    with long_lived_database(database) as engine, interrupts.caught(), changing.telling() as tell:
        identity = find(engine, column).identity
        declared = None if app is None else changing.asked(
            engine, column, to=None, encoder=None, app=app
        ).indexes  # fmt: skip
        names = reembed_whole.stoppable(
            lambda: lib.build_indexes(
                engine,
                identity,
                indexes=declared,
                maintenance_work_mem=memory,
                parallel_workers=workers,
                wait=float("inf"),
                on_progress=lambda phase, done, total: tell(
                    lib.Told("index", phase, done, total or None)
                ),
                stop=interrupts.stop,
            )
        )
    _print({"column": column, "indexes": names} if json else f"{column}: {', '.join(names)}")


def verify(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    where: WhereOption = None,
    queries: QueriesOption = None,
    sample: Annotated[int, typer.Option(help="Rows to search for.", min=1)] = 200,
    texts: Annotated[int, typer.Option(help="Rows whose text is encoded again.", min=0)] = 64,
    k: Annotated[int, typer.Option("-k", help="Neighbours compared.", min=1)] = 10,
    ef_search: Annotated[
        int | None,
        typer.Option(help="hnsw.ef_search, as the application has it.", show_default=False),
    ] = None,
    min_coverage: Annotated[
        float, typer.Option(help="Least share of rows with a vector.", min=0, max=1)
    ] = 1.0,
    min_recall: MinRecallOption = 0.95,
    min_filtered_recall: Annotated[
        float, typer.Option(help="Least recall@10 under each filter.", min=0, max=1)
    ] = 0.9,
    min_agreement: Annotated[
        float, typer.Option(help="Least cosine of a stored vector with its text.")
    ] = 0.97,
    min_overlap: Annotated[
        float | None,
        typer.Option(
            help="Least share of neighbours that old and new have in common.", show_default=False
        ),
    ] = None,
    min_ndcg: Annotated[
        float | None,
        typer.Option(help="Least nDCG@10 on the labelled queries.", show_default=False),
    ] = None,
    max_quality_loss: Annotated[
        float, typer.Option(help="How far nDCG@10 may be below the old column's.")
    ] = 0.02,
    max_pending: Annotated[
        int | None, typer.Option(help="Most pending rows.", show_default=False)
    ] = None,
    max_failed: Annotated[int, typer.Option(help="Most failed or skipped rows.", min=0)] = 0,
    no_index: Annotated[
        bool, typer.Option("--no-index", help="Pass although the new column has no index.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Another seed samples other rows.")] = 0,
    modules: ImportOption = None,
    json: common.JsonOption = False,
) -> None:
    """Measure the new column: coverage, recall of its index, overlap with the old one, quality.

    Exits with 1 if a threshold is missed.

    [b]sbert-pg reembed verify article.embedding_mpnet --where "lang = 'de'"[/]
    [b]sbert-pg reembed verify article.embedding_mpnet --queries labelled.jsonl --json[/]
    """  # fmt: skip
    prepare(modules, log_json=False, log_level="warning")
    thresholds = lib.Thresholds(
        coverage=min_coverage,
        max_pending=max_pending,
        max_failed=max_failed,
        recall=min_recall,
        filtered_recall=min_filtered_recall,
        agreement=min_agreement,
        overlap=min_overlap,
        quality_loss=max_quality_loss,
        ndcg=min_ndcg,
        need_index=not no_index,
    )
    with common.database(database) as engine:
        found = lib.verify(
            engine,
            find(engine, column).identity,
            filters=changing.filters_of(where),
            queries=changing.labelled(queries),
            thresholds=thresholds,
            k=k,
            sample_size=sample,
            texts=texts,
            ef_search=ef_search,
            seed=seed,
        )
    _print(found.to_json() if json else str(found))
    if not found.passed:
        raise typer.Exit(common.EXIT_FAILED)


def ready(
    app: Annotated[
        str, typer.Option("--app", help="The code's declarations: 'package.module:Base'.")
    ],
    database: common.DatabaseOption = None,
    max_failed: Annotated[
        int | None, typer.Option(help="Most failed rows; any by default.", show_default=False)
    ] = None,
    max_pending: Annotated[
        int | None, typer.Option(help="Most pending rows; any by default.", show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look at marks and indexes, not at the tables.")
    ] = False,
    modules: ImportOption = None,
) -> None:
    """Switch: exit with 0 if code may serve the columns that it declares, else with 1 and why not.

    For the entry point of a container, or before a deployment; in Python it is assert_ready().

    [b]sbert-pg reembed ready --app shop.models:Base && exec gunicorn shop:app[/]
    """
    prepare(modules, log_json=False, log_level="warning")
    metadata = common.load_metadata(app)
    with common.database(database) as engine:
        lib.assert_ready(
            engine, metadata, max_failed=max_failed, max_pending=max_pending, count=not quick
        )
    common.note("Ready.")


def finish(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    force: ForceOption = False,
    quiet: QuietOption = _QUIET,
    watch: WatchOption = 0.0,
    max_failed: Annotated[int, typer.Option(help="Most failed rows.", min=0)] = 0,
    lock_timeout: LockOption = 1.0,
    attempts: AttemptsOption = 40,
    json: common.JsonOption = False,
) -> None:
    """Contract: drop the old column and its index.

    Refused while the new column is not complete, while the old index is being scanned, or while an
    older version of the application writes; --force overrides the last two.

    [b]sbert-pg reembed finish article.embedding_mpnet[/]
    """
    with common.database(database) as engine:
        done = lib.finish(
            engine,
            find(engine, column).identity,
            force=force,
            quiet=dt.timedelta(seconds=quiet),
            watch=watch,
            max_failed=max_failed,
            lock_timeout=lock_timeout,
            attempts=attempts,
        )
    _done(column, done, json, "The old column is gone.", "It was finished before.")


def abort(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    lock_timeout: LockOption = 1.0,
    attempts: AttemptsOption = 40,
    json: common.JsonOption = False,
) -> None:
    """Give a change up: remove the new column without a trace. The old one was fresh throughout.

    [b]sbert-pg reembed abort article.embedding_mpnet[/]
    """
    with common.database(database) as engine:
        done = lib.abort(
            engine, changing.unbound(column), lock_timeout=lock_timeout, attempts=attempts
        )
    _done(column, done, json, "The new column is gone.", "There was nothing to give up.")


def _done(column: str, done: bool, json: bool, yes: str, no: str) -> None:
    if json:
        common.print_json({"column": column, "done": done})
    else:
        common.note(yes if done else no)


def _print(found: Any) -> None:
    """A report as it is, or plain data as JSON."""
    if isinstance(found, str):
        common.out.print(found, highlight=False, markup=False, soft_wrap=True)
    else:
        common.print_json(found)
