"""From mappings to the rows of a COPY: which columns, which defaults, which values."""

from __future__ import annotations

import datetime
import decimal
import inspect
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Dialect

from sbert_pg.catalog.embedding import default_of
from sbert_pg.errors import LoadError, SourceError, VectorError
from sbert_pg.row_vectors import EmbeddingColumn, columns_filled
from sbert_pg.source import PLAIN, Text
from sbert_pg.spec import Vectors
from sbert_pg.types import wire

_TRUTH = {"true": True, "t": True, "1": True, "yes": True, "on": True} | {
    "false": False, "f": False, "0": False, "no": False, "off": False,
}  # fmt: skip

#: How a text, as a file of text brings it, becomes a value of another type.
_FROM_TEXT: dict[type, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: lambda text: _TRUTH[text.strip().lower()],
    decimal.Decimal: decimal.Decimal,
    uuid.UUID: uuid.UUID,
    datetime.date: datetime.date.fromisoformat,
    datetime.datetime: datetime.datetime.fromisoformat,
    datetime.time: datetime.time.fromisoformat,
}


class Plan:
    """Which columns are written, decided by the first row; all rows are to have the same.

    ``columns`` are those written, without the ``embedded`` ones and their companions.
    """

    def __init__(
        self, table: sa.Table, names: Mapping[str, sa.Column[Any]], first: Mapping[str, Any]
    ) -> None:
        _require_mapping(first, 0)
        self.embedded = columns_filled(table, set(names.values()))
        vectors = [each.column for each in self.embedded]
        companions = {each.companion for each in self.embedded}
        _refuse_keys(table, names, companions, first)
        plain = _without(names, companions.union(vectors))
        written = {key: plain[key] for key in plain if key in first or _has_default(plain[key])}
        self.columns = tuple(written.values())
        #: Whether rows have to go through INSERT, since SQLAlchemy computes a default of theirs.
        self.inserts = any(_is_computed(plain[key]) for key in plain.keys() - first.keys())
        self._keys = tuple(written)
        key_of = {column: key for key, column in names.items()}
        self._vector_keys = tuple(key_of[column] for column in vectors)
        self._allowed = frozenset((*self._keys, *self._vector_keys))
        self._width = len(first)
        self._getters = _getters(self._keys, first)
        self._vector_getters = _getters(self._vector_keys, first)
        self._convert: list[_Conversion] = []
        #: For each embedding column where its source stands, or what an absent column holds.
        self._sources = [self._places(each.source_columns) for each in self.embedded]

    def _places(self, columns: Sequence[sa.Column[Any]]) -> list[tuple[int | None, Any]]:
        position = {column: i for i, column in enumerate(self.columns)}
        return [(position.get(column), default_of(column)) for column in columns]

    def replaced(self) -> set[sa.Column[Any] | None]:
        """Columns that are written where a row is there already: those that rows bring.

        What a default makes is for new rows. A vector, and what is said of it, goes with its text.
        """
        columns: set[sa.Column[Any] | None] = {
            column for column, get in zip(self.columns, self._getters, strict=True) if get
        }
        for each, vectors in zip(self.embedded, self._vector_getters, strict=True):
            if vectors is not None or not columns.isdisjoint(each.source_columns):
                columns |= {each.column, each.companion}
        return columns

    def convert_for(self, dialect: Dialect, copies: bool) -> None:
        """Decide how values are converted; what goes through INSERT is converted there."""
        self._convert = [_conversion(column, dialect, copies) for column in self.columns]

    def columns_of(
        self, rows: Sequence[Mapping[str, Any]], first: int
    ) -> tuple[list[list[Any]], list[list[Any]]]:
        """The values of some rows by column: of the plain columns, and the vectors they bring.

        Rows as long as the first one and with all of its keys have no others, so that nothing has
        to be looked at row by row.
        """
        try:
            if any(len(row) != self._width for row in rows):
                raise KeyError
            plain = [
                list(map(getter, rows)) if getter is not None else self._defaults(i, len(rows))
                for i, getter in enumerate(self._getters)
            ]
            return plain, [
                list(map(getter, rows)) if getter is not None else [None] * len(rows)
                for getter in self._vector_getters
            ]
        except (KeyError, TypeError):
            return self._one_by_one(rows, first)

    def _one_by_one(
        self, rows: Sequence[Mapping[str, Any]], first: int
    ) -> tuple[list[list[Any]], list[list[Any]]]:
        plain: list[list[Any]] = [[] for _ in self._keys]
        vectors: list[list[Any]] = [[] for _ in self._vector_keys]
        for number, row in enumerate(rows, first):
            _require_mapping(row, number)
            if not row.keys() <= self._allowed:
                extra = ", ".join(repr(key) for key in row if key not in self._allowed)
                raise LoadError(
                    f"Row {number} holds {extra}, and the first row did not. All rows of a load "
                    "have the same columns.",
                    row=number,
                )
            for i, values in enumerate(plain):
                values.append(self._given(row, i, number))
            for key, values in zip(self._vector_keys, vectors, strict=True):
                values.append(row.get(key))
        return plain, vectors

    def _defaults(self, i: int, number: int) -> list[Any]:
        default: Any = self.columns[i].default
        if default.is_scalar:
            return [default.arg] * number
        return [default.arg(None) for _ in range(number)]

    def converted(self, columns: list[list[Any]], first: int) -> list[list[Any]]:
        """The same values as the database takes them."""
        return [
            self._converted(i, values, first) if needs(values) else values
            for i, (values, (needs, _)) in enumerate(zip(columns, self._convert, strict=True))
        ]

    def _converted(self, i: int, values: Sequence[Any], first: int) -> list[Any]:
        convert = self._convert[i].convert
        converted = []
        for number, value in enumerate(values, first):
            try:
                converted.append(None if value is None else convert(value))
            except (ValueError, TypeError, KeyError, LookupError, ArithmeticError) as error:
                raise LoadError(
                    f"Row {number} holds {value!r} in column {self._keys[i]!r} of type "
                    f"{self.columns[i].type!r}: {error}",
                    row=number,
                ) from error
        return converted

    def texts(
        self,
        position: int,
        columns: Sequence[Sequence[Any]],
        vectors: Sequence[Any],
        first: int,
        *,
        bound: bool,
    ) -> list[Text]:
        """The texts of some rows for one embedding column; see ``Source.text_maker``."""
        # Without a binding nothing asks for the text of a vector that comes along.
        if not bound and all(vector is not None for vector in vectors):
            return [None] * len(vectors)
        values = [
            columns[place] if place is not None else [absent] * len(vectors)
            for place, absent in self._sources[position]
        ]
        text_of = self.embedded[position].text_of
        if all(PLAIN.issuperset(map(type, column)) for column in values):
            return [text_of(row) for row in zip(*values, strict=True)]
        return [
            self._text(position, row, number)
            for number, row in enumerate(zip(*values, strict=True), first)
        ]

    def _text(self, position: int, values: Sequence[Any], number: int) -> Text:
        for value in values:
            if isinstance(value, sa.ClauseElement):
                raise LoadError(
                    f"Row {number} holds an SQL expression in the source of "
                    f"{self._vector_keys[position]!r}; the loader takes plain values.",
                    row=number,
                )
        try:
            return self.embedded[position].text_of(values)
        except SourceError as error:
            raise LoadError(f"Row {number}: {error}", row=number) from error

    def label(self, position: int, number: int) -> str:
        """What an error calls one vector."""
        return f"{self._vector_keys[position]} of row {number}"

    def _given(self, row: Mapping[str, Any], i: int, number: int) -> Any:
        column, key = self.columns[i], self._keys[i]
        if key in row:
            return row[key]
        if _has_default(column):
            return self._defaults(i, 1)[0]
        if column.nullable and column.server_default is None:
            return None
        raise LoadError(
            f"Row {number} has no {key!r}, and the first row did. All rows of a load have the same "
            "columns.",
            row=number,
        )


