"""Config of a run: its stages, and each stage's data, optimizer, loop, evaluation and starting point.

The dataclasses are not frozen, so that a flag such as `--config.pretrain.optim.schedule.peak_lr=3e-4` can set a field.
After `checks.validate` nothing writes to them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxstages.config.data import DataConfig, TokenizerConfig
from jaxstages.config.mesh import MeshConfig
from jaxstages.config.model import ModelConfig
from jaxstages.config.optimizer import OptimConfig
from jaxstages.config.parts import Metric, ModelSpec
from jaxstages.config.setting import setting

STAGES = ("pretrain", "finetune", "instruct")

IMPORT = "import"
"""Stage name of imported weights in a workdir. It precedes all others, and no recipe contains it."""

CHECKPOINTED_STAGES = (IMPORT, *STAGES)

EARLIER = "earlier"
"""In `evaluation.watch`: all stages before this one."""


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """The length of a stage is set by one of `steps`, `epochs` and `tokens`; the other two are 0."""

    steps: int = setting(1000, at_least=0)
    epochs: float = setting(0.0, at_least=0)
    """Passes over the stage's own training rows."""
    tokens: int = setting(0, at_least=0)
    """Tokens to train on, replayed ones included, padding excluded."""
    batch_size: int = setting(16, at_least=1, at_most=2**20)
    """Rows in one optimizer step, over all devices and hosts."""
    accumulate: int = setting(1, at_least=1, at_most=2**14)
    """Micro-batches per optimizer step; the loss and the gradient do not depend on it."""
    loss_tile: int = setting(0, at_least=0)
    """Positions of each row whose logits are materialized at a time, which saves memory if the vocabulary is large; 0
    means the whole row."""
    remat: str = setting("none", choices=("none", "dots", "offload", "full", "auto"))
    """What the backward pass rematerializes to save memory: "none", "dots" (all but matrix products), "offload" (keeps
    the products in host memory), "full", or "auto" (the least that fits the device). On CPU without model.unroll."""
    compiler_options: tuple[str, ...] = ()
    """XLA options for the train step alone, such as "xla_gpu_enable_triton_gemm=false"; `XLA_FLAGS` sets them for all
    programs."""
    eval_every: int = setting(100, at_least=1)
    save_every: int = setting(100, at_least=1)
    log_every: int = setting(10, at_least=1)
    stop_after: int = setting(0, at_least=0)
    """End this run after so many steps without changing its schedule; 0 is off."""
    keep: int = setting(2, at_least=1)
    """Latest checkpoints to keep, beside the best one."""
    hang_seconds: float = setting(600.0, above=0, at_most=1e9)
    """End the run with a stack trace of all threads if a step, or a batch of an evaluation, takes longer. The first
    step includes compilation and may take ten times as long."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    metrics: tuple[str | Callable | Metric, ...] = ()
    """Metrics beside the loss, perplexity and bits per byte: "bleu", "chrf", "exact_match" (of generated text),
    "accuracy", "macro_f1" (task classify)."""
    max_examples: int = setting(500, at_least=0)
    """Held-out examples to generate for or to classify; 0 means all."""
    max_rows: int = setting(0, at_least=0)
    """Held-out rows to compute the loss on; 0 means all."""
    max_new_tokens: int = setting(64, at_least=1, at_most=2**20)
    batch_size: int = setting(64, at_least=1, at_most=2**20)
    choice: tuple[str, ...] = ()
    """Sources of multiple-choice questions, `{"query", "choices", "gold"}`, measured at each evaluation as
    `choice/NAME/accuracy` and `choice/NAME/accuracy_norm` (by the likelihood per character)."""
    choice_max_questions: int = setting(0, at_least=0)
    """Questions of each of these sources, evenly spaced; 0 means all."""
    watch: tuple[str, ...] = (EARLIER,)
    """Stages whose held-out data are also measured at each evaluation, as `watch/STAGE/METRIC`, to show what the model
    forgets. "earlier" stands for all stages before this one in the workdir; () watches none."""
    watch_max_rows: int = setting(256, at_least=0)
    """Held-out rows of each watched stage to compute the loss on; 0 means all."""
    watch_max_examples: int = setting(64, at_least=0)
    """Held-out examples of each watched stage to compute its metrics on; 0 means all."""


@dataclass(kw_only=True, slots=True)
class EarlyStoppingConfig:
    """The best evaluation is saved and handed on, whatever the patience."""

    metric: str = "loss"
    mode: str = setting("min", choices=("min", "max"))
    patience: int = setting(0, at_least=0)
    """Stop after so many evaluations in a row without improvement; 0 never stops."""
    min_delta: float = setting(0.0, at_least=0)
    """Smallest change that counts as an improvement (exclusive)."""
    within: tuple[tuple[str, float], ...] = ()
    """Limits on forgetting at the best step: (("watch/pretrain/loss", 0.1),) ignores evaluations at which that metric
    is worse by more than 0.1 than at the start of the stage."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Train low-rank adapters on a frozen base (LoRA, Hu et al. 2022)."""

    rank: int = setting(0, at_least=0, at_most=2**14)
    """0 means full fine-tuning: all parameters are trained."""
    alpha: float = setting(16.0, above=0)
    """Scale of the update: the product of the adapters is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = setting(("/kernel$",), syntax="regex")
    """Adapt matrices if one of these regular expressions occurs in their path; by default all linear layers of
    attention and feed-forward."""
    rank_stabilized: bool = False
    """Scale by `alpha / sqrt(rank)` instead (rsLoRA, Kalajdzievski 2023)."""
    dora: bool = False
    """Also train the norm of each column (DoRA, Liu et al. 2024)."""
    base: str = setting("float32", choices=("float32", "bfloat16", "int8"))
    """Type of the base in memory: "float32", "bfloat16", or "int8" (kernels per column, everything else bfloat16)."""


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """An additional data set of a stage, with its own task and format."""

    data: DataConfig = field(default_factory=DataConfig)
    share: tuple[float, ...] = setting((0.1,), at_least=0, at_most=1)
    """Share of the stage's rows; a second number replaces it from `StageConfig.late_from` on."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Metrics and limits; `batch_size` and `watch` are the stage's own."""


@dataclass(kw_only=True, slots=True)
class AnchorConfig:
    """A penalty on forgetting that needs no old data: `weight` times the mean KL(parent || model) over the tokens of
    rows that the parent itself generated (Marek et al. 2026). Meant for imported weights."""

    weight: float = setting(0.0, at_least=0)
    """0 is off."""
    batch_size: int = setting(4, at_least=1, at_most=2**20)
    """Generated rows in one optimizer step, over all devices and hosts."""
    texts: int = setting(256, at_least=1)
    """Texts to generate with the parent before the stage, at temperature 1, each up to its end or to `model.context`
    tokens."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    data: DataConfig = field(default_factory=DataConfig)
    loss: Callable | None = None
    """An own loss: `loss(model, params, batch, dropout_key)` returns sums over the batch, at least "objective", which
    is minimized, and "weight", which divides it (`types.LossFn`). None is cross-entropy over the scored tokens."""
    replay: tuple[tuple[str, float], ...] = setting((), at_least=0)
    """Earlier stages to replay, and the share of this stage's rows drawn from the training data of each:
    (("pretrain", 0.15), ("finetune", 0.1)). `data` provides all other rows."""
    mixture: dict[str, DatasetConfig] = field(default_factory=dict)
    """Additional data sets by name: text, pairs and chats in one stage. `data` provides all other rows."""
    late_from: float = setting(1.0, at_least=0, at_most=1)
    """Share of the stage's steps after which the second number of `DatasetConfig.share` applies."""
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    neftune_alpha: float = setting(0.0, at_least=0)
    """NEFTune: add uniform noise of magnitude `neftune_alpha / sqrt(tokens of the example * width)` to the embeddings
    during training (Jain et al. 2023); 5 is usual, 0 is off."""
    init_from: str = "parent"
    """ "parent" (the previous stage in this workdir, or its imported weights), the name of an earlier stage of this
    recipe, "scratch", `WORKDIR/STAGE` of another run, or `hf:FOLDER`, a Hugging Face checkpoint folder, which is
    imported into this workdir and determines the model and the tokenizer."""


