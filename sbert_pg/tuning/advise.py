"""``advise_index``: build every form of index on a sample of the rows, measure, recommend one.

The sample is a temporary table that is gone when the transaction is rolled back, so nothing of the
database changes. Its size decides what is measured: recall of an index falls a little, and its
advantage over comparing every row grows, with the number of rows.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TSVECTOR

from sbert_pg import system
from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.errors import DeclarationError
from sbert_pg.indexes import hnsw_index, vector_indexes
from sbert_pg.indexes.read import copy_table
from sbert_pg.registry import query_vectors
from sbert_pg.search import nearest
from sbert_pg.search.exact import mean, recall
from sbert_pg.tuning.files import in_columns
from sbert_pg.tuning.searches import on_copy
from sbert_pg.types.comparator import base_of, clause_of
from sbert_pg.types.indexed import description_of
from sbert_pg.types.vector import VectorType, plain_type, shown

#: Recall that a form has to reach, under every filter, to be recommended.
LEAST = 0.98
#: Rows of a statement that copies the sample.
_CHUNK = 5000


@dataclass(frozen=True, slots=True)
class Measured:
    """Recall@k against exact search, and median milliseconds of a search, under one filter."""

    filter: str | None
    recall: float
    milliseconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FormFigures:
    """A form of index, as it was measured and built on the sample, and how it is made.

    ``share`` is its size beside that of the column itself, or of ``halfvec`` where that is too
    wide.
    """

    name: str
    bytes: int = 0
    share: float = 0.0
    seconds: float = 0.0
    measured: tuple[Measured, ...]
    declaration: str = ""
    operation: str = ""

    @property
    def recall(self) -> float:
        """The lowest recall under any filter."""
        return min(each.recall for each in self.measured)

    @property
    def milliseconds(self) -> float:
        """Time of a search without a filter."""
        return self.measured[0].milliseconds


@dataclass(frozen=True, slots=True)
class Advice:
    """Forms of index side by side, and the one recommended; printed, it is a table.

    Of the forms whose recall suffices it is the smallest, and none (``"exact"``) where comparing
    every row is as fast. ``rows`` of about ``total`` were indexed; ``existing`` are the indexes
    there are.
    """

    column: str
    rows: int
    total: int
    k: int
    forms: tuple[FormFigures, ...]
    recommended: str
    reason: str
    existing: tuple[str, ...]

    @property
    def migration(self) -> str:
        """The operations that build the recommended index, for ``upgrade()``."""
        return next(form.operation for form in self.forms if form.name == self.recommended)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"migration": self.migration}

    def __str__(self) -> str:
        filters = [each.filter for each in self.forms[0].measured]
        header = ["form", "size", "of column", "build"]
        for name in filters:
            header += [f"recall@{self.k}{'' if name is None else f' {name}'}", "ms"]
        lines = []
        for form in self.forms:
            line = [form.name, _megabytes(form.bytes), f"{form.share:.2f}", f"{form.seconds:.1f} s"]
            for each in form.measured:
                line += [f"{each.recall:.3f}", f"{each.milliseconds:.1f}"]
            lines.append(line)
        head = f"{self.column}: {self.rows:,} of about {self.total:,} rows"
        best = next(form for form in self.forms if form.name == self.recommended)
        size = _megabytes(best.bytes * self.total / max(self.rows, 1))
        tail = [f"recommended: {self.recommended} ({self.reason})"]
        if best.declaration:
            tail += [f"  about {size} on all rows", f"  {best.declaration}", self.migration]
        if self.existing:
            tail.append(f"  there are already: {', '.join(self.existing)}")
        return "\n".join([head, *in_columns([header, *lines]), *tail])


def _megabytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MB"


def advise_index(
    engine: sa.Engine,
    column: Any,
    *,
    filters: Mapping[str, sa.ColumnElement[bool]] | None = None,
    questions: Sequence[str] = (),
    sample: int = 20_000,
    queries: int = 50,
    k: int = 10,
    least: float = LEAST,
) -> Advice:
    """Measure which form of HNSW index suits a column.

    Searches are ``nearest`` with its defaults, for vectors of rows that are kept out of the sample,
    or for questions. A form is recommended where its recall reaches ``least`` without a filter and
    under each.

    Args:
        engine: where; the role needs to read the table and to make temporary tables.
        column: the vector column.
        filters: criteria by name, on the table's columns; by default up to two: equality with a
            common and a less common value of columns that an index begins with.
        questions: texts to search for, where the column has an encoder.
        sample: rows to index.
        queries: rows to search for, where there are no questions.
        k: neighbours compared.
        least: recall to reach.

    Raises:
        DeclarationError: it is not a vector column of a table, or has too few vectors.
    """
    base = base_of(clause_of(column)) if isinstance(clause_of(column), sa.ColumnElement) else None
    if base is None or not isinstance(base.type, VectorType):
        raise DeclarationError(
            f"advise_index() was given {shown(column)}, which is no vector column."
        )
    with engine.connect() as connection:
        try:
            bench, table = _Bench(connection, base, sample, questions, queries, k), base.table
            bench.filters.update(filters or bench.usual_filters())
            forms, name = tuple(bench.forms()), f"{table.fullname}.{base.name}"
            stored = vector_indexes(connection, table.name, base.name, schema=table.schema)
            existing = tuple(index.name for index in stored)
            total = max(bench.rows, round(catalog_rows.estimated_rows(connection, table)))
            return Advice(name, bench.rows, total, k, forms, *_recommended(forms, least), existing)
        finally:
            connection.rollback()


def _recommended(forms: Sequence[FormFigures], least: float) -> tuple[str, str]:
    plain, *indexed = forms
    fit = [form for form in indexed if form.recall >= least]
    if not fit:
        return "exact", f"no form reaches recall {least:g} under every filter"
    best = min(fit, key=lambda form: (form.bytes, form.milliseconds))
    if plain.milliseconds <= best.milliseconds:
        return "exact", "comparing every row is as fast on these rows, and needs no index"
    return best.name, f"the smallest whose recall is {least:g} or more under every filter"


class _Bench:
    """The temporary table of a sample, and what is searched for in it."""

    def __init__(
        self,
        connection: sa.Connection,
        base: sa.Column[Any],
        sample: int,
        questions: Sequence[str],
        queries: int,
        k: int,
    ) -> None:
        self.connection, self.base, self.k = connection, base, k
        #: Criteria by name, and the answers of exact search under each.
        self.filters: dict[str | None, sa.ColumnElement[bool] | None] = {None: None}
        self.exact: dict[str | None, list[Any]] = {}
        table, type_ = base.table, cast(Any, base.type)
        encoder = getattr(type_, "encoder", None)
        self.own = plain_type(type_.storage, type_.dimensions)
        self.similarity = getattr(encoder, "similarity", None)
        queries = 0 if questions else queries
        self.name = f"sbert_advice_{uuid.uuid4().hex[:12]}"
        keys = [c.name for c in table.primary_key]
        if not keys:
            raise DeclarationError(
                f"{table.fullname} has no primary key, which a sample is drawn by."
            )
        key_columns = [table.c[name] for name in keys]
        drawn = catalog_rows.sample(
            connection, table, keys, [*key_columns, base], where=[base.is_not(None)],
            size=sample + queries, seed=0,
        )  # fmt: skip
        self.vectors = [np.asarray(row[-1], dtype=np.float32) for row in drawn[:queries]]
        chosen = [tuple(row[:-1]) for row in drawn[queries:]]
        if not chosen:
            raise DeclarationError(f"{table.fullname}.{base.name} has too few vectors to measure.")
        self.rows = len(chosen)
        self._fill(key_columns, chosen)
        if questions:
            if encoder is None:
                raise DeclarationError(f"{base} has no encoder, so no question can be encoded.")
            self.vectors = query_vectors(encoder, list(questions))

    def _fill(self, keys: Sequence[sa.Column[Any]], chosen: Sequence[tuple[Any, ...]]) -> None:
        """Make the temporary table of the rows with these keys."""
        connection, table = self.connection, self.base.table
        connection.execute(copy_table(self.name, table.schema, table.name))
        copy = self.table()
        for i in range(0, len(chosen), _CHUNK):
            part = sa.select(*self.columns()).where(sa.tuple_(*keys).in_(chosen[i : i + _CHUNK]))
            connection.execute(sa.insert(copy).from_select([c.name for c in copy.c], part))
        connection.execute(system.ddl("ANALYZE %(fullname)s", copy))

    def table(self, options: Mapping[str, Any] | None = None) -> sa.Table:
        """The temporary table, with an index declared where there are options of one."""
        columns = [
            sa.Column(c.name, self.own if c is self.base else c.type, primary_key=c.primary_key)
            for c in self.columns()
        ]
        table = sa.Table(self.name, sa.MetaData(), *columns, schema="pg_temp")
        if options is not None:
            name, own = f"{self.name}_index", {"similarity": self.similarity, **options}
            hnsw_index(name, table.c[self.base.name], **own)
        return table

    def columns(self) -> list[sa.Column[Any]]:
        """The table's columns without its other vectors."""
        table: Any = self.base.table
        return [c for c in table.c if c is self.base or not isinstance(c.type, VectorType)]

    def usual_filters(self) -> dict[str, sa.ColumnElement[bool]]:
        """Equality with common values of the column that an index of the table begins with."""
        table: Any = self.base.table
        for name in self._leading():
            column = table.c[name]
            if column.primary_key or isinstance(column.type, (sa.LargeBinary, sa.JSON)):
                continue
            values = self._common_values(name)
            if len(values) > 1:
                return {
                    f"{name} = {value}"[:40]: column == sa.literal(value, column.type)
                    for value in (values[0], values[-1])
                }
        return {}

    def _leading(self) -> list[str]:
        """Columns that an index begins with, but vectors and texts."""
        table: Any = self.base.table
        schema = system.schema_in(self.connection, table.schema)
        indexes = sa.inspect(self.connection).get_indexes(table.name, schema=schema)
        first = (index["column_names"][0] for index in indexes if index["column_names"])
        names = {c.name for c in table.c if not isinstance(c.type, (VectorType, TSVECTOR))}
        return [name for name in dict.fromkeys(first) if name is not None and name in names]

    def _common_values(self, name: str) -> list[Any]:
        """Values of a column that a thousandth of the rows have at least, the commonest first."""
        own = self.table().c[name]
        rows = self.connection.execute(
            sa.select(own)
            .where(own.is_not(None))
            .group_by(own)
            .having(sa.func.count() >= max(2, self.rows // 1000))
            .order_by(sa.func.count().desc(), own)
            .limit(50)
        )
        return list(rows.scalars())

    def forms(self) -> list[FormFigures]:
        """Every form, exact search first."""
        options = self._options()
        plain = self.table(next(iter(options.values())))
        measured = tuple(self._measured(plain, name, exact=True) for name in self.filters)
        figures = [FormFigures(name="exact", measured=measured)]
        for name, own in options.items():
            figures.append(self._figures(name, own, figures))
        return figures

    def _options(self) -> dict[str, dict[str, Any]]:
        """The options of each form by its name."""
        type_: Any = self.base.type
        options: dict[str, dict[str, Any]] = {}
        if type_.dimensions <= 2000 or type_.storage != "vector":
            options["column"] = {}
        if type_.storage == "vector":
            options["halfvec"] = {"form": "halfvec"}
        width = type_.dimensions // 2
        if width >= 64:
            options[f"subvector {width}"] = {"form": "subvector", "dimensions": width}
        # Signs say nothing of lengths, which other distances count.
        if self.similarity in (None, "cosine"):
            vectors = self.table().c[self.base.name]
            average = sa.select(sa.func.avg(vectors, type_=vectors.type))
            mean = np.asarray(self.connection.execute(average).scalar_one()).tolist()
            options["binary"] = {"form": "binary"}
            options["binary, centred"] = {"form": "binary", "mean": mean}
        return options

    def _figures(
        self,
        form: str,
        options: Mapping[str, Any],
        before: Sequence[FormFigures],
    ) -> FormFigures:
        connection, base = self.connection, self.base
        table = self.table(options)
        (index,) = table.indexes
        started = time.perf_counter()
        connection.execute(sa.schema.CreateIndex(index))
        seconds = time.perf_counter() - started
        (stored,) = vector_indexes(connection, self.name, schema="pg_temp")
        measured = tuple(self._measured(table, name) for name in self.filters)
        connection.execute(sa.schema.DropIndex(index))
        full = next((f.bytes for f in before if f.name in ("column", "halfvec")), stored.bytes)
        name = f"ix_{base.table.name}_{base.name}_{stored.form}"[-63:]
        description: Any = description_of(index)
        element = repr(base.name)
        if description.expression is not None:
            element = f"sa.text({'(' + description.expression + ')'!r})"
        schema = f", schema={base.table.schema!r}" if base.table.schema else ""
        shown_options = "".join(
            f", {key}={stored.mean if key == 'mean' else json.dumps(value)}"
            for key, value in options.items()
        )
        return FormFigures(
            name=form,
            bytes=stored.bytes,
            share=stored.bytes / max(full, 1),
            seconds=seconds,
            measured=measured,
            declaration=f"hnsw_index({name!r}, {base.name!r}{shown_options})",
            operation=f"op.create_vector_index({name!r}, {base.table.name!r}, {element}, "
            f"using='hnsw', opclass={stored.opclass!r}, options={dict(stored.options)!r}{schema})",
        )

    def _measured(self, table: sa.Table, filter_: str | None, *, exact: bool = False) -> Measured:
        criterion = self.filters[filter_]
        where = [] if criterion is None else [on_copy(criterion, self.base.table, table)]
        column = table.c[self.base.name]
        answers, times = [], []
        for vector in self.vectors:
            statement: Any = nearest(column, vector, limit=self.k, where=where, exact=exact)
            similarity = list(statement.selected_columns)[-1]
            statement = sa.Select.with_only_columns(statement, similarity)
            started = time.perf_counter()
            answers.append(list(self.connection.execute(statement).scalars()))
            times.append(time.perf_counter() - started)
        if exact:
            self.exact[filter_] = answers
        pairs = zip(answers, self.exact[filter_], strict=True)
        recalls = [recall(a, np.asarray(e, dtype=np.float32), self.k) for a, e in pairs]
        value = mean(recalls)
        return Measured(filter_, 1.0 if value is None else value, 1000 * float(np.median(times)))
