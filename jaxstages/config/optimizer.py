"""The recipe's description of the optimizer and the learning-rate schedule."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """name: "constant", "linear", "cosine", "wsd", "rsqrt" or "plateau", each with linear warm-up to `peak_lr`."""

    name: str = "cosine"
    peak_lr: float = 1e-3
    warmup_steps: int = 100
    end_factor: float = 0.1
    """linear, cosine, wsd: the last learning rate as a share of the peak."""
    decay_share: float = 0.2
    """wsd: the share of all steps that decays, at the end."""
    plateau_factor: float = 0.5
    plateau_patience: int = 3
    plateau_window: int = 100
    """plateau: steps whose mean training loss makes one observation."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    name: str = "adamw"
    """ "adamw", "adafactor", "lion", "muon" or "sgd"."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    moment_dtype: str = "float32"
    """Of the first moment (adamw, lion, muon, sgd): "float32" or "bfloat16", which saves 2 bytes a parameter. Second
    moments stay float32: one step changes them by less than bfloat16 resolves."""
    muon_lr_factor: float = 20.0
    """muon: learning rate of the matrices, as a multiple of the schedule's, which the rest (AdamW) follows. Decay is
    the same for both: `weight_decay` times the schedule's rate."""
    no_decay: tuple[str, ...] = ("scale", "bias", "embed")
    """Parameters whose path contains one of these regular expressions are not decayed."""
    freeze: tuple[str, ...] = ()
    """Parameters whose path contains one of these regular expressions are not trained."""
    rates: tuple[tuple[str, float], ...] = ()
    """Learning-rate factors by path: (("embedding", 0.1),). The first regular expression that a parameter's path
    contains gives its factor, of decay too; without one it is 1."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    average: float = 0.0
    """Decay of an exponential moving average of the parameters, such as 0.999; 0 is none. Early in a stage at step t it
    is `(1 + t) / (10 + t)`, so that the start is soon forgotten. The average is evaluated beside the parameters, and
    handed on where it is better."""
    max_bad_steps: int = 10
    """Steps in a row whose loss or gradient is not finite, each of them skipped, that end the run."""
    spike_sigma: float = 0.0
    """Also skip a step whose loss or gradient norm is so many standard deviations above the mean of the last
    `spike_window`; 0 is off. OLMo 2 takes 6."""
    spike_window: int = 128
