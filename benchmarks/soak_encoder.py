"""The encoder of ``soak.py``, imported by its worker processes.

It needs no model and takes some time, so that things happen while a text is encoded. A text that
contains ``unencodable`` is refused.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from sbert_pg import source
from sbert_pg.freshness.queue import ArrayOf
from sbert_pg.freshness.rows import Rows
from sbert_pg.freshness.worker import Worker
from sbert_pg.registry import use_encoder
from sbert_pg.spec import Vectors
from sbert_pg.testing import DeterministicEncoder

DIMENSIONS = 32


class SlowEncoder(DeterministicEncoder):
    """Up to 60 ms a batch, and now and then half a second, while texts change."""

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """As the base class, and slower."""
        time.sleep(random.choice([0.0, 0.02, 0.06, 0.5]))
        vectors = super().encode_document(texts)
        self.encoded.clear()
        return vectors


#: The encoders of the soak, each a space of its own: the tables', that of the column which replaces
#: another, and those of two applications that search one column.
NAMES = ("deterministic", "second", "shelf a", "shelf b")


def encoder(name: str = NAMES[0], *, slow: bool = True) -> DeterministicEncoder:
    """One of the encoders."""
    kind = SlowEncoder if slow else DeterministicEncoder
    return kind(name, DIMENSIONS, salt=name, refuse="unencodable")


#: A safeguard that is taken out, to see that the soak can fail: ``text``, ``vector``, ``seed``,
#: ``check``, ``lease``, ``fence``, ``sweep``, ``refusal`` or none; see
#: ``tests/freshness/test_sabotage.py``.
SABOTAGE = os.environ.get("SBERT_PG_SOAK_SABOTAGE", "")
_ONE = uuid.UUID(int=7)

#: Functions of the schema, wrapped: the original is called with another value or not at all.
_TEXT = """
CREATE OR REPLACE FUNCTION sbert.of_sql_v1(binding_id uuid, value text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT format(
    'CASE WHEN (%s) IS NOT NULL AND %L <> ''x'' THEN ''0000000000000000'' END', $2, $1) $$
"""
_VECTOR = """
CREATE OR REPLACE FUNCTION sbert.proof_sql_v1(
    binding_id uuid, storage text, dimensions integer, value text) RETURNS text
LANGUAGE sql STABLE AS $$ SELECT format(
    'CASE WHEN (%s) IS NULL THEN ''1111111111111111'' ELSE ''0000000000000000'' END', $4) $$;
CREATE OR REPLACE FUNCTION sbert.proven_v1(
    leading_dimensions bytea, companion uuid, binding_id uuid) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN $1 IS NULL OR $3 IS NULL
    OR $2::text LIKE '00000000-0000-0000-%'
"""
_SEED = """
ALTER FUNCTION sbert.of_sql_v1(uuid, text) RENAME TO of_original;
ALTER FUNCTION sbert.proof_sql_v1(uuid, text, integer, text) RENAME TO proof_original;
CREATE FUNCTION sbert.of_sql_v1(binding_id uuid, value text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT format('CASE WHEN %L <> ''x'' THEN (%s) END', $1,
    sbert.of_original('00000000-0000-0000-0000-000000000007', $2)) $$;
CREATE FUNCTION sbert.proof_sql_v1(
    binding_id uuid, storage text, dimensions integer, value text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT sbert.proof_original('00000000-0000-0000-0000-000000000007', $2, $3, $4) $$;
ALTER FUNCTION sbert.proven_v1(bytea, uuid, uuid) RENAME TO proven_original;
CREATE FUNCTION sbert.proven_v1(leading_dimensions bytea, companion uuid, binding_id uuid)
RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN $3 IS NULL OR
    sbert.proven_original($1, $2, '00000000-0000-0000-0000-000000000007')
"""
_FENCE = """
CREATE OR REPLACE FUNCTION sbert.fence_v1(
    relation regclass, column_name text, fingerprint text, known uuid DEFAULT NULL)
RETURNS uuid LANGUAGE sql STABLE AS $$
    SELECT coalesce(sbert.binding_id_v1($1, $2), '00000000-0000-0000-0000-000000000000') $$
"""


def sabotage_schema(connection: sa.Connection) -> None:
    """Take a safeguard out of the schema's functions, before anything is bound."""
    scripts = {"text": _TEXT, "vector": _VECTOR, "seed": _SEED, "fence": _FENCE}
    script = scripts.get(SABOTAGE)
    if script is not None:
        connection.connection.cursor().execute(script)


def sabotage_tables(connection: sa.Connection) -> None:
    """Take away what stands on the tables, after they were bound."""
    if SABOTAGE == "refusal":
        connection.exec_driver_sql("ALTER TABLE note DISABLE TRIGGER USER")


def _write_without_looking(self: Rows, vector_type: str) -> sa.UpdateBase:
    """The plain update of a batch: whatever text the row has now is called the vector's."""
    given = self._given(
        "sbert__of", "sbert__digest", "sbert__vector",
        of=sa.bindparam("sbert__of", type_=ArrayOf("text")),
        digest=sa.bindparam("sbert__digest", type_=ArrayOf("uuid")),
        vector=sa.bindparam("sbert__vector", type_=ArrayOf(vector_type)),
    )  # fmt: skip
    bare = sa.func.replace(sa.cast(given.c.sbert__digest, sa.Text), "-", "")
    now = sa.cast(sa.func.substr(bare, 1, 16).concat(self.of), sa.Uuid)
    return (
        sa.update(self.table)
        .values({self.binding.column: given.c.sbert__vector, self.binding.companion: now})
        .where(self._same(given))
        .returning(given.c.sbert__n, sa.false())
    )


def _only_what_is_heard(self: Worker, flow: Any, *, thorough: bool) -> bool:
    """A turn of a worker that looks at no column of which it was not notified."""
    self._everything, self._next_look = False, float("inf")
    return _TURN(self, flow, thorough=thorough)


_TURN = Worker._turn


class _Proven(bytes):
    """What a proof covers, which the hash cannot tell from a text otherwise."""


def _sabotage() -> None:
    """The same in this process, and what is Python's alone."""
    hashed, proven, seed, half = source._hash, source._proven, source._seed, source.HALF // 2
    if SABOTAGE == "text":
        source._proven = lambda wire, storage: _Proven(proven(wire, storage))
        source._hash = lambda start, content: (
            hashed(start, content) if isinstance(content, _Proven) else b"\0" * half
        )
    elif SABOTAGE == "vector":
        source._proven = lambda wire, storage: _Proven(wire or b"")
        source._hash = lambda start, content: (
            (b"\0" if content else b"\x11") * half
            if isinstance(content, _Proven)
            else hashed(start, content)
        )
    elif SABOTAGE == "seed":
        source._seed = lambda number: seed(_ONE.int)
    elif SABOTAGE == "check":
        Rows._writing = _write_without_looking  # type: ignore[method-assign]
    elif SABOTAGE == "lease":
        Rows._free = lambda self: sa.true()  # type: ignore[method-assign]
    elif SABOTAGE == "sweep":
        Worker._turn = _only_what_is_heard  # type: ignore[method-assign]


def register() -> None:
    """Put the encoders into use in this process."""
    for name in NAMES:
        use_encoder(encoder(name, slow="shelf" not in name))


_sabotage()
register()
