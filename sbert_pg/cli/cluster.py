"""``cluster``: topics of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import sqlalchemy as sa
import typer
from sqlalchemy.orm import registry

from sbert_pg import clustering as lib
from sbert_pg.cli import clusters as reading
from sbert_pg.cli import common
from sbert_pg.cli.tables import embedding_of, table_of
from sbert_pg.clustering.declaration import declared_clusterings
from sbert_pg.errors import ClusteringError, DeclarationError

AlgorithmName = Literal["kmeans", "hdbscan", "communities", "agglomerative"]

TableArgument = Annotated[str, typer.Argument(help="Table, or schema.table.")]
ColumnOption = Annotated[
    str | None, typer.Option(help="Vector column, where there are several.", show_default=False)
]
WhereOption = Annotated[
    str | None,
    typer.Option(help="Rows that take part, in SQL, as in \"lang = 'en'\".", show_default=False),
]

SeedOption = Annotated[
    int, typer.Option(help="Seed of everything random; the same seed gives the same result.")
]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, help="Lines to show, at most.")]

commands = typer.Typer(
    name="cluster",
    help="Topics of a table: runs, clusters and assignments as rows of tables.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands)


@commands.command()
def run(
    table: TableArgument,
    database: common.DatabaseOption = None,
    column: ColumnOption = None,
    app: common.AppOption = None,
    algorithm: Annotated[
        AlgorithmName, typer.Option("--algorithm", "-a", help="How clusters are found.")
    ] = "kmeans",
    clusters: Annotated[
        str,
        typer.Option("--clusters", "-k", help="k-means: a number, several (10,20,40), or auto."),
    ] = "auto",
    method: Annotated[
        Literal["auto", "memory", "database", "mini-batch"],
        typer.Option(help="k-means: where it is computed."),
    ] = "auto",
    min_size: Annotated[int, typer.Option(min=1, help="Least rows of a dense cluster.")] = 10,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="communities: least similarity (0.75); agglomerative: largest distance (0.6).",
            show_default=False,
        ),
    ] = None,
    where: WhereOption = None,
    seed: SeedOption = 0,
    keywords: Annotated[
        bool, typer.Option(help="Find keywords, and label clusters by them.")
    ] = True,
    create: Annotated[
        bool, typer.Option("--create", help="Create the tables of the clustering if need be.")
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """Cluster the rows of a table and make the result the current one.

    [b]sbert-pg cluster run article --create[/]
    [b]sbert-pg cluster run article -k 50[/]
    [b]sbert-pg cluster run article -a hdbscan --min-size 20[/]
    """
    chosen = _algorithm(algorithm, clusters, method, min_size, threshold)
    with common.database(database) as engine:
        topics = _clustering(engine, table, column, app, create=create)
        with _progress() as progress:
            made = lib.cluster(
                engine,
                topics,
                chosen,
                seed=seed,
                where=criterion_of(where),
                keywords=keywords,
                progress=progress,
            )
        found = reading.clusters(engine, topics)
    if json:
        common.print_json({"run": reading.plain(made), "clusters": found})
        return
    common.note(
        f"Run {made.id}: {made.n_clusters} clusters of {made.rows:,} rows, "
        f"{made.outliers:,} outliers, by {made.algorithm}."
    )
    reading.print_clusters(found)


@commands.command()
def show(
    table: TableArgument,
    number: Annotated[
        int | None, typer.Argument(help="Show the rows of this cluster.", show_default=False)
    ] = None,
    database: common.DatabaseOption = None,
    column: ColumnOption = None,
    app: common.AppOption = None,
    runs: Annotated[bool, typer.Option("--runs", help="Show the runs instead.")] = False,
    limit: LimitOption = 20,
    json: common.JsonOption = False,
) -> None:
    """Show the current clusters, the rows of one, or the runs.

    [b]sbert-pg cluster show article[/]
    [b]sbert-pg cluster show article 3[/]
    """
    with common.database(database) as engine:
        topics = _clustering(engine, table, column, app)
        if runs:
            lib.fail_lost_runs(engine, topics)
            found = reading.runs(engine, topics, limit)
        elif number is not None:
            found = reading.members(engine, topics, number, limit)
        else:
            found = reading.clusters(engine, topics, limit=None if json else limit)
    if json:
        common.print_json(found)
    elif runs or number is not None:
        common.print_table(list(found[0]) if found else [], [list(row.values()) for row in found])
    else:
        reading.print_clusters(found)


@commands.command()
def label(
    table: TableArgument,
    number: Annotated[int, typer.Argument(help="Number of a current cluster.")],
    name: Annotated[
        str | None, typer.Argument(help="Its name; leave it out to go back to keywords.")
    ] = None,
    database: common.DatabaseOption = None,
    column: ColumnOption = None,
    app: common.AppOption = None,
) -> None:
    """Name a cluster; later runs keep the name where the cluster matches.

    [b]sbert-pg cluster label article 3 "Refunds"[/]
    """
    with common.database(database) as engine:
        topics = _clustering(engine, table, column, app)
        with engine.begin() as connection:
            lib.name_cluster(connection, topics, number, name)
    common.note(f"Cluster {number} is called {name!r}." if name else f"Cluster {number}: keywords.")


@commands.command()
def assign(
    table: TableArgument,
    database: common.DatabaseOption = None,
    column: ColumnOption = None,
    app: common.AppOption = None,
    where: WhereOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 when it is time to run again.")
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """Place new and changed rows in the current clusters, and measure drift.

    [b]sbert-pg cluster assign article[/]
    """
    with common.database(database) as engine:
        topics = _clustering(engine, table, column, app)
        with engine.begin() as connection:
            done = lib.assign(connection, topics, where=criterion_of(where))
            drift = lib.drift(connection, topics, where=criterion_of(where))
    if json:
        common.print_json({**asdict(done), "drift": asdict(drift)})
    else:
        common.note(f"{done.added:,} added, {done.changed:,} changed, {done.removed:,} removed.")
        common.note(
            "It is time to run again: " + "; ".join(drift.reasons) + "."
            if drift.is_stale
            else f"The clustering still fits: {drift.far_share:.1%} of the rows are far from it."
        )
    if check and drift.is_stale:
        raise typer.Exit(common.EXIT_FAILED)


@commands.command("map")
def draw(
    table: TableArgument,
    file: Annotated[Path, typer.Argument(help="File to write: .html or .png.")],
    database: common.DatabaseOption = None,
    column: ColumnOption = None,
    app: common.AppOption = None,
    projection: Annotated[
        Literal["auto", "tsne", "umap", "pca"],
        typer.Option(help="How; auto is UMAP where umap-learn is installed, else t-SNE."),
    ] = "auto",
    rows: Annotated[int, typer.Option(min=3, help="Rows to show, at most.")] = 5_000,
    title: Annotated[
        str | None, typer.Option(help="Title of the map; its table by default.", show_default=False)
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Draw the rows in two dimensions, coloured by cluster.

    [b]sbert-pg cluster map article topics.html[/]
    [b]sbert-pg cluster map article topics.png --projection pca --rows 2000[/]
    """
    if file.suffix.lower() not in (".html", ".png"):
        raise DeclarationError(f"The map {str(file)!r} has to end in .html or .png.")
    with common.database(database) as engine:
        topics = _clustering(engine, table, column, app)
        with engine.connect() as connection:
            made = lib.cluster_map(
                connection, topics, rows=rows, projection=projection, title=title, seed=seed
            )
    if file.suffix.lower() == ".html":
        made.save_html(file)
    else:
        made.save_png(file)
    common.note(f"{len(made.texts):,} rows on {file}, by {made.projection}.")


