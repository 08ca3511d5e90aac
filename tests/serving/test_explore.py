"""``sbert-pg serve --explore`` in a real browser: what is seen, and no row is read as markup."""

from __future__ import annotations

import base64
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from command_line import sbert_pg
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import (
    bind,
    create_all,
    embedding_column,
    hnsw_index,
    reembed,
    refresh,
    text_column,
    use_encoder,
)
from sbert_pg.cli.doctor import diagnose
from sbert_pg.cli.serve import _all_bound, _clusterings, looking
from sbert_pg.clustering import Flow, KMeans, cluster, clusters_of, store_map
from sbert_pg.serving import topics as topics_page
from sbert_pg.serving.explore import Explorer
from sbert_pg.serving.exposed import Shown
from sbert_pg.serving.server import serving
from sbert_pg.serving.states import Pace
from sbert_pg.testing import DeterministicEncoder

#: Seconds that a browser on a busy machine may need for anything.
PATIENCE = 120_000
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    # Containers have little of it.
    "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = [
    "<script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "\"><b id=taken>' OR 1=1; --",
    "%s %(name)s {{x}} :name \\ '",
    "كيف أستعيد نقودي بعد الشراء",
    "x" * 3000,
    "</textarea></title><script src=//example.com/x.js></script>",
    "money <a href='javascript:document.title=1'>back</a> refund",
]


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    __table_args__ = (hnsw_index("note_embedding", "embedding"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str]
    year: Mapped[int]
    secret: Mapped[str] = mapped_column(default="hush")
    embedding = embedding_column("all-MiniLM-L6-v2", source=["title", "body"], nullable=True)
    words = text_column("title", "body", language="english")


topics = clusters_of(Note.embedding)
TEXTS = [
    *((f"Refund {n}", "How to get your money back after a purchase", 2020 + n) for n in range(8)),
    *((f"Opening {n}", "When the shop is open on Sundays", 2020 + n) for n in range(8)),
    *((text, text, 2000) for text in HOSTILE),
]


@pytest.fixture(scope="module")
def notes(databases: Any, _minilm: Any) -> Iterator[sa.Engine]:
    """A table with clusters, a map, and texts that would like to be markup."""
    url = databases.clone("catalog")
    engine = sa.create_engine(url)
    use_encoder(_minilm, name="all-MiniLM-L6-v2")
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session, session.begin():
        session.add_all(Note(title=t, body=b, year=year) for t, b, year in TEXTS)
    assert refresh(engine).embedded == len(TEXTS)
    # An earlier run, and rows that came after the current one.
    assert cluster(engine, topics, KMeans(2), seed=0).n_clusters == 2
    run = cluster(engine, topics, KMeans(3), seed=0)
    assert run.n_clusters == 3
    with engine.begin() as connection:
        assert store_map(connection, topics, projection="pca") == len(TEXTS)
        # A name that somebody gave, and that is markup.
        connection.execute(
            sa.update(topics.cluster_table)
            .where(topics.cluster_table.c.run_id == run.id, topics.cluster_table.c.number == 1)
            .values(label=HOSTILE[0], is_named=True)
        )
    yield engine
    engine.dispose()
    databases.drop(url.database)


class Words:
    """A reranker that counts the words of the question that a text has."""

    def score(self, question: str, texts: Sequence[str]) -> list[float]:
        words = set(question.lower().split())
        return [float(len(words & set(text.lower().split()))) for text in texts]


def explorer(engine: sa.Engine, *targets: str, **more: Any) -> Explorer:
    reading = engine.execution_options(postgresql_readonly=True)
    shown = Shown(reading, looking(targets or ["note:id,title,body,year"]))
    return Explorer(shown, _clusterings(Base.metadata), diagnose, **more)


@pytest.fixture
def port(notes: sa.Engine, minilm: Any) -> Iterator[int]:
    with serving({}, None, port=0, views=explorer(notes, reranker=Words()).views()) as port:
        yield port


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=ARGUMENTS, timeout=PATIENCE
        )
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, port: int) -> Iterator[Any]:
    """A tab in which no request leaves the server, and no error goes unnoticed."""
    context = browser.new_context(base_url=f"http://127.0.0.1:{port}")
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(
        (f"http://127.0.0.1:{port}/", "data:", "blob:")) else None)  # fmt: skip
    yield page
    assert page.title() == "" or page.title().endswith(" - sbert-pg"), "a script of a row ran"
    assert page.locator("#taken").count() == 0
    context.close()
    assert wrong == []


