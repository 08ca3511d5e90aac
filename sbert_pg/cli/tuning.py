"""``evaluate``, ``fit-weight``, ``tune`` and ``index advise``: by one's own questions and rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from sbert_pg import tuning as lib
from sbert_pg.alembic.changes import declaration_line
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.cli import common
from sbert_pg.cli.target import resolve, text_column_of
from sbert_pg.errors import DeclarationError
from sbert_pg.progress import bar
from sbert_pg.reembed.change import Side
from sbert_pg.search.exact import LabelledQuery

PairsOption = Annotated[
    str,
    typer.Option(
        "--pairs",
        help="Labelled questions: a file (.csv and .tsv with the header question,id and perhaps "
        "gain; .jsonl; else TREC qrels), or a query in SQL that gives those columns.",
    ),
]
TopicsOption = Annotated[
    Path | None,
    typer.Option(help="For qrels: a file of lines with name, tab, question.", show_default=False),
]
MethodOption = Annotated[
    lib.Method,
    typer.Option(
        help="For queries alone, without torch: linear or contrastive. With the extra train: "
        "full, unlabelled (learns from the texts alone), distill (a smaller model)."
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        help="The model to train, a directory or a name; by default the column's own, and for "
        "distill a static one.",
        show_default=False,
    ),
]
EpochsOption = Annotated[
    int | None, typer.Option(min=1, help="Passes of training.", show_default=False)
]
MatryoshkaOption = Annotated[
    list[int] | None,
    typer.Option(
        help="Fewer dimensions at which the vectors of full shall be good too; may be repeated.",
        show_default=False,
    ),
]
WordsOption = Annotated[
    str | None,
    typer.Option(help="The text column, where there are several.", show_default=False),
]


def evaluate(
    target: common.TargetArgument,
    pairs: PairsOption,
    database: common.DatabaseOption = None,
    topics: TopicsOption = None,
    words: WordsOption = None,
    where: common.WhereOption = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="Another encoder to compare with, by name or directory; it encodes every row.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(help="A TREC run to compare with, as name=file.", show_default=False),
    ] = None,
    slice_by: Annotated[
        str | None,
        typer.Option(
            "--slice",
            help="Report each value by itself of this column of the pairs, or of the table.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Rows that count.")] = 10,
    worst: Annotated[int, typer.Option(help="Questions to show that went worst.", min=0)] = 5,
    write_to: Annotated[
        Path | None,
        typer.Option("--write-runs", help="Directory for TREC qrels and runs.", show_default=False),
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Measure how well searches answer labelled questions, side by side.

    By meaning (dense; by each index where there are several; exact), by words and by both where the
    table has a text column, and with other encoders.

    [b]sbert-pg evaluate article --pairs pairs.csv --slice lang[/]
    [b]sbert-pg evaluate article --pairs "SELECT question, article_id AS id FROM faq"[/]
    """
    with common.database(database) as engine:
        with engine.connect() as connection:
            side = resolve(connection, target)
        queries = queries_of(engine, pairs, topics)
        if slice_by is not None:
            queries = _sliced(engine, side, queries, slice_by)
        criteria = common.criteria(where)
        others = [encoder_named(name) for name in encoder or ()]
        text = _words(side, words)
        searches: dict[str, Any] = {
            **lib.searches_for(engine, side.column, text, where=criteria, encoders=others, limit=k),
            **_runs(run or ()),
        }
        with bar("searching"):
            report = lib.evaluate(engine, searches, queries, k=k, slices=slice_by)
    if write_to is not None:
        _write(write_to, report)
    misses = {name: report.worst(name, worst) for name in report.answers}
    if json:
        common.print_json(report.to_json() | {"worst": misses})
        return
    print(report)
    for name, rows in misses.items():
        for miss in rows:
            print(f"\n{name}: {miss}")


def _runs(named: Sequence[str]) -> dict[str, Any]:
    """TREC runs by their names, each given as name=file or file."""
    parts = [each.rpartition("=") for each in named]
    return {name or file: lib.read_run(file) for name, _, file in parts}


def _write(folder: Path, report: lib.Evaluation) -> None:
    """Write qrels and runs."""
    folder.mkdir(parents=True, exist_ok=True)
    lib.write_qrels(folder / "qrels.txt", report.queries)
    for name in report.answers:
        file = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        lib.write_run(folder / f"{file}.run", report.run(name), name)


def fit_weight(
    target: common.TargetArgument,
    pairs: PairsOption,
    database: common.DatabaseOption = None,
    topics: TopicsOption = None,
    words: WordsOption = None,
    where: common.WhereOption = None,
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="Rows that count.")] = 10,
) -> None:
    """Learn the weight of meaning in hybrid searches from labelled questions; print the curve.

    [b]sbert-pg fit-weight article --pairs pairs.csv[/]
    """
    with common.database(database) as engine:
        with engine.connect() as connection:
            side = resolve(connection, target)
        text = text_column_of(side.table, words)
        criteria = common.criteria(where)
        queries = queries_of(engine, pairs, topics)
        with bar("searching"):
            fitted = lib.fit_weight(engine, side.column, text, queries, where=criteria, k=k)
    print(fitted)


