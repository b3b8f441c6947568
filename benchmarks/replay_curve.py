"""How much replay is enough? The demo's instruct stage at several shares of rows from the stages before it.

    python benchmarks/replay_curve.py --out=runs/replay [--seeds=0,1,2] [--steps=1000] [--plot=docs/replay.svg]

For each seed pretraining and fine-tuning run once; each share then trains `instruct` from them for the same number of
steps, half of the replayed rows from either stage. Every trial is an ordinary workdir below --out, and a finished one
is not run again. Prints a table of means and standard deviations over seeds, and writes it to OUT/replay.json.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
SHARES = (0.0, 0.01, 0.05, 0.1, 0.25)
FACTS = ("fact", "fact_yes_no", "two_turn_fact")
COLUMNS = {
    "perplexity": "perplexity of pretraining's held-out text",
    "bleu": "BLEU of fine-tuning's held-out pairs",
    "exact_match": "exact match on held-out instructions, %",
    "facts": "of those that need a fact from pretraining, %",
}


def run(stage: str, workdir: Path, seed: int, flags: list[str]) -> None:
    """Train a stage of the demo."""
    command = [sys.executable, "-m", "jaxstages", stage, "--config=configs/demo.py", f"--workdir={workdir}"]
    command += [f"--config.seed={seed}", *flags]
    print(" ".join(command[2:]), flush=True)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with (workdir.parent / f"{workdir.name}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def trial(share: float, seed: int, steps: int, out: Path) -> dict[str, float]:
    """The scores of the last checkpoint, on all held-out data of each stage."""
    workdir, base = out / f"replay-{share:g}-{seed}", out / f"base-{seed}"
    result = workdir / "instruct" / "result.json"
    if not result.exists():
        for stage in ("pretrain", "finetune"):
            if not (base / stage / "result.json").exists():
                run(stage, base, seed, [])
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(base, workdir)
        replay = (("pretrain", share / 2), ("finetune", share / 2)) if share else ()
        flags = [f"--config.instruct.replay={replay}", f"--config.instruct.loop.steps={steps}"]
        flags += [f"--config.instruct.evaluation.{name}=0" for name in ("watch_max_rows", "watch_max_examples")]
        run("instruct", workdir, seed, flags)
    content = json.loads(result.read_text())
    best, watch = content["best"], content["watch"]
    return {
        "perplexity": watch["watch/pretrain/perplexity"]["best"],
        "bleu": watch["watch/finetune/bleu"]["best"],
        "exact_match": best["exact_match"],
        "facts": statistics.mean(best[f"exact_match/{kind}"] for kind in FACTS),
    }


def plot(rows: list[dict], path: Path) -> None:
    """A panel for each score over the share, with its standard deviation."""
    figure, axes = pyplot.subplots(1, len(COLUMNS), figsize=(13, 3), layout="constrained")
    places = range(len(rows))
    for axis, (name, title) in zip(axes, COLUMNS.items(), strict=True):
        means, spreads = ([row[name][part] for row in rows] for part in ("mean", "sd"))
        axis.errorbar(places, means, yerr=spreads, marker="o", capsize=3)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(places, [f"{row['share']:.0%}" for row in rows])
        axis.set_xlabel("replayed rows")
        if name == "perplexity":
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    out = options.out.resolve()
    rows = []
    for share in SHARES:
        scores = [trial(share, int(seed), options.steps, out) for seed in options.seeds.split(",")]
        row: dict = {"share": share}
        for name in COLUMNS:
            values = [score[name] for score in scores]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            row[name] = {"mean": statistics.mean(values), "sd": spread, "values": values}
        rows.append(row)
        print(
            f"{share:.0%}: " + "  ".join(f"{n} {row[n]['mean']:.2f} ± {row[n]['sd']:.2f}" for n in COLUMNS), flush=True
        )
        (out / "replay.json").write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
