"""Config of a run: its stages, and each stage's data, optimizer, loop, evaluation and starting point.

The dataclasses are not frozen, so that a flag such as `--config.pretrain.optim.schedule.peak_lr=3e-4` can set a field.
After `checks.validate` nothing writes to them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxstages.config.data import DataConfig, TokenizerConfig
from jaxstages.config.mesh import MeshConfig
from jaxstages.config.model import ModelConfig
from jaxstages.config.optimizer import OptimConfig
from jaxstages.config.parts import Makes, Metric, ModelSpec
from jaxstages.config.setting import setting

STAGES = ("pretrain", "finetune", "instruct")
"""Names of the three stages, in order."""

IMPORT = "import"
"""Stage name of imported weights in a workdir. It comes before all other stages, and no recipe contains it."""

CHECKPOINTED_STAGES = (IMPORT, *STAGES)
"""Stages whose folder in a workdir can hold checkpoints, beside the extra stages."""

EARLIER = "earlier"
"""Stands for all stages before this one in `evaluation.watch`."""


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """Training loop. One of `steps`, `epochs` and `tokens` sets the length of the stage; the other two must be 0."""

    steps: int = setting(1000, at_least=0)
    """Optimizer steps."""
    epochs: float = setting(0.0, at_least=0)
    """Passes over the stage's own training rows."""
    tokens: int = setting(0, at_least=0)
    """Tokens to train on, replayed ones included, padding excluded."""
    batch_size: int = setting(16, at_least=1, at_most=2**20)
    """Rows in one optimizer step, over all devices and hosts."""
    accumulate: int = setting(1, at_least=1, at_most=2**14)
    """Micro-batches per optimizer step. They save memory; the loss and the gradient stay the same."""
    loss_tile: int = setting(0, at_least=0)
    """Positions per row whose logits are materialized at a time, to save memory with a large vocabulary; 0 means the
    whole row."""
    remat: str = setting("none", choices=("none", "dots", "offload", "full", "auto"))
    """Rematerialization in the backward pass, to save memory: "none", "dots" (everything except matrix products),
    "offload" (like "dots", with the products in host memory), "full", or "auto" (the least that fits the device). On
    CPU it saves memory only with `model.unroll=False`."""
    compiler_options: tuple[str, ...] = ()
    """XLA options for the train step only, such as "xla_gpu_enable_triton_gemm=false"; `XLA_FLAGS` sets them for all
    programs."""
    eval_every: int = setting(100, at_least=1)
    """Steps between evaluations; the last step is always evaluated."""
    save_every: int = setting(100, at_least=1)
    """Steps between checkpoints; the last step is always saved."""
    log_every: int = setting(10, at_least=1)
    """Steps between training lines in the log."""
    stop_after: int = setting(0, at_least=0)
    """End the run at this step, under the schedule of the full length; 0 is off."""
    keep: int = setting(2, at_least=1)
    """Number of latest checkpoints to keep, in addition to the best one."""
    hang_seconds: float = setting(600.0, above=0, at_most=1e9)
    """Seconds that a step, or a batch of an evaluation, may take before the run ends with a stack trace of all threads.
    The first step includes compilation and may take ten times as long."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    metrics: tuple[str | Callable | Metric, ...] = ()
    """Metrics in addition to loss, perplexity and bits per byte: "bleu", "chrf", "exact_match" (of generated text),
    "accuracy", "macro_f1" (of predicted labels, for the task "classify"), or a function of your own (every task but
    "lm"): `metric(predictions, references)` returns a float."""
    max_examples: int = setting(500, at_least=0)
    """Held-out examples to answer or to classify; 0 means all."""
    max_rows: int = setting(0, at_least=0)
    """Held-out rows to compute the loss on; 0 means all."""
    max_new_tokens: int = setting(64, at_least=1, at_most=2**20)
    """Longest generated answer, in tokens."""
    batch_size: int = setting(64, at_least=1, at_most=2**20)
    """Held-out rows, or prompts to answer, in one batch, over all devices and hosts."""
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
    """Choice of the best evaluation, whose checkpoint is kept and handed on, and when to stop without a better one."""

    metric: str = "loss"
    """Metric that decides which evaluation is best, such as "loss", "bleu" or "watch/finetune/bleu"."""
    mode: str = setting("min", choices=("min", "max"))
    """ "min" if lower is better, "max" if higher is."""
    patience: int = setting(0, at_least=0)
    """Stop after this many evaluations in a row without improvement; 0 never stops."""
    min_delta: float = setting(0.0, at_least=0)
    """An improvement must be larger than this."""
    within: tuple[tuple[str, float], ...] = ()
    """Limits on forgetting at the best step: (("watch/pretrain/loss", 0.1),) ignores evaluations at which that metric
    is worse by more than 0.1 than at the start of the stage."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Train low-rank adapters on a frozen base (LoRA, Hu et al. 2022)."""

    rank: int = setting(0, at_least=0, at_most=2**14)
    """Rank of the adapters; 0 means full fine-tuning, which trains all parameters."""
    alpha: float = setting(16.0, above=0)
    """Scale of the adapters: their product is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = setting(("/kernel$",), syntax="regex")
    """Adapt each matrix whose path contains a match of one of these regular expressions; by default all linear layers
    of attention and feed-forward."""
    rank_stabilized: bool = False
    """Scale by `alpha / sqrt(rank)` instead (rsLoRA, Kalajdzievski 2023)."""
    dora: bool = False
    """Also train the norm of each column (DoRA, Liu et al. 2024)."""
    base: str = setting("float32", choices=("float32", "bfloat16", "int8"))
    """Storage dtype of the base: "float32", "bfloat16", or "int8" (kernels, with a scale per column; everything else is
    bfloat16)."""


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """An additional data set of a stage, with its own task and format."""

    data: DataConfig = field(default_factory=DataConfig)
    """Sources and task of the data set."""
    share: tuple[float, ...] = setting((0.1,), at_least=0, at_most=1)
    """Share of the stage's rows; a second number replaces the first from `StageConfig.late_from` on."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Metrics and limits of this data set; `batch_size` and `watch` are those of the stage."""


