"""Config of the optimizer and of the learning-rate schedule."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxstages.config.parts import Makes
from jaxstages.config.setting import setting


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Learning-rate schedule. Every schedule but "own" begins with a linear warm-up to `peak_lr`."""

    name: str = setting("cosine", choices=("constant", "linear", "cosine", "wsd", "rsqrt", "plateau", "own"))
    """Schedule after the warm-up: "constant", "linear", "cosine", "wsd" (warm-up, stable, decay), "rsqrt", "plateau" or
    "own"."""
    own: Callable | None = setting(None, only_for={"name": ("own",)})
    """own: `own(steps)` returns an `optax.Schedule`; the other fields have no effect."""
    peak_lr: float = setting(1e-3, above=0)
    """Learning rate at the end of the warm-up."""
    warmup_steps: int = setting(100, at_least=0)
    """Steps of linear warm-up; 0 starts at the peak."""
    end_factor: float = setting(0.1, at_least=0, at_most=1, only_for={"name": ("linear", "cosine", "wsd")})
    """Final learning rate as a fraction of the peak."""
    decay_share: float = setting(0.2, at_least=0, at_most=1, only_for={"name": ("wsd",)})
    """Fraction of all steps, at the end, in which the learning rate decays."""
    plateau_factor: float = setting(0.5, above=0, only_for={"name": ("plateau",)})
    """Factor on the learning rate at each plateau."""
    plateau_patience: int = setting(3, at_least=1, only_for={"name": ("plateau",)})
    """Number of windows without improvement that count as a plateau."""
    plateau_window: int = setting(100, at_least=1, only_for={"name": ("plateau",)})
    """Steps per window; the mean training loss of a window is one observation."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer, parameter averaging, and terms of the objective; see docs/optimizers.md."""

    name: str = setting("adamw", choices=("adamw", "adafactor", "lion", "muon", "sgd", "own"))
    """Optimizer: "adamw", "adafactor", "lion", "muon", "sgd" or "own"."""
    own: Makes | Callable | None = setting(None, only_for={"name": ("own",)})
    """own: `own(schedule)`, or the method `make(schedule)` of an object with fields, returns an optax transformation.
    `clip_norm`, `freeze` and `rates` apply around it; it has to do its own weight decay."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule."""
    beta1: float = setting(0.9, at_least=0, below=1, only_for={"name": ("adamw", "lion", "muon", "sgd")})
    """Decay of the first moment; for sgd, the momentum; for lion, the weight of the momentum in the direction."""
    beta2: float = setting(0.95, at_least=0, below=1, only_for={"name": ("adamw", "lion", "muon")})
    """Decay of the second moment; for lion, of the momentum."""
    weight_decay: float = setting(0.1, at_least=0)
    """Decoupled weight decay: each step subtracts `lr * weight_decay * param`."""
    clip_norm: float = setting(1.0, at_least=0)
    """Clip gradients to this global norm; 0 is off."""
    moment_dtype: str = setting(
        "float32", choices=("float32", "bfloat16"), only_for={"name": ("adamw", "lion", "muon", "sgd")}
    )
    """Dtype of the first moment: "float32", or "bfloat16", which saves 2 bytes per parameter. Second moments stay
    float32, because one step changes them by less than bfloat16 resolves."""
    muon_lr_factor: float = setting(20.0, above=0, only_for={"name": ("muon",)})
    """Learning rate of matrices (Muon) as a multiple of the scheduled learning rate, which all other parameters (AdamW)
    use. Weight decay uses the scheduled learning rate for both."""
    no_decay: tuple[str, ...] = setting(("scale", "bias", "embed"), syntax="regex")
    """Exclude parameters from weight decay if their path contains a match of one of these regular expressions."""
    freeze: tuple[str, ...] = setting((), syntax="regex")
    """Freeze parameters if their path contains a match of one of these regular expressions."""
    rates: tuple[tuple[str, float], ...] = setting((), at_least=0, syntax="regex")
    """Learning-rate factors by path, such as (("embedding", 0.1),). The first regular expression that matches in a
    parameter's path sets its factor, which applies to weight decay too; the default is 1."""
    label_smoothing: float = setting(0.0, at_least=0, below=1)
    """Share of the target's probability that is spread evenly over the vocabulary (Szegedy et al. 2016)."""
    z_loss: float = setting(0.0, at_least=0)
    """Weight of the penalty on the squared log-partition function; 0 is off."""
    average: float = setting(0.0, at_least=0, below=1)
    """Decay of an exponential moving average of the parameters, such as 0.999; 0 is off. At step t the decay is at most
    `(1 + t) / (10 + t)`, so that the average soon forgets the initial parameters. Evaluations measure both the
    parameters and their average, and the better of the two is handed on."""
    max_bad_steps: int = setting(10, at_least=1)
    """End the run after this many steps in a row whose loss or gradient is not finite; such steps are skipped."""
    spike_sigma: float = setting(0.0, at_least=0)
    """Also skip steps whose loss or gradient norm is this many standard deviations above the mean of the last
    `spike_window` steps; 0 is off, OLMo 2 uses 6."""
    spike_window: int = setting(128, at_least=1, at_most=2**20)
    """Number of steps for the mean and standard deviation of `spike_sigma`."""
