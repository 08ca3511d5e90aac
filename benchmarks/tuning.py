"""Encoders fitted to the questions of MedQuAD and XQuAD: what each method gains, and in what time.

python benchmarks/tuning.py DIRECTORY medquad linear contrastive --seed 0
python benchmarks/tuning.py DIRECTORY medquad full                     # all-MiniLM-L6-v2, whole
python benchmarks/tuning.py DIRECTORY medquad full --base MODEL        # another model, trained
python benchmarks/tuning.py DIRECTORY medquad distill [--base MODEL]   # without: a static student

DIRECTORY holds ``xquad/xquad.en.json`` and ``medquad/medquad_cdc_nhlbi.jsonl``. The database is the
embedded one, in a directory of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import backfill, create_all, embedding_column, tune
from sbert_pg.embedded import embedded_server
from sbert_pg.errors import NoGainError
from sbert_pg.tuning.fitting import Method

ENCODER = "all-MiniLM-L6-v2"
Pairs = list[tuple[str, int]]


class Base(DeclarativeBase):
    """Base of the answers."""


class Answer(Base):
    """A text that questions ask for."""

    __tablename__ = "answer"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    embedding = embedding_column(ENCODER, source="body", nullable=True)


def medquad(directory: Path) -> tuple[list[str], Pairs]:
    """829 long answers, and the question to each."""
    lines = (directory / "medquad/medquad_cdc_nhlbi.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = [(row["question"].strip(), number) for number, row in enumerate(rows, 1)]
    return [row["answer"] for row in rows], pairs


def xquad(directory: Path) -> tuple[list[str], Pairs]:
    """240 paragraphs, and some five questions to each."""
    articles = json.loads((directory / "xquad/xquad.en.json").read_text())["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    pairs = {
        asked["question"].strip(): number
        for number, paragraph in enumerate(paragraphs, 1)
        for asked in paragraph["qas"]
    }
    return [paragraph["context"].strip() for paragraph in paragraphs], list(pairs.items())


def fill(engine: sa.Engine, bodies: list[str]) -> None:
    """The table, with the vectors of its encoder."""
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        session.add_all(Answer(id=n, body=body) for n, body in enumerate(bodies, 1))
        session.commit()
    backfill(engine, Answer.embedding)


def main() -> None:
    """Fit, and print what was proven or refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("data", choices=["medquad", "xquad"])
    parser.add_argument("methods", nargs="+", choices=list(Method.__args__))  # type: ignore[attr-defined]
    parser.add_argument("--base")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--matryoshka", type=int, action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bodies, pairs = (medquad if given.data == "medquad" else xquad)(given.directory)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with embedded_server(Path(folder) / "data") as server:
            engine = sa.create_engine(server.ensure_database("tuning"))
            fill(engine, bodies)
            for method in given.methods:
                whole: dict[str, Any] = {}
                if method not in ("linear", "contrastive"):
                    whole = {"base": given.base, "epochs": given.epochs}
                if method == "full":
                    whole["matryoshka"] = given.matryoshka
                try:
                    out = Path(folder) / f"out-{method}"
                    report = tune(
                        engine, Answer.embedding, pairs, out=out, method=method, seed=given.seed,
                        **whole,
                    )  # fmt: skip
                    print(report, flush=True)
                except NoGainError as refused:
                    print(f"{method}: refused. {refused}", flush=True)
            engine.dispose()


if __name__ == "__main__":
    main()
