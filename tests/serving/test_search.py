"""``/search``: what is found by meaning, words and both, what is shown, and what is refused."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from sbert_pg.cli.serve import looking
from sbert_pg.errors import DeclarationError
from sbert_pg.serving.exposed import Question, Shown
from sbert_pg.serving.server import serving

MONEY = "I want my money returned"


@pytest.fixture
def search(shown, minilm, client):
    with serving({"all-MiniLM-L6-v2": minilm}, shown, port=0) as port:
        http = client(port)

        def ask(query=MONEY, **body):
            return http.post("/search", json={"table": "article", "query": query, **body})

        yield ask


def titles(answer):
    assert answer.status_code == 200, answer.text
    return [one["row"]["title"] for one in answer.json()["results"]]


def test_by_meaning_by_words_and_by_both(search):
    assert titles(search(limit=2)) == ["Refunds", "Rückgabe"]
    assert titles(search("Sundays", by="words")) == ["Opening hours"]
    assert titles(search("Sundays", by="both"))[0] == "Opening hours"
    [first] = search(limit=1).json()["results"]
    assert first["row"] == {"id": 1, "title": "Refunds", "lang": "en", "year": 2021}
    assert 0.4 < first["similarity"] <= 1


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"lang": "de"}, {"Rückgabe"}),
        ({"lang": ["de", "fr"]}, {"Rückgabe"}),
        ({"year": {">": 2021, "<=": 2022}}, {"Opening hours"}),
        ({"year": "2023"}, {"Careers"}),
        ({"year": {"!=": 2021}, "lang": "en"}, {"Opening hours", "Careers"}),
        ({"year": None}, set()),
        ({"year": {"!=": None}, "lang": "de"}, {"Rückgabe"}),
        ({"title": "'; DROP TABLE article; --"}, set()),
        ({}, {"Refunds", "Opening hours", "Careers", "Rückgabe"}),
    ],
)
@pytest.mark.parametrize("by", ["meaning", "both"])
def test_filters(search, where, expected, by):
    assert set(titles(search(where=where, by=by))) == expected


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"where": {"secret": "hush"}}, "no column 'secret'"),
        ({"where": {"embedding": "[1]"}}, "no column"),
        ({"where": {"year": "soon"}}, "does not fit its column"),
        ({"where": {"year": 10**30}}, "does not fit its column"),
        ({"where": {"year": {"~": "1"}}}, "no operator"),
        ({"where": {"year": {"<": None}}}, "null goes with"),
        ({"where": {"year": {}}}, "no operator and value"),
        ({"where": {"year": []}}, "a list of 1 to"),
        ({"where": {"year": [[1]]}}, "a value is"),
        ({"where": {"title": "a\0b"}}, "NUL"),
        ({"where": ["lang"]}, "'where' is an object"),
        ({"query": ""}, "not blank"),
        ({"query": None}, "not blank"),
        ({"query": 7}, "not blank"),
        ({"query": [0.1] * 384}, "not blank"),
        ({"query": "x\0"}, "NUL"),
        ({"query": "x" * 100_001}, "100,000"),
        ({"limit": 0}, "'limit'"),
        ({"limit": 1e3}, "'limit'"),
        ({"limit": 10**9}, "'limit'"),
        ({"by": "magic"}, "'by'"),
        ({"by": ["words"]}, "'by'"),
        ({"table": "pg_authid"}, "'table' is one of article"),
        ({"table": {"a": 1}}, "'table' is one of article"),
        ({"offset": 3}, "no field"),
    ],
)
def test_what_makes_no_sense_is_refused(search, body, says):
    answer = search(**body)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_a_row_like_another(shown):
    found = shown.ask("article", Question(None, key={"id": 1}))
    assert {one.row["id"] for one in found} == {2, 3, 4}, "all but the row itself"
    similarities = [one.scores["similarity"] for one in found]
    assert similarities == sorted(similarities, reverse=True)
    with pytest.raises(DeclarationError, match="no row"):
        shown.ask("article", Question(None, key={"id": 17}))
    with pytest.raises(DeclarationError, match="'key' has to name id"):
        shown.ask("article", Question(None, key={"title": "Refunds"}))


def test_columns_that_are_not_there_are_refused(articles):
    for listed in ("article:id,nothing", "article:embedding", "nothing"):
        with pytest.raises(DeclarationError):
            Shown(articles, looking([listed]))


def test_a_slow_statement_is_ended_and_a_lost_database_is_said(
    article_template, minilm, client, databases
):
    url = databases.clone(article_template)
    articles = sa.create_engine(url)
    slow = Shown(articles, looking(["article"]), timeout=2.0)
    with serving({"all-MiniLM-L6-v2": minilm}, slow, port=0) as port, articles.begin() as other:
        other.execute(sa.text("LOCK TABLE article IN ACCESS EXCLUSIVE MODE"))
        answer = client(port).post("/search", json={"table": "article", "query": "x"})
        assert answer.status_code in (500, 503)
        assert "article" not in answer.text
        other.rollback()
    lost = Shown(articles, looking(["article"]))
    with serving({"all-MiniLM-L6-v2": minilm}, lost, port=0) as port:
        assert client(port).get("/ready").status_code == 200
        articles.dispose()
        databases.drop(str(url.database))
        answer = client(port).post("/search", json={"table": "article", "query": "x"})
        assert answer.status_code >= 500
        assert "Traceback" not in answer.text
        assert client(port).get("/ready").status_code == 503
        assert client(port).get("/health").status_code == 200
