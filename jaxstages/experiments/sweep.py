"""The trials of a sweep: their values and names, the stages that they share, and which go on at a rung.

A trial is an ordinary run in a workdir of its own, so everything that works on a run works on a trial.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxstages import config as recipes
from jaxstages.config import Recipe


class Trial(NamedTuple):
    """name: name of its folder, "peak_lr=1e-3,seed=0". changes: field of the recipe, without "config." -> value."""

    name: str
    changes: dict[str, str]

    @property
    def flags(self) -> list[str]:
        return [f"--config.{field}={value}" for field, value in self.changes.items()]


def split_values(text: str) -> list[str]:
    """Split "1e-3,2e-3" into its values. Values that have commas themselves are separated by ";"."""
    values = [value.strip() for value in text.split(";" if ";" in text else ",")]
    if not all(values):
        raise ValueError(f"{text!r} has an empty value; write values with commas between them, such as 1e-3,2e-3")
    if len(set(values)) < len(values):
        raise ValueError(f"{text!r} has a value twice; name each value once")
    return values


def make_trials(product: Mapping[str, Sequence[str]], listed: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Return the trials of a sweep: each of the `listed` changes with each combination of the values of `product`.

    Args:
        product: field -> values, from `--sweep.FIELD=V1,V2`.
        listed: changes of the recipe's own `sweep()`; empty if it has none.

    Raises:
        ValueError: there is no trial, or a field is in both.
    """
    combinations = [dict(zip(product, values, strict=True)) for values in itertools.product(*product.values())]
    changes = []
    for fixed in listed or [{}]:
        if both := [field for field in fixed if field in product]:
            raise ValueError(f"--sweep.{both[0]}: the recipe's sweep() sets this field too; remove one of them")
        changes += [{field: str(value) for field, value in fixed.items()} | combination for combination in combinations]
    if changes == [{}]:
        raise ValueError("nothing is swept; name values with --sweep.FIELD=V1,V2, or define sweep() in the recipe")
    names = _short_names(list(dict.fromkeys(field for each in changes for field in each)))
    folders = [_folder_name({names[field]: value for field, value in each.items()}) for each in changes]
    trials = [Trial(folder or "base", each) for folder, each in zip(folders, changes, strict=True)]
    if len({trial.name for trial in trials}) < len(trials):
        raise ValueError("two trials of the sweep have the same values; list each once")
    return trials


def _short_names(fields: Sequence[str]) -> dict[str, str]:
    """Shorten fields to their last parts, as far as these differ: "peak_lr", or "finetune.peak_lr"."""
    names = {}
    for field in fields:
        parts = field.split(".")
        short = parts[-1]
        if sum(other.split(".")[-1] == short for other in fields) > 1:
            short = f"{parts[0]}.{short}" if len(parts) > 1 else short
        names[field] = short
    return names if len(set(names.values())) == len(fields) else {field: field for field in fields}


def _folder_name(values: Mapping[str, str]) -> str:
    """Return a name that can be a folder's: what would be hard to type or to read is replaced, and a digest added."""
    name = ",".join(f"{field}={value}" for field, value in values.items())
    safe = "".join(letter if letter.isalnum() or letter in "=,.+-_" else "_" for letter in name)[:120]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def shared_stages(trials: Sequence[Trial], recipe: Recipe) -> list[str]:
    """List the first stages of the recipe, up to the first that is swept: they can be trained once for several trials.

    Empty if the first stage is swept, or no stage is.
    """
    stages, swept = recipes.stages(recipe), {field for trial in trials for field in trial.changes}
    shared = list(itertools.takewhile(lambda name: not any(_is_of(field, name) for field in swept), stages))
    return [] if len(shared) == len(stages) else shared


def parent_trial(trial: Trial, recipe: Recipe) -> Trial:
    """Return the run that trains the shared stages of a trial. Trials that differ in stages only have the same one.

    It has the changes outside the stages, such as of the seed.
    """
    stages = list(recipes.stages(recipe))
    changes = {k: value for k, value in trial.changes.items() if not any(_is_of(k, name) for name in stages)}
    names = _short_names(list(changes))
    return Trial(_folder_name({names[field]: value for field, value in changes.items()}) or "all", changes)


def _is_of(field: str, stage: str) -> bool:
    """Whether a field is one of a stage."""
    owner = stage if stage in recipes.STAGES else f"extra_stages.{stage}"
    return field == owner or field.startswith(f"{owner}.")


# Successive halving --------------------------------------------------------------------------------------------------


class Halving(NamedTuple):
    """Asynchronous successive halving (Li et al., 2020): of the trials at a rung, the best 1/factor go on to the next.

    rungs: steps of the swept stage, in increasing order; the last is its whole length.
    """

    factor: int
    rungs: list[int]


def make_halving(factor: int, first: int, steps: int, eval_every: int = 1) -> Halving:
    """Return rungs at `first`, `first * factor`, ... steps, and at the stage's length.

    Args:
        steps, eval_every: of the swept stage. Trials are compared by their evaluation at a rung.

    Raises:
        ValueError: there would be no rung before the end, or no evaluation at a rung.
    """
    if factor < 2 or not 0 < first < steps:
        raise ValueError(
            f"--halving={factor} --first_rung={first}: the factor must be at least 2, and the first rung between 1 and "
            f"the stage's {steps} steps"
        )
    if first % eval_every:
        raise ValueError(
            f"--first_rung={first}: trials are compared by their evaluation at a rung; name a multiple of the stage's "
            f"loop.eval_every={eval_every}, or change that"
        )
    rungs = [first * factor**k for k in range(math.ceil(math.log(steps / first, factor)))]
    return Halving(factor, [*(rung for rung in rungs if rung < steps), steps])


def promotable(halving: Halving, reached: Mapping[str, int], scores: Mapping[str, Mapping[int, float]]) -> str | None:
    """Return a trial that may go on to its next rung; None if there is none now.

    Args:
        reached: trial -> index of the last rung that it has completed or was sent to.
        scores: trial -> index of a rung -> score there, lower is better. NaN counts as the worst.
    """
    for rung in reversed(range(len(halving.rungs) - 1)):
        done = {name: values[rung] for name, values in scores.items() if rung in values}
        ranked = sorted(done, key=lambda name: (math.isnan(done[name]), done[name]))
        best = ranked[: len(ranked) // halving.factor]
        waiting = [name for name in best if reached[name] == rung and not math.isnan(done[name])]
        if waiting:
            return waiting[0]
    return None
