"""The section of a report about one stage: verdict, curves, scores, training rows, confusion matrix, events."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstages import config as recipes
from jaxstages.config import Recipe
from jaxstages.config.metrics import LOSSES, higher_is_better
from jaxstages.config.parts import metric_name
from jaxstages.data.row_text import Span
from jaxstages.data.stage_data import WATCH
from jaxstages.experiments.confusion import Confusion
from jaxstages.experiments.figures import MAX_POINTS, Line, dot_matrix, line_chart
from jaxstages.experiments.markup import Cell, Markup, heat, number, percent, table, tag
from jaxstages.experiments.runs import Run, best_line
from jaxstages.experiments.training_rows import TrainingRows

MAX_CHARACTERS = 700
"""Characters of a training row that are shown."""

MAX_EVENTS = 20
"""Skipped steps that are listed."""

MAX_LABELS = 12
"""A confusion matrix of more labels is drawn as dots, without numbers."""

MAX_CONFUSIONS = 20
"""Pairs of labels that are listed, the most frequent first."""

GRADIENT_NORM = "Gradient norm, before clipping"

SYMBOLS = {"healthy": "✓", "diverging": "✗"}
"""Symbol of a verdict; of all others "!"."""

OTHER_LINES = (("watch-1", "dashed"), ("watch-2", "dotted"), ("watch-3", "dashed"), ("watch-1", "dotted"))
"""Color and dash of the curves of watched stages and further data sets, in turn."""


class MeasuredSet(NamedTuple):
    """Held-out data that a stage is measured on.

    prefix: of its metrics: "" for the stage's own set, "pairs/" for one of `mixture`, "watch/pretrain/" for that of a
        watched stage.
    label: name for a reader.
    metrics: names of its metrics beside those of all stages.
    """

    prefix: str
    label: str
    metrics: list[str]


class Best(NamedTuple):
    """The evaluation that is handed on, or the best so far. metrics: all metrics of it."""

    step: int
    metrics: dict[str, Any]
    is_final: bool


Reason = str
"""Why a part of the report is missing."""


def measured_sets(recipe: Recipe, name: str) -> list[MeasuredSet]:
    """List the held-out sets that a stage can be measured on, its own first."""
    stages = recipes.stages(recipe)
    stage, earlier = stages[name], list(stages)[: list(stages).index(name)]

    def metrics(evaluation: recipes.EvaluationConfig) -> list[str]:
        return [metric_name(metric) for metric in evaluation.metrics]

    sets = [MeasuredSet("", name, metrics(stage.evaluation))]
    sets += [MeasuredSet(f"{key}/", key, metrics(part.evaluation)) for key, part in stage.mixture.items()]
    watched = [(f"{WATCH}{each}/", f"{each}, watched", stages[each].evaluation) for each in earlier]
    return sets + [MeasuredSet(prefix, label, metrics(evaluation)) for prefix, label, evaluation in watched]


def best_of(run: Run, recipe: Recipe, name: str) -> Best | None:
    """Return the best evaluation of a stage; None if there is none yet."""
    if (result := run.results.get(name)) is not None:
        return Best(result["best_step"], result.get("best", {}), True)
    best = best_line(run, name)
    return None if best is None else Best(best["step"], best, False)


def describe_stage(
    run: Run, recipe: Recipe, name: str, rows: TrainingRows | Reason, confusion: Confusion | Reason | None
) -> list[Markup]:
    """Return the content of the section about a stage that has begun.

    Args:
        rows: what it was trained on, or why this can't be shown.
        confusion: None for a task that has no labels.
    """
    best = best_of(run, recipe, name)
    return [
        _verdict(run, recipe, name),
        tag("div", _loss_figure(run, recipe, name, best), _scores(run, recipe, name, best), class_="halves"),
        tag("h3", "Curves"),
        *_panels(run, recipe, name),
        *_parts_of_scores(recipe, name, best),
        *_confusion_section(name, f"confusion-{_number(recipe, name)}", confusion),
        *_training_rows(name, rows),
        *_events(run, name),
    ]


def status_of(run: Run, recipe: Recipe, name: str) -> str:
    """Describe how far a stage is."""
    if name not in run.metrics:
        return "not begun"
    if (result := run.results.get(name)) is not None:
        return f"{result['status'].replace('_', ' ')} at step {result['steps']:,}"
    steps = recipes.stages(recipe)[name].loop.steps
    return f"not finished, at step {run.last_step(name):,}" + (f" of {steps:,}" if steps else "")


def verdict_name(verdict: dict[str, str]) -> str:
    """Return the name of a verdict with its symbol."""
    return f"{SYMBOLS.get(verdict['name'], '!')} {verdict['name']}"


def _verdict(run: Run, recipe: Recipe, name: str) -> Markup:
    result = run.results.get(name, {})
    verdict = result.get("verdict")
    if verdict is None:
        return tag("p", f"{status_of(run, recipe, name).capitalize()}; a verdict follows at its end.")
    heading = tag("strong", verdict_name(verdict))
    lines = [tag("p", heading, f": {verdict['evidence']}."), tag("p", f"What to do: {verdict['remedy']}.")]
    if events := run.events(name, "early_stopping"):
        lines.append(tag("p", f"Early stopping at step {events[-1]['step']:,}: {events[-1]['reason']}."))
    return tag("div", *lines, class_=f"verdict {'good' if verdict['name'] == 'healthy' else 'poor'}")


# Curves ------------------------------------------------------------------------------------------------------------


def _loss_figure(run: Run, recipe: Recipe, name: str, best: Best | None) -> Markup:
    train, held_out = run.curve(name, "train", "loss"), run.curve(name, "eval", "loss")
    lines = {"training": Line(train, "train"), "held-out": Line(held_out, "held-out", marked=True)}
    average = run.curve(name, "eval", "average/loss")
    lines |= {"held-out, moving average": Line(average, "held-out", "dashed", marked=True)} if average else {}
    lines |= _other_lines(run, recipe, name, "loss")
    lines = {label: line for label, line in lines.items() if line.points}
    if not lines:
        return tag("p", "No finite loss was logged yet.")

    skipped = [event["step"] for event in run.events(name, "step skipped")]
    keys = legend(lines)
    mark = None
    if best is not None:
        losses = dict(held_out)
        if best.step in losses:
            mark = (best.step, losses[best.step])
        keys.append(_best_key(recipe, name, best))
    if skipped:
        keys.append(tag("li", tag("span", "×", class_="symbol bad"), f"skipped steps: {len(skipped):,}"))
    title = f"Loss of {name}, nats per scored token"
    chart = line_chart(
        f"loss-{_number(recipe, name)}",
        list(lines.values()),
        f"{title}. {describe_lines(lines)}" + (f" Best step {best.step:,}." if best else ""),
        height=250,
        may_be_log=True,
        best=mark,
        skipped=skipped,
    )
    return figure(title, chart, keys, _notes(run, name, lines))


def _best_key(recipe: Recipe, name: str, best: Best) -> Markup:
    metric = recipes.stages(recipe)[name].early_stopping.metric
    role = "best step, handed on" if best.is_final else "best step so far"
    text = f"{role}: {best.step:,} ({metric} {number(best.metrics.get(metric))})"
    return tag("li", tag("span", "○", class_="symbol"), text)


def _notes(run: Run, name: str, lines: dict[str, Line]) -> str:
    notes = []
    missing = [line["step"] for line in run.metrics[name] if line["kind"] != "event" and line.get("loss", 0) is None]
    if missing:
        notes.append(f"{len(missing):,} lines without a finite loss are left out, the first at step {missing[0]:,}.")
    largest = max(line.bucket_size for line in lines.values())
    return " ".join([*notes, *([_decimation_note(largest)] if largest > 1 else [])])


def _decimation_note(bucket_size: int) -> str:
    return (
        f"Of curves with more than {MAX_POINTS} logged values, a point is the mean of up to {bucket_size:,}, and the "
        "band reaches from the smallest to the largest of them."
    )


def _other_lines(run: Run, recipe: Recipe, name: str, metric: str) -> dict[str, Line]:
    """Return the curves of a metric on all held-out sets but the stage's own, by label."""
    curves = {each.label: run.curve(name, "eval", each.prefix + metric) for each in measured_sets(recipe, name)[1:]}
    curves = {label: points for label, points in curves.items() if points}
    styles = itertools.cycle(OTHER_LINES)
    return {
        label: Line(points, color, dash, marked=True)
        for (label, points), (color, dash) in zip(curves.items(), styles, strict=False)
    }


