"""The workdir of a run: its layout, and the lock that admits one process at a time."""

import os
import time
from pathlib import Path
from typing import IO

from jaxstages.config import CHECKPOINTED_STAGES
from jaxstages.runtime.bucket import GLOB_CHARACTERS, is_bucket
from jaxstages.runtime.files import acquire_lock, parse_path
from jaxstages.runtime.lease import Lease
from jaxstages.runtime.manifest import COMMITTED


def check_workdir(workdir: Path) -> None:
    """Raises ValueError for a path that can't be a workdir. Nothing is written."""
    if is_bucket(workdir):
        return
    parse_path(str(workdir), "--workdir")
    try:
        existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"--workdir={str(workdir)[:100]}: {error.strerror}; name another folder") from error
    if not existing.is_dir():
        raise ValueError(f"--workdir={workdir}: {existing} is no folder; name another")
    check_readable(workdir)


def check_readable(folder: Path) -> None:
    """Raises ValueError for a folder from which no checkpoint could be read."""
    if bad := [character for character in GLOB_CHARACTERS if character in str(folder.absolute())]:
        raise ValueError(
            f"{folder.absolute()} has {' '.join(bad)} in its path, and checkpoints could not be read back from there; "
            "rename the folder, or name another"
        )


def writable(workdir: Path) -> bool:
    """Return whether this process may write to the workdir, or create it. Of a bucket it is not known beforehand."""
    if is_bucket(workdir):
        return True
    return os.access(next(path for path in (workdir, *workdir.absolute().parents) if path.exists()), os.W_OK)


def tokenizer_file(workdir: Path) -> Path:
    return workdir / "tokenizer" / "tokenizer.json"


def checkpoints_folder(stage_dir: Path) -> Path:
    return stage_dir / "checkpoints"


def checkpoint_folder(stage_dir: Path, step: int) -> Path:
    return checkpoints_folder(stage_dir) / str(step)


def quarantine_folder(stage_dir: Path) -> Path:
    """Folder of damaged checkpoints, each with its reason."""
    return stage_dir / "quarantine"


def result_file(stage_dir: Path) -> Path:
    return stage_dir / "result.json"


def lock(workdir: Path) -> IO[str] | Lease:
    """Lock the workdir until the returned file, or lease, is closed, or the process ends.

    Raises:
        ValueError: another process, named in the message, has the lock; or the path can't be a workdir.
    """
    check_workdir(workdir)
    if is_bucket(workdir):
        return Lease(workdir)
    try:
        return acquire_lock(workdir / "LOCK", wait=False)
    except BlockingIOError as error:
        time.sleep(0.1)  # a process that has just got the lock is about to write its name
        holder = (workdir / "LOCK").read_text(encoding="utf-8") or "another process"
        raise ValueError(f"{workdir} is in use by {holder}; wait for it, or take another --workdir") from error


def steps_of(stage_dir: Path) -> list[int]:
    """List the steps of a stage's checkpoints, without unfinished ones. Their content is not checked."""
    folder = checkpoints_folder(stage_dir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
    # On a disk, a checkpoint gets its name when it is complete. A bucket has no rename, and a last object instead.
    return [step for step in steps if not is_bucket(folder) or (folder / str(step) / COMMITTED).exists()]


def begun_stages(workdir: Path) -> list[str]:
    """Return the names of the stages that have saved anything in a workdir, extra ones last."""
    folders = sorted(workdir.iterdir()) if workdir.is_dir() else []
    names = [folder.name for folder in folders if folder.is_dir() and has_begun(folder)]
    order = {name: index for index, name in enumerate(CHECKPOINTED_STAGES)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def has_begun(stage_dir: Path) -> bool:
    """Return whether anything of this stage has been saved. Until then its recipe may change."""
    return bool(steps_of(stage_dir)) or result_file(stage_dir).exists()
