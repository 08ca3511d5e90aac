"""Embedding columns of mapped classes: how they are declared, and what a mapper knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.orm import (
    ColumnProperty,
    MappedAsDataclass,
    MappedColumn,
    Mapper,
    RelationshipProperty,
    Session,
    mapped_column,
)
from sqlalchemy.orm.exc import UnmappedColumnError

from sbert_pg.catalog.embedding import Embedding, InsertedDigest
from sbert_pg.catalog.record import Binding
from sbert_pg.passages import declared_passages
from sbert_pg.row_vectors import EmbeddingColumn, embedding_columns
from sbert_pg.source import NIL, Source, companion_name
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.vector import VectorArray, VectorType

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sbert_pg.catalog.embedding import EmbeddingOptions

#: Rows read by one statement.
BLOCK = 1000

Key = tuple[Any, ...]


def embedding_column(
    encoder: str | EncoderSpec,
    source: str | Sequence[str] | Source,
    *,
    name: str | None = None,
    nullable: bool | None = None,
    deferred: bool = True,
    init: bool | None = None,
    **options: Unpack[EmbeddingOptions],
) -> MappedColumn[Any]:
    """A mapped column that stores the embedding of other columns of its row.

    Nothing is loaded or checked before the column is used: the class can be mapped with no encoder
    on disk. The class also gets the attribute ``<attribute>_of``, which stays in the database
    unless it is asked for: the column that says what each vector was made from.

    Args:
        encoder: name or path as ``Encoder.load`` takes it, or an ``EncoderSpec``.
        source: name of the text column to embed, or several, or a ``Source``.
        name: name of the column in the database; the attribute's name by default.
        nullable: as in ``mapped_column``. A column that the worker fills has to be nullable.
        deferred: whether the vector stays in the database until it is asked for, as is faster.
        init: for classes mapped as dataclasses, whether ``__init__`` takes the vector, as a keyword
            that may be left out; it does by default. Give it where the class becomes a dataclass
            by a decorator, which cannot be known here. The attribute is never part of ``repr`` or
            of comparison.
        **options: ``separator``, ``storage``, ``dimensions``, ``similarity``, ``replaces`` and
            ``precision``, as ``Embedding`` takes them.

    Raises:
        DeclarationError: the declaration contradicts itself or leaves the dimensions unknown.
    """
    return MappedEmbedding(Embedding(encoder, source, **options), name, nullable, deferred, init)


class MappedEmbedding(MappedColumn[Any]):
    """What ``embedding_column`` returns: a mapped column that brings its companion along.

    Python gives it the class that it stands in. The companion and, on dataclasses, the options
    that a field needs are added then, before SQLAlchemy looks at the class. Where it does not,
    as in a function under ``declared_attr``, the table still gets the companion from the type.
    """

    __slots__ = ("init", "options")

    def __init__(
        self,
        type_: Embedding,
        name: str | None,
        nullable: bool | None,
        deferred: bool,
        init: bool | None,
    ) -> None:
        self.init = init
        self.options: dict[str, Any] = {
            "deferred": deferred,
            **({} if name is None else {"name": name}),
            **({} if nullable is None else {"nullable": nullable}),
        }
        super().__init__(type_=type_, **self.options)

    def __set_name__(self, owner: type[Any], name: str) -> None:
        """Python's call at the end of the body of the class."""
        attribute: MappedColumn[Any] = self
        if self.init is not None or issubclass(owner, MappedAsDataclass):
            # An array has no truth value, so == of two dataclasses would raise; and repr() would
            # fetch the vector from the database.
            attribute = mapped_column(
                type_=self.column.type,
                init=self.init is not False,
                default=None,
                kw_only=True,
                repr=False,
                compare=False,
                **self.options,
            )
        annotations = vars(owner).get("__annotations__", {})
        if name in annotations and hasattr(owner, "__pydantic_complete__"):
            # A column of the table and no field of the model: SQLModel makes columns of its own
            # of fields, and pydantic would serialise the vector wherever the model is.
            annotations[name] = ClassVar[Any]
        # The companion comes first, as in the table; see ``catalog.embedding``.
        delattr(owner, name)
        if f"{name}_of" not in vars(owner):
            setattr(owner, f"{name}_of", _companion(self.options.get("name", name)))
        setattr(owner, name, attribute)


