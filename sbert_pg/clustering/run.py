"""``cluster``: one run, from the rows to the switch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg.catalog import binding
from sbert_pg.clustering.algorithms import Algorithm, KMeans, parameters_of
from sbert_pg.clustering.declaration import Clustering, Criteria
from sbert_pg.clustering.extras import need
from sbert_pg.clustering.fitting import fit_in_memory
from sbert_pg.clustering.identity import number_clusters, previous_run
from sbert_pg.clustering.kmeans_sql import fit_kmeans_in_database
from sbert_pg.clustering.labels import StopWords, find_keywords
from sbert_pg.clustering.minibatch import fit_mini_batch
from sbert_pg.clustering.rowset import RowSet
from sbert_pg.clustering.states import finish, recorded_run
from sbert_pg.clustering.storing import store_fit, store_in_database, summarize
from sbert_pg.clustering.tables import ClusterRun
from sbert_pg.clustering.transfer import read_rows
from sbert_pg.errors import ClusteringError

Progress = Callable[[str, int, int | None], None]

#: Bytes that a run may take for vectors.
MAX_MEMORY = 2 << 30
#: What a row takes in memory beside its vector: its key, bounds, a label and a distance.
_BYTES_PER_ROW = 100


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
    progress: Progress | None = None,
) -> ClusterRun:
    """Cluster the rows of a table, and let readers see the result all at once.

    Vectors are read at one moment; rows that come later are for ``assign``, rows deleted meanwhile
    have no assignment. Rows without a vector take no part, nor, under cosine, do vectors of zeros.
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
        stop_words: words that are no keywords, ``"english"`` or a collection.
        make_current: whether readers are to see this run.
        max_memory: bytes that vectors may take; see ``KMeans.method``.
        progress: called with the stage (``reading``, ``iterations``, ``writing`` and others), how
            much of it is done, and of how much, or ``None`` where that is not known.

    Returns:
        The run, detached from any session.

    Raises:
        ClusteringError: there are no rows; or they take more memory than ``max_memory`` and the
            algorithm has no form for that.
        MissingExtraError: the extra ``clustering`` is not installed.
    """
    algorithm = algorithm or KMeans()
    need("scipy.sparse", "compute clusters")
    values = {
        "column_name": clustering.column.name,
        **_encoder(engine, clustering),
        "algorithm": algorithm.name,
        "parameters": parameters_of(algorithm),
        "seed": seed,
        "filter": clustering.filter_text(where),
        "metric": clustering.metric,
    }
    rows = RowSet(clustering, clustering.criteria(where))
    progress = progress or _unseen
    with recorded_run(engine, clustering, values) as (work, run_id):
        fitted = _fit(work, rows, run_id, algorithm, seed, max_memory, progress)
        progress("summing up", 0, None)
        totals = summarize(work, clustering, run_id)
        previous = previous_run(work, clustering) if follow is None else follow
        number_clusters(work, clustering, run_id, previous)
        if keywords and (text is not None or clustering.source is not None):
            progress("keywords", 0, None)
            find_keywords(work, clustering, run_id, text=text, stop_words=stop_words)
        finish(work, clustering, run_id, {**fitted, **totals}, make_current=make_current)
    return run_of(engine, clustering, run_id)


def run_of(engine: sa.Engine, clustering: Clustering, run_id: int) -> ClusterRun:
    """A run by its number, detached from any session.

    Raises:
        ClusteringError: there is none.
    """
    with Session(engine, expire_on_commit=False) as session:
        found = session.get(clustering.Run, run_id)
        if found is None:
            raise ClusteringError(f"There is no run {run_id} of {clustering.column}.")
        session.expunge(found)
        return found


def _encoder(engine: sa.Engine, clustering: Clustering) -> dict[str, str | None]:
    """Name and fingerprint of the column's encoder, as the catalog has it."""
    with engine.connect() as connection:
        bound = binding.binding_of(connection, clustering.column)
    name = clustering.spec.name if clustering.spec is not None else None
    return {"encoder": name, "fingerprint": bound.fingerprint if bound is not None else None}


def _fit(
    work: sa.Connection,
    rows: RowSet,
    run_id: int,
    algorithm: Algorithm,
    seed: int,
    max_memory: int,
    progress: Progress,
) -> dict[str, Any]:
    """Compute and store; return what the run records of it."""
    clustering = rows.clustering
    total = rows.count(work)
    if total == 0:
        raise ClusteringError(
            f"There is nothing to cluster: no row of {clustering.rows.fullname} has a vector in "
            f"{clustering.column.name!r} and meets the filter. 'sbert-pg status' tells whether "
            "vectors are still to be made."
        )
    details: dict[str, Any] = {}
    method = _method(algorithm, clustering, total, max_memory)
    score, curve = None, None
    if method == "database":
        assert isinstance(algorithm, KMeans)
        assert isinstance(algorithm.n_clusters, int)
        centroids, iterations = fit_kmeans_in_database(
            work,
            rows,
            min(algorithm.n_clusters, total),
            seed=seed,
            n_init=algorithm.n_init,
            max_iter=algorithm.max_iter,
            tol=algorithm.tol,
            progress=progress,
        )
        store_in_database(work, rows, run_id, centroids)
        details = {"method": method, "iterations": iterations}
    elif method == "mini-batch":
        assert isinstance(algorithm, KMeans)
        batch = fit_mini_batch(work, rows, algorithm, seed=seed, total=total, progress=progress)
        store_fit(
            work, clustering, run_id, batch.keys, batch.labels, batch.centroids, batch.distances
        )
        details = {"method": method, "passes": batch.passes}
    else:
        progress("reading", 0, total)
        found = read_rows(work, clustering.keys, clustering.column, rows.criteria)
        progress("reading", len(found.keys), len(found.keys))
        fit = fit_in_memory(
            found.vectors,
            algorithm,
            seed=seed,
            spherical=rows.spherical,
            max_memory=max_memory,
            progress=progress,
        )
        progress("writing", 0, len(found.keys))
        store_fit(work, clustering, run_id, found.keys, fit.labels, fit.centroids, fit.distances)
        details, score, curve = fit.details, fit.score, fit.curve
    parameters = {**parameters_of(algorithm), **details}
    return {"parameters": parameters, "score": score, "curve": curve}


def _unseen(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody looks at."""


def _method(algorithm: Algorithm, clustering: Clustering, total: int, max_memory: int) -> str:
    needed = total * (4 * clustering.dimensions + _BYTES_PER_ROW)
    if isinstance(algorithm, KMeans) and algorithm.method != "auto":
        return algorithm.method
    if needed <= max_memory:
        return "memory"
    if isinstance(algorithm, KMeans) and isinstance(algorithm.n_clusters, int):
        return "mini-batch"
    raise ClusteringError(
        f"{total:,} vectors of {clustering.dimensions} dimensions take {needed / 1e9:.1f} GB, and "
        f"max_memory is {max_memory / 1e9:.1f} GB. Filter the rows, raise max_memory, or use "
        "KMeans(n_clusters=...) with a number, which is computed in blocks."
    )


__all__ = ["MAX_MEMORY", "cluster", "run_of"]
