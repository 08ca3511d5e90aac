"""``/v1/embeddings``, asked by OpenAI's own client and by hostile ones."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import openai
import pytest

from sbert_pg import spec
from sbert_pg.serving.server import serving
from sbert_pg.testing import DeterministicEncoder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = ["How do I get my money back?", "Ich möchte mein Geld zurück", "💸" * 50]


@pytest.fixture
def port(minilm):
    with serving({MINILM: minilm}, port=0) as bound:
        yield bound


@pytest.fixture
def ask(port, client):
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0,
        http_client=client(port),
    ).embeddings.create  # fmt: skip


@pytest.mark.parametrize("name", [MINILM, "all-MiniLM-L6-v2"])
def test_openais_client_gets_the_encoders_vectors(ask, minilm, name):
    many = ask(model=name, input=TEXTS)
    assert many.model == MINILM
    assert [one.index for one in many.data] == [0, 1, 2]
    np.testing.assert_allclose(
        [one.embedding for one in many.data], minilm.encode_document(TEXTS), atol=2e-3
    )
    one = ask(model=name, input=TEXTS[0], encoding_format="float")
    np.testing.assert_allclose(
        one.data[0].embedding, minilm.encode_document([TEXTS[0]])[0], atol=1e-6
    )
    assert one.usage.prompt_tokens == one.usage.total_tokens == minilm.count_tokens([TEXTS[0]])[0]


def test_base64_is_little_endian_float32(port, client):
    body = {"model": MINILM, "input": TEXTS[0]}
    [plain, packed, default] = [
        client(port).post("/v1/embeddings", json=body | {"encoding_format": form}).json()
        for form in ("float", "base64", None)
    ]
    assert default == plain
    bits = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(bits, np.float32(plain["data"][0]["embedding"]))


def test_the_models_are_listed(port, client):
    listed = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any").models.list()
    assert [model.id for model in listed] == [MINILM]


@pytest.mark.parametrize(
    ("changes", "status", "param", "says"),
    [
        ({"input": [1, 2]}, 400, "input", "token numbers"),
        ({"input": [[1, 2]]}, 400, "input", "token numbers"),
        ({"input": ""}, 400, "input", "empty"),
        ({"input": []}, 400, "input", "at least one"),
        ({"input": ["a", None]}, 400, "input", r"\[1\]"),
        ({"input": [True]}, 400, "input", r"\[0\]"),
        ({"input": {"a": 1}}, 400, "input", "text"),
        ({"input": None}, 400, "input", "text"),
        ({"input": ["a"] * 2049}, 400, "input", "2,048"),
        ({"model": "text-embedding-3-small"}, 404, "model", "not served"),
        ({"model": 7}, 400, "model", "name"),
        ({"dimensions": 64}, 400, "dimensions", "Matryoshka"),
        ({"dimensions": 0}, 400, "dimensions", "whole number"),
        ({"dimensions": True}, 400, "dimensions", "whole number"),
        ({"dimensions": 10**40}, 400, "dimensions", "this model has 384"),
        ({"encoding_format": "hex"}, 400, "encoding_format", "base64"),
        ({"input_type": "clustering"}, 400, "input_type", "query"),
        ({"dimension": 384}, 400, "dimension", "no field"),
    ],
)
def test_what_makes_no_sense_is_refused(port, client, changes, status, param, says):
    body = {"model": MINILM, "input": "text"} | changes
    answer = client(port).post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert re.search(says, error["message"])


def test_openais_client_reads_errors(ask):
    with pytest.raises(openai.NotFoundError) as raised:
        ask(model="other", input="text")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="token numbers"):
        ask(model=MINILM, input=[5, 6])


def test_a_matryoshka_model_is_cut_and_has_length_one(port, ask, minilm, monkeypatch):
    known = spec.KnownEncoder(MINILM, 384, 256, "cosine", True, 23, "en", "", matryoshka=True)
    monkeypatch.setitem(spec._BY_NAME, MINILM.lower(), known)
    [cut] = ask(model=MINILM, input="text", dimensions=64).data
    whole = minilm.encode_document(["text"])[0][:64]
    np.testing.assert_allclose(cut.embedding, whole / np.linalg.norm(whole), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="this model has 384"):
        ask(model=MINILM, input="text", dimensions=385)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":' * 100_000, "no JSON"),
        (b'{"model": "m", "input": NaN}', "NaN"),
        (b'{"model": "m", "input": -Infinity}', "Infinity"),
        (b'{"model": "m", "input": "\xff"}', "no JSON"),
        (b'{"model": "m", "input": "\\ud800"}', "no JSON"),
        (b'{"model": ' + b"9" * 5000 + b"}", "no JSON"),
    ],
)
def test_bodies_that_are_no_json_objects_are_refused(port, client, body, says):
    answer = client(port).post(
        "/v1/embeddings", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_a_huge_text_is_cut_as_the_encoder_cuts_it(ask, minilm):
    [huge] = ask(model=MINILM, input="money " * 500_000).data
    [begin] = minilm.encode_document(["money " * 5_000])
    assert np.dot(huge.embedding, begin) > 0.999


def test_queries_and_documents_are_told_apart(client):
    class Prompted(DeterministicEncoder):
        def encode_query(self, texts):
            return self.encode_document([f"query {text}" for text in texts])

    with serving({"mine": Prompted("mine", 32)}, port=0) as port:
        body = {"model": "mine", "input": "text"}
        answers = [
            client(port).post("/v1/embeddings", json=body | more).json()["data"][0]["embedding"]
            for more in ({}, {"input_type": "document"}, {"input_type": "query"})
        ]
    assert answers[0] == answers[1] != answers[2]


def test_an_encoder_that_gives_nan_is_an_error_and_no_answer(client):
    class Broken(DeterministicEncoder):
        def encode_document(self, texts):
            return np.full((len(texts), 32), np.nan, np.float32)

    with serving({"mine": Broken("mine", 32)}, port=0) as port:
        answer = client(port).post("/v1/embeddings", json={"model": "mine", "input": "text"})
    assert answer.status_code == 500
    json.loads(answer.text)
