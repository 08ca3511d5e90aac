"""SQLModel: the embedding is a column of the table and no field of the model.

So it is left out where the model is serialised, and stays in the database until it is asked for.

export DATABASE_URL=postgresql+psycopg://localhost/shop
python sqlmodel_search.py
"""

import os
from typing import Any

from sqlmodel import Field, Session, SQLModel, create_engine

from sbert_pg import create_all, embed_on_flush, embedding_column, hnsw_index, nearest


class Recipe(SQLModel, table=True):
    __table_args__ = (hnsw_index("recipe_embedding", "embedding"),)

    id: int | None = Field(default=None, primary_key=True)
    title: str
    embedding: Any = embedding_column("all-MiniLM-L6-v2", source="title", nullable=True)


def main() -> list[str]:
    engine = create_engine(os.environ["DATABASE_URL"])
    with engine.begin() as connection:
        create_all(connection, SQLModel.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        session.add_all(
            Recipe(title=title)
            for title in ("Pancakes with maple syrup", "Lentil soup", "Apple pie", "Beef stew")
        )
        session.commit()
        found = session.execute(nearest(Recipe.embedding, "a dessert from the oven", limit=1))
        titles = [recipe.title for recipe, _ in found]
    engine.dispose()
    return titles


if __name__ == "__main__":
    print(main())
