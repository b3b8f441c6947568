"""The recipe of benchmarks/anchor.py: instruct-tune an imported model, and measure text that it knew before."""

from jaxstages.config import (
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ScheduleConfig,
    StageConfig,
    TokenizerConfig,
)


def get_config(variant: str = "") -> Recipe:
    """Args: variant: the folder of the model to import."""
    return Recipe(
        name="anchor",
        model=ModelConfig(context=128),
        tokenizer=TokenizerConfig(kind="file", path=f"{variant}/tokenizer.json"),
        instruct=StageConfig(
            data=DataConfig(task="chat", train=("chats.jsonl",), holdout=0.1),
            # With a share of 0 the old text is measured, and not trained on.
            mixture={"old": DatasetConfig(data=DataConfig(train=("a.jsonl",), validation=("b.jsonl",)), share=(0.0,))},
            optim=OptimConfig(schedule=ScheduleConfig(peak_lr=1e-3, warmup_steps=50), weight_decay=0.0),
            loop=LoopConfig(steps=600, batch_size=16, eval_every=150, save_every=600),
            evaluation=EvaluationConfig(max_rows=256),
            init_from=f"hf:{variant}",
        ),
    )
