"""C4, instruction tuning on short conversations: jaxstages, packed, beside transformers' Trainer, padded and packed.

    python benchmarks/packed_sft.py --conversations=1000 --rounds=4

All start from the same weights and train once on the same conversations, in turn (A B C C B A), each in a fresh
process. Figures are scored tokens a second: tokens of answers, after the first step, which compiles. Before the clock,
the two packed contenders' first batch must give the same loss, to 1e-5. Prints JSON, and keeps it in OUT/C4.json.

* jaxstages: its own packing (best fit, nothing cut), attention within each conversation
* trainer-packed: the same rows; from positions that start anew at 0 transformers makes the mask of each conversation
* trainer-padded: batches of conversations in their order, padded to the longest of them, as the Trainer is mostly used;
  as many conversations a batch as a packed one holds on average
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import busy_share, facts, wait_until_idle
from outcome import keep, spread
from rows import ROWS, Row

HERE = Path(__file__).resolve().parent
ROW = ROWS["C4"]
NOT_SCORED = -100


def conversations(count: int, row: Row) -> list[tuple[np.ndarray, int]]:
    """Ids, and how many of them are the question's: lengths log-normal, about 110 on average (Alpaca's median), none
    longer than a row."""
    draw = np.random.default_rng(0)
    results = []
    for _ in range(count):
        length = int(np.clip(draw.lognormal(4.45, 0.7), 8, row.context))
        prompt_length = max(2, int(length * draw.uniform(0.2, 0.6)))
        results.append(((draw.zipf(1.2, length) % row.vocab).astype(np.int32), prompt_length))
    return results


def packed_rows(talks: list[tuple[np.ndarray, int]], row: Row) -> np.ndarray:
    """Rows int32 [R, 5, L], filled up with empty ones to whole batches."""
    from jaxstages.data.packing import pack
    from jaxstages.data.tasks import Example

    examples = [Example(ids, (np.arange(len(ids)) >= prompt_length).astype(np.float32)) for ids, prompt_length in talks]
    rows = np.stack(pack(examples, row.context)[0])
    np.random.default_rng(1).shuffle(rows)
    return np.pad(rows, ((0, -len(rows) % row.batch), (0, 0), (0, 0)))


def jaxstages(talks: list[tuple[np.ndarray, int]], weights: Path, check: bool) -> dict[str, float]:
    import jax
    from contender_jaxstages import optim_config
    from safetensors.numpy import load_file
    from weights import from_gpt2, model_config

    from jaxstages.data.batches import to_batch
    from jaxstages.models.losses import cross_entropy_loss
    from jaxstages.models.select import global_norm
    from jaxstages.models.transformer import make_model
    from jaxstages.runtime.cpu import disable_malloc_trim
    from jaxstages.training.optimizer import make_optimizer
    from jaxstages.training.step import init_state, make_train_step

    disable_malloc_trim()
    rows = packed_rows(talks, ROW)
    batches = [to_batch(rows[k : k + ROW.batch]) for k in range(0, len(rows), ROW.batch)]
    model = make_model(model_config(ROW), ROW.vocab)
    tx = make_optimizer(optim_config(ROW), len(batches), model.axes)
    state = init_state(jax.tree.map(jax.numpy.array, from_gpt2(load_file(weights), ROW)), tx)
    step = jax.jit(make_train_step(cross_entropy_loss(model.outputs), tx, norm=global_norm), donate_argnums=0)
    state, sums = step(state, batches[0])
    first = float(sums["nll"]) / float(sums["weight"])
    if check:
        return {"first_loss": first}
    start, result = time.perf_counter(), []
    for batch in batches[1:]:
        state, sums = step(state, batch)
        result.append(sums)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    scored = sum(float(sums["weight"]) for sums in result)
    last = result[-3:]
    return {
        "first_loss": first,
        "last_loss": sum(float(s["nll"]) for s in last) / sum(float(s["weight"]) for s in last),
        "seconds": seconds,
        "scored": scored,
        "steps": len(batches),
        "slots_used": float(np.mean(rows[rows[:, 3, 0] > 0][:, 3] > 0)),
    }


def padded(talks: list[tuple[np.ndarray, int]], size: int) -> list[dict[str, np.ndarray]]:
    """Batches of `size` conversations, each as long as its longest."""
    batches = []
    for start in range(0, len(talks), size):
        chosen = talks[start : start + size]
        longest = max(len(ids) for ids, _ in chosen)
        ids = np.stack([np.pad(ids, (0, longest - len(ids))) for ids, _ in chosen]).astype(np.int64)
        mask = np.stack([np.arange(longest) < len(ids) for ids, _ in chosen]).astype(np.int64)
        prompt_length = np.array([prompt_length for _, prompt_length in chosen])[:, None]
        labels = np.where((mask > 0) & (np.arange(longest)[None] >= prompt_length), ids, NOT_SCORED)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def packed(rows: np.ndarray, batch: int) -> list[dict[str, np.ndarray]]:
    """The rows as transformers takes them; padding goes on as one more conversation."""
    tokens, targets, weights, segments, positions = (rows[:, i].astype(np.int64) for i in range(5))
    scored = rows[:, 2].copy().view(np.float32) > 0
    del weights
    first_empty = (segments > 0).sum(axis=1, keepdims=True)
    places = np.arange(rows.shape[2])[None]
    positions = np.where(segments > 0, positions, places - first_empty)
    labels = np.where(scored, targets, NOT_SCORED)
    fields = {"input_ids": tokens, "position_ids": positions, "labels": labels, "shift_labels": labels}
    return [{n: f[k : k + batch] for n, f in fields.items()} for k in range(0, len(rows), batch)]


def trainer(talks: list[tuple[np.ndarray, int]], weights: Path, check: bool, pad: bool) -> dict[str, float]:
    import torch
    from contender_transformers import LossKeepingTrainer, make_gpt2
    from safetensors.torch import load_file
    from transformers import TrainerCallback, TrainingArguments

    torch.set_num_threads(os.cpu_count() or 1)
    rows = packed_rows(talks, ROW)
    size = round(len(talks) * ROW.batch / len(rows))
    batches = padded(talks, size) if pad else packed(rows, ROW.batch)
    dataset = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in batches]
    times: list[float] = []
    losses: list[float] = []

    class Timed(TrainerCallback):
        loss: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())
            losses.append(float(self.loss))  # on CPU nothing is in flight

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=1 if check else len(dataset),
            per_device_train_batch_size=1,  # of whole batches, made before the clock
            learning_rate=ROW.learning_rate,
            adam_beta1=ROW.beta1,
            adam_beta2=ROW.beta2,
            weight_decay=ROW.weight_decay,
            max_grad_norm=ROW.clip_norm,
            lr_scheduler_type="constant",
            use_cpu=True,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
        )
        timed = Timed()
        model = make_gpt2(ROW, load_file(weights))
        made = LossKeepingTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            callbacks=[timed],
            data_collator=lambda result: result[0],
        )
        made.timed, made.check = timed, False
        made.train()
    if check:
        return {"first_loss": losses[0]}
    return {
        "first_loss": losses[0],
        "last_loss": statistics.mean(losses[-3:]),
        "seconds": times[-1] - times[0],
        "scored": float(sum((batch["labels"][:, int(pad) :] != NOT_SCORED).sum() for batch in batches[1:])),
        "steps": len(batches),
        "slots_used": sum(len(ids) - 1 for ids, _ in talks) / sum(batch["input_ids"].size for batch in batches),
    }


CONTENDERS = ("jaxstages", "trainer-packed", "trainer-padded")


def start(name: str, flags: argparse.Namespace, weights: Path, check: bool) -> dict[str, Any]:
    """Figures of one contender in a fresh process."""
    command = [sys.executable, str(HERE / "packed_sft.py"), f"--child={name}", f"--weights={weights}"]
    command += [f"--conversations={flags.conversations}", *(["--check"] if check else [])]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{name}: {process.stderr}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--busy", action="store_true", help="do not wait until the machine is idle")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    talks = conversations(flags.conversations, ROW)
    if flags.child == "jaxstages":
        print(json.dumps(jaxstages(talks, flags.weights, flags.check)))
        return
    if flags.child:
        print(json.dumps(trainer(talks, flags.weights, flags.check, flags.child == "trainer-padded")))
        return
    machine, folder = facts(), Path(tempfile.mkdtemp())
    weights = folder / "C4.safetensors"
    made = [sys.executable, str(HERE / "weights.py"), "--row=C4", f"--out={weights}"]
    subprocess.run(made, check=True, stdout=sys.stderr)
    ours, theirs = (start(name, flags, weights, True)["first_loss"] for name in CONTENDERS[:2])
    if abs(ours / theirs - 1.0) > ROW.tolerance:
        raise SystemExit(f"VOID: first loss {ours:.8g} against {theirs:.8g}: not the same model, or not the same mask")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    busy = []
    for number in range(flags.rounds):
        for name in CONTENDERS[:: -1 if number % 2 else 1]:
            busy.append(round(busy_share() if flags.busy else wait_until_idle(), 3))
            runs[name].append(measured := start(name, flags, weights, False))
            measured["scored tokens/s"] = measured["scored"] / measured["seconds"]
            text = f"{measured['scored tokens/s']:,.0f} scored tokens/s, last loss {measured['last_loss']:.4f}"
            print(f"round {number} {name}: {text}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)

    def over(theirs: str) -> list[float]:
        pairs = zip(runs["jaxstages"], runs[theirs], strict=True)
        return spread([a["scored tokens/s"] / b["scored tokens/s"] for a, b in pairs])

    result = {
        "command": f"python benchmarks/packed_sft.py --conversations={flags.conversations} --rounds={flags.rounds}",
        "machine": machine,
        "busy_before": busy,
        "first loss, jaxstages and trainer-packed": [ours, theirs],
        **{f"scored tokens/s, jaxstages / {name}, min median max": over(name) for name in CONTENDERS[1:]},
        "slots used": {name: runs[name][0]["slots_used"] for name in CONTENDERS},
        "runs": runs,
    }
    keep(flags.out / "C4.json", result)


if __name__ == "__main__":
    main()
