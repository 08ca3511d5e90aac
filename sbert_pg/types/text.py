"""Columns that are searched by words: a ``tsvector`` that PostgreSQL computes from text columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import MappedColumn, mapped_column

from sbert_pg import system
from sbert_pg.errors import DeclarationError

#: PostgreSQL keeps a weight class with each position, and there are four of them.
CLASSES = "ABCD"
_NAME = r'"(?:[^"]|"")+"|\w+'
#: A part of a generated column as PostgreSQL writes it back: configuration, or its column; column.
_GENERATED = re.compile(rf"to_tsvector\((?:'([^']+)'::regconfig|({_NAME})), COALESCE\(\(?({_NAME})")


class TextSearch(postgresql.TSVECTOR):
    """A ``TSVECTOR`` column computed from text columns of its row; ``matching`` searches it.

    It is a stored generated column: PostgreSQL computes it, whoever writes the row.

    Args:
        columns: names of the text columns, in order.
        language: text search configuration (``"english"``, ``"simple"`` for names and codes).
        language_column: name of a ``regconfig`` column that has each row's own configuration;
            ``language`` is then that of questions.
        weights: how much a word counts in a column, 1 where it is not named; at most four
            different numbers.

    Raises:
        DeclarationError: no column is named, or there are more than four different weights.
    """

    cache_ok = True
    # What Alembic writes is the plain type: a migration needs none of what is declared here.
    __module__ = "sqlalchemy.dialects.postgresql"

    def __init__(
        self,
        columns: tuple[str, ...],
        language: str = "english",
        language_column: str | None = None,
        weights: tuple[tuple[str, float], ...] = (),
    ) -> None:
        super().__init__()
        self.columns, self.language = tuple(columns), language
        self.language_column, self.weights = language_column, tuple(weights)
        unknown = [name for name, _ in self.weights if name not in self.columns]
        if not self.columns or unknown:
            raise DeclarationError(
                f"A text column is made of {self.columns!r} and weighs {unknown!r}; name the "
                "columns that it is made of, and weigh those."
            )
        if len({weight for _, weight in self.classes}) > len(CLASSES):
            raise DeclarationError(
                f"A text column has {len(CLASSES)} different weights at most, as PostgreSQL has; "
                f"it was given {dict(self.weights)!r}."
            )

    @property
    def classes(self) -> list[tuple[str, float]]:
        """Column and weight, in the order of the columns."""
        weights = dict(self.weights)
        return [(name, float(weights.get(name, 1))) for name in self.columns]

    @property
    def weight_classes(self) -> dict[str, float]:
        """Weight by PostgreSQL's weight class; empty where all columns weigh 1."""
        distinct = sorted({weight for _, weight in self.classes}, reverse=True)
        return {} if distinct == [1.0] else dict(zip(CLASSES, distinct, strict=False))

    @classmethod
    def of_generated(cls, expression: str) -> TextSearch | None:
        """The type of a generated column, from its expression; ``None`` for one of other making.

        Weights are not known to the database: every column of it counts once.
        """
        parts = _GENERATED.findall(expression)
        if not parts:
            return None
        unquoted = system.PLAIN.identifier_preparer.unformat_identifiers
        names = tuple(unquoted(name)[0] for _, _, name in parts)
        literal, column, _ = parts[0]
        if literal:
            return cls(names, literal)
        return cls(names, language_column=unquoted(column)[0])

    def __repr__(self) -> str:
        return "TSVECTOR()"

    def vector_sql(self) -> str:
        """The column's value as SQL, spelt as PostgreSQL spells it back."""
        classes = {weight: name for name, weight in self.weight_classes.items()}
        configuration = f"'{self.language}'::regconfig"
        if self.language_column is not None:
            configuration = _quoted(self.language_column)
        parts = []
        for name, weight in self.classes:
            part = f"to_tsvector({configuration}, COALESCE(({_quoted(name)})::text, ''::text))"
            if classes:
                part = f"setweight({part}, '{classes[weight]}'::\"char\")"
            parts.append(part)
        return parts[0] if len(parts) == 1 else f"({' || '.join(parts)})"


class _Words(sa.TextClause):
    """The expression of a text column; of an other database's it is ``NULL``."""

    inherit_cache = True


class Configuration(postgresql.REGCONFIG):
    """A text search configuration in a statement that searches by words."""

    cache_ok = True


@compiles(Configuration, "sqlite")
def _no_search(type_: Configuration, compiler: Any, **_: Any) -> str:
    raise DeclarationError(
        "Words are searched in PostgreSQL; this engine is of 'sqlite', where their column is empty."
    )


@compiles(_Words, "sqlite")
def _no_words(element: _Words, compiler: Any, **_: Any) -> str:
    return "NULL"


@compiles(TextSearch, "sqlite")
def _stored_in_sqlite(type_: TextSearch, compiler: Any, **_: Any) -> str:
    return "TEXT"


def text_column(
    *columns: str,
    language: str = "english",
    language_column: str | None = None,
    weights: Mapping[str, float] | None = None,
    name: str | None = None,
    **options: Any,
) -> MappedColumn[Any]:
    """A mapped column by which rows are found by their words; see ``TextSearch``.

    It is a stored generated column, never loaded unless it is asked for. Give it an index with
    ``text_index``.

    Args:
        columns: names of the text columns.
        language: text search configuration.
        language_column: name of a ``regconfig`` column with each row's configuration.
        weights: how much a word counts in a column.
        name: name in the database; the attribute's by default.
        **options: further arguments of ``mapped_column`` (``init=False`` on dataclasses).

    Raises:
        DeclarationError: the declaration contradicts itself.
    """
    type_ = TextSearch(columns, language, language_column, tuple((weights or {}).items()))
    computed = sa.Computed(_Words(type_.vector_sql()), persisted=True)
    positional: tuple[Any, ...] = (type_, computed) if name is None else (name, type_, computed)
    return mapped_column(*positional, deferred=True, **options)


def text_index(
    name: str, column: str, *, where: sa.ColumnElement[bool] | sa.TextClause | None = None
) -> sa.Index:
    """The GIN index of a text column, for ``__table_args__``.

    Args:
        name: its name.
        column: name of the text column.
        where: the rows that it holds, for one index a language. Of a column with a single index the
            words are counted in the rows of that.
    """
    partial: dict[str, Any] = {} if where is None else {"postgresql_where": where}
    return sa.Index(name, column, postgresql_using="gin", **partial)


def _quoted(name: str) -> str:
    """An identifier in the text of a generated column, where a colon would begin a parameter."""
    quoted: str = system.PLAIN.identifier_preparer.quote(name)
    return quoted.replace(":", r"\:")
