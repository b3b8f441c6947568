"""Compare runs: which fields differ, what they reached, over seeds, and whether a difference may be chance."""

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scipy.stats
from tabulate import tabulate

from jaxstages import config as recipes
from jaxstages.config.metrics import LOSSES, higher_is_better
from jaxstages.experiments.runs import Run, best_line, stage_config
from jaxstages.runtime.console import duration
from jaxstages.runtime.files import make_folder

stats: Any = scipy.stats

UNCOMPARED = (
    *("config.name", "config.cache", "config.trackers", "config.seed"),
    *(f".loop.{name}" for name in ("stop_after", "save_every", "log_every", "keep", "hang_seconds")),
)
"""Ends of the fields that do not make two runs different experiments: runs that differ in the seed alone are
repetitions."""

FORMATS = {".md": "github", ".tex": "latex_booktabs", ".html": "html", ".csv": "csv"}
"""File types of `write_table`, and their names in tabulate."""


class Summary(NamedTuple):
    """Mean and standard deviation of a value over seeds. sd is NaN for one seed."""

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.n == 1 else f"{self.mean:.4g} ± {self.sd:.2g}"


def summarize(values: Sequence[float]) -> Summary:
    """Summarize finite values; those that are not finite make the mean NaN."""
    sd = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    return Summary(statistics.fmean(values), sd, len(values))


class Difference(NamedTuple):
    """How a row's metric differs from that of the first row.

    p: two-sided p-value; NaN if it can't be computed. test: how it was computed, or why it was not.
    """

    p: float
    test: str


class Row(NamedTuple):
    """Runs of one recipe, with a different seed each.

    fields: the fields in which the rows differ.
    values: by metric, of the step that each run hands on.
    status: statuses and verdicts of the runs, each once.
    difference: from the first row, in the metric that decides; None for the first row itself.
    """

    runs: list[Run]
    fields: dict[str, Any]
    values: dict[str, Summary]
    steps: Summary
    tokens: Summary
    seconds: Summary
    status: list[str]
    difference: Difference | None


class Comparison(NamedTuple):
    """stage, metric: what is compared, and the metric that decides. higher: whether higher values of it are better.
    rows: in the order of the runs. unmeasured: runs without a value of the metric yet, which no row has.
    """

    stage: str
    metric: str
    higher: bool
    rows: list[Row]
    unmeasured: list[Run]


def compare(runs: Sequence[Run], stage: str | None = None, metric: str | None = None) -> Comparison:
    """Compare runs in one stage.

    Args:
        stage: by default the last stage that all of them have begun, and some have measured.
        metric: by default the metric of early stopping.

    Raises:
        ValueError: the runs have no stage in common, or none measures the metric.
    """
    stage = stage or measured_stages(runs)[-1]
    for run in runs:
        if stage not in run.stages:
            raise ValueError(f"{run.folder} has not begun {stage}; it has {', '.join(run.stages) or 'no stage'}")
    metric = metric or str(stage_config(runs[0].recipe, stage)["early_stopping"]["metric"])
    higher = higher_is_better(metric, recipes.all_metrics(recipes.from_dict(runs[0].recipe)))

    reached = {id(run): _reached(run, stage) for run in runs}
    measured = [run for run in runs if metric in reached[id(run)]]
    unmeasured = [run for run in runs if metric not in reached[id(run)]]
    if not measured:
        known = dict.fromkeys(name for values in reached.values() for name in values if not name.endswith("_se"))
        raise ValueError(
            f"{stage}: no run has measured {metric}; "
            + (f"name one of {', '.join(known)} with --metric" if known else "compare them after an evaluation")
        )
    groups = _group_by_fields(measured)
    differing = _differing_fields([fields for fields, _ in groups])

    rows: list[Row] = []
    for fields, members in groups:
        best = [reached[id(run)] for run in members]
        names = [name for name in best[0] if all(name in values for values in best) and not name.endswith("_se")]
        results = [run.results.get(stage, {}) for run in members]
        trained = [run.metrics[stage] for run in members]
        rows.append(
            Row(
                runs=members,
                fields={name: fields.get(name) for name in differing},
                values={name: summarize([values[name] for values in best]) for name in names},
                steps=summarize([lines[-1]["step"] if lines else 0 for lines in trained]),
                tokens=summarize([result.get("tokens", math.nan) for result in results]),
                seconds=summarize([result.get("seconds", math.nan) for result in results]),
                status=list(dict.fromkeys(map(_status, results))),
                difference=None,
            )
        )
    decided = {id(run): reached[id(run)][metric] for run in measured}
    for index, row in enumerate(rows[1:], start=1):
        difference = _difference(rows[0].runs, row.runs, decided)
        rows[index] = row._replace(difference=difference)
    return Comparison(stage, metric, higher, rows, unmeasured)


