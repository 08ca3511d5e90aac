"""``load``, ``search`` and ``passages``: rows in, answers out."""

from __future__ import annotations

import itertools
import json as json_module
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import sqlalchemy as sa
import typer
from rich.markup import escape
from sqlalchemy.orm import Session

from sbert_pg.catalog.embedding import Embedding
from sbert_pg.cli import common
from sbert_pg.cli.encoder import spec_named
from sbert_pg.cli.target import (
    create_documents,
    cut_all,
    document_rows,
    passages_attribute,
    resolve,
    source_of,
    table_named,
    text_column_of,
)
from sbert_pg.errors import DeclarationError, LoadError
from sbert_pg.indexes import hnsw_index
from sbert_pg.progress import bar
from sbert_pg.reembed.change import Side
from sbert_pg.search import explain_search, explain_words, hybrid, matching, nearest
from sbert_pg.source import companion_name
from sbert_pg.tuning.files import csv_rows, numbered_lines

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDING = "embedding"
#: Columns of a search that say how well a row fits.
_SCORES = ("score", "similarity", "meaning_rank", "words_score", "words_rank")

Row = dict[str, Any]
By = Literal["meaning", "words", "both"]


def load(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="A table, or schema.table.")],
    file: Annotated[
        str, typer.Argument(help="CSV with a header, or JSON lines; '-' is standard input (JSON).")
    ],
    database: common.DatabaseOption = None,
    create: common.CreateOption = False,
    source: common.SourceOption = None,
    encoder: common.EncoderOption = DEFAULT_ENCODER,
    in_passages: Annotated[
        bool,
        typer.Option(
            "--passages", help="Cut the last source into passages; those before it are headings."
        ),
    ] = False,
) -> None:
    """Load rows with their embeddings, through binary COPY.

    All rows or none: a bad row, an error or Ctrl-C leaves the table as it was. Documents are then
    cut into passages, as a worker does. With --create the table, its embedding column and its index
    are made first, which is what --source, --encoder and --passages are for.

    [b]sbert-pg load article articles.csv --create -s title -s body[/]
    [b]sbert-pg load manual manuals.jsonl --create --passages -s title -s body[/]
    [b]cat more.jsonl | sbert-pg load article -[/]
    """
    from sbert_pg.loading import load as load_rows

    rows_read = _rows_of(file)
    first = list(itertools.islice(rows_read, 1))
    started = time.perf_counter()
    with common.database(database) as engine:
        with bar("loading the encoder") as advance, engine.begin() as connection:
            if create:
                columns: list[str] = list(*first)
                target = _create(connection, table, columns, source, encoder, in_passages)
            else:
                target = table_named(connection, table)
            show = partial(advance, "encoding and writing")
            rows = load_rows(connection, target, itertools.chain(first, rows_read), progress=show)
            for index in target.indexes if create else ():
                advance(f"building {index.name}")
                connection.execute(sa.schema.CreateIndex(index))
        cut_all(engine, target)
    common.note(f"{rows:,} rows loaded into {table} in {time.perf_counter() - started:.1f} s.")
    for column, cut in rows.cut.items():
        if cut:
            common.note(
                f"{cut:,} texts of {column} ({cut / rows:.1%}) are longer than the encoder reads; "
                "only their beginnings count. Passages embed long texts in parts."
            )


