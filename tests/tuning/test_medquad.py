"""all-MiniLM-L6-v2 trained on questions of MedQuAD, proven, and deployed by the five steps."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from command_line import sbert_pg
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, embed_rows, embedding_column, evaluate, nearest
from sbert_pg.encoder import Encoder
from sbert_pg.tuning import read_pairs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not list(importlib.metadata.distributions(name="sentence-transformers")),
        reason="the extra 'train' is not installed",
    ),
]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


class Base(DeclarativeBase):
    pass


class Answer(Base):
    __tablename__ = "answer"
    id: Mapped[int] = mapped_column(primary_key=True)
    question: Mapped[str]
    body: Mapped[str]
    embedding: Mapped[Any] = embedding_column(MINILM, source="body", nullable=True)


def test_from_questions_to_a_deployed_encoder(
    engine: sa.Engine, minilm: Encoder, data_dir: Path, tmp_path: Path
) -> None:
    lines = (data_dir / "medquad/medquad_cdc_nhlbi.jsonl").read_text().splitlines()
    read = map(json.loads, lines)
    rows = [
        {"id": n, "question": row["question"].strip(), "body": row["answer"]}
        for n, row in enumerate(read, start=1)
    ]
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        session.execute(sa.insert(Answer), embed_rows(Answer, rows))
        session.commit()

    def run(*command: str) -> str:
        done = sbert_pg(*command, url=engine.url)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        return done.stdout

    out = tmp_path / "medquad"
    told = ("tune", "answer", "--pairs", "question", "--method", "full", "--out", str(out))
    said = run(*told, "--json")
    report = json.loads(said)
    assert report["gain"]["low"] > 0.01, "beyond its interval, on documents that it never saw"
    assert report["side"] == "both"
    tuned = Encoder.load(out)
    assert tuned.manifest.training["split"]["by"] == "document"
    # The steps that tune prints.
    new = "embedding_tuned"
    run("reembed", "begin", "answer.embedding", "--to", new, "--encoder", str(out))
    run("backfill", f"answer.{new}")
    held_out = Path(report["pairs"])
    checked = json.loads(
        run("reembed", "verify", f"answer.{new}", "--pairs", str(held_out), "--json")
    )
    print(checked)

    class Deployed(DeclarativeBase):
        pass

    class NewAnswer(Deployed):
        __tablename__ = "answer"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding_tuned: Mapped[Any] = embedding_column(
            str(out), dimensions=384, source="body", nullable=True
        )

    both = {
        "old": lambda q: nearest(Answer.embedding, q, limit=10),
        "new": lambda q: nearest(NewAnswer.embedding_tuned, q, limit=10),
    }
    old, switched = evaluate(engine, both, read_pairs(held_out)).scores
    assert old.ndcg.value == pytest.approx(report["before"]["value"], abs=0.02)
    assert switched.ndcg.value == pytest.approx(report["after"]["value"], abs=0.02)
    run("reembed", "finish", f"answer.{new}", "--force")
    named = "SELECT column_name FROM information_schema.columns WHERE table_name = 'answer'"
    with engine.connect() as connection:
        columns = set(connection.execute(sa.text(named)).scalars())
    assert new in columns
    assert "embedding" not in columns