def test_search(tab: Any) -> None:
    tab.goto("/explore")
    tab.get_by_label("Question").fill("money back")
    tab.get_by_label("Column").select_option("year")
    tab.get_by_label("Operator").select_option("<=")
    tab.get_by_label("Value").fill("2024")
    tab.get_by_role("button", name="Search").click()
    tab.locator("section[data-kind=exact] li").first.wait_for()
    kinds = tab.locator("#answers section")
    assert [k.get_attribute("data-kind") for k in kinds.all()] == [
        "meaning", "words", "both", "reranked", "exact"
    ]  # fmt: skip
    for kind in ("meaning", "words", "both", "reranked"):
        first = tab.locator(f"section[data-kind={kind}] li").first
        assert "money" in first.inner_text()
    assert "similarity 0." in kinds.nth(0).locator("li").first.inner_text()
    assert tab.locator("section[data-kind=words] mark").first.inner_text() == "money"
    # The filter holds, and stands in the form and in the code.
    assert "Refund 7" not in tab.locator("#answers").inner_text()
    assert tab.get_by_label("Value").first.input_value() == "2024"
    tab.locator("section[data-kind=both] summary").click()
    code = tab.locator("section[data-kind=both] pre")
    assert "hybrid(Note.embedding, Note.words, 'money back', limit=10)" in code.first.inner_text()
    assert ".where(Note.year <= 2024)" in code.first.inner_text()
    assert "weight of meaning" in tab.locator("section[data-kind=both] .why").inner_text()
    assert "reranker 2.000" in tab.locator("section[data-kind=reranked] li").first.inner_text()
    tab.locator("section[data-kind=reranked] summary").click()
    code = tab.locator("section[data-kind=reranked] pre").first.inner_text()
    assert code.startswith("rerank(session.execute(")
    assert 'text=lambda row: "\\n".join([row.Note.title, row.Note.body]), limit=10)' in code
    tab.locator("section[data-kind=exact] summary").click()
    why = tab.locator("section[data-kind=exact] .why").inner_text()
    assert "exact=True was asked for" in why
    assert "hush" not in tab.content()


