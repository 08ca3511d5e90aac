"""``evaluate``, ``tune`` and ``index advise``: by one's own questions and rows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated

import sqlalchemy as sa
import typer

from sbert_pg import tuning as lib
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.cli import common
from sbert_pg.cli.encoder import encoder_named
from sbert_pg.cli.target import column_of, queries_of, text_column_if_any, text_column_of
from sbert_pg.errors import DeclarationError, LoadError
from sbert_pg.progress import bar
from sbert_pg.reembed.change import Side
from sbert_pg.search.exact import LabelledQuery

MethodOption = Annotated[
    lib.Method,
    typer.Option(
        help="For queries alone, without torch: linear or contrastive. With the extra train: "
        "full, unlabelled (learns from the texts alone), distill (a smaller model)."
    ),
]
#: Questions to show that went worst.
WORST = 5


def evaluate(
    target: common.TargetArgument,
    pairs: common.PairsOption,
    database: common.DatabaseOption = None,
    where: common.WhereOption = None,
    encoder: common.EncodersOption = None,
    slice_by: Annotated[
        str | None,
        typer.Option(
            "--slice",
            help="Report each value by itself of this column of the pairs, or of the table.",
        ),
    ] = None,
    fit_weight: Annotated[
        bool,
        typer.Option(
            "--fit-weight",
            help="Learn the weight of meaning in hybrid searches instead, and print the curve.",
        ),
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """Measure how well searches answer labelled questions, side by side.

    By meaning (dense; by each index where there are several; exact), by words and by both where the
    table has a text column, and with the encoders of --encoder, which may be repeated, and encode
    every row. evaluate() in Python takes any search, TREC's runs, and other cut-offs.

    [b]sbert-pg evaluate article --pairs pairs.csv --slice lang[/]
    [b]sbert-pg evaluate article --pairs "SELECT question, article_id AS id FROM faq"[/]
    [b]sbert-pg evaluate article --pairs pairs.csv --fit-weight[/]
    """
    criteria = common.criteria(where)
    _refuse_others(fit_weight, slice_by or encoder)
    with common.database(database) as engine:
        side = column_of(engine, target)
        queries = _in_table(engine, side, queries_of(engine, pairs))
        if fit_weight:
            text = text_column_of(side.table)
            with bar("searching"):
                fitted = lib.fit_weight(engine, side.column, text, queries, where=criteria)
            common.show(fitted, asdict(fitted), json)
            return
        if slice_by is not None:
            queries = _sliced(engine, side, queries, slice_by)
        others = [encoder_named(name) for name in encoder or ()]
        searches = lib.searches_for(
            engine, side.column, text_column_if_any(side.table), where=criteria, encoders=others
        )
        with bar("searching"):
            report = lib.evaluate(engine, searches, queries, slices=slice_by)
    misses = {name: report.worst(name, WORST) for name in report.answers}
    if json:
        common.print_json(report.to_json() | {"worst": misses})
        return
    print(report)
    for name, rows in misses.items():
        for miss in rows:
            print(f"\n{name}: {miss}")


def _refuse_others(fit_weight: bool, others: object) -> None:
    if fit_weight and others:
        raise DeclarationError(
            "--fit-weight learns one weight, for the column's own encoder: leave --slice and "
            "--encoder out."
        )


def _in_table(engine: sa.Engine, side: Side, queries: list[LabelledQuery]) -> list[LabelledQuery]:
    """The questions; says which of their rows the table has not, and refuses where it has none."""
    key = next(iter(side.table.primary_key)).name
    known = lib.of_keys(engine, side.table, key, queries)
    unknown = sorted({key for query in queries for key in query.gains} - set(known))
    if unknown:
        some = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        problem = f"{len(unknown)} labelled rows are not in {side.table.fullname}: {some}"
        if not known:
            raise LoadError(f"All {problem}. Pairs name rows by their primary key.")
        common.note(f"{problem}; no search can find them.")
    return queries


def tune(
    target: common.TargetArgument,
    pairs: common.PairsOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The encoder's directory; it must not exist.")
    ],
    method: MethodOption = "linear",
    database: common.DatabaseOption = None,
    where: common.WhereOption = None,
    document: Annotated[
        str | None,
        typer.Option(
            help="A column of the pairs or the table that says which document a row is a part of: "
            "no document is learned from and judged by."
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="A column of the pairs or the table with a time: the latest are kept back."
        ),
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Fit the column's encoder to labelled questions, and prove it on questions kept back.

    linear and contrastive leave the vectors of documents as they are. --pairs may also be a column
    of the table whose text asks for its own row. Exits with 1, and writes nothing, where the
    interval of the gain includes zero, or where there are too few questions. tune() in Python takes
    the model to train, epochs, Matryoshka dimensions and a seed too.

    [b]sbert-pg tune article.embedding --pairs pairs.csv --out models/article[/]
    [b]sbert-pg tune article --pairs "SELECT question, article_id AS id FROM faq" --out models/a[/]
    [b]sbert-pg tune article --pairs title --method contrastive --out models/article[/]
    [b]sbert-pg tune article --pairs pairs.csv --method full --out models/article[/]
    """
    with common.database(database) as engine:
        side = column_of(engine, target)
        criteria = common.criteria(where)
        if pairs in side.table.columns and not Path(pairs).exists():
            queries = lib.own_pairs(engine, side.column, pairs, where=criteria)
        else:
            queries = queries_of(engine, pairs)
        with bar("learning"):
            report = lib.tune(
                engine,
                side.column,
                queries,
                out=out,
                method=method,
                where=criteria,
                document=document,
                time=time,
            )
    _show_next(report, side, json)


