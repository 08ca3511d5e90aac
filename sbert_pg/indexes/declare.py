"""``hnsw_index`` and its like: plain SQLAlchemy indexes with the options of their extension.

They are ordinary ``Index`` objects: given in ``__table_args__`` they are created with the table and
Alembic sees them. ``distance`` and ``nearest`` read off them which expression they serve.
"""

from __future__ import annotations

import hashlib
import math
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast, get_args

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import MappedColumn
from sqlalchemy.sql.elements import ColumnElement

from sbert_pg.distance import (
    MAX_INDEXED_DIMENSIONS,
    IndexMethod,
    Metric,
    Similarity,
    Storage,
    metric_of,
)
from sbert_pg.errors import DeclarationError
from sbert_pg.types.indexed import PROBED_FAR, Form, VectorIndex, quoted, signs, subvector
from sbert_pg.types.vector import HalfVector, VectorType, plain_type, vector_type

VectorColumn = sa.Column[Any] | MappedColumn[Any] | str
#: A predicate, or what makes it of the table, where there is none yet.
Predicate = ColumnElement[bool] | Callable[[sa.Table], ColumnElement[bool]]
#: Storage parameters, or what makes them of the column's type and the metric.
Options = Mapping[str, int | str] | Callable[[VectorType, Metric], Mapping[str, int | str]]

#: Forms that an access method can index.
_FORMS: dict[IndexMethod, tuple[Form, ...]] = {
    "hnsw": get_args(Form),
    "ivfflat": ("column", "halfvec", "binary"),
    "diskann": ("column",),
    "vchordrq": ("column", "halfvec"),
}
#: What makes an access method, where it is not pgvector.
_EXTENSIONS: dict[IndexMethod, str] = {"diskann": "pgvectorscale", "vchordrq": "VectorChord"}


def hnsw_index(
    name: str | None,
    column: VectorColumn,
    *,
    form: Form = "column",
    similarity: Similarity | None = None,
    m: int = 16,
    ef_construction: int = 256,
    dimensions: int | None = None,
    mean: Sequence[float] | None = None,
    where: Predicate | None = None,
) -> sa.Index:
    """An HNSW index on a vector column.

    Args:
        name: name of the index, or ``None`` for the metadata's naming convention.
        column: the column: its name, a ``Column``, or the result of ``embedding_column``.
        form: ``"column"`` as it is; ``"halfvec"`` cast to half precision, half the size at almost
            the same recall; ``"subvector"`` the first ``dimensions``, for encoders trained for
            that (Matryoshka); ``"binary"`` one bit a dimension. The last two find candidates, which
            are ranked by the column. ``sbert-pg index advise`` measures them.
        similarity: similarity function that the index orders by; the encoder's by default.
        m: connections a node, 2 to 100 (pgvector's default is 16).
        ef_construction: candidates while building, at least ``2 * m``. pgvector's default is 64,
            with which rows between two topics are missed, however far a search looks; 256 takes
            nearly twice as long to build as 128.
        dimensions: of the form ``"subvector"``, how many.
        mean: of the form ``"binary"``, the mean of the vectors, which is taken from them before
            their signs are: recall then suffers less where they share a direction. It is written
            into the index, so it stays as it is until the index is built again.
        where: predicate of a partial index, or a function that makes it of the table; see
            ``indexes_per`` for one index a tenant.

    Raises:
        DeclarationError: a parameter is out of its range; or, when the index meets its table, the
            column is not a vector column or is too wide for the form.
    """
    if not 2 <= m <= 100:
        raise DeclarationError(f"hnsw_index: m is {m}; pgvector takes 2 to 100.")
    if not 2 * m <= ef_construction <= 1000:
        raise DeclarationError(
            f"hnsw_index: ef_construction is {ef_construction}; pgvector takes {2 * m} (twice m) "
            "to 1000."
        )
    if (dimensions is not None) != (form == "subvector") or (mean is not None and form != "binary"):
        raise DeclarationError(
            f"hnsw_index: dimensions belongs to form='subvector' and mean to form='binary'; the "
            f"form is {form!r}."
        )
    options = {"m": m, "ef_construction": ef_construction}
    return vector_index(
        "hnsw", name, column, FormOf(form, dimensions, mean), similarity, options, where
    )


