"""What raw runs say: the loss gate, ratios with their spread, and who is ahead."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Run = dict[str, Any]

LAST_LOSS_TOLERANCE = 5e-3
"""Relative difference that the mean loss at the end of the timed steps may have; rounding alone gives some, for it
grows from step to step."""


@dataclass(frozen=True)
class Ratio:
    """Of medians, and the least and largest of the ratios round by round."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}..{self.high:.2f})"


@dataclass(frozen=True)
class RowRuns:
    """One row's raw file: a header, and a run a line."""

    header: dict[str, Any]
    runs: list[Run]

    def phase(self, name: str, contender: str | None = None) -> list[Run]:
        """Runs of a phase ("gate", "cold", "floor" or "round") that gave a result, in their order."""
        return [
            run["result"]
            for run in self.runs
            if run["phase"] == name and "result" in run and contender in (None, run["contender"])
        ]

    @property
    def contenders(self) -> list[str]:
        """All that were started, in their order."""
        return list(dict.fromkeys(run["contender"] for run in self.runs))

    def speeds(self, contender: str) -> list[float]:
        """Tokens a second, round by round."""
        return [result["tokens_per_second"] for result in self.phase("round", contender)]


def read_runs(path: Path) -> RowRuns:
    """The row's raw file."""
    header, *runs = (json.loads(line) for line in path.read_text().splitlines())
    return RowRuns(header, runs)


def _apart(name: str, value: float, reference: float, tolerance: float) -> str:
    """What to say where two numbers differ by more than the relative tolerance, or are no numbers; else ""."""
    if abs(value - reference) <= tolerance * abs(reference):
        return ""
    return f"{name} {value:.8g} against {reference:.8g}"


def gate(results: dict[str, Run], tolerance: float) -> list[str]:
    """Which numbers of the first batch differ from those of the first contender; empty when all train the same."""
    (reference_name, reference), *others = results.items()
    complaints = []
    for name, result in others:
        values = [
            _apart("parameters", result["parameters"], reference["parameters"], 0.0),
            _apart("first loss", result["first_loss"], reference["first_loss"], tolerance),
            _apart("first gradient norm", result["first_grad_norm"], reference["first_grad_norm"], tolerance),
        ]
        complaints += [f"{name} and {reference_name}: {text}" for text in values if text]
    return complaints


def last_loss(result: Run) -> float:
    """Mean loss of the last tenth of the timed steps."""
    losses = result["losses"]
    return statistics.mean(losses[-max(len(losses) // 10, 1) :])


def last_gate(results: dict[str, Run]) -> list[str]:
    """Which contenders' losses at the end of the timed steps differ from the first one's."""
    (reference_name, reference), *others = results.items()
    values = {n: _apart("last loss", last_loss(r), last_loss(reference), LAST_LOSS_TOLERANCE) for n, r in others}
    return [f"{name} and {reference_name}: {text}" for name, text in values.items() if text]


def row_gate(row: RowRuns) -> list[str]:
    """Why the row is void, by both gates; empty when it counts."""
    first = {name: runs[0] for name in row.contenders if (runs := row.phase("gate", name))}
    timed = {name: runs[0] for name in row.contenders if (runs := row.phase("round", name))}
    complaints = gate(first, row.header["row"]["tolerance"]) if first else ["no contender gave a result"]
    return complaints + (last_gate(timed) if timed else [])


def ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Of two contenders' speeds in the same rounds."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
    return Ratio(statistics.median(ours) / statistics.median(theirs), min(pairs), max(pairs))


def noise_floor(row: RowRuns) -> float | None:
    """The largest relative difference between two runs of the same contender, one right after the other."""
    speeds = [result["tokens_per_second"] for result in row.phase("floor")]
    pairs = zip(speeds[::2], speeds[1::2], strict=False)
    return max((abs(a / b - 1.0) for a, b in pairs), default=None)


FEWEST_ROUNDS = 3
"""Rounds below which nothing is said of who is ahead."""


def is_ahead(ours: list[float], theirs: list[float], floor: float) -> bool:
    """Faster by more than the noise floor and by more than either's spread, the ranges not overlapping; fewer than
    three rounds show nothing."""
    if min(len(ours), len(theirs)) < FEWEST_ROUNDS:
        return False
    ahead = statistics.median(ours) - statistics.median(theirs)
    spread = max(max(ours) - min(ours), max(theirs) - min(theirs), floor * statistics.median(theirs))
    return min(ours) > max(theirs) and ahead > spread


def best_torch(row: RowRuns) -> str | None:
    """The contender in torch with the largest median speed."""
    torch = [name for name in row.contenders if (r := row.phase("round", name)) and r[0]["framework"] == "torch"]
    return max(torch, key=lambda name: statistics.median(row.speeds(name)), default=None)


def spread(values: list[float], digits: int = 3) -> list[float]:
    """Least, median and largest."""
    return [round(f(values), digits) for f in (min, statistics.median, max)]


def keep(path: Path, result: dict[str, Any]) -> None:
    """Write what a benchmark of one process found, for `report.py`; and print it, but for what is long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name not in ("machine", "runs")}))
