"""Inputs that are related to what is tested: equal, extreme and strangely named rows."""

from __future__ import annotations

import datetime
import logging
import sys
import uuid
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import catalog, registry
from sbert_pg import clustering as cl
from sbert_pg.clustering.kmeans import normalize
from sbert_pg.errors import ClusteringError, DeclarationError
from sbert_pg.indexes import hnsw_index
from sbert_pg.orm import embed_on_flush, embedding_column
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import Vector

helpers = sys.modules["clustering_app"]
make_app, blobs, numbers_of = helpers.make_app, helpers.blobs, helpers.numbers_of
same_partition = helpers.same_partition
DIMENSIONS = helpers.DIMENSIONS

METHODS = ["memory", "database", "blocks"]
KEEPS = cl.Assigned(0, 0, 0)


def directions(*counts: int) -> np.ndarray:
    """As many equal unit vectors as each count says, each group in a direction of its own."""
    return np.repeat(np.eye(DIMENSIONS, dtype=np.float32)[: len(counts)], counts, axis=0)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("method", METHODS)
def test_equal_rows_are_one_cluster_and_stay_in_it(
    engine: sa.Engine, method: Any, metric: Any
) -> None:
    app = make_app(metric=metric)
    random = np.random.default_rng(0)
    # No round numbers: products of such a vector with itself are not exactly one.
    app.fill(engine, np.repeat(random.standard_normal((1, DIMENSIONS)), 50, axis=0))
    run = cl.cluster(engine, app.topics, cl.KMeans(4, method=method, n_init=2))
    assert (run.n_clusters, run.rows) == (1, 50)
    assert run.inertia == pytest.approx(0, abs=1e-4)
    assert run.warnings == ["there are no more than 1 different rows"]
    with engine.begin() as connection:
        assert cl.assign(connection, app.topics) == KEEPS
        assert not cl.drift(connection, app.topics).is_stale


@pytest.mark.parametrize("method", METHODS)
def test_more_than_half_of_the_rows_are_equal(engine: sa.Engine, app: Any, method: Any) -> None:
    vectors, truth = blobs(100)
    vectors[:60], truth[:60] = vectors[0], truth[0]
    order = np.random.default_rng(0).permutation(100)
    app.fill(engine, vectors[order])
    run = cl.cluster(engine, app.topics, cl.KMeans(5, method=method))
    placed = numbers_of(engine, app.topics)
    assert run.n_clusters == 5
    assert same_partition([placed[n + 1] for n in range(100)], truth[order].tolist())
    with engine.begin() as connection:
        assert cl.assign(connection, app.topics) == KEEPS


@pytest.mark.parametrize("algorithm", [cl.HDBSCAN(5), cl.Communities(0.9, 5), cl.Agglomerative()])
def test_equal_rows_under_the_other_methods(engine: sa.Engine, app: Any, algorithm: Any) -> None:
    app.fill(engine, directions(60, 20, 20))
    run = cl.cluster(engine, app.topics, algorithm)
    assert (run.n_clusters, run.outliers) == (3, 0)
    with engine.begin() as connection:
        assert cl.assign(connection, app.topics) == KEEPS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-25, 1e30], ids=["tiny", "huge"])
def test_vectors_whose_squares_leave_single_precision(
    engine: sa.Engine, app: Any, method: Any, size: float
) -> None:
    """Under cosine a vector counts by its direction, however long it is."""
    vectors, truth = blobs(60)
    app.fill(
        engine, np.concatenate([vectors[:30] * size, vectors[30:], np.zeros_like(vectors[:2])])
    )
    run = cl.cluster(engine, app.topics, cl.KMeans(5, method=method))
    placed = numbers_of(engine, app.topics)
    assert (run.rows, run.n_clusters) == (60, 5)
    assert same_partition([placed[n + 1] for n in range(60)], truth.tolist())
    with engine.begin() as connection:
        assert cl.assign(connection, app.topics) == KEEPS


