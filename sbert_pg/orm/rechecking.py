"""Texts that were changed while they were being written.

The flush encodes what objects hold when it begins. Listeners of the application's (``before_flush``
registered later, ``before_insert``, ``before_update``) and ``onupdate`` values come after that, and
``BEFORE`` row triggers of the application's after those. A vector would then be written together
with another text than it was made from, and no trigger of the library's could tell. So what the
objects hold is compared once more when the flush is done, and where the table has such triggers
what the rows hold as well. Where it differs the row is encoded and written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, Mapper, Session
from sqlalchemy.orm.attributes import set_committed_value

from sbert_pg.errors import SourceError
from sbert_pg.filling import NOT_KNOWN, Text, TextJob, Vectors, default_of, encode_jobs
from sbert_pg.orm.attributes import EmbeddingAttribute
from sbert_pg.orm.rereading import Key, locked_sources
from sbert_pg.types import guard

#: Where an object's state remembers which of its vectors the flush made, and from which text.
_MADE = "sbert_pg.made"
#: How often a row is written again before its text is taken for one that never comes to rest.
_TRIES = 3


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an object held when its text was made."""

    state: InstanceState[Any]
    attribute: EmbeddingAttribute
    text: Text
    values: tuple[Any, ...]
    #: ``guard.INSERTING`` for a new row, else ``guard.UPDATING``.
    event: int


#: By the flush that is under way.
_seen: WeakKeyDictionary[Any, list[_Seen]] = WeakKeyDictionary()


def remember(
    context: Any, made: Iterable[tuple[InstanceState[Any], EmbeddingAttribute, Text]]
) -> None:
    """Keep what objects hold now, for ``recheck`` at the end of the same flush."""
    seen = [
        _Seen(
            state,
            attribute,
            text,
            _values(state, attribute),
            guard.INSERTING if state.key is None else guard.UPDATING,
        )
        for state, attribute, text in made
    ]
    if seen:
        _seen[context] = seen


def recheck(session: Session, context: Any) -> None:
    """Encode again what was changed meanwhile; a listener for ``after_flush``."""
    groups: dict[tuple[Mapper[Any], EmbeddingAttribute], list[_Seen]] = {}
    for seen in _seen.pop(context, ()):
        groups.setdefault((seen.state.mapper, seen.attribute), []).append(seen)
    for (mapper, attribute), members in groups.items():
        connection = session.connection(bind_arguments={"mapper": mapper})
        events = [
            event
            for event in (guard.INSERTING, guard.UPDATING)
            if guard.may_rewrite(connection, attribute.table, event)
        ]
        texts: dict[Key, Text] = {}
        states: dict[Key, InstanceState[Any]] = {}
        for seen in members:
            changed = _values(seen.state, attribute) != seen.values
            if changed or seen.event in events:
                instance = seen.state.obj()
                key = tuple(getattr(instance, name) for name in attribute.row_keys)
                texts[key] = NOT_KNOWN if changed else seen.text
                states[key] = seen.state
        again = write_again(session, mapper, attribute, texts) if texts else {}
        for key, (text, vector) in again.items():
            if key not in states:
                continue
            set_committed_value(states[key].obj(), attribute.key, vector)
            if text is not None and vector is not None:
                note_made(states[key], attribute, vector, text)


def note_made(
    state: InstanceState[Any], attribute: EmbeddingAttribute, vector: Vectors, text: str
) -> None:
    """Remember of an object that a vector of its was made here, and from which text."""
    made: ReferenceType[Any] = ref(vector)
    state.info[_MADE, attribute.key] = (made, _digest(text))


