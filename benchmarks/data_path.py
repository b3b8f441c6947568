"""From text to batches: tokenize-and-pack, and loading, beside datasets with tokenizers and the way of nanoGPT.

    python benchmarks/data_path.py --megabytes=50 --rounds=4

All take the same JSON lines and the same tokenizer.json, and end with tokens on disk, each in a fresh process with
empty caches, in turn (A B C C B A). Clocked is the work itself, without imports. Prints JSON, and keeps it in
OUT/data.json.

* jaxstages: `prepare`, packed rows with segments and positions, sealed, and `batches_by_step`
* datasets: `map` in batches over all cores, texts joined and cut to rows with mask and labels, and a torch DataLoader
  with the default collator: the way of transformers' run_clm.py
* nanogpt: `map` a document at a time over all cores, then one array file, as in its openwebtext/prepare.py, and its
  `get_batch` of random slices. Its tokenizer is tiktoken's; here it is the same as for the others.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import busy_share, facts, wait_until_idle
from outcome import keep, spread

HERE = Path(__file__).resolve().parent
CONTEXT, BATCH = 256, 16
"""Of row C2."""

BATCHES = 300
"""That are loaded under the clock."""


def write_documents(path: Path, megabytes: float) -> None:
    """JSON lines of text: words by Zipf's law, lengths log-normal, some hundred words each."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(draw.choice(letters, n)) for n in draw.integers(2, 10, 20_000)]
    written = 0
    with path.open("w") as file:
        while written < megabytes * 1e6:
            count = int(np.clip(draw.lognormal(5.5, 1.0), 5, 5000))
            text = " ".join(words[i] for i in draw.zipf(1.3, count) % len(words))
            written += file.write(json.dumps({"text": text}) + "\n")


def timed(name: str, work: Callable[[], Any], measured: dict[str, float]) -> Any:
    start = time.perf_counter()
    result = work()
    measured[name] = time.perf_counter() - start
    return result


def jaxstages(documents: Path, tokenizer: Path, folder: Path, result: dict[str, Any]) -> None:
    from jaxstages.config import DataConfig
    from jaxstages.data.batches import batches_by_step
    from jaxstages.data.prepare import prepare
    from jaxstages.data.sources import open_source
    from jaxstages.data.tokenizer import load_tokenizer

    config, loaded = DataConfig(task="lm", train=(str(documents),)), load_tokenizer(tokenizer)
    rows = timed(
        "prepare",
        lambda: prepare(open_source(str(documents), folder), "train", config, loaded, CONTEXT, folder),
        result,
    )
    batch = batches_by_step([rows], batch_size=BATCH, seed=0).batch
    batch(0)
    timed("load", lambda: [batch(k) for k in range(1, BATCHES + 1)], result)
    result |= {"tokens": rows.index["tokens"], "slots_used": rows.index["tokens"] / (rows.index["rows"] * CONTEXT)}


def encoder(tokenizer: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer))


