"""Language models of 1 to 70 billion parameters on TPU pods and GPUs: the shapes of Llama 3, on your text and chats.

    jaxstages plan --config=configs/scale.py:1b_v5e16    --topology=v5e:4x4      fits? how fast? before you pay
    jaxstages plan --config=configs/scale.py:8b_v5p128   --topology=v5p:4x4x4
    jaxstages plan --config=configs/scale.py:8b_v6e256   --topology=v6e:16x16
    jaxstages plan --config=configs/scale.py:70b_v5p512  --topology=v5p:4x8x8
    jaxstages plan --config=configs/scale.py:8b_8gpu     --topology=h200:8
    jaxstages plan --config=configs/scale.py:8b_lora     --topology=h200:1

    jaxstages run --config=configs/scale.py:8b_v5p128 --workdir=RUN             the same on every host, see launch/

Pretraining reads `data/pretrain/*.jsonl` ({"text"} a line), instruction tuning `data/chats/*.jsonl` ({"messages"} a
line), with the tokenizer in `data/tokenizer.json`. `8b_lora` and `8b_8gpu` start from a folder of Hugging Face's form,
`data/base`.

Expect what `plan` says of each, in docs/plan.md: an estimate. Nothing of this was run at that size.
"""

from typing import NamedTuple

from jaxstages.config import (
    AttentionConfig,
    DataConfig,
    EvaluationConfig,
    LoopConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    RopeScalingConfig,
    ScheduleConfig,
    StageConfig,
    TokenizerConfig,
)


class Size(NamedTuple):
    layers: int
    width: int
    ff_width: int
    heads: int
    head_dim: int
    tied: bool
    peak_lr: float


SIZES = {
    "1b": Size(16, 2048, 8192, 32, 64, True, 4e-4),
    "8b": Size(32, 4096, 14336, 32, 128, False, 3e-4),
    "70b": Size(80, 8192, 28672, 64, 128, False, 1.5e-4),
}


class Place(NamedTuple):
    size: str
    mesh: MeshConfig
    context: int
    batch_size: int
    steps: int
    remat: str = "full"
    accumulate: int = 1


PLACES = {
    "1b_v5e16": Place("1b", MeshConfig(fsdp=16), 4096, 64, 100_000),
    "8b_v5p128": Place("8b", MeshConfig(fsdp=64), 8192, 256, 75_000),
    "8b_v6e256": Place("8b", MeshConfig(fsdp=256), 8192, 512, 40_000),
    "70b_v5p512": Place("70b", MeshConfig(fsdp=256), 4096, 1024, 250_000),
    "8b_8gpu": Place("8b", MeshConfig(fsdp=8), 4096, 64, 2_000),
    "8b_lora": Place("8b", MeshConfig(), 4096, 16, 1_000, accumulate=4),
}


def get_config(variant: str = "") -> Recipe:
    """Variants: the keys of `PLACES`, a size and where it runs; by default the first."""
    variant = variant or next(iter(PLACES))
    if variant not in PLACES:
        raise ValueError(f"configs/scale.py has no variant {variant!r}; known: {', '.join(PLACES)}")
    place = PLACES[variant]
    size = SIZES[place.size]
    model = ModelConfig(
        context=place.context,
        layers=size.layers,
        width=size.width,
        ff_width=size.ff_width,
        attention=AttentionConfig(
            heads=size.heads,
            kv_heads=8,
            head_dim=size.head_dim,
            rope_theta=500_000.0,
            rope_scaling=RopeScalingConfig(kind="llama3", factor=8.0, high_frequency_factor=4.0, trained_context=8192),
        ),
        tied_head=size.tied,
        vocab_size=128_256,
        dtype="bfloat16",
    )
    rows = place.mesh.fsdp if place.mesh.fsdp > 1 else 4
    loop = LoopConfig(
        steps=place.steps,
        batch_size=place.batch_size,
        accumulate=place.accumulate,
        loss_tile=512,
        remat=place.remat,
        eval_every=1000,
        save_every=500,
    )
    schedule = ScheduleConfig(name="cosine", peak_lr=size.peak_lr, warmup_steps=min(2000, place.steps // 20))
    evaluation = EvaluationConfig(batch_size=rows, max_rows=64 * rows)
    instruct = StageConfig(
        data=DataConfig(task="chat", train=("data/chats/*.jsonl",), holdout=0.01),
        optim=OptimConfig(schedule=ScheduleConfig(name="cosine", peak_lr=size.peak_lr / 15, warmup_steps=50)),
        loop=loop,
        evaluation=evaluation,
    )
    recipe = Recipe(
        name=f"scale {variant}",
        tokenizer=TokenizerConfig(kind="file", path="data/tokenizer.json"),
        model=model,
        mesh=place.mesh,
        instruct=instruct,
    )
    if variant == "8b_lora":
        instruct.init_from = "hf:data/base"
        instruct.lora = LoraConfig(rank=16, alpha=32.0, base="bfloat16")
        instruct.optim.schedule.peak_lr = 2e-4
    elif variant == "8b_8gpu":
        instruct.init_from = "hf:data/base"
    else:
        recipe.pretrain = StageConfig(
            data=DataConfig(task="lm", train=("data/pretrain/*.jsonl",), holdout=0.001),
            optim=OptimConfig(schedule=schedule),
            loop=loop,
            evaluation=evaluation,
        )
        instruct.loop = LoopConfig(
            steps=2000,
            batch_size=place.batch_size,
            loss_tile=512,
            remat=place.remat,
            eval_every=200,
            save_every=200,
        )
    return recipe
