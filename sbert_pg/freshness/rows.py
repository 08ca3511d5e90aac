"""The rows of one bound column: what is pending, its texts, and the write that proves itself.

Statements are built once for a column. The module is long, since everything that workers and
backfills do to an application's table is here. Keys travel in the binary form of their own types,
so no session's formats matter; as text they only *name* a row, in leases, failures and messages
(``Row.label``).
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog import tables
from sbert_pg.catalog.record import Binding, Named
from sbert_pg.freshness.passages import Cut, StoredPassages, stored_passages
from sbert_pg.freshness.queue import (
    BACKFILL,
    CHANGED,
    ArrayOf,
    Candidate,
    Class,
    Key,
    Row,
    Written,
    register,
    require_all_rows,
    vector_of,
)
from sbert_pg.source import proof
from sbert_pg.system import array, array_label, parts_of, unnested
from sbert_pg.types.wire import UUID_OID, TextArray, WireArray, element_of

#: How long a row that failed for good is left alone, whatever its text is now.
_FAILED_FOR = timedelta(seconds=10)

#: Names of columns and parameters of our own in statements over tables that may have columns of
#: nearly any name: of these two underscores, as no column that is called after the library has.
_N, _OF, _DIGEST, _VECTOR, _LABEL = (
    f"sbert__{n}" for n in ("n", "of", "digest", "vector", "label")
)
_NOTHING: Mapping[str, Any] = {}
_TEXTS, _UUIDS = ArrayOf("text"), ArrayOf("uuid")
#: Formats in which a key names its row, so that all workers give it one name; and plans by the
#: queue's index, whatever the planner's statistics say of a table that has just changed.
_FORMATS = {
    "DateStyle": "ISO, YMD", "IntervalStyle": "postgres", "TimeZone": "UTC",
    "bytea_output": "hex", "extra_float_digits": "1",
}  # fmt: skip
_PLANS = dict.fromkeys(
    (
        "enable_seqscan", "enable_sort", "enable_hashjoin", "enable_mergejoin",
        "enable_bitmapscan", "jit",
    ),
    "off",
)  # fmt: skip


def _setting(values: dict[str, str]) -> sa.Select[Any]:
    return sa.select(*(sa.func.set_config(name, value, True) for name, value in values.items()))


SET_FORMATS, _SET_BOTH = _setting(_FORMATS), _setting(_FORMATS | _PLANS)


class Rows:
    """Statements on the table of one binding; made by ``rows_of``.

    ``required``: the vector column is ``NOT NULL``. ``of``: the half of a row's digest that names
    its text, over ``table``. ``passages``: those of its rows, where these are documents.
    """

    def __init__(
        self, binding: Binding, vector_type: str, vector_oid: int, *, required: bool
    ) -> None:
        self.binding = binding
        self.required = required
        self._vector_oid = vector_oid
        self.table = binding.clause()
        self.keys = [self.table.c[name] for name in binding.key_columns]
        self.passages: StoredPassages | None = None
        self.of = binding.expressions.on(self.table, "of")
        self._sent = [
            sa.func.array_send(pg.array([sa.cast(key, Named(type_))]), type_=sa.LargeBinary)
            for key, type_ in zip(self.keys, binding.key_types, strict=True)
        ]
        self.label = array_label(self.keys)
        self._claim = {
            (class_, after): self._claiming(class_, after)
            for class_ in (CHANGED, BACKFILL)
            for after in (False, True)
        }
        self._furthest = {class_: self._leading(class_) for class_ in (CHANGED, BACKFILL)}
        self._read = self._reading()
        self._write = self._writing(vector_type)
        self._held = self._holding()

    # -- statements ---------------------------------------------------------------------------

    def _given(self, more: Mapping[str, ArrayOf] = _NOTHING) -> sa.TableValuedAlias:
        """Parameters as rows: the parts of the key ``sbert__k0``..., more, and their number."""
        types = {f"sbert__k{i}": ArrayOf(t) for i, t in enumerate(self.binding.key_types)}
        types |= more
        parameters = {name: sa.bindparam(name, type_=type_) for name, type_ in types.items()}
        return unnested("sbert__given", _N, **parameters)

    def _same(self, given: sa.FromClause) -> sa.ColumnElement[bool]:
        """Whether a row is the one that a row of parameters names."""
        return sa.and_(*(key == given.c[f"sbert__k{i}"] for i, key in enumerate(self.keys)))

    def _claiming(self, class_: int, after: bool) -> sa.Select[Any]:
        """Pending rows of a class in the order of their keys, neither put off nor in hand."""
        f = tables.failure.c
        failure = (
            sa.select(
                f.key.label(_LABEL), f.failed.label("sbert__failed"),
                f.of_text.label("sbert__of_text"), f.at.label("sbert__at"),
            )
            .where(f.binding_id == self.binding.id)
            .subquery("sbert__failure")
        )  # fmt: skip
        # A text that failed for good is left alone until it is another one. Where a trigger changes
        # it at every write, that would be an endless loop without a pause.
        returns = sa.and_(
            failure.c.sbert__failed,
            failure.c.sbert__of_text.is_distinct_from(self.of),
            failure.c.sbert__at < sa.func.now() - _FAILED_FOR,
        )
        columns: list[sa.ColumnElement[Any]] = [
            *(sent.label(f"sbert__k{i}") for i, sent in enumerate(self._sent)),
            self.label.label("sbert__name"),
            failure.c[_LABEL].is_not(None).label("sbert__before"),
        ]
        statement = (
            sa.select(*columns)
            .select_from(self.table.outerjoin(failure, failure.c[_LABEL] == self.label))
            .where(
                self.binding.is_here(),
                self.binding.is_stale(self.table),
                self.binding.class_of(self.table) == class_,
                sa.or_(failure.c[_LABEL].is_(None), returns),
                self._free(),
            )
            .order_by(*self.keys)
            .limit(sa.bindparam("sbert__most", type_=sa.Integer))
        )
        return statement.where(self._beyond()) if after else statement

    def _free(self) -> sa.ColumnElement[bool]:
        """Whether nobody has a row in hand. The server asks: it stops at the rows that are wanted,
        where all that a large fleet has in hand would be sent here for each claim.
        """
        c = tables.claim.c
        leased = sa.select(sa.func.unnest(c["keys"])).where(c.binding_id == self.binding.id)
        return self.label.not_in(leased.scalar_subquery())

    def _leading(self, class_: int) -> sa.Select[Any]:
        """The furthest row of a class that is the last of a lease, if it comes after a row."""
        c = tables.claim.c
        label = sa.cast(c["keys"][sa.func.cardinality(c["keys"])], pg.JSONB)
        leases = sa.select(label.label(_LABEL)).where(c.binding_id == self.binding.id)
        last = leases.cte("sbert__last")
        row = self._named(
            last, self.binding.is_stale(self.table), self.binding.class_of(self.table) == class_
        )
        keys = [row.c[key.name] for key in self.keys]
        return (
            sa.select(*(row.c[f"sbert__k{i}"] for i in range(len(keys))))
            .select_from(last.join(row, sa.true()))
            .where(self._beyond(keys))
            .order_by(*(key.desc() for key in keys))
            .limit(1)
        )

    def _named(self, names: sa.FromClause, *where: sa.ColumnElement[bool]) -> sa.FromClause:
        """The row that each of some names in JSON stands for, looked up one by one, whatever the
        planner takes the table for: it has never been analysed where its rows have just come.
        """
        same = [
            key == sa.cast(names.c[_LABEL][i].astext, Named(type_))
            for i, (key, type_) in enumerate(zip(self.keys, self.binding.key_types, strict=True))
        ]
        sent = [sent.label(f"sbert__k{i}") for i, sent in enumerate(self._sent)]
        return sa.select(*self.keys, *sent).where(*same, *where).limit(1).lateral("sbert__row")

    def _beyond(
        self, keys: Sequence[sa.ColumnElement[Any]] | None = None
    ) -> sa.ColumnElement[bool]:
        """Whether a row comes after the one that parameters name."""
        keys = keys or self.keys
        last = [
            sa.select(
                sa.func.unnest(sa.bindparam(f"sbert__k{i}", type_=ArrayOf(t)))
            ).scalar_subquery()
            for i, t in enumerate(self.binding.key_types)
        ]
        if len(last) == 1:
            return keys[0] > last[0]
        return sa.tuple_(*keys) > sa.tuple_(*last)

    def _reading(self) -> sa.Select[Any]:
        asked = self._given()
        # Documents may be large, and who cuts them reads them one after the other.
        text = (
            self.binding.expressions.on(self.table, "text")
            if self.binding.source.passages is None
            else sa.null()
        )
        return sa.select(
            asked.c[_N],
            text.label("sbert__text"),
            self.of.label(_OF),
            # Not a criterion, which would have the planner read the whole queue.
            self.binding.is_stale(self.table).label("sbert__stale"),
            self.binding.expressions.on(self.table, "failed").label("sbert__failed"),
        ).select_from(asked.join(self.table, self._same(asked)))

    def _writing(self, vector_type: str) -> sa.Select[Any]:
        """Lock, in the order of keys and past what others hold, where the text is still the same;
        then write where it still is.
        """
        asked = self._given({_OF: _TEXTS, _DIGEST: _UUIDS, _VECTOR: ArrayOf(vector_type)})
        locked = (
            sa.select(*asked.c)
            .select_from(asked.join(self.table, self._same(asked)))
            .where(self.binding.is_here(), self.of.is_not_distinct_from(asked.c[_OF]))
            .order_by(*self.keys)
            .with_for_update(of=self.table, skip_locked=True, key_share=True)
            .cte("sbert__locked")
        )
        written = (
            sa.update(self.table)
            .values(
                {self.binding.column: locked.c[_VECTOR], self.binding.companion: locked.c[_DIGEST]}
            )
            .where(self._same(locked), self.of.is_not_distinct_from(locked.c[_OF]))
            .returning(locked.c[_N], self.binding.is_stale(self.table).label("sbert__stale"))
            .cte("sbert__written")
        )
        # A row that is locked for us and not written after all is one that a trigger left out.
        return sa.select(locked.c[_N], written.c.sbert__stale).select_from(
            locked.outerjoin(written, written.c[_N] == locked.c[_N])
        )

    def _holding(self) -> sa.Select[Any]:
        """Which rows still have the text, locked or not."""
        asked = self._given({_OF: _TEXTS})
        return (
            sa.select(asked.c[_N])
            .select_from(asked.join(self.table, self._same(asked)))
            .where(self.of.is_not_distinct_from(asked.c[_OF]))
        )

    # -- what workers do ----------------------------------------------------------------------

    def candidates(
        self, connection: Connection, class_: Class, most: int, after: Key | None = None
    ) -> list[Candidate]:
        """Pending rows in the order of their keys, after ``prepare``, without those that wait for
        another attempt or are in hand.
        """
        values: dict[str, Any] = {"sbert__most": most}
        if after is not None:
            values |= self._key_arrays([after])
        pending = connection.execute(self._claim[class_, after is not None], values).all()
        parts = len(self.keys)
        return [
            Candidate(tuple(map(element_of, row[:parts])), row[parts], row[parts + 1])
            for row in pending
        ]

    def furthest(self, connection: Connection, class_: Class, after: Key) -> Key:
        """Where the rows of a class end that anybody has in hand, or ``after`` where that is later.
        Names that are not keys any more are the driver's errors, here and below.
        """
        row = connection.execute(self._furthest[class_], self._key_arrays([after])).first()
        return after if row is None else tuple(map(element_of, row))

    def find_all(self, connection: Connection, labels: Sequence[str]) -> list[Candidate]:
        """The rows of these names, as far as there are any, in one statement."""
        text = sa.func.unnest(array(labels)).column_valued("sbert__text")
        names = sa.select(text.label("sbert__name"), sa.cast(text, pg.JSONB).label(_LABEL)).cte()
        # What is no name of a row of this table may be read as another's.
        row = self._named(names, self.label == names.c.sbert__name)
        sent = [row.c[f"sbert__k{i}"] for i in range(len(self.keys))]
        named = sa.select(names.c.sbert__name, *sent).select_from(names.join(row, sa.true()))
        return [
            Candidate(tuple(map(element_of, key)), label, True)
            for label, *key in connection.execute(named)
        ]

    def find(self, connection: Connection, label: str) -> Candidate | None:
        """The row of this name, or ``None`` where there is none, or it names nothing."""
        values = parts_of(label) or ()
        if len(values) != len(self.keys) or not all(isinstance(value, str) for value in values):
            return None
        same = [
            key == sa.cast(sa.literal(value, sa.Text), Named(type_))
            for key, value, type_ in zip(self.keys, values, self.binding.key_types, strict=True)
        ]
        row = connection.execute(sa.select(*self._sent).where(*same)).first()
        return None if row is None else Candidate(tuple(map(element_of, row)), label, True)

    def read(
        self, connection: Connection, claimed: Sequence[Candidate], *, to_skip: bool = False
    ) -> list[Row]:
        """Those of the rows that are still pending, with their texts; ``to_skip`` also takes failed
        ones, and locks all, waiting for whoever holds one.
        """
        if not claimed:
            return []
        statement = self._read
        if to_skip:
            statement = statement.order_by(*self.keys).with_for_update(
                of=self.table, key_share=True
            )
        texts = connection.execute(statement, self._key_arrays([one.key for one in claimed])).all()
        rows = []
        for number, text, of, stale, failed in sorted(texts, key=lambda row: row[0]):
            one = claimed[number - 1]
            if stale or (to_skip and failed):
                rows.append(Row(one.key, one.label, one.failed_before, text, of))
        return rows

    def columns_of(
        self, connection: Connection, rows: Sequence[Row], columns: Sequence[sa.ColumnElement[Any]]
    ) -> Sequence[sa.Row[Any]]:
        """Columns of rows: the number of the row from 1 on, and what is asked for of ``table``."""
        if not rows:
            return ()
        register(connection)
        asked = self._given()
        statement = sa.select(asked.c[_N], *columns)
        statement = statement.select_from(asked.join(self.table, self._same(asked)))
        return connection.execute(statement, self._key_arrays([row.key for row in rows])).all()

    def write(
        self,
        connection: Connection,
        rows: Sequence[Row],
        vectors: Mapping[str, bytes | None],
        cuts: Mapping[str, Cut] = _NOTHING,
        passages: Mapping[str, bytes] = _NOTHING,
    ) -> Written:
        """Write vectors and digests where the text is still the one that was read, at READ
        COMMITTED.

        A row without a vector is written as *failed for this text*, or where it has no text as
        fresh; rows that are not in ``vectors`` are left alone. Nothing is waited for, so this
        cannot be part of a deadlock. Documents get the passages of their text with it, and without
        a vector none.
        """
        chosen = [row for row in rows if row.label in vectors]
        if not chosen:
            return Written((), (), ())
        register(connection)
        results = connection.execute(self._write, self._written(chosen, vectors))
        in_order = sorted(results, key=itemgetter(0))
        locked = {chosen[number - 1].label: again for number, again in in_order}
        written = {label: again for label, again in locked.items() if again is not None}
        self._exchange(connection, chosen, written, cuts, passages)
        return self._outcome(connection, chosen, locked, written)

    def _outcome(
        self,
        connection: Connection,
        rows: Sequence[Row],
        locked: Mapping[str, bool | None],
        written: Mapping[str, bool | None],
    ) -> Written:
        """What became of rows, given which were locked, and whether written ones are pending."""
        left = [row for row in rows if row.label not in locked]
        busy = self._busy(connection, left)
        return Written(
            tuple(written),
            tuple(row.label for row in left if row.label not in busy),
            tuple(busy),
            tuple(label for label, again in written.items() if again),
            tuple(label for label in locked if label not in written),
        )

    def _written(self, rows: Sequence[Row], vectors: Mapping[str, bytes | None]) -> dict[str, Any]:
        """What the statement that writes takes."""
        payloads = [vectors[row.label] for row in rows]
        digests = [self._digest(row, v) for row, v in zip(rows, payloads, strict=True)]
        return {
            **self._as_read(rows),
            _DIGEST: WireArray(digests, UUID_OID),
            _VECTOR: WireArray(payloads, self._vector_oid),
        }

    def _as_read(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Rows as they were read: their keys, and of which text."""
        return {
            **self._key_arrays([row.key for row in rows]),
            _OF: TextArray([row.of for row in rows]),
        }

    def _exchange(
        self,
        connection: Connection,
        rows: Sequence[Row],
        written: Collection[str],
        cuts: Mapping[str, Cut],
        vectors: Mapping[str, bytes],
    ) -> None:
        """Give documents that were written the passages of their text."""
        if self.passages is None:
            return
        for row in rows:
            if row.label in written:
                self.passages.exchange(connection, row.key, cuts.get(row.label, Cut(())), vectors)

    def _busy(self, connection: Connection, rows: Sequence[Row]) -> list[str]:
        """Labels of the rows that others hold, and whose text has not changed."""
        if not rows:
            return []
        held = set(connection.execute(self._held, self._as_read(rows)).scalars())
        return [row.label for number, row in enumerate(rows, 1) if number in held]

    def prepare(self, connection: Connection, *, plans: bool = True) -> None:
        """Set, for this transaction, how keys are spelt and how plans are chosen."""
        connection.execute(_SET_BOTH if plans else SET_FORMATS)
        register(connection)

    def page(
        self,
        connection: Connection,
        columns: Sequence[sa.ColumnElement[Any]],
        size: int,
        after: Key | None = None,
    ) -> tuple[Sequence[sa.Row[Any]], Key | None]:
        """A page of rows in the order of their keys, after ``prepare``, and the key of the last
        one.
        """
        sent = [part.label(f"sbert__k{i}") for i, part in enumerate(self._sent)]
        statement = sa.select(*columns, *sent).order_by(*self.keys).limit(size)
        values: dict[str, Any] = {}
        if after is not None:
            statement = statement.where(self._beyond())
            values = dict(self._key_arrays([after]))
        page = connection.execute(statement, values).all()
        if not page:
            return (), None
        return page, tuple(map(element_of, page[-1][len(columns) :]))

    def requeue(self, connection: Connection, *where: sa.ColumnElement[bool]) -> int:
        """Make rows pending whose vector is wrong or to be made again, which stays until the new
        one is written; returns how many. The caller commits.
        """
        companion = self.table.c[self.binding.companion]
        locked = (
            sa.select(*self.keys)
            .where(*where)
            .order_by(*self.keys)
            .with_for_update(key_share=True)
            .cte("sbert__locked")
        )
        same = sa.and_(*(key == locked.c[key.name] for key in self.keys))
        return connection.execute(
            sa.update(self.table)
            .values({companion: self.binding.expressions.on(self.table, "requeue")})
            .where(same, *where)
        ).rowcount

    def _key_arrays(self, keys: Sequence[Key]) -> dict[str, WireArray]:
        arrays = {}
        for i in range(len(self.keys)):
            parts = [key[i] for key in keys]
            arrays[f"sbert__k{i}"] = WireArray([payload for _, payload in parts], parts[0][0])
        return arrays

    def _digest(self, row: Row, vector: bytes | None) -> bytes | None:
        if row.of is None:
            return None
        binding = self.binding
        return uuid.UUID(proof(binding.id, vector, binding.storage) + row.of).bytes


def rows_of(connection: Connection, binding: Binding) -> Rows:
    """The rows of a bound column."""
    oid, name, required = vector_of(connection, binding)
    require_all_rows(connection, binding)
    rows = Rows(binding, name, oid, required=required)
    if binding.source.passages is not None:
        rows.passages = stored_passages(connection, binding)
    return rows