def _panels(run: Run, recipe: Recipe, name: str) -> list[Markup]:
    """Return small charts of what the optimizer did, and of each metric of held-out data."""
    train_charts = {
        "Learning rate": "learning_rate",
        GRADIENT_NORM: "grad_norm",
        "Throughput, tokens per second": "tokens_per_second",
        "Anchor, nats per token": "anchor",
    }
    charts = {title: {title: Line(run.curve(name, "train", key), "train")} for title, key in train_charts.items()}
    metrics = dict.fromkeys(metric for each in measured_sets(recipe, name) for metric in each.metrics)
    for metric in metrics:
        own = {"held-out": Line(run.curve(name, "eval", metric), "held-out", marked=True)}
        charts[f"{metric} of held-out data"] = own | _other_lines(run, recipe, name, metric)

    figures, largest = [], 1
    for title, lines in charts.items():
        lines = {label: line for label, line in lines.items() if line.points}
        if not lines:
            continue
        chart_name = f"panel-{_number(recipe, name)}-{len(figures)}"
        description = f"{title}. {describe_lines(lines)}"
        chart = line_chart(chart_name, [*lines.values()], description, may_be_log=title == GRADIENT_NORM)
        keys = legend(lines) if set(lines) - {"held-out"} and len(charts[title]) > 1 else []
        figures.append(figure(title, chart, keys, ""))
        largest = max(largest, *(line.bucket_size for line in lines.values()))
    note = [tag("p", _decimation_note(largest), class_="note")] if largest > 1 else []
    return [tag("div", *figures, class_="panels"), *note]


