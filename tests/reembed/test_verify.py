"""A verification passes on a good column and fails, by name, on each thing that can be wrong."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, errors, registry
from sbert_pg import reembed as ree
from sbert_pg.reembed import require_ready
from sbert_pg.search import exact as measures
from sbert_pg.testing import DeterministicEncoder


@pytest.fixture
def ready(world):
    world.create(400)
    world.fill("embedding")
    ree.begin(world.engine, ree.request_of(world.new_table.c.embedding_new))
    world.fill("embedding_new")
    ree.build_indexes(world.engine, world.new_column)
    return world


def overwrite(world, statement: str) -> None:
    """Change vectors behind the back of every check, as a careless restore might."""
    with world.engine.begin() as connection:
        connection.execute(sa.text("set local session_replication_role = replica"))
        connection.execute(sa.text(statement))


def labelled(world, number: int) -> list[ree.LabelledQuery]:
    """Queries that each have one row's very text."""
    return [
        ree.LabelledQuery(f"t{i}\n\n{text}", {str(i + 1): 1.0})
        for i, text in enumerate(world.texts(400)[:number])
    ]


def test_a_good_column_passes(ready):
    table = ready.new_table
    report = ree.verify(
        ready.engine,
        ready.new_column,
        sample_size=50,
        filters={"German": table.c.lang == "de", "short": sa.text("length(body) < 45")},
        queries=labelled(ready, 2),
    )
    assert report.passed, report
    assert report.coverage.share == 1
    assert report.index == "ix_articles_embedding_new"
    assert [r.filter for r in report.recalls] == [None, "German", "short"]
    assert report.recalls[1].selectivity == pytest.approx(0.25)
    assert all(r.queries == 50 and r.mean > 0.95 for r in report.recalls)
    assert report.agreement.rows == 64
    assert report.agreement.worst > 0.9999
    assert 0 < report.overlap < 1
    assert [q.column for q in report.quality] == ["embedding_new", "embedding"]
    assert report.quality[0].ndcg == 1
    report.require()
    data = json.loads(json.dumps(report.to_json()))
    assert data["passed"] is True
    assert (data["coverage"]["rows"], data["coverage"]["share"]) == (400, 1)
    text = str(report)
    assert "recall@10" in text
    assert "where German (25.0% of rows)" in text
    assert text.endswith(f"passed, in {report.seconds:.1f} s")


def test_exact_neighbours_are_those_of_the_server(ready):
    """The one pass over the table against the server's own exact search."""
    from sbert_pg.search import nearest

    report = ree.verify(ready.engine, ready.new_column, sample_size=20, ef_search=400)
    assert report.recalls[0].mean == 1
    overlaps = []
    with ready.engine.connect() as connection:
        for row in connection.execute(
            sa.text(
                "select id, embedding::text as o, embedding_new::text as n from articles limit 30"
            )
        ).all():
            found = [
                {
                    hit.id
                    for hit in connection.execute(
                        nearest(column, json.loads(vector), limit=11, exact=True)
                    )
                    if hit.id != row.id
                }
                for column, vector in (
                    (ready.old_table.c.embedding, row.o), (ready.new_table.c.embedding_new, row.n)
                )
            ]  # fmt: skip
            overlaps.append(len(found[0] & found[1]) / 10)
    again = ree.verify(ready.engine, ready.new_column, sample_size=400)
    assert again.overlap == pytest.approx(np.mean(overlaps), abs=0.1)


def test_missing_rows_fail(ready):
    overwrite(ready, "update articles set embedding_new = null where id <= 8")
    report = ree.verify(ready.engine, ready.new_column, sample_size=20)
    assert not report.passed
    with pytest.raises(errors.VerificationError, match="8 of 400 rows wait for their vector"):
        report.require()
    lenient = ree.Thresholds(coverage=0.98)
    assert ree.verify(ready.engine, ready.new_column, sample_size=20, thresholds=lenient).passed


