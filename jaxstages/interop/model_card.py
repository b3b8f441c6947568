"""The model card of an export: lineage, metrics, and a licence field."""

import re
from pathlib import Path
from typing import Any

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import finished
from jaxstages.config import Recipe
from jaxstages.runtime.files import parse_path
from jaxstages.runtime.workdir import result_file


def lineage_of(stage_dir: Path, chosen: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the results of a stage and of its ancestors, oldest first, as far as they still exist."""
    results = [chosen or finished(stage_dir)]
    seen = {stage_dir.resolve()}
    while parent := results[0]["parent"]:
        recorded = parse_path(parent["path"], "the parent's path")
        candidates = (recorded, stage_dir.parent / recorded.name)  # the run may have moved
        existing = [path for path in candidates if result_file(path).exists() and path.resolve() not in seen]
        if not existing:
            break
        seen.add(existing[0].resolve())
        results.insert(0, finished(existing[0]))
    return results


def licence_field(source: Path) -> str:
    """Return the licence field of the imported model's card; "other" if there is none."""
    file = source / "README.md"
    head = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    front = head.split("---", 2)[1] if head.startswith("---") and head.count("---") > 1 else ""
    match = re.search(r"^license:\s*([\w.-]+)\s*$", front, re.MULTILINE)
    return match[1] if match else "other"


def write_card(
    recipe: Recipe, stage_dir: Path, facts: dict[str, str], licence: str, chosen: dict[str, Any] | None = None
) -> str:
    """Return the card as Markdown.

    Args:
        facts: name and value of the export's properties.
    """
    lineage = lineage_of(stage_dir, chosen)
    lines = ["---", f"license: {licence}", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", "- jaxstages", "---", "", f"# {recipe.name}", ""]
    lines += [f"Stage `{lineage[-1]['stage']}` of the run `{recipe.name}`, trained with jaxstages.", ""]
    if licence == "other":
        lines += ["No licence was chosen yet: who publishes this sets the field `license` above.", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += ["## Lineage", "", "| stage | steps | best step | tokens | data | params_sha256 |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for result in lineage:
        stage = recipes.stages(recipe).get(result["stage"])
        data = ", ".join(f"`{name}`" for name in stage.data.train) if stage else ""
        if result["stage"] == recipes.IMPORT:
            data = f"`{Path(result['source']['folder']).name}` ({result['source']['model_type']})"
        lines.append(
            f"| {result['stage']} | {result['steps']} | {result['best_step']} | {result['tokens']:,} | {data} | "
            f"`{result['params_sha256']}` |"
        )
    lines += ["", "## Scores", ""]
    best = lineage[-1]["best"]
    if best:
        lines += ["On the stage's held-out data, at its best step.", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {name} | {'-' if value is None else f'{value:.4g}'} |" for name, value in best.items()]
    else:
        lines += ["None: these weights were not evaluated."]
    return "\n".join([*lines, ""])