def ivfflat_index(
    name: str | None,
    column: VectorColumn,
    *,
    lists: int,
    form: Form = "column",
    similarity: Similarity | None = None,
    where: Predicate | None = None,
) -> sa.Index:
    """An IVFFlat index on a vector column; build it after the table has its rows.

    Args:
        name, column, form, similarity, where: as for ``hnsw_index``.
        lists: inverted lists, 1 to 32768; pgvector advises ``rows / 1000`` up to a million rows and
            ``sqrt(rows)`` beyond.

    Raises:
        DeclarationError: as ``hnsw_index``; or for manhattan distance, which IVFFlat lacks.
    """
    if not 1 <= lists <= 32_768:
        raise DeclarationError(f"ivfflat_index: lists is {lists}; pgvector takes 1 to 32768.")
    return vector_index("ivfflat", name, column, FormOf(form), similarity, {"lists": lists}, where)


def diskann_index(
    name: str | None,
    column: VectorColumn,
    *,
    similarity: Similarity | None = None,
    where: Predicate | None = None,
    **options: float | str,
) -> sa.Index:
    """A StreamingDiskANN index of pgvectorscale (extension ``vectorscale``).

    Its syntax and settings are taken from pgvectorscale 0.9; it was not tried on such a server.

    Args:
        name, column, similarity, where: as for ``hnsw_index``; no ``halfvec`` is indexed.
        **options: pgvectorscale's own, which its server judges: ``storage_layout``,
            ``num_neighbors``, ``search_list_size`` and ``max_alpha``.

    Raises:
        DeclarationError: as ``hnsw_index``; or for manhattan distance, which it lacks.
    """

    def stored(type_: VectorType, _: Metric) -> Mapping[str, int | str]:
        if type_.storage != "vector":
            raise DeclarationError(f"diskann_index: pgvectorscale has no index on {type_.storage}.")
        return {key: str(value) for key, value in options.items()}

    return vector_index("diskann", name, column, FormOf("column"), similarity, stored, where)


def vchordrq_index(
    name: str | None,
    column: VectorColumn,
    *,
    lists: Sequence[int] = (),
    probes: Sequence[int] | None = None,
    form: Form = "column",
    similarity: Similarity | None = None,
    where: Predicate | None = None,
) -> sa.Index:
    """A vchordrq index of VectorChord (extension ``vchord``, 1.1 or newer).

    Its syntax and settings are taken from VectorChord 1.1; it was not tried on such a server.
    Centroids are spherical for cosine and dot products, and residuals are quantised for euclidean
    distance, as VectorChord advises. ``probes`` are stored with the index, since VectorChord reads
    them while it plans, before a search can say anything.

    Args:
        name, column, similarity, where: as for ``hnsw_index``.
        lists: inverted lists at each level, fewer first; none up to some 100,000 rows.
        probes: lists to look into at each level; by default ``lists ** 0.9``.
        form: ``"column"``, or ``"halfvec"``.

    Raises:
        DeclarationError: as ``hnsw_index``; or for manhattan distance, which it lacks.
    """
    looked = [math.ceil(n**PROBED_FAR) for n in lists] if probes is None else list(probes)
    if len(looked) != len(lists):
        raise DeclarationError(
            f"vchordrq_index: probes is {looked!r}; give a number for each of the {len(lists)} "
            "levels of lists."
        )

    def options(_: VectorType, metric: Metric) -> Mapping[str, int | str]:
        residual = metric.similarity == "euclidean"
        text = ["residual_quantization = true"] if residual else []
        if lists:
            spherical = "false" if residual else "true"
            numbers = ", ".join(map(str, lists))
            text += ["[build.internal]", f"lists = [{numbers}]"]
            text.append(f"spherical_centroids = {spherical}")
        storage: dict[str, int | str] = {"options": "\n".join(text)} if text else {}
        return {**storage, "probes": ",".join(map(str, looked))} if looked else storage

    return vector_index("vchordrq", name, column, FormOf(form), similarity, options, where)


