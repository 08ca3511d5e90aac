"""The one description of a vector index: as declared, as a migration says it, as a server has it.

Of a declared index everything is read off the ``Index`` object (access method, expression, operator
class), so one that was written by hand or copied with ``to_metadata`` is understood as well as one
of ``hnsw_index``. It stands beside the types, since ``distance()`` of a column asks which index
serves it; reading indexes off a server and building them is the affair of ``sbert_pg.indexes``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BIT
from sqlalchemy.sql import operators
from sqlalchemy.sql.functions import FunctionElement

from sbert_pg import system
from sbert_pg.distance import INDEX_METHODS, METRICS, IndexMethod, Metric, Similarity
from sbert_pg.errors import DeclarationError
from sbert_pg.types.wire import shape_of

Form = Literal["column", "halfvec", "subvector", "binary"]
_PREFERENCE: tuple[Form, ...] = ("column", "halfvec", "subvector", "binary")
#: A vector in an expression, and the width of a subvector that starts at its first element.
_VECTOR = re.compile(r"'(\[[-+0-9.,eE\s]+\])'")
_WIDTH = re.compile(r"subvector\(.*,\s*1,\s*(\d+)\)", re.DOTALL)

#: The extensions' defaults, which an index has that was created without the option.
DEFAULT_OPTIONS: Mapping[str, Mapping[str, int | str]] = {
    "hnsw": {"m": 16, "ef_construction": 64},
    "ivfflat": {"lists": 100},
    "diskann": {
        "storage_layout": "memory_optimized",
        "num_neighbors": 50,
        "search_list_size": 100,
        "max_alpha": "1.2",
    },
}
_OPCLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_$.]*\Z")
_OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_VALUE = re.compile(r"[A-Za-z0-9_.+-]+\Z")
#: A value that is a text, as VectorChord's TOML: nothing in it ends a literal, or is a parameter's.
_TEXT = re.compile(r"[A-Za-z0-9_.+\-=,\[\]{}\"#\s]*\Z")
#: Lists to look into under a filter, as a power of their number, since rows that pass are farther
#: away than the nearest; measured with IVFFlat, see ``search.looks``.
PROBED_FAR = 0.9
_LINES = re.compile(r"\s*\n\s*")
_LISTS = re.compile(r"^\s*lists\s*=\s*\[([\d,\s]*)\]", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorIndex:
    """How a vector index is made.

    Attributes:
        element: the indexed expression, as SQL or as SQLAlchemy has it; ``None`` for the column.
        dimensions: width of the column, 0 where unknown.
        cast_to: type of a declared index's cast, for the forms ``halfvec`` and ``subvector``.
        centre: what is taken from vectors before their signs are, as a declared index has it.
        exact: similarity function of the exact rerank, for the form ``binary``.
    """

    name: str
    table: str
    schema: str | None = None
    column: str
    method: IndexMethod = "hnsw"
    form: Form = "column"
    opclass: str | None = None
    options: Mapping[str, int | str] = field(default_factory=dict)
    element: Any = None
    predicate: Any = None
    tablespace: str | None = None
    dimensions: int = 0
    cast_to: sa.types.TypeEngine[Any] | None = None
    centre: sa.ColumnElement[Any] | None = None
    exact: Similarity = "cosine"

    @property
    def expression(self) -> str | None:
        """The indexed expression as SQL, ``None`` where the column itself is indexed."""
        return None if self.element is None else sql_of(self.element)

    @property
    def where(self) -> str | None:
        """The predicate as SQL."""
        return None if self.predicate is None else sql_of(self.predicate)

    @property
    def effective_options(self) -> dict[str, int | str]:
        """Storage parameters, with the extension's defaults for those that were not spelled out.

        Of a parameter that is a text of several lines, blanks around them do not count.
        """
        options = {**DEFAULT_OPTIONS.get(self.method, {}), **self.options}
        return {key: as_number(_LINES.sub("\n", str(v)).strip()) for key, v in options.items()}

    @property
    def lists(self) -> int | None:
        """Inverted lists of an IVFFlat index; of VectorChord's, those of its last level."""
        match = _LISTS.search(str(self.options.get("options", "")))
        levels = re.findall(r"\d+", match[1])[-1:] if match else []
        lists = self.effective_options.get("lists", *levels)
        return None if lists is None else int(lists)

    @property
    def probes(self) -> tuple[int, ...]:
        """Lists that VectorChord looks into at each level, as the index itself says."""
        own = str(self.options.get("probes", "")) if self.method == "vchordrq" else ""
        return tuple(int(number) for number in re.findall(r"\d+", own))

    @property
    def partial(self) -> bool:
        """Whether it holds a part of the rows, and serves queries of that part alone."""
        return self.predicate is not None

    @property
    def quantized(self) -> bool:
        """Whether distances by the index are too coarse to rank by."""
        return self.form in ("subvector", "binary")

    @property
    def mean(self) -> list[float] | None:
        """The vector that is taken from all before their signs are, where there is one."""
        match = _VECTOR.search(self.expression or "") if self.form == "binary" else None
        return None if match is None else [float(x) for x in match[1].strip("[]").split(",")]

    @property
    def width(self) -> int | None:
        """Dimensions of the form ``subvector``."""
        match = _WIDTH.search(self.expression or "") if self.form == "subvector" else None
        return None if match is None else int(match[1])

    @property
    def similarity(self) -> Similarity | None:
        """Similarity function that it orders by, ``None`` for an index over bits."""
        if self.form == "binary":
            return None
        opclass = self.opclass or "vector_l2_ops"
        for name, metric in METRICS.items():
            if opclass.endswith(metric.opclass_suffix):
                return name
        return None

    @property
    def metric(self) -> Metric:
        """Metric of the operator class; over bits, that of the exact rerank."""
        return METRICS[self.similarity or self.exact]

    def indexed(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """The expression that a declared index is on, of its column or of another vector."""
        if self.form == "binary":
            return signs(column, self.dimensions, self.centre)
        if self.form == "subvector":
            return subvector(column, self.cast_to)
        return column if self.cast_to is None else sa.cast(column, self.cast_to)

    def to_index(
        self, *, name: str | None = None, table: tuple[str | None, str] | None = None
    ) -> sa.Index:
        """An ``Index`` for ``CREATE INDEX``, on a table that has no other column."""
        self._check()
        schema, table_name = table or (self.schema, self.table)
        column = sa.Column(self.column or "embedding", sa.types.NullType())
        # Literal, since an expression is SQL as it is: colons do not begin parameters in it.
        expression = self.expression
        element: Any = column
        if expression is not None:
            element = sa.literal_column(f"({expression})").label("expression")
        where = self.where
        index = sa.Index(
            name or self.name,
            element,
            postgresql_using=self.method,
            postgresql_ops={} if self.opclass is None else {element.key: self.opclass},
            postgresql_with={key: quoted(value) for key, value in self.options.items()},
            postgresql_where=None if where is None else sa.literal_column(where),
            postgresql_tablespace=self.tablespace,
        )
        sa.Table(table_name, sa.MetaData(), column, index, schema=schema)
        return index

    def _check(self) -> None:
        checks = [(_OPCLASS, self.opclass or "vector_l2_ops", "operator class")]
        for key, value in self.options.items():
            checks += [(_OPTION, key, "option"), (_TEXT, str(value), "value")]
        for pattern, value, what in checks:
            if not pattern.match(value):
                raise DeclarationError(f"Index {self.name!r}: {value!r} is no {what}.")


def signs(
    column: sa.ColumnElement[Any], dimensions: int, centre: sa.ColumnElement[Any] | None = None
) -> sa.ColumnElement[Any]:
    """One bit a dimension, set where the element is positive, or above that of a centre."""
    if centre is not None:
        column = sa.BinaryExpression(column, centre, operators.sub, type_=column.type)
    return sa.cast(sa.func.binary_quantize(column), BIT(dimensions))


def subvector(column: sa.ColumnElement[Any], type_: Any) -> sa.ColumnElement[Any]:
    """The first dimensions of a vector, as many as a type has."""
    width = sa.literal_column(str(int(type_.dimensions)), sa.Integer())
    return sa.cast(sa.func.subvector(column, sa.literal_column("1"), width), type_)


def method_of(index: sa.Index) -> IndexMethod | None:
    """The access method of a vector index, else ``None``."""
    using = index.dialect_options["postgresql"]["using"]
    return cast("IndexMethod", using) if using in INDEX_METHODS else None


def declared_indexes(column: sa.Column[Any]) -> list[sa.Index]:
    """The vector indexes that a class declares on one of its columns."""
    return [
        index
        for index in column.table.indexes
        if method_of(index) is not None and column.name in index.columns
    ]


def _expression_of(index: sa.Index) -> tuple[Any, Any]:
    """The only expression of an index without its label, and its operator class."""
    element: Any = index.expressions[0]
    operators = index.dialect_options["postgresql"]["ops"] or {}
    opclass = operators.get(getattr(element, "key", None)) or next(iter(operators.values()), None)
    while isinstance(element, sa.Label):
        element = element.element
    return element, opclass


def description_of(index: sa.Index) -> VectorIndex | None:
    """The description of an index, where it is a vector index on one expression."""
    method, table = method_of(index), index.table
    if method is None or table is None or len(index.expressions) != 1:
        return None
    options = index.dialect_options["postgresql"]
    element, opclass = _expression_of(index)
    column, form, cast_to, centre = _parts(element)
    name: str = getattr(column, "name", "")
    if column is None:
        # Something that no query of ours is served by; a migration knows its text.
        # An expression given as text may have the operator class behind it.
        element = sql_of(element)
        behind = re.fullmatch(r"(.*\S)\s+(\w+_ops)", element, flags=re.DOTALL)
        if behind is not None and not opclass:
            element, opclass = behind[1], behind[2]
        vectors = [c.name for c in index.columns if shape_of(c.type) is not None]
        name, form = next(iter([*vectors, *(c.name for c in index.columns), ""])), form_of(element)
    type_ = getattr(column, "type", None)
    spec = getattr(type_, "encoder", None)
    return VectorIndex(
        name=str(index.name),
        table=table.name,
        schema=table.schema,
        column=name,
        method=method,
        form=form,
        opclass=opclass,
        options={str(k): as_number(unquoted(v)) for k, v in (options["with"] or {}).items()},
        element=None if element is column else element,
        predicate=options["where"],
        tablespace=options["tablespace"],
        dimensions=(shape_of(type_) or ("vector", None))[1] or 0,
        cast_to=cast_to,
        centre=centre,
        exact="cosine" if spec is None else spec.similarity,
    )


def declared_index(index: sa.Index, name: str, schema: str | None) -> VectorIndex:
    """What a declared index is, by its name after naming conventions."""
    description = description_of(index)
    if description is None:
        assert index.table is not None
        raise DeclarationError(
            f"Index {name!r} on {index.table.fullname} has {len(index.expressions)} expressions; "
            f"an index with {method_of(index)} has one."
        )
    return replace(description, name=name, schema=schema)


def index_on(column: sa.ColumnElement[Any]) -> VectorIndex | None:
    """The description of the index that serves a column best.

    That is one of the encoder's own metric before another's, one of all rows before a partial one,
    an exact form before a quantised one, HNSW before IVFFlat.
    """
    for base in column.base_columns:
        table = getattr(base, "table", None)
        if not isinstance(table, sa.Table):
            continue
        descriptions = [
            description
            for index in sorted(table.indexes, key=lambda index: str(index.name))
            if (description := description_of(index)) is not None
            and description.dimensions
            and description.column == getattr(base, "name", None)
        ]
        if descriptions:
            return min(descriptions, key=lambda description: _rank(description, base))
    return None


def _rank(index: VectorIndex, column: Any) -> tuple[Any, ...]:
    spec = getattr(column.type, "encoder", None)
    foreign = spec is not None and index.metric.similarity != spec.similarity
    return foreign, index.partial, _PREFERENCE.index(index.form), index.method != "hnsw"


class _Parts(NamedTuple):
    """The column under an index expression, its form, the cast's type, and the centre of signs."""

    column: sa.Column[Any] | None = None
    form: Form = "column"
    cast_to: sa.types.TypeEngine[Any] | None = None
    centre: sa.ColumnElement[Any] | None = None


def _parts(expression: Any) -> _Parts:
    expression = _ungrouped(expression)
    if isinstance(expression, sa.Column):
        return _Parts(expression)
    if not isinstance(expression, sa.Cast):
        return _Parts()
    inner, to = _ungrouped(expression.clause), expression.type
    if isinstance(inner, sa.Column) and getattr(to, "storage", None) == "halfvec":
        return _Parts(inner, "halfvec", to)
    return _of_function(inner, to)


def _of_function(inner: Any, to: sa.types.TypeEngine[Any]) -> _Parts:
    arguments = [_ungrouped(each) for each in getattr(inner, "clauses", ())]
    if not isinstance(inner, FunctionElement) or not arguments:
        return _Parts()
    first, centre = arguments[0], None
    if isinstance(to, BIT) and isinstance(first, sa.BinaryExpression):
        first, centre = _ungrouped(first.left), first.right
    if not isinstance(first, sa.Column):
        return _Parts()
    if isinstance(to, BIT) and len(arguments) == 1:
        return _Parts(first, "binary", None, centre)
    if getattr(inner, "name", "") == "subvector":
        return _Parts(first, "subvector", to)
    return _Parts()


def _ungrouped(expression: Any) -> Any:
    while isinstance(expression, sa.sql.elements.Grouping):
        expression = expression.element
    return expression


def form_of(expression: str) -> Form:
    """The form of an index whose expression is known as SQL."""
    for name, form in (("binary_quantize", "binary"), ("subvector", "subvector")):
        if name in expression:
            return cast("Form", form)
    return "halfvec" if "halfvec" in expression.lower() else "column"


def as_number(value: Any) -> int | str:
    """A storage parameter, as a number where it is one."""
    return int(value) if str(value).isdigit() else str(value)


def quoted(value: int | str) -> int | str:
    """A storage parameter as ``WITH`` takes it."""
    return value if _VALUE.match(str(value)) else f"'{value}'"


def unquoted(value: Any) -> str:
    """The same as the server keeps it."""
    match = re.fullmatch(r"('|\$\$)(.*)\1", str(value), flags=re.DOTALL)
    return str(value) if match is None else match[2]


def sql_of(expression: Any) -> str:
    """An expression of an index as SQL, without the table's name and without parameters."""
    if isinstance(expression, str):
        return expression
    compiled = expression.compile(
        dialect=system.PLAIN, compile_kwargs={"literal_binds": True, "include_table": False}
    )
    return str(compiled)
