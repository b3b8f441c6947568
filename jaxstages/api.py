"""jaxstages from Python: train, evaluate and generate, as the commands of the same names do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxstages.cli.loaded_model import load_model
from jaxstages.cli.resolve import check_stage, resolve_recipe
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.cli.select_checkpoint import choose, last_finished
from jaxstages.cli.train import run_stages
from jaxstages.cli.train import train as train_one
from jaxstages.config import Recipe, stages
from jaxstages.generation.evaluate import make_texts
from jaxstages.runtime.files import parse_path, read_json
from jaxstages.runtime.workdir import result_file
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import make_stage_evaluate, setup_stage
from jaxstages.types import Interrupted, Metrics, Params


def train(recipe: Recipe, workdir: str | Path, stage: str | None = None) -> dict[str, Any]:
    """Train all stages of a recipe that are not finished, or a single one. Interrupted runs resume.

    Args:
        recipe: what to train.
        workdir: folder of the run.
        stage: by default every stage, followed by the stage matrix.

    Returns the content of `result.json` of each finished stage by its name.

    Raises:
        ValueError: the recipe cannot run, or the workdir belongs to another one.
        Diverged: the numbers are no longer finite.
        Interrupted: a signal, such as a notebook's interrupt, asked to stop. Everything is saved, unless a second
            signal came before that: call it again to resume.
    """
    folder = parse_path(str(workdir), "workdir")
    recipe = resolve_recipe(recipe, folder)
    try:
        if stage is None:
            run_stages(recipe, folder)
        else:
            train_one(recipe, folder, stage)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; train again to resume") from error
    files = {name: result_file(folder / name) for name in stages(recipe)}
    return {name: read_json(file) for name, file in files.items() if file.exists()}


def evaluate(
    workdir: str | Path, stage: str | None = None, *, recipe: Recipe | None = None, step: int | None = None
) -> Metrics:
    """Return the held-out metrics of a stage's checkpoint.

    Args:
        workdir: folder of a run.
        stage: by default the last one that is finished.
        recipe: by default the workdir's; one with own parts has to be passed.
        step: by default the best one.
    """
    folder = parse_path(str(workdir), "workdir")
    recipe = resolve_recipe(recipe, folder)
    check_stage(stage, recipe)
    name = stage or last_finished(recipe, folder)
    result = choose(recipe, folder / name, step)
    setup = setup_stage(recipe, name, folder)
    params, _ = read_parent(setup.folder, setup.program, setup.contract, result)
    return make_stage_evaluate(setup)(params, True).metrics


def generate(
    workdir: str | Path,
    prompts: Sequence[str],
    stage: str | None = None,
    *,
    recipe: Recipe | None = None,
    step: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Return an answer to each prompt. A chat stage is asked in its chat template.

    Args:
        workdir: folder of a run.
        prompts: texts.
        stage: by default the last one that is finished.
        recipe: by default the workdir's; one with own parts has to be passed.
        step: by default the best one.
        max_new_tokens: by default the recipe's.
        temperature: 0 is greedy decoding.
        top_k, top_p: top-k and nucleus sampling.
        seed: the same seed gives the same answers.

    Raises:
        ValueError: there is no such stage or step, or a prompt leaves too little room for an answer.
    """
    folder = parse_path(str(workdir), "workdir")
    recipe = resolve_recipe(recipe, folder)
    sampling = SamplingFlags(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    loaded = load_model(recipe, folder, stage, sampling, step)
    setup, rows = loaded.setup, loaded.setup.config.evaluation.batch_size
    texts = make_texts(setup.text_model, loaded.sampling, rows, stops=loaded.stops, seed=seed)
    batches = texts(loaded.params, loaded.encode(list(prompts)), 0)
    return [stream.text for batch in batches for stream in batch]


def load_params(
    workdir: str | Path, stage: str | None = None, *, recipe: Recipe | None = None, step: int | None = None
) -> Params:
    """Return the parameters of a stage's checkpoint as a nested dict of arrays, adapters merged into their base.

    Args:
        workdir: folder of a run.
        stage: by default the last one that is finished.
        recipe: by default the workdir's; one with own parts has to be passed.
        step: by default the best one.
    """
    folder = parse_path(str(workdir), "workdir")
    recipe = resolve_recipe(recipe, folder)
    check_stage(stage, recipe)
    name = stage or last_finished(recipe, folder)
    result = choose(recipe, folder / name, step)
    setup = setup_stage(recipe, name, folder, with_data=False)
    params, _ = read_parent(setup.folder, setup.program, setup.contract, result)
    return params