def indexes_per(
    column: VectorColumn,
    values: Iterable[Any],
    make: Callable[..., sa.Index],
    name: str,
    vectors: VectorColumn,
    **options: Any,
) -> list[sa.Index]:
    """A partial index for each of some values of a column, such as one a tenant.

    A search with ``where`` the column is one of the values is served by that value's index; rows of
    other values, such as small tenants, are in none, and a search among them compares each. An
    index that is taken out of the list, or added, is dropped or built by the next migration.

    ::

        __table_args__ = (
            *indexes_per("tenant_id", [1, 2, 3], hnsw_index, "ix_article_embedding", "embedding"),
        )

    Args:
        column: the column: its name, a ``Column``, or a mapped column.
        values: its values; a text is one.
        make: ``hnsw_index``, ``ivfflat_index``, ``diskann_index`` or ``vchordrq_index``.
        name: what the names of the indexes begin with; the value follows.
        vectors: the vector column.
        options: further arguments for ``make``; with ``where``, an index holds rows that meet both.

    Raises:
        DeclarationError: as ``make``; or, when an index meets its table, there is no such column.
    """
    values = [values] if isinstance(values, str) else values
    where = options.pop("where", None)

    def predicate(value: Any) -> Callable[[sa.Table], ColumnElement[bool]]:
        def rows_of(table: sa.Table) -> ColumnElement[bool]:
            real = column.column if isinstance(column, MappedColumn) else column
            key = real if isinstance(real, str) else real.key
            if key not in table.c:
                raise DeclarationError(f"indexes_per: {table.name} has no column {key!r}.")
            own: ColumnElement[bool] = table.c[key] == value
            rest = where(table) if callable(where) else where
            return own if rest is None else sa.and_(own, rest)

        return rows_of

    return [
        make(_name_for(name, value), vectors, where=predicate(value), **options) for value in values
    ]


def _name_for(name: str, value: Any) -> str:
    """A name that says a value; with a digest, where it cannot say all of it."""
    text = value.hex if isinstance(value, uuid.UUID) else str(value)
    word = re.sub(r"[^a-z0-9_]+", "_", text.lower())
    if word == text and len(f"{name}_{word}") <= 63:
        return f"{name}_{word}"
    digest = hashlib.blake2s(text.encode(), digest_size=4).hexdigest()
    return f"{name.encode()[:45].decode(errors='ignore')}_{word[:8]}_{digest}"


class FormOf(NamedTuple):
    """A form with what belongs to it."""

    name: Form
    dimensions: int | None = None
    mean: Sequence[float] | None = None


def vector_index(
    method: IndexMethod,
    name: str | None,
    column: VectorColumn,
    form: FormOf,
    similarity: Similarity | None,
    options: Options,
    where: Predicate | None,
) -> sa.Index:
    """A vector index of any access method; see the functions of their names."""
    if form.name not in _FORMS[method]:
        raise DeclarationError(
            f"{method}_index: form is {form.name!r}; use one of {', '.join(_FORMS[method])}."
        )
    index = sa.Index(
        name,
        column.column if isinstance(column, MappedColumn) else column,
        postgresql_using=method,
        postgresql_where=None if callable(where) else where,
    )

    def complete(index: sa.Index, table: sa.Table) -> None:
        # A column of a mapped class gets its name, and a name its column, when the table is made.
        real = next(iter(index.columns))
        expression, opclass, metric = _indexed(method, table, real, form, similarity)
        type_ = cast("VectorType", vector_type(real.type))
        storage = options(type_, metric) if callable(options) else options
        if form.name != "column":
            expression = expression.label(f"{real.key}_{form.name}")
            # In place, since copies to other metadata are made from a second name of the list.
            cast("list[Any]", index.expressions)[:] = [expression]
        own = index.dialect_options["postgresql"]
        own["ops"] = {expression.key: opclass}
        own["with"] = {key: quoted(value) for key, value in storage.items()}
        if callable(where):
            own["where"] = where(table)

    event.listen(index, "after_parent_attach", complete)
    if index.table is not None:
        complete(index, index.table)
    return index


