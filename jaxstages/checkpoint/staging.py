"""Checkpoints in a bucket that Orbax can neither read nor write, s3:// (orbax#2739), by way of the local disk.

Orbax writes into a local folder, and the finished checkpoint is published from there. It is complete when its last
object, `COMMITTED`, is there, as in buckets that Orbax writes to itself. A checkpoint is read from a temporary copy.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxstages.runtime import bucket, manifest
from jaxstages.runtime.bucket import cache_base, is_bucket, local_copy
from jaxstages.runtime.files import make_folder, remove_tree
from jaxstages.runtime.lease import machine, runs_here
from jaxstages.runtime.manifest import COMMITTED, MANIFEST

ORBAX_SCHEME = "gs:"


def is_staged(folder: Path) -> bool:
    """Return whether a folder is in a bucket that Orbax can't write to."""
    return is_bucket(folder) and folder.parts[0] != ORBAX_SCHEME


def check_processes(workdir: Path, processes: int) -> None:
    """Raises ValueError if several processes would have to write one checkpoint through their local disks."""
    if is_staged(workdir) and processes > 1:
        raise ValueError(
            f"--workdir={workdir}: {processes} processes can't write a checkpoint there together, since Orbax can't "
            "write to this kind of bucket (orbax#2739); take gs://, or a folder that all hosts share"
        )


def orbax_folder(folder: Path) -> Path:
    """Return the folder that Orbax writes checkpoints to: `folder` itself, or its local copy if it is staged."""
    return local_copy(folder) if is_staged(folder) else folder


def publish(local: Path, folder: Path) -> None:
    """Copy a finished checkpoint into its bucket.

    Raises:
        OSError: an object's size differs from its file's.
    """
    bucket.upload(local, folder, last=MANIFEST)
    if missing := manifest.sizes(local).items() - manifest.sizes(folder).items():
        name, size = min(missing)
        raise OSError(f"{folder / name} is not the object of {size} bytes that was sent")
    manifest.write_manifest(folder)  # with the checksums of the bucket, in place of the local ones
    (folder / COMMITTED).write_bytes(b"")


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[Path]:
    """Yield a folder with the same content that Orbax can read, until the end of the block.

    Args:
        folder: a checkpoint, or an item of one.

    Raises:
        OSError: the local disk has too little space for a copy.
    """
    if not is_staged(folder):
        yield folder
        return
    copies = cache_base() / "reading"
    for left in copies.glob(f"{machine()}.*.*"):
        pid = left.name.split(".")[1]
        if pid.isdecimal() and not runs_here(int(pid)):  # it was killed
            remove_tree(left)
    make_folder(copies)
    own = Path(tempfile.mkdtemp(prefix=f"{machine()}.{os.getpid()}.", dir=copies))
    try:
        bucket.download(folder, own / folder.name)
        yield own / folder.name
    finally:
        remove_tree(own)
