"""The folder of a run: where things lie, JSON that is never half written, and one run at a time."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any


def write_json(path: Path, value: Any) -> None:
    """Write it whole or not at all: a kill in between leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".tmp{os.getpid()}")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_json(path: Path) -> Any:
    """Raises ValueError, with the path, for a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def tokenizer_file(workdir: Path) -> Path:
    return workdir / "tokenizer" / "tokenizer.json"


def checkpoints_folder(stage_dir: Path) -> Path:
    return stage_dir / "checkpoints"


def result_file(stage_dir: Path) -> Path:
    return stage_dir / "result.json"


def lock(workdir: Path) -> IO[str]:
    """Keep other runs out of `workdir` for as long as the file that this returns is open (also after a kill).

    Raises:
        ValueError: another process, which is named, holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / "LOCK").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read()
        file.close()
        raise ValueError(f"{workdir} is in use by {holder}; wait for it, or take another --workdir") from error
    file.truncate(0)
    file.write(f"{os.uname().nodename} pid {os.getpid()}")
    file.flush()
    return file
