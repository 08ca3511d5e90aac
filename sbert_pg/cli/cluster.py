"""``cluster``: topics of a table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import sqlalchemy as sa
import typer
from sqlalchemy.orm import Session, registry

from sbert_pg import clustering as lib
from sbert_pg.cli import common
from sbert_pg.cli.target import beginnings, column_of
from sbert_pg.errors import ClusteringError, DeclarationError
from sbert_pg.progress import bar
from sbert_pg.types.vector import VectorType

AlgorithmName = Literal["kmeans", "hdbscan", "communities", "agglomerative"]

JSON_RUN = (
    "id", "column_name", "encoder", "algorithm", "parameters", "state", "rows", "n_clusters",
    "outliers", "pending", "warnings", "inertia", "score", "curve", "mean_distance", "started_at",
    "finished_at",
)  # fmt: skip
SHOWN_RUN = (
    "id", "column_name", "algorithm", "state", "is_current", "rows", "n_clusters", "outliers",
    "score", "started_at", "error",
)  # fmt: skip


def run(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    app: common.AppOption = None,
    algorithm: Annotated[
        AlgorithmName, typer.Option("--algorithm", "-a", help="How clusters are found.")
    ] = "kmeans",
    clusters: Annotated[
        str, typer.Option(help="k-means: a number, several (10,20,40), or auto.")
    ] = "auto",
    where: common.WhereOption = None,
    keep: Annotated[
        int | None, typer.Option(min=0, help="Delete earlier runs but so many.")
    ] = None,
    create: common.CreateOption = False,
    json: common.JsonOption = False,
) -> None:
    """Cluster the rows of a table and make the result the current one.

    cluster() in Python takes each algorithm's own settings, and a seed.

    [b]sbert-pg cluster run article --create[/]
    [b]sbert-pg cluster run article --clusters 50[/]
    [b]sbert-pg cluster run article -a hdbscan --keep 5[/]
    """
    chosen = _algorithm(algorithm, clusters)
    with common.database(database) as engine:
        topics = _clustering(engine, target, app, create=create)
        with bar() as advance:
            done = lib.cluster(
                engine, topics, chosen, where=common.criterion(where), progress=advance
            )
        if keep is not None:
            with engine.begin() as connection:
                lib.prune(connection, topics, keep=keep)
        shown = _clusters(engine, topics)
    if json:
        facts = {name: getattr(done, name) for name in JSON_RUN}
        common.print_json({"run": facts, "clusters": shown})
        return
    sample = done.parameters.get("sample")
    begun = f", begun from a sample of {sample:,}" if sample else ""
    common.note(
        f"Run {done.id}: {done.n_clusters} clusters of {done.rows:,} rows, "
        f"{done.outliers:,} outliers, by {done.algorithm}{begun}."
    )
    for warning in done.warnings:
        common.note(f"Note: {warning}.")
    _print_clusters(shown)


def show(
    target: common.TargetArgument,
    number: Annotated[int | None, typer.Argument(help="Show the rows of this cluster.")] = None,
    database: common.DatabaseOption = None,
    app: common.AppOption = None,
    runs: Annotated[bool, typer.Option("--runs", help="Show the runs instead.")] = False,
    label: Annotated[
        str | None,
        typer.Option(
            help="Call this cluster so; later runs keep the name where it matches. An empty one "
            "takes it back: keywords."
        ),
    ] = None,
    limit: common.LimitOption = 20,
    json: common.JsonOption = False,
) -> None:
    """Show the current clusters, the rows of one, or the runs; or name a cluster.

    [b]sbert-pg cluster show article[/]
    [b]sbert-pg cluster show article 3[/]
    [b]sbert-pg cluster show article 3 --label "Refunds"[/]
    """
    with common.database(database) as engine:
        topics = _clustering(engine, target, app)
        if label is not None:
            _name(engine, topics, number, label)
        if runs:
            lib.fail_lost_runs(engine, topics)
            columns = topics.run_table.c
            latest = sa.select(*(columns[name] for name in SHOWN_RUN)).order_by(columns.id.desc())
            with engine.connect() as connection:
                shown = [dict(row) for row in connection.execute(latest.limit(limit)).mappings()]
        elif number is not None:
            shown = _members(engine, topics, number, limit)
        else:
            shown = _clusters(engine, topics, limit=None if json else limit)
    if json or runs or number is not None:
        common.show_records(shown, json)
    else:
        _print_clusters(shown)


def assign(
    target: common.TargetArgument,
    database: common.DatabaseOption = None,
    app: common.AppOption = None,
    where: common.WhereOption = None,
    check: common.CheckOption = False,
    json: common.JsonOption = False,
) -> None:
    """Place new and changed rows in the current clusters, and measure drift.

    With --check it exits with 1 when it is time to run again.

    [b]sbert-pg cluster assign article --check[/]
    """
    with common.database(database) as engine:
        topics = _clustering(engine, target, app)
        with bar("assigning") as advance, engine.begin() as connection:
            assigned = lib.assign(connection, topics, where=common.criterion(where))
            advance("measuring drift")
            drift = lib.drift(connection, topics, where=common.criterion(where))
    if json:
        common.print_json({**asdict(assigned), "drift": asdict(drift)})
    else:
        counts = ", ".join(f"{number:,} {word}" for word, number in asdict(assigned).items())
        common.note(f"{counts}.")
        common.note(
            "It is time to run again: " + "; ".join(drift.reasons) + "."
            if drift.is_stale
            else f"The clustering still fits: {drift.far_share:.1%} of the rows are far from it."
        )
    common.fail_if(check and drift.is_stale)


def map_(
    target: common.TargetArgument,
    file: Annotated[
        Path | None,
        typer.Argument(
            help="File to write: .html or .png. Without it, places are stored beside the clusters, "
            "where 'sbert-pg serve --explore' reads them."
        ),
    ] = None,
    database: common.DatabaseOption = None,
    app: common.AppOption = None,
) -> None:
    """Place the rows in two dimensions, coloured by cluster.

    By UMAP where umap-learn is installed, else t-SNE; cluster_map() in Python takes others. On a
    file a sample of 5,000 rows of a larger table; stored, up to 100,000.

    [b]sbert-pg cluster map article[/]
    [b]sbert-pg cluster map article topics.html[/]
    """
    if file is not None and file.suffix.lower() not in (".html", ".png"):
        raise DeclarationError(f"The map {str(file)!r} has to end in .html or .png.")
    with common.database(database) as engine:
        topics = _clustering(engine, target, app)
        if file is None:
            with bar("placing rows"), engine.begin() as connection:
                placed = lib.store_map(connection, topics)
            common.note(f"{placed:,} rows have their place; 'sbert-pg serve --explore' shows them.")
            return
        with bar("placing rows"), engine.connect() as connection:
            plane = lib.cluster_map(connection, topics)
    if file.suffix.lower() == ".html":
        plane.save_html(file)
    else:
        plane.save_png(file)
    common.note(f"{len(plane.texts):,} rows on {file}, by {plane.projection}.")


def _clustering(
    engine: sa.Engine, target: str, app: str | None, *, create: bool = False
) -> lib.Clustering:
    """The clustering that the application declares, or the default one of a bound column."""
    topics = (
        clustering_on(column_of(engine, target).column) if app is None else _declared(app, target)
    )
    with engine.begin() as connection:
        missing = [
            table
            for table in (topics.run_table, topics.cluster_table, topics.assignment_table)
            if not sa.inspect(connection).has_table(table.name, schema=table.schema)
        ]
        if missing and not create:
            raise ClusteringError(
                f"The table {missing[0].fullname!r} is not in this database. Declare the "
                "clustering with clusters_of() and migrate, or create its tables with "
                f"'sbert-pg cluster run {target} --create'."
            )
        for table in missing:
            table.create(connection)
    return topics


def clustering_on(column: sa.Column[Any]) -> lib.Clustering:
    """The clustering of a column of a reflected table, by its default names."""
    row = type("Row", (), {})
    registry(metadata=column.table.metadata).map_imperatively(row, column.table)
    return lib.clusters_of(getattr(row, column.key), attribute="sbert_pg_clusters")


def _declared(app: str, target: str) -> lib.Clustering:
    declared = lib.declared_clusterings(common.load_metadata(app))
    of_table = [topics for topics in declared if target in (topics.rows.name, topics.rows.fullname)]
    # A column without a clustering shares the tables, as the next encoder's does.
    of_column = {
        topics.column is column: topics.on(column.name)
        for topics in declared
        for column in topics.rows.c
        if isinstance(column.type, VectorType)
        and target in (f"{topics.rows.name}.{column.name}", f"{topics.rows.fullname}.{column.name}")
    }
    if of_column:
        return of_column.get(True) or of_column[False]
    if len(of_table) != 1:
        raise DeclarationError(
            f"--app {app!r} declares {len(of_table)} clusterings of {target!r}; declare one with "
            "clusters_of(), or name its column as table.column, by the schema that is declared. "
            "Where tenants have schemas, name none and set PGOPTIONS='-csearch_path=TENANT,public'."
        )
    return of_table[0]


def _algorithm(name: AlgorithmName, clusters: str) -> Any:
    others: Any = (lib.HDBSCAN, lib.Communities, lib.Agglomerative)
    for algorithm in others:
        if algorithm.name == name:
            return algorithm()
    if clusters == "auto":
        return lib.KMeans()
    try:
        numbers = [int(number) for number in clusters.split(",")]
    except ValueError:
        raise DeclarationError(
            f"--clusters is {clusters!r}; give a number, several as in 10,20,40, or auto."
        ) from None
    return lib.KMeans(numbers[0] if len(numbers) == 1 else numbers)


def _name(engine: sa.Engine, topics: lib.Clustering, number: int | None, label: str) -> None:
    if number is None:
        raise DeclarationError("--label names one cluster: give its number after the table.")
    with engine.begin() as connection:
        lib.name_cluster(connection, topics, number, label or None)
    common.note(f"Cluster {number} is called {label or 'by its keywords'}.")


def _clusters(
    engine: sa.Engine, topics: lib.Clustering, limit: int | None = None
) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        clusters = Session(connection).scalars(topics.clusters().limit(limit)).all()
        exemplars = [topics.exemplar_of(cluster) for cluster in clusters]
        texts = beginnings(connection, topics.rows, topics.text, exemplars)
    return [
        {
            "number": cluster.number,
            "label": cluster.label,
            "size": cluster.size,
            "cohesion": None if cluster.cohesion is None else round(cluster.cohesion, 3),
            "keywords": cluster.keywords,
            "exemplar": texts.get(key),
        }
        for cluster, key in zip(clusters, exemplars, strict=True)
    ]


def _members(
    engine: sa.Engine, topics: lib.Clustering, number: int, limit: int
) -> list[dict[str, Any]]:
    statement = topics.members(number).limit(limit)
    statement = statement.with_only_columns(*topics.keys, topics.Assignment.distance)
    with engine.connect() as connection:
        rows: Any = connection.execute(statement).all()
        texts = beginnings(connection, topics.rows, topics.text, [tuple(row[:-1]) for row in rows])
    if not rows:
        raise ClusteringError(
            f"There is no current cluster {number} with rows; 'sbert-pg cluster show' lists them."
        )
    names = [key.name for key in topics.keys]
    return [
        dict(zip(names, key, strict=True))
        | {"distance": round(float(distance), 4), "text": texts.get(tuple(key))}
        for *key, distance in rows
    ]


def _print_clusters(shown: list[dict[str, Any]]) -> None:
    if not shown:
        common.note("There are no current clusters; 'sbert-pg cluster run' makes them.")
        return
    rows = [{**row, "keywords": ", ".join(row["keywords"][:6])} for row in shown]
    common.show_records(rows, False)
