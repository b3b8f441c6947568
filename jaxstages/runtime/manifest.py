"""Manifests: sizes and digests of a folder's files in `MANIFEST.json`, which is written when the files are complete.

On disk the digests are SHA-256. In a bucket they are the checksums that the bucket states for each object, so that
nothing has to be read back.
"""

import concurrent.futures
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxstages.runtime import bucket
from jaxstages.runtime.bucket import is_bucket
from jaxstages.runtime.files import make_folder, rename_durably, sync

MANIFEST = "MANIFEST.json"

UNLISTED = (MANIFEST, f"{MANIFEST}.tmp", "_CHECKPOINT_METADATA", "commit_success.txt")
"""Files at the top of the folder that are not in the manifest: itself, and files that Orbax writes after it."""

STRAYS = (".DS_Store", "Thumbs.db", "desktop.ini", ".directory")
STRAY_PREFIXES = ("._", ".nfs", ".fuse_hidden")
"""Files that operating systems and file managers add. They do not count as a change of the folder."""


COMMITTED = "commit_success.txt"
"""The object that Orbax writes last into a checkpoint in a bucket."""

SMALL_BYTES = 2**16
"""Objects up to this size are read and compared with their checksum."""


class Damaged(ValueError):
    """Files on disk differ from the files that were written."""


def write_manifest(folder: Path) -> None:
    """Sync every file and folder in `folder`, then write its manifest, which marks it as complete."""
    if is_bucket(folder):
        (folder / MANIFEST).write_text(json.dumps(_listed(bucket.list_objects(folder))))
        return
    files = _files(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(_sha256, files.values())
        listed = {name: [files[name].stat().st_size, digest] for name, digest in zip(files, digests, strict=True)}
    for path in (*folder.rglob("*"), folder):
        sync(path)
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(listed), encoding="utf-8")
    rename_durably(temporary, folder / MANIFEST)


def check(folder: Path, hash_up_to: int | None = None) -> None:
    """Compare a folder with its manifest.

    Args:
        hash_up_to: size in bytes above which files are compared by size only; None hashes them all. In a bucket, all
            are compared by the bucket's checksums, and the contents of files up to SMALL_BYTES with them.

    Raises:
        Damaged: a file differs, is missing, or is not listed; the message names it.
    """
    if is_bucket(folder):
        _check_in_bucket(folder)
        return
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder} is no folder")
    try:
        listed = _parse((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{folder} has no readable {MANIFEST}: {error}") from error
    files = _files(folder)
    _check_names(folder, files, listed)
    for name, (size, digest) in listed.items():
        file = files[name]
        is_complete = file.is_file() and not file.is_symlink() and file.stat().st_size == size
        if not is_complete or ((hash_up_to is None or size <= hash_up_to) and _sha256(file) != digest):
            raise Damaged(f"{file} is damaged: it is not the file of {size} bytes that was written")


def _check_in_bucket(folder: Path) -> None:
    """Compare the objects under a folder with its manifest. Raises Damaged, or errors of storage as they are."""
    try:
        listed = _parse((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{folder} has no readable {MANIFEST}: {error}") from error
    objects = _listed(bucket.list_objects(folder))
    _check_names(folder, objects, listed)
    for name, entry in listed.items():
        if objects[name] != entry:
            raise Damaged(f"{folder / name} is damaged: it is not the object of {entry[0]} bytes that was written")
    small = [name for name, (size, _) in listed.items() if size <= SMALL_BYTES]
    for name, content in bucket.read_objects(folder, small).items():
        if not bucket.has_checksum(content, listed[name][1]):
            raise Damaged(f"{folder / name} is damaged: its content has another checksum")


def _parse(content: bytes) -> dict[str, tuple[int, str]]:
    return {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(content).items()}


def _check_names(folder: Path, names: Mapping[str, Any], listed: Mapping[str, Any]) -> None:
    if names.keys() != listed.keys():
        raise Damaged(f"{folder} is damaged: missing or unlisted are {', '.join(sorted(names.keys() ^ listed.keys()))}")


def _listed(objects: dict[str, bucket.Object]) -> dict[str, tuple[int, str]]:
    """Return the objects of a folder that belong into its manifest."""
    return {name: (entry.size, entry.checksum) for name, entry in sorted(objects.items()) if name not in UNLISTED}


def sizes(folder: Path) -> dict[str, int]:
    """Map each file of a folder, without those that are added to it, to its size in bytes."""
    if is_bucket(folder):
        return {name: entry.size for name, entry in bucket.list_objects(folder).items()}
    return {name: path.stat().st_size for name, path in _files(folder).items()}


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    paths = (path for path in paths if path.name not in STRAYS and not path.name.startswith(STRAY_PREFIXES))
    return {name: path for path in sorted(paths) if (name := str(path.relative_to(folder))) not in UNLISTED}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quarantine(path: Path, into: Path, reason: str) -> Path:
    """Move a damaged folder into quarantine, and write the reason beside it. Returns its new path."""
    make_folder(into)
    target = into / f"{path.name}.{time.time_ns()}"
    if is_bucket(path):
        target.with_name(f"{target.name}.reason").write_text(f"{reason}\n")
        bucket.move(path, target, first=(COMMITTED,))
        return target
    shutil.move(path, target)
    reason_file = target.with_name(f"{target.name}.reason")
    reason_file.write_text(f"{reason}\n", encoding="utf-8")
    for changed in (reason_file, into, path.parent):
        sync(changed)
    return target
