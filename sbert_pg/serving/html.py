"""HTML as Python writes it: whatever is not markup by its type is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response

#: Elements without an end.
_VOID = frozenset({"input", "meta", "link", "br"})
#: No script but ours, nothing from elsewhere, and no frame around it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'{styles}; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def h(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element. Children are texts, which are escaped, elements, or several of either.

    Attributes have ``_`` for ``-`` and at the end of Python's words (``class_``); ``True`` for one
    without a value, ``None`` or ``False`` for none.
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{tag}{written}>" + ("" if tag in _VOID else f"{_joined(children)}</{tag}>"))


def _joined(children: Iterable[Any]) -> str:
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, Iterable) and not isinstance(child, str):
            parts.append(_joined(child))
        else:
            parts.append(html.escape(str(child)))
    return "".join(parts)


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> Html:
    """A table that scrolls where it has no room."""
    head = h("tr", [h("th", name) for name in heads])
    body = [h("tr", [h("td", cell, dir="auto") for cell in row]) for row in rows]
    return h("div", h("table", h("thead", head), h("tbody", body)), class_="scroll")


def page(
    title: str, *body: Any, head: Any = None, status: int = 200, styled: bool = False
) -> Response:
    """A whole page; ``styled`` where a script draws in it that brings styles of its own."""
    document = h(
        "html",
        h(
            "head",
            h("meta", charset="utf-8"),
            h("meta", name="viewport", content="width=device-width, initial-scale=1"),
            h("title", title),
            h("link", rel="stylesheet", href="/explore/explore.css"),
            h("link", rel="icon", href="data:,"),
            head,
        ),
        h("body", *body),
        lang="en",
    )
    headers = guarded(_POLICY.format(styles=" 'unsafe-inline'" if styled else ""))
    return Response(f"<!doctype html>{document}", status, headers, media_type="text/html")


def guarded(policy: str = "default-src 'none'") -> dict[str, str]:
    """Headers of an answer that only our own pages may use, and that nobody keeps."""
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
