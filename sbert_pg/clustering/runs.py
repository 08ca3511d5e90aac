"""``cluster``: one run, from the rows to the switch; and what becomes of a run, killed ones too.

A run holds an advisory lock for as long as its transaction lives. A run whose state is ``running``
and whose lock is free has lost its process, and the next look at the runs marks it as failed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg import catalog, system
from sbert_pg.clustering.algorithms import Algorithm, KMeans, fit_in_memory
from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.keywords import StopWords, find_keywords
from sbert_pg.clustering.kmeans import need
from sbert_pg.clustering.out_of_core import fit_in_blocks, fit_in_database
from sbert_pg.clustering.placing import store_fit, store_in_database
from sbert_pg.clustering.rows import Criteria, RowSet, read_rows
from sbert_pg.clustering.summary import number_clusters, previous_run, summarize
from sbert_pg.clustering.tables import ClusterRun
from sbert_pg.errors import ClusteringError
from sbert_pg.progress import Advance
from sbert_pg.system import configure, require_engine

logger = logging.getLogger("sbert_pg.clustering")

#: Bytes that a run may take for vectors.
MAX_MEMORY = 2 << 30
#: What a row takes in memory beside its vector: its key, bounds, a label and a distance.
_BYTES_PER_ROW = 100
#: A run is poor where one of several clusters has a larger share of the clustered rows,
_DOMINANT = 0.75
#: or where a larger share of the rows is in none.
_UNCLUSTERED = 0.5
#: Longest error text that a run keeps.
_ERROR_LENGTH = 2_000
_LOST = "the process of this run ended before the run did"


def cluster(
    engine: sa.Engine,
    clustering: Clustering,
    algorithm: Algorithm | None = None,
    *,
    seed: int = 0,
    where: Criteria | None = None,
    follow: int | None = None,
    keywords: bool = True,
    text: sa.ColumnElement[str] | None = None,
    stop_words: StopWords = "english",
    make_current: bool = True,
    max_memory: int = MAX_MEMORY,
    progress: Advance | None = None,
) -> ClusterRun:
    """Cluster the rows of a table, and let readers see the result all at once.

    Vectors are read at one moment; rows that come later are for ``assign``, rows deleted meanwhile
    have no assignment. Rows without a vector take no part, nor, under cosine, do vectors of zeros.
    Rows whose vector is not that of their text now take part with the vector that they have; the
    run counts them (``pending``). What speaks against the result is in ``warnings``, and is logged.
    Of several concurrent runs the one that began last is current in the end.

    The run is recorded before it begins. If it fails, or its process is killed, the record says so
    (``state``), and nothing else of it is in the database. The transaction that writes the result
    is this function's own.

    Args:
        engine: a synchronous engine on psycopg 3.
        clustering: what is clustered, from ``clusters_of``.
        algorithm: ``KMeans()`` by default, which chooses the number of clusters.
        seed: seed of everything random; the same rows and seed give the same clusters.
        where: further criteria of the rows, beside the declared ones.
        follow: the run whose numbers and names matching clusters keep. By default the current run;
            for a column that has none yet, the current run of another column of the table.
        keywords: whether to find keywords and label clusters by them.
        text: the text of a row, for keywords; the source of an embedding column by default.
        stop_words: words that are not keywords, a collection; or ``"english"``, and then those of
            the texts' own language too.
        make_current: whether readers are to see this run.
        max_memory: bytes that vectors may take; see ``KMeans.method``.
        progress: called with the stage (``reading``, ``iterations``, ``writing`` and others), how
            much of it is done, and of how much, or ``None`` where that is not known.

    Returns:
        The run, detached from any session.

    Raises:
        ClusteringError: there are no rows; or they take more memory than ``max_memory`` and the
            algorithm has no form for that.
        DeclarationError: ``engine`` is none, or an asynchronous one.
        MissingExtraError: the extra ``clustering`` is not installed.
    """
    require_engine("cluster()", engine)
    algorithm = algorithm or KMeans()
    need("scipy.sparse", "compute clusters")
    values = {
        "column_name": clustering.column.name,
        **_encoder(engine, clustering),
        "algorithm": algorithm.name,
        "parameters": asdict(algorithm),
        "seed": seed,
        "filter": clustering.filter_text(where),
        "metric": clustering.metric,
    }
    rows = clustering.row_set(where)
    progress = progress or (lambda stage, done, total: None)
    with recorded_run(engine, clustering, values) as (work, run_id):
        pending = _pending(work, rows)
        fitted = _fit(work, clustering, rows, run_id, algorithm, seed, max_memory, progress)
        progress("summing up", 0, None)
        totals = summarize(work, clustering, run_id) | {"pending": pending}
        previous = previous_run(work, clustering) if follow is None else follow
        number_clusters(work, clustering, run_id, previous)
        if keywords and (text is not None or clustering.text is not None):
            progress("keywords", 0, None)
            find_keywords(work, clustering, run_id, text=text, stop_words=stop_words)
        largest = totals.pop("largest")
        results = {**fitted, **totals}
        warnings = _warnings(algorithm, results, largest)
        table = clustering.run_table
        ended = {"state": "done", "finished_at": sa.func.clock_timestamp(), "warnings": warnings}
        work.execute(sa.update(table).where(table.c.id == run_id).values(**results, **ended))
        if make_current:
            _switch(work, clustering, run_id, only_later=True)
    for warning in warnings:
        logger.warning("Run %s of %s: %s", run_id, clustering.column, warning)
    return run_of(engine, clustering, run_id)


def run_of(engine: sa.Engine, clustering: Clustering, run_id: int) -> ClusterRun:
    """A run by its number, detached from any session."""
    with Session(engine, expire_on_commit=False) as session:
        run = session.get(clustering.Run, run_id)
        if run is None:
            raise ClusteringError(f"There is no run {run_id} of {clustering.column}.")
        session.expunge(run)
        return run


def _encoder(engine: sa.Engine, clustering: Clustering) -> dict[str, str | None]:
    """Name and fingerprint of the column's encoder, as the catalog has it."""
    with engine.connect() as connection:
        bound = catalog.binding_of(connection, clustering.column)
    name = clustering.spec.name if clustering.spec is not None else None
    return {"encoder": name, "fingerprint": bound.fingerprint if bound is not None else None}


