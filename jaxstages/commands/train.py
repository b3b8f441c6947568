"""`run`, `pretrain`, `finetune`, `instruct`: do what is not done, resume what is begun."""

from pathlib import Path

from jaxstages import config as recipes
from jaxstages.commands.recipe import keep_recipe
from jaxstages.config import Recipe
from jaxstages.console import say
from jaxstages.disk import read_json
from jaxstages.report.matrix import stage_matrix
from jaxstages.stages import finetune, instruct, pretrain
from jaxstages.start import check_lineage
from jaxstages.workbench import cache_folder, open_tokenizer, prepare_stage
from jaxstages.workdir import lock, result_file

DRIVERS = {"pretrain": pretrain.run, "finetune": finetune.run, "instruct": instruct.run}


def train(recipe: Recipe, workdir: Path, name: str) -> bool:
    """One stage; False if `stop_after` ended it before its end."""
    with lock(workdir):
        keep_recipe(recipe, workdir)
        return _train(recipe, workdir, name)


def train_all(recipe: Recipe, workdir: Path) -> None:
    """All stages of the recipe, one after the other, and then the stage matrix."""
    with lock(workdir):
        keep_recipe(recipe, workdir)
        tokenizer, cache = open_tokenizer(recipe, workdir), cache_folder(recipe, workdir)
        for stage in recipes.stages(recipe).values():  # bad data of a late stage is found now, not after hours
            prepare_stage(stage, tokenizer, recipe.model.context, cache)
        for name in recipes.stages(recipe):
            if not _train(recipe, workdir, name):
                return
        stage_matrix(recipe, workdir)


def _train(recipe: Recipe, workdir: Path, name: str) -> bool:
    if result_file(workdir / name).exists():
        result = read_json(result_file(workdir / name))
        check_lineage(workdir / name, result["parent"])
        say(f"{name}: already {result['status']} at step {result['steps']}, best step {result['best_step']}", "cyan")
        return True
    return DRIVERS[name](recipe, workdir) is not None
