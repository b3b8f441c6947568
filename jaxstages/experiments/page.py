"""The frame of a report: one HTML file that needs neither a network nor JavaScript."""

import importlib.resources
from collections.abc import Sequence

from jaxstages.experiments.markup import Markup, Section, tag

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy: the browser loads nothing and runs nothing, whatever the data contain."""


def html_page(title: str, header: Markup, sections: Sequence[Section]) -> str:
    """Return a page with its style sheet."""
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Markup(_style_sheet())),
    ]
    bodies = [tag("section", tag("h2", each.title), *each.parts, id=each.anchor) for each in sections]
    body = tag("body", header, tag("main", *bodies))
    return f"<!DOCTYPE html>\n{tag('html', tag('head', *head), body, lang='en')}\n"


def page_header(title: str, lead: str, sections: Sequence[Section]) -> Markup:
    """Return the header of a page: its title, a sentence, and the contents."""
    links = [tag("li", tag("a", section.title, href=f"#{section.anchor}")) for section in sections]
    contents = tag("nav", tag("ul", *links), aria_label="Contents")
    return tag("header", tag("h1", title), tag("p", lead, class_="lead"), contents)


def _style_sheet() -> str:
    return importlib.resources.files("jaxstages.experiments").joinpath("report.css").read_text(encoding="utf-8")