def _require_mapping(row: Any, number: int) -> None:
    if not isinstance(row, Mapping):
        raise LoadError(
            f"Row {number} is {str(row)[:60]!r}, and a mapping from name to value is expected. For "
            "tuples give their names with columns=.",
            row=number,
        )


def _without(
    names: Mapping[str, sa.Column[Any]], apart: Set[sa.Column[Any] | None]
) -> dict[str, sa.Column[Any]]:
    return {key: column for key, column in names.items() if column not in apart}


def _getters(
    keys: Sequence[str], first: Mapping[str, Any]
) -> list[Callable[[Mapping[str, Any]], Any] | None]:
    """What reads each key of a row, ``None`` for those that rows do not have."""
    return [itemgetter(key) if key in first else None for key in keys]


def _refuse_keys(
    table: sa.Table,
    names: Mapping[str, sa.Column[Any]],
    companions: Set[sa.Column[Any] | None],
    first: Mapping[str, Any],
) -> None:
    """Refuse keys of the first row that are not columns, or the loader's."""
    unknown = [key for key in first if key not in names]
    if unknown:
        raise LoadError(
            f"Row 0 holds {', '.join(map(repr, unknown))}, which table {table.fullname!r} does not "
            f"have; its columns are {', '.join(names)}.",
            row=0,
        )
    own = [key for key in first if names[key] in companions]
    if own:
        raise LoadError(
            f"Row 0 holds {own[0]!r}, which is written by the loader itself: it says what each "
            "vector was made from. Leave it out.",
            row=0,
        )


