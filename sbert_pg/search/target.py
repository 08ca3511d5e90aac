"""What is searched: a vector column, its rows, their keys, and the index that serves it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import InstrumentedAttribute, aliased
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.operators import sub

from sbert_pg.catalog import guard
from sbert_pg.catalog.embedding import companion_of
from sbert_pg.distance import HAMMING, Metric
from sbert_pg.errors import DeclarationError, VectorError, ZeroVectorError
from sbert_pg.types.comparator import apply_operator, base_of, clause_of, metric_for, operand
from sbert_pg.types.indexed import VectorIndex, description_of, index_on
from sbert_pg.types.text import TextSearch
from sbert_pg.types.vector import shown, vector_type
from sbert_pg.types.wire import WireVector

#: Pages of the table that are tried to estimate how many rows pass.
PAGES = 48
#: The same where vectors are stored apart from their rows, so that a page holds many of these.
PAGES_OF_WIDE = 24
#: Bytes of a row from which PostgreSQL stores its large values apart.
WIDE = 2000
#: The same of a partitioned table, as one row in so many.
PARTITIONED = 200
#: Values of a unique column that are compared at once: fewer rows than a look at an index costs.
NAMED = 1000
#: How many of the nearest rows may lack a proof before a page is short by them.
MARGIN = 100
#: Parts of a statement, which would stand for a table of their name.
_PARTS = ("query", "within", "page", "sample", "plan", "near", "looks")
_OWN_NAMES = {f"nearest_{part}" for part in _PARTS}
#: The identity of the column's binding, of which ``nearest_query`` has asked.
ASKED: Any = sa.select(
    sa.table("nearest_query", sa.column("binding", sa.Uuid())).c.binding
).scalar_subquery()


class Target:
    """The searched column, and what to select of its table or mapped class.

    Attributes:
        type: its type, one of this library's also where the column's own is another's.
        origin: what the rows are selected from, as the caller would write it.
        row_key: the columns of ``table`` that ``key`` stands for.
        unique: names of columns of which each value is one row's.
        dividing: names of columns that predicates of partial indexes speak of.
        divided: of those that predicates compare with values, as of ``indexes_per``, these values.
        quantized: whether it ranks too coarsely, so that an exact distance ranks again.
        fence: how the statement asks for the column's binding, where a parameter is compared.
        bound: identity of the binding, as an expression that asks for it.
        narrows: whether the entity is less than the rows of its table (a mapped subclass).
        proof: that a row's vector is proven to be its binding's, where the column has a companion.
            It is asked of the rows of an answer alone, since it hashes, and where
            ``nearest_query`` is known, which has asked for the binding.
    """

    def __init__(self, column: Any) -> None:
        clause = clause_of(column)
        type_ = vector_type(clause.type) if isinstance(clause, sa.ColumnElement) else None
        if type_ is None:
            raise DeclarationError(
                f"nearest() was given {shown(column)}, which is no vector column. Give an "
                "attribute made with embedding_column(), or a column of type Vector, HalfVector or "
                "Embedding, or pgvector's VECTOR or HALFVEC."
            )
        self.column: sa.ColumnElement[Any] = clause
        self.type = type_
        self.metric: Metric = metric_for(clause)
        self.narrows = False
        self.proof = self.proven(clause, ASKED)
        self.fence, self.bound = guard.fence_of(clause), guard.bound(clause)
        #: Candidates beyond those wanted, since some may not be proven.
        self.margin = MARGIN if self.proof else 0
        #: Finished parts of statements, by what they depend on; see ``statement``.
        self.prepared: dict[Any, Any] = {}
        parent = getattr(column, "parent", None)
        self.entity: Any = None if parent is None else parent.entity
        origin = self._from_entity() if self.entity is not None else self._from_table(column)
        self.label = name_beside(self.origin, "nearest", "similarity")
        base = base_of(clause)
        self.table: sa.Table | None = None
        self.row_key: list[sa.Column[Any]] = []
        self.leading: set[str] = set()
        self.unique: set[str] = set()
        self.index: VectorIndex | None = None
        self.partial = self.quantized = False
        self.dividing: set[str] = set()
        self.divided: dict[str, list[sa.BindParameter[Any]]] = {}
        #: That a row has a vector, and one that may be proven.
        self.present = self.claimed(clause)
        if base is not None and isinstance(base.table, sa.Table) and base.table in origin:
            self._serve(base.table, base)

    def _from_entity(self) -> list[Any]:
        """Take selected columns and key from a mapped class; its tables."""
        inspected: Any = sa.inspect(self.entity)
        self.mapper: Any = inspected.mapper
        self.origin: Any = self.entity
        self.selected: list[Any] = [self.entity]
        self.key: list[Any] = [self._attribute(c) for c in self.mapper.primary_key]
        self.narrows = self.mapper.inherits is not None and not self.mapper.concrete
        if inspected.is_mapper:
            return list(self.mapper.tables)
        return _table_in(inspected.selectable)

    def _from_table(self, column: Any) -> list[Any]:
        """Take selected columns and key from a table or what stands for one; its tables."""
        self.mapper = None
        table = getattr(self.column, "table", None)
        if table is None:
            raise DeclarationError(f"nearest() was given {column!r}, which belongs to no table.")
        self.origin = table
        self.selected = readable_columns(table)
        self.key = list(table.primary_key)
        return _table_in(table)

    def _attribute(self, column: sa.Column[Any]) -> Any:
        return getattr(self.entity, self.mapper.get_property_by_column(column).key)

    def _serve(self, table: sa.Table, base: sa.Column[Any]) -> None:
        """Let the index of a table serve the search, where its rows can be told by their key."""
        row_key = self._row_key(table)
        if not row_key or len(row_key) != len(self.key):
            return
        if self.mapper is not None:
            self.key = [self._attribute(c) for c in row_key]
        if table.name in _OWN_NAMES and table.schema is None:
            raise DeclarationError(
                f"nearest() has a part named {table.name} in its statements, as this table is. "
                "Give the table its schema (schema=...), which tells the two apart."
            )
        self.table, self.row_key, self.index = table, row_key, index_on(self.column)
        self._base = base
        if self.index is not None:
            self.partial, self.quantized = self.index.partial, self.index.quantized
        if self.partial:
            self.dividing, self.divided = _dividing(table)
        self._find(table, row_key)

    def _find(self, table: sa.Table, row_key: list[sa.Column[Any]]) -> None:
        """Which columns find rows, and which one row each."""
        firsts = [list(index.columns)[:1] for index in table.indexes]
        self.leading = {column.name for first in [*firsts, row_key[:1]] for column in first}
        self.unique = {column.name for column in table.c if column.unique}
        self.unique |= {column.name for column in row_key if len(row_key) == 1}

    def _row_key(self, table: sa.Table) -> list[sa.Column[Any]]:
        """The primary key; of a subclass in its own table, what the mapper's is there."""
        key = list(table.primary_key)
        if any(isinstance(column.type, sa.ARRAY) for column in key):
            # An array of arrays is one of more dimensions, and holds no keys.
            return []
        if self.mapper is None or all(self.mapper.c.contains_column(column) for column in key):
            return key
        return [column for column in self.mapper.primary_key if column.table is table]

    def similarity_from(self, distance: sa.ColumnElement[float]) -> sa.Label[float]:
        """The similarity that belongs to a distance."""
        offset = sa.literal_column(str(int(self.metric.offset)), sa.Float(53))
        difference = sa.BinaryExpression(offset, distance, sub, type_=offset.type)
        return difference.label(self.label)

    def distance(self, left: sa.ColumnElement[Any], right: Any) -> sa.ColumnElement[float]:
        """The distance that ranks."""
        return apply_operator(left, self.metric.operator, right)

    def index_distance(
        self, column: sa.ColumnElement[Any], index: VectorIndex, right: sa.ColumnElement[Any]
    ) -> sa.ColumnElement[float]:
        """The distance that an index orders by."""
        operator = HAMMING if index.form == "binary" else index.metric.operator
        return apply_operator(index.indexed(column), operator, index.indexed(right))

    def row_column(self, row: sa.FromClause) -> sa.ColumnElement[Any]:
        """The vector column of a row of ``table`` under another name."""
        return row.c[self._base.key]

    def claimed(self, column: sa.ColumnElement[Any]) -> list[sa.ColumnElement[bool]]:
        """That a row has a vector, and a proof of it; asked of the column under any name."""
        companion = companion_of(column)
        proof = [] if companion is None else [guard.claimed(column, companion)]
        return [column.is_not(None), *proof]

    def proven(
        self, column: sa.ColumnElement[Any], binding_id: Any = None
    ) -> list[sa.ColumnElement[bool]]:
        """That a row's proof is one of its vector; asked of the column under any name.

        The identity of its binding is given where the statement has asked for it: ``ASKED``.
        """
        companion = companion_of(column)
        return [] if companion is None else [guard.proven(column, companion, binding_id)]

    def owns(self, element: Any) -> bool:
        """Whether it is a column of the searched rows: not of their table by another name."""
        own = isinstance(element, sa.Column) and element.table is self.column.table
        return own and table_behind(element.table) is self.table

    def names_rows(self, criterion: Any, outer: list[Any]) -> bool:
        """Whether it names few rows: a unique column equals values, or columns of outer tables."""
        criterion = clause_of(criterion)
        if isinstance(criterion, sa.BooleanClauseList) and criterion.operator is operators.and_:
            return any(self.names_rows(one, outer) for one in criterion.clauses)
        if not isinstance(criterion, sa.BinaryExpression) or not self.owns(criterion.left):
            return False
        return criterion.left.name in self.unique and _is_of_few(criterion, outer)

    def about(self, row: sa.FromClause, criterion: Any) -> Any:
        """A criterion about a row under another name.

        ``None`` where it holds more than the row's columns.
        """
        criterion = clause_of(criterion)
        if not isinstance(criterion, sa.ClauseElement):
            return None
        for element in visitors.iterate(criterion):
            if isinstance(element, (sa.SelectBase, sa.TextClause)):
                return None
            if isinstance(element, sa.ColumnClause) and not self.owns(element):
                return None
        return visitors.replacement_traverse(
            criterion, {}, lambda element, **_: row.c[element.key] if self.owns(element) else None
        )

    def sample_times(self) -> sa.ColumnElement[float]:
        """How many times as large as the sample the table is."""
        assert self.table is not None
        own = sa.func.pg_relation_size(guard.relation(self.table.schema, self.table.name))
        block = sa.literal_column(
            f"({PAGES_OF_WIDE if self.wide else PAGES:d} * current_setting('block_size')::float8)",
            sa.Float(),
        )
        size = sa.type_coerce(sa.func.nullif(own, sa.literal_column("0")), sa.Float()) / block
        # A partitioned table has no pages of its own; a part of each partition is tried.
        times = sa.func.coalesce(size, sa.literal_column(f"{PARTITIONED:d}"))
        return sa.func.greatest(sa.literal_column("1"), times, type_=sa.Float())

    @property
    def wide(self) -> bool:
        """Whether the vectors are likely stored apart, where fetching one costs more than a row."""
        size = 2 if self.type.storage == "halfvec" else 4
        return size * (self.type.dimensions or 0) > WIDE

    def comparable(self) -> list[sa.ColumnElement[bool]]:
        """That a row has a vector, and a similarity to something."""
        directed = [self.directed(self.column)] if self.metric.similarity == "cosine" else []
        return [self.column.is_not(None), *directed]

    def directed(self, vector: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        """That a vector is not all zeros, which has a cosine with nothing."""
        half = self.type.storage == "halfvec"
        norm = sa.func.l2_norm(vector) if half else sa.func.vector_norm(vector)
        # By the planner's lights most rows are unequal to something, and few larger.
        return norm != sa.literal_column("0")

    def operand(self, query: Any) -> sa.ColumnElement[Any]:
        """The query as the right-hand side of a distance operator."""
        if not self.is_row(query):
            theirs = self.type is not self.column.type
            right = operand(self.column, query, self.type if theirs else None)
            value = getattr(right, "value", None)
            if isinstance(value, WireVector) and self.metric.similarity == "cosine":
                _require_direction(value)
            return right
        # Its vector never leaves the server.
        other = aliased(self.mapper.class_)
        base: Any = base_of(self.column)
        name = self.mapper.get_property_by_column(base).key
        _require_vector(query, name)
        vector = getattr(other, name)
        own = zip(self.mapper.primary_key, self.identity(query), strict=True)
        keys = [getattr(other, self.mapper.get_property_by_column(c).key) == v for c, v in own]
        return sa.select(vector).where(*keys).scalar_subquery()

    def is_row(self, query: Any) -> bool:
        """Whether a query is an object of the mapped class."""
        return self.mapper is not None and isinstance(query, self.mapper.class_)

    def identity(self, query: Any) -> tuple[Any, ...]:
        """Primary key of a persistent object."""
        identity: tuple[Any, ...] | None = sa.inspect(query).identity
        if identity is None:
            raise DeclarationError(
                f"nearest() was given {query!r}, which is not in the database yet. Flush it first, "
                "or search with its text."
            )
        return identity


def _is_of_few(criterion: sa.BinaryExpression[Any], outer: list[Any]) -> bool:
    """Whether a column is to be one of few values, and none of other rows."""
    if criterion.operator is operators.in_op:
        values = getattr(criterion.right, "value", None)
        return isinstance(values, (list, tuple)) and len(values) <= NAMED
    others = [column for column in columns_of(criterion.right) if column.table not in outer]
    return criterion.operator is operators.eq and not others


def _require_vector(query: Any, name: str) -> None:
    """Refuse an object that is known to have no vector; mostly only the database knows."""
    state: Any = sa.inspect(query)
    if state.dict.get(name, state) is None:
        raise VectorError(
            f"nearest() was given {query!r}, whose {name} is None: it waits to be embedded. Search "
            f"with its text, or, once it has a vector, session.refresh(it, [{name!r}]) first."
        )


def _require_direction(vector: WireVector) -> None:
    if not vector.array.any():
        raise ZeroVectorError(
            "nearest() was given a vector of zeros, and its cosine with anything is undefined. "
            "Give another, or leave the search out where there is nothing to search for."
        )


def _table_in(selectable: Any) -> list[Any]:
    """The table of a selectable that is one, by its own name or another; else none."""
    table = table_behind(selectable)
    return [table] if isinstance(table, sa.Table) else []


def _dividing(table: sa.Table) -> tuple[set[str], dict[str, list[sa.BindParameter[Any]]]]:
    """Columns that predicates of a table's vector indexes speak of, and values of theirs."""
    partial = [one for one in map(description_of, table.indexes) if one and one.partial]
    words = set(re.findall(r"\w+", " ".join(str(one.where) for one in partial)))
    values: dict[str, list[sa.BindParameter[Any]]] = {}
    for one in partial:
        part: Any
        for part in visitors.iterate(one.predicate):
            if _compares(part):
                values.setdefault(part.left.name, []).append(part.right)
    return {c.name for c in table.c if words.issuperset(re.findall(r"\w+", c.name))}, values


def _compares(part: Any) -> bool:
    """Whether a part of a predicate compares a column with a value for equality."""
    equality = isinstance(part, sa.BinaryExpression) and part.operator is operators.eq
    sides = (part.left, part.right) if equality else (None, None)
    return isinstance(sides[0], sa.Column) and isinstance(sides[1], sa.BindParameter)


def readable_columns(table: Any) -> list[Any]:
    """Columns of a table that are there for readers: no vectors, and nothing made for searches."""
    vectors = [c for c in table.c if vector_type(c.type) is not None]
    texts = [c for c in table.c if isinstance(c.type, TextSearch)]
    apart = {id(c) for c in (*vectors, *map(companion_of, vectors), *texts)}
    return [c for c in table.c if id(c) not in apart]


def name_beside(origin: Any, function: str, name: str) -> str:
    """What a search calls a value of its own: behind its function's name where rows have it."""
    mapper = getattr(sa.inspect(origin, raiseerr=False), "mapper", None)
    of = [getattr(origin, "c", {})] if mapper is None else [mapper.attrs, mapper.columns]
    while any(name in one for one in of):
        name = f"{function}_{name}"
    return name


def columns_of(element: Any) -> Iterator[Any]:
    """Columns in an expression, but for those of its subqueries."""
    element = clause_of(element)
    if isinstance(element, (sa.SelectBase, sa.ScalarSelect, sa.Exists)):
        return
    if isinstance(element, sa.ColumnClause) and element.table is not None:
        yield element
        return
    if isinstance(element, sa.ClauseElement):
        for child in element.get_children():
            yield from columns_of(child)


def tables_of(element: Any) -> list[Any]:
    """Tables that the columns of an expression are of, each once."""
    return list({id(column.table): column.table for column in columns_of(element)}.values())


def table_behind(selectable: Any) -> Any:
    """The table that an alias stands for."""
    while isinstance(selectable, sa.Alias):
        selectable = selectable.element
    return selectable


#: Where a mapped property, or a column, keeps its targets.
_KEPT = "sbert_pg.targets"


class _Targets(dict[Any, Target]):
    """Targets by what they depend on; a copy of the metadata by pickle begins without any."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Targets, ())


def target_of(column: Any) -> Target:
    """The target of an attribute or column; that of a mapped class's own attribute is kept."""
    if isinstance(column, InstrumentedAttribute):
        table = getattr(column.parent, "local_table", None)
        owner, kept = column.class_, column.property.info
    elif isinstance(column, sa.Column):
        table, owner, kept = column.table, None, column.info
    else:
        return Target(column)
    if not isinstance(table, sa.Table):
        return Target(column)
    # An index that is declared later counts from then on.
    key = (owner, id(table), len(table.indexes))
    known: _Targets = kept.setdefault(_KEPT, _Targets())
    target = known.get(key)
    if target is None:
        target = known[key] = Target(column)
    return target