def common_stages(runs: Sequence[Run]) -> list[str]:
    """Return the stages that all runs have begun. Raises ValueError if there is none."""
    common = [name for name in runs[0].stages if all(name in run.stages for run in runs)]
    if not common:
        raise ValueError("the runs have begun no stage in common; name one with --stage, and runs that have it")
    return common


def measured_stages(runs: Sequence[Run]) -> list[str]:
    """Return the stages that all runs have begun and some have evaluated; if there is none, those that all have begun.

    Raises:
        ValueError: there is no such stage.
    """
    common = common_stages(runs)
    return [name for name in common if any(_reached(run, name) for run in runs)] or common


def _group_by_fields(runs: Sequence[Run]) -> list[tuple[dict[str, Any], list[Run]]]:
    """Group runs that differ in UNCOMPARED fields only, in their order. A second run with the same seed is no further
    sample, so it begins a group of its own."""
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        fields = recipes.flat_fields(run.recipe)
        fields = {name: value for name, value in fields.items() if not name.endswith(UNCOMPARED)}
        same = (members for others, members in groups if others == fields)
        seed = run.recipe["seed"]
        members = next((members for members in same if all(seed != each.recipe["seed"] for each in members)), None)
        if members is None:
            groups.append((fields, [run]))
        else:
            members.append(run)
    return groups


def _differing_fields(recipes: Sequence[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for fields in recipes for name in fields))
    return [name for name in names if any(fields.get(name) != recipes[0].get(name) for fields in recipes)]


def _reached(run: Run, stage: str) -> dict[str, float]:
    """Return the metrics of the step that a stage hands on; of an unfinished one, of its best evaluation so far."""
    best = run.results[stage]["best"] if stage in run.results else best_line(run, stage) or {}
    hidden = ("step", "kind")
    return {name: float(value) for name, value in best.items() if name not in hidden and value is not None}


def _status(result: dict[str, Any]) -> str:
    if not result:
        return "unfinished"
    verdict = result.get("verdict") or {}
    return f"{result['status'].replace('_', ' ')}, {verdict['name']}" if verdict.get("name") else result["status"]


def _difference(first: Sequence[Run], other: Sequence[Run], values: dict[int, float]) -> Difference:
    """Test whether two rows differ: a paired t-test over their common seeds, or else Welch's."""
    by_seed = [{run.recipe["seed"]: values[id(run)] for run in row} for row in (first, other)]
    common = sorted(by_seed[0].keys() & by_seed[1].keys())
    if len(common) > 1:
        pairs = [[row[seed] for seed in common] for row in by_seed]
        if pairs[0] == pairs[1]:
            return Difference(1.0, f"equal in {len(common)} seeds")
        return Difference(float(stats.ttest_rel(*pairs).pvalue), f"paired t-test, {len(common)} seeds")
    if min(len(first), len(other)) > 1:
        samples = [[values[id(run)] for run in row] for row in (first, other)]
        return Difference(float(stats.ttest_ind(*samples, equal_var=False).pvalue), "Welch's t-test")
    return Difference(math.nan, "one seed: the difference may be chance")


# Tables and curves --------------------------------------------------------------------------------------------------


