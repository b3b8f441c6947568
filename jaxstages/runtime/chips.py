"""Accelerators and their figures.

From Google Cloud's pages on TPU v5e, v5p and v6e, and from NVIDIA's data sheets of A100, H100 and H200 (SXM).
"""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """flops: dense bfloat16 FLOPs per second.
    memory: bytes.
    bandwidth: memory bandwidth, bytes per second.
    link: bytes per second that a chip sends to its neighbours along one mesh axis, both directions of a TPU's ring.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float


CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16e9, 0.82e12, 2 * 45e9),
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2.77e12, 2 * 90e9),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 1.64e12, 2 * 90e9),
    "a100": Chip("A100", 312e12, 80e9, 2.04e12, 300e9),
    "a100_40gb": Chip("A100 40GB", 312e12, 40e9, 1.56e12, 300e9),
    "h100": Chip("H100", 989e12, 80e9, 3.35e12, 450e9),
    "h200": Chip("H200", 989e12, 141e9, 4.8e12, 450e9),
}


def chip_of(device: Any) -> Chip | None:
    """Return the chip of one of `jax.devices()`; None if its figures are not known, as for a CPU."""
    kind = device.device_kind.lower()
    names = {
        "v5 lite": "v5e",
        "v5e": "v5e",
        "v5p": "v5p",
        "tpu v5": "v5p",
        "v6 lite": "v6e",
        "v6e": "v6e",
        "a100-sxm4-40gb": "a100_40gb",
        "a100-pcie-40gb": "a100_40gb",
        "a100": "a100",
        "h100": "h100",
        "h200": "h200",
    }
    return next((CHIPS[key] for word, key in names.items() if word in kind), None)
