"""``sbert-pg demo``: the main jobs on real text, on a machine with nothing but Python.

Without a question it is a tour: search, words and meaning, a long document by its passage, topics,
and a change of encoder while questions go on being answered. Every figure is measured as it runs.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import sqlalchemy as sa
import typer
from rich.markup import escape
from rich.panel import Panel
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import system
from sbert_pg.cli import common
from sbert_pg.cli.demo_change import change_encoder, embedding_of
from sbert_pg.cli.demo_data import (
    NEW_ENCODER,
    OLD_ENCODER,
    Documented,
    documents,
    searchable,
    use_old_encoder,
)
from sbert_pg.indexes import hnsw_index
from sbert_pg.orm import embedding_column
from sbert_pg.progress import bar
from sbert_pg.search import nearest
from sbert_pg.source import Source
from sbert_pg.types.text import text_column, text_index

if TYPE_CHECKING:
    from sbert_pg.clustering import Clustering

QUESTIONS = (
    "parse a date from text",
    "compare two files line by line",
    "run a function later in another thread",
    "smallest items of a list without sorting all of it",
)
#: Names, which an encoder has no meaning for.
NAMED = "Ratcliff Obershelp"
LONG = "send an event to a web server"
TABLE = "stdlib_function"
DOCUMENTS = "stdlib_module"
#: What is embedded; and what is embedded before the change, where there is no second encoder.
TEXT = Source.template("{module}.{name}: {summary}")
SHORT_TEXT = Source.of("summary")
COLUMN, REPLACED = "embedding_l6", "embedding"
TOPICS = 12
LIMIT = 5


class Columns:
    """A documented function, method or class of Python's standard library."""

    id: Mapped[int] = mapped_column(primary_key=True)
    module: Mapped[str]
    name: Mapped[str]
    signature: Mapped[str]
    summary: Mapped[str]
    docstring: Mapped[str]


def function_class(
    column: str, encoder: str, source: Source = TEXT, *, replaces: str | None = None
) -> Any:
    """The mapped class as one version of an application declares it, with metadata of its own."""

    class Base(DeclarativeBase):
        pass

    attributes = {
        "__tablename__": TABLE,
        "__table_args__": (
            hnsw_index(f"{TABLE}_{column}", column),
            text_index(f"{TABLE}_words", "words"),
        ),
        column: embedding_column(
            encoder, source=source, dimensions=384, nullable=True, replaces=replaces
        ),
        "words": text_column("name", "docstring"),
    }
    make: Any = type(Base)
    return make("Function", (Columns, Base), attributes)


def demo(
    question: Annotated[
        str | None, typer.Argument(help="What to look for; without it, a tour.")
    ] = None,
    database: common.DatabaseOption = None,
    explore: common.ExploreOption = False,
) -> None:
    """A tour on Python's standard library: search, passages, topics, a change of encoder.

    Its docstrings are embedded and stored: some four thousand texts. With a question it answers
    that alone, and has to embed only the first time.

    [b]sbert-pg demo[/]
    [b]sbert-pg demo "read a zip file without unpacking it"[/]
    [b]sbert-pg demo --explore[/]
    """
    # What is cut of a long text is the point of one of the steps, and no news there.
    common.prepare(None, "error")
    with common.database(database, variables=False) as engine:
        if explore:
            _explore(engine)
            return
        if question is None:
            tour(engine)
            return
        _print_answers(engine, prepared(engine), question, LIMIT)
    _print_statements(question, LIMIT)


def tour(engine: sa.Engine) -> None:
    """Show everything once, from empty tables."""
    started = time.perf_counter()
    two = use_old_encoder()
    old = (
        function_class(REPLACED, OLD_ENCODER)
        if two
        else function_class(REPLACED, NEW_ENCODER, SHORT_TEXT)
    )
    new = function_class(COLUMN, NEW_ENCODER, replaces=REPLACED)
    entries = searchable()
    _fill(engine, old, entries)
    _title("Search", "the nearest in meaning")
    for text in QUESTIONS:
        _print_answers(engine, old, text, 3)
    _words_and_meaning(engine, old)
    _passages(engine, entries)
    _topics(engine, old)
    _title(
        "A change of encoder, while questions go on being answered",
        f"{OLD_ENCODER} -> {NEW_ENCODER}"
        if two
        else f"{OLD_ENCODER} cannot be had here; so the text changes, from docstrings alone",
    )
    change_encoder(engine, old, new, QUESTIONS)
    common.note(f"The tour took {time.perf_counter() - started:.0f} s.")
    common.out.print(f'\nYour own question:  [b]{_command()} demo "how do I ..."[/]')