def _has_default(column: sa.Column[Any]) -> bool:
    default: Any = column.default
    here = default is not None and (default.is_scalar or default.is_callable)
    return here and not _is_computed(column)


def _is_computed(column: sa.Column[Any]) -> bool:
    """Whether a default is an SQL expression, a sequence, or a function of the statement."""
    default: Any = column.default
    if default is None or default.is_scalar:
        return False
    return _takes_context(default.arg) if default.is_callable else True


def _takes_context(function: Callable[..., Any]) -> bool:
    """Whether a default is a function of the statement that it is for."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters)


class _Conversion(NamedTuple):
    """How the values of a column are converted, and whether some need it."""

    needs: Callable[[Sequence[Any]], bool]
    convert: Callable[[Any], Any]


def _conversion(column: sa.Column[Any], dialect: Dialect, copies: bool) -> _Conversion:
    """From a Python value to what psycopg is given, as a statement's parameter would be."""
    process = column.type.dialect_impl(dialect).bind_processor(dialect) if copies else None
    try:
        parse = _FROM_TEXT.get(column.type.python_type)
    except NotImplementedError:
        parse = None
    if process is not None and parse is None:
        return _Conversion(lambda values: True, process)
    if parse is None:
        return _Conversion(lambda values: False, lambda value: value)

    def convert(value: Any) -> Any:
        if isinstance(value, str):
            value = parse(value)
        return value if process is None else process(value)

    if process is not None:
        return _Conversion(lambda values: True, convert)
    return _Conversion(
        lambda values: any(issubclass(k, str) for k in set(map(type, values))), convert
    )


class Loaded(int):
    """The number of rows that were loaded.

    Attributes:
        cut: by the name of each embedding column, how many of the texts that were encoded for it
            are longer than its encoder reads, so that only their beginnings count;
            ``cut["embedding"] / rows`` is their share. A column is missing where its encoder does
            not count tokens.
    """

    cut: Mapping[str, int]

    def __new__(cls, rows: int, cut: Mapping[str, int] | None = None) -> Loaded:
        """Rows, and the texts among them that were cut; copies are made of the rows alone first."""
        loaded = super().__new__(cls, rows)
        loaded.cut = dict(cut or {})
        return loaded


def checked(embedded: EmbeddingColumn, vectors: Any, first: int, numbers: list[int]) -> Vectors:
    """Vectors as one matrix; checked at once, and one by one only to say which is wrong."""
    type_ = embedded.type
    try:
        matrix = np.asarray(vectors, dtype=np.float32)
    except (ValueError, TypeError):
        matrix = np.empty((0, 0), dtype=np.float32)
    right = matrix.shape == (len(numbers), type_.dimensions)
    if right and not wire.unfit(matrix, type_.storage, type_.similarity):
        return matrix
    single = []
    for number, vector in zip(numbers, vectors, strict=True):
        try:
            single.append(type_.checked(vector))
        except VectorError as error:
            row = first + number
            raise LoadError(f"Row {row}: {error}", row=row) from error
    return np.stack(single)
