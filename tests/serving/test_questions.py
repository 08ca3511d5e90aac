"""``CALL sbert.embed``: vectors for plain SQL, made by workers."""

from __future__ import annotations

import threading

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg.freshness import worker_thread
from sbert_pg.serving.questions import Answers
from sbert_pg.types.wire import from_text

CALL = "CALL sbert.embed('article.embedding', %s, NULL, 120)"


@pytest.fixture
def database(databases, article_template, minilm):
    """A database of this test's own."""
    url = databases.clone(article_template)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()
    databases.discard(str(url.database))


def connect(engine: sa.Engine, **options) -> psycopg.Connection:
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(url, autocommit=True, **options)


@pytest.fixture
def plain(database):
    with connect(database) as connection:
        yield connection


@pytest.fixture
def answering(database, plain):
    answers = Answers(database)
    with worker_thread(database, companions=[answers]):
        while plain.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND "
            "classid = 1935827316"
        ).fetchone() == (0,):
            pass
        yield answers


def embedded(connection, question):
    return connection.execute(CALL, [question]).fetchone()[0]


def test_a_question_is_answered_by_a_worker(answering, plain, minilm):
    text = embedded(plain, "I want my money returned")
    [expected] = minilm.encode_query(["I want my money returned"])
    np.testing.assert_allclose(from_text(text), expected, atol=1e-6)
    found = plain.execute(
        "SELECT title FROM article ORDER BY embedding <=> %s::vector LIMIT 1", [text]
    ).fetchone()
    assert found == ("Refunds",)


def test_what_is_known_needs_no_worker_and_no_transaction(answering, plain):
    text = embedded(plain, "a question")
    known = "SELECT sbert.known_v1('public.article.embedding', %s)"
    assert plain.execute(known, ["a question"]).fetchone() == (text,)
    assert plain.execute(known, ["another"]).fetchone() == (None,)
    answering.stop()
    with plain.transaction():
        assert embedded(plain, "a question") == text


