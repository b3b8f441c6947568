"""The words that every other file uses: Batch, TrainState, Model, Metrics.

Legend, the same in every file: B batch, L length, D width, H query heads, G key/value heads, K head dim,
F feed-forward, V vocab, N layers (stacked), S cache slots, R LoRA rank, E experts,
A accumulation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

Params = dict[str, Any]
"""Nested dict of arrays; a parameter's path is its keys joined by "/", such as `layers/attention/query/kernel`."""

Sums = dict[str, Array]
"""Reductions that are not divided yet: each "name" holds a sum over tokens, "weight" the sum to divide by."""

Metrics = dict[str, float]
"""Values for people and logs, already divided."""


class Report(NamedTuple):
    """An evaluation: its metrics, and sacreBLEU's signatures of the scores that have one."""

    metrics: Metrics
    signatures: list[str]


class Batch(NamedTuple):
    """Packed rows, the only form in which data reaches a step.

    A row holds several examples one after the other, each a *segment* that is numbered 1, 2, ... with
    positions that start again at 0. Slots of segment 0 are padding.

    | field         | row of two examples `[a b c]` and `[x y]`, only `c` and `y` trained on |
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
    """skipped: steps in all whose update was not applied. streak: steps in a row, up to now, that were not finite.
    losses_W, norms_W: of the last finite steps, a ring. seen: finite steps so far."""

    skipped: Int[Array, ""]
    streak: Int[Array, ""]
    losses_W: Float[Array, " W"]
    norms_W: Float[Array, " W"]
    seen: Int[Array, ""]


class TrainState(NamedTuple):
    """What one optimizer step reads and writes. Arrays only, so that it goes through a checkpoint as it is."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    guard: GuardState
    average: Any = ()
    """Exponential moving average of the parameters; () where there is none."""


class HiddenAndHead(NamedTuple):
    """What logits are made from, where they need not all exist at once."""

    hidden_BLD: Float[Array, "B L D"]
    head_VD: Float[Array, "V D"]
    softcap: Float[Array, ""] | None = None
    """Logits are `softcap * tanh(logit / softcap)`."""

    def logits(self) -> Float[Array, "B L V"]:
        """`hidden @ head.T`: float32 out of the hidden layer's own dtype, for the softmax needs the range."""
        head_VD = self.head_VD.astype(self.hidden_BLD.dtype)
        logits_BLV = jnp.einsum("BLD,VD->BLV", self.hidden_BLD, head_VD, preferred_element_type=jnp.float32)
        return logits_BLV if self.softcap is None else self.softcap * jnp.tanh(logits_BLV / self.softcap)


Names = tuple[str, ...]
"""The logical axis of each dim of an array; "" is one of no name, which is never split."""


class ShardingHooks(NamedTuple):
    """What a model says of which device holds what, while it computes. By default nothing, as on one device.

    activation: `activation(x, names)`, x split as its axes are.
    whole: `whole(x, names)`, a parameter as it is computed with: gathered along the axis that only its storage is split
        by.
    split: `split(x, names)`, a parameter, or its gradient, as it is stored.
    local: `local(function, names_of_inputs, names_of_output)`, the function with each device's parts of its arrays.
    axes: `axes(name)`, the axes of the mesh that split a logical axis, for collectives within `local`.
    parts: `parts(name)`, into how many parts they split it.
    """

    activation: Callable[[Array, Names], Array] = lambda x, _names: x
    whole: Callable[[Array, Names], Array] = lambda x, _names: x
    split: Callable[[Array, Names], Array] = lambda x, _names: x
    local: Callable[[Callable[..., Array], tuple[Names, ...], Names], Callable[..., Array]] = lambda f, _ins, _out: f
    axes: Callable[[str], tuple[str, ...]] = lambda _name: ()
    parts: Callable[[str], int] = lambda _name: 1


SINGLE_DEVICE = (
    ShardingHooks()
)  # one device; to be compared by ==, for Flax makes another of a tuple among a module's fields


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
"""`apply(params, batch, dropout_key)`: logits_BLV, or the hidden states and the head that they are made from."""


LossFn = Callable[[Params, Batch, PRNGKeyArray | None], Sums]
"""`loss(params, batch, dropout_key)`: sums over the batch, "objective" to minimize and "weight" to divide it by."""


class Diverged(Exception):
    """The numbers of the run are no longer finite; the last good checkpoint stands."""

    exit_code = 70


class Interrupted(Exception):
    """The run was asked to stop and has saved everything; starting it again goes on."""

    exit_code = 75
