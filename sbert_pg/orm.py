"""Embedding columns on mapped classes, kept in step with their text by the flush."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import (
    InstanceState,
    MappedColumn,
    Mapper,
    ORMExecuteState,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from sbert_pg.distance import Similarity, Storage
from sbert_pg.errors import DeclarationError
from sbert_pg.filling import NOT_KNOWN, Filling, TextJob, encode_jobs, fillings_of
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import Embedding

SessionTarget = (
    Session
    | type[Session]
    | sessionmaker[Any]
    | scoped_session[Any]
    | AsyncSession
    | async_sessionmaker[Any]
)


def embedding_column(
    encoder: str | EncoderSpec,
    source: str | Sequence[str] | Source,
    *,
    separator: str = "\n\n",
    storage: Storage = "vector",
    dimensions: int | None = None,
    similarity: Similarity | None = None,
    replaces: str | None = None,
    name: str | None = None,
    nullable: bool | None = None,
    deferred: bool = True,
    init: bool | None = None,
    repr: bool | None = None,
    compare: bool | None = None,
    kw_only: bool | None = None,
) -> MappedColumn[Any]:
    """A mapped column that stores the embedding of other columns of its row.

    Nothing is loaded or checked before the column is used: the class can be mapped with no encoder
    on disk.

    Args:
        encoder: name or path as ``Encoder.load`` takes it, or an ``EncoderSpec``.
        source: name of the text column to embed, or several, or a ``Source``. Several are joined
            with ``separator``; values that are ``NULL`` or empty are left out.
        separator: what stands between two values, a blank line by default.
        storage: ``"vector"``, 4 bytes a dimension, or ``"halfvec"``, 2 bytes.
        dimensions: width, needed where the library does not know ``encoder`` by name.
        similarity: similarity function, where it is not the encoder's own.
        replaces: name of the embedding column of this table that this one is to replace.
        name: name of the column in the database; the attribute's name by default.
        nullable: as in ``mapped_column``. A column that the worker fills has to be nullable.
        deferred: whether the vector stays in the database until it is asked for, as is faster.
        init: as in ``mapped_column``, for classes mapped as dataclasses.
        repr: see ``init``.
        compare: see ``init``.
        kw_only: see ``init``.

    Raises:
        DeclarationError: the declaration contradicts itself or leaves the dimensions unknown.
    """
    given: dict[str, Any] = {
        "nullable": nullable,
        "init": init,
        "repr": repr,
        "compare": compare,
        "kw_only": kw_only,
    }
    options = {key: value for key, value in given.items() if value is not None}
    if init:
        options["default"] = None
    type_ = Embedding(
        encoder,
        source,
        separator=separator,
        storage=storage,
        dimensions=dimensions,
        similarity=similarity,
        replaces=replaces,
    )
    arguments: tuple[Any, ...] = (type_,) if name is None else (name, type_)
    return mapped_column(*arguments, deferred=deferred, **options)


def embed_on_flush(target: SessionTarget) -> None:
    """Encode in the flush: new objects, and objects whose source changed, in one batch.

    Also covers bulk statements with a list of dictionaries, as in
    ``session.execute(insert(Article), [...])`` and ``session.execute(update(Article), [...])``.
    Without this call rows are written at once and become pending, for a worker to follow. So do
    rows whose text this process cannot know: values that are SQL expressions, defaults that the
    server computes, ``insert().values()`` and ``insert().from_select()``.

    Args:
        target: a session, session class, ``sessionmaker`` or ``scoped_session``, or the asynchronous
            form of one. Calling it again changes nothing.

    Raises:
        DeclarationError: for anything else.
    """
    if isinstance(target, async_sessionmaker):
        base = target.kw.get("sync_session_class") or target.class_.sync_session_class
        if not isinstance(base, type):
            embed_on_flush(base)
            return
        own = type("EmbeddingSession", (base,), {})
        target.configure(sync_session_class=own)
        listened: Any = own
    elif isinstance(target, AsyncSession):
        listened = target.sync_session
    else:
        listened = target
    if not isinstance(listened, (Session, sessionmaker, scoped_session)) and not (
        isinstance(listened, type) and issubclass(listened, Session)
    ):
        raise DeclarationError(
            f"embed_on_flush was given {target!r}; it takes a session, a session class or a "
            "session factory."
        )
    if not event.contains(listened, "before_flush", _before_flush):
        event.listen(listened, "before_flush", _before_flush)
        event.listen(listened, "do_orm_execute", _do_orm_execute)


@dataclass(frozen=True, slots=True)
class _Attribute:
    """An embedding column as an attribute of a mapped class."""

    key: str
    filling: Filling
    source_keys: tuple[str, ...]


_attributes: WeakKeyDictionary[Mapper[Any], tuple[_Attribute, ...]] = WeakKeyDictionary()


def _attributes_of(mapper: Mapper[Any]) -> tuple[_Attribute, ...]:
    found = _attributes.get(mapper)
    if found is None:
        by_table = {table: fillings_of(table) for table in mapper.tables if isinstance(table, sa.Table)}
        found = _attributes[mapper] = tuple(
            _Attribute(
                mapper.get_property_by_column(filling.column).key,
                filling,
                tuple(mapper.get_property_by_column(c).key for c in filling.source_columns),
            )
            for fillings in by_table.values()
            for filling in fillings
            if filling.column in mapper.columns.values()
        )
    return found


def _before_flush(session: Session, context: Any, instances: Any) -> None:
    jobs: list[TextJob] = []
    for is_new, objects in ((True, session.new), (False, session.dirty)):
        for instance in objects:
            state: InstanceState[Any] = sa.inspect(instance)
            for attribute in _attributes_of(state.mapper):
                job = _job(state, attribute, is_new)
                if job is not None:
                    jobs.append(job)
    encode_jobs(jobs)


def _job(state: InstanceState[Any], attribute: _Attribute, is_new: bool) -> TextJob | None:
    """What is to be encoded for one attribute of one object, if anything."""
    values, instance = state.dict, state.obj()
    if is_new:
        if values.get(attribute.key) is not None:
            return None
        text = attribute.filling.text_of_new(
            [values.get(key, NOT_KNOWN) for key in attribute.source_keys]
        )
    else:
        # A vector that was assigned together with the text, None included, is the caller's choice.
        if state.attrs[attribute.key].history.added:
            return None
        if not any(state.attrs[key].history.has_changes() for key in attribute.source_keys):
            return None
        text = attribute.filling.text_of([getattr(instance, key) for key in attribute.source_keys])
    if text is None:
        return None

    def store(vector: npt.NDArray[np.float32]) -> None:
        setattr(instance, attribute.key, vector)

    return TextJob(attribute.filling, text, store, lambda: f"{attribute.key} of {_label(state)}")


def _label(state: InstanceState[Any]) -> str:
    identity = state.identity
    key = "new" if identity is None else ", ".join(map(repr, identity))
    return f"{state.class_.__name__}({key})"


def _do_orm_execute(state: ORMExecuteState) -> Any:
    if not (state.is_insert or state.is_update) or not state.parameters:
        return None
    mapper = state.bind_mapper
    attributes = _attributes_of(mapper) if mapper is not None else ()
    if mapper is None or not attributes:
        return None
    given = state.parameters
    rows: list[Mapping[str, Any]] = [given] if isinstance(given, Mapping) else list(given)
    jobs: list[TextJob] = []
    filled: list[dict[str, Any]] = [dict(row) for row in rows]
    for number, row in enumerate(filled):
        for attribute in attributes:
            job = _row_job(row, number, attribute, mapper, state.is_insert)
            if job is not None:
                jobs.append(job)
    if not jobs:
        return None
    encode_jobs(jobs)
    return state.invoke_statement(params=filled[0] if isinstance(given, Mapping) else filled)


def _row_job(
    row: dict[str, Any], number: int, attribute: _Attribute, mapper: Mapper[Any], is_insert: bool
) -> TextJob | None:
    if is_insert:
        if row.get(attribute.key) is not None:
            return None
        text = attribute.filling.text_of_new(
            [row.get(key, NOT_KNOWN) for key in attribute.source_keys]
        )
    else:
        # A bulk update knows the text only where it brings every part of it.
        if attribute.key in row or not all(key in row for key in attribute.source_keys):
            return None
        text = attribute.filling.text_of([row[key] for key in attribute.source_keys])
    if text is None:
        return None

    def store(vector: npt.NDArray[np.float32]) -> None:
        row[attribute.key] = vector

    return TextJob(
        attribute.filling,
        text,
        store,
        lambda: f"{attribute.key} of row {number} of {mapper.class_.__name__}",
    )
