"""The mixture of data sets that a stage trains on: its own, further ones, and those of replayed earlier stages.

Shares are shares of *rows*. Rows of different tasks score different shares of their tokens (text all of them, chats
about half), so shares of the loss differ: both are reported.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxstages.data.batches import WeightChange
from jaxstages.data.prepare import Prepared


class Dataset(NamedTuple):
    """One data set of a stage.

    name: the stage's own name, an earlier stage's, or the key in `StageConfig.mixture`.
    train: the prepared rows of its sources.
    weights: relative weights of the sources among the data set's rows.
    share, late_share: share of the stage's rows before and after the change of shares.
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
        """Return the mean of a count of the index ("tokens", "scored") over rows as they are drawn."""
        means = [source.index[count] / source.index["rows"] for source in self.train]
        return sum(fraction * mean for fraction, mean in zip(self.fractions, means, strict=True))

    @property
    def rows(self) -> int:
        return sum(source.index["rows"] for source in self.train)


class Mixed(NamedTuple):
    """The sources of all data sets with their weights: the arguments of `batches_by_step`."""

    sources: list[Prepared]
    weights: list[float]
    late: WeightChange | None


class DatasetUsage(NamedTuple):
    """How much a stage uses a data set.

    rows: share of the stage's rows.
    scored: share of the tokens that are trained on.
    passes: passes over the data set.
    """

    name: str
    rows: float
    scored: float
    passes: float


def mix(datasets: Sequence[Dataset], late_row: int) -> Mixed:
    """Combine data sets.

    Args:
        late_row: row of the stage from which the late shares apply.
    """
    sources = [source for dataset in datasets for source in dataset.train]
    if len(datasets) == 1:  # unscaled weights keep the row order of runs from before there were mixtures
        return Mixed(sources, list(datasets[0].weights), None)

    early = [dataset.share * fraction for dataset in datasets for fraction in dataset.fractions]
    late = [dataset.late_share * fraction for dataset in datasets for fraction in dataset.fractions]
    return Mixed(sources, early, WeightChange(late_row, late) if late != early else None)


def row_shares(datasets: Sequence[Dataset], late_from: float) -> list[float]:
    """Return the share of each data set in the rows of the whole stage.

    Args:
        late_from: share of the stage's steps before the late shares apply.
    """
    return [dataset.share * late_from + dataset.late_share * (1 - late_from) for dataset in datasets]


def dataset_usage(datasets: Sequence[Dataset], rows: int, late_from: float) -> list[DatasetUsage]:
    """Return how much a stage of `rows` rows uses each data set."""
    shares = row_shares(datasets, late_from)
    scored = [share * dataset.mean("scored") for share, dataset in zip(shares, datasets, strict=True)]
    return [
        DatasetUsage(dataset.name, share, scored_tokens / sum(scored), share * rows / dataset.rows)
        for dataset, share, scored_tokens in zip(datasets, shares, scored, strict=True)
    ]


def steps_for(
    datasets: Sequence[Dataset], batch_size: int, late_from: float, *, epochs: float = 0.0, tokens: int = 0
) -> int:
    """Return the number of steps for `epochs` passes over the first data set, or for `tokens` tokens of all of them."""
    shares = row_shares(datasets, late_from)
    if epochs:
        rows = epochs * datasets[0].rows / shares[0]
    else:
        rows = tokens / sum(share * dataset.mean("tokens") for share, dataset in zip(shares, datasets, strict=True))
    return max(math.ceil(rows / batch_size), 1)


def describe(datasets: Sequence[Dataset], steps: int, batch_size: int, late_from: float) -> list[str]:
    """Describe each data set in a line: passes over it and, if there are several, its shares of rows and loss."""
    lines = []
    for use in dataset_usage(datasets, steps * batch_size, late_from):
        passes = f"{use.passes:.2f} passes over its training rows in {steps:,} steps"
        shares = f"{use.rows:.1%} of the rows, {use.scored:.1%} of the scored tokens"
        name = "own data" if not lines else use.name
        lines.append(passes if len(datasets) == 1 else f"{name}: {shares}, {passes}")
    return lines
