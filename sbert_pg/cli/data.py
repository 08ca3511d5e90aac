"""``load`` and ``search``: rows in, answers out."""

from __future__ import annotations

import csv
import json as json_module
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from sbert_pg.cli import common
from sbert_pg.cli.tables import embedding_of, table_of
from sbert_pg.errors import DeclarationError, LoadError
from sbert_pg.indexes import hnsw_index
from sbert_pg.search import nearest
from sbert_pg.source import Source
from sbert_pg.types import Embedding

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDING = "embedding"

Row = dict[str, Any]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(load)
    app.command()(search)


def load(
    file: Annotated[
        str, typer.Argument(help="CSV with a header, or JSON lines; '-' is standard input (JSON).")
    ],
    table: Annotated[str, typer.Option("--table", "-t", help="Table, or schema.table.")],
    database: common.DatabaseOption = None,
    create: Annotated[
        bool, typer.Option("--create", help="Make the table, its embedding column and its index.")
    ] = False,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            "-s",
            help="With --create: column to embed; repeat it for several.",
            show_default=False,
        ),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="With --create: the encoder of the new column.")
    ] = DEFAULT_ENCODER,
    dimensions: Annotated[
        int | None, typer.Option(help="With --create: width, for an encoder not known by name.")
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Load rows with their embeddings, through binary COPY.

    All rows or none: a bad row, an error or Ctrl-C leaves the table as it was.

    [b]sbert-pg load articles.csv -t article --create -s title -s body[/]
    [b]cat more.jsonl | sbert-pg load - -t article[/]
    """
    from sbert_pg.loading import load as load_rows

    read, columns = _reader(file)
    with common.database(database) as engine, engine.begin() as connection:
        started = time.perf_counter()
        if create:
            target = _create(connection, table, columns(), source, encoder, dimensions)
        else:
            target = table_of(connection, table)
        with common.progress_bar() as bar:
            task = bar.add_task("encoding and writing", total=None, rate="")

            def advance(rows: int) -> None:
                speed = rows / (time.perf_counter() - started)
                bar.update(task, completed=rows, rate=f"{speed:,.0f}/s")

            rows = load_rows(connection, target, read(), progress=advance)
        if create:
            for index in target.indexes:
                connection.execute(sa.schema.CreateIndex(index))
        seconds = time.perf_counter() - started
    if json:
        common.print_json({"table": table, "rows": rows, "seconds": round(seconds, 3)})
    else:
        common.note(f"{rows:,} rows loaded into {table} in {seconds:.1f} s.")


def search(
    table: Annotated[str, typer.Argument(help="Table, or schema.table.")],
    query: Annotated[str, typer.Argument(help="What to look for, in words.")],
    database: common.DatabaseOption = None,
    column: Annotated[
        str | None,
        typer.Option(help="Embedding column, where there are several.", show_default=False),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=1000, help="Rows to find.")
    ] = 10,
    where: Annotated[
        str | None,
        typer.Option(help="Criterion in SQL, as in \"lang = 'en'\".", show_default=False),
    ] = None,
    min_similarity: Annotated[
        float | None, typer.Option(help="Leave out what is less similar.", show_default=False)
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """Find the rows nearest in meaning to a text.

    [b]sbert-pg search article "how do I get my money back"[/]
    [b]sbert-pg search article "refunds" --where "lang = 'en'" --json[/]
    """
    with common.database(database) as engine, engine.connect() as connection:
        target = table_of(connection, table)
        embedding = embedding_of(target, column)
        criteria: list[Any] = [] if where is None else [sa.text(f"({where})")]
        statement = nearest(
            embedding, query, limit=limit, where=criteria, min_similarity=min_similarity
        )
        rows = [dict(row) for row in connection.execute(statement).mappings()]
    if json:
        common.print_json(rows)
        return
    if not rows:
        common.note("Nothing found.")
        return
    for row in rows:
        row["similarity"] = round(row["similarity"], 3)
    names = ["similarity", *(name for name in rows[0] if name != "similarity")]
    common.print_table(names, [[_shortened(row[name]) for name in names] for row in rows])


def _shortened(value: Any, width: int = 100) -> Any:
    if not isinstance(value, str):
        return value
    line = " ".join(value.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _create(
    connection: sa.Connection,
    name: str,
    columns: Sequence[str],
    source: Sequence[str] | None,
    encoder: str,
    dimensions: int | None,
) -> sa.Table:
    """A table of text columns with an embedding column, bound; its index is left to the caller."""
    from sbert_pg import catalog

    if not source:
        raise DeclarationError(
            f"--create needs --source: which of {', '.join(columns)} is to be embedded?"
        )
    schema, _, table_name = name.rpartition(".")
    if sa.inspect(connection).has_table(table_name, schema=schema or None):
        raise DeclarationError(f"--create: table {name!r} exists already; leave --create out.")
    own = [sa.Column(column, sa.Text) for column in columns if column != "id"]
    table = sa.Table(
        table_name,
        sa.MetaData(),
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        *own,
        sa.Column(EMBEDDING, Embedding(encoder, Source.of(list(source)), dimensions=dimensions)),
        hnsw_index(f"{table_name}_{EMBEDDING}", EMBEDDING),
        schema=schema or None,
    )
    Source.of(list(source)).resolve(table)
    connection.execute(sa.schema.CreateTable(table))
    catalog.bind(connection, table.c[EMBEDDING])
    return table


def _reader(file: str) -> tuple[Callable[[], Iterator[Row]], Callable[[], list[str]]]:
    """How to read the rows of a file, and how to learn its columns without reading it whole."""
    path = Path(file)
    if file != "-" and not path.is_file():
        raise LoadError(f"There is no file {file!r}.")
    if path.suffix.lower() in (".csv", ".tsv"):
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        return lambda: _csv_rows(path, delimiter), lambda: _csv_header(path, delimiter)
    if file != "-" and path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        raise LoadError(
            f"{file!r}: the format is told from the ending, which has to be .csv, .tsv, .jsonl or "
            ".ndjson."
        )
    rows = _json_rows(path if file != "-" else None)
    first: list[Row] = []

    def columns() -> list[str]:
        if not first:
            first.extend(row for row in (next(rows, None),) if row is not None)
        if not first:
            raise LoadError(f"{file!r} holds no rows, so its columns are not known.")
        return list(first[0])

    def read() -> Iterator[Row]:
        yield from first
        yield from rows

    return read, columns


def _csv_header(path: Path, delimiter: str) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file, delimiter=delimiter), None)
    if not header:
        raise LoadError(f"{path} is empty; the first line has to name the columns.")
    return header


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise LoadError(
                        f"{path}, line {reader.line_num}: the row has another number of fields "
                        f"than the header ({len(reader.fieldnames or ())})."
                    )
                yield {key: value if value != "" else None for key, value in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise LoadError(f"{path}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path | None) -> Iterator[Row]:
    name = str(path) if path is not None else "standard input"
    lines = sys.stdin if path is None else path.open(encoding="utf-8")
    try:
        for number, line in enumerate(lines, 1):
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
    finally:
        if path is not None:
            lines.close()
