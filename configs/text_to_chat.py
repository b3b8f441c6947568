"""Real text, all three stages: English prose, then English to French, then chats. Paths are given on the command line.

    jaxstages run --config=configs/text_to_chat.py --workdir=runs/text_to_chat
        "--config.pretrain.data.train=('PROSE.jsonl', 'MORE.jsonl')"      {"text"} a line
        --config.finetune.data.train=TRAIN.jsonl                          {"en", "fr"} a line
        --config.finetune.data.validation=VALID.jsonl
        "--config.instruct.data.train=('CHATS.jsonl',)"                   {"messages"} a line

    jaxstages finetune --config=configs/text_to_chat.py:control ...       the same fine-tuning, from scratch

Expect on two CPU cores: about 20 minutes, and 6 more for the control; a model of 2.6 million parameters that translates
short sentences roughly. It shows the road, not the destination: give it a GPU, a larger `model` and more `steps`.
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


def _muon(peak_lr: float) -> OptimConfig:
    return OptimConfig(
        name="muon", muon_lr_factor=5.0, schedule=ScheduleConfig(name="linear", peak_lr=peak_lr, warmup_steps=100)
    )


def get_config(variant: str = "") -> Recipe:
    """Variants: "" all stages; "control" the fine-tuning alone, from scratch, with the same budget."""
    finetune = StageConfig(
        data=DataConfig(
            task="seq2seq",
            train=("data/pairs/train.jsonl",),
            validation=("data/pairs/valid.jsonl",),
            prompt="en",
            target="fr",
        ),
        optim=_muon(3e-3),
        loop=LoopConfig(steps=1600, batch_size=12, eval_every=800, save_every=400),
        evaluation=EvaluationConfig(metrics=("bleu", "chrf"), max_examples=0, max_new_tokens=40, batch_size=128),
        early_stopping=EarlyStoppingConfig(metric="bleu", mode="max"),
    )
    recipe = Recipe(
        name="text_to_chat",
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=4096),
        model=ModelConfig(
            context=128,
            layers=4,
            width=192,
            ff_width=512,
            activation="swiglu",
            unroll=True,
            attention=AttentionConfig(heads=6, kv_heads=6, head_dim=32, qk_norm=True),
        ),
        pretrain=StageConfig(
            data=DataConfig(task="lm", train=("data/prose/*.jsonl",), holdout=0.01),
            optim=_muon(4e-3),
            loop=LoopConfig(steps=1600, batch_size=12, eval_every=400, save_every=400),
            evaluation=EvaluationConfig(max_rows=512),
        ),
        finetune=finetune,
        instruct=StageConfig(
            data=DataConfig(task="chat", train=("data/chats/*.jsonl",), holdout=0.1),
            optim=_muon(2e-3),
            loop=LoopConfig(steps=800, batch_size=12, eval_every=50, save_every=200),
            evaluation=EvaluationConfig(max_rows=512),
            early_stopping=EarlyStoppingConfig(metric="loss", patience=3),
        ),
        prompts=("The house is old.", "Hello! How are you today?", "What do you like to do on the weekend?"),
    )
    match variant:
        case "":
            return recipe
        case "control":
            recipe.pretrain = recipe.instruct = None
            finetune.init_from = "scratch"
            return recipe
        case _:
            raise ValueError(f'configs/text_to_chat.py has no variant {variant!r}; known: "control"')
