"""One run after another: what is stored, who is current, what failures leave behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, selectinload

from sbert_pg import clustering as cl
from sbert_pg.errors import ClusteringError, DeclarationError

HELPERS = Path(__file__).with_name("conftest.py")
helpers = sys.modules["clustering_app"]
make_app, blobs, numbers_of = helpers.make_app, helpers.blobs, helpers.numbers_of
same_partition = helpers.same_partition

EVERY = [
    cl.KMeans(5),
    cl.KMeans(5, method="database"),
    cl.KMeans(5, method="blocks"),
    cl.HDBSCAN(min_cluster_size=10, components=None),
    cl.Communities(threshold=0.7, min_size=10),
    cl.Agglomerative(distance_threshold=0.5),
]


@pytest.mark.parametrize(
    "algorithm", EVERY, ids=lambda a: f"{a.name}-{getattr(a, 'method', '')}".strip("-")
)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_every_algorithm_finds_plain_topics(engine: sa.Engine, algorithm: Any, metric: str) -> None:
    app = make_app(metric=metric)
    vectors, truth = blobs()
    app.fill(engine, vectors)
    run = cl.cluster(engine, app.topics, algorithm)
    assert (run.state, run.is_current, run.rows, run.n_clusters) == ("done", True, 300, 5)
    assert run.algorithm == algorithm.name
    assert run.metric == metric
    found = numbers_of(engine, app.topics)
    inside = [number for number in range(1, 301) if found[number] is not None]
    assert len(inside) == 300 - run.outliers >= 290
    assert same_partition([found[n] for n in inside], [truth[n - 1] for n in inside])


@pytest.mark.parametrize(
    "algorithm", EVERY, ids=lambda a: f"{a.name}-{getattr(a, 'method', '')}".strip("-")
)
def test_a_tenant_of_a_schema_map(engine: sa.Engine, algorithm: Any) -> None:
    """The rows of the same tables in the schema that the map leaves play no part."""
    app, (vectors, truth) = make_app(), blobs()
    app.fill(engine, vectors[::-1][:50])
    tenant = engine.execution_options(schema_translate_map={None: 'ten"ant'})
    with tenant.begin() as connection:
        connection.execute(sa.schema.CreateSchema('ten"ant'))
    app.fill(tenant, vectors)
    with tenant.begin() as connection:
        cl.create_views(connection, app.topics)
    run = cl.cluster(tenant, app.topics, algorithm)
    assert (run.rows, run.n_clusters) == (300, 5)
    found = numbers_of(tenant, app.topics)
    inside = [number for number in range(1, 301) if found[number] is not None]
    assert same_partition([found[n] for n in inside], [truth[n - 1] for n in inside])
    assert set(numbers_of(engine, app.topics).values()) <= {None}
    with tenant.connect() as connection:
        view = sa.table("row_cluster_current", sa.column("size"), schema='ten"ant')
        assert sum(connection.scalars(sa.select(view.c.size))) == len(inside)
        for method in ("exact", "index"):
            report = cl.find_duplicates(connection, app.duplicates, threshold=0.9, method=method)
            assert report.rows > 250


def test_what_a_run_records(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs()
    app.fill(engine, vectors)
    run = cl.cluster(engine, app.topics, cl.KMeans(5), seed=7, where=app.row.id > 100)
    assert run.seed == 7
    assert run.filter == "row.id > 100"
    assert run.rows == 200
    assert run.parameters["n_clusters"] == 5
    assert run.parameters["method"] == "memory"
    assert run.finished_at > run.started_at
    with Session(engine) as session:
        clusters = session.scalars(
            app.topics.clusters().options(selectinload(app.topics.Cluster.run))
        ).all()
        assert sorted(c.number for c in clusters) == [1, 2, 3, 4, 5]
        assert sum(c.size for c in clusters) == 200
        for c in clusters:
            rows = session.execute(app.topics.members(c)).all()
            assert len(rows) == c.size
            distances = [distance for _, distance in rows]
            assert distances == sorted(distances)
            assert c.exemplar.id == rows[0][0].id
            assert c.cohesion == pytest.approx(1 - np.mean(distances), abs=1e-4)
            assert c.radius == pytest.approx(np.quantile(distances, 0.99), abs=1e-4)
            mean = np.mean([row.embedding for row, _ in rows], axis=0)
            np.testing.assert_allclose(c.centroid, mean / np.linalg.norm(mean), atol=1e-5)
            np.testing.assert_allclose(
                distances, [1 - row.embedding @ c.centroid for row, _ in rows], atol=1e-5
            )
        mean_distance = np.mean(
            [d for c in clusters for _, d in session.execute(app.topics.members(c))]
        )
    assert run.mean_distance == pytest.approx(mean_distance, abs=1e-5)
    assert run.inertia == pytest.approx(2 * 200 * mean_distance, rel=1e-4)


def test_relationships_both_ways(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(50)
    app.fill(engine, vectors)
    first = cl.cluster(engine, app.topics, cl.KMeans(5))
    second = cl.cluster(engine, app.topics, cl.KMeans(5), make_current=False)
    with Session(engine) as session:
        row = session.get(app.row, 3)
        assert row is not None
        (mine,) = row.clusters
        assert mine.run_id == first.id
        assert row in mine.rows
        assert [a.run_id for a in row.cluster_assignments] == [first.id, second.id]
        assert row.cluster_assignments[0].cluster is mine
        assert row.cluster_assignments[0].row is row
        assert {c.run.id for c in session.get(app.topics.Run, first.id).clusters} == {first.id}
        same = session.scalars(
            sa.select(app.row).where(app.row.clusters.any(app.topics.Cluster.id == mine.id))
        ).all()
        assert len(same) == mine.size
        nearest = session.execute(app.topics.nearest_clusters(row.embedding, limit=2)).all()
        assert nearest[0][0] is mine
        assert nearest[0][1] < nearest[1][1]
        by_expression = sa.select(app.row.embedding).where(app.row.id == 3).scalar_subquery()
        again = session.execute(app.topics.nearest_clusters(by_expression, limit=1)).one()
        assert again[0] is mine


def test_the_same_seed_gives_the_same_clusters(engine: sa.Engine, app: Any) -> None:
    random = np.random.default_rng(1)
    app.fill(engine, random.standard_normal((500, helpers.DIMENSIONS)))
    # The rows come back from the server in another order after this.
    with engine.begin() as connection:
        connection.execute(sa.update(app.row).where(app.row.id < 200).values(title="moved"))
    runs = [cl.cluster(engine, app.topics, cl.KMeans(8), seed=3, follow=0) for _ in range(2)]
    other = cl.cluster(engine, app.topics, cl.KMeans(8), seed=4)
    assert runs[0].inertia == runs[1].inertia
    assert runs[0].inertia != other.inertia


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("half", [False, True], ids=["vector", "halfvec"])
def test_k_means_in_the_database_gives_what_it_gives_on_the_client(
    engine: sa.Engine, metric: str, half: bool
) -> None:
    app = make_app(metric=metric, half=half)
    random = np.random.default_rng(5)
    centres = random.standard_normal((6, helpers.DIMENSIONS))
    vectors = centres[random.integers(6, size=400)] + 0.7 * random.standard_normal(
        (400, helpers.DIMENSIONS)
    )
    app.fill(engine, vectors)
    found = []
    for method in ("memory", "database"):
        run = cl.cluster(engine, app.topics, cl.KMeans(6, method=method, n_init=2), seed=2)
        assert run.parameters["method"] == method
        found.append((run.inertia, numbers_of(engine, app.topics)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    ("key", "make"),
    [
        (sa.Uuid, lambda n: uuid.UUID(int=n * 7919 % 100_003)),
        (sa.Text, lambda n: f"Schlüssel {n * 7919 % 1009}'%s"),
        (sa.SmallInteger, lambda n: 500 - n),
    ],
    ids=["uuid", "text", "smallint"],
)
@pytest.mark.parametrize("method", ["memory", "database", "blocks"])
def test_keys_of_any_type(engine: sa.Engine, key: Any, make: Any, method: Any) -> None:
    app = make_app(key=key)
    vectors, truth = blobs(100)
    keys = [make(n) for n in range(100)]
    app.fill(engine, vectors, id=keys)
    run = cl.cluster(engine, app.topics, cl.KMeans(5, method=method))
    found = numbers_of(engine, app.topics)
    assert run.rows == 100
    assert same_partition([found[k] for k in keys], list(truth))
    if method == "database":
        client = cl.cluster(engine, app.topics, cl.KMeans(5))
        assert numbers_of(engine, app.topics) == found
        assert client.inertia == pytest.approx(run.inertia, rel=1e-4)


def test_composite_keys(engine: sa.Engine) -> None:
    class Base(sa.orm.DeclarativeBase):
        pass

    class Page(Base):
        __tablename__ = "page"
        __table_args__ = ({"schema": "odd Schema"},)
        book: sa.orm.Mapped[str] = sa.orm.mapped_column("the book", sa.Text, primary_key=True)
        number: sa.orm.Mapped[int] = sa.orm.mapped_column(primary_key=True)
        vector = sa.orm.mapped_column(helpers.Vector(helpers.DIMENSIONS))

    topics = cl.clusters_of(Page.vector, prefix="Topic of", attribute="topics")
    duplicates = cl.duplicates_of(Page.vector)
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("odd Schema"))
        Base.metadata.create_all(connection)
        vectors, truth = blobs(60)
        vectors[1] = vectors[0]
        truth[1] = truth[0]
        connection.execute(
            sa.insert(Page.__table__),
            [
                {"the book": f"b{n % 3}", "number": n, "vector": vector}
                for n, vector in enumerate(vectors)
            ],
        )
    for method in ("memory", "database"):
        cl.cluster(engine, topics, cl.KMeans(5, method=method))
        found = numbers_of(engine, topics)
        assert same_partition([found[f"b{n % 3}", n] for n in range(60)], list(truth))
    with engine.begin() as connection:
        cl.assign(connection, topics)
        report = cl.find_duplicates(connection, duplicates, threshold=0.9999)
        cl.create_views(connection, topics)
        rows = connection.execute(
            sa.text('SELECT number FROM "odd Schema"."Topic of_nearest_of"(\'b0\', 0, 1)')
        ).all()
    assert (report.pairs, report.rows) == (1, 2)
    assert [row[0] for row in rows] == [found["b0", 0]]
    with Session(engine) as session:
        page = session.get(Page, ("b0", 0))
        assert page is not None
        assert [topic.number for topic in page.topics] == [found["b0", 0]]


def test_rows_without_a_vector_and_zero_vectors_take_no_part(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(60)
    rows: list[Any] = list(vectors)
    rows[3] = None
    rows[4] = np.zeros(helpers.DIMENSIONS)
    app.fill(engine, rows)
    for method in ("memory", "database", "blocks"):
        run = cl.cluster(engine, app.topics, cl.KMeans(5, method=method))
        assert run.rows == 58
        assert not {4, 5} & set(numbers_of(engine, app.topics))


@pytest.mark.parametrize("method", ["memory", "database", "blocks"])
def test_fewer_rows_than_clusters_and_identical_rows(
    engine: sa.Engine, app: Any, method: Any
) -> None:
    three = np.eye(helpers.DIMENSIONS)[:3]
    app.fill(engine, np.repeat(three, 4, axis=0))
    run = cl.cluster(engine, app.topics, cl.KMeans(10, method=method))
    assert run.n_clusters == 3
    assert run.inertia == pytest.approx(0, abs=1e-5)
    run = cl.cluster(engine, app.topics, cl.KMeans(10, method=method), where=app.row.id == 1)
    assert (run.rows, run.n_clusters) == (1, 1)


@pytest.mark.parametrize("algorithm", EVERY[3:], ids=lambda a: a.name)
def test_one_row_and_identical_rows_under_the_other_methods(
    engine: sa.Engine, app: Any, algorithm: Any
) -> None:
    app.fill(engine, np.repeat(np.eye(helpers.DIMENSIONS)[:1], 30, axis=0))
    run = cl.cluster(engine, app.topics, algorithm)
    # Where all rows are one, no density stands out from another.
    expected = (0, 30) if algorithm.name == "hdbscan" else (1, 0)
    assert (run.n_clusters, run.outliers) == expected
    run = cl.cluster(engine, app.topics, algorithm, where=app.row.id == 1)
    assert (run.rows, run.n_clusters + run.outliers) == (1, 1)


def test_empty_clusters_start_again_elsewhere(engine: sa.Engine, app: Any) -> None:
    """Rows such that Lloyd's algorithm loses a cluster on the way: none is lost in the end."""
    from sbert_pg.clustering.kmeans import _Lloyd

    line = np.zeros((6, helpers.DIMENSIONS), dtype=np.float32)
    line[:, 0] = [0, 1, 2, 10, 11, 30]
    start = np.zeros((3, helpers.DIMENSIONS), dtype=np.float32)
    start[:, 0] = [1, 11, 500]
    fit = _Lloyd(line, start, False).run(100, 0.0, None)
    assert len(fit.centroids) == 3
    assert same_partition(fit.labels, [0, 0, 0, 1, 1, 2])


