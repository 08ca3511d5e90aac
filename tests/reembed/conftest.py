"""A table with an embedding column, an old and a new encoder, and what workers would do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg import catalog, registry
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.indexes import hnsw_index
from sbert_pg.source import digest
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import wire

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
        """The table with its old column filled."""
        table = self.old_table
        with self.engine.begin() as connection:
            table.metadata.create_all(connection)
            catalog.bind(connection, table.c.embedding)
            values = [
                {"id": i + 1, "title": f"t{i}", "body": text, "lang": "en" if i % 4 else "de"}
                for i, text in enumerate(texts(rows))
            ]
            if rows:
                connection.execute(sa.insert(sa.table(
                    self.table_name, *(sa.column(name) for name in values[0])
                )), values)  # fmt: skip
        self.fill("embedding")
        self.old.encoded.clear()

    def fill(self, *columns: str, limit: int | None = None) -> int:
        """What workers do: give its vector to each row that says that it has none."""
        done = 0
        for name in columns or ("embedding", "embedding_new"):
            done += self._fill(name, limit)
        return done

    def _fill(self, name: str, limit: int | None) -> int:
        encoder = self.old if name == "embedding" else self.new
        with self.engine.begin() as connection:
            identity = ColumnIdentity(None, self.table_name, name)
            binding = catalog.binding_of(connection, identity)
            if binding is None:
                return 0
            catalog.hold_encoder(connection, binding, encoder)
            table = binding.clause()
            text = binding.expressions.on(table, "text")
            rows = connection.execute(
                sa.select(table.c.id, text)
                .where(binding.is_stale(table))
                .order_by(table.c.id)
                .limit(limit)
                .with_for_update()
            ).all()
            self.write(connection, name, encoder, {row[0]: row[1] for row in rows})
            return len(rows)

    def write(
        self,
        connection: sa.Connection,
        name: str,
        encoder: DeterministicEncoder,
        texts: dict[int, str | None],
    ) -> None:
        """Write the vectors of texts with their proof, by plain SQL."""
        binding = catalog.require_binding(connection, ColumnIdentity(None, self.table_name, name))
        known = {key: text for key, text in texts.items() if text is not None}
        vectors = dict(zip(known, encoder.encode_document(list(known.values())), strict=True))
        for key, text in texts.items():
            vector = vectors.get(key)
            sent = None if vector is None else wire.to_wire(vector, binding.storage)
            connection.execute(
                sa.text(
                    f"update {self.table_name} set {name} = cast(:v as text)::{binding.storage}, "
                    f"{binding.companion} = :d where id = :k"
                ),
                {
                    "k": key,
                    "v": None if vector is None else wire.to_text(vector),
                    "d": digest(binding.id, text, sent, binding.storage),
                },
            )

    def pending(self, name: str) -> list[int]:
        """Keys of the rows that say that they wait for a vector."""
        with self.engine.connect() as connection:
            binding = catalog.require_binding(
                connection, ColumnIdentity(None, self.table_name, name)
            )
            table = binding.clause()
            rows = sa.select(table.c.id).where(binding.is_stale(table)).order_by(table.c.id)
            return list(connection.scalars(rows))

    def fail(self, key: int, name: str) -> None:
        """Say of a row what a worker says that cannot encode its text."""
        with self.engine.begin() as connection:
            binding = catalog.require_binding(
                connection, ColumnIdentity(None, self.table_name, name)
            )
            text = binding.expressions.bare("text")
            text = connection.execute(
                sa.text(f"select {text} from {self.table_name} where id = :k"),
                {"k": key},
            ).scalar_one()
            connection.execute(
                sa.text(
                    f"update {self.table_name} set {name} = null, {binding.companion} = :d "
                    "where id = :k"
                ),
                {"k": key, "d": digest(binding.id, text, None, binding.storage)},
            )

    def scalar(self, statement: str, **values: Any) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(sa.text(statement), values).scalar()

    def columns(self) -> list[str]:
        """Names of the table's columns, companions apart."""
        with self.engine.connect() as connection:
            names = connection.scalars(
                sa.text(
                    "select attname from pg_attribute where attrelid = to_regclass(:name) "
                    "and attnum > 0 and not attisdropped order by attnum"
                ),
                {"name": self.table_name},
            )
            return [name for name in names if not name.endswith("_of")]


@pytest.fixture
def world(engine: sa.Engine) -> World:
    old = DeterministicEncoder("old", 32)
    new = DeterministicEncoder("new", 48, salt="new")
    registry.use_encoder(old)
    registry.use_encoder(new)
    return World(engine, old, new)
