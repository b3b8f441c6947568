"""Proof of a folder's files: sizes and SHA-256 in `MANIFEST.json`, written when all else is on disk."""

import concurrent.futures
import hashlib
import json
import shutil
import time
from pathlib import Path

from jaxstages.runtime.files import make_folder, put, sync

MANIFEST = "MANIFEST.json"

UNLISTED = (MANIFEST, f"{MANIFEST}.tmp", "_CHECKPOINT_METADATA", "commit_success.txt")
"""At the top of the folder, and not in the manifest: itself, and what Orbax still writes after it."""


STRAYS = (".DS_Store", "Thumbs.db", "desktop.ini", ".directory")
STRAY_PREFIXES = ("._", ".nfs", ".fuse_hidden")
"""Files that systems put beside others: whoever looked at a folder in a file manager has not changed it."""


class Damaged(ValueError):
    """What lies on disk is not what was written there."""


def write_manifest(folder: Path) -> None:
    """Sync every file and folder in `folder`, and then list the files in its manifest, which makes it whole."""
    files = _files(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(_sha256, files.values())
        listed = {name: [files[name].stat().st_size, digest] for name, digest in zip(files, digests, strict=True)}
    for path in (*folder.rglob("*"), folder):
        sync(path)
    fresh = folder / f"{MANIFEST}.tmp"
    fresh.write_text(json.dumps(listed), encoding="utf-8")
    put(fresh, folder / MANIFEST)


def check(folder: Path, hash_up_to: int | None = None) -> None:
    """Compare a sealed folder with its manifest.

    Args:
        hash_up_to: larger files are compared by size only (bytes); None hashes them all.

    Raises:
        Damaged: a file differs, is missing, or is not listed; it says which.
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
        whole = file.is_file() and not file.is_symlink() and file.stat().st_size == size
        if not whole or ((hash_up_to is None or size <= hash_up_to) and _sha256(file) != digest):
            raise Damaged(f"{file} is damaged: it is not the file of {size} bytes that was written")


def _files(folder: Path) -> dict[str, Path]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    found = (path for path in found if path.name not in STRAYS and not path.name.startswith(STRAY_PREFIXES))
    return {name: path for path in sorted(found) if (name := str(path.relative_to(folder))) not in UNLISTED}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quarantine(path: Path, into: Path, reason: str) -> Path:
    """Move something damaged out of the way, and write down beside it why."""
    make_folder(into)
    kept = into / f"{path.name}.{time.time_ns()}"
    shutil.move(path, kept)
    kept.with_name(f"{kept.name}.reason").write_text(f"{reason}\n", encoding="utf-8")
    for folder in (kept.with_name(f"{kept.name}.reason"), into, path.parent):
        sync(folder)
    return kept