@dataclass(kw_only=True, slots=True)
class AnchorConfig:
    """A regularizer against forgetting that needs no data of earlier stages: `weight` times the mean
    KL(parent || model) over the tokens of rows that the parent generated (Marek et al. 2026). It is meant for imported
    weights."""

    weight: float = setting(0.0, at_least=0)
    """Weight of the penalty in the loss; 0 is off."""
    batch_size: int = setting(4, at_least=1, at_most=2**20)
    """Generated rows in one optimizer step, over all devices and hosts."""
    texts: int = setting(256, at_least=1)
    """Number of texts that the parent generates before the stage, at temperature 1, each up to its end or to
    `model.context` tokens."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage of training."""

    data: DataConfig = field(default_factory=DataConfig)
    """The stage's own data set."""
    loss: Callable | None = None
    """A custom loss: `loss(model, params, batch, dropout_key)` returns sums over the batch, at least "objective", which
    is minimized, and "weight", which divides it (`types.LossFn`). None is cross-entropy over the scored tokens."""
    replay: tuple[tuple[str, float], ...] = setting((), at_least=0)
    """Earlier stages to replay, each with the share of this stage's rows to draw from its training data:
    (("pretrain", 0.15), ("finetune", 0.1)). All other rows come from `data`."""
    mixture: dict[str, DatasetConfig] = field(default_factory=dict)
    """Additional data sets by name: text, pairs and chats in one stage. All other rows come
    from `data`."""
    late_from: float = setting(1.0, at_least=0, at_most=1)
    """Fraction of the stage's steps after which the second number of `DatasetConfig.share` applies."""
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    """Penalty for moving away from the parent."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and objective."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length, batch size and intervals."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    """Choice of the best step, and when to stop."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters in place of full fine-tuning."""
    neftune_alpha: float = setting(0.0, at_least=0)
    """NEFTune: add uniform noise of magnitude `neftune_alpha / sqrt(tokens of the example * width)` to the embeddings
    during training (Jain et al. 2023); 5 is usual, 0 is off."""
    init_from: str = "parent"
    """ "parent" (the previous stage in this workdir, or its imported weights), the name of an earlier stage of this
    recipe, "scratch", `WORKDIR/STAGE` of another run, or `hf:FOLDER`, a Hugging Face checkpoint folder, which is
    imported into this workdir and determines the model and the tokenizer."""


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Everything that determines a run."""

    name: str
    """Name of the recipe, for messages and model cards."""
    seed: int = setting(0, at_least=0)
    """Seed of everything random: initialization, order of the data, dropout, generated text."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer that all stages share."""
    model: ModelSpec = field(default_factory=ModelConfig)
    """The built-in decoder, or a custom model: an object with `context` and `make(vocab_size)`, which returns a
    `types.Model`."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Device mesh that all stages share."""
    pretrain: StageConfig | None = None
    """First stage, on raw text; None leaves it out."""
    finetune: StageConfig | None = None
    """Second stage, on pairs of texts or labeled texts; None leaves it out."""
    instruct: StageConfig | None = None
    """Third stage, on chats; None leaves it out."""
    extra_stages: dict[str, StageConfig] = field(default_factory=dict)
    """Further stages by name, which follow the three in order; `jaxstages train --stage=NAME` trains one of them."""
    prompts: tuple[str, ...] = ()
    """Prompts that every stage answers at the end of a run, to show what each stage has taught."""
    trackers: tuple[str | Callable | Makes, ...] = setting((), choices=("wandb", "mlflow"))
    """Trackers that also get the numbers of `metrics.jsonl`: "wandb", "mlflow", or a tracker of your own. They may
    change at any time."""
    cache: str = ""
    """Folder for prepared rows; by default `WORKDIR/cache`."""


def stages(recipe: Recipe) -> dict[str, StageConfig]:
    """Return the stages of a recipe by name, in order."""
    named = {name: getattr(recipe, name) for name in STAGES if getattr(recipe, name) is not None}
    return named | recipe.extra_stages


def all_metrics(recipe: Recipe) -> list[Any]:
    """Return `evaluation.metrics` of all stages and of the data sets of their mixtures."""
    parts = [part for stage in stages(recipe).values() for part in (stage, *stage.mixture.values())]
    return [metric for part in parts for metric in part.evaluation.metrics]


def stage_number(recipe: Recipe, name: str) -> int:
    """Return the number of a stage, 0 for "pretrain". It is the same whichever of the three stages a recipe has."""
    return (*STAGES, *recipe.extra_stages).index(name)


def builtin_model(recipe: Recipe, purpose: str) -> ModelConfig:
    """Return the config of the built-in decoder.

    Raises:
        ValueError: the recipe has a custom model, for which `purpose` is not available.
    """
    if not isinstance(recipe.model, ModelConfig):
        raise ValueError(f"config.model={type(recipe.model).__name__} is a custom model; {purpose} needs a ModelConfig")
    return recipe.model
