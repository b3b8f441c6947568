"""Atomic files and locks: after a kill or a power cut, a file has its old content or its new one."""

import fcntl
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


def local_path(text: str, name: str) -> Path:
    """Parse the path of a flag or a config field, with `~` for the home folder.

    Args:
        name: name of the flag or field, such as "--workdir".

    Raises:
        ValueError: the path is empty, or an address such as gs://BUCKET/PATH, which would become a local folder of that
            name.
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
    """fsync a file, or a folder, which makes the names in it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(temporary: Path, path: Path) -> None:
    """Rename a complete file to its final name, durably."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    put(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


Fields = Mapping[str, tuple[type, ...]]
"""Required fields of a JSON object -> their types; a bool is no int."""


def read_json(path: Path, required: Fields | None = None) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is missing, is no JSON, or lacks a required field; the message has the path.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    fields = value if isinstance(value, dict) else {}
    wrong = [name for name, types in (required or {}).items() if name not in fields or type(fields[name]) not in types]
    if wrong:
        raise ValueError(f"{path} is damaged, it lacks {', '.join(wrong)}, or has it in another form")
    return value


def acquire_lock(path: Path, wait: bool) -> IO[str]:
    """Lock a file until the returned file is closed. The end of the process, however it ends, releases the lock.

    Args:
        wait: whether to wait for another process that has the lock.

    Raises:
        BlockingIOError: another process, which the file names, has the lock, and `wait` is off.
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