def test_normalizing_extreme_vectors() -> None:
    vectors = np.array([[3e-30, 4e-30], [3e30, 4e30], [3, 4], [0, 0]], dtype=np.float32)
    expected = [[0.6, 0.8]] * 3 + [[0, 0]]
    np.testing.assert_allclose(normalize(vectors), expected, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_long_vectors_are_not_taken_for_changed(engine: sa.Engine, method: Any) -> None:
    """Euclidean distances of long vectors are rounded more coarsely than those of short ones."""
    app = make_app(metric="euclidean")
    random = np.random.default_rng(0)
    app.fill(engine, 3_000 * random.standard_normal((300, DIMENSIONS)))
    cl.cluster(engine, app.topics, cl.KMeans(5, method=method))
    with engine.begin() as connection:
        assert cl.assign(connection, app.topics) == KEEPS


def odd_app() -> tuple[Any, Any, Any, Any]:
    """Every name is one that a careless statement trips over, some are the library's own."""

    class Base(DeclarativeBase):
        pass

    class Odd(Base):
        __tablename__ = 'o"d$1 %s'
        __table_args__ = (
            hnsw_index('i"x %', 'vec"%(t)s'),
            {"schema": 'sch"m %a', "postgresql_partition_by": "HASH (number)"},
        )
        number: Mapped[uuid.UUID] = mapped_column(primary_key=True)
        unit: Mapped[str] = mapped_column('unit "%s" $$', sa.Text, primary_key=True)
        label: Mapped[str | None]
        distance: Mapped[float | None]
        cluster_id: Mapped[int | None]
        vector = mapped_column('vec"%(t)s', Vector(DIMENSIONS))

    topics = cl.clusters_of(Odd.vector, where=Odd.label != r"50%\ off: it's %s")
    return Base, Odd, topics, cl.duplicates_of(Odd.vector)


def test_a_second_clustering_of_a_table_needs_names_of_its_own() -> None:
    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        first: Mapped[Any] = mapped_column(Vector(3))
        second: Mapped[Any] = mapped_column(Vector(3))

    cl.clusters_of(Note.first)
    declared = set(Base.metadata.tables)
    with pytest.raises(DeclarationError, match="attribute="):
        cl.clusters_of(Note.second, prefix="second")
    with pytest.raises(DeclarationError, match="prefix="):
        cl.clusters_of(Note.second, attribute="seconds")
    assert set(Base.metadata.tables) == declared, "nothing is half declared"
    cl.clusters_of(Note.second, prefix="second", attribute="seconds")
    cl.duplicates_of(Note.first)
    with pytest.raises(DeclarationError, match="name="):
        cl.duplicates_of(Note.second)


def test_odd_names_composite_keys_and_partitions(engine: sa.Engine) -> None:
    base, odd, topics, duplicates = odd_app()
    vectors, truth = blobs(100)
    vectors[1], truth[1] = vectors[0], truth[0]
    keys = [(uuid.UUID(int=n * 7919 % 100_003), f"k'%s {n}\\") for n in range(100)]
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema('sch"m %a'))
        base.metadata.create_all(connection)
        for part in range(2):
            connection.execute(
                sa.text(
                    f'CREATE TABLE "sch""m %a".part_{part} PARTITION OF "sch""m %a"."o""d$1 %s" '
                    f"FOR VALUES WITH (MODULUS 2, REMAINDER {part})"
                )
            )
    with Session(engine) as session, session.begin():
        session.add_all(
            odd(number=a, unit=b, label=r"50%\ off: it's %s" if n == 99 else "%", vector=vector)
            for n, ((a, b), vector) in enumerate(zip(keys, vectors, strict=True))
        )
    for method in METHODS:
        run = cl.cluster(engine, topics, cl.KMeans(5, method=method), text=odd.label)
        placed = numbers_of(engine, topics)
        assert run.rows == 99
        assert same_partition([placed[key] for key in keys[:99]], truth[:99].tolist())
    with engine.begin() as connection:
        assert cl.assign(connection, topics) == KEEPS
        cl.create_views(connection, topics)
        report = cl.find_duplicates(connection, duplicates, threshold=0.9999)
        pairs = list(cl.duplicate_pairs(connection, odd.vector, threshold=0.9999))
        by_index = list(
            cl.duplicate_pairs(connection, odd.vector, threshold=0.9999, method="index")
        )
        assert len(cl.cluster_map(connection, topics, projection="pca").texts) == 99
    assert (report.pairs, report.rows) == (1, 2)
    assert [(pair.a, pair.b) for pair in pairs] == [tuple(sorted(keys[:2]))]
    assert [(pair.a, pair.b) for pair in by_index] == [(pair.a, pair.b) for pair in pairs]
    with Session(engine) as session:
        row = session.get(odd, keys[0])
        assert row is not None
        assert [cluster.number for cluster in row.clusters] == [placed[keys[0]]]
    keeper = cl.ClusterKeeper(engine, [topics])
    with engine.begin() as connection:
        connection.execute(sa.delete(odd).where(odd.number == keys[0][0]))
    assert [assigned.added for assigned in keeper.look()] == [0]
    with engine.begin() as connection:
        cl.drop_views(connection, topics)