def tune(
    target: common.TargetArgument,
    pairs: Annotated[
        str,
        typer.Option(
            "--pairs",
            help="Labelled questions: a file (as for evaluate), a query in SQL that gives question "
            "and id, or a column of the table whose text asks for its own row.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The new encoder's directory; it must not exist.")],
    method: MethodOption = "linear",
    base: BaseOption = None,
    epochs: EpochsOption = None,
    matryoshka: MatryoshkaOption = None,
    database: common.DatabaseOption = None,
    topics: TopicsOption = None,
    where: common.WhereOption = None,
    document: Annotated[
        str | None,
        typer.Option(
            help="A column of the pairs or the table that says which document a row is a part of: "
            "no document is learned from and judged by.",
            show_default=False,
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="A column of the pairs or the table with a time: the latest are kept back.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of learning.")] = 0,
    json: common.JsonOption = False,
) -> None:
    """Fit the column's encoder to labelled questions, and prove it on questions kept back.

    linear and contrastive leave the vectors of documents as they are. Exits with 1, and writes
    nothing, where the interval of the gain includes zero, or where there are too few questions.

    [b]sbert-pg tune article.embedding --pairs pairs.csv --out models/article[/]
    [b]sbert-pg tune article --pairs "SELECT question, article_id AS id FROM faq" --out models/a[/]
    [b]sbert-pg tune article --pairs title --method contrastive --out models/article[/]
    [b]sbert-pg tune article --pairs pairs.csv --method full --out models/article[/]
    """
    with common.database(database) as engine:
        with engine.connect() as connection:
            side = resolve(connection, target)
        criteria = common.criteria(where)
        if pairs in side.table.columns and not Path(pairs).exists():
            queries = lib.own_pairs(engine, side.column, pairs, where=criteria, seed=seed)
        else:
            queries = queries_of(engine, pairs, topics)
        with bar("learning"):
            report = lib.tune(
                engine,
                side.column,
                queries,
                out=out,
                method=method,
                base=base,
                epochs=epochs,
                matryoshka=matryoshka or (),
                where=criteria,
                document=document,
                time=time,
                seed=seed,
            )
    _show_next(report, side, json)


def _show_next(report: lib.Tuning, side: Side, json: bool) -> None:
    """Print what was proven, and the steps from here."""
    binding = side.binding
    declared = Embedding(report.spec, binding.source, storage=binding.storage)
    if report.side == "query":
        line = f"{binding.column} = {declaration_line(declared)}"
        heading = "Its vectors stay. Let the column accept the encoder, then deploy:"
        steps = [f"sbert-pg reembed begin {binding} --encoder {report.spec.name}", line]
    else:
        new = f"{binding.column}_tuned"
        line = f"{new} = {declaration_line(declared, replaces=binding.column)}"
        heading = "It needs vectors of its own. Declare a column for it, or begin by command:"
        steps = [
            line,
            f"sbert-pg reembed begin {binding} --to {new} --encoder {report.spec.name}",
            f"sbert-pg backfill {binding.table}.{new}",
            f"sbert-pg reembed verify {binding.table}.{new} --queries {report.pairs}",
        ]
    common.show(report, report.to_json() | {"declaration": line}, json)
    if not json:
        common.note(heading)
        common.show("\n".join(f"    {step}" for step in steps), None, False)


def advise(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="A filter that the application uses, in SQL; repeat it for several. By default "
            "common values of an indexed column.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="A question to search for; by default rows are.", show_default=False),
    ] = None,
    sample: Annotated[int, typer.Option(min=100, help="Rows to index.")] = 20_000,
    queries: Annotated[int, typer.Option(min=5, help="Rows to search for.")] = 50,
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="Rows that count.")] = 10,
    least: Annotated[float, typer.Option(min=0, max=1, help="Recall to reach.")] = 0.98,
    json: common.JsonOption = False,
) -> None:
    """Build each form of index on a sample of the rows, measure it, and recommend one.

    Nothing in the database changes: the sample is a temporary table.

    [b]sbert-pg index advise article.embedding --where "lang = 'en'"[/]
    """
    with common.database(database) as engine:
        with engine.connect() as connection:
            side = resolve(connection, target)
        filters: dict[str, Any] = {text: common.criterion(text) for text in where or ()}
        with bar("building indexes of a sample, and searching them"):
            advice = lib.advise_index(
                engine,
                side.column,
                filters=filters or None,
                questions=question or (),
                sample=sample,
                queries=queries,
                k=k,
                least=least,
            )
    if json:
        common.print_json(advice.to_json())
    else:
        print(advice)


def queries_of(engine: sa.Engine, pairs: str, topics: Path | None) -> list[LabelledQuery]:
    """Labelled questions from a file or by a query."""
    if pairs.lstrip()[:6].upper() in ("SELECT", "VALUES") or pairs.lstrip()[:4].upper() == "WITH":
        return lib.pairs_of(engine, sa.text(pairs.replace(":", r"\:")))
    return lib.read_pairs(pairs, topics)


def _words(side: Side, name: str | None) -> sa.Column[Any] | None:
    """The text column, where there is one."""
    try:
        return text_column_of(side.table, name)
    except DeclarationError:
        if name is not None:
            raise
        return None


def encoder_named(name: str, precision: str | None = None) -> Any:
    """The encoder of a name or directory, converted now where it is not yet."""
    from sbert_pg.encoder import Encoder

    return Encoder.load(name, precision=precision)


def _sliced(
    engine: sa.Engine, side: Side, queries: list[LabelledQuery], name: str
) -> list[LabelledQuery]:
    """Questions with an attribute: as the pairs have it, or of the first row that is relevant."""
    if any(name in query.attributes for query in queries):
        return queries
    if name not in side.table.columns:
        raise DeclarationError(f"--slice: neither the pairs nor the table has a column {name!r}.")
    return lib.with_attribute(engine, side.table, queries, name)
