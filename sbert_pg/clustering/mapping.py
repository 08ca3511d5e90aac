"""A map of the rows in two dimensions, coloured by cluster: one HTML page, or a picture."""

from __future__ import annotations

import colorsys
import html
import importlib.util
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.kmeans import need, normalize
from sbert_pg.clustering.rows import Block, RowSet, read_rows, wire_key
from sbert_pg.clustering.tables import title_of
from sbert_pg.errors import ClusteringError, DeclarationError
from sbert_pg.spec import Vectors

Projection = Literal["auto", "tsne", "umap", "pca"]

#: Rows on a map; more are hard to look at and slow to project.
SAMPLE_ROWS = 5_000
#: Rows whose place is stored: what a browser still draws at once.
STORED_ROWS = 100_000
#: Projected rows that another row stands between.
_NEIGHBOURS = 3
#: Rows that are compared with the projected ones at a time.
_TOGETHER = 2_000
#: Characters of a text that the map shows.
TEXT_LENGTH = 240
#: Principal components that t-SNE and UMAP begin with.
_COMPONENTS = 50
#: Angle between two colours: the golden angle keeps many of them apart.
_HUE_STEP = 0.381966


@dataclass(frozen=True)
class ClusterMap:
    """Rows on a plane.

    Attributes:
        title: what it shows.
        points: float array of shape ``(n, 2)``, within the unit square.
        numbers: cluster number of each row, or ``None``.
        texts: the beginning of each row's text.
        clusters: ``(number, label, size)`` of each cluster, largest first.
        projection: how it was projected.
        rows: rows of the run; the map shows a sample where there are more than on it.
    """

    title: str
    points: npt.NDArray[np.float64]
    numbers: list[int | None]
    texts: list[str]
    clusters: list[tuple[int, str, int]]
    projection: str
    rows: int

    def html(self) -> str:
        """One page with everything in it; hovering shows a row's text, the legend hides
        clusters.
        """
        shades = colours(len(self.clusters))
        legend: list[dict[str, Any]] = [
            {"number": number, "label": label, "size": size, "colour": colour}
            for (number, label, size), colour in zip(self.clusters, shades, strict=True)
        ]
        if None in self.numbers:
            outliers = self.numbers.count(None)
            legend.append({"number": None, "label": "outliers", "size": outliers, "colour": ""})
        points = [
            [round(float(x), 4), round(float(y), 4), number, text]
            for (x, y), number, text in zip(self.points, self.numbers, self.texts, strict=True)
        ]
        data = json.dumps({"points": points, "clusters": legend}, ensure_ascii=False)
        part = f"{len(points):,} of " if len(points) < self.rows else ""
        note = f"{part}{self.rows:,} rows, projected by {self.projection}"
        page = resources.files("sbert_pg.clustering").joinpath("map.html").read_text("utf-8")
        # The data comes last, so that nothing in it is taken for a place to fill in.
        return (
            page.replace("{{title}}", html.escape(self.title))
            .replace("{{note}}", html.escape(note))
            .replace("{{data}}", data.replace("<", "\\u003c"))
        )

    def save_html(self, path: Path | str) -> None:
        """Write the page."""
        Path(path).write_text(self.html(), encoding="utf-8")

    def save_png(self, path: Path | str) -> None:
        """Draw a picture of 1,500 dots, the largest clusters with their labels at their middle."""
        figures = need("matplotlib.figure", "draw a map", "map")
        figure = figures.Figure(figsize=(10, 10), layout="constrained")
        axes = figure.add_subplot()
        numbers = np.array([-1 if number is None else number for number in self.numbers])
        dot = max(2.0, 20_000 / max(len(numbers), 1) ** 1.05)
        outside = numbers < 0
        axes.scatter(*self.points[outside].T, s=dot, c="#9ca3af", alpha=0.5, linewidths=0)
        coloured = zip(self.clusters, colours(len(self.clusters)), strict=True)
        for rank, ((number, label, _), colour) in enumerate(coloured):
            inside = self.points[numbers == number]
            if not len(inside):
                continue
            axes.scatter(*inside.T, s=dot, c=colour, alpha=0.75, linewidths=0)
            if rank < 25:
                axes.annotate(
                    label[:32],
                    np.median(inside, axis=0),
                    ha="center",
                    fontsize=7,
                    bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.7},
                )
        axes.set_title(self.title)
        axes.set_axis_off()
        figure.savefig(path, dpi=150, format="png")