def test_a_backfill_that_is_not_complete_fails(world):
    world.create(100)
    ree.begin(world.engine, ree.request_of(world.new_table.c.embedding_new))
    world.fill("embedding_new", limit=95)
    ree.build_indexes(world.engine, world.new_column)
    report = ree.verify(world.engine, world.new_column, sample_size=10)
    assert [each[:14] for each in report.failures] == ["5 of 100 rows "]
    lenient = ree.Thresholds(coverage=0.95)
    assert ree.verify(world.engine, world.new_column, sample_size=10, thresholds=lenient).passed


def test_vectors_that_nothing_proves_fail(ready):
    """The rows themselves say that these are not the vectors that were written for their texts."""
    overwrite(
        ready,
        "update articles set embedding_new = (select embedding_new from articles where id = 400) "
        "where id between 100 and 250",
    )
    report = ree.verify(ready.engine, ready.new_column, sample_size=20)
    assert any("151 of 400 rows wait" in failure for failure in report.failures)
    # No search finds them, so they cost no recall.
    assert report.recalls[0].mean > 0.95
    assert report.agreement.worst > 0.999


def test_vectors_of_another_space_fail(ready):
    """As an encoder writes them that is not what it says it is: the proof is in order."""
    with ready.engine.begin() as connection:
        binding = catalog.require_binding(connection, ready.new_column)
        wrong = "(select embedding_new from articles where id = 400)"
        digest = binding.expressions.bare("digest").replace("embedding_new", wrong)
    overwrite(
        ready,
        f"update articles set embedding_new = {wrong}, embedding_new_of = {digest} "
        "where id between 100 and 250",
    )
    assert ready.pending("embedding_new") == []
    report = ree.verify(ready.engine, ready.new_column, sample_size=20)
    assert any("cosine of a stored vector with its text" in failure for failure in report.failures)
    assert report.agreement.doubtful
    assert all(100 <= int(key) <= 250 for key in report.agreement.doubtful)


def test_a_missing_or_invalid_index_fails(ready):
    with ready.engine.begin() as connection:
        connection.execute(
            sa.text(
                "update pg_index set indisvalid = false "
                "where indexrelid = 'ix_articles_embedding_new'::regclass"
            )
        )
    report = ree.verify(ready.engine, ready.new_column, sample_size=20)
    assert report.failures == (
        "there is no valid index on the new column, and the old one has one",
    )
    assert report.notes == ("no recall was measured: the new column has no valid index",)
    # Building it again drops the invalid one.
    ree.build_indexes(ready.engine, ready.new_column)
    assert ree.verify(ready.engine, ready.new_column, sample_size=20).passed


def test_a_poor_index_fails_by_recall(ready):
    with ready.engine.begin() as connection:
        connection.execute(sa.text("drop index ix_articles_embedding_new"))
        connection.execute(
            sa.text(
                "create index ix_articles_embedding_new on articles using ivfflat "
                "(embedding_new vector_cosine_ops) with (lists = 100)"
            )
        )
    report = ree.verify(
        ready.engine,
        ready.new_column,
        sample_size=50,
        thresholds=ree.Thresholds(recall=1.01, filtered_recall=1.01),
        filters={"German": ready.new_table.c.lang == "de"},
    )
    assert [failure[:9] for failure in report.failures] == ["recall@10", "recall@10"]
    assert "where German" in report.failures[1]


def test_worse_ranking_of_labelled_queries_fails(ready):
    queries = labelled(ready, 20)
    overwrite(ready, "update articles set embedding_new = null where id <= 5")
    unjudged = ree.Thresholds(coverage=None)
    report = ree.verify(
        ready.engine, ready.new_column, queries=queries, texts=0, sample_size=10,
        thresholds=unjudged,
    )  # fmt: skip
    assert report.failures == (
        "nDCG@10 is 0.2500 below the old column's, and at most 0.02 may be lost",
    )


