"""The embedding column's type: a vector column that knows its encoder and its source.

Beside an embedding column ``e`` its table has an ordinary column ``e_of``, its companion, which
says of each row what the vector was made from; see ``sbert_pg.source``. The type adds it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import Mapper
from sqlalchemy.sql.visitors import iterate

from sbert_pg.catalog import guard
from sbert_pg.catalog.record import Binding
from sbert_pg.distance import STORAGES, Similarity, Storage
from sbert_pg.errors import DeclarationError, SbertPgError, ZeroVectorError
from sbert_pg.registry import query_vector
from sbert_pg.source import (
    HALF,
    NIL,
    NOT_KNOWN,
    PROVEN_DIMENSIONS,
    Source,
    Text,
    companion_name,
    digest,
    digests,
    proof,
)
from sbert_pg.spec import PRECISIONS, EncoderSpec
from sbert_pg.system import ColumnIdentity, identity_behind, identity_of
from sbert_pg.types import drivers, wire
from sbert_pg.types.vector import VectorType
from sbert_pg.types.wire import Array

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class VectorOptions(TypedDict, total=False):
        """What any declaration may say of its vectors; see ``Embedding``."""

        storage: Storage
        dimensions: int | None
        similarity: Similarity | None

    class EmbeddingOptions(VectorOptions, total=False):
        """What a declaration may say beside encoder and source; see ``Embedding``."""

        separator: str
        replaces: str | None
        precision: str | None


class Embedding(VectorType):
    """A ``VECTOR`` or ``HALFVEC`` column that belongs to one encoder and one source.

    Its table also gets the column ``<name>_of``, unless it has one of that name.

    Args:
        encoder: a name or path as ``Encoder.load`` takes it, or an ``EncoderSpec``. Nothing is
            loaded before the first text is encoded.
        source: name of the text column that is embedded, or several, or a ``Source``. Several are
            joined with ``separator``; values that are ``NULL`` or empty are left out.
        separator: what stands between the values of several columns, a blank line by default.
        storage: ``"vector"``, 4 bytes a dimension, or ``"halfvec"``, 2 bytes.
        dimensions: width; needed where ``encoder`` is a name that the library does not know.
        similarity: similarity function, where it is not the encoder's own.
        replaces: name of the embedding column of the same table that this one is to replace.
        precision: numeric form in which the encoder is loaded for the column, by workers too; what
            is fastest where it runs by default. See docs/encoder.md.

    Raises:
        DeclarationError: the declaration contradicts itself or leaves the dimensions unknown.
    """

    cache_ok = True
    # Where users find it, and what Alembic writes before the type's ``repr``.
    __module__ = "sbert_pg"

    # Not keyword-only: what SQLAlchemy copies a type by, and tells two apart by in its cache of
    # statements, are the arguments that can be given by position.
    def __init__(
        self,
        encoder: str | EncoderSpec,
        source: str | Sequence[str] | Source,
        separator: str = "\n\n",
        storage: Storage = "vector",
        dimensions: int | None = None,
        similarity: Similarity | None = None,
        replaces: str | None = None,
        precision: str | None = None,
    ) -> None:
        if storage not in STORAGES:
            raise DeclarationError(
                f"An embedding column cannot be stored as {storage!r}; use one of "
                f"{', '.join(STORAGES)}."
            )
        self.encoder = EncoderSpec.of(
            encoder, dimensions=dimensions, similarity=similarity, precision=precision
        )
        self.source = Source.of(source, separator)
        self.separator = self.source.separator
        self.storage = storage
        self.dimensions = self.encoder.dimensions
        self.similarity = self.encoder.similarity
        self.replaces = replaces
        self.precision = self.encoder.precision
        #: The columns of tables that have this very type.
        self.attached: set[ColumnIdentity] = set()
        self._query_types: dict[ColumnIdentity | None, QueryVector] = {}
        self._listen()

    def _listen(self) -> None:
        super()._listen()
        event.listen(self, "after_parent_attach", _await_table)

    def __repr__(self) -> str:
        """Python that makes an equal type, as Alembic writes it after ``sbert_pg.``."""
        source = self.source
        if source.passages is not None or source.document is not None:
            text = f"sbert_pg.Source.from_json({source.to_json()!r})"
        elif source.pattern is not None:
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
        if self.precision in PRECISIONS:
            parts.append(f"precision={self.precision!r}")
        return f"Embedding({', '.join(parts)})"

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

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Check a value, and turn it into what the driver takes; see also ``guard``."""
        guard.watch(dialect)
        return super().bind_processor(dialect)

    def query_type(self, left: sa.ColumnElement[Any]) -> QueryVector:
        """The type of a parameter that is compared with this column."""
        identity = identity_behind(left)
        type_ = self._query_types.get(identity)
        if type_ is None:
            type_ = QueryVector(self.encoder, self.storage, identity)
            self._query_types[identity] = type_
        return type_


