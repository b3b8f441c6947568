"""Runs the contenders on the rows: the same weights and batches, each run a fresh process, in the order A B B A.

    python benchmarks/run.py --rows=C1,C2,C3 --nanogpt=DIR --rounds=6

First the machine's ceilings. Then, for each row: the loss gate; a short run with empty compile caches; runs of one
contender against itself, for the noise floor; and the rounds. Raw results go to OUT/ROW.jsonl, a header and a line a
run, as they come; `report.py` makes tables of them. Run it on an idle machine.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import busy_share, facts, wait_until_idle
from outcome import RowRuns, best_torch, gate, noise_floor, ratio, row_gate
from rows import ROWS, Row
from tokens import write_tokens

HERE = Path(__file__).resolve().parent

CONTENDERS = {
    "jaxstages": ["contender_jaxstages.py"],
    "flax": ["contender_flax.py"],
    "nanogpt-eager": ["contender_nanogpt.py", "--mode=eager"],
    "nanogpt-eager-fused": ["contender_nanogpt.py", "--mode=eager", "--optimizer=fused"],
    "nanogpt-compile": ["contender_nanogpt.py", "--mode=compile"],
    "nanogpt-compile-fused": ["contender_nanogpt.py", "--mode=compile", "--optimizer=fused"],
    "nanogpt-max-autotune": ["contender_nanogpt.py", "--mode=max-autotune", "--optimizer=fused"],
    "transformers-eager": ["contender_transformers.py", "--mode=eager"],
    "transformers-compile": ["contender_transformers.py", "--mode=compile"],
    "transformers-trainer": ["contender_transformers.py", "--loop=trainer"],
    "peft-eager": ["contender_peft.py", "--mode=eager"],
    "peft-compile": ["contender_peft.py", "--mode=compile"],
    "peft-trainer": ["contender_peft.py", "--loop=trainer"],
}
"""Plain Flax, those without "fused", and the trainer, are as shipped; the others are tuned."""


def takes_part(contender: str, row: Row) -> bool:
    """jaxstages does everywhere; peft where there are adapters, and the others where there are none."""
    return contender == "jaxstages" or contender.startswith("peft") == bool(row.rank)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Driver:
    """Starts contenders, and writes each run's line."""

    def __init__(self, flags: argparse.Namespace, row: Row, planned: int) -> None:
        self.flags, self.row = flags, row
        self.path: Path = flags.out / f"{row.name}.jsonl"
        self.runs: list[dict[str, Any]] = []
        self.done, self.planned = 0, planned
        self.took: dict[str, float] = {}

    def write(self, line: dict[str, Any]) -> None:
        """Append one line to the row's raw file."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def caches(self, contender: str) -> dict[str, str]:
        """Environment that gives the contender compile caches of its own."""
        folder = (self.flags.work / "cache" / self.row.name / contender).resolve()
        return {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }

    def command(self, contender: str, options: list[str]) -> list[str]:
        """The contender's command line, to be run from the folder above this one."""
        script, *kind = CONTENDERS[contender]
        row, work = self.row.name, Path(os.path.relpath(self.flags.work, HERE.parent))
        command = ["python", f"{HERE.name}/{script}", *kind, f"--row={row}"]
        command += [f"--weights={work / row}.safetensors", f"--tokens={work / row}.bin"]
        command += [f"--threads={self.flags.threads}", *options]
        return command + (["--nanogpt=NANOGPT"] if "nanogpt" in script else [])

    def at(self, word: str) -> str:
        """The word with the checkout's own path; raw lines, which are shared, name no folder of this machine."""
        return word.replace("=NANOGPT", f"={self.flags.nanogpt and self.flags.nanogpt.resolve()}")

    def start(self, contender: str, phase: str, number: int, options: list[str]) -> dict[str, Any] | None:
        """One fresh process; its result, or None where it failed, which is written down too."""
        command = self.command(contender, options)
        run: dict[str, Any] = {
            "phase": phase,
            "number": number,
            "contender": contender,
            "command": shlex.join(command),
            "busy_before": round(busy_share() if self.flags.busy else wait_until_idle(), 3),
        }
        began = time.monotonic()
        try:
            process = subprocess.run(
                [sys.executable, *(self.at(word) for word in command[1:])],
                cwd=HERE.parent,
                env={**os.environ, **self.caches(contender)},
                capture_output=True,
                text=True,
                timeout=self.flags.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            run["error"] = f"longer than {self.flags.timeout} s"
        else:
            if process.returncode:
                run["error"] = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            else:
                run["result"] = json.loads(process.stdout.strip().splitlines()[-1])
        self.took[contender] = time.monotonic() - began
        self.runs.append(run)
        self.write(run)
        self.done += 1
        self._progress(run)
        return run.get("result")

    def _progress(self, run: dict[str, Any]) -> None:
        left = (self.planned - self.done) * statistics.mean(self.took.values())
        match run:
            case {"result": {"tokens_per_second": speed}}:
                result = f"{speed:,.0f} tokens/s"
            case {"result": {"first_loss": loss, "first_grad_norm": norm}}:
                result = f"loss {loss:.8g}, gradient norm {norm:.8g}"
            case _:
                result = run["error"]
        text = f"{self.row.name} {run['phase']} {run['number']} {run['contender']}: {result}"
        say(f"[{self.done}/{self.planned}] {text}; {left / 60:.0f} min left for this row")

    def prepare(self) -> None:
        """Weights and tokens of the row."""
        work: Path = self.flags.work
        work.mkdir(parents=True, exist_ok=True)
        weights = [sys.executable, str(HERE / "weights.py"), f"--row={self.row.name}"]
        subprocess.run([*weights, f"--out={work / self.row.name}.safetensors"], check=True)
        write_tokens(work / f"{self.row.name}.bin", self.row, self.row.warmup + max(self.row.steps, 2))

    def empty_caches(self) -> None:
        """Forget what the contenders compiled for this row."""
        shutil.rmtree(self.flags.work / "cache" / self.row.name, ignore_errors=True)

    def measure(self, header: dict[str, Any], names: list[str]) -> RowRuns:
        """The whole row: gate, cold start, floor and rounds. A contender that fails takes no further part."""
        row = self.row
        self.path.unlink(missing_ok=True)
        self.write(header)
        results = {name: self.start(name, "gate", 0, ["--check"]) for name in names}
        passed = {name: result for name, result in results.items() if result}
        complaints = gate(passed, row.tolerance) if passed else ["no contender gave a result"]
        if not complaints:
            self.empty_caches()
            standing = [name for name in passed if self.start(name, "cold", 0, ["--steps=2", "--warmup=1"])]
            options = [f"--steps={row.steps}", f"--warmup={row.warmup}"]
            self.planned = self.done + 2 * self.flags.floor + len(standing) * self.flags.rounds
            for number in range(2 * self.flags.floor):
                self.start(standing[0], "floor", number, options)
            for number in range(self.flags.rounds):
                for name in standing[:: -1 if number % 2 else 1]:
                    self.start(name, "round", number, options)
        return RowRuns(header, self.runs)


def summarize(row: RowRuns) -> None:
    """The row's outcome in a few lines."""
    for complaint in row_gate(row):
        say(f"VOID: {complaint}")
    best, floor = best_torch(row), noise_floor(row)
    if floor is not None:
        say(f"noise floor: {floor:.1%}")
    if best:
        for name in row.contenders:
            if speeds := row.speeds(name):
                say(f"{name:24} {ratio(speeds, row.speeds(best))} of {best}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="C1,C2,C3", help=f"some of {','.join(ROWS)}, all on one kind of device")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="the first is measured against itself")
    parser.add_argument("--nanogpt", type=Path, default=None, help="a checkout of nanoGPT; without, it takes no part")
    parser.add_argument("--rounds", type=int, default=6, help="an even number has as many A B as B A")
    parser.add_argument(
        "--floor", type=int, default=3, help="pairs of runs of the first contender, for the noise floor"
    )
    parser.add_argument("--steps", type=int, default=0, help="steps under the clock; default: the row's")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on the CPU; XLA takes all cores")
    parser.add_argument("--limit_seconds", type=float, default=0.5, help="for each figure of the ceilings")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one process may take")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the raw results")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder of weights, tokens, compile caches")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine too; the report says so")
    flags = parser.parse_args()
    machine = facts()  # before anything of ours runs
    load = machine["loadavg"][0]
    if load > 0.5 and not flags.busy:
        raise SystemExit(f"the machine is busy: load {load:.2f} in the last minute, at most 0.5; wait, or add --busy")
    names = flags.contenders.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise SystemExit(f"--contenders: {unknown[0]} is unknown; known: {', '.join(CONTENDERS)}")
    if flags.nanogpt is None:
        names = [name for name in names if not name.startswith("nanogpt")]
        say("without --nanogpt=DIR, nanoGPT takes no part")
    elif not (flags.nanogpt / "model.py").exists():
        raise SystemExit(f"--nanogpt={flags.nanogpt}: no model.py there")
    if unknown := [name for name in flags.rows.split(",") if name not in ROWS]:
        raise SystemExit(f"--rows: {unknown[0]} is unknown; known: {', '.join(ROWS)}")
    rows = [ROWS[name] for name in flags.rows.split(",")]
    if len({row.device for row in rows}) > 1:
        raise SystemExit("--rows: all must be on one kind of device")
    flags.out.mkdir(parents=True, exist_ok=True)
    limits = [sys.executable, str(HERE / "limits.py"), f"--rows={flags.rows}", f"--seconds={flags.limit_seconds}"]
    subprocess.run([*limits, f"--out={flags.out / 'limits.json'}"], check=True, stdout=sys.stderr)
    ceilings = json.loads((flags.out / "limits.json").read_text())["ceilings_gflops"]
    for row in rows:
        row = dataclasses.replace(row, steps=flags.steps or row.steps)
        contenders = [name for name in names if takes_part(name, row)]
        driver = Driver(flags, row, len(contenders) * (2 + flags.rounds) + 2 * flags.floor)
        header = {
            "row": {**dataclasses.asdict(row), "tolerance": row.tolerance},
            "machine": machine,
            "busy": flags.busy,
            "threads": flags.threads,
            "ceilings_gflops": ceilings,
            "nanogpt_sha256": hashlib.sha256((flags.nanogpt / "model.py").read_bytes()).hexdigest()
            if flags.nanogpt
            else None,
        }
        driver.prepare()
        driver.empty_caches()
        summarize(driver.measure(header, contenders))


if __name__ == "__main__":
    main()