@pytest.mark.parametrize("method", METHODS)
def test_filters_mean_the_same_wherever_they_are_read(
    engine: sa.Engine, app: Any, method: Any
) -> None:
    """Some statements carry parameters, COPY carries literals."""
    titles = ["a\\b", "100%", "it's", "a:b", "%%", "%s", "\\%", "é\n"]
    vectors, _ = blobs(80)
    app.fill(engine, vectors, title=[titles[n % 8] for n in range(80)], kind=list(range(80)))
    near = app.row.embedding.cosine_distance(vectors[0]) < 2
    for title in titles:
        criteria = [app.row.title == title, near, app.row.kind.in_([*range(79)])]
        expected = {n + 1 for n in range(79) if titles[n % 8] == title}
        run = cl.cluster(engine, app.topics, cl.KMeans(2, method=method), where=criteria)
        assert set(numbers_of(engine, app.topics)) == expected, title
        assert run.rows == len(expected)
        with engine.begin() as connection:
            assert cl.assign(connection, app.topics, where=criteria) == KEEPS


@pytest.mark.parametrize("method", METHODS)
def test_filters_written_in_sql(engine: sa.Engine, app: Any, method: Any) -> None:
    """Their names are not qualified, and statements have other tables with such columns."""
    vectors, _ = blobs(60)
    app.fill(engine, vectors, kind=[n % 2 for n in range(60)])
    where = sa.text("(id > 10 AND kind = 1 AND title LIKE 'row %')")
    run = cl.cluster(engine, app.topics, cl.KMeans(5, method=method), where=where)
    assert run.rows == 25
    with engine.begin() as connection:
        assert cl.assign(connection, app.topics, where=where) == KEEPS
        assert cl.drift(connection, app.topics, where=where).unassigned == 0


def test_filters_of_duplicates_written_in_sql(engine: sa.Engine, app: Any) -> None:
    app.fill(engine, directions(20, 20))
    where = sa.text("(id > 10 AND embedding IS NOT NULL)")
    with engine.begin() as connection:
        for method in ("exact", "index"):
            pairs = cl.duplicate_pairs(
                connection,
                app.row.embedding,
                where=where,
                method=method,  # type: ignore[arg-type]
            )
            assert len(list(pairs)) == 10 * 9 // 2 + 20 * 19 // 2
        assert cl.index_recall(connection, app.row.embedding, where=where) == 1.0


@pytest.mark.parametrize("method", ["exact", "index"])
def test_keys_of_other_types_come_back_as_the_application_knows_them(
    engine: sa.Engine, method: Any
) -> None:
    app = make_app(key=sa.Date)
    day = datetime.date(2024, 1, 1)
    keys = [day + datetime.timedelta(days=n * 37) for n in range(40)]
    vectors, _ = blobs(40, 8, noise=0.2)
    vectors[31] = vectors[2]
    app.fill(engine, vectors, id=keys)
    with engine.begin() as connection:
        (pair,) = cl.duplicate_pairs(connection, app.row.embedding, threshold=0.999, method=method)
        assert (pair.a, pair.b) == (keys[2], keys[31])
        report = cl.find_duplicates(connection, app.duplicates, threshold=0.999, method=method)
        assert report.pairs == 1
    with Session(engine) as session:
        stored = session.scalars(sa.select(app.duplicates.Duplicate)).one()
        assert {stored.a.id, stored.b.id} == {keys[2], keys[31]}
        assert stored.group_number == 1


def test_groups_that_do_not_chain() -> None:
    chain = [cl.Pair(0.9, n, n + 1) for n in range(6)]
    centred = cl.groups_of(chain)
    pairs = {(pair.a, pair.b) for pair in chain}
    for group in centred:
        is_centre = [all((min(a, b), max(a, b)) in pairs for b in group if b != a) for a in group]
        assert any(is_centre), group
    assert sorted(key for group in centred for key in group) == [*range(7)]


