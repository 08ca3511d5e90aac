"""Documents that are found by their passages, over HTTP, by a model and on the pages."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from passage_documents import encoder, text, work
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, hnsw_index, passages_of, text_column
from sbert_pg.cli.serve import looking
from sbert_pg.passages import SentenceChunker
from sbert_pg.serving.exposed import Question, Shown
from sbert_pg.serving.mcp import mcp_server
from sbert_pg.serving.server import serving
from sbert_pg.testing import DeterministicEncoder

__all__ = ["encoder"]

#: A section in the middle of the third manual, and a question that is what is embedded of it.
NEEDLE = "Descale the kettle with citric acid."
HEADING = "manual 2 > Use > Cleaning"
QUERY = f"{HEADING} {NEEDLE}"


class Base(DeclarativeBase):
    """Base of the manuals."""


class Manual(Base):
    """A manual; its column ``score`` is not the search's."""

    __tablename__ = "manual"
    id: Mapped[int] = mapped_column(primary_key=True)
    score: Mapped[str]
    body: Mapped[str]
    passages = passages_of(
        "deterministic", source="body", heading="score", dimensions=32,
        chunker=SentenceChunker(20, 60),
        table_args=[hnsw_index("manual_passage_hnsw", "embedding")],
    )  # fmt: skip
    words = text_column("body")


@pytest.fixture
def manuals(engine: sa.Engine, encoder: DeterministicEncoder) -> sa.Engine:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session, session.begin():
        for n in range(6):
            sentences = text(n, 30)
            if n == 2:
                sentences[15] = f"\n\n## Cleaning\n\n{NEEDLE}\n\n## Repair\n\n"
            body = "# Use\n\n" + " ".join(sentences)
            session.add(Manual(id=n + 1, score=f"manual {n}", body=body))
    work(engine, Base)
    return engine


def require_best(answer: dict[str, Any], body: str) -> None:
    passage = answer["passage"]
    assert passage["text"] == body[passage["start"] : passage["stop"]] == NEEDLE
    assert passage["heading"] == HEADING


def test_the_nearest_passage_comes_with_each_document(
    manuals: sa.Engine, encoder: DeterministicEncoder, client: Any
) -> None:
    shown = Shown(manuals, looking(["manual"]))
    with serving({"deterministic": encoder}, shown, port=0) as port:
        ask = {"table": "manual", "query": QUERY, "limit": 5}
        found = client(port).post("/search", json=ask).json()["results"]
        assert len({one["row"]["id"] for one in found}) == 5
        best = found[0]
        assert best["row"]["id"] == 3
        assert best["row"]["score"] == "manual 2"
        require_best(best, best["row"]["body"])
        assert best["similarity"] > found[1]["similarity"]
        for by in ("both", "words"):
            one = client(port).post("/search", json={**ask, "by": by}).json()["results"][0]
            assert one["row"]["id"] == 3, by
            assert isinstance(one["score"], float)
        few = {**ask, "where": {"id": [1, 2]}}
        rows = client(port).post("/search", json=few).json()["results"]
        assert {one["row"]["id"] for one in rows} == {1, 2}


@pytest.mark.parametrize(
    ("listed", "parts"),
    [
        ("id", {"start", "stop"}),
        ("id,score", {"start", "stop"}),
        ("id,body", {"start", "stop", "text"}),
        ("score,body", {"start", "stop", "text", "heading"}),
    ],
)
def test_passages_show_nothing_of_columns_that_are_not_listed(
    manuals: sa.Engine, listed: str, parts: set[str]
) -> None:
    shown = Shown(manuals, looking([f"manual:{listed}"]))
    found = shown.ask("manual", Question(QUERY))
    assert found[0].key == "3"
    assert all(one.passage is not None and set(one.passage) == parts for one in found)
    assert all(one.row.keys() == set(listed.split(",")) for one in found)


def test_a_document_that_changed_meanwhile_shows_no_wrong_part(manuals: sa.Engine) -> None:
    shown = Shown(manuals, looking(["manual"]))
    with manuals.begin() as connection:
        connection.execute(sa.update(Manual).where(Manual.id == 3).values(body="Another text."))
    [first, *_] = shown.ask("manual", Question(QUERY))
    assert first.key == "3"
    assert first.passage is not None
    assert first.passage["text"] is None


def test_a_model_is_given_the_passage(manuals: sa.Engine) -> None:
    server = mcp_server(Shown(manuals, looking(["manual:id,score,body"])))

    async def call() -> str:
        answer = await server.call_tool("search", {"table": "manual", "query": QUERY})
        return str(answer.content[0].text)

    answer = anyio.run(call)
    best = json.loads(answer.splitlines()[2])
    assert best["row"]["id"] == 3
    with Session(manuals) as session:
        require_best(best, session.get_one(Manual, 3).body)
