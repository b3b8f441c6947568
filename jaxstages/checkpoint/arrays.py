"""Arrays on disk, by Orbax: written and read in pieces, so that little of them is in memory twice."""

import gc
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxstages.checkpoint.fingerprint import named_leaves, tree_of
from jaxstages.runtime.manifest import Damaged
from jaxstages.types import Params

PIECE, AT_ONCE = 2**26, 2**28
"""Bytes of an array that are written as one, and of parameters that are read at once."""


def to_save(tree: Any) -> ocp.args.PyTreeSave:
    """Large arrays are written in pieces: Orbax holds each that it writes, and each file until it is full, packed."""
    save_args = jax.tree.map(
        lambda leaf: ocp.SaveArgs(chunk_byte_size=PIECE if getattr(leaf, "nbytes", 0) > PIECE else None), tree
    )
    return ocp.args.PyTreeSave(tree, save_args, ocdbt_target_data_file_size=2 * PIECE)


def read_in_parts(folder: Path, target: Params) -> Params:
    """Parameters, the largest first, and a few at a time: those in flight are held twice."""
    leaves, found = named_leaves(target), {}
    left = sorted(leaves, key=lambda path: leaves[path].size)
    while left:
        names = [left.pop()]
        while left and 4 * sum(leaves[name].size for name in (*names, left[-1])) <= AT_ONCE:
            names.append(left.pop())
        part = read(folder, tree_of({name: leaves[name] for name in names}), part=True)
        found |= named_leaves(jax.block_until_ready(part))  # until then, what was read stays beside its copy
        if left:
            gc.collect()
    return tree_of(found)


def read(folder: Path, target: Any, part: bool = False) -> Any:
    handler, wanted = ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(target)
    if part:
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        wanted = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            return checkpointer.restore(folder, args=wanted)
        except Exception as error:  # Orbax has no type of its own for what can't be read
            raise Damaged(f"{folder} is damaged, Orbax can't read it: {str(error)[:200]}") from error
