"""Near-duplicates, communities and the nearest rows, against what they are compared with."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg import clustering as cl
from sbert_pg.clustering.algorithms import find_communities
from sbert_pg.clustering.kmeans import normalize
from sbert_pg.errors import ClusteringError, DeclarationError
from sbert_pg.search import nearest

helpers = sys.modules["clustering_app"]
make_app, blobs = helpers.make_app, helpers.blobs


def rows_with_duplicates() -> np.ndarray:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((300, helpers.DIMENSIONS))
    vectors[200:240] = vectors[:40] + 0.02 * random.standard_normal((40, helpers.DIMENSIONS))
    vectors[240:250] = vectors[200:210]
    return vectors.astype(np.float32)


def by_hand(vectors: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    unit = normalize(vectors.copy()).astype(np.float64)
    rows, others = np.nonzero(np.triu(unit @ unit.T >= threshold, 1))
    return {(int(a) + 1, int(b) + 1) for a, b in zip(rows, others, strict=True)}


@pytest.mark.parametrize("method", ["exact", "index"])
@pytest.mark.parametrize("half", [False, True], ids=["vector", "halfvec"])
def test_all_pairs_once(engine: sa.Engine, half: bool, method: Any) -> None:
    app = make_app(half=half)
    vectors = rows_with_duplicates()
    app.fill(engine, vectors)
    with engine.begin() as connection:
        pairs = list(
            cl.duplicate_pairs(connection, app.row.embedding, threshold=0.95, method=method)
        )
    found = [(pair.a, pair.b) for pair in pairs]
    assert len(found) == len(set(found)) == 60
    assert set(found) == by_hand(vectors, 0.95)
    unit = normalize(vectors.copy())
    for pair in pairs:
        assert pair.similarity == pytest.approx(unit[pair.a - 1] @ unit[pair.b - 1], abs=1e-3)


def test_within_a_filter(engine: sa.Engine, app: Any) -> None:
    vectors = rows_with_duplicates()
    app.fill(engine, vectors)
    expected = {pair for pair in by_hand(vectors, 0.95) if pair[0] > 10}
    with engine.begin() as connection:
        for method in ("exact", "index"):
            pairs = cl.duplicate_pairs(
                connection,
                app.row.embedding,
                threshold=0.95,
                where=app.row.id > 10,
                method=method,  # type: ignore[arg-type]
            )
            assert {(pair.a, pair.b) for pair in pairs} == expected


def test_the_table_of_pairs_and_groups(engine: sa.Engine, app: Any) -> None:
    app.fill(engine, rows_with_duplicates())
    with engine.begin() as connection:
        report = cl.find_duplicates(connection, app.duplicates, threshold=0.95)
    assert (report.pairs, report.groups, report.rows, report.recall) == (60, 40, 90, 1.0)
    with Session(engine) as session:
        pairs = session.scalars(sa.select(app.duplicates.Duplicate)).all()
        assert len(pairs) == 60
        group = [p for p in pairs if p.group_number == 1]
        assert {key for p in group for key in (p.a.id, p.b.id)} == {1, 201, 241}
        assert all(p.a.id < p.b.id for p in pairs)
    # The second search replaces the first; deleted rows take their pairs along.
    with engine.begin() as connection:
        connection.execute(sa.delete(app.row).where(app.row.id == 201))
        count = sa.select(sa.func.count()).select_from(app.duplicates.table)
        assert connection.scalar(count) == 58
        report = cl.find_duplicates(connection, app.duplicates, threshold=0.95, method="index")
        assert (report.pairs, report.groups) == (58, 40)
        assert connection.scalar(count) == 58
        assert cl.find_duplicates(connection, app.duplicates, threshold=1.0).pairs <= 10


def test_recall_is_measured_and_can_be_low(engine: sa.Engine, app: Any) -> None:
    """With one neighbour a row cannot find the other eleven of its group."""
    app.fill(engine, np.repeat(np.eye(helpers.DIMENSIONS)[:8], 12, axis=0))
    with engine.begin() as connection:
        full = cl.index_recall(connection, app.row.embedding, neighbours=20)
        one = cl.index_recall(connection, app.row.embedding, neighbours=1)
        assert full == 1.0
        assert one is not None
        assert one < 0.5
        assert cl.index_recall(connection, app.row.embedding, where=app.row.id == 1) is None
        pairs = list(cl.duplicate_pairs(connection, app.row.embedding))
    assert len(pairs) == 8 * 12 * 11 // 2
    assert [len(group) for group in cl.groups_of(pairs)] == [12] * 8


def test_groups_hang_together() -> None:
    pairs = [cl.Pair(1.0, "a", "b"), cl.Pair(1.0, "c", "d"), cl.Pair(1.0, "b", "e")]
    assert cl.groups_of(pairs) == [["a", "b", "e"], ["c", "d"]]
    assert cl.groups_of([]) == []


def test_rows_like_this_one(engine: sa.Engine, app: Any) -> None:
    app.fill(engine, rows_with_duplicates(), kind=[n % 2 for n in range(300)])
    with Session(engine) as session:
        row = session.get(app.row, 1)
        like = nearest(app.row.embedding, row, limit=2, min_similarity=0.95)
        assert {found.id for found, _ in session.execute(like)} == {201, 241}
        within = nearest(app.row.embedding, row, limit=2, where=app.row.kind == 1)
        assert all(found.kind == 1 for found, _ in session.execute(within))


def test_what_is_refused(engine: sa.Engine, app: Any) -> None:
    app.fill(engine, rows_with_duplicates()[:3])
    app.row.__table__.indexes.clear()
    with engine.begin() as connection:
        with pytest.raises(ClusteringError, match="no declared index"):
            list(cl.duplicate_pairs(connection, app.row.embedding, method="index"))
        with pytest.raises(DeclarationError, match="between -1 and 1"):
            cl.duplicate_pairs(connection, app.row.embedding, threshold=90)
        with pytest.raises(DeclarationError, match="not a vector column"):
            cl.duplicate_pairs(connection, app.row.title)
        with pytest.raises(DeclarationError, match="'exact' or 'index'"):
            cl.duplicate_pairs(connection, app.row.embedding, method="magic")  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match="attribute of a mapped"):
        cl.duplicates_of("embedding")


def test_communities_are_those_of_sentence_transformers() -> None:
    util = pytest.importorskip("sentence_transformers.util")
    for seed, noise in ((0, 0.08), (1, 0.13), (2, 0.17)):
        vectors, _ = blobs(400, 9, noise=noise, seed=seed)
        ours = find_communities(vectors, 0.75, 5)
        theirs = util.community_detection(vectors, threshold=0.75, min_community_size=5)
        expected = np.full(400, -1)
        for number, members in enumerate(theirs):
            expected[list(members)] = number
        sizes = [len(members) for members in theirs]
        assert [int((ours == n).sum()) for n in range(len(sizes))] == sizes
        assert helpers.same_partition(ours, expected)


def test_the_index_is_used(engine: sa.Engine, app: Any) -> None:
    from sbert_pg.clustering.duplicates import _index_statement, rows_of

    app.fill(engine, rows_with_duplicates())
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL enable_seqscan = off"))
        rows = rows_of(app.row.embedding)
        statement = _index_statement(rows, rows, 0.9, 5).compile(
            dialect=connection.dialect, compile_kwargs={"literal_binds": True}
        )
        plan = connection.exec_driver_sql(f"EXPLAIN {statement}".replace("%%", "%"))
        assert any("row_embedding" in line[0] for line in plan)
