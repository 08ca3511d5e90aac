"""The embedding column's type: a vector column that knows its encoder and its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Dialect

from sbert_pg.distance import STORAGES, Similarity, Storage
from sbert_pg.errors import DeclarationError, DimensionError, ZeroVectorError
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import guard, wire
from sbert_pg.types.query_cache import query_vector
from sbert_pg.types.unwrapped import unwrapped
from sbert_pg.types.vector import Array, VectorType, _register_with, register_reflection


class Embedding(VectorType):
    """A ``VECTOR`` or ``HALFVEC`` column bound to one encoder and one source.

    Args:
        encoder: a name or path as ``Encoder.load`` takes it, or an ``EncoderSpec``. Nothing is
            loaded before the first text is encoded.
        source: name of the text column that is embedded, or several, or a ``Source``.
        separator: what stands between the values of several columns.
        storage: ``"vector"`` or ``"halfvec"``.
        dimensions: width; needed where ``encoder`` is a name that ``sbert_pg.known`` lacks.
        similarity: similarity function, where it is not the encoder's own.
        replaces: name of the embedding column of the same table that this one is to replace.

    Raises:
        DeclarationError: the declaration contradicts itself or leaves the dimensions unknown.
    """

    cache_ok = True
    # Where users find it, and what Alembic writes before the type's ``repr``.
    __module__ = "sbert_pg"

    def __init__(
        self,
        encoder: str | EncoderSpec,
        source: str | Sequence[str] | Source,
        *,
        separator: str = "\n\n",
        storage: Storage = "vector",
        dimensions: int | None = None,
        similarity: Similarity | None = None,
        replaces: str | None = None,
    ) -> None:
        if storage not in STORAGES:
            raise DeclarationError(
                f"An embedding column cannot be stored as {storage!r}; use one of "
                f"{', '.join(STORAGES)}."
            )
        self.encoder = EncoderSpec.of(encoder, dimensions=dimensions, similarity=similarity)
        self.source = Source.of(source, separator)
        self.separator = self.source.separator
        self.storage = storage
        self.dimensions = self.encoder.dimensions
        self.similarity = self.encoder.similarity
        self.replaces = replaces
        self._query_types: dict[guard.ColumnIdentity | None, QueryVector] = {}
        wire.register()
        register_reflection()

    def __repr__(self) -> str:
        """Python that makes an equal type, as Alembic writes it after ``sbert_pg.``."""
        source = self.source
        if source.pattern is not None:
            text = f"sbert_pg.Source.template({source.pattern!r})"
        else:
            text = repr(source.columns[0] if len(source.columns) == 1 else list(source.columns))
        parts = [repr(self.encoder.name), text]
        if source.separator != "\n\n":
            parts.append(f"separator={source.separator!r}")
        if self.storage != "vector":
            parts.append(f"storage={self.storage!r}")
        parts.append(f"dimensions={self.dimensions}")
        usual = EncoderSpec.of(self.encoder.name, dimensions=self.dimensions)
        if self.similarity != usual.similarity:
            parts.append(f"similarity={self.similarity!r}")
        if self.replaces is not None:
            parts.append(f"replaces={self.replaces!r}")
        return f"Embedding({', '.join(parts)})"

    def _identity(self) -> tuple[Any, ...]:
        return (self.encoder, self.storage, self.source, self.replaces)

    def checked(self, value: Any) -> Array:
        """The value as an array that this column can store and rank.

        Raises:
            VectorError: one of its kinds.
        """
        what = f"the vector for encoder {self.encoder.name!r}"
        array = wire.as_float32(value, what=what)
        wire.check_vector(array, self.dimensions, self.storage, what)
        if self.similarity == "cosine" and not array.any():
            raise ZeroVectorError(
                f"{what} is all zeros, and its cosine with anything is undefined. Store NULL where "
                "there is nothing to embed."
            )
        return array

    def query_type(self, left: sa.ColumnElement[Any]) -> QueryVector:
        """The type of a parameter that is compared with this column."""
        identity = guard.identity_of(left)
        found = self._query_types.get(identity)
        if found is None:
            found = QueryVector(self.encoder, self.storage, identity)
            self._query_types[identity] = found
        return found


class QueryVector(VectorType):
    """A parameter compared with an embedding column: a vector, or a text to be encoded as a query.

    Args:
        encoder: the column's encoder.
        storage: the column's storage.
        column: schema, table and column that the parameter is compared with, where known.
    """

    cache_ok = True

    def __init__(
        self, encoder: EncoderSpec, storage: Storage, column: guard.ColumnIdentity | None
    ) -> None:
        self.encoder = encoder
        self.storage = storage
        self.column = column
        self.dimensions = encoder.dimensions

    def _identity(self) -> tuple[Any, ...]:
        return (self.encoder, self.storage, self.column)

    def checked(self, value: Any) -> Array:
        """The value as an array that the column can be compared with.

        Raises:
            VectorError: one of its kinds.
        """
        what = f"the query vector for encoder {self.encoder.name!r}"
        array = wire.as_float32(value, what=what)
        wire.check_vector(array, self.dimensions, self.storage, what)
        if self.encoder.similarity == "cosine" and not array.any():
            raise ZeroVectorError(f"{what} is all zeros, and its cosine is undefined.")
        return array

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str]:
        """Render a vector, or the vector of a text, as a cast literal."""
        render = super().literal_processor(dialect)

        def process(value: Any) -> str:
            return render(query_vector(self.encoder, value) if isinstance(value, str) else value)

        return process

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Encode a text, check a vector."""
        guard.watch(dialect)
        _register_with(dialect)
        spec, storage, checked = self.encoder, self.storage, self.checked
        passed = wire.passing(dialect.driver)

        def process(value: Any) -> Any:
            if value is None or isinstance(value, wire.WireVector):
                return None if value is None else passed(value)
            if isinstance(value, str):
                vector = query_vector(spec, value)
                if vector.shape != (spec.dimensions,):
                    raise DimensionError(
                        f"Encoder {spec.name!r} gives {vector.shape[-1]} dimensions and its column "
                        f"is declared with {spec.dimensions}. Correct the declaration."
                    )
                value = np.asarray(vector)
            return passed(wire.wire_vector(checked(value), storage))

        return unwrapped(process)
