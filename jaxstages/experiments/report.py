"""The report of a run: one HTML file that needs neither a network nor JavaScript.

It shows what the workdir records, and can be written at any time: parts that a run does not have are left out, or a
sentence says why they are missing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from jaxstages import config as recipes
from jaxstages.config import Recipe
from jaxstages.experiments.confusion import Confusion, measure_confusion
from jaxstages.experiments.markup import Markup, Section, number, short_digest, tag
from jaxstages.experiments.page import html_page, page_header
from jaxstages.experiments.report_matrix import matrix_sections
from jaxstages.experiments.report_stage import Reason, best_of, describe_stage, status_of, verdict_name
from jaxstages.experiments.report_tables import cost_section, lineage_section, recipe_section, versions_section
from jaxstages.experiments.runs import Run, read_run
from jaxstages.experiments.training_rows import checkpoint_meta, read_training_rows
from jaxstages.runtime.files import write_text

REPORT = "report.html"

TASKS = {
    "lm": "raw text, every token is trained on",
    "seq2seq": "pairs, only the target is trained on",
    "classify": "classes, only the label is trained on",
    "chat": "chats, only the assistant's turns are trained on",
    "own": "a task of the recipe's own",
}

T = TypeVar("T")


def write_report(workdir: Path, recipe: Recipe | None = None) -> Path:
    """Write the report of a run to `workdir/report.html`, and return its path.

    Args:
        recipe: the run's recipe with the code of its own parts. By default that of `recipe.json`, which has no code.

    Raises:
        ValueError: `workdir` is no workdir, or a file of it is damaged.
    """
    file = workdir / REPORT
    write_text(file, report_page(read_run(workdir), recipe))
    return file


def report_page(run: Run, recipe: Recipe | None = None) -> str:
    """Return the report of a run as HTML; see `write_report`."""
    has_code, recipe = recipe is not None, recipe or recipes.from_dict(run.recipe)
    names = list(recipes.stages(recipe))

    sections = [_stages(run, recipe), *matrix_sections(run, recipe)]
    for name in run.stages:
        rows = _value_or_reason(lambda name=name: read_training_rows(recipe, run.folder, name))
        confusion = _confusion(run, recipe, name, has_code)
        sections.append(Section(f"stage-{names.index(name)}", name, describe_stage(run, recipe, name, rows, confusion)))
    metas = {name: _value_or_reason(lambda name=name: checkpoint_meta(run.folder, name)) for name in run.stages}
    sections += [cost_section(run), recipe_section(recipe), lineage_section(run, metas), versions_section(run)]

    return html_page(f"{recipe.name}: report", _header(run, recipe, sections), sections)


def _value_or_reason(read: Callable[[], T]) -> T | Reason:
    """Return what `read` returns, or the words of its ValueError."""
    try:
        return read()
    except ValueError as error:
        return str(error).rstrip(".")


def _confusion(run: Run, recipe: Recipe, name: str, has_code: bool) -> Confusion | Reason | None:
    if recipes.stages(recipe)[name].data.task != "classify":
        return None
    if name not in run.results:
        return "it is measured when the stage is finished"
    if recipes.own_parts(dataclasses.replace(recipe, trackers=())) and not has_code:
        return "the recipe has parts of its own; name its file with `jaxstages report --config=FILE`"
    if jax.process_count() > 1:
        return "several processes do not measure it; write the report again with `jaxstages report`"
    return _value_or_reason(lambda: measure_confusion(recipe, run.folder, name))


# Overview ----------------------------------------------------------------------------------------------------------


def _header(run: Run, recipe: Recipe, sections: Sequence[Section]) -> Markup:
    names = list(recipes.stages(recipe))
    finished = sum(name in run.results for name in names)
    lead = f"{finished} of {len(names)} stages finished. Workdir {run.folder.absolute().name}, seed {recipe.seed}."
    return page_header(recipe.name, lead, sections)


def _stages(run: Run, recipe: Recipe) -> Section:
    """Return the stages as a picture: a card each, under what it began from."""
    cards = [_card(run, recipe, name) for name in recipes.stages(recipe)]
    text = "Each stage hands its best checkpoint on. The next one begins from it, with a fresh optimizer."
    return Section("stages", "Stages", [tag("p", text), tag("ol", *cards, class_="flow")])


def _card(run: Run, recipe: Recipe, name: str) -> Markup:
    stage = recipes.stages(recipe)[name]
    lines = [TASKS[stage.data.task]]
    shares = [f"{share:.0%} {earlier}" for earlier, share in stage.replay]
    shares += [f"{part.share[0]:.0%} {key}" for key, part in stage.mixture.items()]
    if shares:
        lines.append(f"mixed in: {', '.join(shares)} (of the rows)")
    if stage.anchor.weight:
        lines.append(f"anchor on the parent, weight {stage.anchor.weight:g}")
    if stage.lora.rank:
        lines.append(f"LoRA, rank {stage.lora.rank}")

    lines.append(status_of(run, recipe, name))
    best = best_of(run, recipe, name) if name in run.metrics else None
    if best is not None:
        metrics = dict.fromkeys(("loss", stage.early_stopping.metric))
        scores = ", ".join(f"{metric} {number(best.metrics.get(metric))}" for metric in metrics)
        lines.append(f"best step {best.step:,}: {scores}")
    verdict = run.results.get(name, {}).get("verdict")
    outcome = [tag("p", tag("strong", verdict_name(verdict)))] if verdict is not None else []
    card = tag("div", tag("h3", name), *(tag("p", line) for line in lines), *outcome, class_="card")
    origin = _origin(run, recipe, name)
    return tag("li", tag("p", origin.text, class_="origin"), card, class_="child" if origin.is_stage_before else None)


class Origin(NamedTuple):
    """What a stage began from, or will begin from."""

    text: str
    is_stage_before: bool


def _origin(run: Run, recipe: Recipe, name: str) -> Origin:
    names, init_from = list(recipes.stages(recipe)), recipes.stages(recipe)[name].init_from
    before = names[names.index(name) - 1] if names.index(name) else None
    if name in run.results:
        parent = run.results[name]["parent"]
        if parent is None:
            return Origin("from scratch", False)
        parent_name = _parent_name(run, parent)
        text = f"from {parent_name}, step {parent['step']:,}, {short_digest(parent['params_sha256'])}"
        return Origin(text, parent_name == before)
    if init_from == "scratch" or (init_from == "parent" and before is None):
        return Origin("from scratch", False)
    parent_name = before if init_from == "parent" and before is not None else init_from
    return Origin(f"from {parent_name}", parent_name == before)


def _parent_name(run: Run, parent: dict[str, Any]) -> str:
    """Return the name of a parent that is a stage of this run, or the path of another."""
    name = parent["path"].rstrip("/").rpartition("/")[2]
    is_own = run.results.get(name, {}).get("params_sha256") == parent["params_sha256"]
    return name if is_own else parent["path"]
