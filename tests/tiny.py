"""Small things that many tests use: a batch, a model, a recipe with its data."""

import json
import struct
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
from jaxstages.data.batches import to_batch
from jaxstages.data.packing import lay_out
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


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """Fields by number, as protocol buffers are written."""
    written = b""
    for number, value in fields:
        match value:
            case int():
                written += _varint(number * 8) + _varint(value)
            case float():
                written += _varint(number * 8 + 5) + struct.pack("<f", value)
            case bytes():
                written += _varint(number * 8 + 2) + _varint(len(value)) + value
    return written


def sentencepiece_model(
    kind: int, trainer: dict[int, int] | None = None, normal: dict[int, int] | None = None
) -> bytes:
    """A small `.model`: letters, one word, three control pieces, one that is always whole, a byte; numbers of fields as
    in sentencepiece_model.proto."""
    pieces: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<word>", 0.0, 4)]
    pieces += [("<0x0A>", 0.0, 6), ("\u2581a", -1.0, 1), ("b", -2.0, 1), ("a", -3.0, 1), ("\u2581", -4.0, 1)]
    pieces += [(letter, -5.0, 1) for letter in "<>s0xA"]
    content = [_message((1, text.encode()), (2, score), (3, of)) for text, score, of in pieces]
    trainer_spec = _message((3, kind), *(trainer or {}).items())
    return _message(*((1, piece) for piece in content), (2, trainer_spec), (3, _message(*(normal or {}).items())))
