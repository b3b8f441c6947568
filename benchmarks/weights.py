"""A row's model in jaxstages, and its weights under GPT-2's names, as nanoGPT's state dict has them.

    python benchmarks/weights.py --row=C1 --out=benchmarks/work/C1.safetensors

jaxstages draws the weights once; every contender reads this file.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rows import ROWS, Row
from safetensors.numpy import save_file

from jaxstages.config import AttentionConfig, LoraConfig, ModelConfig
from jaxstages.models import lora
from jaxstages.models.transformer import make_model

Params = dict[str, Any]


def model_config(row: Row) -> ModelConfig:
    """The row's architecture as jaxstages' recipe says it."""
    return ModelConfig(
        context=row.context,
        layers=row.layers,
        width=row.width,
        ff_width=4 * row.width,
        attention=AttentionConfig(
            heads=row.heads, kv_heads=row.heads, head_dim=row.width // row.heads, position="learned"
        ),
        norm="layernorm",
        norm_eps=row.norm_eps,
        activation="gelu_erf",
        dtype=row.dtype,
        unroll=True,  # what a loop keeps for its backward pass it copies into stacks
    )


def count_params(params: Params) -> int:
    """Embeddings included."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def to_gpt2(params: Params) -> dict[str, np.ndarray]:
    """jaxstages' parameters as GPT-2's tensors. A linear map is [outputs, inputs], as in torch; query, key and value
    are one."""
    params = jax.tree.map(np.asarray, params)
    layers, width = params["layers"], params["embedding"].shape[1]
    tensors = {
        "transformer.wte.weight": params["embedding"],
        "transformer.wpe.weight": params["position_embedding"],
        "transformer.ln_f.weight": params["final_norm"]["scale"],
    }
    for n in range(len(layers["ff_norm"]["scale"])):
        layer: Params = jax.tree.map(lambda leaf, n=n: leaf[n], layers)
        attention, ff = layer["attention"], layer["ff"]
        inputs = [attention[name]["kernel"].reshape(width, -1) for name in ("query", "key", "value")]
        tensors |= {
            f"transformer.h.{n}.ln_1.weight": layer["attention_norm"]["scale"],
            f"transformer.h.{n}.attn.c_attn.weight": np.concatenate(inputs, axis=1).T,
            f"transformer.h.{n}.attn.c_proj.weight": attention["out"]["kernel"].reshape(-1, width).T,
            f"transformer.h.{n}.ln_2.weight": layer["ff_norm"]["scale"],
            f"transformer.h.{n}.mlp.c_fc.weight": ff["up"]["kernel"].T,
            f"transformer.h.{n}.mlp.c_proj.weight": ff["down"]["kernel"].T,
        }
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def from_gpt2(tensors: dict[str, np.ndarray], row: Row) -> Params:
    """The inverse of `to_gpt2`."""
    width, heads = row.width, (row.heads, row.width // row.heads)

    def stacked(name: str) -> np.ndarray:
        return np.stack([tensors[f"transformer.h.{n}.{name}.weight"] for n in range(row.layers)])

    inputs = stacked("attn.c_attn").swapaxes(1, 2).reshape(row.layers, width, 3, *heads)
    return {
        "embedding": tensors["transformer.wte.weight"],
        "position_embedding": tensors["transformer.wpe.weight"],
        "final_norm": {"scale": tensors["transformer.ln_f.weight"]},
        "layers": {
            "attention_norm": {"scale": stacked("ln_1")},
            "attention": {
                **{name: {"kernel": inputs[:, :, i]} for i, name in enumerate(("query", "key", "value"))},
                "out": {"kernel": stacked("attn.c_proj").swapaxes(1, 2).reshape(row.layers, *heads, width)},
            },
            "ff_norm": {"scale": stacked("ln_2")},
            "ff": {
                "up": {"kernel": stacked("mlp.c_fc").swapaxes(1, 2)},
                "down": {"kernel": stacked("mlp.c_proj").swapaxes(1, 2)},
            },
        },
    }


def lora_config(row: Row) -> LoraConfig:
    """The row's adapters as jaxstages' recipe says it; their product is multiplied by 1."""
    return LoraConfig(rank=row.rank, alpha=float(row.rank), targets=("attention/out/kernel", "ff/"))


PEFT = {"attention": {"out": "attn.c_proj"}, "ff": {"up": "mlp.c_fc", "down": "mlp.c_proj"}}
"""Our linear maps that are adapted -> GPT-2's."""


def to_peft(adapters: Params, row: Row) -> dict[str, np.ndarray]:
    """jaxstages' adapters under PEFT's names, each [outputs, inputs]; those of the base do not begin with `lora`."""
    return {
        f"lora.h.{n}.{name}.{theirs}.weight": np.asarray(adapters["layers"][block][ours][leaf][n]).T.copy()
        for block, maps in PEFT.items()
        for ours, name in maps.items()
        for leaf, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B"))
        for n in range(row.layers)
    }


def from_peft(tensors: dict[str, np.ndarray], row: Row) -> Params:
    """The inverse of `to_peft`."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([tensors[f"lora.h.{n}.{name}.weight"].T for n in range(row.layers)])

    return {
        "layers": {
            block: {
                ours: {"lora_a": stacked(f"{name}.lora_A"), "lora_b": stacked(f"{name}.lora_B")}
                for ours, name in maps.items()
            }
            for block, maps in PEFT.items()
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    row = ROWS[flags.row]
    model = make_model(model_config(row), row.vocab)
    params = model.init(jax.random.key(flags.seed))
    tensors = to_gpt2(params)
    again = from_gpt2(tensors, row)
    if not jax.tree.all(jax.tree.map(np.array_equal, params, again)):
        raise SystemExit("the way to GPT-2's names and back changes the weights: jaxstages' parameters have moved on")
    if row.rank:
        adapters = lora.init(jax.random.key(flags.seed + 1), params, model.axes, lora_config(row))
        tensors |= to_peft(adapters, row)
        if not jax.tree.all(jax.tree.map(np.array_equal, adapters, from_peft(tensors, row))):
            raise SystemExit("the way to PEFT's names and back changes the adapters: jaxstages' have moved on")
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, flags.out)
    print(f"{row.name}: {count_params(params):,} parameters")


if __name__ == "__main__":
    main()
