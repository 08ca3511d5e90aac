"""Passages: what they find, what an edit costs, and what cutting costs beside encoding.

python benchmarks/passages.py quality DIRECTORY   # nDCG@10 through a database with the index
python benchmarks/passages.py reuse DIRECTORY     # passages kept when one sentence is edited
python benchmarks/passages.py rate DIRECTORY      # tokens a second with and without cutting
python benchmarks/passages.py memory MEGABYTES    # of a worker, for one document of so many

DIRECTORY holds ``xquad/xquad.en.json`` and ``medquad/medquad_cdc_nhlbi.jsonl``. The database is the
embedded one, in a directory of its own.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa
from bench_server import fresh_server
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import (
    backfill,
    create_all,
    encoder_of,
    get_encoder,
    hnsw_index,
    nearest,
    passages_of,
    refresh,
    use_encoder,
)
from sbert_pg.passages import Chunker, FixedChunker, SentenceChunker
from sbert_pg.passages.cutting import cut, embedded_text
from sbert_pg.passages.structure import sentences

ENCODER = "all-MiniLM-L6-v2"
Questions = list[tuple[str, int]]


class Base(DeclarativeBase):
    """Base of the documents."""


class Document(Base):
    """A document of one of the sets."""

    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    body: Mapped[str]
    passages = passages_of(
        ENCODER, source="body", heading="title",
        table_args=[hnsw_index("document_passage_hnsw", "embedding")],
    )  # fmt: skip


def xquad(directory: Path) -> tuple[list[Document], Questions]:
    """48 articles, and the questions to their paragraphs."""
    articles = json.loads((directory / "xquad/xquad.en.json").read_text())["data"]
    documents, questions = [], {}
    for number, article in enumerate(articles, 1):
        body = "\n\n".join(paragraph["context"].strip() for paragraph in article["paragraphs"])
        documents.append(Document(id=number, title=article["title"].replace("_", " "), body=body))
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                questions.setdefault(asked["question"].strip(), number)
    return documents, list(questions.items())


def medquad(directory: Path) -> tuple[list[Document], Questions]:
    """820 answers, and 829 questions: equal answers are one document, or one of them is wrong."""
    lines = (directory / "medquad/medquad_cdc_nhlbi.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    number: dict[str, int] = {}
    for row in rows:
        number.setdefault(row["answer"], len(number) + 1)
    documents = [Document(id=n, body=answer) for answer, n in number.items()]
    return documents, [(row["question"].strip(), number[row["answer"]]) for row in rows]


def xquad_mostly_short(directory: Path) -> tuple[list[Document], Questions]:
    """The paragraphs of three articles of four by themselves, the fourth whole."""
    articles = json.loads((directory / "xquad/xquad.en.json").read_text())["data"]
    documents: list[Document] = []
    questions: dict[str, int] = {}
    for number, article in enumerate(articles):
        paragraphs = article["paragraphs"]
        for group in [paragraphs] if number % 4 == 0 else [[one] for one in paragraphs]:
            body = "\n\n".join(paragraph["context"].strip() for paragraph in group)
            title = article["title"].replace("_", " ")
            documents.append(Document(id=len(documents) + 1, title=title, body=body))
            for asked in (asked for paragraph in group for asked in paragraph["qas"]):
                questions.setdefault(asked["question"].strip(), len(documents))
    return documents, list(questions.items())


def medquad_mostly_short(directory: Path) -> tuple[list[Document], Questions]:
    """Answers below 900 characters, and every eighth of the others."""
    documents, questions = medquad(directory)
    long = [document for document in documents if len(document.body) >= 900]
    chosen = [document for document in documents if len(document.body) < 900] + long[::8]
    ids = {document.id for document in chosen}
    return chosen, [question for question in questions if question[1] in ids]


SETS = {
    "XQuAD": xquad,
    "MedQuAD": medquad,
    "XQuAD, mostly short": xquad_mostly_short,
    "MedQuAD, mostly short": medquad_mostly_short,
}


def quality(directory: Path) -> None:
    """nDCG@10 of every score, through the database, beside that of the whole text as it is cut."""
    for name, read in SETS.items():
        documents, questions = read(directory)
        with fresh_server() as server:
            engine = sa.create_engine(server.ensure_database("passages"))
            with engine.begin() as connection:
                create_all(connection, Base.metadata)
            with Session(engine) as session:
                session.add_all(documents)
                session.commit()
                backfill(engine, Document.__table__.c.passages_embedding)
                for score in ("cut", "best", "sum", "auto"):
                    started = time.perf_counter()
                    gains = [_gain(session, *question, score) for question in questions]
                    seconds = (time.perf_counter() - started) / len(questions)
                    mean = sum(gains) / len(gains)
                    print(f"{name} {score}: nDCG@10 {mean:.4f}, {1000 * seconds:.1f} ms")
            engine.dispose()


def _gain(session: Session, question: str, due: int, score: str) -> float:
    if score == "cut":
        statement = nearest(Document.passages_embedding, question, limit=10)
    else:
        statement = nearest(Document.passages, question, score=score)
    found = session.execute(statement.with_only_columns(Document.id)).scalars().all()
    return 1 / math.log2(found.index(due) + 2) if due in found else 0.0


def reuse(directory: Path, edits: int = 200) -> None:
    """Passages kept and passages to encode, one sentence inserted, changed or deleted."""
    encoder = get_encoder(ENCODER)
    bodies = [d.body for d in medquad(directory)[0] if len(d.body) > 6_000]
    chunkers: Sequence[Chunker] = (SentenceChunker(), FixedChunker(200, 0), FixedChunker())
    for chunker in chunkers:
        random.seed(16)
        kept, new = 0.0, 0
        for _ in range(edits):
            body = random.choice(bodies)
            start, stop = random.choice(sentences(body))
            kind = random.choice(("insert", "change", "delete"))
            words = "" if kind == "delete" else "This is another sentence about something. "
            edited = body[:start] + words + body[start if kind == "insert" else stop :]
            before = {p.digest for p in cut((), body, chunker, encoder)}
            after = [p.digest for p in cut((), edited, chunker, encoder)]
            same = sum(digest in before for digest in after)
            kept += same / len(after)
            new += len(after) - same
        print(f"{chunker}: kept {kept / edits:.3f}, to encode {new / edits:.2f}")


def rate(directory: Path) -> None:
    """Tokens a second of encoding passages, with and without the cutting before it."""
    encoder = get_encoder(ENCODER)
    documents = medquad(directory)[0][:200]
    texts: list[str] = []
    started = time.process_time()
    for document in documents:
        for passage in cut((), document.body, SentenceChunker(), encoder):
            part = document.body[passage.start : passage.stop]
            texts.append(embedded_text(passage.heading, part))
    cutting = time.process_time() - started
    started = time.process_time()
    encoder.encode_document(texts)
    encoding = time.process_time() - started
    print(f"cutting {cutting:.2f} s, encoding {encoding:.2f} s of CPU: "
          f"rate with cutting {encoding / (encoding + cutting):.3f} of without")  # fmt: skip


class Large(Base):
    """Documents that are cut for an encoder which costs nothing, of the usual width."""

    __tablename__ = "large"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    passages = passages_of("nothing", source="body", dimensions=384)


def memory(megabytes: int) -> None:
    """What a process takes at most while it cuts, embeds and writes one large document."""

    def first_letters(texts: list[str]) -> list[list[float]]:
        return [[1.0 + ord((text + " ")[0])] + 383 * [1.0] for text in texts]

    use_encoder(encoder_of(first_letters, name="nothing", dimensions=384))
    numbers = random.Random(16)
    words = ["".join(numbers.choices("aeimnorst", k=2 + i % 9)) for i in range(4_000)]
    with fresh_server() as server:
        engine = sa.create_engine(server.ensure_database("memory"))
        with engine.begin() as connection:
            create_all(connection, Base.metadata)
        with engine.begin() as connection:
            connection.execute(sa.insert(Large).values(body=""))
            for _ in range(megabytes):
                # A megabyte at a time, so that the document is never in this process.
                text = ""
                while len(text) < 1_000_000:
                    text += " ".join(numbers.choices(words, k=14)).capitalize() + ". "
                connection.execute(sa.update(Large).values(body=Large.body + text))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_000
        refresh(engine)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_000
        with engine.connect() as connection:
            count = connection.scalar(sa.text("SELECT count(embedding) FROM large_passage"))
        print(f"{megabytes} MB in {count:,} passages: from {before:.0f} to {after:.0f} MB, "
              f"of which {count * 384 * 4 / 1e6:.0f} are vectors")  # fmt: skip
        engine.dispose()


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        memory(int(sys.argv[2]))
    else:
        {"quality": quality, "reuse": reuse, "rate": rate}[sys.argv[1]](Path(sys.argv[2]))
