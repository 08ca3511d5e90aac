"""Claim pending rows, read their texts, write their vectors, and let go of them.

Between the claim and the write no transaction is open. What makes that safe:

- A claim is a lease on the mark in ``sbert.pending`` under a token that is used once. It keeps
  workers from doing the same work; correctness does not depend on it.
- The write locks the application's row first, then the mark, and waits for neither. It writes only
  where the text is still the one that was encoded and the mark is still the one that was claimed.
- Marks are versioned from a sequence, so one that was removed and made again is another one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog.tables import pending
from sbert_pg.pending.arrays import ArrayOf, TextArray, bigint_array, register
from sbert_pg.pending.rows import Row, Rows

_TEXTS = ArrayOf("text")
_BIGINTS = ArrayOf("bigint")
#: From this attempt on a row is claimed alone: it may be what ended the process that had it.
ALONE_FROM = 2
#: Longest reason that is kept of a failure, in characters.
ERROR_LENGTH = 2_000


@dataclass(frozen=True, slots=True)
class Claim:
    """One mark on which this worker has a lease.

    Attributes:
        key: key of the row.
        version: version of the mark.
        attempts: times it has been claimed without a result, this time included.
        abandoned: whether the previous claim ended without a word, by its lease.
    """

    key: str
    version: int
    attempts: int
    abandoned: bool


@dataclass(frozen=True, slots=True)
class Claimed:
    """Claims that were read, ready to be encoded.

    Attributes:
        token: what the marks are claimed under.
        claims: the claims whose rows exist, in the order of ``rows``.
        rows: the rows.
        orphans: claims whose row does not exist.
    """

    token: str
    claims: tuple[Claim, ...]
    rows: tuple[Row, ...]
    orphans: tuple[Claim, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a batch.

    Attributes:
        rows: rows whose vector was written and whose mark was removed.
        changed: rows whose text or mark had changed meanwhile; they stay pending.
        busy: rows that somebody else held locked; they stay pending.
    """

    rows: int
    changed: tuple[str, ...]
    busy: tuple[str, ...]


def claim(
    connection: Connection,
    column_id: int,
    *,
    token: str,
    limit: int,
    lease: timedelta,
    alone: bool = False,
) -> list[Claim]:
    """Take a lease on the oldest marks of a column that nobody has; the caller commits.

    Args:
        connection: a connection, at READ COMMITTED.
        column_id: number of the binding.
        token: names this claim; used once.
        limit: most rows to claim.
        lease: how long others leave them alone.
        alone: claim one row of those that were claimed before without a result, instead of those
            that were not.
    """
    given = {
        "of_column": column_id,
        "token": token,
        "lease": lease,
        "most": 1 if alone else limit,
    }
    found = connection.execute(_CLAIM_ALONE if alone else _CLAIM, given)
    return [Claim(*row) for row in found.all()]


def _free(*, alone: bool) -> sa.ColumnElement[bool]:
    c = pending.c
    return sa.and_(
        c.column_id == sa.bindparam("of_column", type_=sa.Integer),
        ~c.failed,
        sa.or_(c.lease_until.is_(None), c.lease_until < sa.func.now()),
        sa.or_(c.next_attempt_at.is_(None), c.next_attempt_at <= sa.func.now()),
        c.attempts >= ALONE_FROM if alone else c.attempts < ALONE_FROM,
    )


def _claiming(*, alone: bool) -> sa.UpdateBase:
    """The statement of ``claim``; built once, since building it costs more than running it.

    Rows are found again by where they lie. They are locked, so they stay there; one that moved
    before it was locked is not found, and left to the next claim.
    """
    c, before = pending.c, pending.alias("before")
    free = (
        sa.select(sa.literal_column("ctid"))
        .select_from(pending)
        .where(_free(alone=alone))
        .order_by(c.marked_at)
        .limit(sa.bindparam("most", type_=sa.Integer))
        .with_for_update(skip_locked=True)
        .correlate(None)
        .scalar_subquery()
    )
    was_claimed = (
        sa.select(before.c.claimed_by.is_not(None))
        .where(before.c.column_id == c.column_id, before.c.key == c.key)
        .correlate(pending)
        .scalar_subquery()
    )
    return (
        sa.update(pending)
        .values(
            lease_until=sa.func.now() + sa.bindparam("lease", type_=sa.Interval),
            claimed_by=sa.bindparam("token", type_=sa.Text),
            attempts=c.attempts + 1,
            next_attempt_at=None,
        )
        .where(sa.literal_column("pending.ctid") == sa.any_(sa.func.array(free)))
        # The snapshot of the statement still has the row as it was.
        .returning(
            c.key, c.version, c.attempts, sa.case((c.attempts > 1, was_claimed), else_=sa.false())
        )
    )