def companion_of(column: sa.ColumnElement[Any]) -> sa.Column[Any] | None:
    """The companion of an embedding column, where its table has one."""
    table = getattr(column, "table", None)
    name = getattr(column, "name", None)
    if table is None or name is None:
        return None
    companion = companion_name(name)
    return next((other for other in table.c if getattr(other, "name", None) == companion), None)


def companion_column(column: str) -> sa.Column[uuid.UUID]:
    """The companion of an embedding column, for a table that is to get it."""
    return sa.Column(
        companion_name(column),
        sa.Uuid(),
        default=InsertedDigest(column),
        server_default=str(NIL),
        nullable=True,
    )


def _await_table(type_: Embedding, column: Any) -> None:
    """Notice the table that a column of this type is put into."""
    if getattr(column, "type", None) is type_:
        event.listen(column, "before_parent_attach", _add_companion)


def _add_companion(column: sa.Column[Any], table: Any) -> None:
    """Put the companion into the table, before its column.

    Before: where a table is copied, or written down in a migration, column by column, the companion
    has come by the time its column is attached, and no second one is added.
    """
    if not isinstance(table, sa.Table):
        return
    type_: Any = column.type
    type_.attached.add(ColumnIdentity(table.schema, table.name, column.name))
    name = companion_name(column.name)
    if all(other.name != name for other in table.columns):
        table.append_column(companion_column(column.name))


@event.listens_for(Mapper, "after_mapper_constructed")
def _defer_fields(mapper: Mapper[Any], class_: type[Any]) -> None:
    """Leave vectors that are fields of SQLModel's classes in the database until they are asked for.

    As ``embedding_column`` does. SQLModel maps the column of a ``Field`` as it is, and has no
    option for it.
    """
    columns, fields = mapper.columns, getattr(class_, "model_fields", None)
    for key in fields.keys() & set(columns.keys()) if isinstance(fields, dict) else ():
        if isinstance(columns[key].type, Embedding):
            for column in (companion_of(columns[key]), columns[key]):
                if column is not None:
                    mapped: Any = mapper.get_property_by_column(column)
                    mapped.deferred = True
                    mapped.strategy_key = (("deferred", True), ("instrument", True))


@dataclass(frozen=True)
class InsertedDigest:
    """The companion's value in an ``INSERT`` of SQLAlchemy's that says nothing of it.

    A writer that gives text and vector together says that they belong together, and the declared
    encoder has been held against the column's. Without a vector the row is pending.
    """

    column: str

    def __call__(self, context: Any) -> uuid.UUID | None:
        """The digest for one row of a statement that is about to be executed."""
        if context is None:  # as builders of forms ask for a default
            return NIL
        plans = _insert_plans.setdefault(context.compiled, {})
        plan = plans.get(self.column)
        if plan is None:
            plan = plans[self.column] = _InsertPlan(context.compiled, self.column)
        try:
            row = context.get_current_parameters()
        except KeyError:
            # SQLAlchemy finds no single row in insert(Class).values([...]) of the ORM.
            row = plan.next_row(context)
        vector = row.get(plan.column.key)
        if vector is None:
            return NIL
        try:
            binding = guard.binding_for_write(
                context.root_connection, plan.identity, plan.type.encoder
            )
            return NIL if binding is None else digest_for(binding, plan.text_of(row), vector)
        except SbertPgError as error:
            drivers.unwrapped(error)
            raise


class _InsertPlan:
    """What the rows of one compiled ``INSERT`` have in common."""

    def __init__(self, compiled: Any, name: str) -> None:
        table: sa.Table = compiled.compile_state.dml_table
        self.column = next(column for column in table.columns if column.name == name)
        type_: Any = self.column.type
        self.type: Embedding = type_
        self.identity = identity_of(self.column)
        # A value that has no parameter may be an expression that stands in the statement itself,
        # which nothing but the statement's parts tells.
        usual = (sa.Insert, sa.FromClause, sa.ColumnClause, sa.BindParameter)
        plain = all(
            isinstance(part, usual) and not isinstance(part, sa.Select)
            for part in iterate(compiled.statement)
        )
        self._absent = [
            (source.key, default_of(source) if plain else NOT_KNOWN)
            for source in self.type.source.resolve(table)
        ]
        self._make = self.type.source.text_maker(null_text=bool(self.column.nullable))
        self._rows: WeakKeyDictionary[Any, Iterator[int]] = WeakKeyDictionary()

    def next_row(self, context: Any) -> dict[str, Any]:
        """The next row of a statement with many ``VALUES``, whose parameters carry its number."""
        end = f"_m{next(self._rows.setdefault(context, count()))}"
        everything = context.get_current_parameters(isolate_multiinsert_groups=False)
        return {
            name.removesuffix(end): value
            for name, value in everything.items()
            if name.endswith(end)
        }

    def text_of(self, row: Mapping[str, Any]) -> Text:
        """The text of one row, by the statement's parameters for it."""
        text: Text = self._make([row.get(key, absent) for key, absent in self._absent])
        return text


