"""How much of its earlier text does an imported model forget, with and without an anchor?

    python benchmarks/anchor.py --text=TEXT.jsonl --chats=CHATS.jsonl --tokenizer=DIR --out=runs/anchor [--seeds=0,1,2]
        [--weights=0,0.3,1,3]

TEXT has {"text"} a line, CHATS {"messages"}. A small Llama is trained by transformers on the first nine tenths of each
text, and written as a Hugging Face folder with the tokenizer of DIR. It is then imported and instruct-tuned on the
chats (`anchor_recipe.py`), without an anchor and with several weights. Its own text is no longer trained on, only
measured, on the last tenths.

Prints the held-out loss of the text before and after, and that of the chats, as means and standard deviations over
seeds. A trial that is finished is not run again.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTEXT, STEPS = 128, 1500
"""Tokens in a row, and steps of 16 rows that the imported model is trained for."""


def split(text: Path, out: Path) -> tuple[Path, Path]:
    """Training and held-out text: of each document the first nine tenths, and the rest."""
    parts = out / "train.jsonl", out / "valid.jsonl"
    documents = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    for file, cut in zip(parts, (slice(0, 9), slice(9, 10)), strict=True):
        pieces = [document[len(document) * cut.start // 10 : len(document) * cut.stop // 10] for document in documents]
        file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
    return parts


def make_model(train: Path, tokenizer_dir: Path, folder: Path) -> None:
    """Train a Llama of about a million parameters with transformers, and save it."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = json.loads((folder / "tokenizer_config.json").read_text())["bos_token"]
    begin_id = tokenizer.token_to_id(begin if isinstance(begin, str) else begin["content"])
    ids: list[int] = []
    for line in train.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        for start in range(0, len(text), 2000):  # each piece is a text of its own, with its begin token
            ids += [begin_id, *tokenizer.encode(text[start : start + 2000], add_special_tokens=False).ids]
    tokens = torch.tensor(ids)
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.05)
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - CONTEXT, (16,))
        rows = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == STEPS - 1:
            print(f"transformers: step {step}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)


def trial(config: list[str], workdir: Path, weight: float, seed: int) -> dict[str, float]:
    """Loss of the old text at the start and at the end, and of the chats at the end."""
    result = workdir / "instruct" / "result.json"
    if not result.exists():
        flags = [*config, f"--config.seed={seed}", f"--config.instruct.anchor.weight={weight}"]
        command = [sys.executable, "-m", "jaxstages", "instruct", f"--workdir={workdir}", *flags]
        with (workdir.parent / f"{workdir.name}.log").open("w") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    lines = [json.loads(line) for line in (workdir / "instruct" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    last = evaluations[-1]
    return {"start": evaluations[0]["old/loss"], "old": last["old/loss"], "chats": last["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("text", "chats", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--weights", default="0,0.3,1,3", help="of the anchor; the first is compared with")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    train, valid = split(options.text, out)
    model = out / "model"
    if not (model / "model.safetensors").exists():
        make_model(train, options.tokenizer, model)
    config = [f"--config=benchmarks/anchor_recipe.py:{model}"]
    config += [f"--config.instruct.data.train={(str(options.chats.resolve()),)!r}"]
    config += [f"--config.instruct.mixture.old.data.train={(str(train),)!r}"]
    config += [f"--config.instruct.mixture.old.data.validation={(str(valid),)!r}"]
    rows, seeds = [], [int(seed) for seed in options.seeds.split(",")]
    for weight in map(float, options.weights.split(",")):
        trials = [trial(config, out / f"weight{weight:g}-{seed}", weight, seed) for seed in seeds]
        forgot = [each["old"] - each["start"] for each in trials]
        chats = [each["chats"] for each in trials]
        rows.append({"weight": weight, "start": trials[0]["start"], "forgot": forgot, "chats": chats})
        less = 1 - statistics.mean(forgot) / statistics.mean(rows[0]["forgot"])
        worse = statistics.mean(chats) / statistics.mean(rows[0]["chats"]) - 1
        spread = [statistics.stdev(values) if len(values) > 1 else float("nan") for values in (forgot, chats)]
        print(
            f"anchor {weight:g}: text {trials[0]['start']:.3f} nats, forgot {statistics.mean(forgot):.3f} "
            f"± {spread[0]:.3f} ({less:.0%} less); chats {statistics.mean(chats):.3f} ± {spread[1]:.3f} ({worse:+.1%})",
            flush=True,
        )
        (out / "anchor.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