def _pending(connection: sa.Connection, rows: RowSet) -> int:
    """How many of the rows have a vector that is not that of their text now."""
    bound = catalog.binding_of(connection, rows.column)
    if bound is None:
        return 0
    return rows.only(sa.not_(bound.is_fresh(rows.table))).count(connection)


def _fit(
    work: sa.Connection,
    clustering: Clustering,
    rows: RowSet,
    run_id: int,
    algorithm: Algorithm,
    seed: int,
    max_memory: int,
    progress: Advance,
) -> dict[str, Any]:
    """Compute and store; return what the run records of it."""
    total = rows.count(work)
    if total == 0:
        raise ClusteringError(
            f"There is nothing to cluster: no row of {clustering.rows.fullname} has a vector in "
            f"{clustering.column.name!r} and meets the filter. 'sbert-pg status' tells whether "
            "vectors are still to be made."
        )
    method = _method(algorithm, rows, total, max_memory)
    if method == "database":
        assert isinstance(algorithm, KMeans)
        centroids, iterations = fit_in_database(work, rows, algorithm, seed, total, progress)
        store_in_database(work, clustering, rows, run_id, centroids)
        details = {"method": method, "iterations": iterations}
        return {"parameters": asdict(algorithm) | details}
    if method == "blocks":
        assert isinstance(algorithm, KMeans)
        keys, fit = fit_in_blocks(work, rows, algorithm, seed, total, progress)
    else:
        progress("reading", 0, total)
        keys, vectors = read_rows(work, rows)
        progress("reading", len(keys), len(keys))
        fit = fit_in_memory(
            vectors,
            algorithm,
            seed=seed,
            spherical=rows.spherical,
            max_memory=max_memory,
            progress=progress,
        )
        progress("writing", 0, len(keys))
    store_fit(work, clustering, run_id, keys, fit)
    parameters = asdict(algorithm) | fit.details
    return {"parameters": parameters, "score": fit.score, "curve": fit.curve}