def search(
    target: common.TargetArgument,
    query: Annotated[str, typer.Argument(help="What to look for, in words.")],
    database: common.DatabaseOption = None,
    limit: common.LimitOption = 10,
    where: common.WhereOption = None,
    by: Annotated[
        By, typer.Option(help="What to compare: meaning, words (BM25), or both (hybrid).")
    ] = "meaning",
    explain: Annotated[
        bool, typer.Option("--explain", help="Say how the rows were found, and how surely.")
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """Find the rows nearest in meaning to a text, or those with its words.

    Documents that are cut into passages are shown with their best one.

    [b]sbert-pg search article "how do I get my money back"[/]
    [b]sbert-pg search article "XJ-4711 manual" --by both --explain[/]
    [b]sbert-pg search article "refunds" --where "lang = 'en'" --json[/]
    """
    with (
        common.database(database) as engine,
        engine.connect() as connection,
        bar({"words": "searching"}.get(by, "loading the encoder")),
    ):
        side = resolve(connection, target)
        cut = side.binding.source.passages is not None and by != "words"
        embedding: Any = passages_attribute(connection, side) if cut else side.column
        options: dict[str, Any] = {"limit": limit, "where": common.criteria(where)}
        statement = _search_of(side, embedding, by, query, options)
        if cut:
            rows = document_rows(Session(connection), embedding, statement)
        else:
            rows = [dict(row) for row in connection.execute(statement).mappings()]
        explained: Any = explain_search if by == "meaning" else explain_words
        explanation: Any = explained(connection, statement) if explain else None
    if json:
        answers: Any = {"rows": rows, "explanation": asdict(explanation)} if explain else rows
        common.print_json(answers)
        return
    if explain:
        common.note(str(explanation))
    _print_answers(rows)


def _print_answers(rows: list[Row]) -> None:
    if not rows:
        common.note("Nothing found.")
        return
    names = list(dict.fromkeys([*(name for name in _SCORES if name in rows[0]), *rows[0]]))
    for row in rows:
        row |= {name: round(row[name], 3) for name in _SCORES if isinstance(row.get(name), float)}
    common.print_rows(names, [[row[name] for name in names] for row in rows])


def _search_of(side: Side, embedding: Any, by: By, query: str, options: dict[str, Any]) -> Any:
    """The statement; of documents that are cut, ``embedding`` is their attribute of passages."""
    if by == "meaning":
        return nearest(embedding, query, **options)
    text: Any = text_column_of(side.table)
    if by == "words":
        return matching(text, query, **options)
    if embedding is not side.column:
        text = getattr(embedding.class_, text.key)
    return hybrid(embedding, text, query, **options)


def passages(
    target: common.TargetArgument,
    key: Annotated[str, typer.Argument(help='Its key: 17, or ["eu", "17"] where it has parts.')],
    database: common.DatabaseOption = None,
) -> None:
    """Print a document with the borders of its passages.

    [b]sbert-pg passages document 17[/]
    """
    from sbert_pg.freshness.queue import Row, label_from
    from sbert_pg.freshness.rows import rows_of

    with common.database(database) as engine, engine.begin() as connection:
        binding = resolve(connection, target).binding
        rows = rows_of(connection, binding)
        if rows.passages is None:
            raise DeclarationError(f"{binding} is not cut into passages; name a column that is.")
        document = rows.find(connection, label_from(key))
        if document is None:
            raise DeclarationError(f"{binding.table} has no document with the key {key}.")
        body = rows.table.c[binding.source.columns[-1]]
        columns = [body, binding.is_stale(rows.table), rows.passages.as_json(rows.table)]
        row = Row(document.key, document.label)
        values: list[Any] = list(rows.columns_of(connection, [row], columns)[0])
    _, text, stale, cut = values
    if stale:
        common.note("The document has changed since; a worker is to cut it again.")
    for ordinal, (start, stop, heading, _) in enumerate(cut or []):
        common.out.print(f"[bold]── {ordinal}  {start}:{stop}  {escape(heading)}[/]")
        common.out.print(escape((text or "")[start:stop]))


def _create(
    connection: sa.Connection,
    name: str,
    columns: Sequence[str],
    source: Sequence[str] | None,
    encoder: str,
    in_passages: bool,
) -> sa.Table:
    """A table of text columns with an embedding column, bound; its index is left to the caller."""
    from sbert_pg import catalog

    catalog.require_current(connection)
    if not columns:
        raise LoadError("--create: there are no rows, so the columns are not known.")
    _require_names(columns)
    text = source_of(source)
    if text is None:
        raise DeclarationError(
            f"--create needs --source: which of {', '.join(columns)} is to be embedded?"
        )
    schema, _, table_name = name.rpartition(".")
    if sa.inspect(connection).has_table(table_name, schema=schema or None):
        raise DeclarationError(f"--create: table {name!r} exists already; leave --create out.")
    spec = spec_named(encoder)
    own = [sa.Column(column, sa.Text) for column in columns if column != "id"]
    embedding: list[Any] = []
    if not in_passages:
        type_ = Embedding(spec, text)
        index = hnsw_index(f"{table_name}_{EMBEDDING}", EMBEDDING)
        embedding = [sa.Column(EMBEDDING, type_), index]
    table = sa.Table(
        table_name,
        sa.MetaData(),
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        *own,
        *embedding,
        schema=schema or None,
    )
    text.resolve(table)
    if in_passages:
        create_documents(connection, table, text, spec)
        return table
    connection.execute(sa.schema.CreateTable(table))
    catalog.bind(connection, table.c[EMBEDDING])
    return table


def _require_names(columns: Sequence[str]) -> None:
    """Refuse names of columns that a new table cannot have."""
    for column in columns:
        if not 0 < len(column.encode()) < 64 or column in (EMBEDDING, companion_name(EMBEDDING)):
            raise LoadError(
                f"--create: a column cannot be called {column!r}. A name has 1 to 63 bytes, and "
                f"{EMBEDDING!r} is the new column for vectors. Rename it in the file."
            )


def _rows_of(file: str) -> Iterator[Row]:
    """The rows of a file, by its ending; of standard input for ``-``."""
    path = Path(file)
    if file == "-":
        return _json_rows(None)
    if not path.is_file():
        raise LoadError(f"There is no file {file!r}.")
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return _csv_rows(path)
    if ending in (".jsonl", ".ndjson", ".json"):
        return _json_rows(path)
    raise LoadError(
        f"{file!r}: the ending says the format; it has to be .csv, .tsv, .jsonl or .ndjson."
    )


def _csv_rows(path: Path) -> Iterator[Row]:
    for number, row in csv_rows(path):
        if None in row or None in row.values():
            raise LoadError(
                f"{path}, line {number}: the row has another number of fields than the header."
            )
        yield {key: value if value != "" else None for key, value in row.items()}


def _json_rows(path: Path | None) -> Iterator[Row]:
    name = "standard input" if path is None else path
    for number, line in enumerate(sys.stdin, 1) if path is None else numbered_lines(path):
        if not line.strip():
            continue
        try:
            row = json_module.loads(line)
        except ValueError as error:
            raise LoadError(f"{name}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise LoadError(
                f"{name}, line {number} is not an object; each line is one row, "
                'such as {"title": "..."}.'
            )
        yield row
