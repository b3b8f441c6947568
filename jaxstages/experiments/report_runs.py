"""The report of several runs: their curves together, and the table of `jaxstages compare`, for each stage."""

import statistics
from collections.abc import Sequence

from jaxstages.experiments.compare import (
    Comparison,
    compare,
    measured_stages,
    notes_of,
    row_curve,
    row_label,
    table_of,
)
from jaxstages.experiments.figures import Line, line_chart
from jaxstages.experiments.markup import Markup, Section, table, tag
from jaxstages.experiments.page import html_page, page_header
from jaxstages.experiments.report_stage import describe_lines, figure, legend
from jaxstages.experiments.runs import Run

STYLES = [
    (color, dash)
    for dash in ("solid", "dashed", "dotted")
    for color in ("held-out", "watch-1", "watch-2", "watch-3", "train", "ink")
]
"""Color and dash of each row's curve."""


def compared_page(runs: Sequence[Run], stage: str | None = None, metric: str | None = None) -> str:
    """Return the report of several runs as HTML.

    Args:
        stage: by default all stages that all runs have begun, and some have measured.
        metric: by default, in each stage, the metric of early stopping.

    Raises:
        ValueError: the runs have no stage in common, or do not measure the metric.
    """
    comparisons = [compare(runs, name, metric) for name in ([stage] if stage else measured_stages(runs))]
    sections = [
        Section(f"stage-{number}", comparison.stage, _stage_parts(comparison, number))
        for number, comparison in enumerate(comparisons)
    ]
    sections.append(Section("runs", "Runs", [_runs_table(runs)]))
    names = dict.fromkeys(str(run.recipe["name"]) for run in runs)
    lead = f"{len(runs)} runs of {', '.join(names)}. A row is one recipe; its runs differ in the seed alone."
    return html_page("Compared runs", page_header("Compared runs", lead, sections), sections)


def _stage_parts(comparison: Comparison, number: int) -> list[Markup]:
    stage, metric = comparison.stage, comparison.metric
    charts = {f"{metric} of held-out data": ("eval", metric), "loss of held-out data": ("eval", "loss")}
    charts["loss in training"] = ("train", "loss")
    figures = []
    for title, (kind, name) in charts.items():
        lines = _lines(comparison, kind, name)
        if lines:
            chart = line_chart(
                f"chart-{number}-{len(figures)}",
                [*lines.values()],
                f"{stage}: {title}. {describe_lines(lines)}",
                may_be_log=name == "loss",
            )
            figures.append(figure(title, chart, legend(lines), ""))

    headings, cells = table_of(comparison)
    notes = [tag("p", note, class_="note") for note in notes_of(comparison)]
    has_means = any(len(row.runs) > 1 for row in comparison.rows)
    means = "A curve is the mean over the seeds of a row, at the steps that all of them reached."
    return [
        table(f"Comparison in {stage}", headings, cells),
        *notes,
        tag("div", *figures, class_="halves"),
        *([tag("p", means, class_="note")] if has_means else []),
    ]


def _lines(comparison: Comparison, kind: str, metric: str) -> dict[str, Line]:
    """Return a curve for each row by its label, without rows that have no such values."""
    lines: dict[str, Line] = {}
    for number, row in enumerate(comparison.rows):
        by_step = row_curve(row, comparison.stage, kind, metric)
        points = [(step, statistics.fmean(values)) for step, values in by_step.items()]
        color, dash = STYLES[number % len(STYLES)]
        label = row_label(row)
        label = label if label not in lines else f"{label} ({number + 1})"
        if points:
            lines[label] = Line(points, color, dash, marked=kind == "eval")
    return lines


def _runs_table(runs: Sequence[Run]) -> Markup:
    rows = [
        [str(run.folder), str(run.recipe["seed"]), f"{len(run.results)} of {len(run.stages)} begun stages finished"]
        for run in runs
    ]
    return table("All runs", ["workdir", "seed", "status"], rows, numbers=False)
