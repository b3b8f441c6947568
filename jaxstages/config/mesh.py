"""The recipe's part on which device holds what."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class RulesConfig:
    """Logical axis of an array's dim -> the axes of the mesh that split it, the outermost first; () keeps it whole on
    every device."""

    rows: tuple[str, ...] = ("data", "fsdp", "expert")
    length: tuple[str, ...] = ("context",)
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)
    """Of parameters, which are whole along it while they are computed with."""
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    ff: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 (one axis at most) takes what is left.

    Devices that are next to each other in the last axes are near each other; over several slices `data` alone crosses
    the slow network between them.
    """

    data: int = -1
    """Rows; every device has all parameters."""
    fsdp: int = 1
    """Rows, and each parameter with its optimizer state (Zhao et al. 2023)."""
    expert: int = 1
    """Rows, and the experts of a mixture."""
    context: int = 1
    """The tokens of a row, for long contexts: keys and values are gathered."""
    tensor: int = 1
    """Heads, feed-forward and vocabulary (Shoeybi et al. 2019)."""
    rules: RulesConfig = field(default_factory=RulesConfig)