@commands.command()
def switch(
    table: TableArgument,
    run_id: Annotated[int, typer.Argument(metavar="RUN", help="Number of a run that is done.")],
    database: common.DatabaseOption = None,
    column: ColumnOption = None,
    app: common.AppOption = None,
) -> None:
    """Make another run the current one, at once for every reader.

    [b]sbert-pg cluster switch article 12[/]
    """
    with common.database(database) as engine:
        topics = _clustering(engine, table, column, app)
        with engine.begin() as connection:
            lib.make_current(connection, topics, run_id)
    common.note(f"Run {run_id} is the current one.")


@commands.command()
def prune(
    table: TableArgument,
    database: common.DatabaseOption = None,
    column: ColumnOption = None,
    app: common.AppOption = None,
    keep: Annotated[int, typer.Option(min=0, help="Runs to keep beside the current one.")] = 1,
) -> None:
    """Delete earlier runs with their clusters and assignments.

    [b]sbert-pg cluster prune article --keep 3[/]
    """
    with common.database(database) as engine:
        topics = _clustering(engine, table, column, app)
        with engine.begin() as connection:
            deleted = lib.prune(connection, topics, keep=keep)
    common.note(f"{deleted} runs deleted.")


@commands.command()
def views(
    table: TableArgument,
    database: common.DatabaseOption = None,
    column: ColumnOption = None,
    app: common.AppOption = None,
    create: Annotated[
        bool, typer.Option("--create", help="Create them, instead of printing their SQL.")
    ] = False,
) -> None:
    """Print or create views and functions for readers in SQL.

    [b]sbert-pg cluster views article[/]
    [b]sbert-pg cluster views article --create[/]
    """
    with common.database(database) as engine:
        topics = _clustering(engine, table, column, app)
        statements = list(lib.ClusterViews.of(topics, engine.dialect).create())
        if create:
            with engine.begin() as connection:
                for statement in statements:
                    connection.execute(statement)
    if not create:
        for statement in statements:
            typer.echo(f"{statement.compile(dialect=engine.dialect)};\n")


