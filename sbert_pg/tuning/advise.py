"""``advise_index``: build every form of index on a sample of the rows, measure, recommend one.

The sample is a temporary table that is gone when the transaction is rolled back, so nothing of the
database changes. Its size decides what is measured: recall of an index falls a little, and its
advantage over comparing every row grows, with the number of rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.errors import DeclarationError
from sbert_pg.indexes import hnsw_index, vector_indexes
from sbert_pg.search import exact, nearest
from sbert_pg.tuning.bench import Bench
from sbert_pg.tuning.files import in_columns
from sbert_pg.tuning.searches import on_copy
from sbert_pg.types.comparator import base_of, clause_of
from sbert_pg.types.indexed import description_of
from sbert_pg.types.vector import VectorType, shown

#: Recall that a form has to reach, under every filter, to be recommended.
LEAST = 0.98


@dataclass(frozen=True, slots=True)
class Measured:
    """Recall@k against exact search, and median milliseconds of a search, under one filter."""

    filter: str | None
    recall: float
    milliseconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FormFigures:
    """A form of index, as it was measured.

    Attributes:
        name: ``"exact"`` (no index), ``"column"``, ``"halfvec"``, ``"subvector 128"``, ``"binary"``
            or ``"binary, centred"``.
        bytes: its size on the sample.
        share: its size as a share of that of the form ``"column"``; of ``"halfvec"`` where a column
            is too wide for the other.
        seconds: time to build it on the sample.
        measured: without a filter first, then under each.
        declaration: what declares it; ``""`` for none.
        operation: the migration that builds it; ``""`` for none.
    """

    name: str
    bytes: int
    share: float
    seconds: float
    measured: tuple[Measured, ...]
    declaration: str
    operation: str

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

    Attributes:
        column: the column, ``table.column``.
        rows: rows that were indexed, of ``total``.
        total: rows of the table, as estimated.
        k: neighbours compared.
        forms: what was measured.
        recommended: the name of a form: of those whose recall suffices the smallest, and none
            (``"exact"``) where comparing every row is as fast.
        reason: why.
        existing: names of the vector indexes that are there.
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


class _Form(NamedTuple):
    """A form: its name, what makes it, and what declares it after the column's name."""

    name: str
    make: Callable[[str], sa.Index]
    arguments: str