def _command() -> str:
    """What the user has to type: the name alone only where the shell would find this program."""
    here = Path(sys.argv[0])
    if here.name != "sbert-pg" or shutil.which("sbert-pg") == str(here.absolute()):
        return "sbert-pg"
    return os.path.relpath(here)


def prepared(engine: sa.Engine) -> Any:
    """The class with the new column, and its table: filled, unless it was left so before."""
    mapped = function_class(COLUMN, NEW_ENCODER)
    with engine.connect() as connection:
        names = system.stored_types(connection, TABLE)
    if COLUMN not in names or REPLACED in names:
        _fill(engine, mapped, searchable())
    return mapped


def _fill(engine: sa.Engine, mapped: Any, entries: list[Documented]) -> None:
    """Make the table and fill it, then index it: on full tables that takes a fraction of the time.

    All in one transaction: interrupted, it leaves what was there before.
    """
    from sbert_pg import catalog
    from sbert_pg.loading import load

    table = cast("sa.Table", mapped.__table__)
    with engine.begin() as connection:
        catalog.upgrade(connection)
        _drop(connection)
        common.note(f"Embedding {len(entries):,} docstrings of Python's standard library.")
        connection.execute(sa.schema.CreateTable(table))
        catalog.bind(connection, table.c[embedding_of(mapped).key])
        started = time.perf_counter()
        with bar() as advance:
            show = partial(advance, "encoding and writing", total=len(entries))
            rows = ({**entry._asdict(), "summary": entry.summary} for entry in entries)
            load(connection, table, rows, progress=show)
            seconds = time.perf_counter() - started
            for index in table.indexes:
                advance(f"building {index.name}")
                connection.execute(sa.schema.CreateIndex(index))
        # Statistics for the planner; elsewhere autovacuum gathers them within a minute.
        connection.execute(sa.text("ANALYZE stdlib_function"))
        common.note(
            f"Embedded and stored in {seconds:.1f} s ({len(entries) / seconds:,.0f} texts/s), "
            f"indexed in {time.perf_counter() - started - seconds:.1f} s."
        )


def _drop(connection: sa.Connection) -> None:
    clusters = [f"{TABLE}_cluster{end}" for end in ("_assignment", "", "_run")]
    for name in (*clusters, f"{DOCUMENTS}_passage", DOCUMENTS, TABLE):
        connection.execute(sa.schema.DropTable(sa.Table(name, sa.MetaData()), if_exists=True))


def ask(engine: sa.Engine, mapped: Any, question: str, limit: int) -> tuple[list[Any], float]:
    """The nearest functions with their similarities, and the seconds of encoding and search."""
    column = embedding_of(mapped)
    with Session(engine) as session:
        session.execute(nearest(column, question, limit=limit))  # connects, loads the encoder
        session.rollback()
        # A trailing blank makes another text of it, so that the question is encoded while timed.
        again = nearest(column, question + " ", limit=limit)
        started = time.perf_counter()
        answers: list[Any] = list(session.execute(again))
        return answers, time.perf_counter() - started


def _words_and_meaning(engine: sa.Engine, mapped: Any) -> None:
    """One question to both arms and their fusion, side by side."""
    from sbert_pg.search import hybrid, matching

    _title("Words and meaning", "a name that vectors do not know, and BM25 in plain SQL does")
    column = embedding_of(mapped)
    statements = {
        "meaning": nearest(column, NAMED, limit=3),
        "words": matching(mapped.words, NAMED, limit=3),
        "both": hybrid(column, mapped.words, NAMED, limit=3),
    }
    with Session(engine) as session:
        answers = {
            name: [f"{row[0].module}.{row[0].name}" for row in session.execute(statement)]
            for name, statement in statements.items()
        }
    most = max(map(len, answers.values()))
    padded = [rows + [""] * (most - len(rows)) for rows in answers.values()]
    common.print_table(list(answers), list(zip(*padded, strict=True)), title=f"[bold]{NAMED}[/]")