def _clustering(
    engine: sa.Engine, table: str, column: str | None, app: str | None, *, create: bool = False
) -> lib.Clustering:
    """The clustering that the application declares, or the default one of a table."""
    if app is not None:
        schema, _, name = table.rpartition(".")
        declared = [
            topics
            for topics in declared_clusterings(common.load_metadata(app))
            if topics.rows.name == name and topics.rows.schema == (schema or topics.rows.schema)
        ]
        own = [topics for topics in declared if column in (None, topics.column.name)]
        if len(own or declared) != 1:
            raise DeclarationError(
                f"--app {app!r} declares {len(declared)} clusterings of {table!r}; declare "
                "one with clusters_of(), or name its column with --column."
            )
        # A column that has none of its own shares the tables, as the next encoder's does.
        topics = own[0] if own else declared[0].on_column(str(column))
    else:
        topics = _default_clustering(engine, table, column)
    with engine.begin() as connection:
        missing = [
            made
            for made in (topics.run_table, topics.cluster_table, topics.assignment_table)
            if not sa.inspect(connection).has_table(made.name, schema=made.schema)
        ]
        if missing and not create:
            raise ClusteringError(
                f"The table {missing[0].fullname!r} is not in this database. Declare the "
                "clustering with clusters_of() and migrate, or create its tables with "
                f"'sbert-pg cluster run {table} --create'."
            )
        for made in missing:
            made.create(connection)
    return topics


def _default_clustering(engine: sa.Engine, table: str, column: str | None) -> lib.Clustering:
    with engine.connect() as connection:
        target = table_of(connection, table)
    vectors = embedding_of(target, column)
    row = type("Row", (), {})
    registry(metadata=target.metadata).map_imperatively(row, target)
    return lib.clusters_of(getattr(row, vectors.key), attribute="sbert_pg_clusters")


def _algorithm(
    name: AlgorithmName, clusters: str, method: Any, min_size: int, threshold: float | None
) -> Any:
    if name == "hdbscan":
        return lib.HDBSCAN(min_cluster_size=min_size)
    if name == "communities":
        return lib.Communities(0.75 if threshold is None else threshold, min_size)
    if name == "agglomerative":
        return lib.Agglomerative(0.6 if threshold is None else threshold)
    if clusters == "auto":
        return lib.KMeans(method=method)
    try:
        numbers = [int(number) for number in clusters.split(",")]
    except ValueError:
        raise DeclarationError(
            f"--clusters is {clusters!r}; give a number, several as in 10,20,40, or auto."
        ) from None
    return lib.KMeans(numbers[0] if len(numbers) == 1 else numbers, method=method)


def criterion_of(where: str | None) -> Any:
    """A criterion given as SQL."""
    return None if where is None else sa.text(f"({where})")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    with common.progress_bar() as bar:
        task = bar.add_task("reading", total=None, rate="")

        def advance(stage: str, done: int, total: int | None) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield advance
