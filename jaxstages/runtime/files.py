"""Files that are never half written: a kill, or a power cut, leaves the old one or the new one."""

import fcntl
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


def local_path(text: str, name: str) -> Path:
    """The path that a flag or a field names, with `~` as the home folder.

    Args:
        name: of the flag or field, such as "--workdir".

    Raises:
        ValueError: it is empty, or an address such as gs://BUCKET/PATH, which would become a local folder of that name.
    """
    if not text:
        raise ValueError(f"{name} is empty; name a path")
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+:)/", text):
        raise ValueError(
            f"{name}={text}: runs and files live on a local or mounted file system, and {scheme[1]} is none; name a "
            "local path, and copy what should be in a bucket there afterwards"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name}={text}: {error}; name another path") from error


def sync(path: Path) -> None:
    """fsync a file; or a folder, which makes the names in it last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(fresh: Path, path: Path) -> None:
    """Give a file that is whole its final name, for good."""
    sync(fresh)
    fresh.replace(path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for good."""
    fresh = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in fresh:
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    make_folder(path.parent)
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    put(fresh, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


Form = Mapping[str, tuple[type, ...]]
"""What a JSON object must have, and of which types; a bool is no int."""


def read_json(path: Path, form: Form | None = None) -> Any:
    """Raises ValueError, with the path, for a file that is missing, no JSON, or no object of that form."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    found = value if isinstance(value, dict) else {}
    if wrong := [name for name, types in (form or {}).items() if name not in found or type(found[name]) not in types]:
        raise ValueError(f"{path} is damaged, it lacks {', '.join(wrong)}, or has it in another form")
    return value


def acquire_lock(path: Path, wait: bool) -> IO[str]:
    """Lock a file for as long as what this returns is open; the end of the process, however it ends, frees it.

    Raises:
        BlockingIOError: another process, which the file names, has it, and `wait` is off.
    """
    make_folder(path.parent)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{os.uname().nodename} pid {os.getpid()}")
    file.flush()
    return file