def was_made(
    state: InstanceState[Any], attribute: EmbeddingAttribute, vector: Any, text: str | None = None
) -> bool:
    """Whether a vector was made here, of this text if one is given, and not by the caller."""
    made = state.info.get((_MADE, attribute.key))
    if made is None or made[0]() is not vector:
        return False
    return text is None or bool(made[1] == _digest(text))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _values(state: InstanceState[Any], attribute: EmbeddingAttribute) -> tuple[Any, ...]:
    values = []
    for key, column in zip(attribute.source_keys, attribute.filling.source_columns, strict=True):
        value = state.dict.get(key, NOT_KNOWN)
        if value is NOT_KNOWN and state.key is None:
            value = default_of(column)
        # An SQL expression has no truth value when compared; its text is not known anyway.
        values.append(NOT_KNOWN if isinstance(value, sa.ClauseElement) else value)
    return tuple(values)


def write_again(
    session: Session,
    mapper: Mapper[Any],
    attribute: EmbeddingAttribute,
    texts: Mapping[Key, Text],
) -> dict[Key, tuple[str | None, Vectors | None]]:
    """Read rows that were just written, and write those again whose text is another one.

    Args:
        session: the session that wrote them, in the same transaction.
        mapper: decides the session's connection.
        attribute: the embedding column.
        texts: by key, the text that the vector was made from; ``NOT_KNOWN`` for none.

    Returns:
        Text and vector of the rows that were written again.

    Raises:
        SourceError: a trigger gives a row another text each time it is written, and the column
            takes no ``NULL``.
    """
    connection = session.connection(bind_arguments={"mapper": mapper})
    expected = dict(texts)
    written: dict[Key, tuple[str | None, Vectors | None]] = {}
    for attempt in range(_TRIES + 1):
        rows = locked_sources(session, mapper, attribute, list(expected))
        now = {key: attribute.filling.text_of(list(row.values())) for key, row in rows.items()}
        # A key may come back in another form (padded, or as another type) than it was sent.
        other = {k: text for k, text in now.items() if text != expected.get(k, NOT_KNOWN)}
        if not other:
            break
        vectors: dict[Key, Vectors | None] = dict.fromkeys(other)
        if attempt < _TRIES:
            jobs = [_job(attribute, t, k, vectors) for k, t in other.items() if isinstance(t, str)]
            encode_jobs(jobs)
        elif not attribute.filling.column.nullable:
            raise SourceError(
                f"A BEFORE trigger of {attribute.table.fullname} changes the source of "
                f"{attribute.key!r} at each write, last in the row {next(iter(other))}, so that no "
                "vector can be that of the text. Let the trigger leave a text alone that it has "
                "changed already, or let the column take NULL and a worker follow."
            )
        # Without a vector, at the last attempt, the rows are pending.
        _write(session, mapper, attribute, vectors)
        for key, text in other.items():
            written[key] = (text if isinstance(text, str) else None, vectors[key])
        if not guard.may_rewrite(connection, attribute.table, guard.UPDATING):
            break
        expected = dict(other)
    return written


def _write(
    session: Session,
    mapper: Mapper[Any],
    attribute: EmbeddingAttribute,
    vectors: Mapping[Key, Vectors | None],
) -> None:
    # Names apart from the columns', which an UPDATE keeps for itself.
    names = [f"key_{i}" for i in range(len(attribute.row_columns))]
    column, table = attribute.filling.column, attribute.table
    # Columns with an ``onupdate`` would change once more.
    new: dict[Any, Any] = {c: c for c in table.columns if c.onupdate is not None}
    new[column] = sa.bindparam("new_vector", type_=column.type)
    statement = (
        sa.update(table)
        .where(*(c == sa.bindparam(n) for c, n in zip(attribute.row_columns, names, strict=True)))
        .values(new)
    )
    rows = [
        {**dict(zip(names, key, strict=True)), "new_vector": vector}
        for key, vector in vectors.items()
    ]
    session.connection(bind_arguments={"mapper": mapper}).execute(statement, rows)


def _job(
    attribute: EmbeddingAttribute, text: str, key: Key, vectors: dict[Key, Vectors | None]
) -> TextJob:
    def label() -> str:
        return f"{attribute.key} of the row {key} of {attribute.table.fullname}"

    return TextJob(attribute.filling, text, lambda vector: vectors.__setitem__(key, vector), label)


__all__ = ["note_made", "recheck", "remember", "was_made", "write_again"]
