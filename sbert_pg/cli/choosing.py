"""``encoder choose`` and ``encoder limits``: what an encoder is worth on one's own texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from sbert_pg import tuning as lib
from sbert_pg.cli import common
from sbert_pg.cli.encoder import encoder_named
from sbert_pg.cli.target import embedding_or_texts, resolve
from sbert_pg.cli.tuning import queries_of
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
        str | None,
        typer.Option(
            help="Your own texts: a file, one a line, or a table or column of the database.",
            show_default=False,
        ),
    ] = None,
    database: common.DatabaseOption = None,
    json: common.JsonOption = False,
) -> None:
    """Measure where an encoder breaks: word order, negation, numbers, names, languages, length.

    On texts that come with the library and, where given, on your own.

    [b]sbert-pg encoder limits all-MiniLM-L6-v2[/]
    [b]sbert-pg encoder limits all-MiniLM-L6-v2 ./models/other --texts article[/]
    """
    own: list[str] = []
    if texts is not None and (Path(texts).exists() or "/" in texts):
        own = _lines_of(Path(texts))
    elif texts is not None:
        with common.database(database) as engine, engine.connect() as connection:
            own = lib.own_texts(connection, resolve(connection, texts).column)
    if texts is not None and not own:
        raise DeclarationError(f"There is no text in {texts} that could be looked at.")
    with bar("measuring"):
        reports = [lib.limits_of(encoder_named(name), own) for name in names]
    if len(reports) == 1:
        common.show(reports[0], reports[0].to_json(), json)
    else:
        common.show(beside(reports), [report.to_json() for report in reports], json)


def choose(
    target: common.TargetArgument,
    pairs: common.PairsOption,
    encoder: common.EncodersOption = None,
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
    would cost. Of the encoders of --encoder, which may be repeated, or of all that have been
    converted on this machine; the column's own is always among them. A table that has no embedding
    column yet is named by its texts. Exits with 1 where none keeps to the budget.

    [b]sbert-pg encoder choose article --pairs pairs.csv --budget 2ms[/]
    [b]sbert-pg encoder choose article.title,body --pairs pairs.csv -e ./models/a -e ./models/b[/]
    """
    limit = None if budget is None else _milliseconds(budget)
    candidates = [encoder_named(name) for name in encoder or ()] or lib.local_encoders()
    with common.database(database) as engine:
        with engine.connect() as connection:
            columns = embedding_or_texts(connection, target)
        queries = queries_of(engine, pairs)
        with bar("measuring"):
            choice = lib.choose_encoder(
                engine,
                columns,
                queries,
                candidates,
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
