"""What a migration says of an embedding column, and of a vector index: plain values.

A migration is read years after it was written, so it repeats what the mapped class said at the time
and imports nothing of the application.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from sbert_pg.distance import INDEX_METHODS, STORAGES, Similarity, Storage
from sbert_pg.errors import DeclarationError
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import Embedding
from sbert_pg.types.vector import VectorType, plain_type

#: pgvector's defaults, which an index that was created without the option has.
DEFAULT_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "hnsw": {"m": "16", "ef_construction": "64"},
    "ivfflat": {"lists": "100"},
}


@dataclass(frozen=True, slots=True)
class Declaration:
    """Encoder, source and storage of an embedding column.

    Attributes:
        encoder: the encoder as declared.
        source: what the text is made of.
        storage: ``"vector"`` or ``"halfvec"``.
        replaces: the column of the same table that this one is to replace.
    """

    encoder: EncoderSpec
    source: Source
    storage: Storage = "vector"
    replaces: str | None = None

    @classmethod
    def of(
        cls,
        encoder: str | EncoderSpec,
        source: str | Sequence[str] | Source,
        *,
        separator: str = "\n\n",
        storage: Storage = "vector",
        dimensions: int | None = None,
        similarity: Similarity | None = None,
        replaces: str | None = None,
    ) -> Declaration:
        """From the arguments of an operation, which are those of ``embedding_column``.

        Raises:
            DeclarationError: they contradict each other or leave the dimensions unknown.
        """
        if storage not in STORAGES:
            raise DeclarationError(
                f"An embedding column cannot be stored as {storage!r}; use one of "
                f"{', '.join(STORAGES)}."
            )
        return cls(
            EncoderSpec.of(encoder, dimensions=dimensions, similarity=similarity),
            Source.of(source, separator),
            storage,
            replaces,
        )

    @classmethod
    def of_type(cls, type_: Embedding) -> Declaration:
        """From the type of a column of a mapped class."""
        return cls(type_.encoder, type_.source, type_.storage, type_.replaces)

    def type_(self) -> VectorType:
        """The column's type in the database."""
        return plain_type(self.storage, self.encoder.dimensions)


@dataclass(frozen=True, slots=True)
class IndexDefinition:
    """A vector index as ``CREATE INDEX`` spells it.

    Attributes:
        name: its name.
        table: name of its table.
        schema: schema of both, ``None`` for the search path's.
        column: name of the indexed column; for an expression the vector column that is in it.
        expression: SQL of the indexed expression, ``None`` where the column itself is indexed.
        using: access method.
        opclass: operator class, ``None`` for the type's default.
        options: storage parameters, as text.
        where: SQL of the predicate of a partial index.
        tablespace: tablespace, where it is not the default one.
    """

    name: str
    table: str
    schema: str | None
    column: str
    expression: str | None = None
    using: str = "hnsw"
    opclass: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    where: str | None = None
    tablespace: str | None = None

    @property
    def effective_options(self) -> dict[str, str]:
        """Storage parameters, with the defaults that were not spelled out."""
        return {**DEFAULT_OPTIONS.get(self.using, {}), **self.options}


def method_of(index: sa.Index) -> str | None:
    """``hnsw`` or ``ivfflat`` for a vector index, else ``None``."""
    using = index.dialect_options["postgresql"]["using"]
    return using if using in INDEX_METHODS else None


def definition_of(index: sa.Index, name: str, schema: str | None) -> IndexDefinition:
    """The definition of a vector index of the application's metadata.

    Args:
        index: an index for which ``method_of`` is not ``None``.
        name: its name after naming conventions.
        schema: its schema, ``None`` for the search path's.

    Raises:
        DeclarationError: it has more than one expression, which vector indexes cannot have.
    """
    assert index.table is not None
    if len(index.expressions) != 1:
        raise DeclarationError(
            f"Index {name!r} on {index.table.fullname} has {len(index.expressions)} expressions; "
            f"an index with {method_of(index)} has one."
        )
    options = index.dialect_options["postgresql"]
    element: Any = index.expressions[0]
    operators = options["ops"] or {}
    key = getattr(element, "key", None)
    opclass = operators.get(key) if key in operators else next(iter(operators.values()), None)
    while isinstance(element, sa.Label):
        element = element.element
    plain = isinstance(element, sa.Column)
    where = options["where"]
    expression = None if plain else sql_of(element)
    if expression is not None and opclass is None:
        expression, opclass = _without_opclass(expression)
    return IndexDefinition(
        name=name,
        table=index.table.name,
        schema=schema,
        column=element.name if plain else _vector_column(index),
        expression=expression,
        using=str(options["using"]),
        opclass=opclass,
        options={str(k): str(v) for k, v in (options["with"] or {}).items()},
        where=None if where is None else sql_of(where),
        tablespace=options["tablespace"],
    )


def _without_opclass(expression: str) -> tuple[str, str | None]:
    """An expression given as text may have the operator class behind it."""
    match = re.fullmatch(r"(.*\S)\s+(\w+_ops)", expression, flags=re.DOTALL)
    return (expression, None) if match is None else (match[1], match[2])


def _vector_column(index: sa.Index) -> str:
    names = [c.name for c in index.columns if isinstance(c.type, VectorType)]
    return names[0] if names else next((c.name for c in index.columns), "")


def sql_of(expression: Any) -> str:
    """An expression of an index as SQL, without the table's name and without parameters."""
    if isinstance(expression, str):
        return expression
    # A parameter style that leaves percent signs alone.
    dialect = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]
    compiled = expression.compile(
        dialect=dialect, compile_kwargs={"literal_binds": True, "include_table": False}
    )
    return str(compiled)
