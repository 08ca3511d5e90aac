"""``reembed run``, and what needs no encoding: ``reembed retype`` and ``reembed rebind``."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from sbert_pg import reembedding as lib
from sbert_pg.catalog import Binding
from sbert_pg.cli import changing, common
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
from sbert_pg.cli.worker import (
    BatchOption,
    EncodersOption,
    ImportOption,
    long_lived_database,
    prepare,
)
from sbert_pg.errors import StepStoppedError
from sbert_pg.registry import get_encoder

_QUIET = lib.QUIET.total_seconds()
#: Seconds for which ``run`` embeds what others change meanwhile, before it goes on regardless.
_DRAIN = 120.0


def register(group: typer.Typer) -> None:
    """Add the commands to the group ``reembed``."""
    for command in (run, retype, rebind):
        group.command()(command)


def run(
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
    encode: Annotated[
        bool, typer.Option("--encode", help="Encode all, even where it is not needed.")
    ] = False,
    batch_size: BatchOption = 256,
    encoders: EncodersOption = 2,
    rate: Annotated[
        float | None, typer.Option(help="Most rows a second.", show_default=False)
    ] = None,
    lease: Annotated[
        float,
        typer.Option(help="Seconds until what a killed process had in hand is taken over.", min=1),
    ] = 60,
    memory: Annotated[
        str | None,
        typer.Option(
            help="maintenance_work_mem for the index, as in 2GB.",
            show_default=False,
            metavar="SIZE",
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="A usual filter, in SQL, to verify under. May be repeated.", show_default=False
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            help="Labelled queries to verify with, as for reembed verify.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    min_recall: Annotated[
        float, typer.Option(help="Least recall@10 of the index.", min=0, max=1)
    ] = 0.95,
    finish: Annotated[
        bool, typer.Option("--finish", help="Drop the old column if the new one passes.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Drop it although it is still in use.")
    ] = False,
    quiet: Annotated[
        float, typer.Option(help="Seconds that the old column must not have been used for.", min=0)
    ] = _QUIET,
    modules: ImportOption = None,
    json: common.JsonOption = False,
) -> None:
    """The whole change in one command: expand, backfill, index, verify, and contract if asked.

    Stopped or killed at any moment, the same command again goes on from there. Where the new
    vectors can be computed from the old ones, nothing is encoded.

    [b]sbert-pg reembed run article.embedding --to embedding_mpnet -e all-mpnet-base-v2[/]
    [b]sbert-pg reembed run article.embedding_mpnet --finish[/]
    """
    from sbert_pg.pending.backfill import BackfillSettings
    from sbert_pg.worker.settings import worker_name

    prepare(modules, log_json=False, log_level="warning")
    interrupts = changing.Interrupts()
    with long_lived_database(database) as engine, interrupts.caught(), changing.telling() as tell:
        wanted = changing.asked(
            engine, column, to=to, encoder=encoder, dimensions=dimensions,
            source=changing.source_of(source, separator, template), storage=storage, app=app,
            same_encoder=any(x is not None for x in (source, template, storage)),
        )  # fmt: skip
        settings = lib.Settings(
            backfill=BackfillSettings(
                batch_size=batch_size, encoders=encoders, rows_per_second=rate,
                lease=dt.timedelta(seconds=lease), name=worker_name(),
            ),
            encode=encode, indexes=wanted.indexes, maintenance_work_mem=memory,
            thresholds=lib.Thresholds(recall=min_recall), filters=changing.filters_of(where),
            queries=changing.labelled(queries), finish=finish, force=force,
            quiet=dt.timedelta(seconds=quiet),
        )  # fmt: skip
        drain = _drain(engine, interrupts, batch_size, encoders)
        done = stoppable(
            lambda: lib.run(
                engine, wanted.request, settings, drain=drain, tell=tell, stop=interrupts.stop
            )
        )
    _report(done, json)
    if not done.verification.passed:
        raise typer.Exit(common.EXIT_FAILED)


def _report(done: lib.Changed, json: bool) -> None:
    if json:
        common.print_json(
            {
                "column": str(done.binding),
                "way": done.way,
                "rows": done.rows,
                "indexes": list(done.indexes),
                "verification": done.verification.to_json(),
                "finished": done.finished,
            }
        )
        return
    common.out.print(str(done.verification), highlight=False, markup=False, soft_wrap=True)
    common.note(f"{done.rows:,} rows {done.way}; index {', '.join(done.indexes) or 'none'}.")
    if done.finished:
        common.note("The old column is gone.")
    elif done.verification.passed:
        common.note(
            f"Deploy the code that declares {done.binding.column}; when no older version runs any "
            f"more: sbert-pg reembed finish {done.binding}"
        )


def _drain(
    engine: sa.Engine, interrupts: changing.Interrupts, batch_size: int, encoders: int
) -> Callable[[Binding], object]:
    from sbert_pg.worker import Worker, WorkerSettings

    def drain(binding: Binding) -> object:
        worker = Worker(
            engine,
            WorkerSettings(columns=(str(binding),), batch_size=batch_size, encoders=encoders),
        )
        with interrupts.also(worker.stop):
            return worker.run(until_empty=True, timeout=_DRAIN)

    return drain


def retype(
    column: ColumnArgument,
    database: common.DatabaseOption = None,
    to: ToOption = None,
    storage: StorageOption = None,
    dimensions: DimensionsOption = None,
    encoder: EncoderOption = None,
    app: AppOption = None,
    modules: ImportOption = None,
    json: common.JsonOption = False,
) -> None:
    """Expand, and compute the new column from the old one: halfvec, or fewer dimensions.

    No text is encoded. It is refused unless the probes show that the new encoder's vectors are the
    old ones, or their beginning.

    [b]sbert-pg reembed retype article.embedding --to embedding_half --storage halfvec[/]
    """
    prepare(modules, log_json=False, log_level="warning")
    interrupts = changing.Interrupts()
    with long_lived_database(database) as engine, interrupts.caught(), changing.telling() as tell:
        wanted = changing.asked(
            engine, column, to=to, encoder=encoder, dimensions=dimensions, storage=storage,
            app=app, same_encoder=True,
        )  # fmt: skip
        made = get_encoder(wanted.request.encoder)

        def show(rows: int) -> None:
            tell(lib.Told("backfill", f"computing {wanted.request.new}", rows))
            if interrupts.stop.is_set():
                raise StepStoppedError("Stopped; the same command again goes on from there.")

        done = stoppable(lambda: lib.retype(engine, wanted.request, made, progress=show))
    if json:
        common.print_json({"column": str(done.binding), "copied": done.copied, "left": done.left})
        return
    common.note(
        f"{done.copied:,} vectors computed, {done.left:,} rows left to workers. Build the index: "
        f"sbert-pg reembed index {done.binding}"
    )


def rebind(
    column: Annotated[str, typer.Argument(help="The column, as table.column.")],
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder", "-e", help="The further encoder; ':fp32' after it asks for a precision."
        ),
    ],
    database: common.DatabaseOption = None,
    sample: Annotated[int, typer.Option(help="Rows to encode again.", min=0)] = 100,
    modules: ImportOption = None,
    json: common.JsonOption = False,
) -> None:
    """Let a column accept a further encoder of the same space, such as fp32 beside int8.

    Its vectors stay. The measured agreement is written down; another space is refused.

    [b]sbert-pg reembed rebind article.embedding -e all-MiniLM-L6-v2:fp32[/]
    """
    prepare(modules, log_json=False, log_level="warning")
    with common.database(database) as engine:
        binding = find(engine, column)
        made = get_encoder(changing.spec_of(encoder))
        done = lib.rebind(engine, binding.identity, made, sample=sample)
    if json:
        common.print_json(asdict(done))
    else:
        common.out.print(str(done), highlight=False, markup=False, soft_wrap=True)


def stoppable(do: Callable[[], Any]) -> Any:
    """Run a step; where it was stopped, leave as an interrupted command does.

    Raises:
        typer.Exit: with the code of an interruption.
    """
    try:
        return do()
    except StepStoppedError as error:
        common.note(str(error))
        raise typer.Exit(common.EXIT_INTERRUPTED) from None