def test_stored_groups_that_do_not_chain(engine: sa.Engine, app: Any) -> None:
    angles = np.radians(np.arange(7) * 20.0)
    vectors = np.zeros((7, DIMENSIONS))
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    app.fill(engine, vectors)
    with engine.begin() as connection:
        arguments: dict[str, Any] = {"threshold": 0.93}
        centred = cl.find_duplicates(connection, app.duplicates, **arguments)
        assert (centred.pairs, centred.groups, centred.rows) == (6, 3, 7)
        numbers = sa.select(sa.func.count()).where(app.duplicates.table.c.group_number.is_(None))
        assert connection.scalar(numbers) == 2


def test_squares_of_equal_rows_are_not_stored(
    engine: sa.Engine, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbert_pg.clustering.duplicates.MAX_PAIRS", 1_000)
    app.fill(engine, directions(50))
    with engine.begin() as connection:
        with pytest.raises(ClusteringError, match="more than 1,000 pairs"):
            cl.find_duplicates(connection, app.duplicates)
        assert cl.find_duplicates(connection, app.duplicates, where=app.row.id < 20).pairs == 171


def test_a_run_says_where_it_is_poor(
    engine: sa.Engine, app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    random = np.random.default_rng(0)
    vectors, _ = blobs(300, 2, noise=0.02)
    vectors[:280] = vectors[0] + 0.02 * random.standard_normal((280, DIMENSIONS))
    app.fill(engine, vectors)
    with caplog.at_level(logging.WARNING, "sbert_pg.clustering"):
        run = cl.cluster(engine, app.topics, cl.HDBSCAN(5, components=None))
    assert run.n_clusters > 1
    assert any("clusters has" in warning for warning in run.warnings)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == run.warnings
    # A direction for each row: nothing is a large cluster.
    with engine.begin() as connection:
        connection.execute(sa.delete(app.row))
    app.fill(engine, random.standard_normal((300, DIMENSIONS)))
    run = cl.cluster(engine, app.topics, cl.HDBSCAN(200))
    assert run.warnings == ["no cluster was found"]
    fair = cl.cluster(engine, app.topics, cl.KMeans(5))
    assert fair.warnings == []
    chosen = cl.cluster(engine, app.topics)
    assert chosen.warnings == [f"one cluster describes the rows as well as {chosen.n_clusters} do"]


def test_the_end_of_the_ladder_is_not_silent(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(400, 20, noise=0.01)
    app.fill(engine, vectors)
    run = cl.cluster(engine, app.topics, cl.KMeans([2, 5, 10]))
    assert run.n_clusters == 10
    (warning,) = run.warnings
    assert warning.startswith("10 clusters, the most that were tried")
    assert cl.cluster(engine, app.topics, cl.KMeans([2, 20, 40])).warnings == []
    few = cl.cluster(engine, app.topics, where=app.row.id <= 7).warnings
    assert any("no other number" in warning for warning in few)


def test_a_map_of_equal_rows(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(30, 3)
    app.fill(engine, np.concatenate([directions(70), vectors]))
    for where, points in ((app.row.id <= 70, 1), (None, 31)):
        cl.cluster(engine, app.topics, cl.KMeans(1), where=where)
        for projection in ("pca", "tsne"):
            with engine.begin() as connection:
                plane = cl.cluster_map(connection, app.topics, projection=projection)  # type: ignore[arg-type]
            assert np.isfinite(plane.points).all()
            assert len(np.unique(plane.points, axis=0)) == points


def test_rows_that_are_not_fresh_are_counted(engine: sa.Engine) -> None:
    registry.use_encoder(DeterministicEncoder())

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding = embedding_column("deterministic", "body", dimensions=384, nullable=True)

    topics = cl.clusters_of(Note.embedding)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        catalog.bind(connection, Note.__table__.c.embedding)
    words = ["rain storm clouds", "bank money credit"]
    with Session(engine) as session, session.begin():
        embed_on_flush(session)
        session.add_all(Note(id=n, body=f"{words[n % 2]} {n // 30}") for n in range(60))
    run = cl.cluster(engine, topics, cl.KMeans(2))
    assert (run.pending, run.warnings) == (0, [])
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE note SET body = 'garlic and butter ' || id WHERE id < 5")
        )
    run = cl.cluster(engine, topics, cl.KMeans(2))
    assert run.pending == 5
    assert run.warnings[0].startswith("5 rows took part with a vector that is not that of their")
