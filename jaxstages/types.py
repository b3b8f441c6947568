"""Shared types: Batch, TrainState, Model, LossFn, ShardingHooks, Metrics.

Legend, the same in every file: B batch, L length, D width, H query heads, G key/value heads, K head dim,
F feed-forward, V vocab, N layers (stacked), S cache slots, R LoRA rank, E experts,
A accumulation.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

Params = dict[str, Any]
"""Nested dict of arrays; a parameter's path is its keys joined by "/", such as `layers/attention/query/kernel`."""

Sums = dict[str, Array]
"""Reductions before the division: each name holds a weighted sum over tokens, and "weight" the sum to divide by."""

Metrics = dict[str, float]
"""Divided values, for logs and people."""


class Sample(NamedTuple):
    """An answer in an evaluation.

    dataset: name of the data set in a mixture; "" for the stage's own.
    prompt: with its control tokens. reference: the right answer.
    """

    dataset: str
    prompt: str
    answer: str
    reference: str


class Report(NamedTuple):
    """An evaluation: its metrics, sacreBLEU's signatures of the scores that have one, and a few answers."""

    metrics: Metrics
    signatures: list[str]
    samples: Sequence[Sample] = ()


class Batch(NamedTuple):
    """Packed rows, the only form in which data reaches a step.

    A row contains several examples, one after the other. Each is a *segment*, numbered 1, 2, ..., whose positions
    start at 0. Slots of segment 0 are padding.

    | field         | row with examples `[a b c]` and `[x y]`, of which only `c` and `y` are scored |
    | tokens_BL     |  a  b  x  0 |
    | targets_BL    |  b  c  y  0 |
    | weights_BL    |  0  1  1  0 |
    | segments_BL   |  1  1  2  0 |
    | positions_BL  |  0  1  0  0 |
    """

    tokens_BL: Int[Array, "B L"]
    targets_BL: Int[Array, "B L"]
    weights_BL: Float[Array, "B L"]
    segments_BL: Int[Array, "B L"]
    positions_BL: Int[Array, "B L"]


class GuardState(NamedTuple):
    """State of the guard that refuses bad updates (`training/guard.py`).

    skipped: steps so far whose update was not applied.
    streak: consecutive steps, up to now, with a loss, gradient or update that was not finite.
    losses_W, norms_W: ring buffers with the loss and gradient norm of the last finite steps.
    seen: finite steps so far.
    """

    skipped: Int[Array, ""]
    streak: Int[Array, ""]
    losses_W: Float[Array, " W"]
    norms_W: Float[Array, " W"]
    seen: Int[Array, ""]


class TrainState(NamedTuple):
    """Everything an optimizer step reads and writes. It contains only arrays, so it can be checkpointed as it is."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    guard: GuardState
    average: Any = ()
    """Exponential moving average of the parameters; () if none is kept."""


class HiddenAndHead(NamedTuple):
    """Final hidden states and the unembedding matrix.

    Lets the loss compute logits a tile at a time (fused linear cross-entropy).
    """

    hidden_BLD: Float[Array, "B L D"]
    head_VD: Float[Array, "V D"]
    softcap: Float[Array, ""] | None = None
    """Logits are `softcap * tanh(logit / softcap)`."""

    def logits(self) -> Float[Array, "B L V"]:
        """Compute `hidden @ head.T` in the dtype of the hidden states, accumulated and returned in float32."""
        head_VD = self.head_VD.astype(self.hidden_BLD.dtype)
        logits_BLV = jnp.einsum("BLD,VD->BLV", self.hidden_BLD, head_VD, preferred_element_type=jnp.float32)
        return logits_BLV if self.softcap is None else self.softcap * jnp.tanh(logits_BLV / self.softcap)


Names = tuple[str, ...]
"""Logical axis of each dim of an array. "" has no name and is never split."""


def _identity(x: Array, names: Names) -> Array:
    del names
    return x


def _same_function(function: Callable[..., Array], ins: tuple[Names, ...], out: Names) -> Callable[..., Array]:
    del ins, out
    return function


class ShardingHooks(NamedTuple):
    """How the model annotates shardings. On one device every hook is the identity.

    constrain: `constrain(x, names)` shards an activation by its logical axes.
    gather_param: `gather_param(x, names)` gathers a parameter along the axis that only its storage is sharded by. Its
        gradient is sharded like the stored parameter.
    shard_param: `shard_param(x, names)` shards a parameter or its gradient the way it is stored.
    shard_map: `shard_map(function, names_of_inputs, names_of_output)` runs the function on each device's shards.
    mesh_axes: `mesh_axes(name)` returns the mesh axes that split a logical axis, for collectives within `shard_map`.
    num_shards: `num_shards(name)` returns the number of shards of a logical axis.
    """

    constrain: Callable[[Array, Names], Array] = _identity
    gather_param: Callable[[Array, Names], Array] = _identity
    shard_param: Callable[[Array, Names], Array] = _identity
    shard_map: Callable[[Callable[..., Array], tuple[Names, ...], Names], Callable[..., Array]] = _same_function
    mesh_axes: Callable[[str], tuple[str, ...]] = lambda _name: ()
    num_shards: Callable[[str], int] = lambda _name: 1


SINGLE_DEVICE = ShardingHooks()
"""The hooks of one device. Compare with `==`: Flax rebuilds tuples among a module's fields."""


