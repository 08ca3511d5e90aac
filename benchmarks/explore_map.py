"""How long the map of ``serve --explore`` takes to appear in headless Chromium, part by part.

    python benchmarks/explore_map.py [--rows 100000] [--times 3] [--url postgresql://...]

Rows of 16 dimensions in forty clusters, on the embedded server by default. Seconds on the wall, and
of CPU in the server's process, in the browser and in PostgreSQL, from the visit to the moment that
the points are drawn; then how long a lasso around a part of the map takes, and a row's text under
the pointer. Needs Debian's ``chromium`` and the packages ``playwright`` and ``bokeh``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from playwright.sync_api import Page, sync_playwright
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import create_all, embedding_column, use_encoder
from sbert_pg.cli.doctor import diagnose
from sbert_pg.cli.serve import _clusterings, looking
from sbert_pg.clustering import KMeans, cluster, clusters_of, store_map
from sbert_pg.embedded import embedded_server
from sbert_pg.serving.explore import Explorer
from sbert_pg.serving.exposed import Shown
from sbert_pg.serving.server import serving
from sbert_pg.testing import DeterministicEncoder

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
CLUSTERS = 40
PATIENCE = 300_000


class Base(DeclarativeBase):
    """Tables of this benchmark."""


class Point(Base):
    """A row of the map."""

    __tablename__ = "point"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column("points", source="title", dimensions=16, nullable=True)


topics = clusters_of(Point.embedding)


def fill(engine: sa.Engine, rows: int) -> None:
    """Rows, their clusters, and their places."""
    random = np.random.default_rng(0)
    middles = random.standard_normal((CLUSTERS, 16))
    vectors = middles[random.integers(0, CLUSTERS, rows)] + 0.4 * random.standard_normal((rows, 16))
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
        for start in range(0, rows, 10_000):
            part = [
                {"id": n, "title": f"row {n}", "embedding": vectors[n]}
                for n in range(start, min(rows, start + 10_000))
            ]
            connection.execute(sa.insert(Point.__table__), part)
    cluster(engine, topics, KMeans(CLUSTERS), keywords=False)
    with engine.begin() as connection:
        store_map(connection, topics, projection="pca")


def cpu_of(names: tuple[str, ...]) -> dict[str, float]:
    """Seconds of CPU of each process of these names."""
    seconds = {}
    for folder in Path("/proc").iterdir():
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
        except (OSError, ValueError):
            continue
        if name.startswith(names):
            ticks = sum(map(int, rest.split()[11:13]))
            seconds[folder.name] = ticks / os.sysconf("SC_CLK_TCK")
    return seconds


def since(before: dict[str, float], names: tuple[str, ...]) -> float:
    """Seconds of CPU of the processes that there are now."""
    return sum(now - before.get(number, 0.0) for number, now in cpu_of(names).items())


def visit(page: Page, address: str, rows: int) -> dict[str, float]:
    """One visit, from the address to a drawn map; a lasso; a row under the pointer."""
    began = time.perf_counter(), time.process_time(), cpu_of(("chrom",)), cpu_of(("postgres",))
    page.goto(f"{address}/explore/map?table=point", timeout=PATIENCE)
    page.locator(f"#map[data-rows='{rows}']").wait_for(timeout=PATIENCE)
    seconds = {
        "appears": time.perf_counter() - began[0],
        "cpu server": time.process_time() - began[1],
        "cpu browser": since(began[2], ("chrom",)),
        "cpu database": since(began[3], ("postgres",)),
    }
    for name, start, end in page.evaluate(
        "() => performance.getEntriesByType('resource').map(e => [e.name, e.startTime, "
        "e.responseEnd])"
    ):
        for part in ("points", "bokeh.min"):
            if part in name.rpartition("/")[2]:
                seconds[f"loading {part}"] = (end - start) / 1000
    box: Any = page.locator("#map").bounding_box()
    corners = [(0.3, 0.3), (0.6, 0.3), (0.6, 0.6), (0.3, 0.6), (0.3, 0.3)]
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    start = time.perf_counter()
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=2)
    page.mouse.up()
    page.locator("#chosen[data-rows]").wait_for(timeout=PATIENCE)
    seconds["lasso"] = time.perf_counter() - start
    start = time.perf_counter()
    while not page.locator("#tip p").first.is_visible():
        for x, y in corners:
            page.mouse.move(
                box["x"] + (x + 0.05) * box["width"], box["y"] + (y + 0.02) * box["height"]
            )
            page.wait_for_timeout(20)
    seconds["hover"] = time.perf_counter() - start
    return seconds


def visits(address: str, rows: int, times: int) -> Iterator[dict[str, float]]:
    """Visits by a browser each, after one that nobody counts."""
    with sync_playwright() as playwright:
        for number in range(times + 1):
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=ARGUMENTS, timeout=PATIENCE
            )
            page = browser.new_page(viewport={"width": 1280, "height": 820})
            seconds = visit(page, address, rows)
            browser.close()
            if number:
                yield seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--url", help="an empty database with the extension vector")
    options = parser.parse_args()
    use_encoder(DeterministicEncoder("points", 16))
    with ExitStack() as stack:
        url: Any = options.url
        if url is None:
            url = stack.enter_context(embedded_server()).url()
        engine = sa.create_engine(url)
        if not sa.inspect(engine).has_table("point"):
            fill(engine, options.rows)
        reading = engine.execution_options(postgresql_readonly=True)
        shown = Shown(reading, looking(["point"]))
        views = Explorer(shown, _clusterings(Base.metadata), diagnose).views()
        port = stack.enter_context(serving({}, None, port=0, views=views))
        measured = list(visits(f"http://127.0.0.1:{port}", options.rows, options.times))
        for name in measured[0]:
            values = [seconds[name] for seconds in measured]
            print(f"{name:16} {statistics.median(values):6.2f} s   {min(values):6.2f} at best")


if __name__ == "__main__":
    main()
