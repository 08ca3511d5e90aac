"""``sbert-pg demo``: the main job on real text, on a machine with nothing but Python."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import sqlalchemy as sa
import typer
from rich.panel import Panel
from rich.syntax import Syntax
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg.cli import common
from sbert_pg.cli.corpus import standard_library
from sbert_pg.indexes import hnsw_index
from sbert_pg.orm import embedding_column
from sbert_pg.search import nearest
from sbert_pg.source import Source

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
QUESTIONS = (
    "parse a date from text",
    "compare two files line by line",
    "run a function later in another thread",
    "smallest items of a list without sorting all of it",
)


class Base(DeclarativeBase):
    """The demo's own metadata."""


class Function(Base):
    """A documented function, method or class of Python's standard library."""

    __tablename__ = "stdlib_function"

    id: Mapped[int] = mapped_column(primary_key=True)
    module: Mapped[str]
    name: Mapped[str]
    signature: Mapped[str]
    docstring: Mapped[str]
    embedding = embedding_column(
        ENCODER, source=Source.template("{module}.{name}: {docstring}"), nullable=True
    )

    __table_args__ = (hnsw_index("stdlib_function_embedding", "embedding"),)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    question: Annotated[
        str | None, typer.Argument(help="What to look for; without it, a few examples.")
    ] = None,
    database: common.DatabaseOption = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory of the embedded server.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Answers per question.")] = 5,
    json: common.JsonOption = False,
) -> None:
    """Ask Python's standard library questions in plain English.

    The first time, its docstrings are embedded and stored: about five thousand texts. After that a
    question takes milliseconds.

    [b]sbert-pg demo[/]
    [b]sbert-pg demo "read a zip file without unpacking it"[/]
    """
    with common.database(database, data_dir) as engine:
        prepare(engine)
        answers = [(text, *ask(engine, text, limit)) for text in _questions(question)]
    if json:
        common.print_json(
            [
                {"question": text, "milliseconds": round(seconds * 1000, 2), "answers": rows}
                for text, rows, seconds in answers
            ]
        )
        return
    for text, rows, seconds in answers:
        _print_answers(text, rows, seconds)
    _print_statements(answers[0][0], limit)
    if question is None:
        common.out.print(f'Your own question:  [b]{_command()} demo "how do I ..."[/]')


def _command() -> str:
    """What the user has to type: the name alone only where the shell would find this program."""
    here = Path(sys.argv[0])
    if here.name != "sbert-pg" or shutil.which("sbert-pg") == str(here.absolute()):
        return "sbert-pg"
    return os.path.relpath(here)


def _questions(question: str | None) -> tuple[str, ...]:
    return QUESTIONS if question is None else (question,)


def prepare(engine: sa.Engine) -> None:
    """Make the table, fill it and index it, unless an earlier start did."""
    from sbert_pg import catalog
    from sbert_pg.loading import load

    with engine.begin() as connection:
        connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
        catalog.upgrade(connection)
        table = cast("sa.Table", Function.__table__)
        if sa.inspect(connection).has_table(table.name):
            return
        entries = list(standard_library())
        common.note(f"Embedding {len(entries):,} docstrings of Python's standard library, once.")
        # All in one transaction: interrupted, it leaves nothing, and the next start begins anew.
        connection.execute(sa.schema.CreateTable(table))
        catalog.bind(connection, table.c.embedding)
        started = time.perf_counter()
        with common.progress_bar() as bar:
            task = bar.add_task("encoding and writing", total=len(entries), rate="")

            def advance(rows: int) -> None:
                speed = rows / (time.perf_counter() - started)
                bar.update(task, completed=rows, rate=f"{speed:,.0f}/s")

            load(connection, table, _rows(entries), progress=advance)
        seconds = time.perf_counter() - started
        # The index after the rows: built on full tables it takes a fraction of the time.
        for index in table.indexes:
            connection.execute(sa.schema.CreateIndex(index))
        common.note(
            f"Embedded and stored in {seconds:.1f} s ({len(entries) / seconds:,.0f} texts/s), "
            f"indexed in {time.perf_counter() - started - seconds:.1f} s."
        )


def _rows(entries: list[Any]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        yield {
            "module": entry.module,
            "name": entry.name,
            "signature": entry.signature,
            "docstring": entry.docstring,
        }


def ask(engine: sa.Engine, question: str, limit: int) -> tuple[list[dict[str, Any]], float]:
    """The nearest functions and the seconds that encoding and search took."""
    statement = nearest(Function.embedding, question, limit=limit)
    with Session(engine) as session:
        session.execute(statement)  # connects, and loads the encoder
        session.rollback()
        # A trailing blank makes another text of it, so that the question is encoded while timed.
        again = nearest(Function.embedding, question + " ", limit=limit)
        started = time.perf_counter()
        found = session.execute(again).all()
        seconds = time.perf_counter() - started
        rows = [
            {
                "similarity": round(similarity, 3),
                "function": f"{function.module}.{function.name}",
                "signature": function.signature,
                "docstring": function.docstring,
            }
            for function, similarity in found
        ]
    return rows, seconds


def _print_answers(question: str, rows: list[dict[str, Any]], seconds: float) -> None:
    common.print_table(
        ["similarity", "function", "documentation"],
        [
            [row["similarity"], row["function"], row["docstring"].splitlines()[0][:76]]
            for row in rows
        ],
        title=f"[bold]{question}[/]  [dim]{seconds * 1000:.1f} ms, encoding included[/]",
    )


def _print_statements(question: str, limit: int) -> None:
    orm = f'session.execute(nearest(Function.embedding, "{question}", limit={limit}))'
    code = Syntax(orm, "python", word_wrap=True)
    common.out.print(Panel(code, title="the same with SQLAlchemy"))
    sql = (
        "SELECT module, name, 1 - (embedding <=> :question) AS similarity\n"
        "FROM stdlib_function\n"
        f"ORDER BY embedding <=> :question LIMIT {limit};"
    )
    common.out.print(Panel(Syntax(sql, "sql"), title="the same in SQL, :question being its vector"))
