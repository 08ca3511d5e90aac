"""``sbert-pg serve --explore``: pages on a database, for the people who build on it.

Search, topics, map, a running change of encoder, and health. Nothing here owns a fact:
rows come from the tables that are shown, everything else from its owner. The pages work without
scripts, but for the map and the buttons that copy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import sqlalchemy as sa
from starlette.datastructures import QueryParams
from starlette.responses import Response

from sbert_pg.clustering import Clustering
from sbert_pg.errors import MissingExtraError
from sbert_pg.reranking import Scorer
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.serving.comparing import OPERATORS, compared, filters_of
from sbert_pg.serving.exposed import Exposed, Question, Shown
from sbert_pg.serving.html import Html, guarded, h, page
from sbert_pg.serving.http import JSON, RefusedError, json_bytes, refusal_of
from sbert_pg.serving.states import Pace, changes, health
from sbert_pg.serving.topics import members, no_topics, overview, points

#: Rows of a list, and rows that a lasso shows.
LISTED = 20
LASSOED = 50
#: Bokeh's scripts by the name of their element: all models, and the interface to make them.
_BOKEH = {"bokeh": "bokeh.min.js", "bokeh-api": "bokeh-api.min.js"}
_VIEWS = {"": "Search", "/topics": "Topics", "/map": "Map", "/change": "Change",
          "/health": "Health"}  # fmt: skip


class Explorer:
    """The pages of some tables.

    Args:
        shown: the tables; its engine's transactions should be read-only.
        topics: the clustering of a table, or ``None`` where it has none.
        diagnose: what is wrong with a database.
        reranker: scores the rows of another column of answers, by the text that is shown.
        queries: labelled questions, by which the encoders of a change are compared.
    """

    def __init__(
        self,
        shown: Shown,
        topics: Callable[[sa.Connection, Exposed], Clustering | None],
        diagnose: Callable[[sa.Connection], Iterable[Any]],
        *,
        reranker: Scorer | None = None,
        queries: Sequence[LabelledQuery] = (),
    ) -> None:
        self._shown = shown
        self._topics = topics
        self._diagnose = diagnose
        self._reranker = reranker
        self._queries = queries
        self._pace = Pace()

    def views(self) -> dict[str, Callable[[QueryParams], Response]]:
        """The pages and what they load, by path."""
        views: dict[str, Callable[[QueryParams], Response]] = {}
        for path, title in _VIEWS.items():
            view = getattr(self, title.lower())
            views[f"/explore{path}"] = partial(self._page, path, view)
        for data in (self.points, self.rows, self.hits):
            views[f"/explore/{data.__name__}"] = partial(_data, data)
        own = resources.files("sbert_pg.serving")
        for name, kind in (("explore.css", "text/css"), ("explore.js", "text/javascript")):
            views[f"/explore/{name}"] = partial(_file, own.joinpath(name).read_bytes, kind)
        for name in _BOKEH.values():
            views[f"/explore/{name}"] = partial(_file, partial(_bokeh, name), "text/javascript")
        return views

    def _page(
        self, path: str, view: Callable[[QueryParams, str], Iterable[Any]], query: QueryParams
    ) -> Response:
        """A page, or in its place what went wrong."""
        tables = self._shown.tables()
        name = query.get("table") or next(iter(tables))
        code, scripts = 200, [h("script", src="/explore/explore.js", defer=True)]
        if path == "/map":
            # After the page's own script, which asks for the points meanwhile.
            scripts += [
                h("script", id=one, src=f"/explore/{file}", defer=True)
                for one, file in _BOKEH.items()
            ]
        try:
            body: Any = list(view(query, name))
        except Exception as error:
            refusal = refusal_of(error)
            code, body = refusal.status, [h("p", str(refusal), class_="fault", role="alert")]
        return page(
            f"{_VIEWS[path]} - sbert-pg",
            _header(path, name, list(tables)),
            h("main", body, class_=_VIEWS[path].lower()),
            head=scripts,
            status=code,
            styled=path == "/map",
        )

    def search(self, query: QueryParams, name: str) -> Iterator[Any]:
        """One question to every kind of search."""
        exposed = self._table(name)
        question = query.get("q", "").strip()
        where = filters_of(query)
        yield _search_form(exposed, name, question, where)
        if not question:
            yield h("p", _introduction(exposed), class_="faint")
            return
        answers = compared(self._shown, exposed, question, where, reranker=self._reranker)
        yield h("div", answers, class_="columns", id="answers")

    def topics(self, query: QueryParams, name: str) -> Iterator[Any]:
        """The current clusters, or the rows of one."""
        number = query.get("number")
        with self._clustered(name) as (connection, exposed, topics):
            if topics is None:
                yield no_topics(name)
            elif number is not None:
                title = query.get("name", "")
                yield from members(connection, exposed, topics, _whole(number), title)
            else:
                yield from overview(connection, exposed, topics)

    def map(self, query: QueryParams, name: str) -> Iterator[Any]:
        """The frame that the script draws the map in."""
        with self._clustered(name) as (_, exposed, topics):
            if topics is None:
                yield no_topics(name)
                return
        by = query.get("by", "")
        yield h("div", _light(), _colour_by(exposed, name, by), class_="tools")
        yield h(
            "div",
            h("div", id="map", data_table=name, data_by=by, role="img",
              aria_label=f"Rows of {name}"),
            h("div", id="legend", role="group", aria_label="Colours"),
            class_="plot",
        )  # fmt: skip
        yield h("div", id="tip", class_="tip", hidden=True)
        yield h("p", "Loading ...", id="said", role="status")
        yield h("section", id="chosen", aria_live="polite")

    def points(self, query: QueryParams) -> Any:
        """Where the rows of a map are, colour by colour."""
        with self._clustered(query.get("table", "")) as (connection, exposed, topics):
            if topics is None:
                raise RefusedError(404, "There are no clusters of this table.", "not_found")
            return points(connection, exposed, topics, query.get("by", ""))

    def rows(self, query: QueryParams) -> Any:
        """Rows of a table by their keys."""
        keys = query.getlist("key")[:LASSOED]
        rows = self._shown.within(query.get("table"), lambda c, shown: shown.rows(c, keys))
        return [{"key": one.key, "row": one.row} for one in rows]

    def hits(self, query: QueryParams) -> Any:
        """Keys of the rows that a question finds, best first."""
        by = "meaning" if self._table(query.get("table", "")).text is None else "both"
        question = Question(query.get("q", ""), by, LISTED)  # type: ignore[arg-type]
        return [one.key for one in self._shown.ask(query.get("table"), question)]

    def change(self, query: QueryParams, name: str) -> Iterator[Any]:
        """Changes of encoder that are under way."""
        return changes(self._shown, query, self._pace, self._queries)

    def health(self, query: QueryParams, name: str) -> Iterator[Any]:
        """Columns, failed rows, and what the doctor finds."""
        return health(self._shown, self._diagnose)

    def _table(self, name: str) -> Exposed:
        return self._shown.within(name, lambda _, exposed: exposed)

    @contextmanager
    def _clustered(self, name: str) -> Iterator[tuple[sa.Connection, Exposed, Clustering | None]]:
        with self._shown.connected() as connection:
            exposed = self._table(name)
            yield connection, exposed, self._topics(connection, exposed)


def _header(path: str, name: str, tables: Sequence[str]) -> Html:
    links = [
        h("a", label, href=f"/explore{view}?{urlencode({'table': name})}",
          aria_current="page" if view == path else None)
        for view, label in _VIEWS.items()
    ]  # fmt: skip
    choice = h(
        "form",
        h("select", [h("option", t, value=t, selected=t == name) for t in tables], name="table",
          aria_label="Table"),
        h("button", "Show"),
        class_="choice",
    )  # fmt: skip
    return h("header", h("b", "sbert-pg"), h("nav", links), choice if len(tables) > 1 else None)


def _search_form(
    exposed: Exposed, name: str, question: str, where: Mapping[str, Mapping[str, str]]
) -> Html:
    filters = [(c, o, v) for c, values in where.items() for o, v in values.items()]
    lines = [
        h(
            "div",
            h("select", h("option", "filter by ...", value=""),
              [h("option", c, value=c, selected=c == column) for c in exposed.columns],
              name="c", aria_label="Column"),
            h("select", [h("option", o, value=o, selected=o == operator) for o in OPERATORS],
              name="o", aria_label="Operator"),
            h("input", name="v", value=value, aria_label="Value", dir="auto"),
            class_="filter",
        )
        for column, operator, value in [*filters, ("", "=", "")]
    ]  # fmt: skip
    return h(
        "form",
        h("input", type="hidden", name="table", value=name),
        h("div", h("input", type="search", name="q", value=question, dir="auto", autofocus=True,
                   placeholder="What are you looking for?", aria_label="Question", required=True),
          h("button", "Search"), class_="ask"),
        h("div", lines, class_="filters"),
        role="search",
    )  # fmt: skip


def _light() -> Html:
    return h(
        "form",
        h("input", type="search", name="q", placeholder="Light up what a question finds",
          aria_label="Question", dir="auto"),
        h("button", "Search"),
        id="light",
    )  # fmt: skip


def _colour_by(exposed: Exposed, name: str, by: str) -> Html:
    choices = [h("option", "cluster", value="")] + [
        h("option", column, value=column, selected=column == by) for column in exposed.columns
    ]
    return h(
        "form",
        h("input", type="hidden", name="table", value=name),
        h("label", "Colour by ", h("select", choices, name="by")),
        h("button", "Show"),
        class_="choice",
    )


def _introduction(exposed: Exposed) -> str:
    kinds, more = "by meaning, by words, by both", ""
    if exposed.text is None:
        kinds, more = "by meaning", " A text column, declared with text_column(), adds the others."
    return f"{exposed.bound} is asked {kinds}, and compared with the exact answer.{more}"


@cache
def _bokeh(name: str) -> bytes:
    spec = importlib.util.find_spec("bokeh")
    if spec is None or spec.origin is None:
        raise MissingExtraError("bokeh", "explore", "draw the map")
    return Path(spec.origin).with_name("server").joinpath("static", "js", name).read_bytes()


def _whole(text: str) -> int:
    with suppress(ValueError):
        return int(text[:20])
    raise RefusedError(400, "A cluster's number is a whole number.", "invalid_value")


def _data(view: Callable[[QueryParams], Any], query: QueryParams) -> Response:
    return Response(json_bytes(view(query)), headers=guarded(), media_type=JSON)


def _file(read: Callable[[], bytes], kind: str, query: QueryParams) -> Response:
    headers = guarded() | {"Cache-Control": "max-age=3600"}
    return Response(read(), headers=headers, media_type=kind)
