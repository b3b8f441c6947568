"""The folder of a run: where things lie, and one run at a time."""

import os
import time
from pathlib import Path
from typing import IO

from jaxstages.config import CHECKPOINTED_STAGES
from jaxstages.runtime.files import acquire_lock, local_path

PATTERN = "*?["
"""Characters that the library of checkpoints takes for a pattern wherever they stand in a path: it would find nothing
that it has written."""


def check_workdir(workdir: Path) -> None:
    """Raises ValueError for a path in which a run can't live; nothing is written."""
    local_path(str(workdir), "--workdir")
    try:
        there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, for one
        raise ValueError(f"--workdir={str(workdir)[:100]}: {error.strerror}; name another folder") from error
    if not there.is_dir():
        raise ValueError(f"--workdir={workdir}: {there} is no folder; name another")
    check_readable(workdir)


def check_readable(folder: Path) -> None:
    """Raises ValueError for a folder out of which no checkpoint could be read."""
    if odd := [character for character in PATTERN if character in str(folder.absolute())]:
        raise ValueError(
            f"{folder.absolute()} has {' '.join(odd)} in its path, and checkpoints could not be read back from there; "
            "rename the folder, or name another"
        )


def writable(workdir: Path) -> bool:
    """May this process write there, or make it?"""
    return os.access(next(path for path in (workdir, *workdir.absolute().parents) if path.exists()), os.W_OK)


def tokenizer_file(workdir: Path) -> Path:
    return workdir / "tokenizer" / "tokenizer.json"


def checkpoints_folder(stage_dir: Path) -> Path:
    return stage_dir / "checkpoints"


def checkpoint_folder(stage_dir: Path, step: int) -> Path:
    return checkpoints_folder(stage_dir) / str(step)


def quarantine_folder(stage_dir: Path) -> Path:
    """Where damaged checkpoints are moved to, each with its reason."""
    return stage_dir / "quarantine"


def result_file(stage_dir: Path) -> Path:
    return stage_dir / "result.json"


def lock(workdir: Path) -> IO[str]:
    """Keep other runs out of `workdir` for as long as the file that this returns is open (also after a kill).

    Raises:
        ValueError: another process, which is named, holds it; or no run can live there.
    """
    check_workdir(workdir)
    try:
        return acquire_lock(workdir / "LOCK", wait=False)
    except BlockingIOError as error:
        time.sleep(0.1)  # who has just got it is about to write its name over that of the one before
        holder = (workdir / "LOCK").read_text(encoding="utf-8") or "another process"
        raise ValueError(f"{workdir} is in use by {holder}; wait for it, or take another --workdir") from error


def steps_of(stage_dir: Path) -> list[int]:
    """Steps that a stage has a checkpoint of, or what looks like one; unfinished ones are not among them."""
    folder = checkpoints_folder(stage_dir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def begun_stages(workdir: Path) -> list[str]:
    """Return the names of the stages that have saved anything in a workdir, extra ones last."""
    folders = sorted(workdir.iterdir()) if workdir.is_dir() else []
    names = [folder.name for folder in folders if folder.is_dir() and has_begun(folder)]
    order = {name: index for index, name in enumerate(CHECKPOINTED_STAGES)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def has_begun(stage_dir: Path) -> bool:
    """Return whether anything of this stage has been saved. A stage that never saved binds nobody to its recipe."""
    return bool(steps_of(stage_dir)) or result_file(stage_dir).exists()
