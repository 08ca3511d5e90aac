"""The stored passages of documents: what is there, and the exchange for what belongs there now.

Everything happens in the transaction that writes the document's row, under that row's lock, so
readers see the old passages or the new ones. A passage whose text is embedded already keeps its row
and vector, and only its place changes, which touches no index.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg import system
from sbert_pg.catalog import Binding, all_bindings
from sbert_pg.errors import NotBoundError
from sbert_pg.freshness.queue import ArrayOf, Key, register, vector_of
from sbert_pg.passages.cutting import Passage
from sbert_pg.passages.declaring import CONTENT, PASSAGE_COLUMNS
from sbert_pg.source import NIL, digest
from sbert_pg.types.wire import UUID_OID, TextArray, WireArray

#: Passages written by one statement.
_AT_ONCE = 2_000
_NUMBERS = pg.ARRAY(sa.BigInteger)


@dataclass(frozen=True, slots=True)
class Cut:
    """What a document is to have; ``body`` is its text, where passages have copies of it."""

    passages: Sequence[Passage]
    body: str | None = None


def _by_digest(rows: Iterable[Any], vectors: Mapping[str, bytes]) -> defaultdict[str, deque[Any]]:
    """Passages that are there by the digest of their text, those with a vector first."""
    present: defaultdict[str, deque[Any]] = defaultdict(deque)
    for row in rows:
        if row.fresh:
            present[row.digest].appendleft(row)
        else:
            # What has no vector is of use only where there is none for it now either.
            present["" if row.digest in vectors else row.digest].append(row)
    return present


class StoredPassages:
    """Statements on the passage table of one column of documents; made by ``stored_passages``."""

    def __init__(
        self, documents: Binding, binding: Binding, vector: tuple[int, str], settings: Any
    ) -> None:
        self.binding = binding
        self.settings = settings
        self._oid, vector_type = vector
        names = [ours for ours, _ in settings["key"]]
        theirs = [name for _, name in settings["key"]]
        columns = [*names, *PASSAGE_COLUMNS, *([CONTENT] if settings["copy"] else [])]
        self.table = binding.clause(*columns)
        types = dict(zip(documents.key_columns, documents.key_types, strict=True))
        self._parts = [documents.key_columns.index(name) for name in theirs]
        keys = [
            sa.select(sa.func.unnest(sa.bindparam(f"sbert_k{i}", type_=ArrayOf(types[name]))))
            .scalar_subquery()
            for i, name in enumerate(theirs)
        ]  # fmt: skip
        c = self.table.c
        own = sa.and_(*(c[name] == key for name, key in zip(names, keys, strict=True)))
        fresh = sa.and_(c[binding.column].is_not(None), binding.is_fresh(self.table))
        place = [c[name] for name in PASSAGE_COLUMNS]
        self._digests = sa.select(c.digest).where(own, fresh)
        self._stored = sa.select(c.id, *place, fresh.label("fresh")).where(own).order_by(c.ordinal)
        ids = sa.bindparam("sbert_ids", type_=_NUMBERS)
        self._delete = sa.delete(self.table).where(own, c.id == sa.any_(sa.cast(ids, _NUMBERS)))
        self._move = self._moving(own)
        self._insert = self._inserting(names, keys, vector_type)

    def _given(self, **arrays: Any) -> sa.TableValuedAlias:
        binds: dict[str, Any] = {}
        for name, type_ in arrays.items():
            # Not by the columns' own names, which SQLAlchemy keeps for itself.
            bind = sa.bindparam(f"sbert_{name}", type_=type_)
            binds[name] = sa.cast(bind, _NUMBERS) if type_ is _NUMBERS else bind
        return system.unnested("sbert_given", **binds)

    def _moving(self, own: sa.ColumnElement[bool]) -> sa.Update:
        moved = self._given(
            id=_NUMBERS, ordinal=_NUMBERS, start=_NUMBERS, stop=_NUMBERS, heading=ArrayOf("text")
        )
        places = {n: moved.c[n] for n in ("ordinal", "start", "stop", "heading")}
        return sa.update(self.table).values(places).where(own, self.table.c.id == moved.c.id)

    def _inserting(
        self, names: list[str], keys: Sequence[sa.ColumnElement[Any]], vector_type: str
    ) -> sa.Insert:
        binding = self.binding
        texts = ["heading", "digest", *([CONTENT] if self.settings["copy"] else [])]
        added = self._given(
            **dict.fromkeys(("ordinal", "start", "stop"), _NUMBERS),
            **dict.fromkeys(texts, ArrayOf("text")),
            vector=ArrayOf(vector_type), proof=ArrayOf("uuid"),
        )  # fmt: skip
        columns = [*names, "ordinal", "start", "stop", *texts, binding.column, binding.companion]
        values = [added.c[n] for n in ("ordinal", "start", "stop", *texts, "vector", "proof")]
        return sa.insert(self.table).from_select(columns, sa.select(*keys, *values))

    def _key(self, key: Key) -> dict[str, WireArray]:
        parts = [key[number] for number in self._parts]
        return {f"sbert_k{i}": WireArray([payload], oid) for i, (oid, payload) in enumerate(parts)}

    def digests(self, connection: Connection, key: Key) -> set[str]:
        """Digests of a document's passages whose vectors are those of their texts."""
        return set(connection.execute(self._digests, self._key(key)).scalars())

    def as_json(self, documents: sa.FromClause) -> sa.ScalarSelect[Any]:
        """The passages of the documents of a statement: JSON arrays of what a ``Passage`` has."""
        c = self.table.c
        passage = sa.func.jsonb_build_array(c.start, c.stop, c.heading, c.digest)
        same = [c[ours] == documents.c[theirs] for ours, theirs in self.settings["key"]]
        rows = sa.select(sa.func.jsonb_agg(pg.aggregate_order_by(passage, c.ordinal)))
        return rows.where(*same).scalar_subquery()

    def exchange(
        self, connection: Connection, key: Key, cut: Cut, vectors: Mapping[str, bytes]
    ) -> None:
        """Give a document, whose row is locked, the passages that it is to have.

        A passage without a vector, here or there, is written without one, and is pending by what
        its own row says. ``vectors`` are in pgvector's binary format, by digest.
        """
        own = self._key(key)
        before = _by_digest(connection.execute(self._stored, own), vectors)
        moved, new = [], []
        for ordinal, passage in enumerate(cut.passages):
            if before[passage.digest]:
                row = before[passage.digest].popleft()
                place = (row.ordinal, row.start, row.stop, row.heading)
                if place != (ordinal, *passage[:3]):
                    moved.append((row.id, ordinal, *passage[:3]))
            else:
                new.append((ordinal, passage))
        gone = [row.id for rows in before.values() for row in rows]
        register(connection)
        if gone:
            connection.execute(self._delete, {**own, "sbert_ids": gone})
        for start in range(0, len(moved), _AT_ONCE):
            ids, ordinals, starts, stops, headings = zip(
                *moved[start : start + _AT_ONCE], strict=True
            )
            connection.execute(
                self._move,
                {**own, "sbert_id": list(ids), "sbert_ordinal": list(ordinals),
                 "sbert_start": list(starts), "sbert_stop": list(stops),
                 "sbert_heading": TextArray(headings)},
            )  # fmt: skip
        for start in range(0, len(new), _AT_ONCE):
            self._write(connection, own, new[start : start + _AT_ONCE], cut.body, vectors)

    def _write(
        self,
        connection: Connection,
        own: Mapping[str, WireArray],
        new: Sequence[tuple[int, Passage]],
        body: str | None,
        vectors: Mapping[str, bytes],
    ) -> None:
        ordinals, passages = zip(*new, strict=True)
        starts, stops, headings, digests = zip(*passages, strict=True)
        payloads = [vectors.get(digest) for digest in digests]
        proofs = [self._proof(p, v) for p, v in zip(passages, payloads, strict=True)]
        values: dict[str, Any] = {
            "sbert_ordinal": list(ordinals),
            "sbert_start": list(starts),
            "sbert_stop": list(stops),
            "sbert_heading": TextArray(headings),
            "sbert_digest": TextArray(digests),
            "sbert_vector": WireArray(payloads, self._oid),
            "sbert_proof": WireArray(proofs, UUID_OID),
        }
        if self.settings["copy"]:
            values[f"sbert_{CONTENT}"] = TextArray(
                [(body or "")[p.start : p.stop] for p in passages]
            )
        connection.execute(self._insert, {**own, **values})

    def _proof(self, passage: Passage, vector: bytes | None) -> bytes:
        if vector is None:
            return NIL.bytes
        proof = digest(self.binding.id, passage.digest, vector, self.binding.storage)
        assert proof is not None  # since there is a text
        return proof.bytes


def stored_passages(connection: Connection, documents: Binding) -> StoredPassages:
    """The passages of a bound column of documents."""
    settings = json.loads(documents.source.passages or "{}")
    referring = set(
        connection.execute(
            sa.select(sa.cast(system.CONSTRAINT.c.conrelid, sa.BigInteger)).where(
                system.CONSTRAINT.c.confrelid == documents.relation,
                system.CONSTRAINT.c.contype == "f",
            )
        ).scalars()
    )
    bound = [
        binding
        for binding in all_bindings(connection)
        if binding.relation in referring
        and binding.table == settings["table"]
        and binding.source.document is not None
    ]
    if not bound:
        raise NotBoundError(
            f"{documents} is cut into passages in the table {settings['table']!r}, which is not "
            "there, does not refer to its documents, or has no bound embedding column. A migration "
            "makes and binds it (alembic revision --autogenerate)."
        )
    # During a change of encoder the new column is filled by its own queue.
    binding = next((one for one in bound if one.replaces is None), bound[0])
    oid, name, _ = vector_of(connection, binding)
    return StoredPassages(documents, binding, (oid, name), settings)
