"""The operations, as a migration calls them: ``op.add_embedding_column(...)`` and the others.

An operation is a value: its arguments are its fields, and so are the facts that only its inverse
needs (``MEMORY``). How operations are carried out is in ``toimpl``, how they are written into a
migration in ``render``. Long, since each says what its arguments mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from alembic.operations.ops import MigrateOperation

from sbert_pg import system
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.distance import Similarity, Storage
from sbert_pg.errors import DeclarationError
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity

#: Marks a field that only the inverse needs; a migration neither says nor writes it.
MEMORY = {"memory": True}
#: Operations by the name of the method that a migration calls.
OPERATIONS: dict[str, type[SbertOperation]] = {}

C = TypeVar("C", bound="SbertOperation")


def arguments_of(kind: type[SbertOperation]) -> dict[str, inspect.Parameter]:
    """The arguments of an operation, without its memory, by name."""
    hidden = {f.name for f in fields(kind) if f.metadata.get("memory")}
    parameters = inspect.signature(kind).parameters
    return {name: value for name, value in parameters.items() if name not in hidden}


def operation(name: str) -> Callable[[type[C]], type[C]]:
    """Make a dataclass an operation that a migration calls by ``op.<name>(...)``.

    The method has the signature and the docstring of the class.
    """

    def decorate(kind: type[C]) -> type[C]:
        def call(cls: type[C], operations: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                step = cls(*args, **kwargs)
            except TypeError as error:
                # Alembic hands on whatever a migration says.
                raise DeclarationError(
                    f"op.{name}() was called with other arguments: {error}."
                ) from error
            return operations.invoke(step)

        leading = [
            inspect.Parameter(word, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for word in ("cls", "operations")
        ]
        call.__name__, call.__doc__ = name, kind.__doc__
        parameters = [*leading, *arguments_of(kind).values()]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        setattr(kind, name, classmethod(call))
        kind.name = name
        OPERATIONS[name] = kind
        return kind

    return decorate


@dataclass(eq=False)
class SbertOperation(MigrateOperation):
    """What the operations of this library share."""

    name: ClassVar[str] = "nothing"
    #: Fields that tell its difference from others of its kind, beside the place.
    telling: ClassVar[tuple[str, ...]] = ()
    #: Whether it always commits what came before, and works in its own short transactions.
    always_online: ClassVar[bool] = False

    @property
    def online(self) -> bool:
        """Whether it commits what came before, and works in its own short transactions."""
        return bool(getattr(self, "concurrently", self.always_online))

    @property
    def place(self) -> tuple[Any, ...]:
        """What it is done to: schema, table, and what of it."""
        return ()

    @property
    def relation(self) -> str:
        """The table, as text for ``regclass``."""
        return system.name_of(*self.place[:2])

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The difference that it removes, for ``compare_metadata`` and ``check``."""
        return (self.name, *self.place, *(str(getattr(self, name)) for name in self.telling))

    def reverse(self) -> MigrateOperation:
        """Nothing, unless a class knows better."""
        return NothingOp()

    def _unknown(self, what: str) -> DeclarationError:
        """Refusal to invert an operation that has forgotten what it took away."""
        return DeclarationError(
            f"The {what} {'.'.join(map(str, self.place[1:]))} cannot be brought back: this "
            "operation does not know what it was. Write the inverse by hand."
        )


class NothingOp(SbertOperation):
    """The inverse of an operation that changes nothing."""

    def reverse(self) -> MigrateOperation:
        """Nothing."""
        return self


class SequenceOp(SbertOperation):
    """Several operations as one: the inverse of one that did several things."""

    def __init__(self, ops: list[MigrateOperation]) -> None:
        self.ops = ops

    def reverse(self) -> MigrateOperation:
        """The inverses, the last one first."""
        return SequenceOp([op.reverse() for op in reversed(self.ops)])


