"""``matching``: rows found by their words, ranked by BM25, in plain SQL.

BM25 (Robertson and Zaragoza, 2009) needs for each word how often it occurs in a row (tf), in how
many rows it occurs (df), how long the row is, and how many rows there are. PostgreSQL knows it all:

- *tf*: for one lexeme ``ts_rank`` is ``.1 * (1 + 1/4 + .. + 1/tf^2) / 1.64493406685``, which grows
  with tf, so tf is read back exactly (to 255; a tsvector keeps 256 positions of a lexeme).
- *df*: ``ANALYZE`` keeps the frequencies of a column's common lexemes in ``pg_stats``; those that
  are not kept are rare, and the GIN index counts them exactly.
- *length*: ``ts_rank`` can divide by it (normalisation 2). Its mean is that of a sample of the
  table, and the number of rows is ``reltuples``.

Where there are no statistics (a table that was never analysed, a view, a role that row security
hides them from) everything is counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import OID
from sqlalchemy.sql import visitors

from sbert_pg.catalog import guard
from sbert_pg.errors import DeclarationError
from sbert_pg.search.bm25 import PAGES, PAGES_OF_SOME, looked_up, ranking
from sbert_pg.search.criteria import Call
from sbert_pg.search.statement import (
    Changeable,
    Nearest,
    criteria_of,
    replayed,
    replayed_of,
    require_page,
)
from sbert_pg.search.target import readable_columns
from sbert_pg.types.comparator import attributes_of, base_of, clause_of
from sbert_pg.types.text import Configuration, TextSearch
from sbert_pg.types.vector import shown

_QUOTED = re.compile(r'(-*)"([^"]*)"?')
#: Each dash negates what follows: ``-word`` is excluded, and ``--word`` is a word.
_EXCLUDED = re.compile(r"-(?:--)*([^-].*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Question:
    """A question as ``websearch_to_tsquery`` reads it: words, and what must be there or not."""

    words: str
    required: str = ""

    @classmethod
    def read(cls, text: str) -> Question:
        """Read ``"quoted phrases"``, ``-excluded`` words and phrases, and words."""
        if not isinstance(text, str):
            raise DeclarationError(f"A question is asked in words, not as {type(text)!r}.")
        required: list[str] = []
        phrases: list[str] = []

        def take(match: re.Match[str]) -> str:
            excluded = len(match[1]) % 2 == 1
            required.append(f'{"-" * excluded}"{match[2]}"')
            if not excluded:
                phrases.append(match[2])
            return " "

        # Half of a character, as JSON can hold it, is none that PostgreSQL could be sent.
        whole = text.replace("\0", " ").encode("utf-8", "replace").decode()
        rest = []
        for word in _QUOTED.sub(take, whole).split():
            if excluded := _EXCLUDED.fullmatch(word):
                required.append(f'-"{excluded[1]}"')
            else:
                rest.append(word)
        return cls(" ".join([*rest, *phrases]), " ".join(required))


@dataclass(frozen=True, slots=True, eq=False)
class WordSearch(Changeable):
    """What ``matching`` was asked; the counterpart of ``statement.Search``."""

    function: ClassVar[str] = "matching"
    column: Any
    entity: Any
    questions: tuple[Question, ...]
    many: bool
    language: str
    limit: int | None
    offset: int
    exhaustive: bool
    narrowing: tuple[Call, ...] = ()
    shaping: tuple[Call, ...] = ()

    @property
    def origin(self) -> Any:
        """See ``Changeable.origin``."""
        return self.table if self.entity is None else self.entity

    def statement(self) -> Nearest:
        """The statement of the search."""
        names = [f"key_{n}" for n in range(len(self.key))]
        return rows_of(self, self, words_page(self), names, ["score"])

    @property
    def table(self) -> Any:
        """The table, alias or subquery that the column is of."""
        return self.column.table

    @property
    def selected(self) -> list[Any]:
        """The entity, or the columns of the table that are there for readers."""
        return [self.entity] if self.entity is not None else readable_columns(self.table)

    @property
    def key(self) -> list[Any]:
        """Primary key of a row, in the caller's expressions."""
        if self.entity is None:
            return list(self.table.primary_key)
        return attributes_of(self.entity, sa.inspect(self.entity).mapper.primary_key)