_CLAIM, _CLAIM_ALONE = _claiming(alone=False), _claiming(alone=True)
_SUSPECTS = sa.select(pending.c.key).where(_free(alone=True)).limit(1)


def has_suspects(connection: Connection, column_id: int) -> bool:
    """Whether there are rows to be claimed alone."""
    return connection.execute(_SUSPECTS, {"of_column": column_id}).first() is not None


def read(connection: Connection, rows: Rows, token: str, claims: Sequence[Claim]) -> Claimed:
    """Read the texts of claimed rows; in a transaction after the claim's, or the same."""
    found = rows.read(connection, [claim.key for claim in claims])
    return Claimed(
        token,
        tuple(claim for claim in claims if claim.key in found),
        tuple(found[claim.key] for claim in claims if claim.key in found),
        tuple(claim for claim in claims if claim.key not in found),
    )


def write(
    connection: Connection,
    rows: Rows,
    claimed: Claimed,
    vectors: Mapping[str, bytes | None],
) -> Written:
    """Write vectors and remove the marks, where neither text nor mark has changed.

    One transaction, which the caller begins, attests and commits. Marks of rows that do not exist
    are removed as well.

    Args:
        connection: a connection, at READ COMMITTED, attested for the column.
        rows: the rows of the column.
        claimed: what was claimed and read.
        vectors: vectors in pgvector's binary format by key; ``None`` clears the vector. Rows that
            are not in it are left alone.
    """
    read = [row for row in claimed.rows if row.key in vectors]
    unchanged, changed = rows.lock_unchanged(connection, read)
    locked = unchanged | changed
    orphans = {claim.key for claim in claimed.orphans}
    versions = {claim.key: claim.version for claim in (*claimed.claims, *claimed.orphans)}
    # With the rows locked no writer can make a mark that these would be mistaken for.
    held = _take_marks(connection, rows.binding.id, claimed.token, versions, unchanged | orphans)
    due = {key: vectors[key] for key in vectors if key in held}
    if due:
        rows.write(connection, due)
    return Written(
        len(due),
        tuple(row.key for row in read if row.key in locked and row.key not in held),
        tuple(row.key for row in read if row.key not in locked),
    )


def _take_marks(
    connection: Connection,
    column_id: int,
    token: str,
    versions: Mapping[str, int],
    keys: Collection[str],
) -> set[str]:
    """Remove the marks that are still the ones claimed; the others are not waited for."""
    if not keys:
        return set()
    ordered = list(keys)
    register(connection)
    given = {
        "of_column": column_id,
        "token": token,
        "keys": TextArray(ordered),
        "versions": bigint_array(versions[key] for key in ordered),
    }
    return set(connection.execute(_TAKE, given).scalars().all())


def _taking() -> sa.UpdateBase:
    given = (
        sa.func.unnest(sa.bindparam("keys", type_=_TEXTS), sa.bindparam("versions", type_=_BIGINTS))
        .table_valued(sa.column("key", sa.Text), sa.column("version", sa.BigInteger), name="given")
        .render_derived()
    )
    same = sa.and_(given.c.key == pending.c.key, given.c.version == pending.c.version)
    free = (
        sa.select(sa.literal_column("pending.ctid"))
        .select_from(given.join(pending, same))
        .where(
            pending.c.column_id == sa.bindparam("of_column", type_=sa.Integer),
            pending.c.claimed_by == sa.bindparam("token", type_=sa.Text),
        )
        .with_for_update(of=pending, skip_locked=True)
        .correlate(None)
        .scalar_subquery()
    )
    here = sa.literal_column("pending.ctid") == sa.any_(sa.func.array(free))
    return sa.delete(pending).where(here).returning(pending.c.key)


