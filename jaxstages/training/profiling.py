"""A profiler trace of some steps, and the peak memory of the process."""

import contextlib
import resource
from pathlib import Path
from typing import Any

import jax

from jaxstages.runtime.bucket import is_bucket, local_copy
from jaxstages.runtime.console import say
from jaxstages.runtime.files import copy_file
from jaxstages.training.event_file import TENSORBOARD


class Profiler:
    """Records a `jax.profiler` trace of the steps `first` to `last`, for TensorBoard's profile plugin or `xprof`."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        """
        Args:
            steps: first and last step, counted from 1 as in the log; None records nothing.
            folder: folder of the stage. The trace is in its `tensorboard/`.
        """
        self._first, self._last = steps or (-1, -1)
        self._folder, self._active = folder, False

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Return the context of a step, which names it in the trace. Starts the trace, if it is the first one of it."""
        if step == self._first:
            jax.profiler.start_trace(str(local_copy(self._folder) / TENSORBOARD))
            self._active = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self._active else contextlib.nullcontext()

    def after(self, step: int, result: Any) -> None:
        """End the trace when the results of its last step are there."""
        if self._active and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End a trace that is still active, as at the end of a stage."""
        if not self._active:
            return
        self._active = False
        jax.profiler.stop_trace()
        local, folder = local_copy(self._folder) / TENSORBOARD, self._folder / TENSORBOARD
        if is_bucket(folder):
            for path in (local / "plugins").rglob("*"):
                if path.is_file():
                    copy_file(path, folder / path.relative_to(local))
        say(f"profile of steps {self._first} to {self._last}: tensorboard --logdir {self._folder}", "cyan")


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process in GB, on the host and on the fullest of its devices, where known."""
    peaks = {"host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    if used := [each["peak_bytes_in_use"] for each in statistics if "peak_bytes_in_use" in each]:
        peaks["device_gb"] = max(used) / 1e9
    return peaks
