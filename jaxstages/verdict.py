"""A verdict on a finished stage: underfit, overfit, forgetting, healthy or diverging, with evidence and a remedy."""

import math
from collections.abc import Mapping
from typing import NamedTuple

OVERFIT_RISE = 0.02
"""Held-out loss this share above its best, while the training loss went on falling, is overfitting."""

STILL_FALLING = 0.01
"""Held-out loss that fell by more than this share over the last quarter of the stage was not done."""


FORGOT = 0.1
"""Nats by which the held-out loss of an earlier stage may rise; above, the stage has forgotten what it started with."""


class Verdict(NamedTuple):
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
) -> Verdict:
    """Judge the curves of one stage.

    Args:
        train, held_out: (step, loss) in the order of the steps; NaN where it was not finite.
        baseline: loss of the unigram model on the held-out text; what is not below it is underfit.
        watched: earlier stage -> its held-out loss at this stage's start, and at the step that is handed on.
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
    if last > baseline:
        return Verdict(
            "underfit",
            f"held-out loss {last:.3f} is no better than counting words, {baseline:.3f}",
            "Raise peak_lr, train for more steps, or check the data with `jaxstages inspect`",
        )
    before = [loss for step, loss in finite if step <= 0.75 * finite[-1][0]]
    if before and before[-1] - last > STILL_FALLING * before[-1]:
        fell = 100 * (before[-1] - last) / before[-1]
        return Verdict(
            "underfit",
            f"held-out loss was still falling, by {fell:.1f} % over the last quarter, to {last:.3f}",
            "Train for more steps, or with a larger model or peak_lr",
        )
    return Verdict("healthy", f"held-out loss settled at {last:.3f}, training loss at {tail:.3f}", "Nothing to mend")


def _at(train: list[tuple[int, float]], step: int) -> float:
    """Mean training loss around a step."""
    if not train:
        return math.nan
    near = [loss for found, loss in train if abs(found - step) <= max(0.05 * train[-1][0], 1)]
    return sum(near) / len(near) if near else min(train, key=lambda point: abs(point[0] - step))[1]
