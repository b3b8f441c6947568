"""jaxstages: its model, optimizer and train step, jitted with the state donated.

python benchmarks/contender_jaxstages.py --row=C1 --weights=FILE --tokens=FILE --steps=300 --warmup=3
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contender import Recorder, contender_flags, print_check
from jax_result import grad_norm, print_jax_result
from rows import Row
from safetensors.numpy import load_file
from tokens import Batches
from weights import count_params, from_gpt2, from_peft, lora_config, model_config

from jaxstages.config import OptimConfig, ScheduleConfig
from jaxstages.models import lora
from jaxstages.models.losses import cross_entropy_loss
from jaxstages.models.select import global_norm, limit_memory
from jaxstages.models.transformer import make_model
from jaxstages.runtime.cpu import disable_malloc_trim, freeze_gc_and_trim_heap
from jaxstages.training.optimizer import make_optimizer
from jaxstages.training.step import init_state, make_train_step
from jaxstages.types import Batch, HiddenAndHead, Params, Sums, TrainState


def optim_config(row: Row) -> OptimConfig:
    """The row's optimizer as jaxstages' recipe says it; the embeddings are decayed, as in nanoGPT."""
    return OptimConfig(
        schedule=ScheduleConfig(name="constant", peak_lr=row.learning_rate, warmup_steps=0),
        beta1=row.beta1,
        beta2=row.beta2,
        weight_decay=row.weight_decay,
        clip_norm=row.clip_norm,
        no_decay=("scale",),
    )


def gradient_as_state() -> optax.GradientTransformationExtraArgs:
    """An optimizer that changes nothing and keeps the gradient it was given as its state."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:  # as optax's type has it
        return jax.tree.map(jnp.zeros_like, updates), updates

    return optax.GradientTransformationExtraArgs(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def main() -> None:
    disable_malloc_trim()  # as jaxstages' own command does, before XLA's threads start
    flags = contender_flags(__doc__).parse_args()
    row: Row = flags.row
    model = make_model(model_config(row), row.vocab)
    tx = make_optimizer(optim_config(row), flags.warmup + flags.steps, model.axes)
    if flags.check:
        tx = gradient_as_state()
    tensors = load_file(flags.weights)
    base = jax.tree.map(jnp.array, from_gpt2(tensors, row))
    params = jax.tree.map(jnp.array, from_peft(tensors, row)) if row.rank else base
    parameters = count_params(params)
    state = init_state(params, tx)
    base = base if row.rank else None
    del params, tensors

    def adapted(state: TrainState, batch: Batch, base: Params | None) -> tuple[TrainState, Sums]:
        """As in `jaxstages.training.compile`."""

        def hidden(params: Params, part: Batch, key: Any) -> HiddenAndHead:
            return model.outputs(
                params if base is None else lora.apply_adapters(base, params, lora_config(row)), part, key
            )

        return make_train_step(cross_entropy_loss(hidden), tx, norm=global_norm)(state, batch)

    step = functools.partial(jax.jit(adapted, donate_argnums=0), base=base)
    shape = (row.batch, row.context)
    weights_BL, segments_BL = jnp.ones(shape), jnp.ones(shape, jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(row.context), shape)
    batches = Batches(flags.tokens, row)

    def batch(k: int) -> Batch:
        tokens_BL: Any  # numpy's arrays, which the jitted step takes over
        targets_BL: Any
        tokens_BL, targets_BL = (part.astype(np.int32) for part in batches[k])
        return Batch(tokens_BL, targets_BL, weights_BL, segments_BL, positions_BL)

    if flags.check:
        state, sums = step(state, batch(0))
        print_check(parameters, float(sums["nll"]) / float(sums["weight"]), grad_norm(state.opt_state))
        return
    recorder = Recorder(flags.warmup, flags.steps, lambda: jax.block_until_ready(state))
    recorder.begin()
    step = limit_memory(step, step.func.lower(state, batch(0), base=base).compile(), row.device)
    freeze_gc_and_trim_heap()
    for k in range(recorder.total):
        state, sums = step(state, batch(k))
        recorder.step_done(sums["nll"])
    recorder.losses = [float(nll) / row.tokens_per_step for nll in recorder.losses]
    print_jax_result(row, recorder, parameters, ("jaxstages", "optax", "flax"))


if __name__ == "__main__":
    main()
