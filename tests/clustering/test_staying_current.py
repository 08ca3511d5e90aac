"""New rows, changed rows, drift, numbers and names over runs, changes of encoder."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import catalog, registry
from sbert_pg import clustering as cl
from sbert_pg.clustering.keywords import Capitals, _stems, class_tfidf, count_words
from sbert_pg.errors import ClusteringError, DeclarationError, EncoderMismatchError
from sbert_pg.orm import embed_on_flush, embedding_column
from sbert_pg.testing import DeterministicEncoder

helpers = sys.modules["clustering_app"]
make_app, blobs, numbers_of = helpers.make_app, helpers.blobs, helpers.numbers_of


def insert(engine: sa.Engine, app: Any, first: int, vectors: Any) -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.insert(app.row.__table__),
            [{"id": first + n, "title": "new", "embedding": v} for n, v in enumerate(vectors)],
        )


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("half", [False, True], ids=["vector", "halfvec"])
def test_new_changed_and_emptied_rows(engine: sa.Engine, metric: Any, half: bool) -> None:
    app = make_app(metric=metric, half=half)
    vectors, truth = blobs(100)
    app.fill(engine, vectors)
    cl.cluster(engine, app.topics, cl.KMeans(5))
    before = numbers_of(engine, app.topics)
    with engine.begin() as connection:
        assert cl.assign(connection, app.topics) == cl.Assigned(0, 0, 0)
    more, more_truth = blobs(20, seed=1)
    insert(engine, app, 101, more)
    with engine.begin() as connection:
        for key, vector in {1: vectors[1], 2: None}.items():
            connection.execute(
                sa.update(app.row.__table__)
                .where(app.row.__table__.c.id == key)
                .values(embedding=vector)
            )
        connection.execute(sa.update(app.row).where(app.row.id == 3).values(title="other"))
        assert cl.assign(connection, app.topics) == cl.Assigned(added=20, changed=1, removed=1)
    after = numbers_of(engine, app.topics)
    assert 2 not in after
    assert after[1] == before[2] != before[1]
    number_of = {truth[n]: before[n + 1] for n in range(100)}
    assert [after[101 + n] for n in range(20)] == [number_of[t] for t in more_truth]
    with Session(engine) as session:
        for cluster in session.scalars(app.topics.clusters()):
            assert cluster.size == sum(number == cluster.number for number in after.values())
        fitted = session.scalars(
            sa.select(app.topics.Assignment.is_fitted).where(app.topics.Assignment.row_id > 100)
        ).all()
        assert set(fitted) == {False}


def test_rows_beyond_every_dense_cluster_are_outliers(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(100, 4)
    app.fill(engine, vectors)
    cl.cluster(engine, app.topics, cl.Communities(0.7, 5))
    far = np.zeros((1, helpers.DIMENSIONS))
    far[0, 20] = 1
    near = vectors[:1] + 1e-3
    insert(engine, app, 101, np.concatenate([far, near]))
    with engine.begin() as connection:
        assert cl.assign(connection, app.topics).added == 2
    found = numbers_of(engine, app.topics)
    assert (found[101], found[102]) == (None, found[1])
    with Session(engine) as session:
        assert [row.id for row, _ in session.execute(app.topics.outliers())] == [101]
    # An outlier that moves into a cluster is noticed too.
    with engine.begin() as connection:
        connection.execute(
            sa.update(app.row.__table__)
            .where(app.row.__table__.c.id == 101)
            .values(embedding=vectors[1])
        )
        assert cl.assign(connection, app.topics).changed == 1
    assert numbers_of(engine, app.topics)[101] == found[2]


def test_assigning_needs_the_filter_of_the_run(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(50)
    app.fill(engine, vectors)
    with engine.begin() as connection, pytest.raises(ClusteringError, match="no current"):
        cl.assign(connection, app.topics)
    cl.cluster(engine, app.topics, cl.KMeans(5), where=app.row.id <= 40)
    with engine.begin() as connection:
        with pytest.raises(ClusteringError, match=r"made with the filter 'row\.id <= 40'"):
            cl.assign(connection, app.topics)
        assert cl.assign(connection, app.topics, where=app.row.id <= 40) == cl.Assigned(0, 0, 0)


def test_drift_tells_when_to_run_again(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(200)
    app.fill(engine, vectors)
    cl.cluster(engine, app.topics, cl.KMeans(5))
    more, _ = blobs(100, seed=2)
    insert(engine, app, 201, more)
    with engine.begin() as connection:
        assert cl.drift(connection, app.topics).unassigned == 100
        cl.assign(connection, app.topics)
        still = cl.drift(connection, app.topics)
    assert (still.rows, still.unassigned, still.later) == (300, 0, 100)
    assert not still.is_stale
    assert still.far_share < 0.05
    # Rows of a topic that was not there before.
    other = np.zeros((60, helpers.DIMENSIONS))
    other[:, 12] = 1
    insert(engine, app, 301, other)
    with engine.begin() as connection:
        cl.assign(connection, app.topics)
        now = cl.drift(connection, app.topics)
    assert now.is_stale
    assert now.far >= 60
    assert now.mean_distance > now.mean_distance_then
    assert len(now.reasons) == 2
    cl.cluster(engine, app.topics, cl.KMeans(6))
    with engine.begin() as connection:
        assert not cl.drift(connection, app.topics).is_stale


def test_numbers_and_names_are_kept_where_clusters_match(engine: sa.Engine, app: Any) -> None:
    vectors, truth = blobs(200)
    app.fill(engine, vectors)
    cl.cluster(engine, app.topics, cl.KMeans(5))
    before = numbers_of(engine, app.topics)
    with engine.begin() as connection:
        cl.name_cluster(connection, app.topics, before[1], "the first")
        with pytest.raises(ClusteringError, match="no current cluster 99"):
            cl.name_cluster(connection, app.topics, 99, "nobody")
    cl.cluster(engine, app.topics, cl.KMeans(5), seed=11)
    assert numbers_of(engine, app.topics) == before
    # One topic goes, another comes.
    gone, new = before[2], np.zeros((40, helpers.DIMENSIONS))
    new[:, 15] = 1
    new += 0.01 * np.random.default_rng(0).standard_normal(new.shape)
    with engine.begin() as connection:
        keys = [n + 1 for n in range(200) if truth[n] == truth[1]]
        connection.execute(sa.delete(app.row).where(app.row.id.in_(keys)))
    insert(engine, app, 1001, new)
    cl.cluster(engine, app.topics, cl.KMeans(5), seed=5)
    after = numbers_of(engine, app.topics)
    assert all(after[key] == before[key] for key in before if key in after)
    assert gone not in after.values()
    assert {after[1001 + n] for n in range(40)} == {6}
    with Session(engine) as session:
        named = session.scalars(app.topics.clusters().where(app.topics.Cluster.is_named)).all()
        assert [(c.number, c.label) for c in named] == [(before[1], "the first")]
    with engine.begin() as connection:
        cl.name_cluster(connection, app.topics, before[1], None)
    with Session(engine) as session:
        assert not session.scalars(app.topics.clusters().where(app.topics.Cluster.is_named)).all()


WORDS = {
    "weather": "rain sunshine clouds forecast storm temperature",
    "money": "bank account transfer payment credit balance",
    "cooking": "recipe oven butter garlic onion simmer",
}


def text_app() -> tuple[Any, Any]:
    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding = embedding_column("old", "body", dimensions=384)
        embedding_v2 = embedding_column("new", "body", dimensions=64, nullable=True)

    return Base, Note


def texts(number: int) -> list[str]:
    random = np.random.default_rng(number)
    found = []
    for n in range(number):
        words = list(WORDS.values())[n % 3].split()
        found.append(" ".join(random.choice(words, 4, replace=False)) + " the and of 12")
    return found


def test_a_clustering_belongs_to_its_encoder(engine: sa.Engine) -> None:
    """And its numbers and names are carried over to the column of the next encoder."""
    registry.use_encoder(DeterministicEncoder("old"))
    registry.use_encoder(DeterministicEncoder("new", 64, salt="other"))
    base, note = text_app()
    topics = cl.clusters_of(note.embedding)
    following = topics.on(note.embedding_v2)
    base.metadata.create_all(engine)
    with engine.begin() as connection:
        catalog.bind(connection, note.__table__.c.embedding)
        catalog.bind(connection, note.__table__.c.embedding_v2)
    with Session(engine) as session, session.begin():
        embed_on_flush(session)
        session.add_all(note(body=text) for text in texts(90))
    run = cl.cluster(engine, topics, cl.KMeans(3))
    assert run.encoder == "old"
    assert run.fingerprint == DeterministicEncoder("old").spec.fingerprint
    with Session(engine) as session:
        for cluster in session.scalars(topics.clusters()):
            keywords = " ".join(cluster.keywords).split()
            (topic,) = [t for t, words in WORDS.items() if keywords[0] in words.split()]
            assert set(keywords) == set(WORDS[topic].split())
            assert cluster.label == ", ".join(cluster.keywords[:3])
            with engine.begin() as connection:
                cl.name_cluster(connection, topics, cluster.number, topic)
        found = session.execute(topics.nearest_clusters("butter and garlic", limit=1)).one()
        session.refresh(found[0])
        assert found[0].label == "cooking"
        row = session.scalars(sa.select(note).where(note.body.like("%garlic%")).limit(1)).one()
        assert [c.label for c in row.clusters] == ["cooking"]
    before = numbers_of(engine, topics)
    with engine.begin() as connection, pytest.raises(ClusteringError, match="no current"):
        cl.assign(connection, following)
    replaced = cl.cluster(engine, following, cl.KMeans(3), seed=9)
    assert replaced.column_name == "embedding_v2"
    assert replaced.encoder == "new"
    # Both columns have their own current run, with the same numbers and names.
    assert numbers_of(engine, topics) == before
    assert numbers_of(engine, following) == before
    with Session(engine) as session:
        assert {c.label for c in session.scalars(following.clusters())} == set(WORDS)
        found = session.execute(following.nearest_clusters("rain and storm", limit=1)).one()
        assert found[0].label == "weather"
    # Centroids of another encoder are never held against the column's vectors.
    with engine.begin() as connection:
        run_table = topics.run_table
        connection.execute(
            sa.update(run_table).where(run_table.c.id == run.id).values(fingerprint="another")
        )
    with engine.begin() as connection, pytest.raises(EncoderMismatchError, match="Run the"):
        cl.assign(connection, topics)


def test_after_the_change_of_encoder_the_tables_go_on(engine: sa.Engine) -> None:
    """The class that has only the new column reads the runs that were made before the switch."""
    registry.use_encoder(DeterministicEncoder("old"))
    registry.use_encoder(DeterministicEncoder("new", 64, salt="other"))
    base, note = text_app()
    topics = cl.clusters_of(note.embedding)
    base.metadata.create_all(engine)
    with engine.begin() as connection:
        catalog.bind(connection, note.__table__.c.embedding)
        catalog.bind(connection, note.__table__.c.embedding_v2)
    with Session(engine) as session, session.begin():
        embed_on_flush(session)
        session.add_all(note(body=text) for text in texts(90))
    cl.cluster(engine, topics, cl.KMeans(3))
    before = numbers_of(engine, topics)
    with engine.begin() as connection:
        cl.name_cluster(connection, topics, before[1], "the first")
    cl.cluster(engine, topics.on("embedding_v2"), cl.KMeans(3), seed=9)
    for name in ("body", "nothing"):
        with pytest.raises(DeclarationError, match=r"vector attribute|no column"):
            topics.on(name)

    class Next(DeclarativeBase):
        pass

    class Note(Next):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding_v2 = embedding_column("new", "body", dimensions=64)

    following = cl.clusters_of(Note.embedding_v2)
    assert numbers_of(engine, following) == before
    with Session(engine) as session:
        row = session.get(Note, 1)
        assert row is not None
        assert [(c.number, c.label) for c in row.clusters] == [(before[1], "the first")]
    with engine.begin() as connection:
        assert cl.assign(connection, following) == cl.Assigned(0, 0, 0)


def test_what_few_texts_of_a_cluster_have_is_not_what_it_is_about() -> None:
    counts = {
        1: {"development": 200, "libfoo": 6, "headers": 15},
        2: {"headers": 3, "game": 110},
    }
    assert class_tfidf(counts)[1] == ["development", "headers", "libfoo"]
    # What is as frequent elsewhere says nothing; of one class alone there is nothing to compare.
    counts[2]["headers"] = 190
    assert class_tfidf(counts)[1] == ["development", "libfoo"]
    assert class_tfidf({1: {"a": 3, "b": 2}})[1] == ["a", "b"]


def test_what_joins_words_is_no_keyword_in_any_language() -> None:
    """Without German stop words: articles are in every class, in some more often than in others."""
    topics = ["Regen", "Bank", "Butter", "Hotel", "Rennen"]
    texts = [
        (n, f"Die {topic} und das {topic} {'durch ' * (n == 0)}von {n}x")
        for n, topic in enumerate(topics)
        for _ in range(4)
    ] + [(n, "durch") for n in range(1, 5)]
    for n, keywords in class_tfidf(count_words(texts)).items():
        assert topics[n].lower() in keywords[0].split()
        assert not {"die", "das", "und", "von", "durch"} & set(keywords)


def test_proper_names_are_left_out_but_for_those_that_a_class_is_about() -> None:
    texts = [
        *[(1, "we want to pay for it with Apple here and there, for a PIN")] * 3,
        *[(1, "Paying is what we do in the town of London where one takes it all")] * 3,
        (1, "why we pay in the shop of Zoe, if ever"),
        (1, "and pay in the shop of Zoe, if ever"),
        *[(2, "some of the boats left and others came to the shore")] * 4,
    ]
    capitals = Capitals()
    counts = count_words(texts, capitals=capitals)
    assert capitals.names() == {"apple", "london", "zoe"}, "no PIN, nor how a sentence begins"
    keywords = class_tfidf(counts, names=capitals.names())[1]
    assert {"apple", "london"} <= set(keywords)
    assert "zoe" not in keywords
    assert "zoe" in class_tfidf(counts)[1]
    german = Capitals()
    german.add("mit dem Hund, der Katze und einem Vogel im Haus")
    assert german.names() == frozenset(), "every noun has a capital, so capitals say nothing"


def test_a_verb_keeps_its_particle() -> None:
    counts = count_words(
        [(1, "auto top up, and log out"), (1, "I've topped up"), (2, "up, not down")]
    )
    assert {"top up", "auto top up", "log out", "topped up"} <= set(counts[1])
    assert not {"top", "up", "ve", "out"} & set(counts[1])
    assert counts[2] == {}
    # Nothing but such verbs, in all texts.
    counts = count_words([(1, "How do I log out?"), (1, "log out"), (2, "lost cards")])
    assert class_tfidf(counts) == {1: ["log out"], 2: ["lost cards"]}


def test_what_an_article_is_elided_before_counts() -> None:
    texts = [(1, "L'hôtel de l’aéroport"), (1, "j'ai vu qu'ils've vu l'hôtel, we'll see")]
    assert count_words(texts, ["de"])[1].keys() >= {"hôtel", "aéroport"}
    assert not {"ve", "ll"} & set(count_words(texts, ["de"])[1])


def test_keywords_by_hand(engine: sa.Engine, app: Any) -> None:
    vectors, truth = blobs(60, 3)
    app.fill(engine, vectors)
    with engine.begin() as connection:
        for n, words in enumerate(WORDS.values()):
            keys = [key + 1 for key in range(60) if truth[key] == n]
            connection.execute(
                sa.update(app.row).where(app.row.id.in_(keys)).values(title=f"{words} 100%")
            )
    run = cl.cluster(engine, app.topics, cl.KMeans(3))
    with engine.begin() as connection:
        with pytest.raises(ClusteringError, match="plain vector column"):
            cl.find_keywords(connection, app.topics, run.id)
        cl.find_keywords(
            connection, app.topics, run.id, text=app.row.title, stop_words={"rain", "oven"}
        )
    with Session(engine) as session:
        found = [set(" ".join(c.keywords).split()) for c in session.scalars(app.topics.clusters())]
    expected = [set(words.split()) - {"rain", "oven"} for words in WORDS.values()]
    assert all(words in found for words in expected)


def test_terms_are_counted_by_text_and_weighed_by_class() -> None:
    texts = [
        (1, "The cat and the cat sat"),
        (1, "cat food"),
        (2, "dog food"),
        (2, None),
        (2, "dog"),
    ]
    counts = count_words(texts)
    assert counts[1] == {"cat": 2, "sat": 1, "food": 1, "cat sat": 1, "cat food": 1}
    # What one text alone has is no keyword of several; of few it is.
    assert class_tfidf(counts) == {1: ["cat"], 2: ["dog"]}
    assert class_tfidf(count_words(texts[1:3])) == {1: ["cat food"], 2: ["dog food"]}
    assert class_tfidf({}) == {}


def test_terms_of_a_class_do_not_repeat_each_other(engine: sa.Engine) -> None:
    texts = [
        (1, "I cannot verify my identity; verification hasn't worked"),
        (1, "Verifying my identity, and identities of others, for verification"),
        (1, "verified Mr. Zorro's identity"),
        (2, "top up by bank transfer"),
        (2, "my bank transfers"),
        (2, "a bank transfer"),
    ]
    counts = count_words(texts)
    with engine.connect() as connection:
        stems = _stems(connection, counts, "english")
        assert _stems(connection, counts, {"und"}) == {}
    keywords = class_tfidf(counts, stems=stems)
    assert keywords[2] == ["bank transfer"]
    assert len(keywords[1]) == 2, keywords
    assert {word[:4] for word in keywords[1]} == {"veri", "iden"}
    assert "hasn" not in counts[1]
    # Without stems the pair is in two of three texts, and says more than its words all the same.
    assert class_tfidf(counts)[2] == ["bank transfer"]


def test_stop_words_and_forms_are_those_of_the_language(engine: sa.Engine) -> None:
    """The language is that of whose stop words the texts have most; nobody says which it is."""
    texts = [
        (1, "Wenn sie können, besuchen die Touristen ein Hotel"),
        (1, "Die Hotels können auch besuchte Touristen haben, wenn das geht"),
        (2, "Der Krieg und die Kriege haben das Land verändert"),
        (2, "Können sie das Land wenigstens im Krieg verlassen"),
    ]
    counts = count_words(texts)
    assert "können" in counts[1]
    with engine.connect() as connection:
        stems = _stems(connection, counts, "english")
        assert not {"können", "wenn", "sie", "die", "hotels können"} & set(counts[1])
        assert stems["hotels"] == stems["hotel"]
        assert stems["krieg"] == stems["kriege"]
        assert {word for w in class_tfidf(counts, stems=stems)[1] for word in w.split()} & {
            "touristen", "hotel", "hotels", "besuchen", "besuchte"
        }  # fmt: skip
        english = count_words([(1, "how do I top up my card"), (1, "topping up my own")])
        before = {cluster: dict(own) for cluster, own in english.items()}
        assert _stems(connection, english, "english")["topping"] == "top"
        assert english == before, "a verb keeps its particle, which is a stop word"


def test_stems_in_an_encoding_that_lacks_letters(engine: sa.Engine) -> None:
    """PostgreSQL cannot read its own stop words of Hungarian there."""
    name = f"{engine.url.database}_latin"
    server = engine.execution_options(isolation_level="AUTOCOMMIT")
    made = f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"
    with server.connect() as connection:
        connection.exec_driver_sql(made)
    latin = sa.create_engine(engine.url.set(database=name), poolclass=sa.NullPool)
    with latin.connect() as connection:
        stems = _stems(connection, count_words([(1, "für die databases")]), "english")
        assert stems["databases"] == "databas"
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")
