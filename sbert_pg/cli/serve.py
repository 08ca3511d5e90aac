"""``serve``: embeddings and searches for other programs, and pages for people.

``serve-postgres`` gives them the embedded database.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import sqlalchemy as sa
import typer

from sbert_pg import catalog
from sbert_pg.cli import common
from sbert_pg.cli.target import passages_attribute, queries_of, resolve, text_column_if_any
from sbert_pg.errors import DeclarationError
from sbert_pg.registry import get_encoder
from sbert_pg.row_vectors import embedding_columns
from sbert_pg.search.target import readable_columns

if TYPE_CHECKING:
    from sbert_pg.clustering import Clustering
    from sbert_pg.embedded import EmbeddedServer
    from sbert_pg.serving.exposed import Exposed

TablesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TABLE[:COLUMNS]]...",
        help="Tables to search, with the columns that are shown, as in article:id,title; all "
        "columns but vectors by default. article.embedding where there are several.",
    ),
]


ADDRESS = "127.0.0.1:8080"


def serve(
    tables: TablesArgument = None,
    database: common.DatabaseOption = None,
    app: common.AppOption = None,
    encoder: common.EncodersOption = None,
    reranker: Annotated[
        list[str] | None,
        typer.Option("--reranker", help="A cross-encoder, by name or directory."),
    ] = None,
    http: common.HttpOption = ADDRESS,
    token: common.TokenOption = None,
    explore: common.ExploreOption = False,
    pairs: common.SomePairsOption = None,
    mcp: Annotated[
        bool,
        typer.Option(
            "--mcp",
            help="Serve a language model instead of HTTP: searches of tables, on standard input "
            "and output.",
        ),
    ] = False,
) -> None:
    """Serve embeddings as OpenAI's API does, reranking, and searches of tables; or pages, or MCP.

    Until it is stopped; SIGTERM or Ctrl-C finishes the requests under way. With --app MODULE:BASE
    it searches the tables with embeddings that the application declares; TABLE narrows that.
    --encoder and --reranker may be repeated.

    --explore shows a database in a browser: search, topics, map, change of encoder, health. All
    tables with embeddings, or those that are named, with the clusterings that MODULE:BASE declares;
    nothing is ever written. With --pairs a change of encoder is held against labelled questions.

    --mcp is for the configuration of Claude Desktop, Claude Code, Cursor and others: a server of
    the Model Context Protocol, read-only, with the tools search, similar, tables and status. It
    shows the columns that are listed, and nothing else.

    [b]sbert-pg serve --encoder all-MiniLM-L6-v2[/]
    [b]sbert-pg serve article:id,title,lang -d postgresql://localhost/shop[/]
    [b]sbert-pg serve --explore -d postgresql://reader@localhost/shop[/]
    [b]sbert-pg serve --mcp article:id,title,body -d postgresql://reader@localhost/shop[/]
    """
    listed, encoders, rerankers = list(tables or ()), list(encoder or ()), list(reranker or ())
    if pairs is not None and not explore:
        raise DeclarationError("--pairs are for the pages: add --explore.")
    if mcp:
        _serve_mcp(listed, database, app, [*encoders, *rerankers])
    elif explore:
        if encoders:
            raise DeclarationError("--explore shows tables: leave --encoder out.")
        from sbert_pg.encoder import Reranker

        metadata = common.prepare(app)
        more: dict[str, Any] = {"reranker": Reranker.load(rerankers[0])} if rerankers else {}
        with common.database(database, lasting=True) as engine:
            more["queries"] = queries_of(engine, pairs)
            show_pages(engine, listed, metadata, http, token, **more)
    else:
        _serve_http(listed, database, app, http, token, encoders, rerankers)


def _serve_http(
    tables: list[str],
    database: str | None,
    app: str | None,
    http: str | None,
    token: str | None,
    encoders: list[str],
    rerankers: list[str],
) -> None:
    from sbert_pg.encoder import Reranker
    from sbert_pg.serving.exposed import Shown
    from sbert_pg.serving.server import serving

    host, port = common.address_of(http or ADDRESS)
    metadata = common.prepare(app, usual="info")
    with ExitStack() as stack:
        names = tables or _declared(metadata)
        shown = None
        if names:
            engine = stack.enter_context(common.database(database, lasting=True))
            shown = Shown(engine, looking(names))
        declared = [t.encoder for t in shown.tables().values()] if shown else []
        loaded = {spec.name: get_encoder(spec) for spec in declared}
        loaded |= {name: get_encoder(name) for name in encoders}
        scorers = {name: Reranker.load(name) for name in rerankers}
        if not (served := [*loaded, *scorers]):
            raise DeclarationError(
                "There is nothing to serve; name an encoder with --encoder, a reranker with "
                "--reranker, or tables."
            )
        port = stack.enter_context(
            serving(loaded, shown, rerankers=scorers, host=host, port=port, token=token)
        )
        common.note(f"Serving {', '.join(served)} on http://{host}:{port}")
        stack.enter_context(common.stoppable()).wait()


def show_pages(
    engine: sa.Engine,
    targets: list[str],
    metadata: sa.MetaData | None = None,
    http: str | None = None,
    token: str | None = None,
    opened: Callable[[str], object] | None = None,
    **more: Any,
) -> None:
    """Serve the pages of some tables until the command is stopped; of all, if none is named.

    ``opened`` is given their address, as a browser's ``open`` is; ``more`` is for ``Explorer``.
    """
    from sbert_pg.cli.doctor import diagnose
    from sbert_pg.serving.explore import Explorer
    from sbert_pg.serving.exposed import Shown
    from sbert_pg.serving.server import serving

    host, port = common.address_of(http or ADDRESS)
    reading = engine.execution_options(postgresql_readonly=True)

    def look(connection: sa.Connection) -> list[Exposed]:
        return [_exposed(connection, name) for name in targets or _all_bound(connection)]

    explorer = Explorer(Shown(reading, look), _clusterings(metadata), diagnose, **more)
    with serving({}, None, host=host, port=port, token=token, views=explorer.views()) as bound:
        address = f"http://{host}:{bound}/explore"
        common.note(f"Open {address} in a browser; Ctrl-C ends it.")
        if opened is not None:
            opened(address)
        with common.stoppable() as stop:
            stop.wait()


def serve_postgres(
    data_dir: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="Directory of its data; your own for this program by default."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65_535,
            help="Port of 127.0.0.1, for tools that need a host; 0 takes a free one. Any program "
            "of this machine may then connect, as superuser.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Database, made if need be, with pgvector.")
    ] = common.EMBEDDED_DATABASE,
) -> None:
    """Run the embedded PostgreSQL for an application, until it is stopped; print its URL.

    [b]sbert-pg serve-postgres ./postgres --port 5433[/]
    """
    from sbert_pg.embedded import embedded_server

    with common.stoppable() as stop, embedded_server(data_dir) as server:
        server.ensure_database(name)
        common.note(f"It lacks the extensions {', '.join(server.lacking())}.")
        asyncio.run(_given(server, name, port, stop))


async def _given(
    server: EmbeddedServer, name: str, port: int | None, stop: threading.Event
) -> None:
    url = server.dsn(name)
    if port is not None:
        listener = await server.listen(port)
        url = f"postgresql://postgres@127.0.0.1:{listener.sockets[0].getsockname()[1]}/{name}"
    print(url, flush=True)
    await asyncio.to_thread(stop.wait)


def _serve_mcp(
    tables: Sequence[str], database: str | None, app: str | None, others: Sequence[str]
) -> None:
    from sbert_pg.serving.exposed import Shown
    from sbert_pg.serving.mcp import mcp_server

    if others:
        raise DeclarationError("--mcp searches tables: leave --encoder and --reranker out.")
    common.prepare(app)
    if not tables:
        raise DeclarationError("--mcp shows what is listed: name tables, as in article:id,title.")
    for target in tables:
        if not target.partition(":")[2]:
            raise DeclarationError(
                f"{target!r}: list the columns that a model may see, as in {target}:id,title."
            )
    with common.database(database, lasting=True) as engine:
        reading = engine.execution_options(postgresql_readonly=True)
        mcp_server(Shown(reading, looking(tables))).run()


def _all_bound(connection: sa.Connection) -> list[str]:
    """All embedding columns of a database, as targets, each as short as it can be."""
    bindings = catalog.all_bindings(connection)
    # What a change is filling comes last, and leaves the table's name to the column before it.
    bindings = sorted(bindings, key=lambda binding: (binding.replaces is not None, str(binding)))
    if not bindings:
        raise DeclarationError(
            "No embedding column is bound in this database whose table this role may read; "
            "'sbert-pg load TABLE FILE --create' makes a table with one, GRANT SELECT lets a role "
            "read it, and 'sbert-pg demo --explore' fills one to look at."
        )
    tables = [b.table for b in bindings if b.replaces is None]
    columns = [f"{b.table}.{b.column}" for b in bindings]
    targets = []
    for b, column in zip(bindings, columns, strict=True):
        name = column if columns.count(column) == 1 else str(b)
        targets.append(b.table if b.replaces is None and tables.count(b.table) == 1 else name)
    return targets


def _clusterings(
    metadata: sa.MetaData | None,
) -> Callable[[sa.Connection, Exposed], Clustering | None]:
    """The clustering of a table that has a current run: as declared, else by its default names."""
    from sbert_pg.cli.cluster import clustering_on
    from sbert_pg.clustering import declared_clusterings

    declared = declared_clusterings(metadata) if metadata is not None else []
    known = {(t.rows.schema, t.rows.name, t.column.name): t for t in declared}
    lock = threading.Lock()

    def of(connection: sa.Connection, exposed: Exposed) -> Clustering | None:
        column = exposed.embedding
        schema, own = column.table.schema, sa.inspect(connection).default_schema_name
        # What is declared without a schema is in that of the search path.
        named = (schema, None) if schema == own else (schema,)
        with lock:
            places = [(each, column.table.name, column.name) for each in named]
            topics = next((known[each] for each in places if each in known), None)
            topics = known[places[0]] = topics or clustering_on(column)
        table = topics.run_table
        there = sa.inspect(connection).has_table(table.name, schema=table.schema)
        return topics if there and connection.execute(topics.current_run()).first() else None

    return of


def _declared(metadata: sa.MetaData | None) -> list[str]:
    if metadata is None:
        return []
    columns = [embedding.column for embedding in embedding_columns(metadata)]
    if not columns:
        raise DeclarationError("The application declares no embedding columns.")
    tables = [column.table.fullname for column in columns]
    return [
        table if tables.count(table) == 1 else f"{table}.{column.name}"
        for table, column in zip(tables, columns, strict=True)
    ]


def looking(targets: Sequence[str]) -> Callable[[sa.Connection], list[Exposed]]:
    """What looks up the tables that a command line lists, each as ``TABLE[:COLUMNS]``."""
    return lambda connection: [_exposed(connection, target) for target in targets]


def _exposed(connection: sa.Connection, target: str) -> Exposed:
    from sbert_pg.serving.exposed import Exposed

    name, _, listed = target.partition(":")
    side = resolve(connection, name)
    known = [column.name for column in readable_columns(side.table)]
    columns = tuple(column.strip() for column in listed.split(",")) if listed else tuple(known)
    missing = [column for column in columns if column not in known]
    if missing:
        raise DeclarationError(
            f"{target!r}: {name} has no column {missing[0]!r} to show; there are "
            f"{', '.join(known)}."
        )
    cut = None if side.binding.source.passages is None else passages_attribute(connection, side)
    text = text_column_if_any(side.table)
    return Exposed(name, str(side.binding), side.spec, side.column, text, columns, cut)
