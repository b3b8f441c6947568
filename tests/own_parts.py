"""A recipe of a user's own, as `docs/extending.md` describes it: every part is defined in this one file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from jaxstages.config import (
    DataConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    LoopConfig,
    OptimConfig,
    Recipe,
    ScheduleConfig,
    StageConfig,
    TokenizerConfig,
)
from jaxstages.data.tasks import Encoded, Example, Question
from jaxstages.models.adapters import linen_model, nnx_model
from jaxstages.types import Batch, HiddenAndHead, Model, Params, Sums


def causal_mean(x_BLD: Array, batch: Batch) -> Array:
    """The mean of a document so far: a token mixer without attention."""
    same = batch.segments_BL[:, :, None] == batch.segments_BL[:, None, :]
    mask_BLL = (same & jnp.tri(x_BLD.shape[1], dtype=bool)[None]).astype(x_BLD.dtype)
    return mask_BLL @ x_BLD / jnp.maximum(jnp.sum(mask_BLL, axis=-1, keepdims=True), 1.0)


class MeanLM(nn.Module):
    vocab: int
    width: int

    @nn.compact
    def __call__(self, batch: Batch, train: bool) -> Array:
        x_BLD = nn.Embed(self.vocab, self.width)(batch.tokens_BL)
        x_BLD = x_BLD + nn.Dense(self.width)(causal_mean(x_BLD, batch))
        x_BLD = nn.Dropout(0.1, deterministic=not train)(nn.gelu(x_BLD))
        return nn.Dense(self.vocab)(x_BLD)


class NnxMeanLM(nnx.Module):
    def __init__(self, vocab: int, width: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.mix = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, batch: Batch, train: bool) -> Array:
        x_BLD = self.embed(batch.tokens_BL)
        for mix in self.mix:
            x_BLD = x_BLD + nnx.gelu(mix(causal_mean(x_BLD, batch)))
        return self.head(x_BLD)


@dataclass(kw_only=True, slots=True)
class Mean:
    """The model of the recipe: a Linen module, or an NNX one."""

    context: int = 48
    width: int = 16
    nnx: bool = False

    def make(self, vocab_size: int) -> Model:
        if self.nnx:
            return nnx_model(lambda rngs: NnxMeanLM(vocab_size, self.width, rngs))
        return linen_model(MeanLM(vocab_size, self.width))


def focal(model: Model, params: Params, batch: Batch, dropout_key: Array | None) -> Sums:
    """Focal loss (Lin et al. 2017): easy tokens count less."""
    output = model.outputs(params, batch, dropout_key)
    logits_BLV = output.logits() if isinstance(output, HiddenAndHead) else output
    log_probs_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32))
    log_prob_BL = jnp.take_along_axis(log_probs_BLV, batch.targets_BL[:, :, None], axis=-1)[:, :, 0]
    focal_BL = -((1.0 - jnp.exp(log_prob_BL)) ** 2) * log_prob_BL
    return {
        "objective": jnp.sum(focal_BL * batch.weights_BL),
        "weight": jnp.sum(batch.weights_BL),
        "nll": -jnp.sum(log_prob_BL * batch.weights_BL),
    }


def first_letter(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that begin as the reference does, in percent."""
    hits = [p[:1] == r[:1] for p, r in zip(predictions, references, strict=True)]
    return 100.0 * sum(hits) / len(hits)


WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty")


def words() -> Iterator[dict[str, str]]:
    """Records made here: pairs of words."""
    for word in WORDS:
        for other in WORDS:
            yield {"word": f"{word} {other}"}


@dataclass(kw_only=True, slots=True)
class Reverse:
    """A task: write the words in the other order."""

    field: str = "word"

    def texts(self, record: dict[str, Any]) -> list[str]:
        return [record[self.field]]

    def make(self, tokenizer: Any, context: int) -> Callable[[dict[str, Any]], Encoded]:
        end = tokenizer.specials.end_of_text

        def encode(record: dict[str, Any]) -> Encoded:
            answer = " ".join(reversed(record[self.field].split()))
            question, target = tokenizer.encode_batch([record[self.field] + " ", answer])
            prompt = [end, *question.tolist()]
            ids = np.asarray([*prompt, *target.tolist(), end], np.int32)
            weights = (np.arange(len(ids)) >= len(prompt)).astype(np.float32)
            examples = [Example(ids, weights)] if len(ids) <= context + 1 else []
            return Encoded(examples, Question(prompt, answer, ""), 0)

        return encode


@dataclass(kw_only=True, slots=True)
class SignSgd:
    """An optimizer: the sign of the momentum (Bernstein et al. 2018)."""

    momentum: float = 0.9

    def make(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            optax.trace(self.momentum),
            optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates)),
            optax.scale_by_learning_rate(schedule),
        )


def halving(steps: int) -> optax.Schedule:
    """A schedule: half the learning rate in the second half."""
    return optax.piecewise_constant_schedule(3e-3, {steps // 2: 0.5})


def _stage(steps: int, metrics: tuple[Any, ...] = (), own_task: bool = False) -> StageConfig:
    data = DataConfig(task="own", own=Reverse()) if own_task else DataConfig(task="lm", text="{word}")
    data.train, data.holdout = (words,), 0.2
    return StageConfig(
        data=data,
        loss=focal,
        optim=OptimConfig(
            name="own", own=SignSgd(), schedule=ScheduleConfig(name="own", own=halving), no_decay=(), weight_decay=0.0
        ),
        loop=LoopConfig(steps=steps, batch_size=16, eval_every=3, save_every=2, log_every=2, accumulate=2),
        evaluation=EvaluationConfig(batch_size=8, max_new_tokens=8, metrics=metrics),
        early_stopping=EarlyStoppingConfig(metric="loss"),
    )


def get_config(variant: str = "") -> Recipe:
    """Variants: "" Linen; "nnx"."""
    return Recipe(
        name="own",
        tokenizer=TokenizerConfig(kind="characters"),
        model=Mean(nnx=variant == "nnx"),
        pretrain=_stage(6),
        finetune=_stage(6, (first_letter, "exact_match"), own_task=True),
        extra_stages={"polish": _stage(4, own_task=True)},
        prompts=("amber birch ",),
    )
