"""Which recipe a command works with: the one given, or the workdir's own; and whether it may have changed."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxstages import config as recipes
from jaxstages.commands.validate import validate
from jaxstages.config import Recipe
from jaxstages.disk import read_json, write_json
from jaxstages.interop.hf_import import adopted
from jaxstages.workdir import checkpoints_folder, result_file, tokenizer_file

FREE = (".loop.stop_after", ".loop.log_every", ".loop.keep", ".evaluation.batch_size")
"""What may change in a stage that has begun: it makes no other model, and no other score."""

VERSIONS = ("jaxstages", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers")


LENGTH = ("steps", "epochs", "tokens")
"""Fields of `loop` that say how long a stage is."""


def resolve_recipe(given: Recipe | None, workdir: Path, importing: bool = False, lengthen: str = "") -> Recipe:
    """The recipe to use, validated, with the model of what is imported, or is to be. Nothing is written.

    Args:
        importing: a recipe without stages will do, as it does where something was imported.
        lengthen: the stage whose length may change.

    Raises:
        ValueError: there is none, it is not valid, or it changes what a trained stage depends on.
    """
    file = workdir / "recipe.json"
    importing = importing or result_file(workdir / recipes.IMPORT).exists()
    if given is not None:
        validate(given, importing)
        given = adopted(given, workdir)
        validate(given, importing)
    if not file.is_file():
        if given is None:
            raise ValueError(f"{workdir} has no recipe.json; name a recipe with --config=configs/demo.py")
        return given
    content = read_json(file)
    if not isinstance(content, dict) or "recipe" not in content:
        raise ValueError(f'{file} is damaged: an object with "recipe" is wanted; name the recipe with --config=FILE')
    try:
        kept = recipes.from_dict(content["recipe"])
        if given is None:
            validate(kept, importing)
            return kept
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    begun = [name for name in recipes.STAGES if checkpoints_folder(workdir / name).exists()]
    shared = ["config.seed", "config.model"] if begun else []
    shared += ["config.tokenizer"] if tokenizer_file(workdir).exists() else []
    fixed = (*shared, *(f"config.{name}" for name in begun))
    free = FREE + tuple(f"config.{lengthen}.loop.{name}" for name in LENGTH if lengthen)
    judged = tuple(f"config.{name}.evaluation." for name in begun if result_file(workdir / name).exists())
    for line in recipes.differences(kept, given):
        path = line.split(":")[0]
        if path.startswith(fixed) and not path.endswith(free) and not path.startswith(judged):
            longer = (
                " (or add --lengthen, to train it further)"
                if path.endswith(tuple(f".loop.{n}" for n in LENGTH))
                else ""
            )
            raise ValueError(
                f"{workdir} was begun with another recipe: {line}; set it back{longer}, or take another --workdir"
            )
    return given


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def keep_recipe(recipe: Recipe, workdir: Path) -> None:
    """Write `workdir/recipe.json`, with the versions of what runs it."""
    write_json(workdir / "recipe.json", {"recipe": recipes.to_dict(recipe), "versions": versions()})


def told(recipe: Recipe) -> dict[str, str]:
    """What all processes of a run must have in common: versions, and the recipe's fields, each by its flag."""
    flat = dict(_leaves("config", recipes.to_dict(recipe)))
    return {f"the version of {name}": version for name, version in versions().items()} | flat


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path, repr(value)
