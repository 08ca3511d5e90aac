"""``reembed``: a change of encoder, step by step; and ``adopt``, which binds what was there."""

from __future__ import annotations

import json as json_module
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import sqlalchemy as sa
import typer

from sbert_pg import reembed as lib
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.cli import common
from sbert_pg.cli.encoder import spec_named
from sbert_pg.cli.target import (
    change_or_column,
    changes,
    column_of,
    declared_change,
    queries_of,
    source_of,
    unbound,
)
from sbert_pg.errors import DeclarationError, NotProvenError, ReembeddingError
from sbert_pg.progress import bar
from sbert_pg.reembed.backfill import need_of
from sbert_pg.registry import get_encoder


def begin(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    to: Annotated[str | None, typer.Option("--to", help="Name of the new column.")] = None,
    encoder: common.SomeEncoderOption = None,
    source: common.SourceOption = None,
    storage: Annotated[
        Literal["vector", "halfvec"] | None,
        typer.Option(help="Type of the new column; the old one's by default."),
    ] = None,
    app: common.AppOption = None,
    dry_run: common.DryRunOption = False,
    json: common.JsonOption = False,
) -> None:
    """Add the new column beside the old one. Both are kept fresh from now on.

    An application with an Alembic history does this in a migration, which autogenerate writes. What
    is not given is as in the old column; --dry-run says what will be locked and what it costs.
    Without --to the column that is there accepts the encoder, if it is of the same space: fp32
    beside int8.

    [b]sbert-pg reembed begin article --to embedding_mpnet -e all-mpnet-base-v2 --dry-run[/]
    [b]sbert-pg reembed begin article --to embedding_half --storage halfvec[/]
    [b]sbert-pg reembed begin article.embedding_mpnet --app shop.models:Base[/]
    [b]sbert-pg reembed begin article -e all-MiniLM-L6-v2:fp32[/]
    """
    metadata = common.prepare(app)
    text = source_of(source)
    with common.database(database) as engine:
        if app is not None and metadata is not None:
            request = declared_change(app, metadata, target)[0]
        else:
            old = change_or_column(engine, target)
            if to is not None:  # What is replaced is what the table had, also when it is run again.
                old = column_of(engine, target).binding
            spec = old.declared if encoder is None else spec_named(encoder)
            if to is None:
                if encoder is None or (text, storage) != (None, None):
                    raise DeclarationError(
                        f"Say what is to replace {old}: --to NEW_COLUMN with --encoder, --source "
                        "or --storage, or --app MODULE:BASE that declares it."
                    )
                with bar("comparing encoders"):
                    accepted = lib.rebind(engine, old.identity, get_encoder(spec))
                common.show(accepted, accepted.to_json(), json)
                return
            request = lib.Request(
                old=old.identity, new=to, encoder=spec, source=text, storage=storage
            )
        if dry_run:
            with bar("comparing encoders"):
                plan = lib.plan(engine, request)
            common.show(plan, plan.to_json(), json)
            return
        with bar("comparing encoders"):
            _require_needed(engine, request)
        binding = lib.begin(engine, request)
    common.show(
        f"{binding} is there beside {binding.replaces}, and both are kept fresh. Fill it: sbert-pg "
        f"backfill {quote(str(binding))}",
        {"column": str(binding), "replaces": binding.replaces},
        json,
    )


def _require_needed(engine: sa.Engine, request: lib.Request) -> None:
    """Refuse a change that would encode everything to the same vectors."""
    way = need_of(engine, request)
    if way.need == "rebind":
        raise ReembeddingError(
            f"{request.old} needs no new vectors for encoder {request.encoder.name!r}: "
            f"{way.reason}. Leave --to out, and the column accepts it."
        )


def status(
    target: Annotated[
        str | None,
        typer.Argument(metavar="TARGET", help="The change's table or column; all by default."),
    ] = None,
    database: common.DatabaseOption = None,
    app: common.AppOption = None,
    check: common.CheckOption = False,
    json: common.JsonOption = False,
) -> None:
    """Show where changes stand, who still uses the old column, and what to do next.

    With --check it exits with 1 unless each change is ready. With --app MODULE:BASE it checks all
    that the code declares, which is what goes before the switch, that is, your deployment.

    [b]sbert-pg reembed status[/]
    [b]sbert-pg reembed status --app shop.models:Base --check && exec gunicorn shop:app[/]
    """
    metadata = None if app is None else common.load_metadata(app)
    with common.database(database) as engine:
        if metadata is not None and check:
            lib.require_ready(engine, metadata)
            common.note("Ready.")
            return
        reports = [lib.status(engine, column.identity) for column in changes(engine, target)]
    if not reports:
        common.note("No change is under way.")
    common.show("\n".join(map(str, reports)), [each.to_json() for each in reports], json)
    common.fail_if(check and {each.state for each in reports} - {"ready"})


