"""A bound table of three dimensions, so that vectors can be written by hand."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from sbert_pg import catalog
from sbert_pg.source import Source, digest
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.types.wire import to_wire

SPEC = EncoderSpec(name="deterministic", dimensions=3)
VECTOR = (1, 0, 0)


@dataclass
class Table:
    """A bound table, and what its rows say."""

    connection: Connection
    name: str
    id: uuid.UUID

    @property
    def binding(self) -> catalog.Binding:
        """As it is now."""
        binding = catalog.binding_by_id(self.connection, self.id)
        assert binding is not None
        return binding

    def run(self, statement: str, **parameters: object) -> sa.CursorResult:
        return self.connection.execute(sa.text(statement), parameters)

    def digest(
        self, text: str | None, vector: tuple[float, ...] | None = VECTOR
    ) -> uuid.UUID | None:
        """What proves a vector of a text, as a writer with the right encoder writes it."""
        binding = self.binding
        wire = None if vector is None else to_wire(np.array(vector, np.float32), binding.storage)
        return digest(self.id, text, wire, binding.storage)

    def pending(self) -> list[str]:
        """Keys of the rows that are pending, as text."""
        binding = self.binding
        t = binding.clause()
        keys = [t.c[name] for name in binding.key_columns]
        rows = self.connection.execute(sa.select(*keys).where(binding.is_stale(t)).order_by(*keys))
        return [" ".join(str(part) for part in row) for row in rows]

    def fill(self, *titles: str) -> None:
        """Insert rows that have their vectors, for bindings whose source begins with ``title``."""
        for title in titles:
            self.run(
                f"INSERT INTO {self.name} (title, e, e_of) VALUES (:t, '[1,0,0]', :d)",
                t=title,
                d=self.digest(title),
            )
        self.connection.commit()


Make = Callable[..., Table]


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection


@pytest.fixture
def make(connection: Connection) -> Make:
    """Create and bind a table; ``ddl`` is what stands after CREATE TABLE."""

    def make(
        ddl: str = "note (id bigserial PRIMARY KEY, title text, body text, views int NOT NULL "
        "DEFAULT 0, e vector(3))",
        source: tuple[str, ...] = ("title", "body"),
        *more: str,
        schema: str | None = None,
        column: str = "e",
    ) -> Table:
        connection.execute(sa.text(f"CREATE TABLE {ddl}"))
        for statement in more:
            connection.execute(sa.text(statement))
        name = ddl.split(" (")[0]
        plain = name.rpartition(".")[2].strip('"').replace('""', '"')
        identity = ColumnIdentity(schema, plain, column)
        binding = catalog.bind(connection, identity, SPEC, Source.of(source))
        connection.commit()
        return Table(connection, name, binding.id)

    return make


@pytest.fixture
def note(make: Make) -> Table:
    return make()


@pytest.fixture
def role(connection: Connection) -> Iterator[str]:
    """A role without any right of its own."""
    name = f"role_{uuid.uuid4().hex[:8]}"
    connection.execute(sa.text(f"CREATE ROLE {name} NOSUPERUSER NOINHERIT"))
    connection.commit()
    yield name
    connection.rollback()
    connection.execute(sa.text("RESET ROLE"))
    connection.execute(sa.text(f"DROP OWNED BY {name} CASCADE"))
    connection.execute(sa.text(f"DROP ROLE {name}"))
    connection.commit()
