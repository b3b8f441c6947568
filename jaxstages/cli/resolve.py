"""Which recipe a command works with: the one given, or the workdir's own; and whether it may have changed."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxstages import config as recipes
from jaxstages.checkpoint import metadata
from jaxstages.config import Recipe
from jaxstages.config.checks import validate
from jaxstages.runtime.files import read_json, write_json
from jaxstages.runtime.workdir import checkpoint_folder, has_begun, result_file, steps_of

FREE = (
    *(f".loop.{name}" for name in ("stop_after", "log_every", "keep", "save_every", "hang_seconds")),
    *(f".loop.{name}" for name in ("accumulate", "remat", "loss_tile", "compiler_options")),
    *(".optim.max_bad_steps", ".evaluation.batch_size", "config.model.unroll"),
)
"""What may change in a stage that has begun: it makes no other model, and no other score."""

SOURCES = (".data.train", ".data.validation", "config.tokenizer.sources")
"""Names of data. They may change where what lies there is the same: files are moved."""

BETWEEN_STAGES = ("config.model.dropout", "config.model.dtype")
"""Fields that may differ in the next stage: parameters have the same shapes."""

VERSIONS = ("jaxstages", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers")

LENGTH = tuple(f".loop.{name}" for name in ("steps", "epochs", "tokens"))
"""Fields that say how long a stage is."""

SAME_RATES = ("constant", "plateau", "rsqrt")
"""Schedules whose rates do not depend on how long the stage is."""


def kept_recipe(workdir: Path) -> Recipe | None:
    """The recipe of a workdir, as it was last run; None if there is none yet.

    Raises:
        ValueError: it is damaged.
    """
    file = workdir / "recipe.json"
    if not file.is_file():
        return None
    content = read_json(file)
    if not isinstance(content, dict) or "recipe" not in content:
        raise ValueError(f'{file} is damaged: an object with "recipe" is wanted; name the recipe with --config=FILE')
    try:
        return recipes.from_dict(content["recipe"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def resolve_recipe(given: Recipe | None, workdir: Path, importing: bool = False, lengthen: str = "") -> Recipe:
    """The recipe to use, validated, with the model of what is imported, or is to be. Nothing is written.

    Args:
        importing: a recipe without stages will do, as it does where something was imported.
        lengthen: the stage whose length may change.

    Raises:
        ValueError: there is none, it is not valid, or it changes what a trained stage depends on.
    """
    importing = importing or result_file(workdir / recipes.IMPORT).exists()
    if given is not None:
        validate(given, importing)
        given = _adopted(given, workdir)
        validate(given, importing)
    kept = kept_recipe(workdir)
    if given is None:
        if kept is None:
            raise ValueError(f"{workdir} has no recipe.json; name a recipe with --config=configs/demo.py")
        if parts := recipes.own_parts(kept):
            field, part = next(iter(parts.items()))
            raise ValueError(
                f"{workdir / 'recipe.json'}: {field} is {part.part}, a part of the recipe's own; name its file with "
                f"--config={part.part.partition(':')[0]}.py"
            )
        try:
            validate(kept, importing)
        except ValueError as error:
            raise ValueError(f"{workdir / 'recipe.json'}: {error}") from error
        return kept
    if kept is not None:
        _check_change(kept, given, workdir, lengthen)
    return given


def _adopted(recipe: Recipe, workdir: Path) -> Recipe:
    """With the model of what is imported, where something is."""
    hub = any(stage.init_from.startswith("hf:") for stage in recipes.stages(recipe).values())
    if not hub and not result_file(workdir / recipes.IMPORT).exists():
        return recipe
    from jaxstages.interop.hf_import import adopted  # and jax with it, which mistakes in a recipe need not wait for

    return adopted(recipe, workdir)


def _check_change(kept: Recipe, given: Recipe, workdir: Path, lengthen: str) -> None:
    """Raises ValueError for a recipe that changes what was learned. What was never saved binds to nothing."""
    names = [*recipes.STAGES, *(kept.extra_stages | given.extra_stages)]
    begun = [name for name in names if has_begun(workdir / name)]
    finished = [name for name in begun if result_file(workdir / name).exists()]
    imported = result_file(workdir / recipes.IMPORT).exists()
    fixed = (*(("config.seed", "config.model") if begun else ()), *(field_of(name) for name in begun))
    fixed += ("config.tokenizer",) if begun or imported else ()
    free = FREE + tuple(f"{field_of(lengthen)}{field}" for field in LENGTH if lengthen)
    free += BETWEEN_STAGES if begun == finished else ()
    judged = tuple(f"{field_of(name)}.evaluation." for name in finished)
    moved = set()
    for line in recipes.differences(kept, given):
        path = line.split(":")[0]
        name = path.removeprefix("config.extra_stages.").removeprefix("config.").split(".")[0]
        if not path.startswith(fixed) or path.endswith(free) or path.startswith(judged):
            continue
        if path.endswith(SOURCES):
            moved.add(name)
            continue
        if path.endswith(LENGTH) and name not in finished and _may_be_longer(kept, given, name, workdir):
            continue
        way = "set it back"
        if path.endswith(LENGTH):
            way += " (or add --lengthen, to train it further, under the schedule of the new length)"
        elif path in BETWEEN_STAGES:
            way += f", or finish {', '.join(sorted({*begun} - {*finished}))} first"
        raise ValueError(f"{workdir} was begun with another recipe: {line}; {way}, or take another --workdir")
    for name in sorted(moved & {*begun}):
        _check_moved(given, name, workdir)


def field_of(name: str) -> str:
    """Return the path of a stage's field in the recipe."""
    return f"config.{name}" if name in recipes.STAGES else f"config.extra_stages.{name}"


def _may_be_longer(kept: Recipe, given: Recipe, name: str, workdir: Path) -> bool:
    """Would the steps that an unfinished stage has made be the same under the new length? They are where neither the
    rates nor the shares of its data depend on the length; with "wsd" until the rate begins to fall."""
    old, new = (recipes.stages(recipe).get(name) for recipe in (kept, given))
    if old is None or new is None or old.late_from < 1:
        return False
    schedule, made = old.optim.schedule, steps_of(workdir / name)[-1]
    if schedule.name == "wsd" and old.loop.steps and new.loop.steps:
        lengths = (old.loop.steps, new.loop.steps)
        return all(made <= steps - max(round(steps * schedule.decay_share), 1) for steps in lengths)
    return schedule.name in SAME_RATES


def _check_moved(given: Recipe, name: str, workdir: Path) -> None:
    """Raises ValueError unless the data that a stage has now under other names are those that it was begun with."""
    from jaxstages.data.run_tokenizer import open_tokenizer
    from jaxstages.data.stage_data import data_names

    steps = steps_of(workdir / name)
    if not steps:
        raise ValueError(
            f"{workdir / name} has no checkpoint left to compare its data with; name config.{name}.data as it was, or "
            "take another --workdir"
        )
    meta = metadata.read_meta(checkpoint_folder(workdir / name, steps[-1]))
    now = data_names(given, name, recipes.stages(given)[name], open_tokenizer(given, workdir), workdir)
    if meta["data"] != now:
        raise ValueError(
            f"{workdir / name} was begun with other data: {meta['data']} there, {now} here (fingerprints of prepared "
            f"rows); name the same files, wherever they are, in config.{name}.data, or take another --workdir"
        )


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
