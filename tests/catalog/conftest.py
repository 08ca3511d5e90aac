"""A bound table of three dimensions, so that vectors can be written by hand."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from sbert_pg import catalog
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.guard import ColumnIdentity

SPEC = EncoderSpec(name="deterministic", dimensions=3)


@dataclass
class Table:
    """A bound table, and what happened to it."""

    connection: Connection
    name: str
    binding: catalog.Binding

    def run(self, statement: str, **parameters: object) -> sa.CursorResult:
        return self.connection.execute(sa.text(statement), parameters)

    def attest(self, *, verified: bool = False) -> None:
        catalog.attest(self.connection, self.binding, verified=verified)

    def pending(self) -> list[str]:
        """Keys of the marks of this column."""
        rows = self.run(
            "SELECT key FROM sbert.pending WHERE column_id = :id ORDER BY key", id=self.binding.id
        )
        return [row.key for row in rows]

    def clear(self) -> None:
        """Remove the marks, as after a worker's round."""
        self.run("DELETE FROM sbert.pending WHERE column_id = :id", id=self.binding.id)

    def fill(self, *titles: str) -> None:
        """Insert rows that have their vectors."""
        self.attest()
        for title in titles:
            self.run(f"INSERT INTO {self.name} (title, e) VALUES (:t, '[1,0,0]')", t=title)
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
        return Table(connection, name, binding)

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
