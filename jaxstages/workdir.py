"""The folder of a run: where things lie, and one run at a time."""

import time
from pathlib import Path
from typing import IO

from jaxstages.disk import hold


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
        ValueError: another process, which is named, holds it.
    """
    try:
        return hold(workdir / "LOCK", wait=False)
    except BlockingIOError as error:
        time.sleep(0.1)  # who has just got it is about to write its name over that of the one before
        holder = (workdir / "LOCK").read_text(encoding="utf-8") or "another process"
        raise ValueError(f"{workdir} is in use by {holder}; wait for it, or take another --workdir") from error
