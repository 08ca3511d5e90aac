"""What all operations share, and those on the schema ``sbert`` itself.

An operation is a value with its inverse, where it has one; how it is carried out is in ``toimpl``
and ``index_impl``, how it is written into a migration in ``render``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from alembic.operations import Operations
from alembic.operations.ops import MigrateOperation

from sbert_pg.errors import DeclarationError


class SbertOperation(MigrateOperation):
    """What the operations of this library share."""

    #: Commits what came before, and works in short transactions of its own.
    online: ClassVar[bool] = False

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The difference that this operation removes, for ``compare_metadata`` and ``check``."""
        raise NotImplementedError


class NothingOp(SbertOperation):
    """The inverse of an operation that changes nothing."""

    def reverse(self) -> MigrateOperation:
        """Nothing."""
        return self

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """No difference."""
        return ("nothing",)


class SequenceOp(SbertOperation):
    """Several operations as one: the inverse of one that did several things."""

    def __init__(self, ops: list[MigrateOperation]) -> None:
        self.ops = ops

    def reverse(self) -> MigrateOperation:
        """The inverses, the last one first."""
        return SequenceOp([op.reverse() for op in reversed(self.ops)])


class UpgradeSchemaOp(SbertOperation):
    """Create the schema ``sbert``, or bring it up to a revision."""

    def __init__(self, revision: str = "head", *, previous: str | None = None) -> None:
        self.revision = revision
        self.previous = previous

    @classmethod
    def upgrade_sbert_schema(cls, operations: Operations, revision: str = "head") -> Any:
        """Create the schema ``sbert`` in the database, or bring it up to a revision.

        Nothing happens where it is there already, or further. The extension ``vector`` is created
        as well where it is missing.

        Args:
            operations: given by Alembic.
            revision: a revision of this library's own history; the newest by default.
        """
        return operations.invoke(cls(revision))

    def reverse(self) -> MigrateOperation:
        """Back to the revision that was there before; ``"base"`` where there was none."""
        return DowngradeSchemaOp(self.previous or "base", following=self.revision)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The revision that is missing."""
        return ("upgrade_sbert_schema", self.revision)


class DowngradeSchemaOp(SbertOperation):
    """Take the schema ``sbert`` back to a revision."""

    def __init__(self, revision: str, *, following: str = "head") -> None:
        self.revision = revision
        self.following = following

    @classmethod
    def downgrade_sbert_schema(cls, operations: Operations, revision: str) -> Any:
        """Take the schema ``sbert`` back to a revision.

        ``"base"`` removes it, unless columns are still bound: another history in the same database
        may be using it, and it is left as it is then.

        Args:
            operations: given by Alembic.
            revision: a revision of this library's own history, or ``"base"``.
        """
        return operations.invoke(cls(revision))

    def reverse(self) -> MigrateOperation:
        """Up again."""
        return UpgradeSchemaOp(self.following, previous=self.revision)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The revision to go back to."""
        return ("downgrade_sbert_schema", self.revision)


class ColumnOperation(SbertOperation):
    """An operation on one embedding column."""

    def __init__(self, table_name: str, column_name: str, *, schema: str | None = None) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self.schema = schema

    @property
    def place(self) -> tuple[str | None, str, str]:
        """Schema, table and column."""
        return self.schema, self.table_name, self.column_name


def unknown(operation: ColumnOperation, what: str) -> MigrateOperation:
    """Refuse to invert an operation that has forgotten what it took away."""
    raise DeclarationError(
        f"The {what} {operation.table_name}.{operation.column_name} cannot be brought back: this "
        "operation does not know what its encoder and source were. Write the inverse by hand."
    )
