"""Generation on the CPU: jaxstages beside transformers' `generate`, the same weights, the same greedy tokens.

    python benchmarks/generation.py --rounds=6                       # on an idle machine; all shapes and batches
    python benchmarks/generation.py --shapes=20M --batches=1 --new=16 --rounds=1 --busy

Contenders are processes that load the weights, answer once (which compiles), and then answer whenever they are told to:
A B, B A, ... Before the clock their tokens must be equal. A round's figure is new tokens a second of whole answers, the
reading of the prompts included; what counts is the ratio within a round. `--torch` names a Python with the extra
`setup`, if the one that runs this has none. Prints a line a case, and keeps all in OUT/generation.json.

* jaxstages: `make_answers`, as `jaxstages generate` and evaluation use it
* transformers: `GPT2LMHeadModel.generate(do_sample=False, use_cache=True)` on --threads threads
* transformers-static: the same with `cache_implementation="static"`
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import busy_share, facts, wait_until_idle
from outcome import keep, spread
from rows import Row

HERE = Path(__file__).resolve().parent
SIZES = (
    {"layers": 8, "heads": 6, "width": 384, "vocab": 16384},
    {"layers": 12, "heads": 12, "width": 768, "vocab": 50257},
)
SHAPES = {
    name: Row(name=f"generation-{name}", context=1024, batch=1, steps=1, **size)
    for name, size in zip(("20M", "124M"), SIZES, strict=True)
}
CONTENDERS = ("jaxstages", "transformers", "transformers-static")

Answer = Callable[[np.ndarray], list[list[int]]]
"""Prompts, all of one length, -> the new tokens of each."""


def prompts_of(row: Row, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, row.vocab, (batch, length)).astype(np.int32)


def write_weights(row: Row, path: Path) -> None:
    """Drawn by jaxstages, and three times as large as for training: with fresh weights a token follows itself."""
    import jax
    from safetensors.numpy import save_file
    from weights import model_config, to_gpt2

    from jaxstages.models.transformer import make_model

    params = jax.jit(make_model(model_config(row), row.vocab).init)(jax.random.key(0))
    params["layers"] = jax.tree.map(lambda leaf: leaf * 3.0 if leaf.ndim > 2 else leaf, params["layers"])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(to_gpt2(params), path)


def answer_by_jaxstages(row: Row, weights: Path, batch: int, new: int) -> Answer:
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import load_file
    from weights import from_gpt2, model_config

    from jaxstages.config import MeshConfig
    from jaxstages.generation.decode import make_answers
    from jaxstages.generation.sampling import Sampling
    from jaxstages.models.sharding import batch_sharding, make_mesh
    from jaxstages.models.transformer import make_model

    params = jax.tree.map(jnp.asarray, from_gpt2(load_file(weights), row))
    model = make_model(model_config(row), row.vocab)
    answers = make_answers(
        model,
        Sampling(new),
        context=row.context,
        batch_size=batch,
        rows=batch_sharding(make_mesh(MeshConfig(), jax.devices()[:1])),
    )
    batches: Any = None

    def answer(prompts: np.ndarray) -> list[list[int]]:
        nonlocal batches
        batches = batches or answers(params, prompts.tolist() * 1000, 0)  # as a file of prompts, a batch at a time
        return next(batches)

    return answer


def answer_by_transformers(row: Row, weights: Path, new: int, threads: int, static: bool) -> Answer:
    import torch
    from contender_transformers import make_gpt2
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    model = make_gpt2(row, load_file(weights)).eval()
    model.config.use_cache = model.generation_config.use_cache = True
    cache = {"cache_implementation": "static"} if static else {}

    def answer(prompts: np.ndarray) -> list[list[int]]:
        ids = torch.from_numpy(prompts.astype("int64"))
        with torch.inference_mode():
            result = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **cache
            )
        return result[:, ids.shape[1] :].tolist()

    return answer


def serve(flags: argparse.Namespace) -> None:
    """A line of JSON for each line that comes: seconds, CPU seconds, and the first time also the tokens."""
    row = SHAPES[flags.shapes]
    if flags.serve == "jaxstages":
        answer = answer_by_jaxstages(row, flags.weights, int(flags.batches), flags.new)
    else:
        static = flags.serve == "transformers-static"
        answer = answer_by_transformers(row, flags.weights, flags.new, flags.threads, static)
    prompts = prompts_of(row, int(flags.batches), flags.prompt)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    for n, _ in enumerate(sys.stdin):
        start, busy = time.perf_counter(), time.process_time()
        tokens = answer(prompts)
        seconds, cpu = time.perf_counter() - start, time.process_time() - busy
        print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": tokens if n == 0 else None}), file=out, flush=True)


class Contender:
    """One process, which waits between its answers."""

    def __init__(self, name: str, flags: argparse.Namespace, shape: str, batch: int, weights: Path) -> None:
        python = flags.torch if name.startswith("transformers") else sys.executable
        words = [python, str(HERE / "generation.py"), f"--serve={name}", f"--shapes={shape}", f"--batches={batch}"]
        words += [
            f"--weights={weights}",
            f"--new={flags.new}",
            f"--prompt={flags.prompt}",
            f"--threads={flags.threads}",
        ]
        self.name = name
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print("go", file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"{self.name} ended with code {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self._process.communicate()


def measure(flags: argparse.Namespace, shape: str, batch: int) -> dict[str, Any]:
    weights = flags.work / f"generation-{shape}.safetensors"
    if not weights.exists():
        write_weights(SHAPES[shape], weights)
    names = flags.contenders.split(",")
    contenders = [Contender(name, flags, shape, batch, weights) for name in names]
    first = [contender.answer() for contender in contenders]
    equal = all(results["tokens"] == first[0]["tokens"] for results in first)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(flags.rounds):
        for contender in contenders[:: -1 if number % 2 else 1]:
            time.sleep(0.5)  # threads of the other may still spin
            if not flags.busy:
                wait_until_idle()
            results[contender.name].append(contender.answer())
    for contender in contenders:
        contender.end()
    count = batch * flags.new
    seconds = {name: [run["seconds"] for run in runs] for name, runs in results.items()}
    ratios = {
        name: spread([theirs / ours for theirs, ours in zip(seconds[name], seconds[names[0]], strict=True)], 3)
        for name in names[1:]
    }
    return {
        "shape": shape,
        "batch": batch,
        "new": flags.new,
        "prompt": flags.prompt,
        "equal_tokens": equal,
        "distinct_tokens": len({token for row in first[0]["tokens"] for token in row}),
        "tokens_per_second": {name: round(count / statistics.median(times), 2) for name, times in seconds.items()},
        "cpu_seconds": {name: round(statistics.median(r["cpu"] for r in runs), 3) for name, runs in results.items()},
        "first_answer_more_seconds": {
            name: round(run["seconds"] - statistics.median(seconds[name]), 2)
            for name, run in zip(names, first, strict=True)
        },
        f"{names[0]} over, min median max": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="20M,124M")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--contenders", default="jaxstages,transformers", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each answer")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch and transformers")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--serve", choices=CONTENDERS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, default=None, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        serve(flags)
        return
    machine, busy = facts(), busy_share()
    cases = []
    for shape in flags.shapes.split(","):
        for batch in map(int, flags.batches.split(",")):
            cases.append(measure(flags, shape, batch))
            print(json.dumps(cases[-1]), flush=True)
    keep(flags.out / "generation.json", {"machine": machine, "busy_before": busy, "busy": flags.busy, "cases": cases})


if __name__ == "__main__":
    main()
