"""Remote data files, gs://, s3://, https:// and hf://: copied to the local disk once, since most formats need a file.

A copy is used again as long as the remote file has the same size and version.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxstages.runtime.bucket import cache_base, check_free_space, open_file_system
from jaxstages.runtime.console import say
from jaxstages.runtime.files import acquire_lock, make_folder, read_json, rename_durably, write_json

VERSION_KEYS = ("generation", "ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified")
"""Entries of fsspec's file descriptions that change with the content."""


def is_remote(name: str) -> bool:
    return re.match(r"(gs|s3|https?|hf)://", name) is not None


class RemoteFile(NamedTuple):
    """A remote file and its copy on the local disk.

    version: size and version of the remote file that the copy was made from.
    """

    address: str
    copy: Path
    version: dict[str, str]

    def fetch(self) -> Path:
        """Return the copy. It is downloaded again on a machine that has none, such as a worker of a pipeline.

        Raises:
            ValueError: the remote file has changed since.
        """
        if not self.copy.exists():
            fs = open_file_system(self.address.partition("://")[0])
            info = fs.info(self.address)
            current = _version(info)
            if any(current[key] != self.version[key] for key in current.keys() & self.version.keys()):
                raise ValueError(f"{self.address} has changed since the start; start again")
            _download(fs, self.address, self.copy, info)
        return self.copy


def fetch(name: str) -> list[RemoteFile]:
    """Download the files that an address or a pattern names, in order, unless their copies are current.

    Raises:
        ValueError: no file matches, or the package for the address is missing.
        OSError: the local disk has too little space. Nothing is downloaded then.
    """
    scheme = name.partition("://")[0]
    fs = open_file_system(scheme)
    try:
        remote = {name: fs.info(name)} if scheme.startswith("http") else fs.glob(name, detail=True)
    except FileNotFoundError:
        remote = {}
    remote = {path: info for path, info in remote.items() if info["type"] == "file"}
    if not remote:
        raise ValueError(f"no file matches {name!r}; name an address or a pattern that does")

    folder = cache_base() / "data" / scheme
    copies = {path: folder / path.partition("://")[2] if "://" in path else folder / path for path in sorted(remote)}
    missing = [path for path in copies if not _is_current(copies[path], remote[path])]
    check_free_space(folder, sum(remote[path].get("size") or 0 for path in missing), name)
    for path in missing:
        _download(fs, path, copies[path], remote[path])
    return [
        RemoteFile(path if "://" in path else f"{scheme}://{path}", copy, _version(remote[path]))
        for path, copy in copies.items()
    ]


def _version(info: dict[str, Any]) -> dict[str, str]:
    return {key: str(info[key]) for key in ("size", *VERSION_KEYS) if info.get(key) is not None}


def _version_file(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.version.json")


def _is_current(copy: Path, info: dict[str, Any]) -> bool:
    file = _version_file(copy)
    return copy.is_file() and file.is_file() and read_json(file) == _version(info)


def _download(fs: Any, path: str, copy: Path, info: dict[str, Any]) -> None:
    make_folder(copy.parent)
    with acquire_lock(copy.with_name(f"{copy.name}.lock"), wait=True):  # another run may be fetching the same file
        if _is_current(copy, info):
            return
        say(f"fetch {path}: {(info.get('size') or 0) / 1e6:.1f} MB")
        part = copy.with_name(f"{copy.name}.part")
        fs.get_file(path, str(part))
        if info.get("size") and part.stat().st_size != info["size"]:
            raise OSError(f"{path} has {info['size']} bytes, and {part.stat().st_size} came; start again")
        rename_durably(part, copy)
        write_json(_version_file(copy), _version(info))
