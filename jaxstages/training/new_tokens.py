"""Tokens that an import has added: can the stage that needs them learn them?

Their rows begin as the mean of the others. In a frozen embedding they stay equal, so that <|user|> and <|assistant|>
are one token to the model; in a frozen head they are never the likeliest, so that no answer ends.
"""

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxstages.config import StageConfig
from jaxstages.data.tokenizer import Tokenizer, needed_tokens
from jaxstages.types import Params

TABLES = ("embedding", "head")
"""Parameters that have a row for each token."""


@jax.jit
def untrained_rows(table_VD: Float[Array, "V D"]) -> Int[Array, ""]:
    """How many rows at the end of a table are still equal, and the mean of those before them."""
    last_D = table_VD[-1]
    equal_V = jnp.all(table_VD == last_D[None], axis=1)
    count = jnp.sum(jnp.cumprod(equal_V[::-1].astype(table_VD.dtype)))
    mean_D = (jnp.sum(table_VD, axis=0) - count * last_D) / (table_VD.shape[0] - count)
    return jnp.where(jnp.allclose(mean_D, last_D, rtol=1e-3, atol=1e-5), count, 0.0).astype(jnp.int32)


def frozen_tables(stage: StageConfig, params: Params) -> list[str]:
    """The tables that a stage does not train."""
    patterns = stage.lora.targets if stage.lora.rank else stage.optim.freeze
    matched = {name for name in TABLES if any(re.search(pattern, name) for pattern in patterns)}
    return [name for name in TABLES if name in params and (name in matched) != bool(stage.lora.rank)]


def check_new_tokens(name: str, stage: StageConfig, tokenizer: Tokenizer, params: Params) -> None:
    """Raises ValueError where a stage needs tokens that nothing has trained yet, and would not train them.

    Args:
        params: of its parent.
    """
    frozen, size = frozen_tables(stage, params), tokenizer.vocab_size
    first = min((size - int(untrained_rows(params[table])) for table in frozen), default=size)
    tasks = {stage.data.task, *(part.data.task for part in stage.mixture.values())}
    needed = needed_tokens(tasks, template=bool(tokenizer.template))
    ids = {token: tokenizer.backend.token_to_id(token) for token in needed}
    ids[tokenizer.show([tokenizer.specials.end_of_text])] = tokenizer.specials.end_of_text
    new = [token for token, i in ids.items() if i is not None and i >= first]
    if not new:
        return
    if stage.lora.rank:
        remedy = f"add {', '.join(map(repr, frozen))} to config.{name}.lora.targets, or train in full"
    else:
        remedy = f"take {', '.join(frozen)} out of config.{name}.optim.freeze"
    raise ValueError(f"{name} needs {' '.join(new)}, new to this model, and does not train their rows; {remedy}")
