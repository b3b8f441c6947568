"""The command line of a sweep: `--sweep.FIELD=V1,V2`, the recipe's own `sweep()`, and a recipe for each trial."""

import importlib.util
import itertools
import sys
from typing import Any, NamedTuple

from absl import flags

from jaxstages.cli.parse import CONFIG, parse
from jaxstages.cli.recipe_files import recipe_path
from jaxstages.config import Recipe, stages
from jaxstages.config.checks import validate
from jaxstages.experiments.sweep import Trial, make_trials, shared_stages, split_values

PREFIX = "--sweep."


class SweepLine(NamedTuple):
    """A parsed command line.

    recipe: without the changes of a trial. config_flags: the flags that make it. recipes: of the trials.
    """

    values: flags.FlagValues
    recipe: Recipe
    config_flags: list[str]
    trials: list[Trial]
    recipes: list[Recipe]


def parse_sweep(argv: list[str]) -> SweepLine:
    """Parse the arguments of `sweep`, and check the recipe of every trial.

    Raises:
        ValueError, flags.Error: a flag, a field or a value is wrong; the message names the trial.
    """
    product: dict[str, list[str]] = {}
    rest = []
    for word in argv:
        if not word.startswith(PREFIX):
            rest.append(word)
            continue
        field, equals, text = word.removeprefix(PREFIX).partition("=")
        if not equals:
            raise ValueError(f"{word} has no values; write {word}=V1,V2")
        if field in product:
            raise ValueError(f"{PREFIX}{field} is given twice; give all of its values in one flag")
        product[field] = split_values(text)

    values, recipe, _ = parse("sweep", rest)
    config_words = _config_words(rest)
    if recipe is None or not any(word.partition("=")[0] in CONFIG for word in config_words):
        raise ValueError("sweep needs --config=RECIPE, such as --config=demo")
    file = next(word.partition("=")[2] for word in config_words if word.partition("=")[0] in CONFIG)
    trials = make_trials(product, _trials_of_recipe(recipe_path(file)))
    changed_recipes = []
    for trial in trials:
        try:
            changed = parse("sweep", [*rest, *trial.flags]).recipe
            assert changed is not None
            validate(changed)
        except (ValueError, flags.Error) as error:
            raise ValueError(f"trial {trial.name}: {error}") from error
        if changed in changed_recipes:
            first = trials[changed_recipes.index(changed)].name
            raise ValueError(f"the trials {first} and {trial.name} have the same recipe; list each value once")
        changed_recipes.append(changed)
    if values.together:
        _check_together(recipe, trials, changed_recipes)
    return SweepLine(values, recipe, config_words, trials, changed_recipes)


def _check_together(recipe: Recipe, trials: list[Trial], changed: list[Recipe]) -> None:
    from jaxstages.training.together import check_together  # imports jax, which other sweeps need not wait for

    stage = list(stages(recipe))[len(shared_stages(trials, recipe))]
    try:
        check_together(changed, stage)
    except ValueError as error:
        raise ValueError(f"--together: {error}") from error


def _config_words(argv: list[str]) -> list[str]:
    """Return `--config=RECIPE` and `--config.FIELD=VALUE`, each as one word."""
    words = []
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        name, equals, _ = word.partition("=")
        if name not in CONFIG and not name.startswith("--config."):
            continue
        # Only a field that is a bool can stand without a value.
        words.append(word if equals or following.startswith("--") else f"{word}={following}")
    return words


def _trials_of_recipe(value: str) -> list[dict[str, Any]]:
    """Return what the `sweep()` of a recipe's file lists; empty if it has none.

    Args:
        value: of --config, with the path of the file.

    Raises:
        ValueError: it returns no list of dicts.
    """
    path = value.partition(":")[0]
    spec = importlib.util.spec_from_file_location("jaxstages_sweep_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    make = getattr(module, "sweep", None)
    listed = make() if make is not None else []
    if not isinstance(listed, list) or not all(isinstance(changes, dict) for changes in listed):
        raise ValueError(f"{path}: sweep() must return a list of dicts, field -> value")
    return listed
