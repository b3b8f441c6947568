"""Atomic files and locks: after a kill or a power cut, a file has its old content or its new one.

A path is local, or in a bucket (`bucket.py`), where an object is atomic by itself.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from jaxstages.runtime import bucket
from jaxstages.runtime.bucket import bucket_path, is_bucket


def parse_path(text: str, name: str) -> Path:
    """Parse a local path, with `~` for the home folder, or the address of a folder in a bucket, gs://BUCKET/FOLDER.

    Args:
        name: name of the flag or field that has the path, such as "--workdir".

    Returns a `Path`, or a `BucketPath`, which has the methods that are used here.

    Raises:
        ValueError: the path is empty, or the address is none of a bucket.
    """
    if not text:
        raise ValueError(f"{name} is empty; name a path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        try:
            return cast(Path, bucket_path(text))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name}={text}: {error}; name another path") from error


def local_path(text: str, name: str) -> Path:
    """Parse a path as `parse_path`. Raises ValueError for an address, which would become a local folder of that
    name."""
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+:)/", text):
        raise ValueError(f"{name}={text}: a local path is wanted, and {scheme[1]} is an address; name a local path")
    return parse_path(text, name)


def sync(path: Path) -> None:
    """fsync a file, or a folder, which makes the names in it durable. Objects in a bucket are durable."""
    if is_bucket(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename a complete file to its final name, durably."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably. A bucket has no folders."""
    if is_bucket(folder):
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    if is_bucket(path):
        path.write_text(text)
        return
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    rename_durably(temporary, path)


def remove_tree(folder: Path) -> None:
    """Remove a folder and everything in it, if it is there."""
    if is_bucket(folder):
        bucket.remove(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a local file. The target is complete, or not there."""
    if is_bucket(target):
        target.write_bytes(source.read_bytes())
        return
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.copyfile(source, temporary)
    rename_durably(temporary, target)


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