_insert_plans: WeakKeyDictionary[Any, dict[str, _InsertPlan]] = WeakKeyDictionary()


def default_of(column: sa.Column[Any]) -> Any:
    """What a new row gets where no value is given, or ``NOT_KNOWN``."""
    default: Any = column.default
    if default is not None:
        return default.arg if default.is_scalar else NOT_KNOWN
    return None if column.server_default is None else NOT_KNOWN


def digest_for(binding: Binding, text: Text, vector: Any) -> uuid.UUID | None:
    """What the companion says of a vector, as numbers or in binary, that is about to be written.

    ``text`` is what it was made from; ``NOT_KNOWN`` where this process does not know it: the vector
    is proven then, and the row pending.
    """
    if text is None and vector is None:
        return None
    if binding.source.passages is not None:
        # Of a document that is cut into passages only who cuts it can say that all is as it is.
        text = NOT_KNOWN
    storage = binding.storage
    if vector is not None and not isinstance(vector, bytes):
        # No more of it is covered, and what is wrong with it is said when it is sent.
        vector = wire.to_wire(wire.as_float32(vector)[:PROVEN_DIMENSIONS], storage)
    if isinstance(text, str) and binding.utf8:
        try:
            return digest(binding.id, text, vector, storage)
        except UnicodeEncodeError:
            pass  # which the server will refuse
    if vector is None:
        return NIL
    return uuid.UUID(proof(binding.id, vector, storage) + "0" * HALF)


def digests_for(
    binding: Binding, texts: Sequence[Text], vectors: Sequence[Any]
) -> Sequence[bytes | uuid.UUID | None]:
    """As ``digest_for`` for many rows; as COPY sends it where all are whole and in binary form."""
    whole = set(map(type, texts)) == {str} and set(map(type, vectors)) == {bytes}
    if whole and binding.utf8 and binding.source.passages is None:
        with suppress(UnicodeEncodeError):
            return digests(binding.id, cast("Sequence[str]", texts), vectors, binding.storage)
    return [digest_for(binding, *row) for row in zip(texts, vectors, strict=True)]


class QueryVector(VectorType):
    """A parameter compared with an embedding column: a vector, or a text to be encoded as a query.

    ``fenced``: the parameter asks for the column's encoder, and not its statement.
    """

    cache_ok = True

    def __init__(
        self,
        encoder: EncoderSpec,
        storage: Storage,
        column: ColumnIdentity | None,
        fenced: bool = True,
    ) -> None:
        self.fenced = fenced
        self.encoder = encoder
        self.storage = storage
        self.column = column
        self.dimensions = encoder.dimensions

    def checked(self, value: Any) -> Array:
        """The value as an array that the column can be compared with."""
        what = f"the query vector for encoder {self.encoder.name!r}"
        if isinstance(value, str):
            vector = wire.vector_in(value, self.encoder.dimensions)
            value = query_vector(self.encoder, value) if vector is None else vector
        array = wire.as_float32(value, what=what)
        wire.check_vector(array, self.dimensions, self.storage, what)
        if self.encoder.similarity == "cosine" and not array.any():
            raise ZeroVectorError(f"{what} is all zeros, and its cosine is undefined.")
        return array

    def bind_expression(self, bindvalue: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        """Have the statement itself ask whether the column is still of this encoder."""
        return guard.fenced(bindvalue, self.column if self.fenced else None, self.encoder, self)

    def unfenced(self) -> QueryVector:
        """The same of a parameter whose statement asks; see ``guard.fence_of``."""
        return QueryVector(self.encoder, self.storage, self.column, fenced=False)

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Encode a text, check a vector."""
        if dialect.name != "postgresql":
            raise drivers.unwrapped(
                DeclarationError(
                    f"Vectors are compared in PostgreSQL with pgvector; this engine is of "
                    f"{dialect.name!r}, where they can only be stored and read."
                )
            )
        guard.watch(dialect)
        return super().bind_processor(dialect)