def _passages(engine: sa.Engine, entries: list[Documented]) -> None:
    """A long document that is found by one of its passages, and where it would be without."""
    from sbert_pg import catalog
    from sbert_pg.freshness import backfill
    from sbert_pg.passages import passages_of

    class Base(DeclarativeBase):
        pass

    class Module(Base):
        __tablename__ = DOCUMENTS

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        text: Mapped[str]
        passages = passages_of(NEW_ENCODER, source="text", heading="name")

    texts = documents(entries)
    with engine.begin() as connection:
        catalog.create_all(connection, Base.metadata)
        connection.execute(sa.insert(Module), [{"name": n, "text": t} for n, t in texts.items()])
    mapped: Any = Module
    whole = mapped.passages_embedding
    with bar() as advance:
        advance(f"cutting and embedding {len(texts)} long documents")
        backfill(engine, cast("sa.Column[Any]", whole.expression))
    _title("A long document by its passage", f"the documentation of {len(texts)} modules")
    with Session(engine) as session:
        nearest_row: Any = session.execute(nearest(Module.passages, LONG, limit=1)).one()
        document, passage = nearest_row[0], nearest_row[1]
        ranked = [row[0].id for row in session.execute(nearest(whole, LONG))]
        count = session.scalar(sa.select(sa.func.count()).select_from(type(passage)))
        text = " ".join(str(passage.text).split())
        place = ranked.index(document.id) + 1
        common.out.print(
            f"[bold]{LONG}[/]\n"
            f"{document.name}, a text of {len(document.text):,} characters; in it, one of "
            f"{count:,} passages, characters {passage.start:,} to {passage.stop:,}:\n"
            f"  [bold]{escape(str(passage.heading))}[/]\n  {escape(text[:300])}\n"
            f"By one vector for the whole text, cut at 256 tokens, it is number {place} of "
            f"{len(texts)}."
        )


def _topics(engine: sa.Engine, mapped: Any, topics: Clustering | None = None) -> None:
    """Clusters of everything, with their keywords."""
    try:
        from sbert_pg.clustering import KMeans, cluster, clusters_of
    except ImportError:
        common.note("Topics are left out: pip install 'sbert-pg[clustering]' brings them.")
        return
    topics = topics or clusters_of(embedding_of(mapped))
    tables = [t for name, t in mapped.metadata.tables.items() if name != TABLE]
    with engine.begin() as connection:
        mapped.metadata.create_all(connection, tables=tables)
    started = time.perf_counter()
    with bar() as advance:
        run = cluster(engine, topics, KMeans(TOPICS), seed=0, progress=advance)
    _title(
        "Topics of the standard library",
        f"{run.n_clusters} clusters of {run.rows:,} rows in {time.perf_counter() - started:.1f} s",
    )
    with Session(engine) as session:
        rows = [
            [each.size, each.label, f"{each.exemplar.module}.{each.exemplar.name}"]
            for each in session.scalars(topics.clusters())
        ]
    common.print_table(["rows", "keywords", "typical"], rows)


def _explore(engine: sa.Engine) -> None:
    """The pages of the demo's tables, with topics and their map."""
    import webbrowser

    from sbert_pg.cli.serve import show_pages
    from sbert_pg.clustering import clusters_of, store_map

    mapped = prepared(engine)
    topics = clusters_of(embedding_of(mapped))
    with engine.connect() as connection:
        there = sa.inspect(connection).has_table(topics.run_table.name)
        current = there and connection.execute(topics.current_run()).first()
    if not current:
        _topics(engine, mapped, topics)
        common.note("Placing the rows on a map.")
        with engine.begin() as connection:
            store_map(connection, topics)
    show_pages(engine, [], opened=webbrowser.open)


def _title(text: str, more: str) -> None:
    common.out.print(f"\n[bold]{text}[/]  [dim]{escape(more)}[/]", highlight=False)


def _print_answers(engine: sa.Engine, mapped: Any, question: str, limit: int) -> None:
    answers, seconds = ask(engine, mapped, question, limit)
    common.print_table(
        ["similarity", "function", "documentation"],
        [
            [round(similarity, 3), f"{f.module}.{f.name}", f.docstring.splitlines()[0][:76]]
            for f, similarity in answers
        ],
        title=f"[bold]{question}[/]  [dim]{seconds * 1000:.1f} ms, encoding included[/]",
    )


def _print_statements(question: str, limit: int) -> None:
    from rich.syntax import Syntax  # and Pygments with it

    orm = f'session.execute(nearest(Function.{COLUMN}, "{question}", limit={limit}))'
    code = Syntax(orm, "python", word_wrap=True)
    common.out.print(Panel(code, title="the same with SQLAlchemy"))
    sql = (
        f"SELECT module, name, 1 - ({COLUMN} <=> :question) AS similarity\n"
        f"FROM {TABLE}\n"
        f"ORDER BY {COLUMN} <=> :question LIMIT {limit};"
    )
    common.out.print(Panel(Syntax(sql, "sql"), title="the same in SQL, :question being its vector"))
