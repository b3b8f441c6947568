"""Chips that a recipe can be planned for, and how to get at them without having one.

Figures are the makers': Google Cloud's pages of TPU v5e, v5p and v6e, NVIDIA's data sheets of H100 and H200 (SXM).
"""

import os
import re
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """flops: dense bfloat16 a second. memory: bytes. bandwidth: of memory, bytes a second. link: bytes a second that a
    chip sends to its neighbours along one axis of the mesh, both ways of a TPU's ring together."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float


CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16e9, 0.82e12, 2 * 45e9),
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2.77e12, 2 * 90e9),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 1.64e12, 2 * 90e9),
    "h100": Chip("H100", 989e12, 80e9, 3.35e12, 450e9),
    "h200": Chip("H200", 989e12, 141e9, 4.8e12, 450e9),
}


class Topology(NamedTuple):
    """chip: None where nothing is known of the machine's speed. platform: what is compiled for."""

    asked: str
    devices: list[Any]
    chip: Chip | None
    platform: str


def topology_of(asked: str) -> Topology:
    """ "v5e:4x4" and the like (by libtpu, ahead of time), "h100:8", "h200:1" and "cpu:8" (compiled for so many devices
    of the CPU, which has no GPU's kernels), or "local", the devices that are here.

    Raises:
        ValueError: no such topology; JAX has its devices already, so that others can't be had; libtpu is missing.
    """
    if asked == "local":
        return Topology(asked, jax.devices(), _chip_of(jax.devices()[0]), jax.default_backend())
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", asked)
    if not match or match.group(1) not in (*CHIPS, "cpu"):
        raise ValueError(
            f"--topology={asked!r}: write local, cpu:8, h100:8, h200:1, v5e:4x4, v5p:4x4x4 or v6e:16x16; "
            f"known chips: {', '.join(CHIPS)}"
        )
    kind, size = match.groups()
    chip = CHIPS.get(kind)
    if kind.startswith("v"):
        return Topology(asked, _tpu(asked), chip, "tpu")
    if not size.isdigit():
        raise ValueError(f"--topology={asked!r}: write {kind}:N, a number of devices")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(size))
    if len(jax.devices()) != int(size):
        raise ValueError(f"--topology={asked!r}: JAX has {len(jax.devices())} devices already; unset XLA_FLAGS' number")
    return Topology(asked, jax.devices(), chip, "cpu")


def _tpu(asked: str) -> list[Any]:
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu looks for a TPU's metadata server, for minutes
    try:
        return list(topologies.get_topology_desc(asked, platform="tpu").devices)
    except Exception as error:  # libtpu is missing, or knows no such grid: it has no type of its own for that
        said = (str(error).splitlines() or [repr(error)])[0][:200]
        raise ValueError(
            f"--topology={asked}: {said}; it needs the extra `tpu` (pip install 'jaxstages[tpu]'), and a grid that the "
            "chip has: v5e and v6e 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16; v5p 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, ..."
        ) from error


def _chip_of(device: Any) -> Chip | None:
    kind = device.device_kind.lower()
    names = {
        "v5 lite": "v5e",
        "v5e": "v5e",
        "v5p": "v5p",
        "v6 lite": "v6e",
        "v6e": "v6e",
        "h100": "h100",
        "h200": "h200",
    }
    return next((CHIPS[name] for word, name in names.items() if word in kind), None)