def table_of(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells: fields that differ, then metrics, cost, status, and the p-value."""
    metric, rows = comparison.metric, comparison.rows
    names = [name for name in rows[0].values if all(name in row.values for row in rows)]
    shown = [metric, *(name for name in names if name != metric and _is_shown(name))]
    fields = list(rows[0].fields)
    headings = ["run", *(name.removeprefix("config.") for name in fields), "n", *shown]
    headings += ["steps", "tokens", "time", "status", "p"]
    cells = []
    for row in rows:
        label = row.runs[0].folder.name
        if len(row.runs) > 1:
            label = re.sub(r",?seed=[^,]+", "", label).strip(",") or label
        seconds = "-" if math.isnan(row.seconds.mean) else duration(row.seconds.mean)
        tokens = "-" if math.isnan(row.tokens.mean) else f"{row.tokens.mean:,.0f}"
        p = "" if row.difference is None else "-" if math.isnan(row.difference.p) else f"{row.difference.p:.3g}"
        line = [label, *(_cell(row.fields[name]) for name in fields), str(len(row.runs))]
        line += [str(row.values[name]) for name in shown]
        cells.append([*line, f"{row.steps.mean:,.0f}", tokens, seconds, "; ".join(row.status), p])
    return headings, cells


def _is_shown(name: str) -> bool:
    """Whether a metric has a column: those of the stage itself, and the loss of what it watches. The loss stands for
    the metrics that follow from it."""
    return name not in LOSSES[1:] if "/" not in name else name.startswith("watch/") and name.endswith("/loss")


def _cell(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def notes_of(comparison: Comparison) -> list[str]:
    """Return what a reader of the table must know: how p-values were computed, and where there are none."""
    direction = "higher" if comparison.higher else "lower"
    notes = [
        f"{comparison.stage}: {comparison.metric} decides, {direction} is better; mean ± standard deviation over n"
    ]
    tests = [row.difference.test for row in comparison.rows if row.difference is not None]
    notes += [f"p: {test}" for test in dict.fromkeys(tests)]
    for run in comparison.unmeasured:
        yet = "" if comparison.stage in run.results else " yet"
        notes.append(f"left out: {run.folder} has not measured {comparison.metric}{yet}")
    if comparison.unmeasured and tests:
        notes.append(f"the first row is {comparison.rows[0].runs[0].folder}")
    return notes


def format_table(headings: Sequence[str], cells: Sequence[Sequence[str]], suffix: str) -> str:
    """Format a table as Markdown, LaTeX, HTML or CSV.

    Args:
        suffix: a key of FORMATS.
    """
    if suffix == ".csv":
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows([headings, *cells])
        return content.getvalue()
    return str(tabulate(cells, headings, tablefmt=FORMATS[suffix], disable_numparse=True)) + "\n"


def row_label(row: Row) -> str:
    """Return a short name for a row: its fields, or the folder of its first run."""
    fields = ", ".join(f"{name.rpartition('.')[2]}={_cell(value)}" for name, value in row.fields.items())
    return fields if 0 < len(fields) < 60 else row.runs[0].folder.name


def row_curve(row: Row, stage: str, kind: str, metric: str) -> dict[int, list[float]]:
    """Return the values of a metric in all runs of a row by step, at the steps that all of them have: where one ends,
    the mean of the others would jump."""
    curves = [dict(run.curve(stage, kind, metric)) for run in row.runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: [curve[step] for curve in curves] for step in steps}


def plot_curves(comparison: Comparison, file: Path) -> None:
    """Plot the metric over the steps: a line per row, the mean over its seeds, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for row in comparison.rows:
        by_step = row_curve(row, comparison.stage, "eval", comparison.metric)
        steps = [*by_step]
        (line,) = axes.plot(steps, [statistics.fmean(by_step[step]) for step in steps], label=row_label(row))
        if len(row.runs) > 1:
            low, high = ([limit(by_step[step]) for step in steps] for limit in (min, max))
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{comparison.stage}: {comparison.metric}")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    make_folder(file.parent)
    figure.savefig(file)
