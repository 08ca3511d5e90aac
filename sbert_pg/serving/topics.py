"""The page of topics: clusters, what became of those before, and whether they still fit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg.clustering import Clustering, drift, flows, run_before
from sbert_pg.clustering.tables import EXEMPLAR_PREFIX
from sbert_pg.serving.comparing import cut, excerpt
from sbert_pg.serving.exposed import Exposed, Found
from sbert_pg.serving.html import Html, h, table
from sbert_pg.serving.states import MEASURED_ROWS

#: Rows of a cluster, and flows between two runs, that are listed.
LISTED = 20


def overview(connection: sa.Connection, exposed: Exposed, topics: Clustering) -> Iterator[Any]:
    """The current clusters, largest first, and how the run came about."""
    run = topics.require_current(connection)
    clusters = Session(connection).scalars(topics.clusters()).all()
    typical = exposed.rows(connection, [exposed.key_of(_exemplar(topics, c)) for c in clusters])
    rows_by_key = {found.key: found for found in typical}
    largest = max((c.size for c in clusters), default=1)
    yield h(
        "p", f"{len(clusters)} clusters of {run.rows:,} rows by {run.algorithm}, "
        f"{run.outliers:,} outliers; run {run.id} of {run.started_at:%Y-%m-%d %H:%M}.",
    )  # fmt: skip
    yield [h("p", warning, class_="advice") for warning in run.warnings]
    small = (run.rows or 0) <= MEASURED_ROWS
    if small:
        yield from _fit(connection, exposed, topics)
    else:
        command = h("code", f"sbert-pg cluster assign {exposed.name} --check", class_="command")
        yield h("p", command, " says whether they still fit.", class_="faint")
    yield h("ol", [_topic(c, exposed, rows_by_key.get(exposed.key_of(_exemplar(topics, c))),
                          largest) for c in clusters], class_="topics")  # fmt: skip
    before = run_before(connection, topics, run.id)
    if before is not None and small:
        yield from _flows(connection, topics, before, run)


def members(
    connection: sa.Connection, exposed: Exposed, topics: Clustering, number: int, name: str
) -> Iterator[Any]:
    """Rows of a cluster, nearest to its centroid first, and the command that gives it a name."""
    session = Session(connection)
    cluster = session.scalars(topics.clusters().where(topics.Cluster.number == number)).first()
    if cluster is None:
        yield h("p", f"There is no current cluster {number}.", class_="fault", role="alert")
        return
    mapper = sa.inspect(topics.entity)
    properties = [mapper.get_property_by_column(key).key for key in topics.keys]
    members = session.execute(topics.members(cluster).limit(LISTED)).all()
    keys = [exposed.key_of([getattr(row, each) for each in properties]) for row, _ in members]
    yield h("h2", cluster.label or f"cluster {number}", dir="auto")
    yield h("p", f"{cluster.size:,} rows; the {len(keys)} nearest to their middle.",
            class_="faint")  # fmt: skip
    yield _renaming(exposed, number, name.strip())
    rows = exposed.rows(connection, keys)
    shown = ([cut(row.row[c]) if row.row[c] is not None else None for c in exposed.columns]
             for row in rows)  # fmt: skip
    yield table(exposed.columns, shown)


def _renaming(exposed: Exposed, number: int, name: str) -> Iterator[Html]:
    yield h(
        "form",
        h("input", type="hidden", name="table", value=exposed.name),
        h("input", type="hidden", name="number", value=number),
        h("input", name="name", value=name, required=True, placeholder="A name for this cluster",
          aria_label="Name", dir="auto"),
        h("button", "Rename"),
        class_="choice",
    )  # fmt: skip
    if name:
        words = [exposed.name, str(number), *(["--"] if name.startswith("-") else []), name]
        copy = h("button", "Copy", type="button", class_="copy")
        yield h("p", "These pages only read. This command renames it: ", copy, class_="faint")
        yield h("pre", f"sbert-pg cluster label {shlex.join(words)}", dir="auto")


def no_topics(name: str) -> Html:
    """What stands in the place of clusters where there are none."""
    return h(
        "p", "There are no clusters of this table yet. ",
        h("code", f"sbert-pg cluster run {name} --create", class_="command"), " makes them, and ",
        h("code", f"sbert-pg cluster map {name}", class_="command"), " their map.",
    )  # fmt: skip


def _fit(connection: sa.Connection, exposed: Exposed, topics: Clustering) -> Iterator[Any]:
    """Whether the clusters still fit the rows; how it is measured is the clustering's affair."""
    measured = drift(connection, topics)
    yield h(
        "p",
        f"Since then {measured.later:,} rows were added and {measured.unassigned:,} have no place "
        f"yet; {measured.far_share:.1%} are far from their cluster.",
        id="drift",
    )
    if measured.is_stale:
        command = h("code", f"sbert-pg cluster run {exposed.name}", class_="command")
        reasons = "; ".join(measured.reasons)
        yield h("p", f"It is time to run again: {reasons}. ", command, class_="advice")
    elif measured.unassigned:
        command = h("code", f"sbert-pg cluster assign {exposed.name}", class_="command")
        yield h("p", command, " gives them one.", class_="faint")


def _topic(cluster: Any, exposed: Exposed, typical: Found | None, largest: int) -> Html:
    link = f"/explore/topics?{urlencode({'table': exposed.name, 'number': cluster.number})}"
    return h(
        "li",
        h("a", cluster.label or f"cluster {cluster.number}", href=link, dir="auto"),
        h("small", f" {cluster.size:,} rows", class_="faint"),
        h("meter", max=largest, value=cluster.size, aria_label="share of the largest"),
        h("p", " · ".join(cluster.keywords), class_="faint", dir="auto"),
        None if typical is None else h("p", excerpt(exposed, typical), dir="auto"),
    )


def _flows(
    connection: sa.Connection, topics: Clustering, before: int, run: sa.Row[Any]
) -> Iterator[Any]:
    """Where the rows of the run before are now, the largest streams first."""
    moved = flows(connection, topics, before, run.id)
    stayed = sum(flow.rows for flow in moved if _number(flow.earlier) == _number(flow.later))
    both = sum(flow.rows for flow in moved)
    yield h("h2", f"Since run {before}")
    yield h(
        "p",
        f"{stayed:,} of {both:,} rows are in the cluster of the same number or outliers as before; "
        # Rows that were assigned since are in both, and not counted by the run.
        f"{max(0, (run.rows or 0) - both):,} were not in that run.",
        id="flows",
    )
    streams = [flow for flow in moved if _number(flow.earlier) != _number(flow.later)]
    if streams:
        yield table(
            ("from", "to", "rows", "of the first"),
            ([_label(f.earlier), _label(f.later), f"{f.rows:,}", f"{f.share:.0%}"]
             for f in streams[:LISTED]),
        )  # fmt: skip


def _number(cluster: tuple[int, str] | None) -> int | None:
    return None if cluster is None else cluster[0]


def _label(cluster: tuple[int, str] | None) -> str:
    return "outliers" if cluster is None else f"{cluster[0]} {cluster[1]}"


def _exemplar(topics: Clustering, cluster: Any) -> list[Any]:
    return [getattr(cluster, EXEMPLAR_PREFIX + key.name) for key in topics.keys]