def _require_width(where: str, width: int, kind: str, method: IndexMethod) -> None:
    limit = MAX_INDEXED_DIMENSIONS[kind]
    if width > limit and method not in _EXTENSIONS:
        raise DeclarationError(
            f"{where}: {width} dimensions are too many for an index on {kind}, which takes "
            f"{limit}. Use form='halfvec' (up to 4000) or form='binary' (up to 64000)."
        )


def _indexed(
    method: IndexMethod,
    table: sa.Table,
    column: sa.Column[Any],
    form: FormOf,
    similarity: Similarity | None,
) -> tuple[Any, str, Metric]:
    """The expression to index, the operator class for it, and the metric."""
    type_, where = vector_type(column.type), f"{method}_index on {table.name}.{column.name}"
    if type_ is None or type_.dimensions is None:
        raise DeclarationError(
            f"{where}: the column has type {column.type!r}; an index needs a vector column of "
            "known width, as embedding_column() or Vector(384) make it."
        )
    kinds = {"halfvec": "halfvec", "binary": "bit"}
    kind = kinds.get(form.name, type_.storage)
    width = form.dimensions or type_.dimensions
    _require_width(where, width, kind, method)
    if not 0 < width <= type_.dimensions or len(form.mean or [0] * width) != width:
        raise DeclarationError(
            f"{where}: the column has {type_.dimensions} dimensions; a subvector has fewer, and a "
            "mean as many."
        )
    metric = _metric(where, method, type_, similarity)
    if form.name == "binary":
        return signs(column, width, _centre(form.mean, type_.storage)), "bit_hamming_ops", metric
    if form.name == "halfvec":
        return sa.cast(column, HalfVector(width)), metric.opclass("halfvec"), metric
    expression: Any = column
    if form.name == "subvector":
        expression = subvector(column, plain_type(type_.storage, width))
    return expression, metric.opclass(type_.storage), metric


def _centre(mean: Sequence[float] | None, storage: Storage) -> Any:
    """A mean as PostgreSQL writes it back: four decimals say what side of it an element is on."""
    if mean is None:
        return None
    numbers = ",".join(f"{round(float(x), 4) + 0.0:g}" for x in mean)
    return sa.literal_column(f"'[{numbers}]'::{storage}", plain_type(storage, len(mean)))


def _metric(
    where: str, method: IndexMethod, type_: VectorType, similarity: Similarity | None
) -> Metric:
    spec = getattr(type_, "encoder", None)
    name = similarity or (spec.similarity if spec is not None else "cosine")
    metric = metric_of(name)
    if method not in metric.index_methods:
        raise DeclarationError(
            f"{where}: {_EXTENSIONS.get(method, 'pgvector')} has no {method} operator class for "
            f"{name} distance; use "
            f"{' or '.join(f'{other}_index' for other in metric.index_methods)}."
        )
    return metric


def index_like(index: VectorIndex, column: sa.Column[Any], name: str) -> sa.Index:
    """An index of the same kind on another column, with the metric of that column's encoder.

    What was chosen for the vectors of one column, the mean of signs and fewer dimensions, does not
    go to another's: signs are then taken as they are, and the column is indexed whole.
    """
    own = column.name == index.column
    form: Form = "column" if index.form == "subvector" and not own else index.form
    where = None if index.where is None else sa.literal_column(index.where, sa.Boolean())
    if index.method == "hnsw":
        options = index.effective_options
        m = int(options["m"])
        return hnsw_index(
            name,
            column,
            form=form,
            m=m,
            ef_construction=max(int(options["ef_construction"]), 2 * m),
            dimensions=index.width if own else None,
            mean=index.mean if own else None,
            where=where,
        )
    return vector_index(index.method, name, column, FormOf(form), None, index.options, where)


def index_name(existing: str, old: str, new: str, table: str) -> str:
    """A name for the new column's index: the old one's with the column's name put in place.

    Cut to PostgreSQL's 63 bytes with the column's end kept, since that is what differs.
    """
    pattern = rf"(?<![a-z0-9]){re.escape(old)}(?![a-z0-9])"
    name, found = re.subn(pattern, lambda _: new, existing)
    if not found:
        name = f"ix_{table}_{new}"
    if name == existing or len(name.encode()) > 63:
        name = f"ix_{table}"[: 62 - len(new)] + f"_{new}"
    return name[-63:]
