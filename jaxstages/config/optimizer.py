"""Config of the optimizer and of the learning-rate schedule."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxstages.config.parts import Makes
from jaxstages.config.setting import setting


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Learning-rate schedule; each one begins with a linear warm-up to `peak_lr`."""

    name: str = setting("cosine", choices=("constant", "linear", "cosine", "wsd", "rsqrt", "plateau", "own"))
    """ "constant", "linear", "cosine", "wsd" (warm-up, stable, decay), "rsqrt", "plateau" or "own"."""
    own: Callable | None = setting(None, only_for={"name": ("own",)})
    """own: `own(steps)` returns an `optax.Schedule`; the other fields do not apply."""
    peak_lr: float = setting(1e-3, above=0)
    warmup_steps: int = setting(100, at_least=0)
    end_factor: float = setting(0.1, at_least=0, at_most=1, only_for={"name": ("linear", "cosine", "wsd")})
    """Last learning rate as a share of the peak."""
    decay_share: float = setting(0.2, at_least=0, at_most=1, only_for={"name": ("wsd",)})
    """Share of all steps, at the end, in which the learning rate decays."""
    plateau_factor: float = setting(0.5, above=0, only_for={"name": ("plateau",)})
    """Multiply the learning rate by this at each plateau."""
    plateau_patience: int = setting(3, at_least=1, only_for={"name": ("plateau",)})
    """Windows without improvement that make a plateau."""
    plateau_window: int = setting(100, at_least=1, only_for={"name": ("plateau",)})
    """Steps per window; the mean training loss of a window is one observation."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    name: str = setting("adamw", choices=("adamw", "adafactor", "lion", "muon", "sgd", "own"))
    """ "adamw", "adafactor", "lion", "muon", "sgd" or "own"."""
    own: Makes | Callable | None = setting(None, only_for={"name": ("own",)})
    """own: `own(schedule)`, or the method `make(schedule)` of an object with fields, returns an optax transformation.
    `clip_norm`, `freeze` and `rates` apply around it; decay is its own affair."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    beta1: float = setting(0.9, at_least=0, below=1, only_for={"name": ("adamw", "lion", "muon", "sgd")})
    beta2: float = setting(0.95, at_least=0, below=1, only_for={"name": ("adamw", "lion", "muon")})
    weight_decay: float = setting(0.1, at_least=0)
    clip_norm: float = setting(1.0, at_least=0)
    """Clip gradients to this global norm; 0 is off."""
    moment_dtype: str = setting(
        "float32", choices=("float32", "bfloat16"), only_for={"name": ("adamw", "lion", "muon", "sgd")}
    )
    """Type of the first moment: "float32", or "bfloat16", which saves 2 bytes per parameter. Second moments stay
    float32, because one step changes them by less than bfloat16 resolves."""
    muon_lr_factor: float = setting(20.0, above=0, only_for={"name": ("muon",)})
    """Learning rate of matrices (Muon) as a multiple of the schedule's, which all other parameters (AdamW) use. Both
    decay by `weight_decay` times the schedule's learning rate."""
    no_decay: tuple[str, ...] = setting(("scale", "bias", "embed"), syntax="regex")
    """Exclude parameters from weight decay if one of these regular expressions occurs in their path."""
    freeze: tuple[str, ...] = setting((), syntax="regex")
    """Freeze parameters if one of these regular expressions occurs in their path."""
    rates: tuple[tuple[str, float], ...] = setting((), at_least=0, syntax="regex")
    """Learning-rate factors by path, such as (("embedding", 0.1),). The first regular expression that occurs in a
    parameter's path sets its factor, for weight decay too; the default is 1."""
    label_smoothing: float = setting(0.0, at_least=0, below=1)
    z_loss: float = setting(0.0, at_least=0)
    """Weight of the penalty on the squared log-partition function; 0 is off."""
    average: float = setting(0.0, at_least=0, below=1)
    """Decay of an exponential moving average of the parameters, such as 0.999; 0 is off. Early in a stage the decay at
    step t is at most `(1 + t) / (10 + t)`, so that the start is soon forgotten. Evaluations measure both the parameters
    and their average, and the better of the two is handed on."""
    max_bad_steps: int = setting(10, at_least=1)
    """Skip steps whose loss or gradient is not finite, and end the run after this many in a row."""
    spike_sigma: float = setting(0.0, at_least=0)
    """Also skip steps whose loss or gradient norm is this many standard deviations above the mean of the last
    `spike_window` steps; 0 is off, OLMo 2 uses 6."""
    spike_window: int = setting(128, at_least=1, at_most=2**20)
