"""Config of the device mesh and of the sharding rules."""

from dataclasses import dataclass, field

from jaxstages.config.setting import setting


@dataclass(kw_only=True, slots=True)
class RulesConfig:
    """Sharding rules: each logical axis of an array, and the mesh axes that split it, outermost first. () replicates
    the dim on every device."""

    rows: tuple[str, ...] = ("data", "fsdp", "expert")
    length: tuple[str, ...] = ("context",)
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)
    """The width of parameters. They are gathered along it before use."""
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    ff: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Number of devices along each axis of the mesh.

    Devices next to each other in the last axes are close in the network. With several slices, only `data` crosses the
    slow network between them.
    """

    data: int = setting(-1, at_least=1, special=-1)
    """Data parallelism: splits rows, replicates parameters; -1 takes all devices that the other axes leave."""
    fsdp: int = setting(1, at_least=1, at_most=2**14)
    """Fully sharded data parallelism: splits rows, parameters and optimizer state (Zhao et al. 2023)."""
    expert: int = setting(1, at_least=1)
    """Expert parallelism: splits rows, and the experts of a mixture."""
    context: int = setting(1, at_least=1, at_most=2**20)
    """Context parallelism: splits the tokens of a row, for long contexts; keys and values are gathered."""
    tensor: int = setting(1, at_least=1, at_most=2**14)
    """Tensor parallelism: splits heads, feed-forward and vocabulary (Shoeybi et al. 2019)."""
    rules: RulesConfig = field(default_factory=RulesConfig)