def _method(algorithm: Algorithm, rows: RowSet, total: int, max_memory: int) -> str:
    needed = total * (4 * rows.dimensions + _BYTES_PER_ROW)
    if isinstance(algorithm, KMeans) and algorithm.method != "auto":
        return algorithm.method
    if needed <= max_memory:
        return "memory"
    if isinstance(algorithm, KMeans):
        logger.info(
            "%s vectors take %.1f GB, and max_memory is %.1f GB: k-means begins from a sample, "
            "which also decides the number of clusters, and reads the rows in blocks.",
            f"{total:,}", needed / 1e9, max_memory / 1e9,
        )  # fmt: skip
        return "blocks"
    raise ClusteringError(
        f"{total:,} vectors of {rows.dimensions} dimensions take {needed / 1e9:.1f} GB, and "
        f"max_memory is {max_memory / 1e9:.1f} GB. Filter the rows, raise max_memory, or use "
        "KMeans(), which is computed in blocks."
    )


def _warnings(algorithm: Algorithm, results: dict[str, Any], largest: int | None) -> list[str]:
    """What speaks against the result of a run, in sentences; nothing in most cases."""
    rows, n_clusters, outliers = results["rows"], results["n_clusters"], results["outliers"]
    warnings = []
    if results["pending"]:
        warnings.append(
            f"{results['pending']:,} rows took part with a vector that is not that of their text "
            "now; run again when a worker has embedded them"
        )
    if n_clusters == 0:
        warnings.append("no cluster was found")
    elif outliers > _UNCLUSTERED * rows:
        warnings.append(f"{outliers / rows:.0%} of the rows are in no cluster")
    if n_clusters > 1 and largest and largest > _DOMINANT * (rows - outliers):
        share = largest / (rows - outliers)
        warnings.append(f"one of {n_clusters} clusters has {share:.0%} of their rows")
    if isinstance(algorithm, KMeans):
        warnings += _warnings_about_number(algorithm, n_clusters, results)
    return warnings


def _warnings_about_number(
    algorithm: KMeans, n_clusters: int, results: Mapping[str, Any]
) -> list[str]:
    """Of k-means: fewer clusters than asked for, or a number that nothing speaks for."""
    curve = results.get("curve")
    if curve is None:
        fewer = isinstance(algorithm.n_clusters, int) and n_clusters < algorithm.n_clusters
        return [f"there are no more than {n_clusters} different rows"] if fewer else []
    warnings = []
    if results["score"] <= 0:
        warnings.append(f"one cluster describes the rows as well as {n_clusters} do")
    elif curve[-1]["score"] == results["score"] and len(curve) > 1:
        most = curve[-1]["n_clusters"]
        warnings.append(
            f"{most} clusters, the most that were tried, describe the rows best: "
            "give larger numbers as n_clusters"
        )
    if len(curve) == 1 and algorithm.n_clusters == "auto":
        warnings.append("so few rows are made two clusters, and no other number is tried")
    return warnings


@contextmanager
def recorded_run(
    engine: sa.Engine, clustering: Clustering, values: dict[str, Any]
) -> Iterator[tuple[sa.Connection, int]]:
    """Record a run, and give the transaction that it works in and its number.

    The record is committed at once, so that others see that a run is under way. Everything else is
    committed together when the block ends. If it raises, the record says why and nothing else is
    left.
    """
    table = clustering.run_table
    fail_lost_runs(engine, clustering)
    with engine.connect() as work, work.begin():
        # A run thinks for minutes between two statements.
        configure(work, {"idle_in_transaction_session_timeout": "0"})
        name = system.name_in(work, table.schema, table.name)
        sequence = sa.func.pg_get_serial_sequence(name, "id")
        number = int(work.scalar(sa.select(sa.func.nextval(sequence))) or 0)
        work.execute(sa.select(sa.func.pg_advisory_xact_lock(_lock_key(work, table, number))))
        with engine.begin() as record:
            record.execute(sa.insert(table).values(id=number, state="running", **values))
        try:
            yield work, number
        except BaseException as error:
            work.rollback()
            with engine.begin() as record:
                _fail(record, table, number, f"{type(error).__name__}: {error}")
            raise