class Decoder(NamedTuple):
    """Decoding with a key/value cache.

    init_cache: `init_cache(batch_size, slots) -> cache`, empty.
    prepare: `prepare(params)`, parameters in the layout that `step` reads fastest; made once for many steps.
    step: `step(prepare(params), tokens_BL, positions_BL, cache) -> (logits or hidden states, cache)`. Keys and values
        are written to the slot of their position; positions of a row are consecutive, and a query attends to the slots
        up to its own position.
    """

    init_cache: Callable[[int, int], Any]
    prepare: Callable[[Params], Params]
    step: Callable[[Params, Int[Array, "B L"], Int[Array, "B L"], Any], tuple[Array | HiddenAndHead, Any]]


class Model(NamedTuple):
    """A language model as pure functions, like optax's GradientTransformation.

    init: `init(key) -> params`.
    apply: `apply(params, batch, dropout_key) -> logits_BLV`; `dropout_key=None` turns dropout off.
    axes: tree like params whose leaves are tuples of logical axis names, one a dim ("embed", "heads", ...; "" is never
        split). None keeps every parameter whole on every device.
    hidden: `hidden(params, batch, dropout_key)`, the output without its last matmul, where the model can give it.
    decoder: how it generates; None if it can only be trained.
    """

    init: Callable[[PRNGKeyArray], Params]
    apply: Callable[[Params, Batch, PRNGKeyArray | None], Float[Array, "B L V"]]
    axes: Any = None
    hidden: Callable[[Params, Batch, PRNGKeyArray | None], HiddenAndHead] | None = None
    decoder: Decoder | None = None

    @property
    def outputs(self) -> "Apply":
        """`hidden` if there is one, else `apply`: what a loss is computed from."""
        return self.hidden or self.apply

    @property
    def required_decoder(self) -> Decoder:
        """The decoder. Raises ValueError for a model that has none."""
        if self.decoder is None:
            raise ValueError("this model can't generate: give its Model a decoder, or leave out metrics of answers")
        return self.decoder


Apply = Callable[[Params, Batch, PRNGKeyArray | None], Array | HiddenAndHead]
"""`apply(params, batch, dropout_key)` returns logits_BLV, or the hidden states and head that produce them."""

LossFn = Callable[[Params, Batch, PRNGKeyArray | None], Sums]
"""`loss(params, batch, dropout_key)` returns sums over the batch: "objective", which is minimised after division by
"weight"; optionally "nll", "correct" and others, which are logged the same way."""


class TrackedStage(NamedTuple):
    """The stage that a tracker follows.

    name: name of the recipe. workdir, stage: where the run is, and the name of the stage.
    recipe: the recipe as in `recipe.json`.
    run_id: id of the tracker's run, the same whenever the stage resumes.
    folder: local folder for files of the tracker's own.
    sent: number of lines that the tracker has from earlier processes.
    """

    name: str
    workdir: Path
    stage: str
    recipe: dict[str, Any]
    run_id: str = ""
    folder: Path = Path()
    sent: int = 0


class Tracker(NamedTuple):
    """Receives what a stage logs, as a pair of functions. They are called in a thread; an exception is reported once,
    and training goes on.

    log: `log(step, kind, values)` receives a line of `metrics.jsonl`. Numbers that are not finite are NaN.
    close: `close(status)`; "finished", "interrupted" or "failed".
    buffers: whether a kill may lose what was logged. All lines since the last `close` are then logged again.
    """

    log: Callable[[int, str, dict[str, Any]], None]
    close: Callable[[str], None] = lambda _status: None
    buffers: bool = False


MakeTracker = Callable[[TrackedStage], Tracker]
"""Starts a tracker before the first step of a stage, or when the stage resumes."""


class Diverged(Exception):
    """Loss or gradients are no longer finite. The last good checkpoint is intact."""

    exit_code = 70


class Interrupted(Exception):
    """The run stopped on request and saved everything. Start it again to resume."""

    exit_code = 75
