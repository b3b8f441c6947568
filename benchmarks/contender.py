"""What every contender does: read its flags, have its steps timed, print one line of JSON."""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import ROWS, Row


def contender_flags(description: str | None) -> argparse.ArgumentParser:
    """The flags that every contender takes; each adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=ROWS.__getitem__, required=True, help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--weights", type=Path, required=True, help="what weights.py wrote")
    parser.add_argument("--tokens", type=Path, required=True, help="what tokens.py wrote")
    parser.add_argument("--check", action="store_true", help="only print the first batch's loss and gradient norm")
    parser.add_argument("--steps", type=int, default=1, help="steps under the clock")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock, at least 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on the CPU; XLA takes all cores")
    return parser


def seconds_since_start() -> float:
    """Seconds since this process started, by the kernel's clock (Linux; to 10 ms)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_rss() -> int:
    """The most bytes of memory that this process has held so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Recorder:
    """Told of each step when it has been handed to the device; waits for it only where the clock is read: after the
    first step, and at both ends of the timed ones."""

    def __init__(self, warmup: int, steps: int, sync: Callable[[], object]) -> None:
        if min(warmup, steps) < 1:
            raise ValueError(f"--warmup={warmup} and --steps={steps} must be at least 1")
        self.warmup, self.steps, self._sync = warmup, steps, sync
        self.total = warmup + steps
        self.losses: list[Any] = []
        self.process_to_first_step = 0.0
        self._times: dict[int, float] = {}

    def begin(self) -> None:
        """Call before the first step."""
        self._read_clock()

    def step_done(self, loss: Any) -> None:
        """Call after each step, with its loss, which need not be there yet."""
        self.losses.append(loss)
        done = len(self.losses)
        if done in (1, self.warmup, self.total):
            self._read_clock()
        if done == 1:
            self.process_to_first_step = seconds_since_start()

    def _read_clock(self) -> None:
        self._sync()
        self._times[len(self.losses)] = time.perf_counter()

    @property
    def seconds(self) -> float:
        """The timed steps took so long."""
        return self._times[self.total] - self._times[self.warmup]

    @property
    def compile_seconds(self) -> float:
        """How much longer than a timed step the first one took: compilation, tracing and first allocations."""
        return max(0.0, self._times[1] - self._times[0] - self.seconds / self.steps)


def print_check(parameters: int, loss: float, grad_norm: float) -> None:
    """The line of JSON of `--check`; the gradient norm is to be summed in float64, for sums of 10^8 squares in float32
    differ between libraries by 1e-4."""
    print(json.dumps({"parameters": parameters, "first_loss": loss, "first_grad_norm": grad_norm}), flush=True)


def print_result(
    row: Row,
    recorder: Recorder,
    *,
    framework: str,
    parameters: int,
    packages: tuple[str, ...],
    peak_device_bytes: int | None = None,
) -> None:
    """The contender's one line of JSON, its last."""
    peak = peak_rss()
    losses = [float(f"{float(loss):.8g}") for loss in recorder.losses]
    result = {
        "framework": framework,
        "parameters": parameters,
        "first_loss": losses[0],
        "steps": recorder.steps,
        "warmup": recorder.warmup,
        "seconds": recorder.seconds,
        "tokens_per_second": row.tokens_per_step * recorder.steps / recorder.seconds,
        "process_to_first_step_seconds": recorder.process_to_first_step,
        "compile_seconds": recorder.compile_seconds,
        "peak_rss_bytes": peak,
        "peak_device_bytes": peak_device_bytes,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in packages}},
        "losses": losses[recorder.warmup :],
    }
    print(json.dumps(result), flush=True)
