"""Bulk statements of the ORM: ``insert(Class)`` and ``update(Class)`` with lists of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Mapper, ORMExecuteState, Session

from sbert_pg.catalog.embedding import digest_for
from sbert_pg.orm.declaring import EmbeddingAttribute, attributes_of
from sbert_pg.row_vectors import TextJob, encode_jobs
from sbert_pg.source import NIL, NOT_KNOWN, Text
from sbert_pg.spec import Vectors

Row = dict[str, Any]


#: Strategies that take column names and leave attributes alone; so does this module.
_OTHER_STRATEGIES = frozenset({"raw", "core_only"})


def embed_statement(state: ORMExecuteState) -> Any:
    """Encode for a bulk statement before it runs; a listener for ``do_orm_execute``.

    Parts of a text that the statement itself sets, by ``values()`` or ``ON CONFLICT``, are not
    looked at. Such a row has another text than was encoded, and is pending.
    """
    mapper = _mapper_of(state)
    attributes = () if mapper is None else attributes_of(mapper)
    if mapper is None or not attributes:
        return None
    parameters: Any = state.parameters
    rows = [dict(row) for row in ([parameters] if isinstance(parameters, Mapping) else parameters)]
    for attribute in attributes:
        if state.is_insert:
            texts = _inserted(attribute, rows)
        else:
            texts = _updated(state.session, mapper, attribute, rows)
        _embed(state.session, mapper, attribute, rows, texts)
        _add_digests(state, mapper, attribute, rows, texts)
    return state.invoke_statement(params=rows[0] if isinstance(parameters, Mapping) else rows)


def _mapper_of(state: ORMExecuteState) -> Mapper[Any] | None:
    """The class of a bulk statement that names its values by attributes."""
    if not (state.is_insert or state.is_update) or not state.parameters:
        return None
    # Parameters of the other strategies are named by columns and not by attributes.
    named = state.execution_options.get("dml_strategy") not in _OTHER_STRATEGIES
    return state.bind_mapper if state.is_orm_statement and named else None


def _inserted(attribute: EmbeddingAttribute, rows: list[Row]) -> list[Text]:
    """The text of each row."""
    return [
        attribute.column.text_of_new([row.get(key, NOT_KNOWN) for key in attribute.source_keys])
        for row in rows
    ]


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
    texts: list[Text] = []
    for number, row in enumerate(rows):
        values = stored.get(partial.get(number, ()), {}) | row
        texts.append(attribute.column.text_of([values.get(key, NOT_KNOWN) for key in keys]))
    return texts


def _touches(attribute: EmbeddingAttribute, row: Row) -> bool:
    """Whether a row of an update asks for a vector: a source is new, or the vector is removed."""
    if row.get(attribute.key) is not None:
        return any(key in row for key in attribute.source_keys)
    # ``None`` is not a vector, as in the flush.
    return any(key in row for key in (*attribute.source_keys, attribute.key))


def _embed(
    session: Session,
    mapper: Mapper[Any],
    attribute: EmbeddingAttribute,
    rows: list[Row],
    texts: list[Text],
) -> None:
    """Put the vectors into the rows that bring none, ``None`` for a text that is ``NULL``."""
    jobs = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if row.get(attribute.key) is not None:
            continue
        if isinstance(text, str):
            jobs.append(_job(mapper, attribute, row, number, text))
        elif text is None:
            row[attribute.key] = None
    if jobs:
        attribute.binding(session, mapper)  # which refuses another encoder's before the work
        encode_jobs(jobs)


def _job(
    mapper: Mapper[Any], attribute: EmbeddingAttribute, row: Row, number: int, text: str
) -> TextJob:
    def store(vector: Vectors) -> None:
        row[attribute.key] = vector

    label = f"{attribute.key} of row {number} of {mapper.class_.__name__}"
    return TextJob(attribute.column, text, store, lambda: label)


def _add_digests(
    state: ORMExecuteState,
    mapper: Mapper[Any],
    attribute: EmbeddingAttribute,
    rows: list[Row],
    texts: list[Text],
) -> None:
    """Say beside each vector from which text it was made, unless the column is not bound."""
    if all(attribute.key not in row for row in rows):
        return
    binding = attribute.binding(state.session, mapper)
    if binding is None:
        return
    for row, text in zip(rows, texts, strict=True):
        vector = row.get(attribute.key)
        if vector is not None or (text is None and attribute.key in row):
            digest = digest_for(binding, text, vector)
            row[attribute.companion_key] = digest
        elif state.is_insert:
            row[attribute.companion_key] = NIL