def verify(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    app: common.AppOption = None,
    filters: common.FiltersOption = None,
    pairs: common.SomePairsOption = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='What has to be reached, a JSON object: {"recall": 0.97, "max_pending": 20}.',
        ),
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Measure the new column: coverage, recall of its index, overlap with the old one, quality.

    Exits with 1 if a threshold is missed.

    [b]sbert-pg reembed verify article --filter "lang = 'de'"[/]
    [b]sbert-pg reembed verify article --pairs labelled.jsonl --thresholds ours.json --json[/]
    """
    common.prepare(app)
    with common.database(database) as engine:
        column = change_or_column(engine, target).identity
        with bar("verifying"):
            report = lib.verify(
                engine,
                column,
                filters={each: common.criterion(each) for each in filters or ()},
                queries=queries_of(engine, pairs),
                thresholds=_thresholds_of(thresholds),
            )
    common.show(report, report.to_json(), json)
    common.fail_if(not report.passed)


def finish(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Drop the old column although it is still in use.")
    ] = False,
) -> None:
    """Drop the old column and its index.

    Refused while the new column is not complete, and while the old one is searched or written;
    --force overrides the second. 'sbert-pg reembed status' says what kinds of use cannot be seen.

    [b]sbert-pg reembed finish article[/]
    """
    with common.database(database) as engine:
        column = change_or_column(engine, target).identity
        done = lib.finish(engine, column, force=force)
    nothing = f"{column} replaces no column: its change was finished before, or none has begun."
    common.note("The old column is gone." if done else nothing)


def abort(target: common.TargetArgument, database: common.DatabaseOption = None) -> None:
    """Give a change up: remove the new column without a trace. The old one was fresh throughout.

    [b]sbert-pg reembed abort article[/]
    """
    with common.database(database) as engine:
        column = unbound(target) or change_or_column(engine, target).identity
        done = lib.abort(engine, column)
    common.note("The new column is gone." if done else "There was nothing to give up.")


def adopt(
    target: common.TargetArgument,
    encoder: common.NeededEncodersOption,
    database: common.DatabaseOption = None,
    source: common.SourceOption = None,
    dry_run: common.DryRunOption = False,
    app: common.AppOption = None,
    json: common.JsonOption = False,
) -> None:
    """Bind existing vectors to the encoder and source that are proven to have made them.

    Name the column as table.column, and the encoders that may have made it by --encoder, which may
    be repeated. Without --source the usual ways to make a text are tried. Nothing is encoded but a
    sample. Rows of it that do not agree are listed, and become pending; sbert-pg audit looks at all
    rows. Exits with 1, and binds nothing, without proof.

    [b]sbert-pg adopt article.embedding -e all-MiniLM-L6-v2[/]
    [b]sbert-pg adopt article.embedding -e all-MiniLM-L6-v2 -s title -s body --dry-run[/]
    """
    common.prepare(app)
    identity = unbound(target)
    if identity is None:
        raise DeclarationError(f"{target!r} has to be table.column or schema.table.column.")
    one = source_of(source)
    sources = None if one is None else [one]
    encoders = [get_encoder(spec_named(name)) for name in encoder]
    with common.database(database) as engine, bar("proving") as advance:
        show = partial(advance, "adopting")
        done = None if dry_run else lib.adopt(engine, identity, encoders, sources, progress=show)
        proof = lib.examine(engine, identity, encoders, sources) if done is None else done.proof
    pending = 0 if done is None else done.pending
    common.show(proof, {**proof.to_json(), "adopted": done is not None, "pending": pending}, json)
    if not proof.proven:
        raise NotProvenError("The column is not adopted, and nothing was changed.")
    if done is not None and not json:
        from sbert_pg.alembic.changes import declaration_line  # Alembic takes its time to import

        bound = done.binding
        declared = Embedding(bound.declared, bound.source, storage=bound.storage)
        common.note(f"{done.adopted:,} rows adopted; {pending:,} are pending. Declare it as:")
        common.say(f"    {bound.column} = {declaration_line(declared)}")


def _thresholds_of(path: Path | None) -> lib.Thresholds:
    """Thresholds from a JSON object in a file; those that it does not name are the defaults."""
    if path is None:
        return lib.Thresholds()
    try:
        return lib.Thresholds(**json_module.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DeclarationError(
            f"{path}: expected a JSON object of thresholds, such as "
            f'{{"recall": 0.97, "max_pending": 20}}: {error}'
        ) from error
