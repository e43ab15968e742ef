"""Markup that cannot be broken by a name: text is escaped when it enters an element, only `Html` passes as it is."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

from autoseg.report.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

VOID = frozenset({"meta", "br", "image", "rect", "line", "polyline", "path", "circle"})
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Html(str):
    """Finished markup."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"
Attribute = str | float | None


def escape(text: str) -> str:
    """Return the text for element content or a quoted attribute; control and direction characters are replaced."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True)


def join(*children: Child) -> Html:
    """Return the children one after another: Html as it is, None as nothing, lists flattened, the rest escaped."""
    return Html("".join(_parts(children)))


def _parts(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Html):
            yield child
        elif isinstance(child, str | int | float):
            yield escape(str(child))
        elif child is not None:
            yield from _parts(child)


def el(name: str, *children: Child, **attributes: Attribute) -> Html:
    """Return an element; `class_` means class, `stroke_width` means stroke-width, None leaves an attribute out."""
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:g}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{name}{''.join(pairs)}"
    if name in VOID and not children:
        return Html(f"{opening}>" if name in ("meta", "br") else f"{opening}/>")
    return Html(f"{opening}>{join(*children)}</{name}>")


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str = "") -> Html:
    """Return a table in a box of its own that scrolls where the page is narrower; the first column heads its row."""
    body = []
    for row in rows:
        first, *others = row
        body.append(el("tr", el("th", first, scope="row"), [el("td", cell) for cell in others]))
    top = el("thead", el("tr", [el("th", cell, scope="col") for cell in head]))
    return el("div", el("table", top, el("tbody", body), class_=class_ or None), class_="scroll", tabindex="0")


def section(anchor: str, title: str, *children: Child) -> Html:
    """Return a section of the page that the contents link to."""
    return el("section", el("h2", title), *children, id=anchor)


def folded(summary: Child, *children: Child) -> Html:
    """Return what is there but folded away; printing unfolds it."""
    return el("details", el("summary", summary), *children)


def note(*children: Child) -> Html:
    """Return a remark that the reader should not miss."""
    return el("p", *children, class_="note")


def command(text: str) -> Html:
    """Return a command line."""
    return el("pre", el("code", text), class_="scroll", tabindex="0")


def document(title: str, body: Html) -> Html:
    """Return a whole page that needs no network and runs no script."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name_="color-scheme", content="light dark"),
        el("title", title),
        Html(f"<style>{STYLE}</style>"),
    )
    return join(Html("<!doctype html>\n"), el("html", head, body, lang="en"))
