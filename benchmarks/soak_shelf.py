"""The readers of ``soak.py``, and a column that changes hands under them.

Two applications search one column, each with an encoder of its own. The column is given from one to
the other again and again, in one transaction each time; whoever it does not belong to has to get
an error, and never a ranking.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import soak_encoder
import sqlalchemy as sa
from soak_writers import LOST

from sbert_pg import catalog, nearest
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import EncoderMismatchError
from sbert_pg.source import digest
from sbert_pg.sqlstates import sqlstate_of
from sbert_pg.types.wire import to_wire

ROWS = 40
NAMES = ("shelf a", "shelf b")


def title(number: int) -> str:
    """The text of a row; no two rows share a word."""
    return f"book{number} author{number} year{number}"


def _declared(name: str) -> sa.Table:
    """The column as one of the applications declares it."""
    embedding = Embedding(name, source="title", dimensions=soak_encoder.DIMENSIONS)
    return sa.Table(
        "shelf",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("title", sa.Text),
        sa.Column("embedding", embedding),
    )


def prepare(connection: sa.Connection) -> None:
    """Create the table, bound to the first encoder."""
    table = _declared(NAMES[0])
    table.metadata.create_all(connection)
    rows = [{"id": i, "title": title(i)} for i in range(ROWS)]
    connection.execute(sa.insert(table), rows)
    _fill(connection, NAMES[0])


def bind_other(url: sa.URL) -> None:
    """Give the column to the other encoder, with all its vectors, in one transaction."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL lock_timeout = '5s'")
        column = _declared(NAMES[0]).c.embedding
        name = catalog.require_binding(connection, column).declared.name
        catalog.unbind(connection, column)
        connection.exec_driver_sql("UPDATE shelf SET embedding = NULL, embedding_of = NULL")
        _fill(connection, NAMES[1 - NAMES.index(name)])
    engine.dispose()


def _fill(connection: sa.Connection, name: str) -> None:
    encoder = soak_encoder.encoder(name, slow=False)
    binding = catalog.bind(connection, _declared(name).c.embedding)
    catalog.hold_encoder(connection, binding, encoder)
    vectors = encoder.encode_document([title(i) for i in range(ROWS)])
    with connection.connection.cursor() as cursor:
        for number, vector in enumerate(vectors):
            text = "[" + ",".join(repr(float(x)) for x in vector) + "]"
            proof = digest(binding.id, title(number), to_wire(vector, "vector"), "vector")
            cursor.execute(
                "UPDATE shelf SET title = %s, embedding = %s::vector, embedding_of = %s "
                "WHERE id = %s", [title(number), text, proof, number],
            )  # fmt: skip


class Readers:
    """Threads that search until they are told to stop.

    Args:
        url: the database.
        stop: set when they are to stop.
        count: called with the name of what was done.
        wrong: called with what must not happen.
    """

    def __init__(
        self,
        url: sa.URL,
        stop: threading.Event,
        count: Callable[[str], None],
        wrong: Callable[[str], None],
    ) -> None:
        self.url, self.stop, self.count, self.wrong = url, stop, count, wrong

    def all(self, seed: int) -> list[threading.Thread]:
        """One of each application."""
        return [
            threading.Thread(target=self.read, args=(name, 100 * seed + i), daemon=True)
            for i, name in enumerate(NAMES)
        ]

    def read(self, name: str, seed: int) -> None:
        """Search for texts that are there."""
        chance = random.Random(seed)
        table = _declared(name)
        engine = sa.create_engine(self.url, pool_pre_ping=True)
        while not self.stop.is_set():
            number = chance.randrange(ROWS)
            distance = table.c.embedding.distance(title(number))
            statement = chance.choice(
                [
                    sa.select(table.c.id).order_by(distance).limit(1),
                    sa.select(table.c.id).where(distance < 0.01),
                    nearest(table.c.embedding, title(number), limit=1),
                ]
            )
            try:
                with engine.connect() as connection:
                    found = [row.id for row in connection.execute(statement)]
                self.count("read answered")
                if found != [number]:
                    self.wrong(f"a reader with encoder {name!r} found {found} for row {number}")
            except EncoderMismatchError:
                self.count("read refused")
            except sa.exc.DBAPIError as error:
                state = sqlstate_of(error) or ""
                if not isinstance(error, LOST) and not state.startswith(("57", "08", "40")):
                    self.wrong(f"a search failed: {state} {error}")
                self.count("reads lost with their connection")
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.05))
        engine.dispose()