def matching(
    column: Any,
    question: str | Sequence[str],
    *,
    limit: int | None = 10,
    offset: int = 0,
    where: sa.ColumnElement[bool] | Sequence[sa.ColumnElement[bool]] = (),
    language: str | None = None,
    exhaustive: bool = False,
) -> sa.Select[Any]:
    """A select of the rows that match a question by its words, each with its score, best first.

    Scores are BM25 with Lucene's idf, which is never negative. A row is found when it has any of
    the words; ``"quoted phrases"`` have to be there, ``-excluded`` words must not. A question of no
    known word finds nothing.

    Args:
        column: a column made with ``text_column``.
        question: the question, in words; or a list of them: then each has its ``limit`` rows, and a
            last column ``query`` has its number, from 0.
        limit, offset, where: as for ``nearest``.
        language: text search configuration of the question; the column's by default. Where rows
            have their own, only those of this configuration are found.
        exhaustive: whether to score every row that has any of the words at once; the answer is the
            same. Otherwise rows that have none of the rarest words are scored where they can be
            among the best.

    Returns:
        Rows of the entity (or of the table's columns) and ``score``; ``matching_score`` where these
        have a column of that name, and so with ``query``.

    Raises:
        DeclarationError: the column is not a text column, or a number is out of its range.
    """
    search = word_search(column, question, where, language, limit, offset, exhaustive)
    return search.statement()


def word_search(
    column: Any, question: Any, where: Any, language: str | None, limit: int | None = 10,
    offset: int = 0, exhaustive: bool = False,
) -> WordSearch:  # fmt: skip
    """What ``matching`` with these arguments searches for."""
    clause = clause_of(column)
    if not is_text_column(column):
        raise DeclarationError(
            f"matching() was given {shown(column)}, which is no text column. Give an attribute "
            "made with text_column()."
        )
    many = not isinstance(question, str)
    if not isinstance(question, (str, list, tuple)):
        raise DeclarationError(
            f"matching() takes a question in words, or a list of them, not {type(question)!r}."
        )
    require_page("matching", limit, offset)
    entity = getattr(getattr(column, "parent", None), "entity", None)
    asked = tuple(map(Question.read, question if many else [question]))
    language = language or clause.type.language
    search = WordSearch(clause, entity, asked, many, language, limit, offset, exhaustive)
    if not search.questions:
        raise DeclarationError("matching() was given an empty list of questions.")
    if not search.key:
        raise DeclarationError("matching() ranks rows by their primary key; the table has none.")
    if clause.type.language_column is not None:
        own = clause.table.c[clause.type.language_column]
        search = replace(search, narrowing=(("where", (own == _regconfig(search.language),), {}),))
    criteria = criteria_of(where)
    if criteria:
        search = replace(search, narrowing=(*search.narrowing, ("where", criteria, {})))
    return search


def is_text_column(column: Any) -> bool:
    """Whether it is a column made with ``text_column``."""
    clause = clause_of(column)
    return isinstance(clause, sa.ColumnElement) and isinstance(clause.type, TextSearch)


# ---------------------------------------------------------------- the statement


def words_page(search: WordSearch, depth: int | None = None) -> sa.Subquery:
    """The rows of a search's page, or so many: ``query``, ``key_0``.., ``score`` and ``held``."""
    type_: TextSearch = search.column.type
    weights = tuple((name.lower(), weight) for name, weight in type_.weight_classes.items())
    exhaustive = search.exhaustive or (search.limit is None and depth is None)
    page = ranking(len(search.key), weights, exhaustive)
    one = sa.table("words_questions", sa.column("number", sa.BigInteger())).alias("words_one")
    return (
        sa.select(one.c.number.label("query"), *page.c)
        .join_from(one, page, sa.true())
        .add_cte(_within_part(search), *_parts(search, depth), nest_here=True)
        .subquery("words_found")
    )


def words_of(search: WordSearch) -> sa.Select[Any]:
    """Lexeme, rows, idf and whether it is common, of each word asked for, the weightiest first."""
    idf = sa.table("words_idf", *map(sa.column, ("lexeme", "df", "idf", "common")))
    return sa.select(*idf.c).order_by(idf.c.idf.desc(), idf.c.lexeme).add_cte(*_parts(search, None))


def _parts(search: WordSearch, depth: int | None) -> list[sa.CTE]:
    """The parts of the statement that are looked up once, each behind those that it reads."""
    asked, table, *rest = looked_up()
    rows, sample = _rows_parts(search)
    own = [_search_part(search, depth), _questions_part(search), rows]
    return [*own, asked, table, sample, *rest]


def _search_part(search: WordSearch, depth: int | None) -> sa.CTE:
    """What holds for all questions, as a part of one row."""
    base: Any = base_of(search.column)
    is_whole = _own_rows(search) is None
    limit, offset = (search.limit, search.offset) if depth is None else (depth, 0)
    values = {
        "wanted": limit,
        "needed": None if limit is None else limit + offset,
        "skipped": offset,
        "vector_column": base.name,
        "pages": PAGES if is_whole else PAGES_OF_SOME,
    }
    relation = sa.cast(guard.relation(base.table.schema, base.table.name), OID)
    columns = [_regconfig(search.language).label("language"), relation.label("relation")]
    for key, value in values.items():
        type_: Any = sa.Text() if isinstance(value, str) else sa.BigInteger()
        columns.append(sa.cast(sa.literal(value, type_), type_).label(key))
    whole = sa.true() if is_whole else sa.false()
    part: sa.CTE = sa.select(*columns, whole.label("whole")).cte("words_search")
    return part.prefix_with("MATERIALIZED")


