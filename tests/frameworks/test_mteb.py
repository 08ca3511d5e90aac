"""MTEB's search over a mapped class, called as its evaluation calls it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from sbert_pg import create_all, embedding_column
from sbert_pg.adapters.mteb import BLOCK, SbertSearch
from sbert_pg.errors import DeclarationError


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[str]
    embedding = embedding_column("deterministic", source="body", nullable=True, dimensions=384)


#: What its evaluation passes beside the data.
TASK: dict[str, Any] = {
    "task_metadata": None, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {},
}  # fmt: skip
CORPUS = [
    {"id": "a", "title": "Trains", "text": "run late"},
    {"id": "b", "title": "", "text": "bread and cheese"},
    {"id": "c", "title": None, "text": "trains and bread"},
]
QUERIES = [{"id": "q1", "text": "trains run late"}, {"id": "q2", "text": "cheese and bread"}]


@pytest.fixture
def search(engine: sa.Engine, fake_encoder: Any) -> SbertSearch:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    return SbertSearch(Document.embedding, sessionmaker(engine), model_meta="meta")


def test_index_and_search(search: SbertSearch) -> None:
    search.index(CORPUS, **TASK)
    found = search.search(QUERIES, top_k=2, **TASK)
    assert [list(found[q]) for q in ("q1", "q2")] == [["a", "c"], ["b", "c"]]
    assert found["q1"]["a"] == pytest.approx(1, abs=1e-5), "title and text are one document"
    allowed = {"q1": ["b", "c"], "q2": ["a"]}
    found = search.search(QUERIES, top_k=2, top_ranked=allowed, **TASK)
    assert [list(found[q]) for q in ("q1", "q2")] == [["c", "b"], ["a"]]
    # The corpus of the next task takes its place.
    search.index([{"id": str(n), "text": f"word {n}"} for n in range(BLOCK + 1)], **TASK)
    found = search.search(QUERIES[:1], top_k=BLOCK * 2, **TASK)
    assert len(found["q1"]) == BLOCK + 1
    assert search.mteb_model_meta == "meta"


def test_rows_of_others_are_left_alone(search: SbertSearch, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(Document.__table__).values(id="mine", body="text"))
    with pytest.raises(DeclarationError, match="holds rows already"):
        search.index(CORPUS, **TASK)
    with pytest.raises(DeclarationError, match="is no text"):
        search.search([{"id": "q", "text": [{"role": "user"}]}], top_k=1, **TASK)


def test_it_follows_the_protocol(search: SbertSearch) -> None:
    """That of the package, where it is installed: names, and what is passed by name."""
    protocols = pytest.importorskip("mteb.models.models_protocols")
    assert isinstance(search, protocols.SearchProtocol)
    for name in ("index", "search"):
        wanted = inspect.signature(getattr(protocols.SearchProtocol, name)).parameters
        given = inspect.signature(getattr(search, name))
        names = [p.name for p in wanted.values() if p.kind is p.KEYWORD_ONLY]
        given.bind(CORPUS, **dict.fromkeys(names))


def test_its_evaluation_asks_the_database(search: SbertSearch) -> None:
    """A task of our own through the package's evaluation, where it is installed."""
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Task(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = mteb.TaskMetadata(
            name="Own", description="Ours.", type="Retrieval", category="t2t", modalities=["text"],
            dataset={"path": "none", "revision": "1"}, eval_splits=["test"],
            eval_langs=["eng-Latn"], main_score="ndcg_at_10",
        )  # fmt: skip

        def load_data(self, *_: Any, **__: Any) -> None:
            corpus = [{**one, "title": one["title"] or ""} for one in CORPUS]
            self.dataset = {"default": {"test": {
                "corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(QUERIES),
                "relevant_docs": {"q1": {"a": 1}, "q2": {"a": 1}}, "top_ranked": None,
            }}}  # fmt: skip
            self.data_loaded = True

    search.mteb_model_meta = mteb.get_model_meta("sentence-transformers/all-MiniLM-L6-v2")
    [result] = mteb.evaluate(search, [Task()], cache=None).task_results
    # Of the first question the document is the nearest, of the second the third of three.
    expected = (1 + 1 / np.log2(4)) / 2
    assert result.scores["test"][0]["main_score"] == pytest.approx(expected, abs=1e-4)
