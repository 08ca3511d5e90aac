"""The rows of one bound column, by their keys: read the texts, lock, write the vectors.

Statements are built once for a column. Everything that the worker and the backfill do to an
application's table is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog import keys, system
from sbert_pg.catalog.holding import attest
from sbert_pg.catalog.record import Binding
from sbert_pg.distance import INDEX_METHODS
from sbert_pg.errors import BindingError, NotBoundError
from sbert_pg.pending.arrays import ArrayOf, TextArray, WireArray, register
from sbert_pg.spec import Vectors
from sbert_pg.types import wire

_TEXTS = ArrayOf("text")


@dataclass(frozen=True)
class Row:
    """A row as it was read.

    Attributes:
        text: what is to be embedded; ``None`` where every source column is ``NULL``, and the vector
            is to be ``NULL`` as well.
        stamp: changes whenever the row does (the transaction that wrote this version of it).
    """

    key: str
    text: str | None
    stamp: str


class Rows:
    """Statements on the table of one binding; made by ``rows_of``.

    Attributes:
        binding: the binding.
    """

    def __init__(self, binding: Binding, vector_type: str, vector_oid: int) -> None:
        self.binding = binding
        self._vector_oid = vector_oid
        self._vectors = ArrayOf(vector_type)
        self._join: Callable[[Sequence[Any]], str] = binding.source.joiner()
        self.table = binding.clause()
        self.table.append_column(sa.column("xmin"))
        wanted = self._wanted()
        matches = binding.matches(self.table, wanted)
        joined = wanted.join(self.table, matches)
        self._read = sa.select(
            wanted.c.key, stamp_of(self.table).label("stamp"), *self.source_texts()
        ).select_from(joined)
        self._lock = (
            sa.select(wanted.c.key, stamp_of(self.table).label("stamp"))
            .select_from(joined)
            .with_for_update(of=self.table, skip_locked=True, key_share=True)
        )
        vectors = self._wanted(vectors=True)
        self._write = (
            sa.update(self.table)
            .values({binding.column: vectors.c.vector})
            .where(binding.matches(self.table, vectors))
        )

    def _wanted(self, *, vectors: bool = False) -> sa.Subquery:
        """Parameters as rows: ``key``, its parts ``k0``, ``k1``..., and ``vector`` if asked."""
        arrays: list[sa.ColumnElement[Any]] = [sa.bindparam("keys", type_=_TEXTS)]
        names: list[sa.ColumnClause[Any]] = [sa.column("key", sa.Text)]
        if vectors:
            arrays.append(sa.bindparam("vectors", type_=self._vectors))
            names.append(sa.column("vector"))
        given = sa.func.unnest(*arrays).table_valued(*names, name="given").render_derived()
        types = self.binding.key_types
        parts: list[sa.ColumnElement[Any]] = [given.c.key]
        if len(types) > 1:
            document = sa.cast(given.c.key, pg.JSONB)
            parts = [document[i].astext for i in range(len(types))]
        typed = [
            sa.cast(part, keys.Named(type_)).label(f"k{i}")
            for i, (part, type_) in enumerate(zip(parts, types, strict=True))
        ]
        return sa.select(*given.c, *typed).subquery("wanted")

    def source_texts(self) -> list[sa.ColumnElement[str]]:
        """The source columns as text, named ``s0``, ``s1``..."""
        return [
            sa.cast(self.table.c[name], sa.Text).label(f"s{i}")
            for i, name in enumerate(self.binding.source.columns)
        ]

    def row(self, key: str, stamp: str, values: Sequence[str | None]) -> Row:
        """A row from what a statement returned."""
        for value in values:
            if value is not None:
                return Row(key, self._join(values), stamp)
        return Row(key, None, stamp)

    def read(self, connection: Connection, wanted: Sequence[str]) -> dict[str, Row]:
        """The rows with these keys that exist, by key."""
        register(connection)
        found = connection.execute(self._read, {"keys": TextArray(wanted)}).all()
        return {key: self.row(key, stamp, values) for key, stamp, *values in found}

    def lock_unchanged(
        self, connection: Connection, read: Sequence[Row]
    ) -> tuple[set[str], set[str]]:
        """Lock rows that were read earlier, and see whether their text is still the same.

        ``FOR NO KEY UPDATE`` is what an update of the vector takes anyway. It is never waited for,
        so this cannot be part of a deadlock.

        Returns:
            Keys of the rows that are locked and unchanged, and of those that are locked and have
            another text now. A row that somebody else holds, or that is gone, is in neither.
        """
        register(connection)
        locked = connection.execute(self._lock, {"keys": TextArray(row.key for row in read)})
        stamps = {row[0]: row[1] for row in locked.all()}
        touched = [row for row in read if stamps.get(row.key, row.stamp) != row.stamp]
        again = self.read(connection, [row.key for row in touched]) if touched else {}
        changed = {row.key for row in touched if again[row.key].text != row.text}
        return stamps.keys() - changed, changed

    def write(self, connection: Connection, vectors: Mapping[str, bytes | None]) -> int:
        """Write vectors, by key, into rows that are locked and whose text was compared.

        The encoder has to have been held against the column (``catalog.hold``).

        Returns:
            The number of rows written.
        """
        attest(connection, self.binding, verified=True)
        register(connection)
        array = WireArray(list(vectors.values()), self._vector_oid)
        given = {"keys": TextArray(vectors), "vectors": array}
        result = connection.execute(self._write, given)
        return result.rowcount

    def has_vector_index(self, connection: Connection) -> bool:
        """Whether the table has a vector index, on this column or another."""
        i, c, m = system.INDEX.c, system.CLASS.c, system.AM.c
        found = connection.execute(
            sa.select(sa.true())
            .select_from(system.INDEX)
            .join(system.CLASS, c.oid == i.indexrelid)
            .join(system.AM, m.oid == c.relam)
            .where(i.indrelid == self.binding.relation, m.amname.in_(INDEX_METHODS))
            .limit(1)
        )
        return found.first() is not None

    def payloads(self, vectors: Vectors) -> list[bytes]:
        """Vectors of shape ``(n, dimensions)`` in pgvector's binary format."""
        return wire.to_wire_rows(vectors, self.binding.storage)

    def faults_of(self, vectors: Vectors) -> dict[int, str]:
        """Why vectors of shape ``(n, dimensions)`` cannot be stored, by their positions."""
        finite = np.isfinite(vectors).all(axis=1)
        faults = dict.fromkeys(
            np.flatnonzero(~finite).tolist(),
            "the encoder gave a vector that holds NaN or an infinity",
        )
        if self.binding.declared.similarity == "cosine":
            reason = "the encoder gave a zero vector, whose cosine with anything is undefined"
            zero = np.flatnonzero(~vectors.any(axis=1))
            faults |= dict.fromkeys(zero.tolist(), reason)
        if self.binding.storage == "halfvec":
            half = float(np.finfo(np.float16).max)
            reason = f"the vector holds a value beyond {half:g}, the largest of halfvec"
            large = np.flatnonzero(finite & (np.abs(vectors) > half).any(axis=1))
            faults |= dict.fromkeys(large.tolist(), reason)
        return faults


