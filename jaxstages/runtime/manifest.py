"""Manifests: sizes and SHA-256 of a folder's files in `MANIFEST.json`, which is written when the files are on disk."""

import concurrent.futures
import hashlib
import json
import shutil
import time
from pathlib import Path

from jaxstages.runtime.files import make_folder, put, sync

MANIFEST = "MANIFEST.json"

UNLISTED = (MANIFEST, f"{MANIFEST}.tmp", "_CHECKPOINT_METADATA", "commit_success.txt")
"""Files at the top of the folder that are not in the manifest: itself, and files that Orbax writes after it."""

STRAYS = (".DS_Store", "Thumbs.db", "desktop.ini", ".directory")
STRAY_PREFIXES = ("._", ".nfs", ".fuse_hidden")
"""Files that operating systems and file managers add. They do not count as a change of the folder."""


class Damaged(ValueError):
    """Files on disk differ from the files that were written."""


def write_manifest(folder: Path) -> None:
    """Sync every file and folder in `folder`, then write its manifest, which marks it as complete."""
    files = _files(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(_sha256, files.values())
        listed = {name: [files[name].stat().st_size, digest] for name, digest in zip(files, digests, strict=True)}
    for path in (*folder.rglob("*"), folder):
        sync(path)
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(listed), encoding="utf-8")
    put(temporary, folder / MANIFEST)


def check(folder: Path, hash_up_to: int | None = None) -> None:
    """Compare a folder with its manifest.

    Args:
        hash_up_to: size in bytes above which files are compared by size only; None hashes them all.

    Raises:
        Damaged: a file differs, is missing, or is not listed; the message names it.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder} is no folder")
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {str(name): (int(size), str(sha)) for name, (size, sha) in listed.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{folder} has no readable {MANIFEST}: {error}") from error
    files = _files(folder)
    if files.keys() != listed.keys():
        raise Damaged(f"{folder} is damaged: missing or unlisted are {', '.join(sorted(files.keys() ^ listed.keys()))}")
    for name, (size, digest) in listed.items():
        file = files[name]
        is_complete = file.is_file() and not file.is_symlink() and file.stat().st_size == size
        if not is_complete or ((hash_up_to is None or size <= hash_up_to) and _sha256(file) != digest):
            raise Damaged(f"{file} is damaged: it is not the file of {size} bytes that was written")


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
    shutil.move(path, target)
    reason_file = target.with_name(f"{target.name}.reason")
    reason_file.write_text(f"{reason}\n", encoding="utf-8")
    for changed in (reason_file, into, path.parent):
        sync(changed)
    return target
