"""Encode in the flush, and in bulk statements: one batch, written together with its rows.

The module is long, since both decide alike which rows ask for a vector.
"""

from __future__ import annotations

import hashlib
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import (
    InstanceState,
    Mapper,
    ORMExecuteState,
    Session,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.orm.attributes import set_attribute
from sqlalchemy.orm.base import PassiveFlag

from sbert_pg.catalog.embedding import digest_for
from sbert_pg.catalog.record import Binding
from sbert_pg.errors import DeclarationError
from sbert_pg.orm.declaring import EmbeddingAttribute, Key, attributes_of
from sbert_pg.orm.passages import cut_before_flush
from sbert_pg.row_vectors import TextJob, encode_jobs, row_job
from sbert_pg.source import HALF, NIL, NOT_KNOWN, Text
from sbert_pg.spec import Vectors
from sbert_pg.types.wire import as_value

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

#: Says of a session or session class which of its listeners are at work.
_EMBEDS = "_sbert_pg_embeds_on_flush"
_CUTS = "_sbert_pg_cuts_on_flush"
#: Says of a session class that an asynchronous factory has it to itself.
_OWN = "_sbert_pg_own"
#: Where an object's state remembers which of its vectors the flush made, and from which text.
_MADE = "sbert_pg.made"


def embed_on_flush(target: SessionTarget, *, passages: bool = False) -> None:
    """Encode in the flush: new objects, and objects whose source changed, in one batch.

    Also covers bulk statements with parameters, as in ``session.execute(insert(Article), [...])``
    and ``session.execute(update(Article), [...])``. Without this call rows are written at once and
    become pending, for a worker to follow. So do rows whose text this process cannot know: values
    that are SQL expressions, defaults that the server computes, ``insert().values()`` and
    ``insert().from_select()``. And so does a row that gets another text on its way than the one
    that was encoded, by a listener or trigger of the application's or by another writer: what is
    written beside the vector says which text it was made from.

    Documents that are cut into passages are left to workers, unless ``passages`` says that their
    flush is to wait for it.

    Args:
        target: a session, session class, ``sessionmaker`` or ``scoped_session``, or the
            asynchronous form of one. Calling it again changes nothing, unless its listeners have
            been removed.
        passages: whether new and changed documents are cut and embedded in the flush too.

    Raises:
        DeclarationError: for anything else.
    """
    listened = _listened(target)
    # Of a class, what its sessions have; its own __new__ may ask for arguments. Not
    # event.contains(), which goes by id(): a class that is gone may have had the same.
    session = listened if isinstance(listened, Session) else object.__new__(listened)
    if _before_flush not in session.dispatch.before_flush:
        event.listen(listened, "before_flush", _before_flush)
    if _before_statement not in session.dispatch.do_orm_execute:
        event.listen(listened, "do_orm_execute", _before_statement)
    setattr(listened, _EMBEDS, True)
    if passages:
        setattr(listened, _CUTS, True)


def leave_to_workers(target: SessionTarget) -> None:
    """The opposite of ``embed_on_flush``: rows are written at once, and become pending.

    Args:
        target: as ``embed_on_flush`` takes it; also one session of a factory that encodes, such as
            that of an import.

    Raises:
        DeclarationError: for anything else.
    """
    listened = _listened(target)
    setattr(listened, _EMBEDS, False)
    setattr(listened, _CUTS, False)


def _listened(target: Any) -> Any:
    """The session or session class that the listeners are put on."""
    if isinstance(target, scoped_session):
        return _listened(target.session_factory)
    if isinstance(target, sessionmaker):
        return target.class_  # which the factory has to itself
    if isinstance(target, Session) or (isinstance(target, type) and issubclass(target, Session)):
        return target
    # Importing this needs greenlet. Where it is not imported, the target is not of its kind.
    asynchronous = sys.modules.get("sqlalchemy.ext.asyncio")
    listened = None if asynchronous is None else _listened_async(target, asynchronous)
    if listened is None:
        raise DeclarationError(
            f"embed_on_flush was given {target!r}; it takes a session, a session class or a "
            "session factory."
        )
    return listened


def _listened_async(target: Any, asynchronous: Any) -> Any:
    """As ``_listened``, for the asynchronous forms; ``None`` for anything else."""
    if isinstance(target, asynchronous.async_scoped_session):
        return _listened(target.session_factory)
    if isinstance(target, asynchronous.AsyncSession):
        return target.sync_session
    if not isinstance(target, asynchronous.async_sessionmaker):
        return None
    base: Any = target.kw.get("sync_session_class") or target.class_.sync_session_class
    if not isinstance(base, type) or _OWN in vars(base):
        return _listened(base)
    # A separate class, so that other factories' sessions stay as they are.
    own = type("EmbeddingSession", (base,), {_OWN: True})
    target.configure(sync_session_class=own)
    return own


@dataclass(slots=True)
class _Write:
    """One embedding column of an object that is about to be written.

    Attributes:
        look: whether the row has to be read, since the object does not hold the whole source, or
            did not hold what it was before.
        companion: what the object, or else the row, says of a vector that it had before.
    """

    state: InstanceState[Any]
    attribute: EmbeddingAttribute
    vector: Any
    text: Text = NOT_KNOWN
    look: bool = False
    unchanged: bool = False
    companion: Any = None


def _before_flush(session: Session, context: Any, instances: Any) -> None:
    if getattr(session, _EMBEDS, False):
        _embed(session)
    if getattr(session, _CUTS, False):
        cut_before_flush(session)


def _embed(session: Session) -> None:
    writes = [*_new(session.new), *_changed(session.dirty)]
    if not writes:
        return
    _read_rows(session, [write for write in writes if write.look])
    digests = _Digests(session)
    jobs = [_resolve(write, digests) for write in writes if not write.unchanged]
    encode_jobs([job for job in jobs if job is not None])


def _resolve(write: _Write, digests: _Digests) -> TextJob | None:
    """Write what is known of a vector and its digest; a job where the vector is to be made."""
    current = write.state.dict.get(write.attribute.key)
    if write.vector is not None and not digests.has_outlived_its_text(write):
        digests.set(write, write.vector)
    elif isinstance(write.text, str):
        if current is None or not _was_made(write, current, write.text):
            digests.binding(write)  # which refuses another encoder's column before the work
            return _job(write, digests)
        digests.set(write, current)
    elif write.text is None:
        if write.state.key is not None or current is not None:
            set_attribute(write.state.obj(), write.attribute.key, None)
        digests.set(write, None)
    return None


class _Digests:
    """What a flush writes beside the vectors: from which text each was made."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._bindings: dict[tuple[Any, EmbeddingAttribute], Any] = {}

    def binding(self, write: _Write) -> Any:
        """The column's binding, asked for once in a flush."""
        key = (write.state.mapper, write.attribute)
        if key not in self._bindings:
            self._bindings[key] = write.attribute.binding(self._session, key[0])
        return self._bindings[key]

    def has_outlived_its_text(self, write: _Write) -> bool:
        """Whether the vector came along with the object, and the text that it was made of did not.

        So it is where an object that holds its vector gets another text outside of a session and is
        merged, or is added as a copy.
        """
        binding, companion = self.binding(write), write.companion
        if binding is None or not isinstance(companion, uuid.UUID) or write.text is NOT_KNOWN:
            return False
        now = digest_for(binding, write.text, write.vector)
        return now is not None and now != companion and now.hex[:HALF] == companion.hex[:HALF]

    def set(self, write: _Write, vector: Any) -> None:
        """Put the digest into the object, unless the column is not bound."""
        binding, key = self.binding(write), write.attribute.companion_key
        if binding is None:
            return
        digest = digest_for(binding, write.text, vector)
        if write.text is NOT_KNOWN and digest is not None:
            # A vector that came together with its companion, as when an object is merged.
            brought = write.state.dict.get(key)
            if isinstance(brought, uuid.UUID) and brought.hex[:HALF] == digest.hex[:HALF]:
                return
        set_attribute(write.state.obj(), key, digest)


def _new(objects: Iterable[object]) -> Iterator[_Write]:
    for state, attribute in _embedded(objects):
        vector = state.dict.get(attribute.key)
        write = _Write(state, attribute, vector if _is_assigned(state, attribute, vector) else None)
        write.text = attribute.column.text_of_new(_held(attribute, state.dict))
        write.companion = state.dict.get(attribute.companion_key)
        yield write


def _held(attribute: EmbeddingAttribute, values: Mapping[str, Any]) -> list[Any]:
    """The values of the source that an object or row holds, in order."""
    return [values.get(key, NOT_KNOWN) for key in attribute.source_keys]


def _changed(objects: Iterable[object]) -> Iterator[_Write]:
    """What has been assigned that asks for another vector, or brings one."""
    for state, attribute in _embedded(objects):
        histories = [_history(state, key) for key in attribute.source_keys]
        changes = [history for history in histories if history.added]
        assigned = _history(state, attribute.key).added
        if changes or assigned:
            yield _change(state, attribute, changes, assigned)


def _change(
    state: InstanceState[Any], attribute: EmbeddingAttribute, changes: list[Any], assigned: Any
) -> _Write:
    vector = assigned[0] if assigned else None
    write = _Write(state, attribute, vector if _is_assigned(state, attribute, vector) else None)
    # A vector that is assigned alone was made from which text? Its row is pending.
    if changes or write.vector is None:
        values = _held(attribute, state.dict)
        write.text = attribute.column.text_of(values)
        # What was assigned without having been loaded is perhaps what it was.
        perhaps_same = not assigned and not all(history.deleted for history in changes)
        write.companion = state.dict.get(attribute.companion_key)
        perhaps_had = write.vector is not None and write.companion is None
        unknown = (value is NOT_KNOWN for value in values)
        write.look = any((perhaps_same, perhaps_had, *unknown))
    return write


def _embedded(objects: Iterable[object]) -> Iterator[tuple[InstanceState[Any], EmbeddingAttribute]]:
    """Each object with each of its embedding columns; one look for each class without any."""
    by_class: dict[type, tuple[EmbeddingAttribute, ...]] = {}
    for instance in objects:
        class_ = type(instance)
        attributes = by_class.get(class_)
        if attributes is None:
            attributes = by_class[class_] = attributes_of(sa.inspect(instance).mapper)
        for attribute in attributes:
            yield sa.inspect(instance), attribute


def _history(state: InstanceState[Any], key: str) -> Any:
    """What has been assigned since the attribute was loaded; nothing is loaded to find out."""
    return state.get_history(key, PassiveFlag.PASSIVE_NO_INITIALIZE)


def _is_assigned(state: InstanceState[Any], attribute: EmbeddingAttribute, vector: Any) -> bool:
    """Whether the caller assigned a vector, and not an earlier flush.

    ``None``, as a dataclass's ``__init__`` assigns it, is not a vector. A flush that failed leaves
    its vectors in objects that the rollback made new again.
    """
    if vector is None:
        return False
    earlier = state.info.get((_MADE, attribute.key))
    return earlier is None or earlier[0]() is not vector


def _was_made(write: _Write, vector: Any, text: str) -> bool:
    """Whether an earlier flush made a vector of an object, and of this text."""
    earlier = write.state.info.get((_MADE, write.attribute.key))
    return earlier is not None and earlier[0]() is vector and earlier[1] == _named(text)


def _named(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _job(write: _Write, digests: _Digests) -> TextJob:
    state, attribute, text = write.state, write.attribute, str(write.text)

    def store(vector: Vectors) -> None:
        vector = as_value(vector)
        set_attribute(state.obj(), attribute.key, vector)
        state.info[_MADE, attribute.key] = (ref(vector), _named(text))
        digests.set(write, vector)

    return TextJob(attribute.column, text, store, lambda: f"{attribute.key} of {_label(state)}")


def _label(state: InstanceState[Any]) -> str:
    if state.identity is not None:
        return f"{state.class_.__name__}({', '.join(map(repr, state.identity))})"
    # A new object has no key to be named by, so it is shown by what it holds.
    short = [
        f"{key}={value!r}" if len(repr(value)) <= 40 else f"{key}={repr(value)[:37]}..."
        for key, value in state.dict.items()
        if isinstance(value, (str, int)) and not key.startswith("_")
    ]
    return f"a new {state.class_.__name__} ({', '.join(short[:3])})"


def _read_rows(session: Session, writes: list[_Write]) -> None:
    """Complete texts by what objects do not hold, as the rows have it."""
    groups: dict[tuple[Any, EmbeddingAttribute], list[tuple[Key, _Write]]] = {}
    for write in writes:
        group = groups.setdefault((write.state.mapper, write.attribute), [])
        group.append((_row_key(write), write))
    for (mapper, attribute), members in groups.items():
        rows = attribute.stored_sources(session, mapper, [key for key, _ in members])
        for key, write in members:
            row = rows.get(key, {})
            write.text = attribute.column.text_of(_held(attribute, {**row, **write.state.dict}))
            write.companion = write.companion or row.get(attribute.companion_key)
            same = bool(row) and write.text == attribute.column.text_of(_held(attribute, row))
            write.unchanged = same and not _history(write.state, attribute.key).added


def _row_key(write: _Write) -> Key:
    """The key that the row has, where the flush may be about to change it."""
    mapper, identity = write.state.mapper, write.state.identity or ()
    names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    known = dict(zip(names, identity, strict=False))
    instance = write.state.obj()
    return tuple(
        known[key] if key in known else getattr(instance, key) for key in write.attribute.row_keys
    )


# ---------------------------------------------------------------- bulk statements

Row = dict[str, Any]
#: Strategies that take column names and leave attributes alone; so does this module.
_OTHER_STRATEGIES = frozenset({"raw", "core_only"})


def _before_statement(state: ORMExecuteState) -> Any:
    """Encode for a bulk statement before it runs.

    Parts of a text that the statement itself sets, by ``values()`` or ``ON CONFLICT``, are not
    looked at. Such a row has another text than was encoded, and is pending.
    """
    mapper = _mapper_of(state) if getattr(state.session, _EMBEDS, False) else None
    attributes = () if mapper is None else attributes_of(mapper)
    if mapper is None or not attributes:
        return None
    parameters: Any = state.parameters
    rows = [dict(row) for row in ([parameters] if isinstance(parameters, Mapping) else parameters)]
    for attribute in attributes:
        texts = (_inserted if state.is_insert else _updated)(state.session, mapper, attribute, rows)
        _fill(state, mapper, attribute, rows, texts)
    return state.invoke_statement(params=rows[0] if isinstance(parameters, Mapping) else rows)


def _mapper_of(state: ORMExecuteState) -> Mapper[Any] | None:
    """The class of a bulk statement that names its values by attributes."""
    if not (state.is_insert or state.is_update) or not state.parameters:
        return None
    # Parameters of the other strategies are named by columns and not by attributes.
    named = state.execution_options.get("dml_strategy") not in _OTHER_STRATEGIES
    return state.bind_mapper if state.is_orm_statement and named else None


def _inserted(
    session: Session, mapper: Mapper[Any], attribute: EmbeddingAttribute, rows: list[Row]
) -> list[Text]:
    """The text of each row."""
    return [attribute.column.text_of_new(_held(attribute, row)) for row in rows]


def _updated(
    session: Session, mapper: Mapper[Any], attribute: EmbeddingAttribute, rows: list[Row]
) -> list[Text]:
    """The text of each row that brings a part of it; what it does not bring is read."""
    keys = attribute.source_keys
    partial = {
        number: tuple(row.get(key) for key in attribute.row_keys)
        for number, row in enumerate(rows)
        if _touches(attribute, row) and not row.keys() >= set(keys)
    }
    readable = [key for key in partial.values() if None not in key]
    stored = attribute.stored_sources(session, mapper, readable) if readable else {}
    whole = (stored.get(partial.get(number, ()), {}) | row for number, row in enumerate(rows))
    return [attribute.column.text_of(_held(attribute, values)) for values in whole]


def _touches(attribute: EmbeddingAttribute, row: Row) -> bool:
    """Whether a row of an update asks for a vector: a source is new, or the vector is removed."""
    if row.get(attribute.key) is not None:
        return any(key in row for key in attribute.source_keys)
    # ``None`` is not a vector, as in the flush.
    return any(key in row for key in (*attribute.source_keys, attribute.key))


def _fill(
    state: ORMExecuteState,
    mapper: Mapper[Any],
    attribute: EmbeddingAttribute,
    rows: list[Row],
    texts: list[Text],
) -> None:
    """Put vectors into the rows that bring none, and beside each from which text it was made."""
    key, of = attribute.key, mapper.class_.__name__
    numbered = zip(range(len(rows)), rows, texts, strict=True)
    lacking = [one for one in numbered if one[1].get(key) is None and one[2] is not NOT_KNOWN]
    for _, row, _ in lacking:
        row[key] = None
    if all(key not in row for row in rows):
        return
    binding = attribute.binding(state.session, mapper)  # which refuses another encoder's
    jobs = [
        row_job(attribute.column, text, row, key, f"row {number} of {of}")
        for number, row, text in lacking
        if isinstance(text, str)
    ]
    encode_jobs(jobs)
    for row, text in zip(rows, texts, strict=True):
        _add_digest(state, attribute, binding, row, text)


def _add_digest(
    state: ORMExecuteState,
    attribute: EmbeddingAttribute,
    binding: Binding | None,
    row: Row,
    text: Text,
) -> None:
    vector = row.get(attribute.key)
    if binding is None:
        return
    if vector is not None or (text is None and attribute.key in row):
        row[attribute.companion_key] = digest_for(binding, text, vector)
    elif state.is_insert:
        row[attribute.companion_key] = NIL