def test_nothing_to_cluster(engine: sa.Engine, app: Any) -> None:
    app.fill(engine, [None, None])
    with pytest.raises(ClusteringError, match="no row of row has a vector"):
        cl.cluster(engine, app.topics, cl.KMeans(2))
    with Session(engine) as session:
        (run,) = session.scalars(sa.select(app.topics.Run)).all()
        assert run.state == "failed"
        assert "nothing to cluster" in run.error
        assert not run.is_current


def test_a_failed_run_leaves_only_its_record(
    engine: sa.Engine, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, _ = blobs(60)
    app.fill(engine, vectors)
    good = cl.cluster(engine, app.topics, cl.KMeans(5))

    def interrupted(stage: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cl.cluster(engine, app.topics, cl.KMeans(3), progress=interrupted)
    # Late failure: everything is written already.
    from sbert_pg.clustering import runs as run_module

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the last step failed")

    monkeypatch.setattr(run_module, "_switch", broken)
    with pytest.raises(RuntimeError, match="last step"):
        cl.cluster(engine, app.topics, cl.KMeans(3))
    with Session(engine) as session:
        runs = session.scalars(sa.select(app.topics.Run).order_by(app.topics.Run.id)).all()
        assert [run.state for run in runs] == ["done", "failed", "failed"]
        assert "KeyboardInterrupt" in runs[1].error
        assert runs[2].error == "RuntimeError: the last step failed"
        assert session.scalars(app.topics.current_run()).one().id == good.id
        for mapped in (app.topics.Cluster, app.topics.Assignment):
            assert set(session.scalars(sa.select(mapped.run_id))) == {good.id}


def test_a_killed_run_is_marked_as_failed_at_the_next_look(
    engine: sa.Engine, app: Any, tmp_path: Path
) -> None:
    vectors, _ = blobs(60)
    app.fill(engine, vectors)
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import importlib.util, sys, time
            import sqlalchemy as sa
            from sbert_pg import clustering as cl
            spec = importlib.util.spec_from_file_location("clustering_app", sys.argv[1])
            helpers = importlib.util.module_from_spec(spec)
            sys.modules["clustering_app"] = helpers
            spec.loader.exec_module(helpers)
            app = helpers.make_app()

            def wait(stage, done, total):
                print("fitting", flush=True)
                time.sleep(600)

            cl.cluster(sa.create_engine(sys.argv[2]), app.topics, cl.KMeans(5), progress=wait)
            """
        )
    )
    url = engine.url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, str(script), str(HELPERS), url],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"fitting\n"
    states = sa.select(app.topics.run_table.c.state)
    with engine.connect() as connection:
        assert list(connection.scalars(states)) == ["running"]
    # Its process lives, so it is left alone.
    assert cl.fail_lost_runs(engine, app.topics) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 120
    while not (lost := cl.fail_lost_runs(engine, app.topics)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(lost) == 1
    with engine.connect() as connection:
        assert list(connection.scalars(states)) == ["failed"]
        for table in (app.topics.cluster_table, app.topics.assignment_table):
            assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 0
    assert cl.cluster(engine, app.topics, cl.KMeans(5)).is_current


def test_readers_never_see_a_half_written_clustering(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(400)
    app.fill(engine, vectors)
    cl.cluster(engine, app.topics, cl.KMeans(5))
    assignment, run = app.topics.assignment_table, app.topics.run_table
    placed = (
        sa.select(sa.func.count(), sa.func.count(sa.distinct(assignment.c.run_id)))
        .join_from(assignment, run, run.c.id == assignment.c.run_id)
        .where(run.c.is_current)
    )
    stop = threading.Event()
    seen: set[tuple[int, int]] = set()

    def read() -> None:
        while not stop.is_set():
            with engine.connect() as connection:
                seen.add(tuple(connection.execute(placed).one()))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for seed in range(4):
            cl.cluster(engine, app.topics, cl.KMeans(7), seed=seed)
    finally:
        stop.set()
        reader.join()
    assert seen == {(400, 1)}


def test_of_concurrent_runs_the_one_that_began_last_is_current(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(100)
    app.fill(engine, vectors)
    began, go_on = threading.Event(), threading.Event()
    early: list[Any] = []

    def slow(stage: str, done: int, total: int | None) -> None:
        began.set()
        assert go_on.wait(120)

    thread = threading.Thread(
        target=lambda: early.append(cl.cluster(engine, app.topics, cl.KMeans(5), progress=slow))
    )
    thread.start()
    assert began.wait(120)
    late = cl.cluster(engine, app.topics, cl.KMeans(4))
    go_on.set()
    thread.join()
    assert early[0].id < late.id
    assert (early[0].state, early[0].is_current) == ("done", False)
    with Session(engine) as session:
        assert session.scalars(app.topics.current_run()).one().id == late.id
    with engine.begin() as connection:
        cl.make_current(connection, app.topics, early[0].id)
    with Session(engine) as session:
        assert session.scalars(app.topics.current_run()).one().id == early[0].id
    with engine.begin() as connection, pytest.raises(ClusteringError, match="no such run"):
        cl.make_current(connection, app.topics, 999)


@pytest.mark.parametrize("method", ["memory", "database"])
def test_rows_deleted_during_a_run_have_no_assignment(
    engine: sa.Engine, app: Any, method: Any
) -> None:
    vectors, _ = blobs(200)
    app.fill(engine, vectors)
    deleted = []

    def delete(stage: str, done: int, total: int | None) -> None:
        if not deleted:
            deleted.append(True)
            with engine.begin() as connection:
                connection.execute(sa.delete(app.row).where(app.row.id <= 20))

    run = cl.cluster(engine, app.topics, cl.KMeans(5, method=method), progress=delete)
    assert deleted
    assert run.rows == 180
    assert set(numbers_of(engine, app.topics)) == set(range(21, 201))


def test_rows_deleted_while_assignments_are_written(engine: sa.Engine, app: Any) -> None:
    """Deletes that go on all the time: the run neither fails nor leaves assignments behind."""
    vectors, _ = blobs(2000)
    app.fill(engine, vectors)
    stop = threading.Event()

    def delete() -> None:
        for number in range(1, 1001):
            if stop.is_set():
                return
            with engine.begin() as connection:
                connection.execute(sa.delete(app.row).where(app.row.id == number))

    thread = threading.Thread(target=delete)
    thread.start()
    try:
        for seed in range(3):
            cl.cluster(engine, app.topics, cl.KMeans(5), seed=seed)
    finally:
        stop.set()
        thread.join()
    with engine.connect() as connection:
        orphans = connection.scalar(
            sa.select(sa.func.count())
            .select_from(app.topics.assignment_table)
            .where(~sa.exists().where(app.topics.row_is_assigned()))
        )
    assert orphans == 0


def test_deleting_rows_and_runs_cascades(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(100)
    app.fill(engine, vectors)
    runs = [cl.cluster(engine, app.topics, cl.KMeans(5)) for _ in range(4)]
    with Session(engine) as session, session.begin():
        row = session.get(app.row, 1)
        assert row is not None
        session.delete(row)
    assert 1 not in numbers_of(engine, app.topics)
    with engine.begin() as connection:
        assert cl.prune(connection, app.topics, keep=1) == 2
    with Session(engine) as session:
        kept = list(session.scalars(sa.select(app.topics.Run.id).order_by(app.topics.Run.id)))
        assert kept == [runs[2].id, runs[3].id]
        assert set(session.scalars(sa.select(app.topics.Cluster.run_id))) == set(kept)
        assert set(session.scalars(sa.select(app.topics.Assignment.run_id))) == set(kept)


def test_more_than_fits_into_memory(engine: sa.Engine, app: Any) -> None:
    vectors, truth = blobs(3000)
    app.fill(engine, vectors)
    run = cl.cluster(engine, app.topics, cl.KMeans(5), max_memory=100_000)
    assert run.parameters["method"] == "blocks"
    found = numbers_of(engine, app.topics)
    assert same_partition([found[n] for n in range(1, 3001)], list(truth))
    for numbers in ("auto", [3, 5, 8]):
        run = cl.cluster(engine, app.topics, cl.KMeans(numbers), max_memory=100_000)
        assert run.parameters["method"] == "blocks"
        assert run.parameters["sample"] == 3000
        assert run.parameters["excess_bound"] == 0
        assert [each["n_clusters"] for each in run.curve if each["score"] == run.score] == [5]
        found = numbers_of(engine, app.topics)
        assert same_partition([found[n] for n in range(1, 3001)], list(truth))
    with pytest.raises(ClusteringError, match=r"max_memory is 0\.0 GB"):
        cl.cluster(engine, app.topics, cl.HDBSCAN(), max_memory=100_000)
    with pytest.raises(ClusteringError, match=r"takes about 0\.1 GB"):
        cl.cluster(engine, app.topics, cl.Agglomerative(), max_memory=1_000_000)


def test_choosing_the_number_of_clusters(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(300)
    app.fill(engine, vectors)
    run = cl.cluster(engine, app.topics, cl.KMeans([2, 3, 5, 8, 12]))
    assert run.n_clusters == 5
    assert run.curve is not None
    assert [point["n_clusters"] for point in run.curve] == [2, 3, 5, 8, 12]
    assert run.score == max(point["score"] for point in run.curve)
    inertias = [point["inertia"] for point in run.curve]
    assert inertias == sorted(inertias, reverse=True)
    run = cl.cluster(engine, app.topics)
    assert (run.n_clusters, run.warnings) == (5, [])


@pytest.mark.parametrize("algorithm", EVERY[:3], ids=lambda a: a.method)
def test_progress_is_told(engine: sa.Engine, app: Any, algorithm: Any) -> None:
    vectors, _ = blobs(60)
    app.fill(engine, vectors)
    said: list[tuple[str, int, int | None]] = []
    cl.cluster(engine, app.topics, algorithm, progress=lambda *stage: said.append(stage))
    assert all(total is None or 0 <= done <= total for _, done, total in said)
    stages = list(dict.fromkeys(stage for stage, _, _ in said))
    expected = {
        "auto": ["reading", "iterations", "writing"],
        "database": ["iterations"],
        "blocks": ["iterations", "pass 1", "pass 2"],
    }[algorithm.method]
    assert stages[: len(expected)] == expected
    assert stages[-1] == "summing up"


MEMORY_SCRIPT = """
import importlib.util, sys
import sqlalchemy as sa
from sbert_pg import clustering as cl
spec = importlib.util.spec_from_file_location("clustering_app", sys.argv[1])
helpers = importlib.util.module_from_spec(spec)
sys.modules["clustering_app"] = helpers
spec.loader.exec_module(helpers)
app = helpers.make_app(dimensions=int(sys.argv[4]))
engine = sa.create_engine(sys.argv[2])
# Not getrusage: a child begins with the peak of its parent there.
status = lambda: dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = lambda: int(status()["VmHWM"].split()[0])
# Everything is imported before the measurement begins.
cl.cluster(engine, app.topics, cl.KMeans(5, method=sys.argv[3]), where=app.row.id <= 1000)
before = peak()
cl.cluster(engine, app.topics, cl.KMeans(20, method=sys.argv[3], max_iter=2))
print(1024 * (peak() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "share"), [("memory", 1.3), ("database", 0.1)])
def test_memory_is_bounded_as_stated(
    engine: sa.Engine, tmp_path: Path, method: str, share: float
) -> None:
    """Also where the server gives the rows in another order than that of their keys."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    rows, dimensions = 40_000, 768
    app = make_app(dimensions=dimensions)
    app.row.__table__.indexes.clear()
    random = np.random.default_rng(0)
    app.fill(engine, random.standard_normal((rows, dimensions), dtype=np.float32))
    with engine.begin() as connection:
        connection.execute(sa.update(app.row).where(app.row.id % 3 == 0).values(title="moved"))
    script = tmp_path / "memory.py"
    script.write_text(MEMORY_SCRIPT)
    url = engine.url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, str(script), str(HELPERS), url, method, str(dimensions)],
        capture_output=True,
        text=True,
        check=True,
    )
    stated = rows * (4 * dimensions + 100)
    # The sample that seeds are drawn from, and blocks: the same for any number of rows.
    fixed = 80 << 20
    assert int(done.stdout) < share * stated + fixed


def test_filters_of_the_declaration(engine: sa.Engine) -> None:
    app = make_app(where=lambda row: row.kind == 1)
    vectors, _ = blobs(100)
    app.fill(engine, vectors, kind=[n % 2 for n in range(100)])
    run = cl.cluster(engine, app.topics, cl.KMeans(5), where=[app.row.title.like("row %")])
    assert run.rows == 50
    assert run.filter == "row.kind = 1 AND row.title LIKE 'row %'"


def test_what_is_refused() -> None:
    with pytest.raises(DeclarationError, match="starts at 1"):
        cl.KMeans(5, n_init=0)
    with pytest.raises(DeclarationError, match="give a number from 1"):
        cl.KMeans(0)
    with pytest.raises(DeclarationError, match="needs one number"):
        cl.KMeans("auto", method="database")
    with pytest.raises(DeclarationError, match="use one of"):
        cl.KMeans(3, method="somewhere")  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match="between -1 and 1"):
        cl.Communities(1.5)
    with pytest.raises(DeclarationError, match="attribute of a mapped"):
        cl.clusters_of("embedding")
    app = make_app()
    with pytest.raises(DeclarationError, match="longer than 63 bytes"):
        cl.clusters_of(app.row.embedding, prefix="p" * 60, attribute="others")
    with pytest.raises(DeclarationError, match="has an attribute 'clusters' already"):
        cl.clusters_of(app.row.embedding, prefix="other")


def test_a_database_without_the_tables(engine: sa.Engine, app: Any) -> None:
    app.row.__table__.create(engine)
    with pytest.raises(ClusteringError, match="alembic revision --autogenerate"):
        cl.cluster(engine, app.topics, cl.KMeans(2))
