"""The pictures of ``serve --explore`` in docs/images, taken of the demo's database by Chromium.

    sbert-pg demo --explore        # in one terminal; it fills the database, and prints the address
    python docs/screenshots.py http://127.0.0.1:8080 docs/images

Needs Debian's ``chromium`` and the packages ``playwright`` and ``bokeh``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

QUESTION = "smallest items of a list without sorting all of it"
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
#: Pictures by name: path, scheme of colours, width, and what has to be there.
PICTURES = {
    "explore-search": (f"?q={QUESTION}", "light", 1280, "section[data-kind=exact] li"),
    "explore-topics": ("/topics?", "light", 1100, "ol.topics li"),
    "explore-map": ("/map?", "light", 1280, "#map[data-rows]"),
    "explore-map-dark": ("/map?", "dark", 1280, "#map[data-rows]"),
}


def main(address: str, folder: Path, table: str = "stdlib_function") -> None:
    """Take all pictures."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        for name, (path, scheme, width, there) in PICTURES.items():
            context = browser.new_context(
                viewport={"width": width, "height": 820}, color_scheme=scheme
            )
            page = context.new_page()
            page.goto(f"{address}/explore{path}&table={table}", timeout=120_000)
            page.locator(there).first.wait_for(timeout=120_000)
            if "map" in name:
                light_up(page)
            page.screenshot(path=folder / f"{name}.png")
            context.close()
        browser.close()


def light_up(page: Page) -> None:
    """Ask the map a question, and rest on a row of it."""
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Search").click()
    page.locator("#map[data-lit]").wait_for(timeout=120_000)
    x, y = page.evaluate(
        """() => { const m = document.getElementById("map").getBoundingClientRect();
        const plot = Bokeh.documents[0].roots()[0], { x, y } = plot.renderers[1].data_source.data;
        const at = (value, range) => (value - range.start) / (range.end - range.start);
        return [m.x + m.width * at(x[0], plot.x_range),
                m.y + m.height * (1 - at(y[0], plot.y_range))]; }"""
    )
    page.mouse.move(x + 2, y + 2)
    page.mouse.move(x, y)
    page.locator("#tip p").first.wait_for(timeout=60_000)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
