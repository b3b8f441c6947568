"""Topologies of devices to plan for, and to compile for on a machine without them."""

import os
import re
from typing import Any, NamedTuple

import jax

from jaxstages.runtime.chips import CHIPS, Chip, chip_of


class Topology(NamedTuple):
    """Devices to compile for.

    name: as in --topology.
    chip: None if the machine's speed is not known.
    platform: to compile for.
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    platform: str


def topology_of(name: str) -> Topology:
    """Return the topology with a name: a TPU slice such as "v5e:4x4" (compiled by libtpu, ahead of time), "h100:8",
    "h200:1" or "cpu:8" (compiled for as many CPU devices, without the kernels of a GPU), or "local", this machine.

    Raises:
        ValueError: no such topology, libtpu is missing, or JAX has already started with other devices.
    """
    if name == "local":
        return Topology(name, jax.devices(), chip_of(jax.devices()[0]), jax.default_backend())
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match.group(1) not in (*CHIPS, "cpu"):
        raise ValueError(
            f"--topology={name!r}: write local, cpu:8, h100:8, h200:1, v5e:4x4, v5p:4x4x4 or v6e:16x16; "
            f"known chips: {', '.join(CHIPS)}"
        )
    kind, size = match.groups()
    chip = CHIPS.get(kind)
    if kind.startswith("v"):
        return Topology(name, _tpu(name), chip, "tpu")
    if not size.isdigit():
        raise ValueError(f"--topology={name!r}: write {kind}:N, a number of devices")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(size))
    if len(jax.devices()) != int(size):
        raise ValueError(
            f"--topology={name!r}: JAX has {len(jax.devices())} devices already; unset their number in XLA_FLAGS"
        )
    return Topology(name, jax.devices(), chip, "cpu")


def _tpu(name: str) -> list[Any]:
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu searches for a metadata server for minutes
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # libtpu is missing, or has no such grid; it raises no type of its own
        message = (str(error).splitlines() or [repr(error)])[0][:200]
        raise ValueError(
            f"--topology={name}: {message}; it needs the extra `tpu` (pip install '.[tpu]'), and a grid that "
            "exists: v5e and v6e 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16; v5p 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, ..."
        ) from error
