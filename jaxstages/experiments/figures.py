"""Line charts and a matrix of dots as inline SVG, drawn by matplotlib.

A figure has no colours of its own. It refers to variables of the page's style sheet, which has values for light and for
dark. Its only texts are numbers and the word "step": names stand beside it, in the page.
"""

import io
import logging
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from jaxstages.experiments.markup import Markup

WIDTH = 400
"""Width of a figure in its own units, which are CSS pixels where the page gives it that much."""

FONT_SIZE = 12

MAX_POINTS = 300
"""Most points of a line; longer curves are averaged in as many buckets."""

MAX_MARKS = 200
"""Most skipped steps that are marked."""

ROUND_STEPS = (1, 2, 2.5, 5, 10)
"""Distances between ticks, times a power of ten."""

LOG_RATIO = 20.0
"""Losses and norms are drawn on a logarithmic axis if the largest is this many times the smallest."""

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"

COLORS = ("ink", "muted", "grid", "train", "held-out", "watch-1", "watch-2", "watch-3", "bad")
"""Variables of the style sheet that figures use."""

SENTINELS = {color: f"#fe{index:02x}01" for index, color in enumerate(COLORS)}
"""The color that stands for each variable while matplotlib draws."""

DASHES = {"solid": "solid", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.5))}


class Line(NamedTuple):
    """A line of a chart.

    points: (step, value), by step.
    color: one of `COLORS`.
    dash: one of `DASHES`.
    marked: draw a dot at each point, for few points.
    """

    points: Sequence[tuple[int, float]]
    color: str
    dash: str = "solid"
    marked: bool = False

    @property
    def bucket_size(self) -> int:
        """Number of values that a point of the drawn line is the mean of."""
        return max(math.ceil(len(self.points) / MAX_POINTS), 1)


class Buckets(NamedTuple):
    """A decimated curve: in each bucket of neighbouring points, the mean step, and the mean, the smallest and the
    largest value."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def decimate(points: Sequence[tuple[int, float]], limit: int = MAX_POINTS) -> Buckets:
    """Average neighbouring points so that at most `limit` are left.

    | limit 2     |                        |
    | points      | (1, 4) (2, 2) (3, 9)   |
    | steps, mean | 1.5, 3.0  and 3.0, 9.0 |
    """
    steps, values = np.asarray(points, np.float64).reshape(-1, 2).T
    size = max(math.ceil(len(points) / limit), 1)
    starts = np.arange(0, len(points), size)
    if not len(points):
        return Buckets(steps, values, values, values)
    counts = np.diff(np.append(starts, len(points)))
    return Buckets(
        np.add.reduceat(steps, starts) / counts,
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def line_chart(
    name: str,
    lines: Sequence[Line],
    description: str,
    *,
    height: int = 200,
    may_be_log: bool = False,
    best: tuple[int, float] | None = None,
    skipped: Sequence[int] = (),
) -> Markup:
    """Draw values over steps.

    Args:
        name: unique on the page; part of the ids in the figure.
        description: text alternative.
        may_be_log: use a logarithmic axis if the values need it.
        best: step and value of the best evaluation, marked by a vertical line and a ring.
        skipped: steps whose update was not applied, marked at the lower edge.
    """
    lines = [line for line in lines if line.points]
    values = [value for line in lines for _, value in line.points]
    is_log = may_be_log and min(values) > 0 and max(values) > LOG_RATIO * min(values)
    with _drawing(height) as (axes, finish):
        if is_log:
            axes.set_yscale("log")
        for line in lines:
            _draw_line(axes, line)
        if best is not None:
            step, value = best
            axes.axvline(step, color=SENTINELS["ink"], linewidth=1, linestyle=DASHES["dotted"])
            ring = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.6}
            axes.plot([step], [value], color=SENTINELS["ink"], linestyle="none", clip_on=False, **ring)
        if skipped:
            marks = skipped[:: math.ceil(len(skipped) / MAX_MARKS)]
            cross = {"marker": "x", "markersize": 5, "linestyle": "none", "clip_on": False}
            axes.plot(marks, [0] * len(marks), color=SENTINELS["bad"], transform=axes.get_xaxis_transform(), **cross)
        _label_ticks(axes, is_log)
        return finish(name, description)


def _draw_line(axes: Any, line: Line) -> None:
    curve, color = decimate(line.points), SENTINELS[line.color]
    if np.any(curve.low < curve.high):
        axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.25, linewidth=0)
    marker = {"marker": "o", "markersize": 4} if line.marked and len(curve.steps) <= 30 else {}
    if len(curve.steps) == 1:
        marker = {"marker": "o", "markersize": 4}
    axes.plot(curve.steps, curve.mean, color=color, linewidth=1.5, linestyle=DASHES[line.dash], **marker)


def dot_matrix(name: str, counts: np.ndarray, description: str) -> Markup:
    """Draw a square matrix as dots whose area and opacity grow with the count; empty cells stay empty.

    Args:
        counts: int [n, n], the first row at the top.
    """
    rows, columns = np.nonzero(counts)
    shares = counts[rows, columns] / counts.max()
    size = len(counts)
    with _drawing(WIDTH) as (axes, finish):
        colors = [SENTINELS["held-out" if row == column else "bad"] for row, column in zip(rows, columns, strict=True)]
        diameter = 0.8 * WIDTH / size
        axes.scatter(columns, rows, s=(diameter * (0.5 + 0.5 * shares)) ** 2, c=colors, linewidths=0)
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        axes.set_position((0.01, 0.01, 0.98, 0.98))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("")
        return finish(name, description)


@contextmanager
def _drawing(height: int) -> Iterator[tuple[Any, Callable[[str, str], Markup]]]:
    """Yield axes to draw on, and a function that returns the figure as markup.

    matplotlib is imported here, because it takes a second. Its settings are changed for the time of drawing, and no
    state of pyplot is touched.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports that it builds its cache of fonts
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxstages", "path.simplify_threshold": 0.2}):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_axes((0.12, 0.16, 0.86, 0.78))
        for part in (figure.patch, axes.patch, *axes.spines.values()):
            part.set_visible(False)
        axes.grid(axis="y", color=SENTINELS["grid"], linewidth=1)
        axes.tick_params(length=0, which="both", labelsize=FONT_SIZE, labelcolor=SENTINELS["muted"])
        axes.set_xlabel("step", loc="right", fontsize=FONT_SIZE, color=SENTINELS["muted"])

        def finish(name: str, description: str) -> Markup:
            file = io.StringIO()
            canvas.print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
            return _to_markup(file.getvalue(), name, description)

        yield axes, finish


