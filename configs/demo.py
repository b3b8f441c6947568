"""The embedded small world, all three stages, on a laptop's CPU.

    jaxstages run --config=configs/demo.py --workdir=runs/demo        (or: make demo)

Expect: see the README's stage matrix; five to ten minutes on two cores.
"""

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


def get_config(variant: str = "") -> Recipe:
    """Variants: "" all stages; "control" the fine-tuning alone, from scratch, with the same budget."""
    pretrain = StageConfig(
        data=DataConfig(task="lm", train=("world:text:train",), validation=("world:text:validation",)),
        optim=OptimConfig(schedule=ScheduleConfig(name="wsd", peak_lr=6e-3, warmup_steps=50)),
        loop=LoopConfig(steps=1000, batch_size=4, eval_every=500, save_every=500, log_every=20),
    )
    finetune = StageConfig(
        data=DataConfig(task="seq2seq", train=("world:pairs:train",), validation=("world:pairs:validation",)),
        replay=(("pretrain", 0.15),),
        optim=OptimConfig(schedule=ScheduleConfig(name="cosine", peak_lr=3e-3, warmup_steps=20), weight_decay=0.0),
        loop=LoopConfig(steps=200, batch_size=4, eval_every=100, save_every=200),
        evaluation=EvaluationConfig(metrics=("bleu", "chrf"), max_examples=400, max_new_tokens=40),
        early_stopping=EarlyStoppingConfig(metric="bleu", mode="max"),
    )
    instruct = StageConfig(
        data=DataConfig(task="chat", train=("world:chats:train",), validation=("world:chats:validation",)),
        replay=(("pretrain", 0.16), ("finetune", 0.06)),
        optim=OptimConfig(
            schedule=ScheduleConfig(name="cosine", peak_lr=8e-3, warmup_steps=50, end_factor=0.0), weight_decay=0.0
        ),
        loop=LoopConfig(steps=2900, batch_size=4, eval_every=1450, save_every=1450, log_every=20),
        evaluation=EvaluationConfig(metrics=("exact_match",), max_examples=0, max_new_tokens=40),
        early_stopping=EarlyStoppingConfig(metric="exact_match", mode="max", patience=3),
    )
    recipe = Recipe(
        name="demo",
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=1024),
        model=ModelConfig(
            context=256,
            layers=3,
            width=128,
            ff_width=344,
            activation="swiglu",
            unroll=True,
            attention=AttentionConfig(heads=4, kv_heads=4, head_dim=32, qk_norm=True),
        ),
        pretrain=pretrain,
        finetune=finetune,
        instruct=instruct,
        prompts=(
            "Where does Anna live?",
            "The old cat sleeps in the garden.",
            "What is the opposite of big?",
        ),
    )
    match variant:
        case "":
            return recipe
        case "control":
            recipe.pretrain = recipe.instruct = None
            finetune.init_from, finetune.replay = "scratch", ()
            # The better of the rates tried from scratch (2e-3, 4e-3).
            finetune.optim.schedule.peak_lr = 2e-3
            return recipe
        case _:
            raise ValueError(f'configs/demo.py has no variant {variant!r}; known: "control"')
