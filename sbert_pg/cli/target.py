"""What a command works on: ``article``, or ``article.embedding`` where a table has several.

And the passages of documents: how a command makes, fills and reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import compress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, registry

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.catalog.record import installed
from sbert_pg.cli import common
from sbert_pg.errors import DeclarationError
from sbert_pg.freshness import Progress
from sbert_pg.freshness.columns import names_of
from sbert_pg.indexes import hnsw_index
from sbert_pg.passages import add_passages, declared_passages, passages_of
from sbert_pg.passages.declaring import passages_between
from sbert_pg.progress import bar
from sbert_pg.reembed import Request, request_of
from sbert_pg.reembed.change import Side, reflect, side_of
from sbert_pg.row_vectors import embedding_columns
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.tuning.files import pairs_of, read_pairs
from sbert_pg.types.indexed import declared_indexes
from sbert_pg.types.text import TextSearch


def resolve(connection: sa.Connection, name: str) -> Side:
    """The embedding column that a name means, on its reflected table.

    A table alone stands for its only embedding column, and in the middle of a change for the one
    that it had before, so that the name means until *finish* what it meant.
    """
    bindings = catalog.all_bindings(connection)
    matching = _called(connection, bindings, name)
    before = [binding for binding in matching if binding.replaces is None]
    # Of one table: which of two is meant nobody says by beginning a change.
    if len(before) == 1 and len({binding.relation for binding in matching}) == 1:
        matching = before
    if len(matching) != 1:
        raise _not_one(name, matching, bindings)
    binding = matching[0]
    return side_of(connection, reflect(connection, binding.schema, binding.table), binding)


def _not_one(
    name: str, matching: Sequence[Binding], bindings: Sequence[Binding]
) -> DeclarationError:
    names = ", ".join(sorted(map(str, matching or bindings))) or "none"
    problem = "means several embedding columns" if matching else "is not an embedding column"
    return DeclarationError(
        f"{name!r} {problem} of this database; name one of them as table.column or "
        f"schema.table.column: {names}."
    )


def column_of(engine: sa.Engine, name: str) -> Side:
    """As ``resolve``, in a transaction that is over then."""
    with engine.connect() as connection:
        return resolve(connection, name)


def _called(connection: sa.Connection, bindings: Sequence[Binding], name: str) -> list[Binding]:
    """The bindings of a name; one without its schema means what it means in SQL."""
    matching = [binding for binding in bindings if name in names_of(binding)]
    if len(matching) < 2:
        return matching
    visible = (sa.func.pg_table_is_visible(b.relation) for b in matching)
    shown = connection.execute(sa.select(*visible)).one()
    return list(compress(matching, shown)) or matching


def change_or_column(engine: sa.Engine, target: str) -> Binding:
    """The bound column that a target names; of a table in the middle of a change, the new one."""
    with engine.connect() as connection:
        catalog.require_current(connection)
        called = _called(connection, catalog.all_bindings(connection), target)
        new = [
            binding for binding in called
            if binding.replaces and target in (binding.table, f"{binding.schema}.{binding.table}")
        ]  # fmt: skip
        if len(new) > 1:
            raise _not_one(target, new, ())
        return new[0] if new else resolve(connection, target).binding


def changes(engine: sa.Engine, target: str | None = None) -> list[Binding]:
    """The new columns of all changes under way; of a target, as ``change_or_column``."""
    if target is not None:
        return [change_or_column(engine, target)]
    with engine.connect() as connection:
        catalog.require_current(connection)
        return [b for b in catalog.all_bindings(connection) if b.replaces is not None]


def unbound(target: str) -> ColumnIdentity | None:
    """A column that need not be bound, by its name; ``None`` where only a table is named."""
    parts = target.split(".")
    if len(parts) not in (2, 3):
        return None
    return ColumnIdentity(parts[0] if len(parts) == 3 else None, *parts[-2:])


def declared_change(app: str, metadata: sa.MetaData, target: str) -> tuple[Request, list[sa.Index]]:
    """The change that an application declares, and the indexes of its new column."""
    declared = [embedding.column for embedding in embedding_columns(metadata)]
    columns = [
        c for c in declared
        if target in (f"{c.table.name}.{c.name}", f"{c.table.fullname}.{c.name}")
    ]  # fmt: skip
    if len(columns) != 1:
        raise DeclarationError(
            f"--app {app!r} declares no embedding column {target!r}; name the new column, as "
            "table.column."
        )
    return request_of(columns[0]), declared_indexes(columns[0])


def table_named(connection: sa.Connection, name: str) -> sa.Table:
    """The table ``table`` or ``schema.table``, its bound columns typed as their bindings say."""
    schema, _, table = name.rpartition(".")
    try:
        return reflect(connection, schema or None, table)
    except sa.exc.NoSuchTableError as error:
        raise DeclarationError(
            f"There is no table {table!r} in this database; 'sbert-pg status' lists those with "
            "embedding columns."
        ) from error


def embedding_or_texts(connection: sa.Connection, name: str) -> list[sa.Column[Any]]:
    """An embedding column, as ``resolve``; or ``article.body`` and ``article.title,body``, texts.

    The latter need nothing of this library in the database.
    """
    if installed(connection) and _called(connection, catalog.all_bindings(connection), name):
        return [resolve(connection, name).column]
    qualified, _, columns = name.rpartition(".")
    schema, _, table = qualified.rpartition(".")
    try:
        texts = sa.Table(table, sa.MetaData(), schema=schema or None, autoload_with=connection)
        return [texts.c[column.strip()] for column in columns.split(",")]
    except (sa.exc.NoSuchTableError, KeyError, sa.exc.ArgumentError) as error:
        raise DeclarationError(
            f"{name!r} is not an embedding column of this database, and no column of texts either; "
            "name one as table.column, several as table.title,body."
        ) from error


def text_column_of(table: sa.Table) -> sa.Column[Any]:
    """The text column of a reflected table."""
    columns = []
    for column in table.columns:
        if column.computed is not None:
            type_ = TextSearch.of_generated(str(column.computed.sqltext))
            if type_ is not None:
                column.type = type_
                columns.append(column)
    if len(columns) != 1:
        names = ", ".join(column.name for column in columns) or "none"
        raise DeclarationError(
            f"{table.fullname} has to have one text column, as text_column() makes it, and has "
            f"{names}. Of several, choose in Python: matching() and hybrid() take the column."
        )
    return columns[0]


def text_column_if_any(table: sa.Table) -> sa.Column[Any] | None:
    """As ``text_column_of``; ``None`` where there is none, or several."""
    with suppress(DeclarationError):
        return text_column_of(table)
    return None


def source_of(parts: Sequence[str] | None) -> Source | None:
    """The source that ``--source`` gives: columns, or one template."""
    if not parts:
        return None
    is_template = len(parts) == 1 and "{" in parts[0]
    return Source.template(parts[0]) if is_template else Source.of(list(parts))


def queries_of(engine: sa.Engine, pairs: str | None) -> list[LabelledQuery]:
    """Labelled questions from a file or by a query; none where neither is given."""
    if pairs is None:
        return []
    # A file may be called values.csv.
    if re.match(r"\s*(SELECT|VALUES|WITH)[\s(*'\"]", pairs, re.IGNORECASE):
        return pairs_of(engine, sa.text(pairs.replace(":", r"\:")))
    return read_pairs(pairs)


def beginnings(
    connection: sa.Connection,
    table: sa.Table,
    text: sa.ColumnElement[str] | None,
    keys: Iterable[tuple[Any, ...]],
) -> dict[tuple[Any, ...], str]:
    """The beginning of each row's text, by its key; the key itself where there is no text."""
    columns = list(table.primary_key)
    shown: Any = sa.func.concat_ws(", ", *columns) if text is None else text
    statement = sa.select(*columns, sa.func.left(shown, 200)).where(
        sa.tuple_(*columns).in_([key for key in keys if None not in key])
    )
    return {
        tuple(key): common.shortened(" ".join((beginning or "").split()), 80)
        for *key, beginning in connection.execute(statement)
    }


