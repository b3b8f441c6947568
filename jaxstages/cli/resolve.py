"""The recipe of a command: that of --config or the workdir's own, and whether it may differ from what was trained."""

import dataclasses
import difflib
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxstages import config as recipes
from jaxstages.checkpoint import metadata
from jaxstages.config import Recipe
from jaxstages.config.checks import validate
from jaxstages.runtime.files import read_json, write_json
from jaxstages.runtime.workdir import checkpoint_folder, has_begun, result_file, steps_of

MUTABLE_AFTER_START = (
    *(f".loop.{name}" for name in ("stop_after", "log_every", "keep", "save_every", "hang_seconds")),
    *(f".loop.{name}" for name in ("accumulate", "remat", "loss_tile", "compiler_options")),
    *(".optim.max_bad_steps", ".evaluation.batch_size", "config.model.unroll"),
)
"""Fields that may change after a stage has begun, because they change neither the model nor a metric."""

SOURCES = (".data.train", ".data.validation", "config.tokenizer.sources")
"""Fields that name data. They may change if the data are the same: files are moved."""

BETWEEN_STAGES = ("config.model.dropout", "config.model.dtype")
"""Fields that may change between stages, because parameters keep their shapes."""

VERSIONS = ("jaxstages", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers")

LENGTH = tuple(f".loop.{name}" for name in ("steps", "epochs", "tokens"))
"""Fields that set the length of a stage."""

SAME_RATES = ("constant", "plateau", "rsqrt")
"""Schedules whose learning rates do not depend on the length of the stage."""


def kept_recipe(workdir: Path) -> Recipe | None:
    """Return the recipe of a workdir, as it was last run; None if there is none yet.

    Raises:
        ValueError: recipe.json is damaged.
    """
    file = workdir / "recipe.json"
    if not file.is_file():
        return None
    content = read_json(file)
    if not isinstance(content, dict) or "recipe" not in content:
        raise ValueError(f'{file} is damaged: an object with "recipe" is wanted; name the recipe with --config=RECIPE')
    try:
        return recipes.from_dict(content["recipe"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def resolve_recipe(new: Recipe | None, workdir: Path, importing: bool = False, lengthen: str = "") -> Recipe:
    """Return the validated recipe of a command, with the imported model if there is one. Nothing is written.

    Args:
        new: the recipe of --config; None takes the workdir's.
        importing: accept a recipe without stages.
        lengthen: stage whose length may change.

    Raises:
        ValueError: there is no recipe, it is not valid, or it changes what a trained stage depends on.
    """
    importing = importing or result_file(workdir / recipes.IMPORT).exists()
    if new is not None:
        validate(new, importing)
        new = _adopted(new, workdir)
        validate(new, importing)
    kept = kept_recipe(workdir)
    if new is None:
        if kept is None:
            raise ValueError(f"{workdir} has no recipe.json; name a recipe with --config=RECIPE, such as --config=demo")
        if parts := recipes.own_parts(dataclasses.replace(kept, trackers=())):  # only training needs those
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
        _check_change(kept, new, workdir, lengthen)
    return new


def _adopted(recipe: Recipe, workdir: Path) -> Recipe:
    """Return the recipe with the imported model, if the workdir or the recipe has one."""
    hub = any(stage.init_from.startswith("hf:") for stage in recipes.stages(recipe).values())
    if not hub and not result_file(workdir / recipes.IMPORT).exists():
        return recipe
    from jaxstages.interop.hf_import import with_imported_model  # imports jax, which most recipes need not wait for

    return with_imported_model(recipe, workdir)


def _check_change(kept: Recipe, new: Recipe, workdir: Path, lengthen: str) -> None:
    """Raise ValueError if the recipe changes a field that saved checkpoints depend on."""
    names = [*recipes.STAGES, *(kept.extra_stages | new.extra_stages)]
    begun = [name for name in names if has_begun(workdir / name)]
    finished = [name for name in begun if result_file(workdir / name).exists()]
    imported = result_file(workdir / recipes.IMPORT).exists()
    fixed = (*(("config.seed", "config.model") if begun else ()), *(field_of(name) for name in begun))
    fixed += ("config.tokenizer",) if begun or imported else ()
    mutable = MUTABLE_AFTER_START + tuple(f"{field_of(lengthen)}{field}" for field in LENGTH if lengthen)
    mutable += BETWEEN_STAGES if begun == finished else ()
    evaluated = tuple(f"{field_of(name)}.evaluation" for name in finished)

    moved = set()
    for line in recipes.differences(kept, new):
        path = re.sub(r"\[\d+\]$", "", line.split(":")[0])  # an entry of a tuple stands for the tuple
        name = path.removeprefix("config.extra_stages.").removeprefix("config.").split(".")[0]
        if not _is_within(path, fixed) or path.endswith(mutable) or _is_within(path, evaluated):
            continue
        if path.endswith(SOURCES):
            moved.add(name)
            continue
        if path.endswith(LENGTH) and name not in finished and _may_be_longer(kept, new, name, workdir):
            continue

        remedy = "set it back"
        if path.endswith(LENGTH):
            remedy += " (or add --lengthen, to train it further, under the schedule of the new length)"
        elif path in BETWEEN_STAGES:
            remedy += f", or finish {', '.join(sorted({*begun} - {*finished}))} first"
        raise ValueError(f"{workdir} was begun with another recipe: {line}; {remedy}, or use another --workdir")

    for name in sorted(moved & {*begun}):
        _check_moved(new, name, workdir)


def _is_within(path: str, owners: tuple[str, ...]) -> bool:
    """Return whether a field is one of the owners, or a field of one."""
    return any(path == owner or path.startswith(f"{owner}.") for owner in owners)


def field_of(name: str) -> str:
    """Return the path of a stage's field in the recipe."""
    return f"config.{name}" if name in recipes.STAGES else f"config.extra_stages.{name}"


def _may_be_longer(kept: Recipe, new: Recipe, name: str, workdir: Path) -> bool:
    """Return whether the steps of an unfinished stage would have been the same under the new length.

    They are if neither the learning rates nor the shares of its data depend on the length. With "wsd" this is so until
    the learning rate begins to decay.
    """
    before, after = (recipes.stages(recipe).get(name) for recipe in (kept, new))
    if before is None or after is None or before.late_from < 1:
        return False
    schedule, step = before.optim.schedule, steps_of(workdir / name)[-1]
    if schedule.name == "wsd" and before.loop.steps and after.loop.steps:
        lengths = (before.loop.steps, after.loop.steps)
        return all(step <= steps - max(round(steps * schedule.decay_share), 1) for steps in lengths)
    return schedule.name in SAME_RATES


def _check_moved(new: Recipe, name: str, workdir: Path) -> None:
    """Raise ValueError if the data of a stage, which have new names, are not those that it began with."""
    from jaxstages.data.run_tokenizer import open_tokenizer
    from jaxstages.data.stage_data import data_names

    steps = steps_of(workdir / name)
    if not steps:
        raise ValueError(
            f"{workdir / name} has no checkpoint left to compare its data with; name config.{name}.data as it was, or "
            "take another --workdir"
        )
    meta = metadata.read_meta(checkpoint_folder(workdir / name, steps[-1]))
    now = data_names(new, name, recipes.stages(new)[name], open_tokenizer(new, workdir), workdir)
    if meta["data"] != now:
        raise ValueError(
            f"{workdir / name} was begun with other data: {meta['data']} there, {now} here (fingerprints of prepared "
            f"rows); name the same files, wherever they are, in config.{name}.data, or use another --workdir"
        )


def check_stage(name: str | None, recipe: Recipe, with_import: bool = True) -> None:
    """Raise ValueError if a recipe has no stage of this name; None is any of them.

    Args:
        with_import: whether "import" counts as a stage.
    """
    names = (*([recipes.IMPORT] if with_import else []), *recipes.stages(recipe))
    if name is not None and name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"recipe {recipe.name!r} has no stage {name}; {hint}it has {', '.join(names)}")


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def keep_recipe(recipe: Recipe, workdir: Path) -> None:
    """Write `workdir/recipe.json`: the recipe, and the versions of the main packages."""
    write_json(workdir / "recipe.json", {"recipe": recipes.to_dict(recipe), "versions": versions()})


def flatten_fields(recipe: Recipe) -> dict[str, str]:
    """Return what all processes of a run must have in common: versions, and the recipe's fields by path."""
    fields = dict(_leaves("config", recipes.to_dict(recipe)))
    return {f"the version of {name}": version for name, version in versions().items()} | fields


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path, repr(value)