def test_labelled_rows_of_another_table_are_refused(ready):
    """Both columns would score 0, and a change that ruins the ranking would pass."""
    queries = [ree.LabelledQuery("t1", {"article-1": 1.0}), ree.LabelledQuery("t2", {"x": 1.0})]
    with pytest.raises(errors.LoadError, match=r"none of them\. Its keys look like '\d+'"):
        ree.verify(ready.engine, ready.new_column, queries=queries, sample_size=10)


def test_another_encoder_than_the_column_s_is_refused(ready):
    registry.use_encoder(DeterministicEncoder("new", 48, salt="not what the column holds"))
    with pytest.raises(errors.EncoderMismatchError):
        ree.verify(ready.engine, ready.new_column, sample_size=10)


def test_time_outs_do_not_end_it(ready, monkeypatch):
    """As a role may have them that is meant for web requests; encoding takes longer than those."""
    with ready.engine.begin() as connection:
        name = connection.execute(sa.text("select current_database()")).scalar_one()
        for setting in ("statement_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(sa.text(f'alter database "{name}" set {setting} = 500'))
    ready.engine.dispose()
    encode = ready.new.encode_document

    def slowly(texts):
        time.sleep(0.8)
        return encode(texts)

    monkeypatch.setattr(ready.new, "encode_document", slowly)
    assert ree.verify(ready.engine, ready.new_column, sample_size=40).agreement.rows == 64
    with ready.engine.connect() as connection:
        assert connection.execute(sa.text("show statement_timeout")).scalar_one() == "500ms"


def test_without_encoders_the_rest_is_measured(ready, monkeypatch):
    registry.forget_encoders()
    monkeypatch.setattr(registry, "_loader", None)
    report = ree.verify(ready.engine, ready.new_column, sample_size=10)
    assert report.agreement is None
    assert any(note.startswith("no text was encoded again") for note in report.notes)
    assert report.passed


def test_an_empty_table_passes_but_for_its_index(world):
    world.create(0)
    ree.begin(world.engine, ree.request_of(world.new_table.c.embedding_new))
    ree.build_indexes(world.engine, world.new_column)
    assert ree.verify(world.engine, world.new_column).passed


class TestRequireReady:
    def test_ready(self, ready):
        require_ready(ready.engine, ready.new_table)
        require_ready(ready.engine, [ready.old_table.metadata, ready.new_table.c.embedding_new])

    def test_missing_rows(self, ready):
        overwrite(ready, "update articles set embedding_new = null where id = 17")
        with pytest.raises(errors.BackfillIncompleteError, match="1 rows are pending"):
            require_ready(ready.engine, ready.new_table)
        require_ready(ready.engine, ready.new_table, max_pending=1)
        require_ready(ready.engine, ready.old_table)

    def test_missing_index(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("drop index ix_articles_embedding_new"))
        with pytest.raises(errors.BackfillIncompleteError, match="embedding_new does not exist"):
            require_ready(ready.engine, ready.new_table)

    def test_an_index_of_another_name(self, ready):
        """As *backfill* names it where the application calls its indexes otherwise."""
        index = "ix_articles_embedding_new"
        with ready.engine.begin() as connection:
            connection.execute(sa.text(f"alter index {index} rename to called_otherwise"))
        require_ready(ready.engine, ready.new_table)
        with ready.engine.begin() as connection:
            connection.execute(sa.text("drop index called_otherwise"))
            partly = "using hnsw (embedding_new vector_cosine_ops) where id > 5"
            connection.execute(sa.text(f"create index on articles {partly}"))
            other = "using hnsw (embedding_new vector_l2_ops)"
            connection.execute(sa.text(f"create index on articles {other}"))
        with pytest.raises(errors.BackfillIncompleteError, match=f"{index} does not exist"):
            require_ready(ready.engine, ready.new_table)

    def test_unbound(self, world):
        world.create(3)
        with pytest.raises(errors.NotBoundError):
            require_ready(world.engine, world.new_table)
        with pytest.raises(errors.NotBoundError, match="declares no embedding column"):
            require_ready(world.engine, sa.MetaData())

    def test_another_encoder(self, ready):
        registry.use_encoder(DeterministicEncoder("new", 48, salt="elsewhere"))
        with pytest.raises(errors.EncoderMismatchError):
            require_ready(ready.engine, ready.new_table)

    def test_failed_and_pending_rows(self, ready):
        with ready.engine.begin() as connection:
            connection.execute(sa.text("insert into articles (id, body) values (900, 'x')"))
        with pytest.raises(errors.BackfillIncompleteError, match="1 rows are pending"):
            require_ready(ready.engine, ready.new_table)
        require_ready(ready.engine, ready.new_table, max_pending=None)
        ready.fail(900, "embedding_new")
        require_ready(ready.engine, ready.new_table)
        with pytest.raises(errors.BackfillIncompleteError, match="could not be encoded"):
            require_ready(ready.engine, ready.new_table, max_failed=0)

    def test_nothing_is_written(self, world):
        world.create(5)
        require_ready(world.engine, world.old_table)
        with world.engine.connect().execution_options(postgresql_readonly=True) as connection:
            require_ready(connection, world.old_table)
            connection.rollback()

    def test_the_table_is_not_read(self, ready):
        """Its cost is that of what is missing: a row that is locked for good is no hindrance."""
        with ready.engine.connect() as connection:
            require_ready(connection, ready.new_table)
            connection.rollback()
            before = "select seq_scan + coalesce(seq_tup_read, 0) from pg_stat_user_tables "
            before += "where relname = 'articles'"
            connection.execute(sa.text("analyze articles"))
            connection.execute(sa.text("set enable_seqscan = on"))
            connection.execute(sa.text("select pg_stat_force_next_flush()"))
            connection.commit()
            seen = connection.execute(sa.text(before)).scalar_one()
            require_ready(connection, ready.new_table)
            connection.commit()
            connection.execute(sa.text("select pg_stat_force_next_flush()"))
            connection.commit()
            assert connection.execute(sa.text(before)).scalar_one() == seen


class TestMeasures:
    def test_recall_counts_ties(self):
        exact = np.array([0.9, 0.8, 0.8, 0.8], dtype=np.float32)
        assert measures.recall([0.9, 0.8], exact[:2], 2) == 1
        assert measures.recall([0.9, 0.1], exact[:2], 2) == 0.5
        assert measures.recall([], exact[:2], 2) == 0
        assert measures.recall([], np.array([-np.inf], dtype=np.float32), 2) is None
        assert measures.recall([0.9], np.array([0.9, -np.inf], dtype=np.float32), 2) == 1

    def test_nearest_by_blocks_is_nearest_of_all(self):
        random = np.random.default_rng(1)
        scores = random.standard_normal((7, 1000)).astype(np.float32)
        scores[3, 5] = np.nan
        found = measures.Nearest(7, 10)
        for first in range(0, 1000, 130):
            found.add(scores[:, first : first + 130], first)
        scores[3, 5] = -np.inf
        assert (found.positions == np.argsort(-scores, axis=1)[:, :10]).all()

    def test_fewer_rows_than_k(self):
        found = measures.Nearest(1, 5)
        found.add(np.array([[0.1, 0.3]], dtype=np.float32), 0, np.array([True, False]))
        assert found.positions.tolist() == [[0, -1, -1, -1, -1]]

    def test_ndcg_recall_mrr(self):
        gains = {"a": 2.0, "b": 1.0}
        assert measures.ndcg(["a", "b", "c"], gains, 10) == pytest.approx(1)
        ideal = 2 + 1 / np.log2(3)
        assert measures.ndcg(["c", "a"], gains, 10) == pytest.approx(2 / np.log2(3) / ideal)
        assert measures.recall_of(["c", "a"], gains, 10) == 0.5
        assert measures.reciprocal_rank(["c", "a"], gains, 10) == 0.5
        assert measures.reciprocal_rank(["c"], gains, 10) == 0
