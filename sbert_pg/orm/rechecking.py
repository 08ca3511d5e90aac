"""Texts that were changed while they were being flushed.

The flush encodes what objects hold when it begins. Listeners of the application's (``before_flush``
registered later, ``before_insert``, ``before_update``) and ``onupdate`` values come after that. A
vector would then be written together with another text than it was made from, and no trigger could
tell. So what the objects hold is compared once more when the flush is done, and where it differs
the row is read, encoded and written again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, Mapper, Session
from sqlalchemy.orm.attributes import set_committed_value

from sbert_pg.filling import NOT_KNOWN, TextJob, Vectors, default_of, encode_jobs
from sbert_pg.orm.attributes import EmbeddingAttribute
from sbert_pg.orm.rereading import Key, locked_sources


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an object held when its text was made."""

    state: InstanceState[Any]
    attribute: EmbeddingAttribute
    values: tuple[Any, ...]


#: By the flush that is under way.
_seen: WeakKeyDictionary[Any, list[_Seen]] = WeakKeyDictionary()


def remember(context: Any, made: Iterable[tuple[InstanceState[Any], EmbeddingAttribute]]) -> None:
    """Keep what objects hold now, for ``recheck`` at the end of the same flush."""
    seen = [_Seen(state, attribute, _values(state, attribute)) for state, attribute in made]
    if seen:
        _seen[context] = seen


def recheck(session: Session, context: Any) -> None:
    """Encode again what was changed meanwhile; a listener for ``after_flush``."""
    groups: dict[tuple[Mapper[Any], EmbeddingAttribute], dict[Key, InstanceState[Any]]] = {}
    for seen in _seen.pop(context, ()):
        if _values(seen.state, seen.attribute) != seen.values:
            instance = seen.state.obj()
            key = tuple(getattr(instance, name) for name in seen.attribute.row_keys)
            groups.setdefault((seen.state.mapper, seen.attribute), {})[key] = seen.state
    for (mapper, attribute), states in groups.items():
        _write_again(session, mapper, attribute, states)


def _values(state: InstanceState[Any], attribute: EmbeddingAttribute) -> tuple[Any, ...]:
    values = []
    for key, column in zip(attribute.source_keys, attribute.filling.source_columns, strict=True):
        value = state.dict.get(key, NOT_KNOWN)
        if value is NOT_KNOWN and state.key is None:
            value = default_of(column)
        # An SQL expression has no truth value when compared; its text is not known anyway.
        values.append(NOT_KNOWN if isinstance(value, sa.ClauseElement) else value)
    return tuple(values)


def _write_again(
    session: Session,
    mapper: Mapper[Any],
    attribute: EmbeddingAttribute,
    states: dict[Key, InstanceState[Any]],
) -> None:
    found = locked_sources(session, mapper, attribute, list(states))
    vectors: dict[Key, Vectors | None] = {}
    jobs = []
    for key, values in found.items():
        text = attribute.filling.text_of(list(values.values()))
        vectors[key] = None
        if isinstance(text, str):
            jobs.append(_job(attribute, text, key, vectors))
    encode_jobs(jobs)
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
    if rows:
        session.connection(bind_arguments={"mapper": mapper}).execute(statement, rows)
    for key, vector in vectors.items():
        set_committed_value(states[key].obj(), attribute.key, vector)


def _job(
    attribute: EmbeddingAttribute, text: str, key: Key, vectors: dict[Key, Vectors | None]
) -> TextJob:
    def label() -> str:
        return f"{attribute.key} of the row {key} of {attribute.table.fullname}"

    return TextJob(attribute.filling, text, lambda vector: vectors.__setitem__(key, vector), label)


__all__ = ["recheck", "remember"]