def create_documents(
    connection: sa.Connection, table: sa.Table, source: Source, encoder: EncoderSpec
) -> None:
    """A table of documents with its passages: those of the last source column, bound."""
    if source.pattern is not None:
        raise DeclarationError(
            "--passages cuts a column: name it by --source, after those that are headings, and "
            "without braces."
        )
    document = type("Document", (), {})
    registry(metadata=table.metadata).map_imperatively(document, table)
    index = hnsw_index(f"{table.name}_passage_embedding", "embedding")
    *headings, text = source.columns
    declared = passages_of(encoder, text, heading=headings, table_args=[index])
    add_passages(document, "passages", declared)
    catalog.create_all(connection, table.metadata)


def cut_all(engine: sa.Engine, table: sa.Table) -> None:
    """Cut and embed the documents of a table that wait for it, where it has passages."""
    from sbert_pg.freshness import backfill

    for embedded in embedding_columns(table):
        if embedded.is_cut:
            with bar() as advance:

                def show(progress: Progress) -> None:
                    advance("cutting and encoding", progress.rows, progress.total)

                backfill(engine, embedded.column, on_progress=show)


def passages_attribute(connection: sa.Connection, documents: Side) -> Any:
    """The attribute of passages of a table of documents, for searching it."""
    from sbert_pg.freshness.passages import stored_passages

    binding = stored_passages(connection, documents.binding).binding
    table = reflect(connection, binding.schema, binding.table)
    return passages_between(documents.column, side_of(connection, table, binding).table)


def document_rows(
    session: Session, attribute: Any, statement: sa.Select[Any]
) -> list[dict[str, Any]]:
    """What a search for documents finds: scores, keys, headings, and best passages."""
    declared = declared_passages(attribute)
    assert declared is not None
    names = [theirs.key for _, theirs in declared.keys]
    names += [name for name in declared.source_keys[:-1] if name not in names]
    rows = []
    for document, *others in session.execute(statement):
        passage = others.pop(0) if isinstance(others[0], declared.passage) else None
        row = dict(zip(statement.selected_columns.keys()[-len(others) :], others, strict=True))
        row |= {name: getattr(document, name) for name in names}
        if passage is not None:
            row |= {name: getattr(passage, name) for name in ("heading", "start", "stop", "text")}
        rows.append(row)
    return rows
