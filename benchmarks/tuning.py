"""Encoders fitted to questions of several kinds: what each method gains, and in what time.

python benchmarks/tuning.py DIRECTORY medquad linear contrastive --seed 0 1 2
python benchmarks/tuning.py DIRECTORY xquad.de linear                  # XQuAD in German
python benchmarks/tuning.py DIRECTORY packages linear                  # needs apt-cache
python benchmarks/tuning.py DIRECTORY medquad full                     # all-MiniLM-L6-v2, whole
python benchmarks/tuning.py DIRECTORY medquad full --base MODEL        # another model, trained
python benchmarks/tuning.py DIRECTORY medquad distill [--base MODEL]   # without: a static student

DIRECTORY holds ``xquad/xquad.en.json`` and ``medquad/medquad_cdc_nhlbi.jsonl``. Rows of one
document (the answers about one disease, the paragraphs of one article, the packages of one source)
are on one side; with ``--by row`` they may be on both. The database is the embedded one, in a
directory of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from bench_server import fresh_server
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import backfill, create_all, embedding_column, tune
from sbert_pg.errors import NoGainError
from sbert_pg.tuning.fitting import Method

ENCODER = "all-MiniLM-L6-v2"
LANGUAGES = ("en", "de", "es", "zh")
#: Packages that are drawn of all that are known to apt.
PACKAGES = 6_000


class Row(NamedTuple):
    """A text, the document that it is a part of, and what asks for it."""

    body: str
    document: str
    questions: list[str]


class Base(DeclarativeBase):
    """Base of the answers."""


class Answer(Base):
    """A text that questions ask for."""

    __tablename__ = "answer"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    document: Mapped[str]
    embedding = embedding_column(ENCODER, source="body", nullable=True)


def medquad(directory: Path) -> list[Row]:
    """829 long answers about 145 diseases, and the question to each."""
    lines = (directory / "medquad/medquad_cdc_nhlbi.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [Row(row["answer"], row["focus"], [row["question"].strip()]) for row in rows]


def xquad(directory: Path, language: str) -> list[Row]:
    """240 paragraphs of 48 articles, and some five questions to each."""
    articles = json.loads((directory / f"xquad/xquad.{language}.json").read_text())["data"]
    return [
        Row(
            paragraph["context"].strip(),
            article["title"],
            [asked["question"].strip() for asked in paragraph["qas"]],
        )
        for article in articles
        for paragraph in article["paragraphs"]
    ]


def packages() -> list[Row]:
    """Descriptions of Debian's packages, each asked for by its title."""
    dump = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True)
    rows = {}
    for paragraph in dump.stdout.split("\n\n"):
        name = source = title = ""
        body: list[str] = []
        for line in paragraph.splitlines():
            key, _, value = line.partition(": ")
            if line.startswith(" ") and title:
                body.append(line.strip().removeprefix("."))
            elif key == "Package":
                name = value
            elif key == "Source":
                source = value.split()[0]
            elif key.startswith("Description") and not key.endswith("md5"):
                title = value
            elif title:
                break
        if name and len(body) > 1:
            rows[" ".join(body)] = Row(" ".join(body), source or name, [title])
    return random.Random(0).sample(sorted(rows.values()), PACKAGES)


def fill(engine: sa.Engine, rows: list[Row]) -> list[tuple[str, int]]:
    """The table, with the vectors of its encoder; returns the questions, each with its row."""
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        session.add_all(
            Answer(id=n, body=row.body, document=row.document) for n, row in enumerate(rows, 1)
        )
        session.commit()
    backfill(engine, Answer.embedding)
    return [(asked, n) for n, row in enumerate(rows, 1) for asked in row.questions]


def main() -> None:
    """Fit, and print what was proven or refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("data", choices=["medquad", "packages", *map("xquad.{}".format, LANGUAGES)])
    parser.add_argument("methods", nargs="+", choices=list(Method.__args__))  # type: ignore[attr-defined]
    parser.add_argument("--base")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--matryoshka", type=int, action="append", default=[])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--by", choices=["document", "row"], default="document")
    given = parser.parse_args()
    if given.data == "packages":
        rows = packages()
    elif given.data == "medquad":
        rows = medquad(given.directory)
    else:
        rows = xquad(given.directory, given.data.removeprefix("xquad."))
    with fresh_server() as server:
        engine = sa.create_engine(server.ensure_database("tuning"))
        pairs = fill(engine, rows)
        for method, seed in itertools.product(given.methods, given.seed):
            whole: dict[str, Any] = {}
            if method not in ("linear", "contrastive"):
                whole = {"base": given.base, "epochs": given.epochs}
            if method == "full":
                whole["matryoshka"] = given.matryoshka
            out = server.data_dir.parent / f"out-{method}-{seed}"
            try:
                report = tune(
                    engine, Answer.embedding, pairs, out=out, method=method, seed=seed,
                    document="document" if given.by == "document" else None, **whole,
                )  # fmt: skip
                print(f"seed {seed}: {report}", flush=True)
            except NoGainError as refused:
                print(f"{method}, seed {seed}: refused. {refused}", flush=True)
        engine.dispose()


if __name__ == "__main__":
    main()
