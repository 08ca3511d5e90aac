"""What people look at: SQL views, maps, and the command as a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from command_line import Result, sbert_pg

from sbert_pg import catalog, registry
from sbert_pg import clustering as cl
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.clustering.mapping import project
from sbert_pg.errors import ClusteringError, DeclarationError

helpers = sys.modules["clustering_app"]
blobs, numbers_of = helpers.blobs, helpers.numbers_of


def test_views_and_functions(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(60)
    app.fill(engine, [*vectors, None])
    cl.cluster(engine, app.topics, cl.KMeans(5))
    cl.cluster(engine, app.topics, cl.KMeans(2), make_current=False)
    found = numbers_of(engine, app.topics)
    with engine.begin() as connection:
        for _ in range(2):
            cl.create_views(connection, app.topics)
        current = connection.execute(sa.text("SELECT number, size FROM row_cluster_current"))
        assert {row.number: row.size for row in current} == dict.fromkeys(range(1, 6), 12)
        members = connection.execute(sa.text("SELECT row_id, number FROM row_cluster_member"))
        assert {row.row_id: row.number for row in members} == found
        nearest = sa.text("SELECT * FROM row_cluster_nearest_of(7, 2)")
        rows = connection.execute(nearest).all()
        assert len(rows) == 2
        assert rows[0].number == found[7]
        assert rows[0].distance < rows[1].distance
        by_vector = sa.text(
            "SELECT number FROM row_cluster_nearest((SELECT embedding FROM row WHERE id = 7), 1)"
        )
        assert connection.scalar(by_vector) == found[7]
        assert not connection.execute(sa.text("SELECT * FROM row_cluster_nearest_of(61)")).all()
        cl.drop_views(connection, app.topics)
        assert not sa.inspect(connection).get_view_names()


def test_frozen_views_are_those_of_the_declaration(engine: sa.Engine, app: Any) -> None:
    frozen = cl.ClusterViews(table="row", column="embedding", keys={"id": "BIGINT"})
    declared = cl.ClusterViews.of(app.topics, engine.dialect)
    written = [str(s.compile(dialect=engine.dialect)) for s in (*frozen.create(), *frozen.drop())]
    assert written == [
        str(s.compile(dialect=engine.dialect)) for s in (*declared.create(), *declared.drop())
    ]


@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_a_map_is_one_page(engine: sa.Engine, app: Any, tmp_path: Path, projection: Any) -> None:
    vectors, _ = blobs(150)
    app.fill(engine, vectors, title=[f"</script><b>text {n}" for n in range(150)])
    with engine.connect() as connection, pytest.raises(ClusteringError, match="no current"):
        cl.cluster_map(connection, app.topics)
    cl.cluster(engine, app.topics, cl.KMeans(5))
    with engine.connect() as connection:
        made = cl.cluster_map(
            connection, app.topics, projection=projection, text=app.row.title, title="A & B"
        )
        part = cl.cluster_map(connection, app.topics, rows=50, projection="pca")
    assert 20 < len(part.texts) < 90
    assert made.points.shape == (150, 2)
    assert made.points.min() >= 0
    assert made.points.max() <= 1
    # Rows of one cluster lie together.
    numbers = np.array(made.numbers)
    middles = {n: made.points[numbers == n].mean(axis=0) for n in set(made.numbers)}
    within = np.mean(
        [np.linalg.norm(p - middles[n]) for p, n in zip(made.points, numbers, strict=True)]
    )
    assert within < 0.5 * np.linalg.norm(made.points - made.points.mean(axis=0), axis=1).mean()
    page = made.html()
    assert "<title>A &amp; B</title>" in page
    assert "http" not in page.split('id="data"')[0]
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)])
    assert len(data["points"]) == 150
    assert data["points"][0][3].startswith("</script><b>text")
    assert [c["size"] for c in data["clusters"]] == [30] * 5
    made.save_html(tmp_path / "map.html")
    pytest.importorskip("matplotlib")
    made.save_png(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_projections_that_do_not_exist() -> None:
    with pytest.raises(DeclarationError, match="use 'auto'"):
        project(np.ones((5, 3), dtype=np.float32), "mercator")  # type: ignore[arg-type]
    points, name = project(np.ones((1, 3), dtype=np.float32), "tsne")
    assert (points.tolist(), name) == ([[0.0, 0.0]], "principal components")


def command(engine: sa.Engine, *arguments: str) -> Result:
    return sbert_pg(*arguments, url=engine.url)


def test_the_commands(engine: sa.Engine, tmp_path: Path, fake_encoder: Any) -> None:
    table = sa.Table(
        "note",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("body", sa.Text),
        sa.Column("embedding", Embedding("deterministic", "body", dimensions=384)),
    )
    words = ["rain storm clouds", "bank money credit", "butter garlic oven"]
    texts = [f"{words[n % 3]} {n // 6}" for n in range(60)]
    with engine.begin() as connection:
        table.create(connection)
        catalog.bind(connection, table.c.embedding)
        vectors = registry.get_encoder(table.c.embedding.type.encoder).encode_document(texts)
        connection.execute(
            sa.insert(table),
            [{"id": n, "body": texts[n], "embedding": vector} for n, vector in enumerate(vectors)],
        )
    missing = command(engine, "cluster", "run", "note", "--clusters", "3")
    assert missing.returncode == 1
    assert "--create" in missing.stderr
    run = command(engine, "cluster", "run", "note", "--clusters", "3", "--create", "--json")
    assert run.returncode == 0, run.stderr
    made = json.loads(run.stdout)
    assert made["run"]["n_clusters"] == 3
    assert [c["size"] for c in made["clusters"]] == [20, 20, 20]
    keywords = " ".join(made["clusters"][0]["keywords"]).split()
    assert set(keywords) in [set(w.split()) for w in words]
    number = str(made["clusters"][0]["number"])
    named = command(engine, "cluster", "show", "note", number, "--label", "My topic")
    assert (named.returncode, "is called My topic" in named.stderr) == (0, True)
    assert command(engine, "cluster", "show", "note", "--label", "My topic").returncode == 1
    shown = command(engine, "cluster", "show", "note")
    assert "My topic" in shown.stdout
    members = json.loads(command(engine, "cluster", "show", "note", number, "--json").stdout)
    assert len(members) == 20
    assert json.loads(command(engine, "cluster", "show", "note", "--runs", "--json").stdout)[0][
        "is_current"
    ]
    done = json.loads(command(engine, "cluster", "assign", "note", "--json").stdout)
    assert (done["added"], done["drift"]["is_stale"]) == (0, False)
    page = tmp_path / "map.html"
    drawn = command(engine, "cluster", "map", "note", str(page))
    assert drawn.returncode == 0, drawn.stderr
    assert "rain storm clouds" in page.read_text()
    nowhere = command(engine, "cluster", "map", "note", str(tmp_path / "nowhere" / "map.html"))
    assert (nowhere.returncode, "Traceback" in nowhere.stderr) == (1, False)
    assert "No such file" in nowhere.stderr
    again = command(
        engine, "cluster", "run", "note.embedding", "--clusters", "3", "--keep", "0", "--json"
    )
    assert again.returncode == 0, again.stderr
    (only,) = json.loads(command(engine, "cluster", "show", "note", "--runs", "--json").stdout)
    assert only["id"] == json.loads(again.stdout)["run"]["id"]
    wrong = command(engine, "cluster", "run", "note", "--clusters", "many")
    assert wrong.returncode == 1
    assert "10,20,40" in wrong.stderr


def test_places_are_stored_with_the_run(engine: sa.Engine, app: Any, monkeypatch: Any) -> None:
    vectors, _ = blobs(150)
    app.fill(engine, vectors)
    cl.cluster(engine, app.topics, cl.KMeans(5))
    # Most rows are not projected themselves, and stand among their own all the same.
    monkeypatch.setattr("sbert_pg.clustering.mapping.SAMPLE_ROWS", 40)
    with engine.begin() as connection:
        assert cl.store_map(connection, app.topics, projection="pca") == 150
        rows = connection.execute(cl.mapped_rows(app.topics)).all()
        run = app.topics.require_current(connection)
    assert run.projection == "principal components"
    points = np.array([(x, y) for _, x, y, *_ in rows])
    clusters = np.array([row[0] for row in rows])
    assert 0 <= points.min() <= points.max() <= 1
    middles = {c: points[clusters == c].mean(axis=0) for c in set(clusters.tolist())}
    within = np.mean(
        [np.linalg.norm(p - middles[c]) for p, c in zip(points, clusters, strict=True)]
    )
    assert within < 0.5 * np.linalg.norm(points - points.mean(axis=0), axis=1).mean()


def test_flows_say_where_the_rows_of_clusters_went(engine: sa.Engine, app: Any) -> None:
    vectors, _ = blobs(60)
    app.fill(engine, vectors)
    with engine.connect() as connection, pytest.raises(ClusteringError, match="no current"):
        cl.flows(connection, app.topics)
    first = cl.cluster(engine, app.topics, cl.KMeans(5))
    with engine.connect() as connection, pytest.raises(ClusteringError, match="is the first one"):
        cl.flows(connection, app.topics)
    with engine.begin() as connection:
        connection.execute(sa.delete(app.row).where(app.row.id > 50))
    before = numbers_of(engine, app.topics)
    second = cl.cluster(engine, app.topics, cl.KMeans(2), seed=3)
    after = numbers_of(engine, app.topics)
    with engine.connect() as connection:
        found = cl.flows(connection, app.topics)
        assert found == cl.flows(connection, app.topics, first.id, second.id)
    counted = {(f.earlier and f.earlier[0], f.later and f.later[0]): f.rows for f in found}
    expected: dict[Any, int] = {}
    for key, number in before.items():
        expected[number, after[key]] = expected.get((number, after[key]), 0) + 1
    assert counted == expected
    assert sum(counted.values()) == 50
    assert [f.rows for f in found] == sorted((f.rows for f in found), reverse=True)
    for number in set(before.values()):
        assert sum(f.share for f in found if f.earlier[0] == number) == pytest.approx(1)
