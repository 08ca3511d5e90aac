"""Searches to be measured: what each gives for many questions, and the usual ones of a column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import sqlalchemy as sa

from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import DeclarationError
from sbert_pg.indexes import index_like, vector_indexes
from sbert_pg.registry import query_vectors
from sbert_pg.search import hybrid, matching, nearest
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.search.fusion import HybridSearch
from sbert_pg.search.statement import Nearest
from sbert_pg.spec import TextEncoder
from sbert_pg.tuning.adapters import Candidates
from sbert_pg.types.comparator import base_of, clause_of
from sbert_pg.types.indexed import index_on, method_of
from sbert_pg.types.text import TextSearch


class Answer(NamedTuple):
    """A row that was found: its key as text, its score, and the beginning of its text."""

    key: str
    score: float
    text: str = ""


#: Questions of one statement.
BATCH = 200
T = TypeVar("T")
#: A search: from questions to the statement that answers them (with a column ``query``, the number
#: of the question from 0), or to the answers themselves.
Search = Callable[[list[str]], Any]


def in_batches(questions: Sequence[T]) -> Iterator[list[T]]:
    """Questions, as many at a time as one statement asks."""
    for first in range(0, len(questions), BATCH):
        yield list(questions[first : first + BATCH])


def by_question(connection: sa.Connection, statement: Any, count: int) -> list[list[Any]]:
    """Rows of a statement for so many questions, which has a column ``query``, for each of them."""
    answers: list[list[Any]] = [[] for _ in range(count)]
    for row in connection.execute(statement):
        answers[row.query].append(row)
    return answers


def encode_together(statement: Any, questions: Sequence[str]) -> None:
    """Encode the questions of a search in one batch; the statement then takes them as they are."""
    search = getattr(statement, "search", None)
    meaning = search.meaning.search if isinstance(search, HybridSearch) else search
    column = getattr(getattr(meaning, "target", None), "column", None)
    if column is not None and isinstance(column.type, Embedding):
        query_vectors(column.type.encoder, questions)


def with_answers(statement: Any) -> sa.Select[Any]:
    """The statement of a search with the columns ``query``, ``key``, ``score`` and ``text``."""
    columns, search = statement.selected_columns, getattr(statement, "search", None)
    query = "query" if search is None else search.called("query")
    if query not in columns:
        raise DeclarationError(
            "A search to be evaluated takes a list of questions and gives a column 'query', their "
            "number from 0, as nearest(), matching() and hybrid() do for a list."
        )
    if not isinstance(statement, Nearest):
        return statement  # type: ignore[no-any-return]
    of = _target(statement)
    score = search.called("score") if of is search else of.label
    chosen = (
        columns[query].label("query"),
        catalog_rows.label(of.key).label("key"),
        columns[score].label("score"),
        sa.func.left(_text_of(of.column), 200).label("text"),
    )
    # Of this very statement: the method of a search would make another, with other columns.
    return sa.Select.with_only_columns(statement, *chosen)


def _target(statement: Nearest) -> Any:
    return getattr(statement.search, "target", statement.search)


def require_rows(
    connection: sa.Connection,
    statement: Any,
    queries: Sequence[LabelledQuery],
    answers: Sequence[Sequence[Answer]],
) -> None:
    """Refuse labelled keys of which not one is a row of the table that a search reads."""
    keys = {key for query in queries for key in query.gains}
    answered = {answer.key for rows in answers for answer in rows}
    if not isinstance(statement, Nearest) or keys & answered:
        return
    # Nothing right among the answers: a poor search, or keys of another table.
    catalog_rows.require_one_of(connection, catalog_rows.label(_target(statement).key), keys)


def _text_of(column: Any) -> sa.ColumnElement[str]:
    """The text of a row: what the searched column is made of."""
    if isinstance(column.type, Embedding):
        return column.type.source.expression(column.table)
    names = column.type.columns if isinstance(column.type, TextSearch) else ()
    return sa.func.concat_ws(" ", sa.literal(""), *(column.table.c[name] for name in names))


def searches_for(
    engine: sa.Engine,
    column: Any,
    words: Any = None,
    *,
    where: Sequence[sa.ColumnElement[bool]] = (),
    encoders: Sequence[TextEncoder] = (),
    limit: int = 10,
) -> dict[str, Search]:
    """The usual searches of a column, for ``evaluate``.

    These are ``dense`` (as ``nearest`` does it), ``exact``; ``words`` and ``hybrid`` where there is
    a text column; ``dense by`` each index where the table has several; and exact search with each
    of the encoders given, which encodes every row's text and keeps the vectors in memory.
    """
    options: dict[str, Any] = {"where": where, "limit": limit}
    searches: dict[str, Search] = {
        "dense": lambda questions: nearest(column, questions, **options),
        "exact": lambda questions: nearest(column, questions, exact=True, **options),
    }
    if words is not None:
        searches["words"] = lambda questions: matching(words, questions, **options)
        searches["hybrid"] = lambda questions: hybrid(column, words, questions, **options)
    clause = clause_of(column)
    base: Any = base_of(clause)
    table: Any = base.table
    with engine.connect() as connection:
        stored = vector_indexes(connection, table.name, base.name, schema=table.schema)
    # Reflected tables declare no index, and what is declared may not be built.
    for index in stored if len(stored) > 1 or index_on(base) is None else ():
        if index.valid and not index.partial:
            searches[f"dense by {index.name}"] = _by_index(base, index, options)
    for encoder in encoders:
        searches[f"exact, {encoder.spec.name}"] = _Encoded(engine, base, encoder, where, limit)
    return searches


def _by_index(base: sa.Column[Any], index: Any, options: Mapping[str, Any]) -> Search:
    """``nearest`` on a copy of the table that declares one index alone."""
    copy: Any = base.table.to_metadata(sa.MetaData())
    copy.indexes.difference_update({i for i in copy.indexes if method_of(i) is not None})
    index_like(index, copy.c[base.key], index.name)
    where = [on_copy(criterion, base.table, copy) for criterion in options["where"]]
    own = {**options, "where": where}
    return lambda questions: nearest(copy.c[base.key], questions, **own)


def on_copy(criterion: Any, table: Any, copy: sa.Table) -> Any:
    """A criterion on a table's columns, on those of its copy; SQL as it is stays as it is."""

    def replaced(element: Any, **_: Any) -> Any:
        of: Any = element.table if isinstance(element, sa.Column) else None
        # By name, since the criterion may be of another declaration of the same table.
        own = isinstance(of, sa.Table) and of.fullname == table.fullname
        return copy.c[element.key] if own else None

    return sa.sql.visitors.replacement_traverse(criterion, {}, replaced)


