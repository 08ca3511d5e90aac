"""Meaning, words and both, over the documentation of the standard library; measured.

export DATABASE_URL=postgresql+psycopg://localhost/shop
python hybrid_search.py
"""

import importlib
import inspect
import os
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import (
    create_all,
    embedding_column,
    evaluate,
    hnsw_index,
    hybrid,
    load,
    matching,
    nearest,
    text_column,
    text_index,
)

MODULES = (
    "bisect",
    "collections",
    "itertools",
    "json",
    "random",
    "shutil",
    "statistics",
    "textwrap",
)


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "entry"
    __table_args__ = (
        hnsw_index("entry_embedding", "embedding"),
        text_index("entry_search", "search"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    module: Mapped[str]
    name: Mapped[str]
    body: Mapped[str]
    embedding = embedding_column(
        "all-MiniLM-L6-v2", source=["module", "name", "body"], nullable=True
    )
    # A word of the name counts three times. A dotted name would be one word.
    search = text_column("module", "name", "body", weights={"name": 3})


def documentation() -> list[dict[str, Any]]:
    """What the functions and classes of some modules say of themselves."""
    entries = []
    for module in map(importlib.import_module, MODULES):
        for name in sorted(n for n in dir(module) if not n.startswith("_")):
            documented = getattr(module, name)
            if callable(documented) and (text := inspect.getdoc(documented)):
                entries.append({"module": module.__name__, "name": name, "body": text[:600]})
    return [{"id": number, **entry} for number, entry in enumerate(entries, start=1)]


def main() -> dict[str, Any]:
    engine = sa.create_engine(os.environ["DATABASE_URL"])
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
        load(connection, Entry.__table__, documentation())
        connection.execute(sa.text("ANALYZE entry"))

    found = {}
    with Session(engine) as session:
        for question in ("fmean", "remove a folder and everything in it"):
            searches = {
                "meaning": nearest(Entry.embedding, question, limit=3),
                "words": matching(Entry.search, question, limit=3),
                "both": hybrid(Entry.embedding, Entry.search, question, limit=3),
            }
            found[question] = {
                name: [entry.name for entry in session.scalars(statement)]
                for name, statement in searches.items()
            }
            print(question, found[question], sep="\n")

    # Labelled questions: a name asks for its entry, and so does the beginning of its text.
    with engine.connect() as connection:
        rows = connection.execute(sa.select(Entry.id, Entry.name, Entry.body)).all()
    pairs = [{"question": row.name, "id": row.id} for row in rows]
    pairs += [{"question": row.body.split(". ")[0][:80], "id": row.id} for row in rows]
    report = evaluate(
        engine,
        {
            "meaning": lambda questions: nearest(Entry.embedding, questions),
            "words": lambda questions: matching(Entry.search, questions),
            "both": lambda questions: hybrid(Entry.embedding, Entry.search, questions),
        },
        pairs,
    )
    print(report)
    found["ndcg"] = {score.search: score.ndcg.value for score in report.scores}
    engine.dispose()
    return found


if __name__ == "__main__":
    main()