def _own_rows(search: WordSearch) -> Any:
    """Which rows of the table words are counted in: those of the language, or of a partial index.

    ``None`` for all. A word of one language is rare in a table of many, whatever it is.
    """
    base: Any = base_of(search.column)
    if search.column.type.language_column is not None:
        return base.table.c[search.column.type.language_column] == _regconfig(search.language)
    indexes = _indexes_of(base)
    where = indexes[0].dialect_options["postgresql"]["where"] if len(indexes) == 1 else None
    return sa.text(where) if isinstance(where, str) else where


def _indexes_of(base: Any) -> list[sa.Index]:
    """The declared indexes of a text column."""
    indexes = getattr(base.table, "indexes", ())
    return [index for index in indexes if base.name in index.columns]


def _questions_part(search: WordSearch) -> sa.CTE:
    """The questions, numbered from 0, with what their rows have to match beyond having words."""
    texts = [
        postgresql.array([sa.literal(getattr(one, name), sa.Text()) for one in search.questions])
        for name in ("words", "required")
    ]
    asked = (
        sa.func.unnest(*(sa.cast(text, postgresql.ARRAY(sa.Text())) for text in texts))
        .table_valued("words", "required", with_ordinality="place", name="words_texts")
        .render_derived()
    )
    required = sa.func.websearch_to_tsquery(_regconfig(search.language), asked.c.required)
    part: sa.CTE = sa.select(
        (asked.c.place - sa.literal_column("1")).label("number"),
        asked.c.words,
        required.label("required"),
    ).cte("words_questions")
    return part.prefix_with("MATERIALIZED")


def _rows_parts(search: WordSearch) -> tuple[sa.CTE, sa.CTE]:
    """The rows of the table, for counting, and a sample of them, numbered.

    A column that has an index is of a table, and no view, of which there are no samples. Without an
    index each search reads all rows, and counting them adds little.
    """
    base: Any = base_of(search.column)
    table, own = base.table, _own_rows(search)
    every = sa.select(base.label("vector"))
    percent = sa.literal_column("(SELECT percent FROM words_table)", sa.Float())
    some = sa.tablesample(table, sa.func.system(percent), table.name, seed=sa.text("0"))

    def of_some(element: Any, **_: Any) -> Any:
        return some.c[element.key] if getattr(element, "table", None) is table else None

    counts: Any = sa.true()
    if own is not None:
        every, counts = every.where(own), visitors.replacement_traverse(own, {}, of_some)
        # A row of which it is not known is a part of the sample all the same.
        counts = sa.func.coalesce(counts, sa.false())
    place = sa.func.row_number().over().label("place")
    sample = sa.select(some.c[base.key].label("vector"), counts.label("own"), place)
    if not _indexes_of(base):
        none = sa.literal_column("0", sa.BigInteger()).label("place")
        sample = sa.select(base.label("vector"), sa.true().label("own"), none).where(sa.false())
    return tuple(  # type: ignore[return-value]
        select.cte(name).prefix_with("NOT MATERIALIZED")
        for name, select in (("words_rows", every), ("words_sample", sample))
    )


def _within_part(search: WordSearch) -> sa.CTE:
    """Keys and vectors of the caller's rows, for the planner to put where needed."""
    keys = [key.label(f"key_{n}") for n, key in enumerate(search.key)]
    rows = sa.select(*keys, search.column.label("vector"))
    if search.entity is not None:
        rows = rows.select_from(search.entity)
    rows = replayed(rows, search.narrowing)
    if search.joins:
        rows = rows.distinct()
    part: sa.CTE = rows.cte("words_within")
    return part.prefix_with("NOT MATERIALIZED")


def _regconfig(language: str) -> sa.ColumnElement[Any]:
    # Written out: of a parameter no planner knows that it is what a partial index is for.
    return sa.cast(sa.literal(language, sa.Text(), literal_execute=True), Configuration())


def rows_of(
    search: Any, words: WordSearch, page: Any, names: list[str], values: list[str], *ties: Any
) -> Nearest:
    """The statement of a search: the rows of its page with its values, best first."""
    query = [page.c.query] if words.many else []
    own = [*(page.c[name] for name in values), *query]
    labels = [column.label(search.called(column.name)) for column in own]
    statement: Any = Nearest(*words.selected, *labels)
    if words.joins:
        statement = replayed_of(statement, words.origin, words.narrowing)
    on = [key == page.c[name] for key, name in zip(words.key, names, strict=True)]
    statement = statement.join_from(words.origin, page, sa.and_(*on))
    statement = statement.order_by(*query, page.c.score.desc(), *ties, *words.key)
    statement = replayed(statement, search.shaping)
    statement.search = search
    return statement  # type: ignore[no-any-return]
