"""A table with an embedding column, an old and a new encoder, and what workers would do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, registry
from sbert_pg.catalog import tables
from sbert_pg.indexes import hnsw_index
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import Embedding
from sbert_pg.types.guard import ColumnIdentity

# fmt: off
WORDS = [
    "river", "stone", "bridge", "market", "garden", "winter", "letter", "engine", "harbour",
    "candle", "forest", "copper", "window", "orchard", "signal", "thunder", "ribbon", "mirror",
    "castle", "lantern", "meadow", "saddle", "compass", "anchor",
]
# fmt: on


def texts(rows: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [f"{' '.join(random.choice(WORDS, 6))} {i}" for i in range(rows)]


@dataclass
class World:
    """One application before its change of encoder."""

    engine: sa.Engine
    old: DeterministicEncoder
    new: DeterministicEncoder

    table_name = "articles"
    texts = staticmethod(texts)

    @cached_property
    def old_table(self) -> sa.Table:
        """The table as the old version of the code declares it."""
        return self._declared("embedding", Embedding(self.old.spec, ["title", "body"]))

    @cached_property
    def new_table(self) -> sa.Table:
        """The table as the new version of the code declares it."""
        type_ = Embedding(self.new.spec, ["title", "body"], replaces="embedding")
        return self._declared("embedding_new", type_)

    def _declared(self, name: str, type_: Embedding) -> sa.Table:
        table = sa.Table(
            self.table_name,
            sa.MetaData(),
            sa.Column("id", sa.BigInteger, primary_key=True),
            sa.Column("title", sa.Text),
            sa.Column("body", sa.Text),
            sa.Column("lang", sa.Text, server_default="en"),
            sa.Column(name, type_),
        )
        hnsw_index(f"ix_articles_{name}", table.c[name], m=8, ef_construction=64)
        return table

    @property
    def old_column(self) -> ColumnIdentity:
        return ColumnIdentity(None, self.table_name, "embedding")

    @property
    def new_column(self) -> ColumnIdentity:
        return ColumnIdentity(None, self.table_name, "embedding_new")

    def create(self, rows: int) -> None:
        table = self.old_table
        with self.engine.begin() as connection:
            table.metadata.create_all(connection)
            catalog.bind(connection, table.c.embedding)
            body = texts(rows)
            if rows:
                connection.execute(
                    table.insert(),
                    [
                        {
                            "id": i + 1,
                            "title": f"t{i}",
                            "body": text,
                            "lang": "en" if i % 4 else "de",
                            "embedding": vector,
                        }
                        for i, (text, vector) in enumerate(
                            zip(body, self.old.encode_document(
                                [f"t{i}\n\n{text}" for i, text in enumerate(body)]), strict=True)
                        )
                    ],
                )  # fmt: skip

    def fill(self, *columns: str, limit: int | None = None) -> int:
        """What workers do: give a vector to each row that lacks one or is pending."""
        done = 0
        for name in columns or ("embedding", "embedding_new"):
            done += self._fill(name, limit)
        return done

    def _fill(self, name: str, limit: int | None) -> int:
        encoder = self.old if name == "embedding" else self.new
        with self.engine.begin() as connection:
            binding = catalog.binding_of(connection, ColumnIdentity(None, self.table_name, name))
            if binding is None:
                return 0
            catalog.seal(connection, binding, encoder)
            catalog.attest(connection, binding, verified=True)
            table = self.old_table if name == "embedding" else self.new_table
            marked = sa.select(tables.pending.c.key).where(tables.pending.c.column_id == binding.id)
            rows = connection.execute(
                sa.select(table.c.id, table.c.title, table.c.body)
                .where(
                    sa.or_(
                        table.c[name].is_(None),
                        sa.cast(table.c.id, sa.Text).in_(marked),
                    )
                )
                .order_by(table.c.id)
                .limit(limit)
                .with_for_update()
            ).all()
            source = binding.source.joiner()
            vectors = encoder.encode_document([source(row[1:]) for row in rows])
            if rows:
                write = (
                    table.update()
                    .where(table.c.id == sa.bindparam("key"))
                    .values({name: sa.bindparam("vector", type_=table.c[name].type)})
                )
                pairs = zip(rows, vectors, strict=True)
                connection.execute(write, [{"key": row.id, "vector": v} for row, v in pairs])
                connection.execute(
                    sa.delete(tables.pending).where(
                        tables.pending.c.column_id == binding.id,
                        tables.pending.c.key.in_([str(row.id) for row in rows]),
                    )
                )
            return len(rows)

    def scalar(self, statement: str, **values: Any) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(sa.text(statement), values).scalar()

    def columns(self) -> list[str]:
        return [c["name"] for c in sa.inspect(self.engine).get_columns(self.table_name)]


@pytest.fixture
def world(engine: sa.Engine) -> World:
    old = DeterministicEncoder("old", 32)
    new = DeterministicEncoder("new", 48, salt="new")
    registry.use_encoder(old)
    registry.use_encoder(new)
    return World(engine, old, new)
