"""``encoder choose`` and ``encoder limits``: what an encoder is worth on one's own texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from sbert_pg import tuning as lib
from sbert_pg.cli import common
from sbert_pg.cli.encoder import split_name
from sbert_pg.cli.target import embedding_or_texts, resolve
from sbert_pg.cli.tuning import PairsOption, encoder_named, queries_of
from sbert_pg.errors import DeclarationError
from sbert_pg.progress import bar
from sbert_pg.tuning.limits import beside

_BUDGET = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s)?")


def limits(
    names: Annotated[
        list[str],
        typer.Argument(help="An encoder, or several to see side by side; as NAME or NAME:fp32."),
    ],
    texts: Annotated[
        Path | None,
        typer.Option(help="A file of your own texts, one a line.", show_default=False),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            help="A table or column of the database, whose texts are looked at.",
            show_default=False,
        ),
    ] = None,
    database: common.DatabaseOption = None,
    json: common.JsonOption = False,
) -> None:
    """Measure where an encoder breaks: word order, negation, numbers, names, languages, length.

    On texts that come with the library and, where given, on your own.

    [b]sbert-pg encoder limits all-MiniLM-L6-v2[/]
    [b]sbert-pg encoder limits all-MiniLM-L6-v2 ./models/other --table article[/]
    """
    own = [] if texts is None else _lines_of(texts)
    if table is not None:
        with common.database(database) as engine, engine.connect() as connection:
            side = resolve(connection, table)
            own += lib.own_texts(connection, side.column)
    if not own and (texts or table):
        raise DeclarationError(f"There is no text in {texts or table} that could be looked at.")
    with bar("measuring"):
        reports = [lib.limits_of(encoder_named(*split_name(name)), own) for name in names]
    if len(reports) == 1:
        common.show(reports[0], reports[0].to_json(), json)
    else:
        common.show(beside(reports), [report.to_json() for report in reports], json)


def choose(
    table: Annotated[
        str,
        typer.Option(
            help="A table or embedding column; or the texts of a table that has none yet, as "
            "article.body or article.title,body.",
            show_default=False,
        ),
    ],
    pairs: PairsOption,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Encoders to compare, as NAME or NAME:fp32; by default those that have been "
            "converted on this machine.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="What encoding a question may take, as 2ms.", show_default=False),
    ] = None,
    database: common.DatabaseOption = None,
    where: common.WhereOption = None,
    json: common.JsonOption = False,
) -> None:
    """Which encoder should I use? Answered on a table's own texts and questions.

    Quality with intervals, speed on this machine, size, languages, limits, and what the change
    would cost. The column's own encoder is always among them; a table that has no embedding column
    yet is named by its texts. Exits with 1 where none keeps to the budget.

    [b]sbert-pg encoder choose --table article --pairs pairs.csv --budget 2ms[/]
    [b]sbert-pg encoder choose ./models/a all-mpnet-base-v2 --table article --pairs pairs.csv[/]
    """
    limit = None if budget is None else _milliseconds(budget)
    given = [encoder_named(*split_name(name)) for name in names or ()] or lib.local_encoders()
    with common.database(database) as engine:
        with engine.connect() as connection:
            columns = embedding_or_texts(connection, table)
        queries = queries_of(engine, pairs, None)
        with bar("measuring"):
            choice = lib.choose_encoder(
                engine,
                columns,
                queries,
                given,
                budget=limit,
                where=common.criteria(where),
            )
    common.show(choice, choice.to_json(), json)
    if choice.chosen is None:
        raise typer.Exit(common.EXIT_FAILED)


def _milliseconds(text: str) -> float:
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise DeclarationError(f"--budget {text!r}: give milliseconds or seconds, as 2ms or 0.5s.")
    return float(match[1]) * (1000 if match[2] == "s" else 1)


def _lines_of(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DeclarationError(f"--texts {path} cannot be read: {error}.") from error
