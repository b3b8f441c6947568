"""Small things that many tests use: a batch, a model, a recipe with its data."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxstages.config import (
    AttentionConfig,
    DataConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ScheduleConfig,
    StageConfig,
    TokenizerConfig,
)
from jaxstages.data.packing import lay_out
from jaxstages.data.pipeline import to_batch
from jaxstages.data.tasks import Example
from jaxstages.types import Batch

VOCAB = 29


def model_config(**changes: object) -> ModelConfig:
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8)
    return ModelConfig(**({"context": 16, "layers": 2, "width": 16, "ff_width": 32, "attention": attention} | changes))


def example(length: int, seed: int, masked: int = 1) -> Example:
    ids = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)
    return Example(ids, (np.arange(length) >= masked).astype(np.float32))


def packed_batch(rows: list[list[Example]], length: int = 16) -> Batch:
    return Batch(*map(jnp.asarray, to_batch([lay_out(row, length) for row in rows])))


def mixed_batch(rows: int = 8) -> Batch:
    """Rows of two examples with different masks, and some padding."""
    return packed_batch([[example(5 + r % 3, r, 1 + r % 2), example(6, 100 + r, 2)] for r in range(rows)])


PEOPLE, THINGS = ("Ann", "Bob", "Cid", "Dan", "Eve"), ("red", "blue", "green", "grey", "black", "white")


def write_data(folder: Path) -> None:
    """Text, pairs and chats about who likes which colour, as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = [(p, t) for p in PEOPLE for t in THINGS]
    text = [{"text": f"{p} likes {t}. {t} is a colour. {p} is a person."} for p, t in facts] * 3
    pairs = [{"prompt": f"{p} likes {t}", "target": f"{t} {p}"} for p, t in facts]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"say {t}"},
                {"role": "assistant", "content": t},
                {"role": "user", "content": f"and {p}"},
                {"role": "assistant", "content": p},
            ],
            "kind": "say",
        }
        for p, t in facts
    ]
    for name, records in {"text": text, "pairs": pairs, "chats": chats}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def recipe(folder: Path, steps: int = 6) -> Recipe:
    """Three tiny stages on the data of `write_data`, a few seconds in all."""

    def stage(name: str, task: str, **evaluation: object) -> StageConfig:
        return StageConfig(
            data=DataConfig(task=task, train=(str(folder / f"{name}.jsonl"),), holdout=0.2),
            optim=OptimConfig(schedule=ScheduleConfig(peak_lr=3e-3, warmup_steps=2)),
            loop=LoopConfig(steps=steps, batch_size=8, eval_every=3, save_every=2, log_every=2),
            evaluation=EvaluationConfig(batch_size=8, max_new_tokens=8, **evaluation),
        )

    return Recipe(
        name="tiny",
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=300),
        model=model_config(context=64),
        pretrain=stage("text", "lm"),
        finetune=stage("pairs", "seq2seq", metrics=("bleu", "chrf")),
        instruct=stage("chats", "chat", metrics=("exact_match",)),
        prompts=("say red",),
    )


__all__ = ["EarlyStoppingConfig", "example", "mixed_batch", "model_config", "packed_batch", "recipe", "write_data"]