def test_many_ask_at_once_and_two_workers_answer(answering, database, minilm):
    second = Answers(database)
    second.start()
    questions = [f"question {n % 7} of {n}" for n in range(40)]
    texts: dict[str, str] = {}

    def ask(some: list[str]) -> None:
        with connect(database) as connection:
            texts.update((one, embedded(connection, one)) for one in some)

    threads = [threading.Thread(target=ask, args=(questions[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    second.stop()
    vectors = np.stack([from_text(texts[one]) for one in questions])
    np.testing.assert_allclose(vectors, minilm.encode_query(questions), atol=2e-3)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_at_every_isolation_level(answering, plain, level):
    plain.execute(f"SET default_transaction_isolation = '{level}'")
    assert embedded(plain, "at another level").startswith("[")


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("CALL sbert.embed('article.embedding', 'x', NULL)", "no worker answers"),
        ("CALL sbert.embed('article.embedding', '  ', NULL)", "not blank"),
        ("CALL sbert.embed('article.embedding', NULL, NULL)", "not blank"),
        ("CALL sbert.embed('article.embedding', repeat('x', 100001), NULL)", "100,000"),
        ("CALL sbert.embed('article.title', 'x', NULL)", "no embedding column"),
        ("CALL sbert.embed('nothing', 'x', NULL)", "no embedding column"),
        ("CALL sbert.embed('a.b.c.d', 'x', NULL)", "no embedding column"),
        ("CALL sbert.embed('article.embedding; DROP TABLE article', 'x', NULL)", "not a valid"),
        ("CALL sbert.embed('', 'x', NULL)", "not a valid"),
        ("CALL sbert.embed(NULL, 'x', NULL)", "no embedding column"),
    ],
)
def test_errors_explain(plain, statement, says):
    with pytest.raises(psycopg.Error, match=says):
        plain.execute(statement)
    assert plain.execute("SELECT count(*) FROM sbert.question").fetchone() == (0,)


def test_where_it_cannot_commit_it_says_what_to_do(answering, plain):
    plain.execute(
        "CREATE FUNCTION asked() RETURNS text LANGUAGE plpgsql AS $$ DECLARE v text; "
        "BEGIN CALL sbert.embed('article.embedding', 'in a function', v); RETURN v; END $$"
    )
    for statement in ("BEGIN; CALL sbert.embed('article.embedding', 'x', NULL)", "SELECT asked()"):
        with pytest.raises(psycopg.errors.InvalidTransactionTermination) as raised:
            plain.execute(statement)
        assert "inside BEGIN or a function" in raised.value.diag.message_primary
        assert "sbert.known_v1" in raised.value.diag.message_hint
        plain.rollback()
    # Where PostgreSQL lets procedures commit it works, also after an earlier one has.
    plain.execute(
        "DO $$ DECLARE v text; BEGIN CALL sbert.embed('article.embedding', 'one', v, 120); "
        "CALL sbert.embed('article.embedding', 'two', v, 120); ASSERT v IS NOT NULL; END $$"
    )


def test_a_role_that_may_not_use_plpgsql_itself(answering, plain, database):
    role = f"without_do_{database.url.database}"
    plain.execute(f"CREATE ROLE {role}")
    try:
        plain.execute("REVOKE USAGE ON LANGUAGE plpgsql FROM public")
        plain.execute("SELECT sbert.grant_v1(%s, 'reader')", [role])
        plain.execute(f"GRANT SELECT ON article TO {role}")
        plain.execute(f"SET ROLE {role}")
        assert embedded(plain, "may I?").startswith("[")
        with pytest.raises(psycopg.errors.InvalidTransactionTermination), plain.transaction():
            embedded(plain, "inside")
    finally:
        plain.execute("RESET ROLE")
        plain.execute(f"DROP OWNED BY {role}")
        plain.execute(f"DROP ROLE {role}")


def test_a_column_whose_encoder_is_not_here_is_said_in_time(answering, plain, monkeypatch):
    from sbert_pg import registry

    registry.forget_encoders()
    monkeypatch.setattr(registry, "_loader", None)
    with pytest.raises(psycopg.Error, match=r"within 0\.5 seconds"):
        plain.execute("CALL sbert.embed('article.embedding', 'unheard', NULL, 0.5)")


def test_the_rights_of_the_caller_are_respected(answering, plain, database):
    role = f"asker_{database.url.database}"
    plain.execute(f"CREATE ROLE {role}")
    try:
        plain.execute("SELECT sbert.grant_v1(%s, 'reader')", [role])
        theirs = embedded(plain, "the owner's question")
        plain.execute(f"SET ROLE {role}")
        with pytest.raises(psycopg.Error, match="no embedding column that"):
            embedded(plain, "may I?")
        plain.execute("RESET ROLE")
        plain.execute(f"GRANT SELECT (id) ON article TO {role}")
        plain.execute(f"SET ROLE {role}")
        assert embedded(plain, "may I?").startswith("[")
        known = "SELECT sbert.known_v1('article.embedding', %s)"
        assert plain.execute(known, ["the owner's question"]).fetchone() == (None,)
        assert theirs
        for statement in ("SELECT * FROM sbert.question", "DELETE FROM sbert.question"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                plain.execute(statement)
    finally:
        plain.execute("RESET ROLE")
        plain.execute(f"DROP OWNED BY {role}")
        plain.execute(f"DROP ROLE {role}")


def test_what_nobody_fetches_is_removed(answering, database, plain):
    embedded(plain, "kept")
    embedded(plain, "old")
    answering.stop()  # It would answer what is to stay without an answer.
    plain.execute(
        "INSERT INTO sbert.question (binding_id, role, digest, question, asked_at) "
        "SELECT id, 'gone', '', 'unanswered', now() - interval '2 minutes' FROM sbert.binding"
    )
    plain.execute(
        "UPDATE sbert.question SET asked_at = now() - interval '2 days' WHERE question = 'old'"
    )
    answering._tidy_at = 0.0
    with connect(database) as other:
        answering._tidy(other)
    left = plain.execute("SELECT question FROM sbert.question").fetchall()
    assert left == [("kept",)]


def test_names_with_capitals_and_quotes(answering, plain, database):
    plain.execute('ALTER TABLE article RENAME TO "Odd "" table"')
    call = "CALL sbert.embed('\"Odd \"\" table\".embedding', 'odd', NULL, 120)"
    assert plain.execute(call).fetchone()[0].startswith("[")
