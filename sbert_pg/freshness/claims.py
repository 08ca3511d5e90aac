"""Leases on pending rows, and the record of those that failed.

A claim is one row of ``sbert.claim`` for each batch that a worker has in hand. It keeps workers
from doing the same work; correctness does not depend on it, since a write proves itself. Keys here
are *names* of rows (``Row.label``): one that cannot be read as a key any more, such as that of a
renamed enum label, is dropped, and its row is still pending by what it says itself.

A lease that ends by itself is the trace of a process that came to an end. Its rows are then tried a
few at a time, and those of a few that end a process as well, each alone: so a text that ends
processes is found, the others are not its victims, and a fleet of machines that come and go does
not do row by row what each of them had in hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog import Binding, tables
from sbert_pg.freshness.queue import Candidate, Class, Key, Row
from sbert_pg.freshness.rows import Rows
from sbert_pg.sqlstates import Fault, fault_of
from sbert_pg.system import array, unnested

#: Longest reason that is kept of a failure, in characters.
ERROR_LENGTH = 2_000
#: Longest time between two attempts.
LONGEST_WAIT = timedelta(hours=1)
#: A row may have been another's victim, so it is tried alone once before it can fail.
_LEAST_ATTEMPTS = 2
_NEVER = 2**31 - 1
#: What an operator's decision reads like in ``sbert.failure.error``.
SKIPPED = "skipped by an operator"
ENDED = "no result: the process that encoded it came to an end, or its lease did"

_claim, _failure = tables.claim, tables.failure
T = TypeVar("T")


def lock(connection: Connection, binding: Binding) -> None:
    """Let this transaction alone claim rows of this column until the end of the transaction."""
    number = int.from_bytes(binding.id.bytes[:8], "big", signed=True)
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.literal(number, sa.BigInteger))))


def claim(
    connection: Connection,
    rows: Rows,
    class_: Class,
    *,
    token: str,
    most: int,
    lease: timedelta,
    after: Key | None = None,
) -> list[Candidate]:
    """Take a lease on pending rows that are free, in the order of their keys; the caller commits.

    It begins after a key, or after what others have claimed beyond it: a claim that walks over what
    a fleet has in hand takes the longer the larger the fleet is, and the others wait for it. The
    transaction is new, at READ COMMITTED; a token is used once.
    """
    rows.prepare(connection)
    lock(connection, rows.binding)
    if after is not None:
        after = _readable(connection, rows.furthest, class_, after) or after
    chosen = rows.candidates(connection, class_, most, after)
    _lease(connection, rows.binding, token, chosen, lease)
    return chosen


def claim_again(
    connection: Connection, rows: Rows, *, token: str, lease: timedelta, most: int = 1
) -> list[Candidate]:
    """Take a lease on rows that failed before, or were in hand when a process came to an end.

    ``most`` is one, or the most of those that were in hand once, of which there have to be two:
    they were another's victims, all or all but one, and alone each costs as much. Records of rows
    that are gone, or not pending any more, are removed on the way.
    """
    rows.prepare(connection)
    lock(connection, rows.binding)
    taken = _taken(connection, rows.binding)
    least = min(most, 2)
    while True:
        due = _due(connection, rows.binding, 100 + len(taken), together=most > 1)
        free = [label for label in due if label not in taken]
        if len(free) < least:
            return []
        chosen = _pending(connection, rows, free[:most])
        if len(chosen) >= least:
            _lease(connection, rows.binding, token, chosen, lease)
            return chosen


def _pending(connection: Connection, rows: Rows, labels: Sequence[str]) -> list[Candidate]:
    """The rows of these names that are pending; the records of others are removed."""
    named = _named(connection, rows, labels)
    pending = {row.label for row in rows.read(connection, named)}
    forget(connection, rows.binding, [label for label in labels if label not in pending])
    return [one for one in named if one.label in pending]


def _named(connection: Connection, rows: Rows, labels: Sequence[str]) -> list[Candidate]:
    """The rows of these names, without names that are not keys any more."""
    named = _readable(connection, rows.find_all, labels)
    if named is None:
        each = [_readable(connection, rows.find, label) for label in labels]
        named = [one for one in each if one is not None]
    return named


def _readable(connection: Connection, find: Callable[..., T | None], *args: object) -> T | None:
    """What is found by names of rows; ``None`` as well where one is not a key any more."""
    try:
        with connection.begin_nested():
            return find(connection, *args)
    except sa.exc.DBAPIError as error:
        if fault_of(error) is not Fault.ROW:
            raise
        return None


def _taken(connection: Connection, binding: Binding) -> set[str]:
    leased = connection.execute(
        sa.select(_claim.c["keys"]).where(_claim.c.binding_id == binding.id)
    ).scalars()
    return {label for labels in leased for label in labels}


def _lease(
    connection: Connection,
    binding: Binding,
    token: str,
    chosen: Sequence[Candidate],
    lease: timedelta,
) -> None:
    if chosen:
        connection.execute(
            sa.insert(_claim).values(
                binding_id=binding.id,
                worker=token,
                keys=array([one.label for one in chosen]),
                until=sa.func.now() + lease,
            )
        )


def release(connection: Connection, binding: Binding, token: str) -> None:
    """Give a lease back; the caller commits."""
    connection.execute(
        sa.delete(_claim).where(_claim.c.binding_id == binding.id, _claim.c.worker == token)
    )


def renew(connection: Connection, tokens: Sequence[str], lease: timedelta) -> None:
    """Extend leases of batches that are still being worked on; the caller commits."""
    connection.execute(
        sa.update(_claim)
        .values(until=sa.func.now() + lease)
        .where(_claim.c.worker == sa.any_(array(tokens)))
    )


def expire(
    connection: Connection, binding: Binding, *, max_attempts: int, backoff: timedelta
) -> list[str]:
    """Have the rows of leases that have ended tried again; the caller commits.

    Returns labels of rows that ended a process each time they were tried, for ``conclude``.
    """
    ended = (
        sa.select(_claim.c.worker)
        .where(_claim.c.binding_id == binding.id, _claim.c.until < sa.func.now())
        .with_for_update(skip_locked=True)
        .cte("ended")
    )
    leased = connection.execute(
        sa.delete(_claim)
        .where(_claim.c.binding_id == binding.id, _claim.c.worker == ended.c.worker)
        .returning(_claim.c["keys"])
    ).scalars()
    failed = []
    for labels in leased.all():
        reasons = dict.fromkeys(labels, ENDED)
        if len(labels) == 1:
            most = max(max_attempts, _LEAST_ATTEMPTS)
            failed += fail(connection, binding, reasons, {}, max_attempts=most, backoff=backoff)
        else:
            # In company each may have been the victim of another, so none has to wait.
            fail(connection, binding, reasons, {}, max_attempts=_NEVER, backoff=timedelta(0))
    return failed


def conclude(connection: Connection, rows: Rows, labels: Sequence[str]) -> list[Row]:
    """Note which texts failed for good, and return the rows that are still pending; the caller
    commits, and writes the rows so.
    """
    rows.prepare(connection)
    read = rows.read(connection, _named(connection, rows, labels))
    for row in read:
        connection.execute(
            sa.update(_failure)
            .values(of_text=row.of)
            .where(_failure.c.binding_id == rows.binding.id, _failure.c.key == row.label)
        )
    return read


def fail(
    connection: Connection,
    binding: Binding,
    reasons: Mapping[str, str],
    texts: Mapping[str, str | None],
    *,
    max_attempts: int,
    backoff: timedelta,
) -> list[str]:
    """Record that rows could not be embedded: tried again later, and failed after the last attempt.

    The next attempt comes after ``backoff`` times two to the power of the attempts so far. Attempts
    count by the row, not by its text, which a trigger may change at every write; ``texts`` are the
    halves of the digests that name them. Returns labels of the rows that are failed for good.
    """
    if not reasons:
        return []
    labels = sorted(reasons)
    failures = unnested(
        "given",
        key=array(labels),
        error=array([reasons[label][:ERROR_LENGTH].replace("\0", "\ufffd") for label in labels]),
        of_text=array([texts.get(label) for label in labels]),
    )
    before = _failure.alias("before")
    # A record of a text that failed for good is that of an older text, so it counts from one again.
    so_far = sa.case((before.c.failed, 0), else_=sa.func.coalesce(before.c.attempts, 0))
    attempts = so_far + 1
    failed = attempts >= max_attempts
    wait = sa.func.least(backoff * sa.func.power(2, sa.func.least(attempts - 1, 30)), LONGEST_WAIT)
    rows = sa.select(
        sa.literal(binding.id), failures.c.key, attempts, sa.func.now() + wait, failures.c.error,
        failed, sa.false(), failures.c.of_text, sa.func.now(),
    ).select_from(
        failures.outerjoin(
            before, sa.and_(before.c.binding_id == binding.id, before.c.key == failures.c.key)
        )
    )  # fmt: skip
    names = (
        "binding_id", "key", "attempts", "next_attempt_at", "error", "failed", "skipped",
        "of_text", "at",
    )  # fmt: skip
    insert = pg.insert(_failure).from_select(names, rows)
    written = insert.on_conflict_do_update(
        index_elements=["binding_id", "key"],
        set_={name: insert.excluded[name] for name in names[2:]},
    ).returning(_failure.c.key, _failure.c.failed)
    return [key for key, final in connection.execute(written) if final]


def put_off(
    connection: Connection, binding: Binding, labels: Sequence[str], wait: timedelta
) -> None:
    """Leave rows alone for a while, through no fault of theirs; the caller commits."""
    if not labels:
        return
    keys = sa.func.unnest(array(sorted(labels)))
    until = sa.func.now() + wait
    insert = pg.insert(_failure).from_select(
        ["binding_id", "key", "attempts", "next_attempt_at"],
        sa.select(sa.literal(binding.id), keys, sa.literal(0), until),
    )
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=["binding_id", "key"], set_={"next_attempt_at": until}
        )
    )


def forget(connection: Connection, binding: Binding, labels: Sequence[str]) -> None:
    """Remove the records of rows; the caller commits."""
    if labels:
        connection.execute(
            sa.delete(_failure).where(
                _failure.c.binding_id == binding.id, _failure.c.key == sa.any_(array(labels))
            )
        )


def skip(connection: Connection, rows: Rows, labels: Sequence[str]) -> int:
    """Leave rows without a vector until their text changes; the caller commits.

    Returns:
        The number of rows that are pending or failed, and are skipped now.
    """
    binding = rows.binding
    # One by one: an operator may call a row other than it is called here, as 07 for 7.
    named = [_readable(connection, rows.find, label) for label in labels]
    read = rows.read(connection, [one for one in named if one is not None], to_skip=True)
    record = [
        {
            "binding_id": binding.id, "key": row.label, "attempts": 1, "failed": True,
            "skipped": True, "of_text": row.of, "error": SKIPPED,
        }
        for row in read
    ]  # fmt: skip
    if not record:
        return 0
    insert = pg.insert(_failure)
    words = sa.func.concat_ws(": ", SKIPPED, _failure.c.error)
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=["binding_id", "key"],
            set_={"failed": True, "skipped": True, "of_text": insert.excluded.of_text,
                  "error": words},
        ),
        record,
    )  # fmt: skip
    if not rows.required:
        rows.write(connection, read, dict.fromkeys((row.label for row in read), None))
    return len(read)


def end_waits(connection: Connection, bindings: Sequence[Binding]) -> tuple[bool, bool]:
    """Remove records of rows that were only put off, if it is time; the caller commits.

    Returns whether there were any, now in the queue, and whether there are rows to claim alone.
    """
    f = _failure.c
    mine = f.binding_id.in_([binding.id for binding in bindings])
    due = sa.and_(mine, ~f.failed, f.next_attempt_at <= sa.func.now())
    ended = connection.execute(sa.delete(_failure).where(due, f.attempts == 0)).rowcount > 0
    alone = connection.execute(sa.select(sa.true()).where(due).limit(1)).first() is not None
    return ended, alone


def _due(connection: Connection, binding: Binding, most: int, *, together: bool) -> list[str]:
    f = _failure.c
    due = sa.and_(
        f.binding_id == binding.id, ~f.failed, f.attempts > 0, f.next_attempt_at <= sa.func.now()
    )
    if together:
        due = sa.and_(due, f.attempts == 1, f.error == ENDED)
    keys = sa.select(f.key).where(due).order_by(f.next_attempt_at, f.key).limit(most)
    return list(connection.execute(keys).scalars())


def in_hand(connection: Connection, binding: Binding) -> int:
    """Rows of a column that are leased, by this worker or others."""
    length = sa.func.coalesce(sa.func.sum(sa.func.cardinality(_claim.c["keys"])), 0)
    leased = connection.execute(sa.select(length).where(_claim.c.binding_id == binding.id))
    return int(leased.scalar_one())


def retrying(connection: Connection, binding: Binding) -> int:
    """Rows of a column that are put off, to be tried again."""
    f = _failure.c
    count = connection.execute(
        sa.select(sa.func.count()).where(f.binding_id == binding.id, ~f.failed)
    )
    return int(count.scalar_one())
