"""The documents of ``soak.py``: texts with passages, edited at random, and questions by ``CALL``.

Every passage belongs to the text as it is, whoever was killed while it was cut, and a question of
plain SQL gets the vector of its column's encoder or an error.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import soak_encoder
import sqlalchemy as sa
from soak_writers import LOST, Base, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from sbert_pg.passages import SentenceChunker, passages_of
from sbert_pg.passages.cutting import cut

DOCUMENTS = 30
CHUNKER = SentenceChunker(least=5, most=15)
#: What an edit does to the sentences of a document.
EDITS = ("new", "one sentence", "first", "last", "swapped", "heading", "nothing", "gone", "key")
#: How many seconds a question waits for its answer.
PATIENCE = 5


class Document(Base):
    """A text with a heading."""

    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    title: Mapped[str | None]
    body: Mapped[str | None]
    passages = passages_of(
        "deterministic",
        source="body",
        heading="title",
        dimensions=soak_encoder.DIMENSIONS,
        chunker=CHUNKER,
    )


def edited(sentences: list[str], what: str, chance: random.Random) -> list[str]:
    """A document after an edit."""
    made = list(sentences)
    if what == "new" or not made:
        return [f"{text(chance)}." for _ in range(chance.randint(1, 25))]
    if what == "one sentence":
        made[chance.randrange(len(made))] = f"{text(chance)}."
    elif what == "first":
        made.insert(0, f"{text(chance)}.")
    elif what == "last":
        del made[-1]
    elif what == "swapped":
        made.reverse()
    return made


class Documents:
    """A thread that edits and one that asks, until they are told to stop; see ``Writers``."""

    def __init__(
        self,
        url: sa.URL,
        stop: threading.Event,
        count: Callable[[str], None],
        wrong: Callable[[str], None],
    ) -> None:
        self.dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self.stop, self.count, self.wrong = stop, count, wrong

    def all(self, seed: int) -> list[threading.Thread]:
        """Both."""
        return [
            threading.Thread(target=self.keep_on, args=(do, 100 * seed + i), daemon=True)
            for i, do in enumerate((self.edit, self.ask))
        ]

    def keep_on(self, do: Callable[[psycopg.Connection, random.Random], None], seed: int) -> None:
        """Do something again and again, through whatever happens to the server."""
        chance = random.Random(seed)
        while not self.stop.is_set():
            try:
                with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5) as connection:
                    while not self.stop.is_set():
                        do(connection, chance)
                        time.sleep(chance.uniform(0, 0.3))
            except LOST:
                self.stop.wait(0.2)

    def edit(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """One edit of one document."""
        key, what = chance.randrange(DOCUMENTS), chance.choice(EDITS)
        row = connection.execute("SELECT body FROM document WHERE id = %s", [key]).fetchone()
        if what == "gone":
            connection.execute("DELETE FROM document WHERE id = %s", [key])
        elif what == "key":
            connection.execute(
                "UPDATE document SET id = id + %s WHERE id = %s AND NOT EXISTS "
                "(SELECT FROM document WHERE id = %s)", [DOCUMENTS, key, key + DOCUMENTS],
            )  # fmt: skip
        elif what == "heading":
            connection.execute("UPDATE document SET title = %s WHERE id = %s", [text(chance), key])
        else:
            sentences = [f"{part}." for part in ((row and row[0]) or "").split(". ") if part]
            body = " ".join(edited([s.replace("..", ".") for s in sentences], what, chance))
            connection.execute(
                "INSERT INTO document (id, title, body) VALUES (%s, %s, %s) "
                "ON CONFLICT (id) DO UPDATE SET body = excluded.body", [key, text(chance), body],
            )  # fmt: skip
        self.count(f"write: document: {what}")

    def ask(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """One question of plain SQL."""
        question = text(chance)
        try:
            row = connection.execute(
                "CALL sbert.embed('note.embedding', %s, NULL, %s)", [question, PATIENCE]
            ).fetchone()
        except psycopg.DatabaseError as error:
            if isinstance(error, LOST):
                raise
            self.count("question refused")
            if error.sqlstate != "SB003":
                self.wrong(f"a question failed: {error.sqlstate} {error}")
            return
        [wanted] = soak_encoder.encoder(slow=False).encode_query([question])
        if row is None or not np.allclose(json.loads(row[0]), wanted, atol=1e-6):
            self.wrong(f"a question has another vector: {question!r}")
        self.count("question answered")


def torn(engine: sa.Engine) -> list[Any]:
    """Documents whose passages are not those of their text, after everything was worked off."""
    encoder = soak_encoder.encoder(slow=False)
    found = []
    with Session(engine) as session:
        for document in session.scalars(sa.select(Document)):
            due = list(cut([document.title], document.body or "", CHUNKER, encoder))
            if document.title is None and document.body is None:
                due = []
            stored = [(p.start, p.stop, p.heading, p.digest) for p in document.passages]
            if stored != [tuple(p) for p in due]:
                found.append(document.id)
    return found