def _label_ticks(axes: Any, is_log: bool) -> None:
    """Choose ticks, and give their labels the space that they need."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    if is_log:
        subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))

    labels = [tick_label(tick) for tick in axes.yaxis.get_major_locator().tick_values(low, high) if low <= tick <= high]
    left = (10 + 0.58 * FONT_SIZE * max(map(len, labels), default=1)) / WIDTH
    box = axes.get_position()
    axes.set_position((left, box.y0, 0.97 - left, box.height))


def tick_label(value: float) -> str:
    """Format a tick: 7.5e-4, 0.003, 25, 1,200, 40k, 1.5M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 10_000:
        return f"{value / 1e3:g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.001 or value == 0:
        return f"{value:.6g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _to_markup(svg: str, name: str, description: str) -> Markup:
    """Return matplotlib's SVG without namespaces, fonts and unused ids, with variables as colors and unique ids."""
    for color, sentinel in SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{color})")
    root = ElementTree.fromstring(svg)
    used = {text.split("#")[1].rstrip(")") for element in root.iter() for text in _references(element)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        if XLINK + "href" in element.attrib:
            element.set("href", element.attrib.pop(XLINK + "href"))
        for key, value in element.attrib.items():
            if key in ("href", "clip-path"):
                element.set(key, value.replace("#", f"#{name}-"))
        if (identifier := element.attrib.pop("id", None)) in used:
            element.set("id", f"{name}-{identifier}")
        if element.tag == "text":
            _simplify_text(element)
        if element.tag == "path":
            element.set("d", " ".join(element.get("d", "").split()))
    for parent in root.iter():
        for child in [each for each in parent if each.tag == "style"]:
            parent.remove(child)
    view_box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib |= {"viewBox": view_box, "role": "img", "aria-label": description}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _references(element: ElementTree.Element) -> list[str]:
    values = (element.get(XLINK + "href", ""), element.get("clip-path", ""))
    return [value for value in values if "#" in value]


def _simplify_text(element: ElementTree.Element) -> None:
    """Drop the font, which is the page's, and a rotation by nothing."""
    style = dict(part.strip().split(": ", 1) for part in element.attrib.pop("style", "").split(";") if part.strip())
    if "text-anchor" in style:
        element.set("text-anchor", style["text-anchor"])
    if element.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
        element.attrib.pop("transform")