@dataclass(kw_only=True, slots=True)
class Recipe:
    name: str
    seed: int = setting(0, at_least=0)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelSpec = field(default_factory=ModelConfig)
    """The built-in decoder, or an own model: an object with `context` and `make(vocab_size)`, which returns a
    `types.Model`."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pretrain: StageConfig | None = None
    finetune: StageConfig | None = None
    instruct: StageConfig | None = None
    extra_stages: dict[str, StageConfig] = field(default_factory=dict)
    """Further stages by name, which follow the three in this order; `jaxstages train --stage=NAME` trains one."""
    prompts: tuple[str, ...] = ()
    """Prompts that every stage answers after a run, to show what each stage taught."""
    cache: str = ""
    """Folder for prepared rows; by default `WORKDIR/cache`."""


def stages(recipe: Recipe) -> dict[str, StageConfig]:
    """Return the stages of the recipe by name, in order."""
    named = {name: getattr(recipe, name) for name in STAGES if getattr(recipe, name) is not None}
    return named | recipe.extra_stages


def stage_number(recipe: Recipe, name: str) -> int:
    """Return the position of a stage, 0 for "pretrain", which does not depend on the other stages that a recipe has."""
    return (*STAGES, *recipe.extra_stages).index(name)


def builtin_model(recipe: Recipe, purpose: str) -> ModelConfig:
    """Return the config of the built-in decoder.

    Raises:
        ValueError: the recipe has an own model, for which `purpose` is not available.
    """
    if not isinstance(recipe.model, ModelConfig):
        raise ValueError(f"config.model is {type(recipe.model).__name__}, an own model; {purpose} needs a ModelConfig")
    return recipe.model
