"""Diagnosis of a finished stage from its loss curves, with evidence and a remedy: healthy, underfit, overfit,
forgetting, diverging or undecided."""

import math
from collections.abc import Mapping
from typing import NamedTuple

OVERFIT_RISE = 0.02
"""Relative rise of the held-out loss above its best that counts as overfitting if the training loss kept falling."""

STILL_FALLING = 0.01
"""Relative fall of the held-out loss in the last quarter of a stage above which it was still falling."""

TOO_LONG = 0.5
"""Fraction of the stage from the last evaluation before the final quarter to the end. If it is larger, there are too
few evaluations to tell the trend at the end."""

GAP, GAP_NATS = 0.2, 0.1
"""Gap between held-out and training loss, relative and in nats, beyond which (both) the training data is memorized."""

LONGER = "a larger loop.steps with --lengthen"
"""Remedy that trains a finished stage further."""

FORGOT = 0.1
"""Rise of the held-out loss of an earlier stage, in nats, beyond which the stage has forgotten it."""


class Verdict(NamedTuple):
    """A diagnosis.

    name: "healthy", "underfit", "overfit", "forgetting", "diverging" or "undecided".
    evidence: the losses and steps that decide it.
    remedy: what to change.
    """

    name: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}. {self.remedy}"


def judge(
    train: list[tuple[int, float]],
    held_out: list[tuple[int, float]],
    baseline: float = math.inf,
    watched: Mapping[str, tuple[float, float]] | None = None,
    comparable: bool = True,
) -> Verdict:
    """Diagnose a stage from its loss curves.

    Args:
        train: training losses as (step, loss), in the order of the steps; NaN for a loss that was not finite.
        held_out: held-out losses, likewise.
        baseline: loss of a unigram model on the held-out text, in nats; a model that is no better is underfit.
        watched: maps each earlier stage to its held-out loss at the start of this stage and at the handed-on step.
        comparable: whether both losses are of the same kind of data, so that the gap between them is meaningful.
    """
    finite = [(step, loss) for step, loss in held_out if math.isfinite(loss)]
    if not finite or not math.isfinite(held_out[-1][1]):
        return Verdict("diverging", "the held-out loss is not finite", "Halve peak_lr, or lengthen the warm-up")
    if bad := [step for step, loss in train if not math.isfinite(loss)]:
        return Verdict("diverging", f"the training loss was not finite at step {bad[0]}", "Halve peak_lr")
    first, last = finite[0][1], finite[-1][1]
    best_step, best = min(finite, key=lambda point: point[1])
    if last > 1.5 * first:
        evidence = f"held-out loss rose from {first:.3f} to {last:.3f}"
        if not train or train[-1][1] > train[0][1]:
            return Verdict("diverging", f"{evidence}, and so did the training loss", "Halve peak_lr")
    rises = {name: after - before for name, (before, after) in (watched or {}).items()}
    if rises and max(rises.values()) > FORGOT:
        evidence = "; ".join(
            f"held-out loss of {name} rose by {rise:.3f} nats, from {watched[name][0]:.3f} to {watched[name][1]:.3f}"
            for name, rise in rises.items()
            if watched and rise > FORGOT
        )
        names = " and ".join(name for name, rise in rises.items() if rise > FORGOT)
        return Verdict("forgetting", evidence, f"Raise the share of {names} in replay, or set anchor.weight")
    end = [loss for _, loss in train[-max(len(train) // 10, 1) :]]
    tail = sum(end) / len(end) if end else math.nan
    if last > best * (1 + OVERFIT_RISE) and _at(train, best_step) > tail:
        return Verdict(
            "overfit",
            f"held-out loss {last:.3f} is above its best, {best:.3f} at step {best_step}, while the training loss fell "
            f"from {_at(train, best_step):.3f} to {tail:.3f}",
            f"Add data, dropout or weight decay, or stop at about {best_step} steps",
        )
    before = [(step, loss) for step, loss in finite if step <= 0.75 * finite[-1][0]]
    since, level = before[-1] if before else (0, last)
    window = 1 - since / max(finite[-1][0], 1)
    fell = (level - last) / abs(level) if level else 0.0
    falling = window <= TOO_LONG and fell * 0.25 / window > STILL_FALLING
    if comparable and not falling and last - tail > max(GAP * abs(tail), GAP_NATS):
        return Verdict(
            "overfit",
            f"held-out loss {last:.3f} is {last - tail:.3f} above the training loss, {tail:.3f}",
            "Add data, dropout or weight decay, train for fewer steps, or hold out data of the same kind",
        )
    if last > baseline:
        return Verdict(
            "underfit",
            f"held-out loss {last:.3f} is no better than that of a unigram model, {baseline:.3f}",
            f"Raise peak_lr, train for more steps ({LONGER}), or check the data with `jaxstages inspect`",
        )
    if falling:
        steps = f"from step {since} to {finite[-1][0]}"
        return Verdict(
            "underfit",
            f"held-out loss was still falling, by {100 * fell:.1f} % {steps}, to {last:.3f}",
            f"Train for more steps ({LONGER}), or with a larger model or peak_lr",
        )
    if window > TOO_LONG:
        return Verdict(
            "undecided",
            f"held-out loss came to {last:.3f}, but before step {finite[-1][0]} it was last measured at step {since}, "
            "which says nothing of what it did at the end",
            "Set loop.eval_every to a quarter of the steps, or fewer",
        )
    return Verdict("healthy", f"held-out loss settled at {last:.3f}, training loss at {tail:.3f}", "No action needed")


def _at(train: list[tuple[int, float]], step: int) -> float:
    """Return the mean training loss around a step; NaN without training losses."""
    if not train:
        return math.nan
    near = [loss for at_step, loss in train if abs(at_step - step) <= max(0.05 * train[-1][0], 1)]
    return sum(near) / len(near) if near else min(train, key=lambda point: abs(point[0] - step))[1]
