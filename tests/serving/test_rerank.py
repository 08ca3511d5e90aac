"""``/rerank``: a cross-encoder's order of documents, over HTTP."""

from __future__ import annotations

import re

import numpy as np
import pytest
from encoder_models import Wish, write_cross_encoder

from sbert_pg import Reranker
from sbert_pg.errors import DeclarationError, EncodingError
from sbert_pg.serving.server import serving
from sbert_pg.testing import DeterministicEncoder

DOCUMENTS = ["Opening hours", "Refunds and returns", "Jobs at the shop", ""]


class Words:
    """Scores by the words that a pair shares; a document of one letter cannot be scored."""

    labels = 1

    def score_pairs(self, pairs):
        for index, (_, text) in enumerate(pairs):
            if len(text) == 1:
                raise EncodingError("one letter", index=index)
        return np.float32([len(set(q.lower().split()) & set(t.lower().split())) for q, t in pairs])


@pytest.fixture
def ask(client):
    encoders = {"an-encoder": DeterministicEncoder()}
    with serving(encoders, rerankers={"team/words": Words()}, port=0) as port:
        yield lambda path="/rerank", **body: client(port).post(path, json=body)


def test_the_scores_of_a_cross_encoder(tmp_path, client):
    pytest.importorskip("sentence_transformers", reason="it writes the model")
    write_cross_encoder(Wish("bert"), tmp_path / "model", kind="BertTokenizer")
    reranker = Reranker.load(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    expected = reranker.score("how do I get a refund?", DOCUMENTS)
    with serving({}, rerankers={"cross": reranker}, port=0) as port:
        body = {"query": "how do I get a refund?", "documents": DOCUMENTS}
        results = client(port).post("/v1/rerank", json=body).json()["results"]
    assert [r["index"] for r in results] == np.argsort(-expected).tolist()
    scores = [r["relevance_score"] for r in results]
    np.testing.assert_allclose(scores, np.sort(expected)[::-1], atol=1e-4)


def test_the_best_first_as_many_as_are_wanted(ask):
    body = {"query": "returns and refunds", "documents": DOCUMENTS}
    answer = ask(**body, top_n=2, return_documents=True).json()
    assert answer == {
        "model": "team/words",
        "results": [
            {"index": 1, "relevance_score": 3.0, "document": {"text": DOCUMENTS[1]}},
            {"index": 0, "relevance_score": 0.0, "document": {"text": DOCUMENTS[0]}},
        ],
    }
    assert [r["index"] for r in ask(**body).json()["results"]] == [1, 0, 2, 3]
    assert [r["index"] for r in ask(**body, top_n=99).json()["results"]] == [1, 0, 2, 3]
    as_objects = body | {"documents": [{"text": text} for text in DOCUMENTS]}
    assert ask(**as_objects, model="words").json() == ask(**body).json()


def test_more_documents_than_a_batch(ask):
    documents = [f"document {n}" for n in range(500)]
    answer = ask(query="document 321", documents=documents, top_n=1).json()
    assert answer["results"] == [{"index": 321, "relevance_score": 2.0}]


@pytest.mark.parametrize(
    ("changes", "status", "param", "says"),
    [
        ({"query": ""}, 400, "query", "not empty"),
        ({"query": ["a"]}, 400, "query", "a text"),
        ({"documents": []}, 400, "documents", "at least one"),
        ({"documents": "a"}, 400, "documents", "a list"),
        ({"documents": ["a", None]}, 400, "documents", r"\[1\] is neither"),
        ({"documents": [{"body": "a"}]}, 400, "documents", r"\[0\] is neither"),
        ({"documents": ["ab"] * 2049}, 400, "documents", "2,048"),
        ({"documents": ["ab", "c"]}, 400, "documents", r"\[1\] cannot be scored: one letter"),
        ({"top_n": 0}, 400, "top_n", "from 1 on"),
        ({"top_n": True}, 400, "top_n", "from 1 on"),
        ({"return_documents": "yes"}, 400, "return_documents", "true or false"),
        ({"model": "an-encoder"}, 404, "model", "team/words"),
        ({"model": None}, 400, "model", "a text"),
        ({"rank_fields": ["x"]}, 400, "rank_fields", "no field"),
    ],
)
def test_errors_explain(ask, changes, status, param, says):
    answer = ask(**({"query": "a question", "documents": ["ab"]} | changes))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert re.search(says, error["message"]), error


def test_a_classifier_is_no_reranker():
    three = Words()
    three.labels = 3
    with (
        pytest.raises(DeclarationError, match="3 scores"),
        serving({}, rerankers={"three": three}, port=0),
    ):
        pass


def test_without_a_reranker_there_is_no_such_path(client):
    with serving({"an-encoder": DeterministicEncoder()}, port=0) as port:
        assert client(port).post("/rerank", json={}).status_code == 404
