"""Bulk statements of the ORM: ``insert(Class)`` and ``update(Class)`` with lists of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Mapper, ORMExecuteState, Session

from sbert_pg.filling import NOT_KNOWN, Text, TextJob, encode_jobs
from sbert_pg.orm.attributes import EmbeddingAttribute, attributes_of
from sbert_pg.orm.rereading import locked_sources

Row = dict[str, Any]


def embed_statement(state: ORMExecuteState) -> Any:
    """Encode for a bulk statement before it runs; a listener for ``do_orm_execute``."""
    if not (state.is_insert or state.is_update) or not state.parameters:
        return None
    mapper = state.bind_mapper
    attributes = attributes_of(mapper) if mapper is not None else ()
    if mapper is None or not attributes:
        return None
    given = state.parameters
    rows = [dict(row) for row in ([given] if isinstance(given, Mapping) else given)]
    for attribute in attributes:
        texts = (
            _inserted(attribute, rows)
            if state.is_insert
            else _updated(state.session, mapper, attribute, rows)
        )
        _fill(mapper, attribute, rows, texts)
    return state.invoke_statement(params=rows[0] if isinstance(given, Mapping) else rows)


def _inserted(attribute: EmbeddingAttribute, rows: list[Row]) -> list[Text]:
    """The text of each row, ``NOT_KNOWN`` where its vector is given."""
    return [
        NOT_KNOWN
        if row.get(attribute.key) is not None
        else attribute.filling.text_of_new(
            [row.get(key, NOT_KNOWN) for key in attribute.source_keys]
        )
        for row in rows
    ]


def _updated(
    session: Session, mapper: Mapper[Any], attribute: EmbeddingAttribute, rows: list[Row]
) -> list[Text]:
    """The text of each row that brings a part of it; what it does not bring is locked and read."""
    keys = attribute.source_keys
    partial = {}
    for number, row in enumerate(rows):
        brings = sum(key in row for key in keys)
        if attribute.key not in row and 0 < brings < len(keys):
            partial[number] = tuple(row.get(key) for key in attribute.row_keys)
    wanted = [key for key in partial.values() if None not in key]
    found = locked_sources(session, mapper, attribute, wanted) if wanted else {}
    texts: list[Text] = []
    for number, row in enumerate(rows):
        if attribute.key in row or not any(key in row for key in keys):
            texts.append(NOT_KNOWN)
            continue
        rest = found.get(partial[number], {}) if number in partial else {}
        values = [row[key] if key in row else rest.get(key, NOT_KNOWN) for key in keys]
        texts.append(attribute.filling.text_of(values))
    return texts


def _fill(
    mapper: Mapper[Any], attribute: EmbeddingAttribute, rows: list[Row], texts: list[Text]
) -> None:
    """Put the vectors into the rows, ``None`` for a text that is ``NULL``."""
    jobs = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if isinstance(text, str):
            jobs.append(_job(mapper, attribute, row, number, text))
        elif text is None:
            row[attribute.key] = None
    encode_jobs(jobs)


def _job(
    mapper: Mapper[Any], attribute: EmbeddingAttribute, row: Row, number: int, text: str
) -> TextJob:
    def store(vector: npt.NDArray[np.float32]) -> None:
        row[attribute.key] = vector

    label = f"{attribute.key} of row {number} of {mapper.class_.__name__}"
    return TextJob(attribute.filling, text, store, lambda: label)
