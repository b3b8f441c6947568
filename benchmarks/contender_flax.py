"""Plain Flax and optax: the model and step as their documentation has them, jitted with the state donated.

python benchmarks/contender_flax.py --row=C1 --weights=FILE --tokens=FILE --steps=300 --warmup=3
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from contender import Recorder, contender_flags, print_check
from jax_result import grad_norm, print_jax_result
from rows import Row
from safetensors.numpy import load_file
from tokens import Batches
from weights import count_params


class Block(nn.Module):
    row: Row

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, dtype = self.row, jnp.dtype(self.row.dtype)
        h = nn.LayerNorm(row.norm_eps, use_bias=False, name="ln_1")(x)
        query, key, value = jnp.split(
            nn.Dense(3 * row.width, use_bias=False, dtype=dtype, name="c_attn")(h), 3, axis=-1
        )
        heads = (*x.shape[:2], row.heads, row.width // row.heads)
        mixed = jax.nn.dot_product_attention(
            query.reshape(heads), key.reshape(heads), value.reshape(heads), is_causal=True
        )
        x = x + nn.Dense(row.width, use_bias=False, dtype=dtype, name="attn_proj")(mixed.reshape(x.shape))
        h = nn.LayerNorm(row.norm_eps, use_bias=False, name="ln_2")(x)
        h = nn.gelu(nn.Dense(4 * row.width, use_bias=False, dtype=dtype, name="c_fc")(h), approximate=False)
        return x + nn.Dense(row.width, use_bias=False, dtype=dtype, name="mlp_proj")(h)


class GPT2(nn.Module):
    row: Row

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        row, dtype = self.row, jnp.dtype(self.row.dtype)
        wte = nn.Embed(row.vocab, row.width, dtype=dtype, name="wte")
        wpe = nn.Embed(row.context, row.width, dtype=dtype, name="wpe")
        x = wte(tokens) + wpe(jnp.arange(tokens.shape[1]))[None]
        for n in range(row.layers):
            x = Block(row, name=f"h{n}")(x)
        return wte.attend(nn.LayerNorm(row.norm_eps, use_bias=False, name="ln_f")(x))


def from_gpt2(tensors: dict[str, np.ndarray], row: Row) -> Any:
    """GPT-2's tensors as Flax's parameters."""
    params: Any = {name: {"embedding": tensors[f"transformer.{name}.weight"]} for name in ("wte", "wpe")}
    params["ln_f"] = {"scale": tensors["transformer.ln_f.weight"]}
    maps = {"c_attn": "attn.c_attn", "attn_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
    for n in range(row.layers):
        own = {name: tensors[f"transformer.h.{n}.{theirs}.weight"].T for name, theirs in maps.items()}
        scales = {name: {"scale": tensors[f"transformer.h.{n}.{name}.weight"]} for name in ("ln_1", "ln_2")}
        params[f"h{n}"] = scales | {name: {"kernel": kernel} for name, kernel in own.items()}
    return jax.tree.map(jnp.array, params)


def main() -> None:
    flags = contender_flags(__doc__).parse_args()
    row: Row = flags.row
    model, params = GPT2(row), from_gpt2(load_file(flags.weights), row)
    parameters = count_params(params)
    tx = optax.chain(
        optax.clip_by_global_norm(row.clip_norm),
        optax.adamw(
            row.learning_rate,
            row.beta1,
            row.beta2,
            weight_decay=row.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )

    def loss_of(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def train_step(params: Any, opt_state: Any, tokens: jax.Array, targets: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, tokens, targets)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    batches = Batches(flags.tokens, row)

    def batch(k: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, targets = batches[k]
        return tokens.astype(np.int32), targets.astype(np.int32)

    if flags.check:
        loss, grads = jax.jit(jax.value_and_grad(loss_of))(params, *batch(0))
        print_check(parameters, float(loss), grad_norm(grads))
        return
    step, opt_state = jax.jit(train_step, donate_argnums=(0, 1)), tx.init(params)
    recorder = Recorder(flags.warmup, flags.steps, lambda: jax.block_until_ready(params))
    recorder.begin()
    for k in range(recorder.total):
        params, opt_state, loss = step(params, opt_state, *batch(k))
        recorder.step_done(loss)
    print_jax_result(row, recorder, parameters, ("optax", "flax"))


if __name__ == "__main__":
    main()