def stamp_of(table: sa.FromClause) -> sa.ColumnElement[str]:
    """What changes whenever a row does: the number of the transaction that wrote it."""
    return sa.cast(table.c.xmin, sa.Text)


def rows_of(connection: Connection, binding: Binding) -> Rows:
    """The rows of a bound column.

    Raises:
        NotBoundError: the column is gone.
        BindingError: row-level security hides rows from this role.
    """
    a = system.ATTRIBUTE.c
    found = connection.execute(
        sa.select(a.atttypid, sa.func.format_type(a.atttypid, None)).where(
            a.attrelid == binding.relation, a.attname == binding.column, ~a.attisdropped
        )
    ).first()
    if found is None:
        raise NotBoundError(
            f"Column {binding} does not exist any more. Run SELECT sbert.prune_v1() if its table "
            "was dropped, or sbert.rename_v1() if it was renamed."
        )
    hidden = connection.execute(
        sa.select(sa.func.row_security_active(sa.cast(binding.relation, pg.OID)))
    ).scalar_one()
    if hidden:
        raise BindingError(
            f"Row-level security applies to this role on {binding.schema}.{binding.table}, so rows "
            "could be left out unnoticed. Run as the table's owner or as a role with BYPASSRLS."
        )
    oid, name = found
    return Rows(binding, name, oid)


__all__ = ["Row", "Rows", "rows_of", "stamp_of"]