def figure(title: str, chart: Markup, keys: list[Markup], note: str) -> Markup:
    entries = [tag("ul", *keys, class_="keys")] if keys else []
    notes = [tag("p", note, class_="note")] if note else []
    return tag("figure", tag("figcaption", tag("strong", title), *entries), chart, *notes)


def legend(lines: dict[str, Line]) -> list[Markup]:
    """Return the entries of a legend."""
    return [
        tag("li", tag("span", class_="key", style=f"border-top: 2px {line.dash} var(--{line.color})"), label)
        for label, line in lines.items()
    ]


def describe_lines(lines: dict[str, Line]) -> str:
    """Describe curves in words, for those who can't see them."""
    texts = []
    for label, line in lines.items():
        (first_step, first), (last_step, last) = line.points[0], line.points[-1]
        values = [value for _, value in line.points]
        text = f"{label}: {number(first)} at step {first_step:,}, {number(last)} at step {last_step:,}"
        texts.append(f"{text}, between {number(min(values))} and {number(max(values))}.")
    return " ".join(texts)


def _number(recipe: Recipe, name: str) -> int:
    """Return a number for a stage: its name may have characters that an id can't."""
    return list(recipes.stages(recipe)).index(name)


# Scores ------------------------------------------------------------------------------------------------------------


def _scores(run: Run, recipe: Recipe, name: str, best: Best | None) -> Markup:
    """Return the held-out metrics at the start of the stage and at its best step."""
    start = next((line for line in run.metrics[name] if line["kind"] == "eval" and line["step"] == 0), {})
    metrics = best.metrics if best is not None else {}
    rows = []
    for each in measured_sets(recipe, name):
        losses = LOSSES if not each.prefix else ("loss", "perplexity")
        for metric in dict.fromkeys((*losses, *each.metrics)):
            key = each.prefix + metric
            if start.get(key) is None and metrics.get(key) is None:
                continue
            label = metric if not each.prefix else f"{each.label}: {metric}"
            rows.append([label, number(start.get(key)), number(metrics.get(key)), number(metrics.get(f"{key}_se"))])
    heads = ["held-out", "at the start", f"at step {best.step:,}" if best else "best step", "± error"]
    return table(f"Scores of {name}", heads, rows) if rows else tag("p", "Nothing was measured yet.")


def _parts_of_scores(recipe: Recipe, name: str, best: Best | None) -> list[Markup]:
    """Return the scores by kind of record, and the loss by source, where there are several."""
    if best is None:
        return []
    tables = []
    for each in measured_sets(recipe, name):
        if each.prefix.startswith(WATCH):
            continue
        for metric in ("exact_match", "loss"):
            prefix = f"{each.prefix}{metric}/"
            values = {key.removeprefix(prefix): value for key, value in best.metrics.items() if key.startswith(prefix)}
            values = {part: value for part, value in values.items() if value is not None and not part.endswith("_se")}
            if not values:
                continue
            largest = 100.0 if higher_is_better(metric) else max(*values.values(), 1e-9)
            title = f"{each.prefix}{metric} at step {best.step:,}, by {'kind' if metric == 'exact_match' else 'source'}"
            by_value = sorted(values.items(), key=lambda item: item[1], reverse=higher_is_better(metric))
            digits = 1 if metric == "exact_match" else 3
            rows = [[part, f"{value:.{digits}f}", _bar(value / largest)] for part, value in by_value]
            tables.append(table(title, ["kind" if metric == "exact_match" else "source", metric, "bar"], rows))
    return [tag("h3", "Scores by kind"), tag("div", *tables, class_="halves")] if tables else []


def _bar(share: float) -> Cell:
    width = f"width: {100 * min(max(share, 0.0), 1.0):.1f}%"
    return Cell(tag("span", class_="bar", style=width), class_="bars")


