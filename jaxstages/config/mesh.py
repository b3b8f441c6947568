"""Config of the device mesh and of the sharding rules."""

from dataclasses import dataclass, field

from jaxstages.config.setting import setting


@dataclass(kw_only=True, slots=True)
class RulesConfig:
    """Sharding rules: the mesh axes that split each logical axis of an array, outermost first. () replicates the dim on
    every device."""

    rows: tuple[str, ...] = ("data", "fsdp", "expert")
    """Rows of a batch."""
    length: tuple[str, ...] = ("context",)
    """Tokens of a row."""
    vocab: tuple[str, ...] = ("tensor",)
    """Vocabulary, in embedding, head and logits."""
    embed: tuple[str, ...] = ("fsdp",)
    """Width of the residual stream, in parameters, which are gathered along it before use."""
    heads: tuple[str, ...] = ("tensor",)
    """Query heads."""
    kv_heads: tuple[str, ...] = ("tensor",)
    """Key/value heads."""
    ff: tuple[str, ...] = ("tensor",)
    """Hidden units of the feed-forward."""
    expert: tuple[str, ...] = ("expert",)
    """Experts of a mixture."""


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Number of devices along each axis of the mesh.

    Devices that are neighbors along the last axes are close in the network. With several slices, only `data` crosses
    the slow network between them.
    """

    data: int = setting(-1, at_least=1, special=-1)
    """Data parallelism: splits rows and replicates parameters; -1 takes all devices that the other axes leave."""
    fsdp: int = setting(1, at_least=1, at_most=2**14)
    """Fully sharded data parallelism: splits rows, parameters and optimizer state (Zhao et al. 2023)."""
    expert: int = setting(1, at_least=1)
    """Expert parallelism: splits rows and the experts of a mixture."""
    context: int = setting(1, at_least=1, at_most=2**20)
    """Context parallelism: splits the tokens of a row, for long contexts; keys and values are gathered."""
    tensor: int = setting(1, at_least=1, at_most=2**14)
    """Tensor parallelism: splits heads, feed-forward and vocabulary (Shoeybi et al. 2019)."""
    rules: RulesConfig = field(default_factory=RulesConfig)
    """Mesh axes that split each logical axis."""
