"""The sections of a report about the stage matrix: its numbers as a heat map, and the answers to the same prompts."""

import math
from collections.abc import Sequence
from typing import Any

from jaxstages import config as recipes
from jaxstages.config import Recipe
from jaxstages.config.metrics import higher_is_better
from jaxstages.experiments.markup import Cell, Markup, Section, heat, number, table, tag
from jaxstages.experiments.runs import Run
from jaxstages.training.diagnosis import FORGOT

MAX_PROMPT, MAX_ANSWER = 300, 2000
"""Characters of a prompt and of an answer that are shown."""

MAX_PROMPTS = 50
"""Prompts that are shown."""


def matrix_sections(run: Run, recipe: Recipe) -> list[Section]:
    if run.matrix is None:
        return []
    sections = [_matrix(run.matrix, recipe)]
    return [*sections, _samples(run.matrix)] if run.matrix["prompts"] else sections


def _matrix(matrix: dict[str, Any], recipe: Recipe) -> Section:
    """Return the stage matrix, transposed, so that it fits a narrow page: a line for each measure."""
    checkpoints = matrix["checkpoints"]
    rows = []
    for column, values in zip(matrix["columns"], zip(*matrix["values"], strict=True), strict=True):
        stage, _, metric = column.partition("/")
        config = recipes.stages(recipe).get(stage)
        is_higher_better = higher_is_better(metric, config.evaluation.metrics if config is not None else ())
        rows.append([f"{stage}: {metric}", *_matrix_cells(metric, values, checkpoints, is_higher_better)])
    text = (
        "From left to right, a line shows what later stages added, or made the model forget. Within a line, a stronger "
        "colour is better. ● marks the best checkpoint, and ▼ one that is worse than an earlier one."
    )
    caption = "The best checkpoint of each stage (columns) on the held-out data of every stage (lines)"
    heads = ["held-out data", *checkpoints, Cell("last against best", "text")]
    signatures = [tag("p", f"sacreBLEU: {'; '.join(matrix['signatures'])}", class_="note")]
    parts = [tag("p", text), table(caption, heads, rows), *(signatures if matrix["signatures"] else [])]
    return Section("matrix", "Stage matrix", parts)


def _matrix_cells(
    metric: str, values: Sequence[float | None], checkpoints: Sequence[str], is_higher_better: bool
) -> list[Cell]:
    """Return the cells of a measure, and one that compares the last checkpoint with the best."""
    sign = 1 if is_higher_better else -1
    goods = {i: sign * _scale(metric, value) for i, value in enumerate(values) if value is not None}
    if not goods:
        return [Cell("–") for _ in (*checkpoints, "")]
    lowest, highest = min(goods.values()), max(goods.values())
    best = max(goods, key=lambda i: goods[i])
    cells = []
    for i, value in enumerate(values):
        if i not in goods:
            cells.append(Cell("–"))
            continue
        share = (goods[i] - lowest) / (highest - lowest) if highest > lowest else 1.0
        is_worse = any(goods[earlier] > goods[i] for earlier in range(i) if earlier in goods)
        mark = "● " if i == best else "▼ " if is_worse else ""
        cells.append(Cell(mark + number(value), "heat", heat(share)))
    return [*cells, _last_against_best(metric, values, checkpoints, best, goods)]


def _scale(metric: str, value: float) -> float:
    """Perplexities differ by factors: compare their logarithms, which are losses."""
    return math.log(value) if metric == "perplexity" and value > 0 else value


def _last_against_best(
    metric: str, values: Sequence[float | None], checkpoints: Sequence[str], best: int, goods: dict[int, float]
) -> Cell:
    last = len(values) - 1
    last_value, best_value = values[last], values[best]
    if last_value is None or best_value is None:
        return Cell("✗ not finite", "text bad")
    if goods[last] >= goods[best]:
        return Cell("● best", "text")
    text = f"▼ {number(abs(last_value - best_value))} worse than {checkpoints[best]}"
    if metric != "perplexity":
        return Cell(text, "text")
    nats = goods[best] - goods[last]
    text = f"{text}, by {nats:.2f} nats"
    return Cell(f"{text}: forgotten", "text bad") if nats > FORGOT else Cell(text, "text")


def _samples(matrix: dict[str, Any]) -> Section:
    parts: list[Markup] = []
    entries = matrix["prompts"][:MAX_PROMPTS]
    for entry in entries:
        answers = [
            tag("div", tag("dt", name), tag("dd", text.strip()[:MAX_ANSWER] or "(empty)", dir="auto"))
            for name, text in entry["answers"].items()
        ]
        parts += [tag("h3", entry["prompt"][:MAX_PROMPT], dir="auto"), tag("dl", *answers, class_="answers")]
    text = "The same prompts, answered by the best checkpoint of each stage, always with the likeliest token."
    if len(entries) < len(matrix["prompts"]):
        text += f" The first {len(entries)} of {len(matrix['prompts'])} prompts."
    return Section("samples", "Samples", [tag("p", text), *parts])
