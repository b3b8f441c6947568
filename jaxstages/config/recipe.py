"""The recipe of a run: its stages, and of each stage the data, optimizer, loop, evaluation and starting point.

The dataclasses are not frozen, so that `--config.pretrain.optim.schedule.peak_lr=3e-4` can set a field; after
`checks.validate` nothing writes to them.
"""

from dataclasses import dataclass, field

from jaxstages.config.data import DataConfig, TokenizerConfig
from jaxstages.config.mesh import MeshConfig
from jaxstages.config.model import ModelConfig
from jaxstages.config.optimizer import OptimConfig

STAGES = ("pretrain", "finetune", "instruct")
IMPORT = "import"
"""The stage of a workdir that holds weights from elsewhere; it comes before all others, and no recipe has it."""

CHECKPOINTED_STAGES = (IMPORT, *STAGES)
"""What of a workdir may have checkpoints."""

EARLIER = "earlier"
"""In `evaluation.watch`: each stage before this one."""


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """The length of a stage is one of `steps`, `epochs` and `tokens`; the others are 0."""

    steps: int = 1000
    epochs: float = 0.0
    """Passes over the stage's own training rows."""
    tokens: int = 0
    """Tokens that the stage reads, replayed ones among them; padding does not count."""
    batch_size: int = 16
    """Rows in one optimizer step, over all devices and hosts."""
    accumulate: int = 1
    """Parts that the batch is split into; the loss and gradient do not depend on it."""
    loss_tile: int = 0
    """Positions of each row whose logits exist at once, which saves memory where the vocabulary is large; 0 is all."""
    remat: str = "none"
    """What the backward pass computes again to save memory: "none", "dots" (all but matrix products), "offload" (these
    are kept in the host's memory), "full", or "auto", the least that fits the device. On CPU without model.unroll."""
    compiler_options: tuple[str, ...] = ()
    """Of XLA, for the step alone, such as "xla_gpu_enable_triton_gemm=false"; `XLA_FLAGS` sets them for all."""
    eval_every: int = 100
    save_every: int = 100
    log_every: int = 10
    stop_after: int = 0
    """End this run after so many steps without changing its schedule; 0 is off."""
    keep: int = 2
    """Latest checkpoints that stay; the best one always does."""
    hang_seconds: float = 600.0
    """A step, or a batch of an evaluation, that takes longer ends the run, with the stacks of all threads; the first
    step, which compiles, may take ten times that."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    metrics: tuple[str, ...] = ()
    """Beside the loss, perplexity and bits per byte: "bleu", "chrf", "exact_match" (by generation), "accuracy",
    "macro_f1" (task classify)."""
    max_examples: int = 500
    """Held-out examples that generation and labels are scored on; 0 takes all."""
    max_rows: int = 0
    """Held-out rows that the loss is computed on; 0 takes all."""
    max_new_tokens: int = 64
    batch_size: int = 64
    watch: tuple[str, ...] = (EARLIER,)
    """Stages whose held-out data are measured at each evaluation too, as `watch/STAGE/METRIC`: what does this stage
    make the model forget? "earlier" is each stage before this one that this workdir has; () watches none."""
    watch_max_rows: int = 256
    """Held-out rows of each watched stage that the loss is computed on; 0 takes all."""
    watch_max_examples: int = 64
    """Held-out examples of each watched stage that its scores are computed on; 0 takes all."""


@dataclass(kw_only=True, slots=True)
class EarlyStoppingConfig:
    """The best evaluation is kept and handed on whatever the patience."""

    metric: str = "loss"
    mode: str = "min"
    patience: int = 0
    """Evaluations in a row without improvement before the stage stops; 0 never stops."""
    min_delta: float = 0.0
    """An improvement must be larger than this."""
    within: tuple[tuple[str, float], ...] = ()
    """Conditions on the best step: (("watch/pretrain/loss", 0.1),) passes over evaluations at which that metric is
    worse by more than 0.1 than at the stage's start."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Train low-rank adapters beside a base that stays as it is (LoRA, Hu et al. 2022)."""

    rank: int = 0
    """0 is full fine-tuning: all parameters are trained."""
    alpha: float = 16.0
    """The adapters' product is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = ("/kernel$",)
    """Matrices whose path has one of these regular expressions in it are adapted; by default all linear maps of
    attention and feed-forward."""
    rank_stabilized: bool = False
    """`alpha / sqrt(rank)` instead (rsLoRA, Kalajdzievski 2023)."""
    dora: bool = False
    """Also train the length of each column (DoRA, Liu et al. 2024)."""
    base: str = "float32"
    """What the base is held in: "float32", "bfloat16", or "int8" (its kernels, by column; the rest is bfloat16)."""


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """One more data set of a stage, with a task and a format of its own."""

    data: DataConfig = field(default_factory=DataConfig)
    share: tuple[float, ...] = (0.1,)
    """Share of the stage's rows; a second number replaces it from `StageConfig.late_from` on."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Metrics and limits; `batch_size` and `watch` are the stage's own."""


@dataclass(kw_only=True, slots=True)
class AnchorConfig:
    """A penalty on forgetting without the old data: `weight` times the mean of KL(parent || model) over the tokens of
    rows that the parent itself generates (Marek et al. 2026). For weights that were imported."""

    weight: float = 0.0
    """0 is off."""
    batch_size: int = 4
    """Generated rows in one optimizer step, over all devices and hosts."""
    texts: int = 256
    """Texts that the parent generates before the stage, sampled at temperature 1, each up to its end or to
    `model.context` tokens."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    data: DataConfig = field(default_factory=DataConfig)
    replay: tuple[tuple[str, float], ...] = ()
    """Earlier stages, and the share of this stage's rows that comes from the training data of each:
    (("pretrain", 0.15), ("finetune", 0.1)). `data` fills the rest."""
    mixture: dict[str, DatasetConfig] = field(default_factory=dict)
    """Further data sets, each by a name of its own: text, pairs and chats in one stage. `data` fills the rest."""
    late_from: float = 1.0
    """Share of the stage's steps after which the second number of `DatasetConfig.share` holds."""
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    neftune_alpha: float = 0.0
    """In training, embeddings get uniform noise of this over `sqrt(tokens of the example * width)` (Jain et al. 2023);
    5 is usual, 0 is none."""
    init_from: str = "parent"
    """ "parent" (the stage before, in this workdir, or what was imported into it), "scratch", `WORKDIR/STAGE` of
    another run, or `hf:FOLDER`, which is imported into this workdir and gives the model and the tokenizer."""


@dataclass(kw_only=True, slots=True)
class Recipe:
    name: str
    seed: int = 0
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pretrain: StageConfig | None = None
    finetune: StageConfig | None = None
    instruct: StageConfig | None = None
    prompts: tuple[str, ...] = ()
    """Answered by every stage after a run, so that one can read what each stage taught."""
    cache: str = ""
    """Where prepared rows are kept; by default `WORKDIR/cache`."""


def stages(recipe: Recipe) -> dict[str, StageConfig]:
    """The stages that the recipe has, in their order."""
    return {name: getattr(recipe, name) for name in STAGES if getattr(recipe, name) is not None}
