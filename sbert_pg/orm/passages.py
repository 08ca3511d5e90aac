"""Documents cut in the flush, where a session is asked to: their passages are written with them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, Session
from sqlalchemy.orm.attributes import set_attribute
from sqlalchemy.orm.base import PassiveFlag

from sbert_pg.catalog import Binding, guard
from sbert_pg.passages import declared_passages
from sbert_pg.passages.cutting import cut, digest_of, embedded_text
from sbert_pg.passages.declaring import Declared
from sbert_pg.registry import get_encoder
from sbert_pg.row_vectors import encode_documents
from sbert_pg.source import companion_name, digest
from sbert_pg.system import identity_of
from sbert_pg.types import wire


def cut_before_flush(session: Session) -> None:
    """Cut and embed the new and changed documents of a session that is about to be flushed.

    A document whose text this process does not know whole is left to a worker.
    """
    for state, declared in _documents(session, [*session.new, *session.dirty]):
        texts = [getattr(state.obj(), key) for key in declared.source_keys]
        if all(text is None or isinstance(text, str) for text in texts):
            _exchange(session, state, declared, texts)


def _documents(
    session: Session, objects: Iterable[object]
) -> Iterable[tuple[InstanceState[Any], Declared]]:
    for instance in objects:
        state = sa.inspect(instance)
        for relation in state.mapper.relationships:
            declared = declared_passages(relation.class_attribute)
            if declared is None:
                continue
            if instance in session.new or any(
                state.get_history(key, PassiveFlag.PASSIVE_NO_INITIALIZE).has_changes()
                for key in declared.source_keys
            ):
                yield state, declared


def _exchange(
    session: Session, state: InstanceState[Any], declared: Declared, texts: list[str | None]
) -> None:
    document: Any = state.obj()
    bindings = _bindings(session, state, declared)
    if bindings is None:
        return
    whole_binding, binding = bindings
    stored = _stored(session, state, declared)
    if all(text is None for text in texts):
        stored[:] = []
        set_attribute(document, declared.whole, None)
        set_attribute(document, companion_name(declared.whole), None)
        return
    chosen, new = _chosen(declared, stored, texts)
    whole = whole_binding.source.joiner()(texts)
    vectors = encode_documents(
        declared.encoder, [whole, *(text for _, text in new)],
        lambda number: f"{declared.document.__name__} and its passages (text {number})",
    )  # fmt: skip
    _set(document, declared.whole, whole_binding, whole, vectors[0])
    for (passage, text), vector in zip(new, vectors[1:], strict=True):
        _set(passage, "embedding", binding, digest_of(text), vector)
    stored[:] = chosen


def _chosen(
    declared: Declared, stored: list[Any], texts: list[str | None]
) -> tuple[list[Any], list[tuple[Any, str]]]:
    """The passages that a document is to have, those of now among them, and new ones' texts."""
    *titles, source = texts
    body = source or ""
    before: defaultdict[str, deque[Any]] = defaultdict(deque)
    for passage in stored:
        if passage.embedding is not None:
            before[passage.digest].append(passage)
    chosen, new = [], []
    encoder = get_encoder(declared.encoder)
    for ordinal, due in enumerate(cut(titles, body, declared.chunker, encoder)):
        part = body[due.start : due.stop]
        if before[due.digest]:
            passage = before[due.digest].popleft()
        else:
            passage = declared.passage(digest=due.digest)
            new.append((passage, embedded_text(due.heading, part)))
        passage.ordinal, passage.heading = ordinal, due.heading
        passage.start, passage.stop = due.start, due.stop
        if declared.copies:
            passage.content = part
        chosen.append(passage)
    return chosen, new


def _bindings(
    session: Session, state: InstanceState[Any], declared: Declared
) -> tuple[Binding, Binding] | None:
    """Of the documents and of the passages; ``None`` where something else is bound, or nothing."""
    columns: list[Any] = [
        sa.inspect(class_).columns[key]
        for class_, key in ((declared.document, declared.whole), (declared.passage, "embedding"))
    ]
    connection = session.connection(bind_arguments={"mapper": state.mapper})
    bindings = [
        guard.binding_for_write(connection, identity_of(column), declared.encoder)
        for column in columns
    ]
    if bindings[0] is None or bindings[1] is None:
        return None
    # Cut in another way than the database knows, a document would never be what a worker makes.
    same = bindings[0].source == columns[0].type.source and bindings[0].utf8
    return (bindings[0], bindings[1]) if same else None


def _stored(session: Session, state: InstanceState[Any], declared: Declared) -> list[Any]:
    """The document's passages as a collection, the document locked where it is in the database."""
    document: Any = state.obj()
    if state.identity is not None:
        mapper = state.mapper
        own = zip(mapper.primary_key, state.identity, strict=True)
        with session.no_autoflush:
            session.execute(
                sa.select(*mapper.primary_key)
                .where(*(column == value for column, value in own))
                .with_for_update(key_share=True),
                bind_arguments={"mapper": mapper},
            )
            # A worker may have cut it since the passages were read.
            session.expire(document, [declared.name])
            passages: list[Any] = getattr(document, declared.name)
            return passages
    fresh: list[Any] = getattr(document, declared.name)
    return fresh


def _set(instance: Any, key: str, binding: Binding, text: str, vector: Any) -> None:
    payload = wire.to_wire(wire.as_float32(vector), binding.storage)
    set_attribute(instance, key, vector)
    set_attribute(instance, companion_name(key), digest(binding.id, text, payload, binding.storage))