_TAKE = _taking()


def _is_one_of(keys: Sequence[str]) -> sa.ColumnElement[bool]:
    array = sa.bindparam(None, list(keys), type_=pg.ARRAY(sa.Text))
    return pending.c.key == sa.any_(array)


def _mine(column_id: int, token: str, keys: Sequence[str]) -> sa.ColumnElement[bool]:
    """Marks under this token, without waiting for those that a writer holds: they are changing."""
    free = (
        sa.select(pending.c.key)
        .where(pending.c.column_id == column_id, _is_one_of(keys), pending.c.claimed_by == token)
        .with_for_update(skip_locked=True)
    )
    return sa.and_(
        pending.c.column_id == column_id,
        pending.c.claimed_by == token,
        pending.c.key.in_(free),
    )


def release(
    connection: Connection,
    column_id: int,
    token: str,
    keys: Sequence[str],
    *,
    after: timedelta | None = None,
) -> None:
    """Give rows back unfinished, through no fault of theirs: the attempt does not count.

    Args:
        connection: a connection; the caller commits.
        column_id: number of the binding.
        token: what they were claimed under; a mark that is no longer is left alone.
        keys: their keys.
        after: how long nobody should try; at once by default.
    """
    if not keys:
        return
    again = None if after is None else sa.func.now() + after
    connection.execute(
        sa.update(pending)
        .values(
            lease_until=None, claimed_by=None, next_attempt_at=again,
            attempts=sa.func.greatest(pending.c.attempts - 1, 0),
        )
        .where(_mine(column_id, token, keys))
    )  # fmt: skip


def fail(
    connection: Connection,
    column_id: int,
    token: str,
    reasons: Mapping[str, str],
    *,
    max_attempts: int,
    backoff: timedelta,
    longest: timedelta = timedelta(hours=1),
) -> int:
    """Record that rows could not be embedded: tried again later, and failed after the last attempt.

    The next attempt comes after ``backoff`` times two to the power of the attempts so far.

    Args:
        connection: a connection; the caller commits.
        column_id: number of the binding.
        token: what they were claimed under; a mark that is no longer is left alone.
        reasons: why, by key.
        max_attempts: attempts after which a row is failed for good, until its text changes.
        backoff: time before the second attempt.
        longest: longest time between two attempts.

    Returns:
        How many rows are failed for good.
    """
    failed = 0
    attempts = pending.c.attempts
    wait = sa.func.least(backoff * sa.func.power(2, attempts - 1), longest)
    for key, reason in reasons.items():
        final = connection.execute(
            sa.update(pending)
            .values(
                lease_until=None,
                claimed_by=None,
                next_attempt_at=sa.func.now() + wait,
                failed=attempts >= max_attempts,
                error=reason[:ERROR_LENGTH].replace("\0", "�"),
            )
            .where(_mine(column_id, token, [key]))
            .returning(pending.c.failed)
        ).scalar()
        failed += bool(final)
    return failed


def renew(
    connection: Connection,
    column_id: int,
    token: str,
    keys: Sequence[str],
    lease: timedelta,
) -> None:
    """Extend the lease of rows that are still being worked on; the caller commits."""
    connection.execute(
        sa.update(pending)
        .values(lease_until=sa.func.now() + lease)
        .where(_mine(column_id, token, keys))
    )


def next_due(connection: Connection, column_ids: Sequence[int]) -> float | None:
    """Seconds until a row that is put off or leased can be claimed; ``None`` if none is."""
    c = pending.c
    due = sa.func.greatest(
        sa.func.coalesce(c.next_attempt_at, sa.func.now()),
        sa.func.coalesce(c.lease_until, sa.func.now()),
    )
    found = connection.execute(
        sa.select(sa.func.min(sa.extract("epoch", due - sa.func.now()))).where(
            c.column_id
            == sa.any_(sa.bindparam(None, list(column_ids), type_=pg.ARRAY(sa.Integer))),
            ~c.failed,
        )
    ).scalar()
    return None if found is None else float(found)


__all__ = [
    "ALONE_FROM",
    "Claim",
    "Claimed",
    "Written",
    "claim",
    "fail",
    "has_suspects",
    "next_due",
    "read",
    "release",
    "renew",
    "write",
]
