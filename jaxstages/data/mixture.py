"""The data sets that a stage trains on: its own, further ones, and those of earlier stages that it replays.

Shares are shares of *rows*. Rows of different tasks score different shares of their tokens (text all of them, chats
about half), so the share of the loss is another: both are reported.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxstages.data.batches import Late
from jaxstages.data.prepare import Prepared


class Dataset(NamedTuple):
    """One data set of a stage.

    name: the stage's own name, an earlier stage's, or the key in `StageConfig.mixture`.
    train: the prepared rows of its sources.
    weights: of the sources, in any unit: the data set's rows are in proportion to them.
    share, late_share: of the stage's rows, before and after the change of shares.
    """

    name: str
    train: list[Prepared]
    weights: tuple[float, ...]
    share: float = 1.0
    late_share: float = 1.0

    @property
    def fractions(self) -> list[float]:
        """Share of each source in the data set."""
        return [weight / sum(self.weights) for weight in self.weights]

    def mean(self, count: str) -> float:
        """Mean of a count of the index ("tokens", "scored") over the rows as they are drawn."""
        means = [source.index[count] / source.index["rows"] for source in self.train]
        return sum(fraction * mean for fraction, mean in zip(self.fractions, means, strict=True))

    @property
    def rows(self) -> int:
        return sum(source.index["rows"] for source in self.train)


class Mixed(NamedTuple):
    """The sources of all data sets with their weights: the arguments of `batches_by_step`."""

    sources: list[Prepared]
    weights: list[float]
    late: Late | None


class Use(NamedTuple):
    """What a stage takes of a data set. rows, scored: shares of all rows, and of all tokens that are trained on.
    passes: over the data set."""

    name: str
    rows: float
    scored: float
    passes: float


def mix(datasets: Sequence[Dataset], change: int) -> Mixed:
    """Args: change: the row of the stage from which the late shares hold."""
    sources = [source for dataset in datasets for source in dataset.train]
    if len(datasets) == 1:  # unscaled: the order of the rows stays that of runs from before there were several
        return Mixed(sources, list(datasets[0].weights), None)
    early = [dataset.share * fraction for dataset in datasets for fraction in dataset.fractions]
    late = [dataset.late_share * fraction for dataset in datasets for fraction in dataset.fractions]
    return Mixed(sources, early, Late(change, late) if late != early else None)


def row_shares(datasets: Sequence[Dataset], late_from: float) -> list[float]:
    """Share of each data set in the rows of the whole stage."""
    return [dataset.share * late_from + dataset.late_share * (1 - late_from) for dataset in datasets]


def uses(datasets: Sequence[Dataset], rows: int, late_from: float) -> list[Use]:
    """What a stage of so many rows takes of each data set."""
    shares = row_shares(datasets, late_from)
    scored = [share * dataset.mean("scored") for share, dataset in zip(shares, datasets, strict=True)]
    return [
        Use(dataset.name, share, part / sum(scored), share * rows / dataset.rows)
        for dataset, share, part in zip(datasets, shares, scored, strict=True)
    ]


def steps_for(
    datasets: Sequence[Dataset], batch_size: int, late_from: float, *, epochs: float = 0.0, tokens: int = 0
) -> int:
    """Steps that make so many passes over the first data set, or else read so many tokens of all of them."""
    shares = row_shares(datasets, late_from)
    if epochs:
        rows = epochs * datasets[0].rows / shares[0]
    else:
        rows = tokens / sum(share * dataset.mean("tokens") for share, dataset in zip(shares, datasets, strict=True))
    return max(math.ceil(rows / batch_size), 1)


def describe(datasets: Sequence[Dataset], steps: int, batch_size: int, late_from: float) -> list[str]:
    """A line for each data set: how often the stage passes over it and, of several, what share of the loss it has."""
    lines = []
    for use in uses(datasets, steps * batch_size, late_from):
        passes = f"{use.passes:.2f} passes over its training rows in {steps:,} steps"
        shares = f"{use.rows:.1%} of the rows, {use.scored:.1%} of the scored tokens"
        name = "own data" if not lines else use.name
        lines.append(passes if len(datasets) == 1 else f"{name}: {shares}, {passes}")
    return lines
