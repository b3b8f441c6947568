"""Does pretraining pay? Fine-tuning from `configs/text_to_chat.py`'s pretrained checkpoint, and from scratch.

    python benchmarks/transfer.py --data=DATA --out=runs/transfer [--tasks=translate,classify]
        [--sizes=2000,10000,5,20,all] [--seeds=0,1,2]

DATA has the folders that the recipes' headers name. Each trial is an ordinary workdir below --out, and one that is
finished is not run again: the script can be stopped at any time. For each task and size, both kinds of start get the
same fine-tuning budget and the same learning rates to choose from, by seed 0; the best one of each is then run with all
seeds. Prints a table of means and standard deviations, and writes it to OUT/transfer.json.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RATES = (1e-3, 2e-3, 4e-3)
STARTS = ("pretrained", "scratch")


class Size(NamedTuple):
    """A training set: its name, and the steps of fine-tuning on it."""

    name: str
    steps: int


TRANSLATE = (Size("2000", 300), Size("10000", 600), Size("all", 1600))
CLASSIFY = (Size("5", 150), Size("20", 300), Size("all", 900))
BETTER = {"translate": "bleu", "classify": "macro_f1"}
SHOWN = {"translate": ("loss", "bleu", "chrf"), "classify": ("macro_f1", "accuracy")}


def run(stage: str, config: str, workdir: Path, flags: list[str]) -> dict:
    """The result of a stage, trained if it is not finished yet."""
    result = workdir / stage / "result.json"
    if not result.exists():
        command = [sys.executable, "-m", "jaxstages", stage, f"--config={config}", f"--workdir={workdir}", *flags]
        print(" ".join(command[2:]), flush=True)
        log = workdir.parent / f"{workdir.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=True)
    return json.loads(result.read_text())


def quoted(paths: list[Path]) -> str:
    return repr(tuple(str(path) for path in paths))


def pretrain(data: Path, out: Path, seed: int) -> Path:
    """Return the workdir of a pretrained model."""
    workdir = out / f"pretrain-{seed}"
    pairs = [f"--config.pretrain.mixture.{side}.data" for side in ("english", "french", "copies")]
    flags = [f"--config.seed={seed}", f"--config.cache={out / 'cache'}"]
    flags += [f"--config.pretrain.data.train={quoted(sorted((data / 'prose').glob('*.jsonl')))}"]
    flags += [f"{part}.train={quoted([data / 'pairs' / 'train.jsonl'])}" for part in pairs]
    flags += [f"{part}.validation={quoted([data / 'pairs' / 'valid.jsonl'])}" for part in pairs]
    flags += ["--config.finetune=None", "--config.instruct=None"]
    if seed:  # one tokenizer for all: runs differ by their draw, not by their words
        flags += ["--config.tokenizer.kind=file", f"--config.tokenizer.path={tokenizer(out)}"]
    run("pretrain", "configs/text_to_chat.py", workdir, flags)
    return workdir


def tokenizer(out: Path) -> Path:
    return out / "pretrain-0" / "tokenizer" / "tokenizer.json"


def subset(file: Path, size: str, out: Path, task: str) -> Path:
    """A fixed choice of so many pairs, or of so many examples of each class; "all" is the file itself."""
    if size == "all":
        return file
    target = out / "data" / f"{task}-{size}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    if task == "classify":
        taken: dict[str, list[str]] = {}
        for line in lines:
            taken.setdefault(json.loads(line)["label"], []).append(line)
        lines = [line for group in taken.values() for line in group[: int(size)]]
    else:
        lines = lines[: int(size)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return target


def trial(task: str, size: Size, start: str, rate: float, seed: int, data: Path, out: Path) -> dict[str, float]:
    """The held-out scores of one fine-tuning."""
    folder = {"translate": "pairs", "classify": "classes"}[task]
    config = {"translate": "configs/text_to_chat.py:control", "classify": "configs/classify.py:control"}[task]
    train = subset(data / folder / "train.jsonl", size.name, out, task)
    pretrained = pretrain(data, out, seed)
    flags = [f"--config.seed={seed}", f"--config.cache={out / 'cache'}", "--config.tokenizer.kind=file"]
    flags += [f"--config.tokenizer.path={tokenizer(out)}", f"--config.finetune.optim.schedule.peak_lr={rate}"]
    flags += [f"--config.finetune.data.train={quoted([train])}", f"--config.finetune.loop.steps={size.steps}"]
    flags += [f"--config.finetune.data.validation={quoted([data / folder / 'valid.jsonl'])}"]
    flags += [f"--config.finetune.loop.eval_every={size.steps // 3}"]
    if start == "pretrained":
        flags.append(f"--config.finetune.init_from={pretrained / 'pretrain'}")
    workdir = out / f"{task}-{size.name}-{start}-{rate:g}-{seed}"
    best = run("finetune", config, workdir, flags)["best"]
    return {name: best[name] for name in SHOWN[task]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="translate,classify")
    parser.add_argument("--sizes", default="2000,10000,5,20,all", help="of the training sets, of either task")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = []
    for task in options.tasks.split(","):
        sizes = {"translate": TRANSLATE, "classify": CLASSIFY}[task]
        for size in (size for size in sizes if size.name in options.sizes.split(",")):
            for start in STARTS:
                first = {rate: trial(task, size, start, rate, seeds[0], data, out) for rate in RATES}
                rate = max(first, key=lambda r: first[r][BETTER[task]])
                scores = [trial(task, size, start, rate, seed, data, out) for seed in seeds]
                row = {"task": task, "size": size.name, "steps": size.steps, "start": start, "rate": rate}
                row["by_rate"] = {str(r): values for r, values in first.items()}
                for name in SHOWN[task]:
                    values = [score[name] for score in scores]
                    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                    row[name] = {"mean": statistics.mean(values), "sd": spread, "n": len(values)}
                rows.append(row)
                shown = "  ".join(f"{name} {row[name]['mean']:.3f} ± {row[name]['sd']:.3f}" for name in SHOWN[task])
                print(f"{task} {size.name} {start} rate {rate:g}: {shown}", flush=True)
                (out / "transfer.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