# Confusion matrix --------------------------------------------------------------------------------------------------


def _confusion_section(name: str, chart_name: str, confusion: Confusion | Reason | None) -> list[Markup]:
    if confusion is None:
        return []
    heading = tag("h3", "Confusion matrix")
    if not isinstance(confusion, Confusion):
        return [heading, tag("p", f"The confusion matrix is missing: {confusion}.")]
    labels, counts = confusion
    right = int(np.trace(counts))
    summary = f"{right:,} of {int(counts.sum()):,} held-out records of {name} are classified as their label."
    small = len(labels) <= MAX_LABELS
    matrix = _confusion_table(confusion) if small else _confusion_dots(chart_name, confusion, summary)
    return [heading, tag("p", summary), matrix, _per_label(confusion), *([] if small else [_confused_pairs(confusion)])]


def _confusion_table(confusion: Confusion) -> Markup:
    labels, counts = confusion
    rows = []
    for label, row in zip(labels, counts, strict=True):
        shares = row / max(row.sum(), 1)
        cells = [Cell(f"{int(count)}", "heat", heat(share)) for count, share in zip(row, shares, strict=True)]
        rows.append([label, *cells])
    return table("Records by true label (rows) and predicted label (columns)", ["true label", *labels], rows)


def _confusion_dots(chart_name: str, confusion: Confusion, summary: str) -> Markup:
    labels, counts = confusion
    title = f"Records by true label (rows) and predicted label (columns), {len(labels)} labels"
    keys = [
        tag("li", tag("span", "●", class_="symbol right"), "right"),
        tag("li", tag("span", "●", class_="symbol bad"), "wrong"),
    ]
    chart = dot_matrix(chart_name, counts, f"{title}. {summary}")
    note = "Labels are in the order of the table below, from the top and from the left."
    return figure(title, chart, keys, note)


def _per_label(confusion: Confusion) -> Markup:
    labels, counts = confusion
    true, predicted, hits = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    rows = [
        [label, f"{true[i]}", percent(hits[i] / true[i]) if true[i] else "–", _share(hits[i], predicted[i])]
        for i, label in enumerate(labels)
    ]
    return tag(
        "details",
        tag("summary", f"Recall and precision of {len(labels)} labels"),
        table("Recall and precision of each label", ["label", "records", "recall", "precision"], rows),
    )


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if whole else "–"


def _confused_pairs(confusion: Confusion) -> Markup:
    labels, counts = confusion
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    pairs = [divmod(int(index), len(labels)) for index in order]
    rows = [[labels[i], Cell(labels[j], "text"), f"{wrong[i, j]}"] for i, j in pairs if wrong[i, j]]
    if not rows:
        return tag("p", "No label is taken for another.")
    return table("Labels that are confused most often", ["true label", Cell("predicted as", "text"), "records"], rows)


# Training rows and events ------------------------------------------------------------------------------------------


def _training_rows(name: str, rows: TrainingRows | Reason) -> list[Markup]:
    heading = tag("h3", "What it was trained on")
    if not isinstance(rows, TrainingRows):
        return [heading, tag("p", f"The training rows are missing: {rows}.")]
    legend = tag(
        "p",
        f"The first {len(rows.rows)} of {rows.batch_size:,} rows of batch 0. The model is trained to produce what is ",
        tag("mark", "marked"),
        f"; the rest is only read, {percent(rows.context_share)} of the batch's tokens. ¦ begins an example.",
    )
    items = [tag("li", *_row(spans), dir="auto") for spans in rows.rows]
    uses = tag("ul", *(tag("li", line) for line in rows.uses))
    return [heading, legend, tag("ol", *items, class_="rows"), uses]


def _row(spans: Sequence[Span]) -> list[str]:
    parts: list[str] = []
    left = MAX_CHARACTERS
    for index, span in enumerate(spans):
        text = f"¦{span.text}" if span.begins else span.text
        parts.append(tag("mark", text[:left]) if span.trained else text[:left])
        left -= len(text)
        if left <= 0:
            hidden = sum(later.tokens for later in spans[index + 1 :])
            return [*parts, tag("em", f" … and {hidden:,} more tokens" if hidden else " …")]
    return parts


def _events(run: Run, name: str) -> list[Markup]:
    skipped = run.events(name, "step skipped")
    if not skipped:
        return []
    rows = [
        [f"{event['step']:,}", event["why"], number(event.get("loss")), number(event.get("grad_norm"))]
        for event in skipped[:MAX_EVENTS]
    ]
    caption = f"Steps whose update was not applied, the first {len(rows)} of {len(skipped):,}"
    return [tag("h3", "Skipped steps"), table(caption, ["step", "why", "loss", "gradient norm"], rows)]
