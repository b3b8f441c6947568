"""A class by fine-tuning: what does a customer of a bank want? (Banking77, Casanueva et al. 2020: 77 classes)

    jaxstages run --config=configs/classify.py --workdir=runs/classify

It reads data/classes/train.jsonl, {"text", "label"} a line, and valid.jsonl beside it, and starts from the pretrained
model of `configs/text_to_chat.py`, whose tokenizer and model it therefore has. Expect the class of a sentence: a label
is written out as text, and the answer is the one that the model finds likeliest. `benchmarks/transfer.py` measures it
with 5, 20 and all examples a class.

    jaxstages run --config=configs/classify.py:control --workdir=runs/classify-control

is the same from scratch. Both use the tokenizer of runs/text_to_chat.
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
    """Variants: "" from the pretrained model; "control" from scratch, with the same budget."""
    finetune = StageConfig(
        data=DataConfig(
            task="classify",
            train=("data/classes/train.jsonl",),
            validation=("data/classes/valid.jsonl",),
            prompt="text",
            target="label",
        ),
        optim=OptimConfig(
            name="muon",
            muon_lr_factor=5.0,
            schedule=ScheduleConfig(name="linear", peak_lr=2e-3, warmup_steps=20, end_factor=0.0),
        ),
        loop=LoopConfig(steps=900, batch_size=12, eval_every=300, save_every=300),
        evaluation=EvaluationConfig(metrics=("accuracy", "macro_f1"), max_examples=770, batch_size=64),
        early_stopping=EarlyStoppingConfig(metric="macro_f1", mode="max"),
        init_from="runs/text_to_chat/pretrain",
    )
    recipe = Recipe(
        name="classify",
        tokenizer=TokenizerConfig(kind="file", path="runs/text_to_chat/tokenizer/tokenizer.json"),
        model=ModelConfig(
            context=128,
            layers=4,
            width=192,
            ff_width=512,
            activation="swiglu",
            unroll=True,
            attention=AttentionConfig(heads=6, kv_heads=6, head_dim=32, qk_norm=True),
        ),
        finetune=finetune,
    )
    match variant:
        case "":
            return recipe
        case "control":
            finetune.init_from = "scratch"
            return recipe
        case _:
            raise ValueError(f'configs/classify.py has no variant {variant!r}; known: "control"')
