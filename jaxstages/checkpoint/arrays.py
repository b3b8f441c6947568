"""Arrays on disk through Orbax, written and read in chunks, so that little of them is in memory twice."""

import errno
import gc
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxstages.checkpoint.fingerprint import named_leaves, tree_of
from jaxstages.runtime.manifest import Damaged
from jaxstages.types import Params

WRITE_CHUNK_BYTES = 2**26
"""Bytes of an array that are written together."""

READ_BATCH_BYTES = 2**28
"""Bytes of parameters that are read together."""

ENVIRONMENT_ERRORS = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "CANCELLED", "ABORTED"),
    *(os.strerror(code) for code in (errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE)),
)
"""Substrings of errors caused by the machine or the connection, not by damaged files."""


def to_save(tree: Any) -> ocp.args.PyTreeSave:
    """Make Orbax's arguments for saving a tree.

    Large arrays are written in chunks: Orbax copies each chunk, and buffers each file until it is full.
    """

    def save_args(leaf: Any) -> ocp.SaveArgs:
        is_large = getattr(leaf, "nbytes", 0) > WRITE_CHUNK_BYTES
        return ocp.SaveArgs(chunk_byte_size=WRITE_CHUNK_BYTES if is_large else None)

    return ocp.args.PyTreeSave(tree, jax.tree.map(save_args, tree), ocdbt_target_data_file_size=2 * WRITE_CHUNK_BYTES)


def read_in_parts(folder: Path, target: Params) -> Params:
    """Read parameters a few at a time, the largest first: those that are being read are in memory twice."""
    leaves, restored = named_leaves(target), {}
    remaining = sorted(leaves, key=lambda path: leaves[path].size)
    while remaining:
        names = [remaining.pop()]
        while remaining and 4 * sum(leaves[name].size for name in (*names, remaining[-1])) <= READ_BATCH_BYTES:
            names.append(remaining.pop())
        part = read(folder, tree_of({name: leaves[name] for name in names}), part=True)
        restored |= named_leaves(jax.block_until_ready(part))  # only then is the second copy freed
        if remaining:
            gc.collect()
    return tree_of(restored)


def read(folder: Path, target: Any, part: bool = False) -> Any:
    """Read an item.

    Args:
        target: abstract arrays (shape, dtype, sharding).
        part: whether `target` is only a part of the item.

    Raises:
        Damaged: Orbax can't read it.
        OSError: it can't be read now, for a reason that is not in its files.
    """
    handler, arguments = ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(target)
    if part:
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        arguments = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            return checkpointer.restore(os.fspath(folder), args=arguments)
        except Exception as error:  # Orbax has no type of its own for unreadable data
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            if any(text in str(error) for text in ENVIRONMENT_ERRORS):
                raise OSError(f"{folder} can't be read now, start again later: {str(error)[:200]}") from error
            raise Damaged(f"{folder} is damaged, Orbax can't read it: {str(error)[:200]}") from error
