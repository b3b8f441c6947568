"""Real text, all three stages: English and French prose, then English to French, then chats that still translate.

    jaxstages run --config=configs/text_to_chat.py --workdir=runs/text_to_chat

reads these files, each of which can be another one (`--config.pretrain.data.train="('a.jsonl', 'b.jsonl')"`):

    data/prose/*.jsonl          {"text"} a line: books and articles in both languages
    data/pairs/train.jsonl      {"en", "fr"} a line; valid.jsonl beside it is held out
    data/chats/*.jsonl          {"messages"} a line

Pretraining also reads each side of the pairs by itself, as text: sentences of the kind that is translated later, but
not which belongs to which. A quarter of its rows copy a French sentence to itself, in the format of the later
translation (Currey et al. 2017, "Copied Monolingual Data Improves Low-Resource Neural Machine Translation"): the model
learns to write what it reads, of which fine-tuning makes translation. Without them pretraining lowers the held-out loss
of translations, but not their BLEU. Each later stage replays the ones before it.

    jaxstages run --config=configs/text_to_chat.py:prose ...              prose is all that it needs
    jaxstages finetune --config=configs/text_to_chat.py:control ...       the same fine-tuning, from scratch

Expect a model of 2.6 million parameters. It shows the road, not the destination: give it a GPU, a larger `model` and
more `steps`. `benchmarks/transfer.py` measures what pretraining is worth.
"""

from jaxstages.config import (
    AttentionConfig,
    DataConfig,
    DatasetConfig,
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

TRAIN, VALID = ("data/pairs/train.jsonl",), ("data/pairs/valid.jsonl",)


def _muon(peak_lr: float, warmup_steps: int = 100) -> OptimConfig:
    return OptimConfig(
        name="muon",
        muon_lr_factor=5.0,
        schedule=ScheduleConfig(name="linear", peak_lr=peak_lr, warmup_steps=warmup_steps, end_factor=0.0),
    )


def _side(data: DataConfig, share: float) -> DatasetConfig:
    """One side of the pairs."""
    data.train, data.validation = TRAIN, VALID
    return DatasetConfig(data=data, share=(share,), evaluation=EvaluationConfig(max_rows=128))


def get_config(variant: str = "") -> Recipe:
    """Variants: "" all stages; "prose" pretraining on prose alone; "control" fine-tuning alone, from scratch."""
    pretrain = StageConfig(
        data=DataConfig(task="lm", train=("data/prose/*.jsonl",), holdout=0.01),
        mixture={
            "english": _side(DataConfig(task="lm", text="en"), 0.2),
            "french": _side(DataConfig(task="lm", text="fr"), 0.25),
            "copies": _side(DataConfig(task="seq2seq", prompt="fr", target="fr"), 0.25),
        },
        optim=_muon(4e-3),
        loop=LoopConfig(steps=3000, batch_size=12, eval_every=1000, save_every=500),
        evaluation=EvaluationConfig(max_rows=512),
    )
    finetune = StageConfig(
        data=DataConfig(task="seq2seq", train=TRAIN, validation=VALID, prompt="en", target="fr"),
        replay=(("pretrain", 0.1),),
        optim=_muon(2e-3),
        loop=LoopConfig(steps=1600, batch_size=12, eval_every=400, save_every=400),
        evaluation=EvaluationConfig(metrics=("bleu", "chrf"), max_examples=1000, max_new_tokens=40, batch_size=128),
        early_stopping=EarlyStoppingConfig(metric="bleu", mode="max"),
    )
    instruct = StageConfig(
        data=DataConfig(task="chat", train=("data/chats/*.jsonl",), holdout=0.1),
        # At a rate of 1.5e-3 and with a share of 0.25, BLEU falls from 31.0 to 26.9; so it keeps 30.7.
        replay=(("pretrain", 0.15), ("finetune", 0.35)),
        optim=_muon(6e-4),
        loop=LoopConfig(steps=1000, batch_size=12, eval_every=200, save_every=200),
        evaluation=EvaluationConfig(max_rows=512, max_new_tokens=40, watch_max_examples=250),
        early_stopping=EarlyStoppingConfig(metric="loss", patience=3),
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
        pretrain=pretrain,
        finetune=finetune,
        instruct=instruct,
        prompts=("The house is old.", "Hello! How are you today?", "What do you like to do on the weekend?"),
    )
    match variant:
        case "":
            return recipe
        case "prose":
            recipe.finetune = recipe.instruct = None
            pretrain.mixture = {}
            return recipe
        case "control":
            recipe.pretrain = recipe.instruct = None
            finetune.init_from, finetune.replay = "scratch", ()
            # The best of the rates tried from scratch; benchmarks/transfer.py has them.
            finetune.optim = _muon(4e-3)
            return recipe
        case _:
            raise ValueError(f'configs/text_to_chat.py has no variant {variant!r}; known: "prose", "control"')
