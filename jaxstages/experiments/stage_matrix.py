"""The stage matrix: every stage's best checkpoint on every stage's held-out data, and the same prompts for all.

A row shows what a checkpoint can do; a column shows what later stages added, or made the model forget.
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import finished
from jaxstages.config import Recipe
from jaxstages.config.parts import metric_name
from jaxstages.data.prompts import encode_prompts
from jaxstages.generation.evaluate import make_answer
from jaxstages.runtime import multihost
from jaxstages.runtime.bucket import is_bucket, local_copy
from jaxstages.runtime.console import say, table_console
from jaxstages.runtime.files import copy_file, write_json
from jaxstages.runtime.workdir import result_file
from jaxstages.training.event_file import TENSORBOARD, EventFile, markdown_table
from jaxstages.training.handoff import read_parent
from jaxstages.training.metric_writer import plain
from jaxstages.training.setup import StageSetup, make_stage_evaluate, setup_stage
from jaxstages.types import Params


def columns_of(setup: StageSetup) -> list[str]:
    """Return the metrics of a stage that the matrix shows: perplexity, and those of its recipe."""
    return ["perplexity", *map(metric_name, setup.config.evaluation.metrics)]


def _answers(setup: StageSetup, params: Params, prompts: list[str]) -> list[str]:
    if not prompts:
        return []
    config = setup.config.evaluation
    answer = make_answer(setup.text_model, config.max_new_tokens, config.batch_size)
    return answer(params, encode_prompts(setup.config.data.task, setup.data.tokenizer, prompts))


def stage_matrix(recipe: Recipe, workdir: Path, keep: bool = True) -> dict[str, Any]:
    """Measure and print the matrix.

    Args:
        keep: also write it to `workdir/stage_matrix.json`.

    Raises:
        ValueError: a stage of the recipe is not finished.
    """
    for name in recipes.stages(recipe):
        finished(workdir / name)
    setups = {name: setup_stage(recipe, name, workdir) for name in recipes.stages(recipe)}
    evaluates = {name: make_stage_evaluate(setup, setup.data.evaluation_sets[:1]) for name, setup in setups.items()}
    columns = [f"{name}/{metric}" for name, setup in setups.items() for metric in columns_of(setup)]

    values, signatures, answers = [], set(), {}
    rows = setups
    if result_file(workdir / recipes.IMPORT).exists():
        rows = {recipes.IMPORT: setup_stage(recipe, recipes.IMPORT, workdir, with_data=False)} | setups
    for checkpoint, setup in rows.items():
        say(f"stage matrix: {checkpoint} on every stage's held-out data", "cyan")
        params, _ = read_parent(setup.folder, setup.program, setup.contract)
        row = []
        for name, eval_setup in setups.items():
            report = evaluates[name](params, True)
            row += [plain(report.metrics[metric]) for metric in columns_of(eval_setup)]
            signatures |= set(report.signatures)
        values.append(row)
        answers[checkpoint] = _answers(setup, params, list(recipe.prompts))

    prompts = [
        {"prompt": prompt, "answers": {name: answers[name][i] for name in rows}}
        for i, prompt in enumerate(recipe.prompts)
    ]
    matrix = {
        "checkpoints": list(rows),
        "columns": columns,
        "values": values,
        "prompts": prompts,
        "signatures": sorted(signatures),
    }
    if keep and multihost.is_process_zero():
        write_json(workdir / "stage_matrix.json", matrix)
        _write_events(matrix, workdir)
    show_matrix(matrix)
    return matrix


def _write_events(matrix: dict[str, Any], workdir: Path) -> None:
    """Show the matrix, and the answers to the recipe's prompts, on TensorBoard's text page."""
    events = EventFile(local_copy(workdir) / TENSORBOARD)
    rows = [[name, *values] for name, values in zip(matrix["checkpoints"], matrix["values"], strict=True)]
    events.write_text(0, "stage matrix", markdown_table(["checkpoint", *matrix["columns"]], rows))
    if answers := [[entry["prompt"], *entry["answers"].values()] for entry in matrix["prompts"]]:
        events.write_text(0, "prompts", markdown_table(["prompt", *matrix["checkpoints"]], answers))
    events.close()
    if is_bucket(workdir):
        copy_file(events.file, workdir / TENSORBOARD / events.file.name)


def show_matrix(matrix: dict[str, Any]) -> None:
    """Print the matrix, and the answers to the recipe's prompts."""
    console = table_console(120)
    table = Table(title="stage matrix (best checkpoint of each stage, on all held-out data)", title_justify="left")
    table.add_column("checkpoint")
    for column in matrix["columns"]:
        table.add_column(column.replace("/", "\n"), justify="right")
    for name, row in zip(matrix["checkpoints"], matrix["values"], strict=True):
        table.add_row(name, *("-" if value is None else f"{value:.2f}" for value in row))
    console.print(table)
    for signature in matrix["signatures"]:
        say(f"  sacreBLEU signature: {signature}")
    if matrix["prompts"]:
        samples = Table(title="the same prompts, answered by each stage", title_justify="left")
        for name in ("prompt", *matrix["checkpoints"]):
            samples.add_column(name, overflow="fold")
        for entry in matrix["prompts"]:
            samples.add_row(entry["prompt"], *(text.strip()[:160] for text in entry["answers"].values()))
        console.print(samples)
