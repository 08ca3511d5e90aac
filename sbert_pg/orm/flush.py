"""Encode in the flush, and in bulk statements: one batch, written together with its rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import InstanceState, Session, scoped_session, sessionmaker
from sqlalchemy.orm.base import PassiveFlag

from sbert_pg.errors import DeclarationError
from sbert_pg.filling import NOT_KNOWN, Text, TextJob, encode_jobs
from sbert_pg.orm.attributes import EmbeddingAttribute, attributes_of
from sbert_pg.orm.rechecking import note_made, recheck, remember, was_made
from sbert_pg.orm.rereading import Key, locked_sources
from sbert_pg.orm.statements import embed_statement

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

    SessionTarget = (
        Session
        | type[Session]
        | sessionmaker[Any]
        | scoped_session[Any]
        | AsyncSession
        | async_sessionmaker[Any]
        | async_scoped_session[Any]
    )

#: Says of a session or session class that it has the listeners.
_MARK = "_sbert_pg_embeds_on_flush"


def embed_on_flush(target: SessionTarget) -> None:
    """Encode in the flush: new objects, and objects whose source changed, in one batch.

    Also covers bulk statements with parameters, as in ``session.execute(insert(Article), [...])``
    and ``session.execute(update(Article), [...])``. Without this call rows are written at once and
    become pending, for a worker to follow. So do rows whose text this process cannot know: values
    that are SQL expressions, defaults that the server computes, ``insert().values()`` and
    ``insert().from_select()``.

    Args:
        target: a session, session class, ``sessionmaker`` or ``scoped_session``, or the
            asynchronous form of one. Calling it again changes nothing.

    Raises:
        DeclarationError: for anything else.
    """
    listened = _listened(target)
    # Not event.contains(): it goes by id(), which another factory may have had before.
    if not getattr(listened, _MARK, False):
        setattr(listened, _MARK, True)
        event.listen(listened, "before_flush", _before_flush)
        event.listen(listened, "after_flush", recheck)
        event.listen(listened, "do_orm_execute", embed_statement)


def _listened(target: Any) -> Any:
    """The session or session class that the listeners are put on."""
    if isinstance(target, scoped_session):
        return _listened(target.session_factory)
    # Importing this needs greenlet. Where nobody has, the target is nothing of it.
    asynchronous: Any = sys.modules.get("sqlalchemy.ext.asyncio")
    if asynchronous is not None and isinstance(target, asynchronous.async_scoped_session):
        return _listened(target.session_factory)
    if asynchronous is not None and isinstance(target, asynchronous.async_sessionmaker):
        base: Any = target.kw.get("sync_session_class") or target.class_.sync_session_class
        if not isinstance(base, type) or getattr(base, _MARK, False):
            return _listened(base)
        # A class of its own, so that other factories' sessions stay as they are.
        own = type("EmbeddingSession", (base,), {})
        target.configure(sync_session_class=own)
        return own
    if asynchronous is not None and isinstance(target, asynchronous.AsyncSession):
        return target.sync_session
    if isinstance(target, sessionmaker):
        return target.class_  # which the factory has to itself
    if isinstance(target, Session) or (isinstance(target, type) and issubclass(target, Session)):
        return target
    raise DeclarationError(
        f"embed_on_flush was given {target!r}; it takes a session, a session class or a session "
        "factory."
    )


@dataclass(frozen=True, slots=True)
class _Partial:
    """An object whose row has to be read before its text is known.

    Attributes:
        state: the object.
        attribute: the embedding column.
        changed: names of the source's attributes that have been assigned.
        same: whether the vector stays if the text turns out to be what it was.
    """

    state: InstanceState[Any]
    attribute: EmbeddingAttribute
    changed: frozenset[str]
    same: bool


def _before_flush(session: Session, context: Any, instances: Any) -> None:
    texts: list[tuple[InstanceState[Any], EmbeddingAttribute, Text]] = []
    partials: list[_Partial] = []
    for state, attribute in _embedded(session.new):
        if not _is_given(state, attribute, state.dict.get(attribute.key)):
            texts.append((state, attribute, _text_of_new(state, attribute)))
    for state, attribute in _embedded(session.dirty):
        partial = _change(state, attribute)
        if partial is None:
            continue
        if len(partial.changed) < len(attribute.source_keys) or partial.same:
            partials.append(partial)
        else:
            texts.append((state, attribute, _text_of(state, attribute, {})))
    texts.extend(_reread(session, partials))
    jobs: list[TextJob] = []
    for state, attribute, text in texts:
        _add(jobs, state, attribute, text)
    encode_jobs(jobs)
    remember(context, (entry for entry in texts if entry[2] is not NOT_KNOWN))


def _change(state: InstanceState[Any], attribute: EmbeddingAttribute) -> _Partial | None:
    """What has been assigned that asks for another vector, or ``None``."""
    changed = set()
    unknown = False
    for key in attribute.source_keys:
        history = _history(state, key)
        if history.added:
            changed.add(key)
            # Assigned without having been loaded, so perhaps to what it was.
            unknown = unknown or not history.deleted
    vector = _history(state, attribute.key).added
    removed = bool(vector) and vector[0] is None
    if not (changed or removed) or (vector and _is_given(state, attribute, vector[0])):
        return None
    return _Partial(state, attribute, frozenset(changed), unknown and not removed)


def _embedded(
    objects: Iterable[object],
) -> Iterable[tuple[InstanceState[Any], EmbeddingAttribute]]:
    for instance in objects:
        state: InstanceState[Any] = sa.inspect(instance)
        for attribute in attributes_of(state.mapper):
            yield state, attribute


def _history(state: InstanceState[Any], key: str) -> Any:
    """What has been assigned since the attribute was loaded; nothing is loaded to find out."""
    return state.get_history(key, PassiveFlag.PASSIVE_NO_INITIALIZE)


def _is_given(state: InstanceState[Any], attribute: EmbeddingAttribute, vector: Any) -> bool:
    """Whether the caller assigned a vector, and not an earlier flush.

    ``None`` is no vector, as a dataclass's ``__init__`` assigns it. A flush that failed leaves its
    vectors in objects that the rollback made new again.
    """
    return vector is not None and not was_made(state, attribute, vector)


def _text_of_new(state: InstanceState[Any], attribute: EmbeddingAttribute) -> Text:
    return attribute.filling.text_of_new(
        [state.dict.get(key, NOT_KNOWN) for key in attribute.source_keys]
    )


def _text_of(
    state: InstanceState[Any], attribute: EmbeddingAttribute, reread: dict[str, Any]
) -> Text:
    instance = state.obj()
    return attribute.filling.text_of(
        [reread[key] if key in reread else getattr(instance, key) for key in attribute.source_keys]
    )


def _add(
    jobs: list[TextJob], state: InstanceState[Any], attribute: EmbeddingAttribute, text: Text
) -> None:
    """Have a text encoded; a text that is ``NULL`` takes its vector along at once."""
    if isinstance(text, str):
        current = state.dict.get(attribute.key)
        if current is not None and was_made(state, attribute, current, text):
            return
        jobs.append(_job(state, attribute, text))
    elif text is None and (state.key is not None or state.dict.get(attribute.key) is not None):
        setattr(state.obj(), attribute.key, None)


def _job(state: InstanceState[Any], attribute: EmbeddingAttribute, text: str) -> TextJob:
    instance = state.obj()

    def store(vector: npt.NDArray[np.float32]) -> None:
        setattr(instance, attribute.key, vector)
        note_made(state, attribute, vector, text)

    return TextJob(attribute.filling, text, store, lambda: f"{attribute.key} of {_label(state)}")


def _label(state: InstanceState[Any]) -> str:
    if state.identity is not None:
        return f"{state.class_.__name__}({', '.join(map(repr, state.identity))})"
    return f"a new {state.class_.__name__} ({_shown(state)})"


def _shown(state: InstanceState[Any]) -> str:
    """A new object has no key to be named by, so it is shown by what it holds."""
    short = [
        f"{key}={value!r}" if len(repr(value)) <= 40 else f"{key}={repr(value)[:37]}..."
        for key, value in state.dict.items()
        if isinstance(value, (str, int)) and not key.startswith("_")
    ]
    return ", ".join(short[:3])


def _reread(
    session: Session, partials: list[_Partial]
) -> Iterable[tuple[InstanceState[Any], EmbeddingAttribute, Text]]:
    """The text of each object, with what it does not bring as the row has it now."""
    groups: dict[EmbeddingAttribute, list[tuple[_Partial, Key]]] = {}
    for partial in partials:
        key = tuple(_loaded(partial.state, name) for name in partial.attribute.row_keys)
        groups.setdefault(partial.attribute, []).append((partial, key))
    for attribute, members in groups.items():
        mapper = members[0][0].state.mapper
        found = locked_sources(session, mapper, attribute, [key for _, key in members])
        for partial, key in members:
            row = found.get(key, {})
            rest = {k: v for k, v in row.items() if k not in partial.changed}
            text = _text_of(partial.state, attribute, rest)
            if partial.same and row and text == attribute.filling.text_of(list(row.values())):
                continue
            yield partial.state, attribute, text


def _loaded(state: InstanceState[Any], key: str) -> Any:
    """The value that the row has, where a flush is about to change it."""
    if key in state.committed_state:
        return state.committed_state[key]
    getter: Callable[[Any, str], Any] = getattr
    return getter(state.obj(), key)


__all__ = ["SessionTarget", "embed_on_flush"]