def cluster_map(
    connection: sa.Connection,
    clustering: Clustering,
    *,
    rows: int = SAMPLE_ROWS,
    projection: Projection = "auto",
    text: sa.ColumnElement[str] | None = None,
    title: str | None = None,
) -> ClusterMap:
    """Project the rows of the current run onto a plane.

    Args:
        connection: a connection in a transaction.
        clustering: what is clustered.
        rows: rows to show at most; a sample by a hash of the keys is drawn where there are more.
        projection: ``"umap"`` (needs umap-learn), ``"tsne"`` or ``"pca"``; ``"auto"`` is UMAP where
            it is installed, else t-SNE.
        text: the text of a row; the source of an embedding column by default, else its key.
        title: title of the map.

    Raises:
        ClusteringError: there is no current run.
        DeclarationError: a projection of another name.
        MissingExtraError: scikit-learn or umap-learn is needed and not installed.
    """
    run = clustering.require_current(connection)
    keys, vectors = _rows_of(connection, clustering, run, rows)
    points, name = project(vectors, projection)
    by_key = _places(connection, clustering, run.id, _shown(clustering, run, rows), text)
    c = clustering.Cluster
    clusters = connection.execute(
        clustering.clusters().with_only_columns(c.number, c.label, c.size)
    )
    places = [by_key.get(key, (None, "")) for key in keys.tuples()]
    return ClusterMap(
        title=title or f"{clustering.rows.name} by {clustering.column.name}",
        points=points,
        numbers=[number for number, _ in places],
        texts=[text for _, text in places],
        clusters=[(row.number, title_of(row), row.size) for row in clusters],
        projection=name,
        rows=run.rows,
    )


def store_map(
    connection: sa.Connection,
    clustering: Clustering,
    *,
    rows: int = STORED_ROWS,
    projection: Projection = "auto",
) -> int:
    """Project the rows of the current run onto a plane, and keep their places with the run.

    ``SAMPLE_ROWS`` of them are projected; each other one is placed between those that it is most
    similar to. ``Assignment.x`` and ``.y`` have the places, ``ClusterRun.projection`` says how.

    Args:
        connection: a connection in a transaction.
        clustering: what is clustered.
        rows: rows to place at most, a sample by a hash of the keys.
        projection: as in ``cluster_map``.

    Returns:
        Rows that were placed.

    Raises:
        ClusteringError: there is no current run, or it has no rows left.
        DeclarationError: a projection of another name.
        MissingExtraError: scikit-learn or umap-learn is needed and not installed.
    """
    run = clustering.require_current(connection)
    keys, vectors = _rows_of(connection, clustering, run, rows)
    chosen = np.sort(np.random.default_rng(0).permutation(len(keys))[:SAMPLE_ROWS])
    points, name = project(vectors[chosen], projection)
    places = _between(vectors, vectors[chosen], points)
    places[chosen] = points
    assignment, runs = clustering.assignment_table, clustering.run_table
    mine = assignment.c.run_id == run.id
    connection.execute(sa.update(assignment).where(mine).values(x=None, y=None))
    names = [f"key{number}" for number in range(len(clustering.row_keys))]
    columns = [*keys.columns, *places.T]
    types = [*(wire_key(key).type for key in clustering.row_keys), sa.REAL(), sa.REAL()]
    placed = sa.func.unnest(
        *(sa.cast(c.tolist(), ARRAY(t)) for c, t in zip(columns, types, strict=True))
    ).table_valued(*(sa.column(n, t) for n, t in zip([*names, "x", "y"], types, strict=True)))
    placed = placed.render_derived(name="placed")
    same = [wire_key(k) == placed.c[n] for k, n in zip(clustering.row_keys, names, strict=True)]
    connection.execute(sa.update(assignment).where(mine, *same).values(x=placed.c.x, y=placed.c.y))
    connection.execute(sa.update(runs).where(runs.c.id == run.id).values(projection=name))
    return len(keys)


def mapped_rows(clustering: Clustering) -> sa.Select[Any]:
    """Cluster's id, ``x``, ``y`` and key of each row of the current run that has a place."""
    assignment, run = clustering.assignment_table, clustering.run_table
    return (
        sa.select(assignment.c.cluster_id, assignment.c.x, assignment.c.y, *clustering.row_keys)
        .join(run, run.c.id == assignment.c.run_id)
        .where(clustering.is_current(), assignment.c.x.is_not(None))
    )


def _rows_of(
    connection: sa.Connection, clustering: Clustering, run: sa.Row[Any], rows: int
) -> Block:
    """Keys and vectors of at most so many rows of a run; refused where it has none left."""
    keys, vectors = read_rows(connection, _shown(clustering, run, rows))
    if len(keys) == 0:
        raise ClusteringError(f"The current run of {clustering.column} has no rows left to show.")
    if clustering.metric == "cosine":
        normalize(vectors)
    return keys, vectors


