"""Long documents: cut into passages, found by the best one, with the sentence that answers.

export DATABASE_URL=postgresql+psycopg://localhost/library
python passages_search.py
"""

import os

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import backfill, create_all, hnsw_index, nearest, passages_of


class Base(DeclarativeBase):
    pass


class Manual(Base):
    __tablename__ = "manual"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str]
    passages = passages_of(
        "all-MiniLM-L6-v2",
        source="body",
        heading="title",
        table_args=[hnsw_index("manual_passage_embedding", "embedding")],
    )


KETTLE = """
Thank you for buying the kettle. Keep this booklet.

## Cleaning

Fill the kettle with water and two spoons of citric acid. Let it boil and rinse it twice.

## Guarantee

We repair the kettle free of charge within three years. Send it to us with the receipt.
"""


def main() -> list[str]:
    engine = sa.create_engine(os.environ["DATABASE_URL"])
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        session.add(Manual(title="Kettle", body=KETTLE))
        session.add(Manual(title="Toaster", body="Empty the crumb tray once a week."))
        session.commit()
        # In production a worker does this: sbert-pg worker.
        backfill(engine, Manual.__table__.c.passages_embedding)
        question = "for how long do you mend it without payment?"
        found = session.execute(nearest(Manual.passages, question, limit=1)).all()
        answers = [passage.highlight(question)[2] for _, passage, _, _ in found]
    engine.dispose()
    return answers


if __name__ == "__main__":
    print(main())