class _Encoded:
    """Exact search in the vectors that another encoder gives for a column's source."""

    def __init__(
        self,
        engine: sa.Engine,
        base: sa.Column[Any],
        encoder: TextEncoder,
        where: Sequence[sa.ColumnElement[bool]],
        limit: int,
    ) -> None:
        type_: Any = base.type
        if not isinstance(type_, Embedding):
            raise DeclarationError(f"{base} has no source, so no other encoder can read its rows.")
        self.engine, self.encoder, self.limit = engine, encoder, limit
        text = type_.source.expression(base.table)
        key = catalog_rows.label(list(base.table.primary_key))
        self.statement = sa.select(key, text).where(*where)
        self.rows: list[Any] | None = None

    def __call__(self, questions: list[str]) -> list[list[Answer]]:
        if self.rows is None:
            with self.engine.connect() as connection:
                self.rows = [row for row in connection.execute(self.statement) if row[1]]
            texts = [text for _, text in self.rows]
            encode, starts = self.encoder.encode_document, range(0, len(texts), 512)
            self.vectors = np.concatenate([encode(texts[i : i + 512]) for i in starts])
        similarity = self.encoder.spec.similarity
        rows = Candidates([key for key, _ in self.rows], self.vectors, similarity)
        best = rows.nearest(self.encoder.encode_query(questions), self.limit)
        return [
            [
                Answer(self.rows[place][0], float(score), self.rows[place][1][:200])
                for place, score in zip(places, scores, strict=True)
                if place >= 0
            ]
            for places, scores in zip(best.positions, best.similarities, strict=True)
        ]