@operation("upgrade_sbert_schema")
@dataclass(kw_only=True, eq=False)
class UpgradeSchemaOp(SbertOperation):
    """Create the schema ``sbert`` in the database, or bring it up to a revision.

    Nothing happens where it is there already, or further. The extension ``vector`` is created as
    well where it is missing.

    Args:
        revision: a revision of this library's own history; the newest by default.
    """

    telling = ("revision",)
    revision: str = field(default="head", kw_only=False)
    previous: str | None = field(default=None, metadata=MEMORY)

    def reverse(self) -> MigrateOperation:
        """Back to the revision that was there before; ``"base"`` where there was none."""
        return DowngradeSchemaOp(self.previous or "base", following=self.revision)


@operation("downgrade_sbert_schema")
@dataclass(kw_only=True, eq=False)
class DowngradeSchemaOp(SbertOperation):
    """Take the schema ``sbert`` back to a revision.

    ``"base"`` removes it, unless columns are still bound: another history in the same database may
    be using it, and it is left as it is then.

    Args:
        revision: a revision of this library's own history, or ``"base"``.
    """

    telling = ("revision",)
    revision: str = field(kw_only=False)
    following: str = field(default="head", metadata=MEMORY)

    def reverse(self) -> MigrateOperation:
        """Up again."""
        return UpgradeSchemaOp(self.following, previous=self.revision)


@dataclass(eq=False)
class ColumnOperation(SbertOperation):
    """An operation on one column; ``schema`` is ``None`` for the search path's."""

    table_name: str
    column_name: str
    _: KW_ONLY
    schema: str | None = None

    @property
    def place(self) -> ColumnIdentity:
        """Schema, table and column."""
        return ColumnIdentity(self.schema, self.table_name, self.column_name)