def _show_next(report: lib.Tuning, side: Side, json: bool) -> None:
    from sbert_pg.alembic.changes import declaration_line  # Alembic takes its time to import

    binding = side.binding
    declared = Embedding(report.spec, binding.source, storage=binding.storage)
    if report.side == "query":
        line = f"{binding.column} = {declaration_line(declared)}"
        heading = "Its vectors stay. Let the column accept the encoder, then deploy:"
        steps = [f"sbert-pg reembed begin {quote(str(binding))} --encoder {report.spec.name}", line]
    else:
        new = f"{binding.column}_tuned"
        old, place = quote(str(binding)), quote(f"{binding.table}.{new}")
        line = f"{new} = {declaration_line(declared, replaces=binding.column)}"
        heading = "It needs vectors of its own. Declare a column for it, or begin by command:"
        steps = [
            line,
            f"sbert-pg reembed begin {old} --to {quote(new)} --encoder {report.spec.name}",
            f"sbert-pg backfill {place}",
            f"sbert-pg reembed verify {place} --pairs {report.pairs}",
        ]
    common.show(report, report.to_json() | {"declaration": line}, json)
    if not json:
        common.note(heading)
        common.say("\n".join(f"    {step}" for step in steps))


def advise(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    filters: common.FiltersOption = None,
    json: common.JsonOption = False,
) -> None:
    """Build each form of index on a sample of the rows, measure it, and recommend one.

    Nothing in the database changes: the sample is a temporary table of 20,000 rows. Without
    --filter the filters are common values of an indexed column. advise_index() in Python takes
    questions to search for, the size of the sample, k, and the recall to reach.

    [b]sbert-pg index advise article.embedding --filter "lang = 'en'"[/]
    """
    with common.database(database) as engine:
        side = column_of(engine, target)
        usual = {text: common.criterion(text) for text in filters or ()}
        with bar("building indexes of a sample, and searching them"):
            advice = lib.advise_index(engine, side.column, filters=usual or None)
    common.show(advice, advice.to_json(), json)


def _sliced(
    engine: sa.Engine, side: Side, queries: list[LabelledQuery], name: str
) -> list[LabelledQuery]:
    """Questions with an attribute: as the pairs have it, or of the first row that is relevant."""
    if any(name in query.attributes for query in queries):
        return queries
    if name not in side.table.columns:
        raise DeclarationError(f"--slice: neither the pairs nor the table has a column {name!r}.")
    return lib.with_attribute(engine, side.table, queries, name)
