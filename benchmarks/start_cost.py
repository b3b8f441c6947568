"""From the start of the process to the end of the first step, in the demo's model: cold, and warm.

    python benchmarks/start_cost.py --rounds=5

Cold is with nothing there: the tokenizer is trained, rows are prepared, everything is compiled. Warm is the same
command once more, with tokenizer, rows and compiled functions there, but no checkpoint. The held-out loss before the
first step is part of both. To be run where PyTorch is not installed, as `make .venv` leaves it: tensorboardX imports it
at the start, where it is there. Prints JSON, and keeps it in OUT/start.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from contender import seconds_since_start
from machine import busy_share, facts, wait_until_idle
from outcome import keep, spread

HERE = Path(__file__).resolve().parent
CONFIG = "configs/demo.py"


def child(workdir: str) -> None:
    """`jaxstages pretrain` up to its first step, whose time is printed; ends there."""
    import jax

    from jaxstages.__main__ import cli
    from jaxstages.training import stage
    from jaxstages.training.compile import compile_step

    def compile_clocked(*arguments):
        function, jitted = compile_step(*arguments)

        def step(state, batch):
            jax.block_until_ready(jitted(state, batch))
            print(json.dumps(seconds_since_start()), flush=True)
            os._exit(0)

        return function, step

    stage.compile_step = compile_clocked
    sys.argv = ["jaxstages", "pretrain", f"--config={CONFIG}", f"--workdir={workdir}"]
    cli()


def start(workdir: Path, caches: Path) -> float:
    """Seconds to the first step of a fresh process."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(caches)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    process = subprocess.run(
        [sys.executable, str(HERE / "start_cost.py"), f"--child={workdir}"],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", action="store_true", help="do not wait until the machine is idle")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(flags.child)
    machine, busy, cold, warm = facts(), [], [], []
    for number in range(flags.rounds):
        folder = Path(tempfile.mkdtemp())
        for times in (cold, warm):
            busy.append(round(busy_share() if flags.busy else wait_until_idle(), 3))
            times.append(start(folder / "work", folder / "caches"))
            shutil.rmtree(folder / "work" / "pretrain", ignore_errors=True)
        shutil.rmtree(folder)
        print(f"round {number}: cold {cold[-1]:.1f} s, warm {warm[-1]:.1f} s", file=sys.stderr, flush=True)
    result = {
        "command": f"python benchmarks/start_cost.py --rounds={flags.rounds}",
        "machine": machine,
        "busy_before": busy,
        "cold seconds, min median max": spread(cold),
        "warm seconds, min median max": spread(warm),
        "cold / warm, round by round": [round(a / b, 2) for a, b in zip(cold, warm, strict=True)],
    }
    keep(flags.out / "start.json", result)


if __name__ == "__main__":
    main()
