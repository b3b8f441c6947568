"""What `plan` says a step takes in memory, beside what it takes: on eight devices of one CPU, each recipe in a process
of its own.

    python benchmarks/plan_memory.py

The measured figure is the process's largest resident size from the first step on, less what it was before there was a
state: buffers of all eight devices, and what the runtime takes for itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

RECIPES = {
    "data 2 x fsdp 4": {
        "width": 768,
        "ff_width": 3072,
        "layers": 6,
        "context": 256,
        "batch": 16,
        "fsdp": 4,
        "tensor": 1,
    },
    "fsdp 4 x tensor 2, remat": {
        **{"width": 1024, "ff_width": 4096, "layers": 6, "context": 512, "batch": 8, "fsdp": 4, "tensor": 2},
        "remat": "full",
    },
}


def measure(sizes: dict) -> tuple[int, int]:
    """Bytes of all devices, predicted and measured."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxstages.cli.plan import make_plan
    from jaxstages.config import (
        AttentionConfig,
        DataConfig,
        EvaluationConfig,
        LoopConfig,
        MeshConfig,
        ModelConfig,
        Recipe,
        StageConfig,
        TokenizerConfig,
    )
    from jaxstages.models.sharding import make_mesh, shardings_of
    from jaxstages.plan.topology import topology_of
    from jaxstages.training.compile import abstract_step_arguments, jit_step
    from jaxstages.training.program import fresh_state, make_program

    width, remat = sizes["width"], sizes.get("remat", "none")
    recipe = Recipe(
        name="memory",
        tokenizer=TokenizerConfig(vocab_size=8192),
        model=ModelConfig(
            context=sizes["context"],
            layers=sizes["layers"],
            width=width,
            ff_width=sizes["ff_width"],
            attention=AttentionConfig(heads=8, kv_heads=8, head_dim=width // 8),
        ),
        mesh=MeshConfig(fsdp=sizes["fsdp"], tensor=sizes["tensor"]),
        pretrain=StageConfig(
            data=DataConfig(train=("none.jsonl",)),
            loop=LoopConfig(batch_size=sizes["batch"], remat=remat),
            evaluation=EvaluationConfig(batch_size=8),
        ),
    )
    assert recipe.pretrain is not None
    predicted = 8 * make_plan(recipe, "pretrain", topology_of("local")).step_bytes
    program = make_program(recipe, "pretrain", recipe.pretrain, make_mesh(recipe.mesh), 8192)
    make = jax.jit(
        lambda key: fresh_state(program.model.init(key), program.tx, program.config.optim),
        out_shardings=shardings_of(program.abstract_state),
    )
    compiled = jit_step(program, remat)[1].lower(*abstract_step_arguments(program)).compile()
    made = make.lower(jax.random.key(0)).compile()
    draw = np.random.default_rng(0)
    values = [draw.integers(0, 8192, (sizes["batch"], sizes["context"])) for _ in range(2)]
    ones = np.ones_like(values[0])
    fields = (*values, ones, ones, np.cumsum(ones, axis=1) - 1)
    _, shapes, *_ = abstract_step_arguments(program)
    batch = type(shapes)(
        *(jax.device_put(jnp.asarray(x, s.dtype), s.sharding) for x, s in zip(fields, shapes, strict=True))
    )
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size counts from here
    state = made(jax.random.key(0))
    for _ in range(3):
        state, sums = compiled(state, batch)
        jax.block_until_ready(sums)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return predicted, peak - before


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
        return
    flags = "--xla_force_host_platform_device_count=8"
    print("| recipe | predicted MB | measured MB | ratio |\n| --- | --- | --- | --- |")
    for name, sizes in RECIPES.items():
        said = subprocess.run(
            [sys.executable, __file__, json.dumps(sizes)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        )
        predicted, measured = json.loads(said.stdout.splitlines()[-1])
        print(f"| {name} | {predicted / 1e6:.0f} | {measured / 1e6:.0f} | {predicted / measured:.3f} |", flush=True)


if __name__ == "__main__":
    main()
