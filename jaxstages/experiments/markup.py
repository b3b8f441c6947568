"""HTML from Python values: text is escaped, unless it is `Markup` already."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Markup(str):
    """Text that is HTML. Every other string is plain text, and is escaped where it becomes part of a page."""

    __slots__ = ()


CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
"""A visible character for each control character, which HTML does not allow."""


def escape(text: str) -> Markup:
    """Escape text of any origin: markup, control characters, and lone surrogates, which no file can hold."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(text.encode("utf-8", "replace").decode().translate(CONTROL_PICTURES)))


def join(parts: Iterable[str], separator: str = "") -> Markup:
    return Markup(escape(separator).join(escape(part) for part in parts))


def tag(name: str, *children: str, **attributes: str | None) -> Markup:
    """Return an element.

    Args:
        children: its content; strings that are no `Markup` are escaped.
        attributes: `class_="x"` is written as class="x", `aria_label` as aria-label; None leaves an attribute out.
    """
    pairs = {key.strip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = " ".join([name, *(f'{key}="{escape(value)}"' for key, value in pairs.items())])
    return Markup(f"<{opening}>{join(children)}</{name}>")


class Section(NamedTuple):
    """A section of the page; the contents link to its anchor."""

    anchor: str
    title: str
    parts: Sequence[str]


class Cell(NamedTuple):
    """A cell of a table that has a class or a style. The class "text" aligns it to the left."""

    content: str
    class_: str | None = None
    style: str | None = None


def table(
    caption: str,
    heads: Sequence[str | Cell],
    rows: Iterable[Sequence[str | Cell]],
    *,
    numbers: bool = True,
    class_: str | None = None,
) -> Markup:
    """Return a table that scrolls sideways where it is wider than the page.

    Args:
        rows: the first cell of each is its heading.
        numbers: right-align all columns but the first.
    """
    columns = [head if isinstance(head, Cell) else Cell(head) for head in heads]
    head = tag("tr", *(tag("th", cell.content, scope="col", class_=cell.class_) for cell in columns))
    body = [_row(row) for row in rows]
    classes = " ".join(filter(None, ["numbers" if numbers else None, class_]))
    element = tag(
        "table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_=classes if classes else None
    )
    # Without a tab stop, a keyboard could not scroll it.
    return tag("div", element, class_="scroll", role="region", tabindex="0", aria_label=caption)


def _row(row: Sequence[str | Cell]) -> Markup:
    cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
    heading = tag("th", cells[0].content, scope="row", class_=cells[0].class_, style=cells[0].style)
    return tag("tr", heading, *(tag("td", cell.content, class_=cell.class_, style=cell.style) for cell in cells[1:]))


def number(value: Any) -> str:
    """Format a number for a reader; "–" where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    if abs(value) >= 10:
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def short_digest(digest: str) -> str:
    """Return the beginning of a SHA-256; "–" for none."""
    return f"{digest[:12]}…" if digest else "–"


def heat(share: float) -> str:
    """Return the style of a cell of a heat map, for a share between 0 and 1."""
    return f"--heat: {0.5 * share:.3f}"