def _shown(clustering: Clustering, run: sa.Row[Any], rows: int) -> RowSet:
    placed = clustering.is_placed(run.id).correlate(clustering.rows)
    spherical = clustering.metric == "cosine"
    return RowSet(clustering.column, [placed], spherical).sample(rows, run.rows)


def _between(
    vectors: Vectors, projected: Vectors, points: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Each vector's place: the mean of those of its nearest, nearer ones counting for more."""
    count = min(_NEIGHBOURS, len(projected))
    places = np.empty((len(vectors), 2))
    squares = (projected**2).sum(axis=1)
    for start in range(0, len(vectors), _TOGETHER):
        block = vectors[start : start + _TOGETHER]
        distances = squares + (block**2).sum(axis=1)[:, None] - 2 * block @ projected.T
        near = np.argpartition(distances, count - 1, axis=1)[:, :count]
        weights = 1 / (np.maximum(np.take_along_axis(distances, near, axis=1), 0) + 1e-6)
        weights /= weights.sum(axis=1, keepdims=True)
        places[start : start + _TOGETHER] = (weights[..., None] * points[near]).sum(axis=1)
    return places


def project(
    vectors: npt.NDArray[np.float32], projection: Projection
) -> tuple[npt.NDArray[np.float64], str]:
    """Vectors on the unit square, and how they came there."""
    if projection not in ("auto", "tsne", "umap", "pca"):
        raise DeclarationError(
            f"The projection is {projection!r}; use 'auto', 'tsne', 'umap' or 'pca'."
        )
    if projection == "auto":
        projection = "umap" if importlib.util.find_spec("umap") is not None else "tsne"
    # Equal rows are one point: neighbour embeddings fail on them, scikit-learn's t-SNE by a crash.
    vectors, positions = np.unique(vectors, axis=0, return_inverse=True)
    if len(vectors) < 4:
        projection = "pca"
    decomposition = need("sklearn.decomposition", "project rows onto a map", "map")
    components = min(2 if projection == "pca" else _COMPONENTS, *vectors.shape)
    reduced = np.zeros((1, 2))
    if len(vectors) > 1:
        reduced = decomposition.PCA(components, random_state=0).fit_transform(vectors)
    if projection == "umap":
        umap = need("umap", "project rows onto a map by UMAP", "map")
        reduced = umap.UMAP(metric="euclidean", random_state=0).fit_transform(reduced)
    elif projection == "tsne":
        manifold = need("sklearn.manifold", "project rows onto a map", "map")
        perplexity = min(30.0, (len(vectors) - 1) / 3)
        reduced = manifold.TSNE(2, init="pca", perplexity=perplexity, random_state=0).fit_transform(
            reduced
        )
    plane = np.zeros((len(vectors), 2))
    plane[:, : reduced.shape[1]] = reduced[:, :2]
    low, high = plane.min(axis=0), plane.max(axis=0)
    names = {"umap": "UMAP", "tsne": "t-SNE", "pca": "principal components"}
    points = (plane - low) / np.maximum(high - low, 1e-12).max()
    return points[positions.ravel()], names[projection]


def _places(
    connection: sa.Connection,
    clustering: Clustering,
    run_id: int,
    rows: RowSet,
    text: sa.ColumnElement[str] | None,
) -> dict[tuple[Any, ...], tuple[int | None, str]]:
    """Number of the cluster and beginning of the text of each row, by key as it travels."""
    assignment, cluster = clustering.assignment_table, clustering.cluster_table
    text = clustering.text if text is None else text
    shown: Any = sa.func.concat_ws(", ", *rows.keys) if text is None else text
    statement = (
        sa.select(*rows.wire_keys, cluster.c.number, sa.func.left(shown, TEXT_LENGTH))
        .join_from(clustering.rows, assignment, clustering.row_is_assigned())
        .outerjoin(cluster, cluster.c.id == assignment.c.cluster_id)
        .where(assignment.c.run_id == run_id, *rows.criteria)
    )
    return {
        tuple(key): (number, text or "") for *key, number, text in connection.execute(statement)
    }


def colours(number: int) -> list[str]:
    """Colours for so many clusters, each far from the one before."""
    return [
        hex_colour((0.58 + rank * _HUE_STEP) % 1.0, (0.45, 0.58, 0.36)[rank % 3], 0.62)
        for rank in range(number)
    ]


def hex_colour(hue: float, lightness: float, saturation: float) -> str:
    """A colour as pages have it, from three shares."""
    parts = colorsys.hls_to_rgb(hue, lightness, saturation)
    return "#" + "".join(f"{int(255 * part):02x}" for part in parts)
