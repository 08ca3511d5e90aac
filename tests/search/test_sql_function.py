"""BM25 for callers without Python: ``sbert.bm25_v1`` and ``matching`` give the same."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from standard_docstrings import documented

from sbert_pg.search.words import matching
from tests.search.test_words import QUESTIONS, Base, Note, Odd, Spoken, Weighed

ODD = [
    "",
    "the of and",
    '"a list" -sorted',
    "qqq ' \\ zz",
    "deque -rotate",
    '-"x y" -z "',
    "deque --rotate",
    '--"a list" ---sorted',
]


@pytest.fixture
def session(engine: sa.Engine) -> Any:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def rows_of(session: Session, relation: str, key: str, *arguments: Any) -> list[tuple[Any, float]]:
    values = {f"a{n}": value for n, value in enumerate(arguments)}
    names = ", ".join(f":{name}" for name in values)
    statement = sa.text(
        f"SELECT (matched).{key}, score FROM sbert.bm25_v1(NULL::{relation}, {names})"
    )
    return [tuple(row) for row in session.execute(statement, values)]


@pytest.mark.parametrize("analysed", [False, True])
def test_the_same_as_matching(session: Session, analysed: bool) -> None:
    session.execute(
        sa.insert(Note),
        [
            {"id": n, "title": entry.name, "body": entry.docstring, "kind": "abc"[n % 3]}
            for n, entry in enumerate(documented(1000), start=1)
        ],
    )
    if analysed:
        session.execute(sa.text("ANALYZE note"))
    for question in [*QUESTIONS, *ODD]:
        expected = [(r[0].id, r.score) for r in session.execute(matching(Note.search, question))]
        found = rows_of(session, "note", "id", "search", question)
        assert [id_ for id_, _ in found] == [id_ for id_, _ in expected], question
        assert [s for _, s in found] == pytest.approx([s for _, s in expected], rel=1e-9)
        some = matching(Note.search, question, limit=3, where=Note.kind == "a")
        found = rows_of(session, "note", "id", "search", question, 3, "d.kind = 'a'")
        assert [id_ for id_, _ in found] == [row[0].id for row in session.execute(some)]


def test_weights_languages_and_odd_names(session: Session) -> None:
    texts = [("fox", "the cat"), ("the cat", "a fox and a fox"), ("dog", "fox")]
    session.add_all(Weighed(id=n, title=t, body=b) for n, (t, b) in enumerate(texts))
    session.add_all(
        [
            Spoken(id=1, language="german", body="die Häuser"),
            Spoken(id=2, language="english", body="the houses"),
        ]
    )
    session.add(Odd(id=1, body="some words"))
    session.flush()
    expected = [(r[0].id, r.score) for r in session.execute(matching(Weighed.search, "fox"))]
    classes = [weight for _, weight in sorted(Weighed.search.type.weight_classes.items())]
    found = rows_of(session, "weighed", "id", "search", "fox", 10, "true", None, classes)
    assert [id_ for id_, _ in found] == [id_ for id_, _ in expected]
    assert [s for _, s in found] == pytest.approx([s for _, s in expected])
    for language, house in (("german", "haus"), ("english", "house")):
        rows = session.execute(matching(Spoken.search, house, language=language))
        found = rows_of(session, "spoken", "id", "search", house, 10, "true", language)
        assert found == [(row[0].id, pytest.approx(row.score)) for row in rows]
        assert len(found) == 1
    found = rows_of(session, '"a ""$x$ %table\\:1"', "key", 'se"arch', "words")
    assert [id_ for id_, _ in found] == [1]


def scores_of_both(session: Session, question: str) -> list[list[Any]]:
    """Of ``matching`` and of the function, in German."""
    rows = session.execute(matching(Spoken.search, question, language="german", limit=50))
    found = rows_of(session, "spoken", "id", "search", question, 50, "true", "german")
    return [[row.score for row in rows], [score for _, score in found]]


def test_a_language_among_rows_without_one(session: Session) -> None:
    session.execute(sa.text("ALTER TABLE spoken ALTER language DROP NOT NULL"))
    session.execute(
        sa.text(
            "INSERT INTO spoken (id, language, body) SELECT n, CAST(CASE n % 4 WHEN 1 THEN "
            "'german' WHEN 2 THEN 'english' END AS regconfig), repeat('Haus Garten ', n % 7 + 1) "
            "FROM generate_series(1, 400) AS n"
        )
    )
    counted, _ = scores_of_both(session, "Haus")
    session.execute(sa.text("ANALYZE spoken"))
    for scores in scores_of_both(session, "Haus"):
        assert scores == pytest.approx(counted, rel=1e-6)


def test_statistics_of_all_languages_say_nothing_of_one(session: Session) -> None:
    """In a table of which the server does not know how many rows there are."""
    made = "tsvector GENERATED ALWAYS AS (to_tsvector(language, coalesce(body, ''))) STORED"
    columns = f"id int PRIMARY KEY, language regconfig, body text, search {made}"
    german = "generate_series(1, 40) AS n"
    for statement in (
        "DROP TABLE spoken",
        f"CREATE TABLE spoken ({columns}) PARTITION BY RANGE (id)",
        "CREATE TABLE spoken_1 PARTITION OF spoken FOR VALUES FROM (0) TO (1000)",
        f"INSERT INTO spoken SELECT n, 'german', repeat('Haus ', n % 7 + 1) FROM {german}",
        "INSERT INTO spoken SELECT n, 'english', 'home' FROM generate_series(41, 400) AS n",
        "ANALYZE spoken",
        "CREATE TABLE spoken_2 PARTITION OF spoken FOR VALUES FROM (1000) TO (2000)",
    ):
        session.execute(sa.text(statement))
    expected, found = scores_of_both(session, "Haus")
    assert found == pytest.approx(expected, rel=1e-9)


def test_statistics_of_a_table_say_nothing_of_its_heirs(session: Session) -> None:
    notes = [{"id": n, "title": "fox" if n % 2 else "dog", "kind": ""} for n in range(1, 101)]
    session.execute(sa.insert(Note), notes)
    session.execute(sa.text("ANALYZE note"))
    session.execute(sa.text("CREATE TABLE heir () INHERITS (note)"))
    rows = "SELECT n, 'dog', '' FROM generate_series(101, 900) AS n"
    session.execute(sa.text(f"INSERT INTO heir (id, title, kind) {rows}"))
    expected = [row.score for row in session.execute(matching(Note.search, "fox", limit=3))]
    found = [score for _, score in rows_of(session, "note", "id", "search", "fox", 3)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_what_is_no_text_column_is_refused(session: Session) -> None:
    with pytest.raises(sa.exc.DBAPIError, match="no text column"):
        rows_of(session, "note", "id", "body", "x")
