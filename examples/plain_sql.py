"""Core and plain SQL, without the ORM: a table, a bulk load, and a query that any client can send.

export DATABASE_URL=postgresql+psycopg://localhost/shop
python plain_sql.py
"""

import os

import psycopg
import sqlalchemy as sa

from sbert_pg import Embedding, create_all, get_encoder, hnsw_index, load, nearest

metadata = sa.MetaData()
city = sa.Table(
    "city_note",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("embedding", Embedding("all-MiniLM-L6-v2", source="note")),
    hnsw_index("city_note_embedding", "embedding"),
)

NOTES = (
    "The ferry to the island leaves twice a day.",
    "The old town has the best bakeries.",
    "Trams run until midnight, night buses after that.",
    "The museum of modern art is closed on Mondays.",
)


def main() -> tuple[list[str], list[str]]:
    url = sa.make_url(os.environ["DATABASE_URL"])
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        create_all(connection, metadata)
        load(connection, city, ({"note": note} for note in NOTES))
    with engine.connect() as connection:
        core = [row.note for row in connection.execute(nearest(city.c.embedding, "bread", limit=2))]
    engine.dispose()

    # Any client of PostgreSQL: encode the question once, pass it as pgvector's text form.
    encoder = get_encoder(city.c.embedding.type.encoder)
    vector = str(encoder.encode_query(["public transport at night"])[0].tolist())
    with psycopg.connect(url.set(drivername="postgresql").render_as_string(False)) as connection:
        rows = connection.execute(
            "SELECT note FROM city_note ORDER BY embedding <=> %s::vector LIMIT 1", [vector]
        )
        plain = [note for (note,) in rows]
    return core, plain


if __name__ == "__main__":
    print(main())
