"""Bulk statements of the ORM: ``insert(Class)`` and ``update(Class)`` with lists of parameters."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Mapper, ORMExecuteState, Session

from sbert_pg.errors import DeclarationError
from sbert_pg.filling import NOT_KNOWN, Text, TextJob, encode_jobs
from sbert_pg.orm.attributes import EmbeddingAttribute, attributes_of
from sbert_pg.orm.rechecking import write_again
from sbert_pg.orm.rereading import Key, locked_sources
from sbert_pg.types import guard

Row = dict[str, Any]


#: Strategies that take column names and leave attributes alone; so does this module.
_OTHER_STRATEGIES = frozenset({"raw", "core_only"})
#: Types of key values that a row can be found by.
_PLAIN = (int, str, uuid.UUID)


def embed_statement(state: ORMExecuteState) -> Any:
    """Encode for a bulk statement before it runs; a listener for ``do_orm_execute``."""
    if not (state.is_insert or state.is_update) or not state.parameters:
        return None
    mapper = state.bind_mapper
    attributes = attributes_of(mapper) if mapper is not None and _is_of(state, mapper) else ()
    if mapper is None or not attributes:
        return None
    given = state.parameters
    rows = [dict(row) for row in ([given] if isinstance(given, Mapping) else given)]
    checks: list[tuple[EmbeddingAttribute, dict[Key, Text]]] = []
    for attribute in attributes:
        if _is_set_apart(state.statement, attribute):
            continue
        texts = (
            _inserted(attribute, rows)
            if state.is_insert
            else _updated(state.session, mapper, attribute, rows)
        )
        if _may_be_rewritten(state, mapper, attribute, texts):
            checks.append((attribute, _to_check(state, attribute, rows, texts)))
        _fill(mapper, attribute, rows, texts)
    result = state.invoke_statement(params=rows[0] if isinstance(given, Mapping) else rows)
    for attribute, written in checks:
        if written:
            write_again(state.session, mapper, attribute, written)
    return result


def _may_be_rewritten(
    state: ORMExecuteState, mapper: Mapper[Any], attribute: EmbeddingAttribute, texts: list[Text]
) -> bool:
    """Whether ``BEFORE`` triggers of the table may give the rows other texts than these."""
    identity = guard.identity_of(attribute.filling.column)
    if identity is None or not any(isinstance(text, str) for text in texts):
        return False
    connection = state.session.connection(bind_arguments={"mapper": mapper})
    guard.ensure_writable(connection, identity, attribute.filling.spec)
    events = guard.INSERTING if state.is_insert else guard.UPDATING
    if _has_on_conflict(state.statement):
        events |= guard.UPDATING
    return guard.may_rewrite(connection, attribute.table, events)


def _to_check(
    state: ORMExecuteState, attribute: EmbeddingAttribute, rows: list[Row], texts: list[Text]
) -> dict[Key, Text]:
    """By key the texts that are to be compared afterwards; rows that cannot be are left pending.

    They cannot be where the key is the server's to give, where the statement may write another row
    (``ON CONFLICT``), and where it returns rows, which would come with the first vector.

    Raises:
        DeclarationError: such a row, in a table where the vector has to be there.
    """
    returning: Any = getattr(state.statement, "_returning", None)
    findable = not (_has_on_conflict(state.statement) or returning)
    found: dict[Key, Text] = {}
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if not isinstance(text, str):
            continue
        key = tuple(row.get(name) for name in attribute.row_keys)
        if findable and all(isinstance(part, _PLAIN) for part in key):
            found[key] = text
            continue
        if not attribute.filling.column.nullable:
            raise DeclarationError(
                f"A BEFORE trigger of {attribute.table.fullname} may change the source of "
                f"{attribute.key!r}, and row {number} could not be found again to compare. Use "
                "session.add_all(), or give the primary key and use neither ON CONFLICT nor "
                "RETURNING, or let the column take NULL."
            )
        texts[number] = None if state.is_insert or attribute.key in row else NOT_KNOWN
    return found


def _has_on_conflict(statement: Any) -> bool:
    return getattr(statement, "_post_values_clause", None) is not None


def _is_of(state: ORMExecuteState, mapper: Mapper[Any]) -> bool:
    """Whether the statement's parameters are named by the mapper's attributes."""
    plugin = getattr(state.statement, "_propagate_attrs", {})
    strategy = state.execution_options.get("dml_strategy")
    return plugin.get("compile_state_plugin") == "orm" and strategy not in _OTHER_STRATEGIES


def _is_set_apart(statement: Any, attribute: EmbeddingAttribute) -> bool:
    """Whether ``values()`` sets the vector or a part of its source, beside the parameters.

    Such a text is left to a worker.

    Raises:
        DeclarationError: ``ON CONFLICT`` sets the vector without the whole of its source.
    """
    filling = attribute.filling
    source = {column.name for column in filling.source_columns}
    # A dictionary since SQLAlchemy 2.1, a list of pairs before.
    on_conflict = getattr(statement, "_post_values_clause", None)
    updated = {_name(key) for key in dict(getattr(on_conflict, "update_values_to_set", None) or ())}
    if filling.column.name in updated and not source <= updated:
        raise DeclarationError(
            f"ON CONFLICT sets {attribute.key!r} and not all of its source "
            f"({', '.join(sorted(source - updated))}), so that the vector would belong to another "
            "text than the row has. Set them all from excluded, or leave the vector out and let a "
            "worker follow."
        )
    # A dictionary from column, or name, to value; nothing public tells it.
    names = {_name(key) for key in getattr(statement, "_values", None) or ()}
    return bool(names & (source | {filling.column.name}))


def _name(key: Any) -> str:
    return str(getattr(key, "name", key))


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
    # ``None`` is no vector, as in the flush.
    wanted = [
        row.get(attribute.key) is None and any(key in row for key in (*keys, attribute.key))
        for row in rows
    ]
    partial = {
        number: tuple(row.get(key) for key in attribute.row_keys)
        for number, row in enumerate(rows)
        if wanted[number] and not all(key in row for key in keys)
    }
    readable = [key for key in partial.values() if None not in key]
    found = locked_sources(session, mapper, attribute, readable) if readable else {}
    texts: list[Text] = []
    for number, row in enumerate(rows):
        if not wanted[number]:
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