@pytest.mark.parametrize("question", HOSTILE)
def test_what_looks_like_markup_is_text(tab: Any, question: str) -> None:
    tab.goto("/explore")
    tab.get_by_label("Question").fill(question)
    tab.get_by_role("button", name="Search").click()
    tab.locator("section[data-kind=exact] li").first.wait_for()
    assert tab.get_by_label("Question").input_value() == question
    texts = tab.locator("section[data-kind=exact] li .text").all_inner_texts()
    shown = question if len(question) < 400 else question[:300]
    assert any(shown in text for text in texts)
    assert tab.locator("#answers .fault").count() == 0
    assert tab.locator("script:not([src])").count() == 0
    # Nothing makes the page wider than its window, be it as narrow as a telephone's.
    tab.set_viewport_size({"width": 420, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_topics(tab: Any, notes: sa.Engine) -> None:
    tab.goto("/explore/topics")
    topics = tab.locator("ol.topics li")
    assert topics.count() == 3
    tab.get_by_text(HOSTILE[0], exact=True).first.wait_for()
    assert "Since then 0 rows were added and 0 have no place" in tab.locator("#drift").inner_text()
    # What became of the two clusters of the run before.
    tab.get_by_role("heading", name="Since run 1").wait_for()
    assert f"of {len(TEXTS)} rows are in the cluster" in tab.locator("#flows").inner_text()
    moved = tab.locator("#flows ~ .scroll tbody tr")
    assert moved.count() >= 1, "three clusters of two: some rows have another number"
    tab.get_by_role("link", name="money").first.click()
    tab.get_by_role("cell", name="Refund 1", exact=True).wait_for()
    # Of a long text the beginning is shown.
    address, longest = tab.url, 0
    for number in (1, 2, 3):
        tab.goto(f"/explore/topics?number={number}")
        longest = max(longest, *map(len, tab.locator("td").all_inner_texts()))
    assert longest == 400
    tab.goto(address)
    # The pages never write, so they give the command that renames, whatever the name.
    for name in ("It's money", "--help"):
        tab.get_by_label("Name").fill(name)
        tab.get_by_role("button", name="Rename").click()
        tab.get_by_text("These pages only read").wait_for()
        program, *command = shlex.split(tab.locator("main pre").inner_text())
        assert program == "sbert-pg"
        assert sbert_pg(*command, url=notes.url).returncode == 0
        tab.reload()
        tab.get_by_role("heading", name=name, exact=True).wait_for()
        again = sbert_pg(*command[:4], "--label", "", url=notes.url)
        assert again.returncode == 0, "by its keywords again"


def test_topics_whose_typical_row_is_gone(notes: sa.Engine, minilm: Any, client: Any) -> None:
    """Its reference is null then, until the next run."""
    clusters = topics.cluster_table
    gone = sa.update(clusters).where(clusters.c.number == 2)
    with notes.begin() as connection:
        rows = connection.execute(sa.select(clusters.c.id, clusters.c.exemplar_id)).all()
        connection.execute(gone.values(exemplar_id=None))
    with serving({}, None, port=0, views=explorer(notes).views()) as port:
        page = client(port).get("/explore/topics", params={"table": "note"})
    with notes.begin() as connection:
        for cluster_id, key in rows:
            one = sa.update(clusters).where(clusters.c.id == cluster_id)
            connection.execute(one.values(exemplar_id=key))
    assert page.status_code == 200, page.text
    assert page.text.count("<meter") == 3


def test_map(tab: Any) -> None:
    tab.goto("/explore/map")
    tab.locator(f"#map[data-rows='{len(TEXTS)}']").wait_for()
    tab.get_by_label("Question").fill("money back")
    tab.get_by_role("button", name="Search").click()
    tab.locator("#map[data-lit='20']").wait_for()
    box = tab.locator("#map").bounding_box()
    corners = [(0.01, 0.01), (0.99, 0.01), (0.99, 0.99), (0.01, 0.99)]
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    tab.mouse.move(*places[0])
    tab.mouse.down()
    for place in [*places[1:], places[0]]:
        tab.mouse.move(*place, steps=4)
    tab.mouse.up()
    tab.locator(f"#chosen[data-rows='{len(TEXTS)}']").wait_for()
    rows = tab.locator("#chosen tr")
    assert rows.count() == len(TEXTS) + 1
    assert HOSTILE[0] in tab.locator("#chosen").inner_text()
    # Where a row is, its text appears.
    x, y = tab.evaluate(
        """() => { const m = document.getElementById("map").getBoundingClientRect();
        const plot = Bokeh.documents[0].roots()[0], { x, y } = plot.renderers[0].data_source.data;
        const at = (value, range) => (value - range.start) / (range.end - range.start);
        return [m.x + m.width * at(x[0], plot.x_range),
                m.y + m.height * (1 - at(y[0], plot.y_range))]; }"""
    )
    # While the map is being drawn, it takes no notice of the mouse.
    tip, until = tab.locator("#tip p").first, time.monotonic() + PATIENCE / 1000
    while not tip.is_visible():
        assert time.monotonic() < until
        tab.mouse.move(x + 3, y + 3)
        tab.mouse.move(x, y)
        tab.wait_for_timeout(100)


def test_the_map_by_a_column(tab: Any) -> None:
    tab.goto("/explore/map")
    tab.locator("#map[data-rows]").wait_for()
    assert tab.locator("#legend button").count() == 3
    tab.get_by_label("Colour by").select_option("title")
    tab.get_by_role("button", name="Show").click()
    tab.locator("#map[data-by=title][data-rows]").wait_for()
    legend = tab.locator("#legend button")
    assert legend.count() == 21, "twenty values, and the others"
    assert "4 other values" in legend.last.inner_text()
    # What is hidden is neither drawn nor hovered, until it is shown again.
    shown = "Bokeh.documents[0].roots()[0].renderers[0].view.indices.count"
    hidden = legend.last
    hidden.click()
    tab.wait_for_function(f"{shown} === {len(TEXTS) - 4}")
    assert hidden.get_attribute("aria-pressed") == "false"
    hidden.click()
    tab.wait_for_function(f"{shown} === {len(TEXTS)}")


def test_colours_of_values(notes: sa.Engine, minilm: Any, client: Any) -> None:
    """Few values have a colour each, many numbers are cut into ranges, and all rows are in one."""
    with serving({}, None, port=0, views=explorer(notes).views()) as port:
        http: httpx.Client = client(port)

        def groups(column: str) -> list[tuple[str, set[str]]]:
            answer = http.get("/explore/points", params={"table": "note", "by": column}).json()
            return [(group["label"], set(group["keys"])) for group in answer["groups"]]

        years = groups("year")
        assert years[0] == ("2000", {str(n) for n in range(17, 25)})
        assert ("2020", {"1", "9"}) in years
        assert len(years) == 9
        ids = groups("id")
        assert [label for label, _ in ids] == [f"{n} – {n + 2}" for n in range(1, 24, 3)]
        assert [len(keys) for _, keys in ids] == [3] * 8
        with notes.begin() as connection:
            connection.exec_driver_sql("UPDATE note SET body = repeat('x', 300) WHERE id < 3")
        assert {len(label) for label, keys in groups("body") if keys & {"1", "2"}} == {
            topics_page.TEXT
        }
        for column in ("secret", "nothing"):
            answer = http.get("/explore/points", params={"table": "note", "by": column})
            assert answer.status_code == 400
            assert "to colour by" in answer.text


def test_health_and_change(tab: Any, notes: sa.Engine) -> None:
    tab.goto("/explore/health")
    tab.get_by_role("cell", name="public.note.embedding").wait_for()
    tab.goto("/explore/change")
    tab.get_by_text("No change of encoder is under way.").wait_for()


class Next(DeclarativeBase):
    pass


class NextNote(Next):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str]
    embedding_next = embedding_column(
        "next", source=["title", "body"], replaces="embedding", dimensions=384, nullable=True
    )


@pytest.fixture
def changing(databases: Any, minilm: Any) -> Iterator[sa.Engine]:
    """A change of encoder in its middle: some rows have a vector of the new one, and some wait."""
    url = databases.clone("catalog")
    engine = sa.create_engine(url)
    use_encoder(DeterministicEncoder("next"))
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session, session.begin():
        session.add_all(Note(title=t, body=b, year=year) for t, b, year in TEXTS)
    refresh(engine)
    column = reembed.begin(engine, reembed.request_of(NextNote.embedding_next)).identity
    reembed.backfill(engine, column)
    with engine.begin() as connection:
        connection.execute(sa.update(Note).where(Note.id <= 6).values(body="Jobs at the shop"))
    yield engine
    engine.dispose()
    databases.discard(url.database)


def test_a_change_under_way(browser: Any, changing: sa.Engine) -> None:
    """Progress, overlap, quality, what changes most, one question to both, and the next step."""
    queries = [
        reembed.LabelledQuery("opened at the weekend", {"10": 1.0}),
        reembed.LabelledQuery("When the shop is open on Sundays", {"10": 1.0, "11": 1.0}),
    ]
    with changing.connect() as connection:
        targets = _all_bound(connection)
    assert targets == ["note", "note.embedding_next"], "the table's name means what it meant"
    views = explorer(changing, *targets, queries=queries).views()
    with serving({}, None, port=0, views=views) as port:
        context = browser.new_context(base_url=f"http://127.0.0.1:{port}")
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        tab.goto("/explore?q=money")
        assert tab.get_by_label("Table").input_value() == "note"
        tab.locator("section[data-kind=exact] li").first.wait_for()
        tab.goto("/explore/change")
        tab.get_by_role("heading", name="embedding → embedding_next").wait_for()
        tab.get_by_text("all-MiniLM-L6-v2 → next").wait_for()
        assert "; 6 to go." in tab.locator("main").inner_text()
        assert tab.locator("#left").inner_text().startswith("Reload")
        assert float(tab.locator("progress").get_attribute("value")) == pytest.approx(0.75)
        assert tab.locator(".steps .now").inner_text() == "backfill"
        assert "sbert-pg backfill" in tab.locator("code.command").first.inner_text()
        tab.get_by_role("link", name="Measure the overlap of neighbours").click()
        assert tab.locator("#overlap b").inner_text().endswith("%")
        heads = tab.locator("table thead").inner_text()
        assert "nDCG@10" in heads
        rows = tab.locator("table tbody tr").all_inner_texts()
        assert [row.split()[0] for row in rows] == ["embedding", "embedding_next"]
        # A question without a word of its answer is the one that the encoder of words misses.
        worst = tab.locator("#changed li a").first
        assert worst.inner_text() == "opened at the weekend"
        worst.click()
        tab.get_by_role("heading", name="old", exact=False).wait_for()
        answers = tab.locator(".columns section")
        assert answers.count() == 2
        assert "Opening" in answers.first.locator("li").first.inner_text()
        refresh(changing)
        tab.goto("/explore/change")
        assert "; 0 to go." in tab.locator("main").inner_text()
        assert "verify" in tab.locator(".steps .now").inner_text()
        assert tab.locator("#left").count() == 0
        with changing.begin() as connection:
            connection.execute(sa.update(Note).where(Note.id <= 3).values(body="Shifts"))
        tab.goto("/explore/change")
        assert tab.locator("#left").inner_text().startswith("Reload"), "what was done says nothing"
        context.close()


def test_time_that_is_left() -> None:
    """By the pace of what is under way, and not of a backfill that has ended."""
    pace = Pace()
    assert pace.left("a", 6).startswith("Reload")
    left = pace.left("a", 3)
    assert re.fullmatch(r"About \d+:\d\d:\d\d left, at the pace since this page saw 6\.", left)
    assert pace.left("a", 0) == ""
    assert pace.left("a", 3).startswith("Reload")


def test_who_may_ask(notes: sa.Engine, minilm: Any, client: Any) -> None:
    views = explorer(notes).views()
    with serving({}, None, port=0, views=views) as port:
        http: httpx.Client = client(port)
        page = http.get("/explore")
        assert page.status_code == 200
        assert "script-src 'self';" in page.headers["content-security-policy"]
        assert "'unsafe-inline'" not in page.headers["content-security-policy"]
        policy = http.get("/explore/map").headers["content-security-policy"]
        assert "script-src 'self'; style-src 'self' 'unsafe-inline';" in policy
        assert http.get("/explore", headers={"Host": "evil.example"}).status_code == 403
        other = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        assert http.get("/explore/points?table=note", headers=other).status_code == 403
        assert http.get("/explore/rows?table=pg_authid&key=1").status_code == 400
        assert http.get("/explore/topics?number=x").status_code == 400
        assert http.get("/explore/topics?number=99").status_code == 200
        wrong = http.get("/explore?q=x&c=secret&o=%3D&v=hush")
        assert "no column &#x27;secret&#x27;" in wrong.text
        assert http.get("/explore?table=nothing").status_code == 400
        assert http.get("/explore/hits?table=note&q=%20").status_code == 400
    with serving({}, None, port=0, views=views, token="a-token-that-is-long") as port:
        http = client(port)
        refused = http.get("/explore")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        assert http.get("/explore", auth=("me", "a-token-that-is-long")).status_code == 200
        assert http.get("/explore", auth=("me", "another")).status_code == 401
        bad = {"Authorization": "Basic " + base64.b64encode(b"\xff").decode()}
        assert http.get("/explore", headers=bad).status_code == 401
        # Programs send it as ever, and only pages take a password.
        assert http.get("/metrics", auth=("me", "a-token-that-is-long")).status_code == 401


def test_nothing_can_be_written(notes: sa.Engine, minilm: Any) -> None:
    shown = explorer(notes)._shown
    with shown.connected() as connection, pytest.raises(sa.exc.InternalError, match="read-only"):
        connection.execute(sa.delete(Note))


def test_tables_of_one_name_have_their_own_clusters(database_url: sa.URL, minilm: Any) -> None:
    """A tenant's table beside the application's, which alone has a run."""
    engine = sa.create_engine(database_url)
    run = {"column_name": "embedding", "algorithm": "kmeans", "parameters": {}, "seed": 0,
           "metric": "cosine", "state": "done", "is_current": True}  # fmt: skip
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
        connection.exec_driver_sql("CREATE SCHEMA far")
        far: Any = Note.__table__
        far = far.to_metadata(sa.MetaData(), schema="far")
        far.create(connection)
        bind(connection, far.c.embedding)
        connection.execute(sa.insert(topics.run_table).values(run))
        for metadata in (Base.metadata, None):
            of = _clusterings(metadata)
            here, there = looking(["public.note", "far.note"])(connection)
            assert of(connection, here) is not None
            assert of(connection, there) is None
    engine.dispose()


def test_flows_of_outliers_and_of_rows_that_were_assigned_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What stays an outlier has no number; and a run does not count what came to it later."""
    moved = [Flow((1, "<b>"), (1, "<b>"), 7, 1.0), Flow(None, None, 5, 1.0)]
    monkeypatch.setattr(topics_page, "flows", lambda *given: moved)
    run: Any = SimpleNamespace(id=2, rows=10)
    said = "".join(topics_page._flows(None, topics, 1, run))  # type: ignore[arg-type]
    assert "12 of 12 rows are in the cluster of the same number or outliers as before" in said
    assert "; 0 were not in that run" in said