def advise_index(
    engine: sa.Engine,
    column: Any,
    *,
    filters: Mapping[str, sa.ColumnElement[bool]] | None = None,
    questions: Sequence[str] = (),
    sample: int = 20_000,
    queries: int = 50,
    k: int = 10,
    m: int = 16,
    ef_construction: int = 256,
    least: float = LEAST,
    seed: int = 0,
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
        m: of every index.
        ef_construction: of every index.
        least: recall to reach.
        seed: another seed takes another sample.

    Raises:
        DeclarationError: it is not a vector column of a table, or has too few vectors.
    """
    clause = clause_of(column)
    base = base_of(clause) if isinstance(clause, sa.ColumnElement) else None
    if (
        base is None
        or not isinstance(base.type, VectorType)
        or not isinstance(base.table, sa.Table)
    ):
        raise DeclarationError(
            f"advise_index() was given {shown(column)}, which is no vector column."
        )
    with engine.connect() as connection:
        try:
            bench = Bench(connection, base, sample, queries if not questions else 0, seed)
            bench.take_queries(questions)
            measuring = _Measuring(bench, filters or bench.usual_filters(), k)
            forms = measuring.forms(m, ef_construction)
            existing = vector_indexes(
                connection, base.table.name, base.name, schema=base.table.schema
            )
            recommended, reason = _recommended(forms, least)
            return Advice(
                f"{base.table.fullname}.{base.name}",
                bench.rows,
                max(bench.rows, round(catalog_rows.estimated_rows(connection, base.table))),
                k,
                tuple(forms),
                recommended,
                reason,
                tuple(index.name for index in existing),
            )
        finally:
            connection.rollback()


def _recommended(forms: Sequence[FormFigures], least: float) -> tuple[str, str]:
    by_name = {form.name: form for form in forms}
    plain = by_name["exact"]
    fit = [form for form in forms if form.name != "exact" and form.recall >= least]
    if not fit:
        return "exact", f"no form reaches recall {least:g} under every filter"
    best = min(fit, key=lambda form: (form.bytes, form.milliseconds))
    if plain.milliseconds <= best.milliseconds:
        return "exact", "comparing every row is as fast on these rows, and needs no index"
    return best.name, f"the smallest whose recall is {least:g} or more under every filter"


class _Measuring:
    """Measures forms on a bench, against exact search under each filter."""

    def __init__(self, bench: Bench, filters: Mapping[str, sa.ColumnElement[bool]], k: int) -> None:
        self.bench, self.k = bench, k
        self.filters: dict[str | None, sa.ColumnElement[bool] | None] = {None: None}
        self.filters.update(filters)
        type_: Any = bench.base.type
        self.similarity = type_.encoder.similarity if hasattr(type_, "encoder") else None
        self.dimensions: int = type_.dimensions
        self.storage: str = type_.storage
        self.exact: dict[str | None, list[Any]] = {}

    def forms(self, m: int, ef_construction: int) -> list[FormFigures]:
        """Every form, exact search first."""
        makers = self._makers(m, ef_construction)
        plain = self.bench.table(makers[0].make)
        figures = [
            FormFigures(
                name="exact",
                bytes=0,
                share=0.0,
                seconds=0.0,
                measured=tuple(self._measured(plain, name, None) for name in self.filters),
                declaration="",
                operation="",
            )
        ]
        for form in makers:
            figures.append(self._figures(form, figures))
        return figures

    def _makers(self, m: int, ef_construction: int) -> list[_Form]:
        column = self.bench.base.name
        common: dict[str, Any] = {"m": m, "ef_construction": ef_construction}
        if self.similarity is not None:
            common["similarity"] = self.similarity

        def form(name: str, arguments: str, **options: Any) -> _Form:
            return _Form(
                name, lambda index: hnsw_index(index, column, **options, **common), arguments
            )

        makers = [form("column", "")] if self.dimensions <= 2000 or self.storage != "vector" else []
        if self.storage == "vector":
            makers.append(form("halfvec", ', form="halfvec"', form="halfvec"))
        width = self.dimensions // 2
        if width >= 64:
            arguments = f', form="subvector", dimensions={width}'
            makers.append(form(f"subvector {width}", arguments, form="subvector", dimensions=width))
        # Signs say nothing of lengths, which other distances count.
        if self.similarity in (None, "cosine"):
            makers.append(form("binary", ', form="binary"', form="binary"))
            vectors = self.bench.table().c[column]
            average = sa.select(sa.func.avg(vectors, type_=vectors.type))
            mean = np.asarray(self.bench.connection.execute(average).scalar_one()).tolist()
            arguments = ', form="binary", mean=MEAN'
            makers.append(form("binary, centred", arguments, form="binary", mean=mean))
        return makers

    def _figures(self, form: _Form, before: Sequence[FormFigures]) -> FormFigures:
        connection = self.bench.connection
        table = self.bench.table(form.make)
        (index,) = table.indexes
        started = time.perf_counter()
        connection.execute(sa.schema.CreateIndex(index))
        seconds = time.perf_counter() - started
        (stored,) = vector_indexes(connection, self.bench.name, schema="pg_temp")
        measured = tuple(self._measured(table, name, form) for name in self.filters)
        connection.execute(sa.schema.DropIndex(index))
        full = next((f.bytes for f in before if f.name in ("column", "halfvec")), stored.bytes)
        base: Any = self.bench.base
        name = f"ix_{base.table.name}_{base.name}_{stored.form}"[-63:]
        description: Any = description_of(index)
        element = repr(base.name)
        if description.expression is not None:
            element = f"sa.text({'(' + description.expression + ')'!r})"
        schema = f", schema={base.table.schema!r}" if base.table.schema else ""
        operation = (
            f"op.create_vector_index({name!r}, {base.table.name!r}, {element}, "
            f"using='hnsw', opclass={stored.opclass!r}, options={dict(stored.options)!r}{schema})"
        )
        arguments = form.arguments
        if stored.mean is not None:
            arguments = arguments.replace("MEAN", f"{stored.mean}")
        declaration = f"hnsw_index({name!r}, {base.name!r}{arguments})"
        return FormFigures(
            name=form.name,
            bytes=stored.bytes,
            share=stored.bytes / max(full, 1),
            seconds=seconds,
            measured=measured,
            declaration=declaration,
            operation=operation,
        )

    def _measured(self, table: sa.Table, filter_: str | None, form: _Form | None) -> Measured:
        criterion = self.filters[filter_]
        where = [] if criterion is None else [on_copy(criterion, self.bench.base.table, table)]
        column = table.c[self.bench.base.name]
        answers, times = [], []
        for vector in self.bench.vectors:
            statement: Any = nearest(column, vector, limit=self.k, where=where, exact=form is None)
            similarity = list(statement.selected_columns)[-1]
            statement = sa.Select.with_only_columns(statement, similarity)
            started = time.perf_counter()
            answers.append(list(self.bench.connection.execute(statement).scalars()))
            times.append(time.perf_counter() - started)
        if form is None:
            self.exact[filter_] = answers
        pairs = zip(answers, self.exact[filter_], strict=True)
        recalls = [exact.recall(a, np.asarray(e, dtype=np.float32), self.k) for a, e in pairs]
        value = exact.mean(recalls)
        return Measured(filter_, 1.0 if value is None else value, 1000 * float(np.median(times)))