def datasets(documents: Path, tokenizer: Path, folder: Path, result: dict[str, Any]) -> None:
    import torch
    from datasets import load_dataset
    from transformers import default_data_collator

    backend, end = encoder(tokenizer), 0
    columns = ("input_ids", "attention_mask", "labels")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [[end, *entry.ids] for entry in backend.encode_batch_fast(batch["text"], add_special_tokens=False)]
        return {"input_ids": ids, "attention_mask": [[1] * len(entry) for entry in ids]}

    def join(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        lines = {name: [i for entry in batch[name] for i in entry] for name in columns[:2]}
        starts = range(0, len(lines["input_ids"]) // CONTEXT * CONTEXT, CONTEXT)
        rows = {name: [line[start : start + CONTEXT] for start in starts] for name, line in lines.items()}
        return {**rows, "labels": [list(row) for row in rows["input_ids"]]}

    def prepare() -> Any:
        data = load_dataset("json", data_files=str(documents), split="train", cache_dir=str(folder))
        cores = os.cpu_count()
        data = data.map(tokenize, batched=True, num_proc=cores, remove_columns=["text"])
        return data.map(join, batched=True, num_proc=cores)

    data = timed("prepare", prepare, result)
    result["tokens"] = len(data) * CONTEXT
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=default_data_collator)
    batches = iter(loader)
    next(batches)
    timed("load", lambda: [next(batches) for _ in range(BATCHES)], result)


def nanogpt(documents: Path, tokenizer: Path, folder: Path, result: dict[str, Any]) -> None:
    import torch
    from datasets import load_dataset

    backend, end = encoder(tokenizer), 0

    def process(example: dict[str, str]) -> dict[str, Any]:
        ids = [*backend.encode(example["text"], add_special_tokens=False).ids, end]
        return {"ids": ids, "len": len(ids)}

    def prepare() -> int:
        data = load_dataset("json", data_files=str(documents), split="train", cache_dir=str(folder))
        data = data.map(process, remove_columns=["text"], num_proc=os.cpu_count())
        line = np.memmap(folder / "train.bin", np.uint16, "w+", shape=(int(np.sum(data["len"], dtype=np.uint64)),))
        start = 0
        for n in range(1024):
            piece = data.shard(num_shards=1024, index=n, contiguous=True).with_format("numpy")
            ids = np.concatenate(piece["ids"])
            line[start : start + len(ids)] = ids
            start += len(ids)
        line.flush()
        return start

    result["tokens"] = timed("prepare", prepare, result)

    def get_batch() -> Any:
        line = np.memmap(folder / "train.bin", np.uint16, "r")
        places = torch.randint(len(line) - CONTEXT, (BATCH,))
        inputs = torch.stack([torch.from_numpy(line[i : i + CONTEXT].astype(np.int64)) for i in places])
        targets = torch.stack([torch.from_numpy(line[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in places])
        return inputs, targets

    get_batch()
    timed("load", lambda: [get_batch() for _ in range(BATCHES)], result)


CONTENDERS = {function.__name__: function for function in (jaxstages, datasets, nanogpt)}


def start(name: str, documents: Path, tokenizer: Path) -> dict[str, Any]:
    """Figures of one contender in a fresh process."""
    folder = Path(tempfile.mkdtemp(dir=documents.parent))
    command = [sys.executable, str(HERE / "data_path.py"), f"--child={name}"]
    command += [f"--documents={documents}", f"--tokenizer={tokenizer}", f"--folder={folder}"]
    environment = {**os.environ, "HF_HOME": str(folder), "HF_DATASETS_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    shutil.rmtree(folder)
    if process.returncode:
        raise SystemExit(f"{name}: {process.stderr}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    parser.add_argument("--busy", action="store_true", help="do not wait until the machine is idle")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    for name in ("child", "documents", "tokenizer"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        results: dict[str, Any] = {}
        CONTENDERS[flags.child](Path(flags.documents), Path(flags.tokenizer), flags.folder, results)
        results["prepare tokens/s"] = results["tokens"] / results["prepare"]
        results["load tokens/s"] = BATCHES * BATCH * CONTEXT / results["load"]
        print(json.dumps(results))
        return
    from jaxstages.config import TokenizerConfig
    from jaxstages.data.train_tokenizer import make_tokenizer

    machine, folder = facts(), Path(tempfile.mkdtemp(dir=flags.folder))
    documents, tokenizer = folder / "documents.jsonl", folder / "tokenizer.json"
    write_documents(documents, flags.megabytes)
    with documents.open() as file:
        texts = (json.loads(line)["text"] for _, line in zip(range(5000), file, strict=False))
        make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=flags.vocab), texts, tokenizer)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    busy = []
    for number in range(flags.rounds):
        for name in [*CONTENDERS][:: -1 if number % 2 else 1]:
            busy.append(round(busy_share() if flags.busy else wait_until_idle(), 3))
            runs[name].append(start(name, documents, tokenizer))
            speeds = ", ".join(f"{what} {runs[name][-1][what]:,.0f}" for what in ("prepare tokens/s", "load tokens/s"))
            print(f"round {number} {name}: {speeds}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    ratios = {
        f"{what}, jaxstages / {name}, min median max": spread(
            [ours[what] / theirs[what] for ours, theirs in zip(runs["jaxstages"], runs[name], strict=True)]
        )
        for what in ("prepare tokens/s", "load tokens/s")
        for name in runs
        if name != "jaxstages"
    }
    result = {
        "command": f"python benchmarks/data_path.py --megabytes={flags.megabytes:g} --rounds={flags.rounds}",
        "machine": machine,
        "busy_before": busy,
        **ratios,
        "slots used": runs["jaxstages"][0]["slots_used"],
        "runs": runs,
    }
    keep(flags.out / "data.json", result)


if __name__ == "__main__":
    main()