def _companion(column: str) -> MappedColumn[Any]:
    """As ``types.embedding.companion_column``, mapped, and read when it is asked for."""
    return mapped_column(
        companion_name(column),
        sa.Uuid(),
        insert_default=InsertedDigest(column),
        server_default=str(NIL),
        nullable=True,
        deferred=True,
    )


def plain_attributes(class_: type[Any]) -> list[str]:
    """Names of a class's attributes that people read and write: what an admin interface shows.

    Left out are vectors, what stands beside them, passages, and columns that the server computes;
    forms have no fields for these. sqladmin, starlette-admin and Flask-Admin take such lists.

    Args:
        class_: a mapped class.
    """
    names = []
    for attribute in sa.inspect(class_).attrs:
        if isinstance(attribute, ColumnProperty):
            column = attribute.columns[0]
            own = {companion_name(c.name) for c in _embeddings(getattr(column, "table", None))}
            hidden = (
                isinstance(column.type, (VectorType, VectorArray))
                or (isinstance(column, sa.Column) and column.computed is not None)
                or getattr(column, "name", None) in own
            )
        else:
            hidden = isinstance(attribute, RelationshipProperty) and bool(
                declared_passages(attribute.class_attribute)
            )
        if not hidden:
            names.append(attribute.key)
    return names


def _embeddings(table: Any) -> list[sa.Column[Any]]:
    columns = table.columns if isinstance(table, sa.Table) else ()
    return [column for column in columns if isinstance(column.type, Embedding)]


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingAttribute:
    """An embedding column as an attribute of a mapped class; keys are names of attributes."""

    key: str
    companion_key: str
    column: EmbeddingColumn
    source_keys: tuple[str, ...]
    row_keys: tuple[str, ...]

    def binding(self, session: Session, mapper: Mapper[Any]) -> Binding | None:
        """The column's binding in the database that the session writes to; ``None`` for none."""
        return self.column.binding(session.connection(bind_arguments={"mapper": mapper}))

    def stored_sources(
        self, session: Session, mapper: Mapper[Any], keys: Sequence[Key]
    ) -> dict[Key, dict[str, Any]]:
        """Source and companion of some rows, by key and attribute, as the database has them.

        A row that is changed before this session's write has another text then than the one
        that is encoded, which its companion says: it is pending.
        """
        # Of a joined hierarchy the class's own part.
        columns = tuple(self.column.column.table.primary_key)
        width = len(columns)
        names = (*self.source_keys, self.companion_key)
        left = columns[0] if width == 1 else sa.tuple_(*columns)
        rows: dict[Key, dict[str, Any]] = {}
        for start in range(0, len(keys), BLOCK):
            block = keys[start : start + BLOCK]
            read: list[Any] = [*columns, *self.column.source_columns, self.column.companion]
            statement = sa.select(*read).where(
                left.in_([key[0] for key in block] if width == 1 else block)
            )
            for row in session.execute(statement, bind_arguments={"mapper": mapper}):
                rows[tuple(row[:width])] = dict(zip(names, row[width:], strict=True))
        return rows


_attributes: WeakKeyDictionary[Mapper[Any], tuple[EmbeddingAttribute, ...]] = WeakKeyDictionary()


def attributes_of(mapper: Mapper[Any]) -> tuple[EmbeddingAttribute, ...]:
    """The embedding columns that a mapper knows, with a source that it knows as well."""
    attributes = _attributes.get(mapper)
    if attributes is None:
        attributes = _attributes[mapper] = tuple(
            attribute
            for table in mapper.tables
            if isinstance(table, sa.Table)
            for column in embedding_columns(table)
            if not column.is_cut and (attribute := _attribute(mapper, column)) is not None
        )
    return attributes


def _attribute(mapper: Mapper[Any], column: EmbeddingColumn) -> EmbeddingAttribute | None:
    """``None`` where a column is not mapped: a sibling's in a single table, or an excluded one."""
    if column.companion is None:
        return None
    try:
        return EmbeddingAttribute(
            mapper.get_property_by_column(column.column).key,
            mapper.get_property_by_column(column.companion).key,
            column,
            tuple(mapper.get_property_by_column(c).key for c in column.source_columns),
            tuple(mapper.get_property_by_column(c).key for c in column.column.table.primary_key),
        )
    except UnmappedColumnError:
        return None