def fail_lost_runs(engine: sa.Engine, clustering: Clustering) -> list[int]:
    """Mark runs as failed whose process is gone; return their numbers.

    Raises:
        ClusteringError: the tables of the clustering are not in the database.
    """
    table, lost = clustering.run_table, []
    with engine.connect() as connection:
        with connection.begin():
            _lock_key(connection, table, 0)
            running = list(
                connection.scalars(sa.select(table.c.id).where(table.c.state == "running"))
            )
        for number in running:
            with connection.begin():
                key = _lock_key(connection, table, number)
                if connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(key))):
                    lost += [number] * _fail(connection, table, number, _LOST)
    return lost


def make_current(connection: sa.Connection, clustering: Clustering, run_id: int) -> None:
    """Let readers see this run, an earlier one for example, from the commit on.

    Raises:
        ClusteringError: there is no such run of this column, or it is not done.
    """
    table = clustering.run_table
    mine = table.c.column_name == clustering.column.name
    state = connection.scalar(sa.select(table.c.state).where(table.c.id == run_id, mine))
    if state != "done":
        raise ClusteringError(
            f"Run {run_id} of {clustering.column} cannot be made the current one: "
            + ("there is no such run." if state is None else f"its state is {state!r}.")
        )
    _switch(connection, clustering, run_id, only_later=False)


def _switch(
    connection: sa.Connection, clustering: Clustering, number: int, *, only_later: bool
) -> None:
    """Make a run the current one; with ``only_later`` not in place of one that began later."""
    table = clustering.run_table
    key = _lock_key(connection, table, 0)
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
    present = connection.scalar(sa.select(table.c.id).where(clustering.is_current()))
    if only_later and present is not None and present > number:
        return
    # One statement for each, since the index allows one current run at every moment.
    for run_id, is_current in ((present, False), (number, True)):
        connection.execute(
            sa.update(table).where(table.c.id == run_id).values(is_current=is_current)
        )


def prune(connection: sa.Connection, clustering: Clustering, *, keep: int = 1) -> int:
    """Delete runs of this column, but the current one, running ones, and the latest ``keep``.

    Returns:
        How many were deleted, each with its clusters and assignments.
    """
    table = clustering.run_table
    mine = table.c.column_name == clustering.column.name
    idle = sa.and_(mine, table.c.state != "running", sa.not_(table.c.is_current))
    kept = sa.select(table.c.id).where(idle).order_by(table.c.id.desc()).limit(keep)
    deleted = connection.execute(sa.delete(table).where(idle, table.c.id.not_in(kept)))
    return int(deleted.rowcount)


def _fail(connection: sa.Connection, table: sa.Table, number: int, error: str) -> int:
    failed = connection.execute(
        sa.update(table)
        .where(table.c.id == number, table.c.state == "running")
        .values(state="failed", error=error[:_ERROR_LENGTH], finished_at=sa.func.clock_timestamp())
    )
    return int(failed.rowcount)


def _lock_key(connection: sa.Connection, table: sa.Table, number: int) -> sa.ColumnElement[int]:
    """A 64-bit number for one run of one table; run 0 stands for the switch of the table."""
    name = system.name_in(connection, table.schema, table.name)
    oid = connection.scalar(sa.select(system.oid_of(name)))
    if oid is None:
        raise ClusteringError(
            f"The table {table.fullname!r} is not in this database. A migration creates it: "
            "alembic revision --autogenerate, then alembic upgrade head."
        )
    return sa.func.hashtextextended(f"sbert_pg run {number}", sa.cast(oid, sa.BigInteger))
