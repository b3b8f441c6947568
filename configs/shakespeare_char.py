"""Shakespeare by characters: pretraining only, nanoGPT's CPU setting (4 layers, width 128, context 64, batch 12).

    curl --create-dirs -o data/tinyshakespeare.txt \\
        https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    jaxstages run --config=configs/shakespeare_char.py --workdir=runs/shakespeare
    jaxstages run --config=configs/shakespeare_char.py:better --workdir=runs/shakespeare-better

The text is Karpathy's tinyshakespeare, 1.1 MB; its last tenth is held out. Expect on two CPU cores: one to two
minutes, and 1.81 nats a character over the whole tenth ("better": 1.57). The learning rate, 2e-3, is twice
nanoGPT's: at 1e-3 this gave 1.91, where nanoGPT gives 1.91. "better" has the same number of parameters (within 5 %) and
sees the same tokens: rotary positions, ReLU squared, query/key norm, Muon.
"""

from jaxstages.config import (
    AttentionConfig,
    DataConfig,
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
    """Variants: "" nanoGPT's model and optimizer; "better"."""
    pretrain = StageConfig(
        data=DataConfig(task="lm", train=("data/tinyshakespeare.txt",), holdout=0.1),
        optim=OptimConfig(
            schedule=ScheduleConfig(name="cosine", peak_lr=2e-3, warmup_steps=100, end_factor=0.1), beta2=0.99
        ),
        loop=LoopConfig(steps=2000, batch_size=12, eval_every=250, save_every=500, log_every=20),
        evaluation=EvaluationConfig(batch_size=128, max_new_tokens=48),
    )
    model = ModelConfig(
        context=64,
        layers=4,
        width=128,
        ff_width=512,
        norm="layernorm",
        activation="gelu",
        unroll=True,
        attention=AttentionConfig(heads=4, kv_heads=4, head_dim=32, position="learned"),
    )
    recipe = Recipe(
        name="shakespeare_char",
        tokenizer=TokenizerConfig(kind="characters"),
        model=model,
        pretrain=pretrain,
        prompts=("ROMEO:", "First Citizen:"),
    )
    match variant:
        case "":
            return recipe
        case "better":
            model.norm, model.activation = "rmsnorm", "relu2"
            model.attention = AttentionConfig(heads=4, kv_heads=4, head_dim=32, qk_norm=True)
            pretrain.optim = OptimConfig(
                name="muon",
                schedule=ScheduleConfig(name="linear", peak_lr=4e-3, warmup_steps=50, end_factor=0.0),
                muon_lr_factor=5.0,
                beta2=0.99,
            )
            return recipe
        case _:
            raise ValueError(f'configs/shakespeare_char.py has no variant {variant!r}; known: "better"')