@dataclass(eq=False)
class DeclaringOperation(ColumnOperation):
    """An operation that says what a column's encoder and source are.

    A migration is read years after it was written, so it repeats what the mapped class said at the
    time and imports nothing of the application.
    """

    _: KW_ONLY
    encoder: str | EncoderSpec
    source: str | Sequence[str] | Source
    separator: InitVar[str] = "\n\n"
    storage: Storage = "vector"
    dimensions: InitVar[int | None] = None
    similarity: InitVar[Similarity | None] = None
    replaces: str | None = None
    declared: Embedding = field(init=False, repr=False)

    def __post_init__(
        self, separator: str, dimensions: int | None, similarity: Similarity | None
    ) -> None:
        self.declared = Embedding(
            self.encoder,
            self.source,
            separator=separator,
            storage=self.storage,
            dimensions=dimensions,
            similarity=similarity,
            replaces=self.replaces,
        )
        self.encoder, self.source = self.declared.encoder, self.declared.source

    @classmethod
    def of(cls, table_name: str, column_name: str, declared: Embedding, **options: Any) -> Any:
        """The operation for a column of a type, as a mapped class or a binding has it."""
        return cls(
            table_name,
            column_name,
            encoder=declared.encoder,
            source=declared.source,
            storage=declared.storage,
            replaces=declared.replaces,
            **options,
        )

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Place, encoder and source."""
        return (self.name, *self.place, self.declared.encoder.name, str(self.declared.source))


@operation("add_embedding_column")
@dataclass(kw_only=True, eq=False)
class AddEmbeddingColumnOp(DeclaringOperation):
    """Add an embedding column to a table in use: column, companion, binding, queue and triggers.

    The column takes ``NULL``; rows that exist wait for their first vector, which workers or
    ``sbert-pg backfill`` make. Each statement has a short transaction of its own, waits a moment
    for its lock, gives way and tries again; indexes are built concurrently; what the migration did
    before is committed first. Done twice it changes nothing.

    Args:
        column_name: the new column.
        encoder, source, separator, storage, dimensions, similarity: as in ``embedding_column``.
        replaces: see ``begin_reembedding``, which says it.

    Raises:
        TableBusyError: the table's lock could not be had; the message says who holds it.
    """

    always_online = True

    def reverse(self) -> MigrateOperation:
        """Drop the column."""
        return DropEmbeddingColumnOp(
            self.table_name, self.column_name, schema=self.schema, added=self
        )


@operation("begin_reembedding")
@dataclass(kw_only=True, eq=False)
class BeginReembeddingOp(AddEmbeddingColumnOp):
    """Begin a change of encoder: add an embedding column that is to replace another.

    Both are kept fresh from now on. Otherwise as ``add_embedding_column``.

    Args:
        column_name: the new column.
        replaces: the old column, which is bound.
        encoder, source, separator, storage, dimensions, similarity: as in ``embedding_column``.

    Raises:
        AlreadyBoundError: another column replaces the old one already.
        NotBoundError: the old column is not bound.
        TableBusyError: the table's lock could not be had; the message says who holds it.
    """

    def reverse(self) -> MigrateOperation:
        """Abort the change."""
        return AbortReembeddingOp(self.table_name, self.column_name, schema=self.schema, added=self)


@operation("drop_embedding_column")
@dataclass(kw_only=True, eq=False)
class DropEmbeddingColumnOp(ColumnOperation):
    """Drop an embedding column with its companion, its binding, triggers and indexes.

    Works as ``add_embedding_column`` does: in short transactions, with retries, and again.

    Raises:
        ReembeddingError: a view or another object of the server's depends on the column.
        TableBusyError: the table's lock could not be had; the message says who holds it.
    """

    always_online = True
    added: AddEmbeddingColumnOp | None = field(default=None, metadata=MEMORY)

    def reverse(self) -> MigrateOperation:
        """Add the column again; its rows are to be filled then."""
        if self.added is None:
            raise self._unknown("column")
        return self.added


@operation("abort_reembedding")
@dataclass(kw_only=True, eq=False)
class AbortReembeddingOp(DropEmbeddingColumnOp):
    """Abort a change of encoder: drop the new column; the old one stays as if alone.

    Args:
        column_name: the new column.

    Raises:
        TableBusyError: the table's lock could not be had; the message says who holds it.
    """


@operation("finish_reembedding")
@dataclass(kw_only=True, eq=False)
class FinishReembeddingOp(DropEmbeddingColumnOp):
    """Finish a change of encoder: drop the old column, once it is not used any more.

    Everything is checked before anything is committed or dropped.

    Args:
        column_name: the old column.
        force: drop it although it is still read or written.
        quiet: seconds for which it must not have been used.

    Raises:
        BackfillIncompleteError: the new column is not complete, or lacks its index.
        StillInUseError: the old column is still in use.
        TableBusyError: the table's lock could not be had; the message says who holds it.
    """

    force: bool = False
    quiet: float = 300.0
    #: The column that has replaced it, and operations that build the indexes which go with it.
    replacement: str | None = field(default=None, metadata=MEMORY)
    indexes: list[MigrateOperation] = field(default_factory=list, metadata=MEMORY)

    def reverse(self) -> MigrateOperation:
        """Add the column again, with its indexes, and go on with the change."""
        steps = [super().reverse(), *self.indexes]
        if self.replacement is not None:
            steps.append(
                ResumeReembeddingOp(
                    self.table_name, self.replacement, replaces=self.column_name, schema=self.schema
                )
            )
        return SequenceOp(steps) if len(steps) > 1 else steps[0]


@operation("resume_reembedding")
@dataclass(kw_only=True, eq=False)
class ResumeReembeddingOp(ColumnOperation):
    """Go on with a change of encoder after its old column has been added again.

    The inverse of ``finish_reembedding`` ends with it. The new column keeps its encoder and its
    vectors, and is said again to replace the old one. Done twice it changes nothing.

    Args:
        column_name: the new column, which is bound.
        replaces: the old column, which is bound again.

    Raises:
        NotBoundError: one of the two is not bound.
        TableBusyError: the table's lock could not be had; the message says who holds it.
    """

    always_online = True
    telling = ("replaces",)
    replaces: str


@operation("bind_embedding_column")
@dataclass(kw_only=True, eq=False)
class BindEmbeddingColumnOp(DeclaringOperation):
    """Bind a vector column that is there to its encoder and source.

    For a table that the same migration creates, and for a column that was there before. A column
    that holds vectors already is refused, since nothing shows which encoder made them:
    ``sbert-pg adopt`` does, and binds it. Done twice it mends what is missing of the binding.

    Args:
        encoder, source, separator, storage, dimensions, similarity: as in ``embedding_column``.
        replaces: the column that this one is to replace, which is bound.
        discard_vectors: bind a column that holds vectors, each of which a worker makes again.
        concurrently: commit what came before, bind in a short transaction that is tried again where
            its lock cannot be had, and build the queue beside reads and writes; else in the
            migration's transaction, which keeps writers out until its end.

    Raises:
        AlreadyBoundError: it is bound to another encoder or source.
        NotProvenError: it holds vectors.
        BindingError: it cannot be bound; the message says why.
    """

    discard_vectors: bool = False
    concurrently: bool = False

    def reverse(self) -> MigrateOperation:
        """Unbind it."""
        return UnbindEmbeddingColumnOp(
            self.table_name,
            self.column_name,
            schema=self.schema,
            bound=self,
            concurrently=self.concurrently,
        )


@operation("unbind_embedding_column")
@dataclass(kw_only=True, eq=False)
class UnbindEmbeddingColumnOp(ColumnOperation):
    """Make an embedding column a plain vector column again; its vectors stay.

    Its companion goes, which says nothing without the binding.

    Args:
        concurrently: see ``bind_embedding_column``.
    """

    concurrently: bool = False
    bound: BindEmbeddingColumnOp | None = field(default=None, metadata=MEMORY)

    def reverse(self) -> MigrateOperation:
        """Bind it again."""
        if self.bound is None:
            raise self._unknown("binding")
        return self.bound


@operation("rebind_embedding_column")
@dataclass(kw_only=True, eq=False)
class RebindEmbeddingColumnOp(ColumnOperation):
    """Accept an encoder for a bound column after proving that it shares the column's space.

    For another precision or export of the same model. The encoder is loaded and its probe vectors
    are compared with the column's; the measured agreement is written to the catalog. The vectors
    stay as they are, and an encoder that has been proven stays proven.

    Args:
        encoder: the further encoder, which this process can load.
        dimensions: as in ``embedding_column``.

    Raises:
        EncoderMismatchError: the spaces differ; such a change is a new column.
        EncoderError: the encoder cannot be loaded.
    """

    always_online = True
    telling = ("encoder_name",)
    encoder: str | EncoderSpec
    dimensions: InitVar[int | None] = None
    similarity: InitVar[Similarity | None] = None

    def __post_init__(self, dimensions: int | None, similarity: Similarity | None) -> None:
        self.encoder = EncoderSpec.of(self.encoder, dimensions=dimensions, similarity=similarity)
        self.encoder_name = self.encoder.name


@operation("rename_bound_column")
@dataclass(kw_only=True, eq=False)
class RenameBoundColumnOp(ColumnOperation):
    """Rename an embedding column, a column of a source, or of the key of a bound table.

    The companion of an embedding column is renamed with it, and bindings follow. Nothing is
    embedded again. Within the migration's transaction; done twice it changes nothing.

    Args:
        column_name: the column's old name.
        new_name: its new name.
    """

    telling = ("new_name",)
    new_name: str = field(kw_only=False)

    def reverse(self) -> MigrateOperation:
        """The other way round."""
        return RenameBoundColumnOp(
            self.table_name, self.new_name, self.column_name, schema=self.schema
        )


@operation("require_backfill")
@dataclass(kw_only=True, eq=False)
class RequireBackfillOp(ColumnOperation):
    """Fail the migration while rows of an embedding column are without their vectors.

    What the same migration did before is taken back then, as far as it was not committed already,
    so the column can be filled and the same ``alembic upgrade`` run again.

    Args:
        max_missing: rows that may be without a vector. Before an index is built some thousands do
            no harm: they only cost more when they are written.

    Raises:
        BackfillIncompleteError: more rows are without; with the figures and the command to run.
    """

    always_online = True
    max_missing: int = 0


@operation("backfill_embeddings")
@dataclass(kw_only=True, eq=False)
class BackfillEmbeddingsOp(ColumnOperation):
    """Fill an embedding column within the migration, for small applications.

    The encoder is loaded in this process. Progress is shown where standard error is a terminal; an
    interrupted backfill continues when the migration is run again.

    Raises:
        EncoderError: the encoder cannot be loaded.
    """

    always_online = True
