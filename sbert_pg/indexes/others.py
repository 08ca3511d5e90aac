"""``diskann_index`` and ``vchordrq_index``: indexes of other extensions on pgvector's columns.

What they render is taken from the sources of pgvectorscale 0.9 and VectorChord 1.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import sqlalchemy as sa

from sbert_pg.distance import Metric, Similarity
from sbert_pg.errors import DeclarationError
from sbert_pg.indexes.declare import FormOf, Predicate, VectorColumn, vector_index
from sbert_pg.types.indexed import PROBED_FAR, Form
from sbert_pg.types.vector import VectorType


def diskann_index(
    name: str | None,
    column: VectorColumn,
    *,
    similarity: Similarity | None = None,
    storage_layout: Literal["memory_optimized", "plain"] = "memory_optimized",
    num_neighbors: int = 50,
    search_list_size: int = 100,
    max_alpha: float = 1.2,
    where: Predicate | None = None,
) -> sa.Index:
    """A StreamingDiskANN index of pgvectorscale (extension ``vectorscale``).

    Its syntax and settings are taken from pgvectorscale 0.9; it was not tried on such a server.

    Args:
        name: name of the index, or ``None`` for the metadata's naming convention.
        column: a column of type ``vector``; pgvectorscale indexes no ``halfvec``.
        storage_layout: compressed, or ``"plain"``, up to 2,000 dimensions and not for dot products.
        num_neighbors: connections a node, 10 to 1000.
        search_list_size: candidates while building, 10 to 1000.
        max_alpha: how far the graph is pruned, 1 to 5.
        similarity, where: as for ``hnsw_index``.

    Raises:
        DeclarationError: as ``hnsw_index``; or for manhattan distance, which it lacks.
    """
    ranges = {
        "num_neighbors": (num_neighbors, 10, 1000),
        "search_list_size": (search_list_size, 10, 1000),
        "max_alpha": (max_alpha, 1, 5),
    }
    for option, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise DeclarationError(
                f"diskann_index: {option} is {value}; pgvectorscale takes {least} to {most}."
            )
    if storage_layout not in ("memory_optimized", "plain"):
        raise DeclarationError(
            f"diskann_index: storage_layout is {storage_layout!r}; use 'memory_optimized' or "
            "'plain'."
        )

    def options(type_: VectorType, metric: Metric) -> Mapping[str, int | str]:
        if type_.storage != "vector":
            raise DeclarationError(f"diskann_index: pgvectorscale has no index on {type_.storage}.")
        wide = (type_.dimensions or 0) > 2_000
        if storage_layout == "plain" and (wide or metric.similarity == "dot"):
            raise DeclarationError(
                "diskann_index: storage_layout 'plain' takes up to 2000 dimensions, and no dot "
                "products; use 'memory_optimized'."
            )
        numbers = {option: f"{value:g}" for option, (value, _, _) in ranges.items()}
        return {"storage_layout": storage_layout, **numbers}

    return vector_index("diskann", name, column, FormOf("column"), similarity, options, where)


def vchordrq_index(
    name: str | None,
    column: VectorColumn,
    *,
    lists: Sequence[int] = (),
    probes: Sequence[int] | None = None,
    build_threads: int | None = None,
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
        name: name of the index, or ``None`` for the metadata's naming convention.
        column: the column, as for ``hnsw_index``.
        lists: inverted lists at each level, fewer first; none up to some 100,000 rows.
        probes: lists to look into at each level; by default ``lists ** 0.9``.
        build_threads: threads that cluster while building, 1 to 255; VectorChord's default is 1.
        form: ``"column"``, or ``"halfvec"``.
        similarity, where: as for ``hnsw_index``.

    Raises:
        DeclarationError: as ``hnsw_index``; or for manhattan distance, which it lacks.
    """
    looked = [math.ceil(n**PROBED_FAR) for n in lists] if probes is None else list(probes)
    _check_lists(lists, looked, build_threads)

    def options(_: VectorType, metric: Metric) -> Mapping[str, int | str]:
        residual, internal = metric.similarity == "euclidean", []
        if lists:
            spherical = "false" if residual else "true"
            numbers = ", ".join(map(str, lists))
            internal = [f"lists = [{numbers}]", f"spherical_centroids = {spherical}"]
        if build_threads is not None:
            internal.append(f"build_threads = {build_threads}")
        text = ["residual_quantization = true"] if residual else []
        text += ["[build.internal]", *internal] if internal else []
        storage: dict[str, int | str] = {"options": "\n".join(text)} if text else {}
        return {**storage, "probes": ",".join(map(str, looked))} if looked else storage

    return vector_index("vchordrq", name, column, FormOf(form), similarity, options, where)


def _check_lists(lists: Sequence[int], probes: Sequence[int], build_threads: int | None) -> None:
    if list(lists) != sorted(lists) or not all(1 <= n <= 1 << 24 for n in lists) or len(lists) > 8:
        raise DeclarationError(
            f"vchordrq_index: lists is {lists!r}; VectorChord takes up to 8 numbers that grow, "
            "from 1 to 16777216."
        )
    if build_threads is not None and not 1 <= build_threads <= 255:
        raise DeclarationError(
            f"vchordrq_index: build_threads is {build_threads}; VectorChord takes 1 to 255."
        )
    if len(probes) != len(lists) or any(n < 1 for n in probes):
        raise DeclarationError(
            f"vchordrq_index: probes is {list(probes)!r}; give a number for each of the "
            f"{len(lists)} levels of lists."
        )
