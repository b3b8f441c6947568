"""Remote data files, gs://, s3://, https:// and hf://: copied to the local disk once, since most formats need a file.

A copy is used again as long as the remote file has the same size and version.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jaxstages.runtime.bucket import cache_base, check_free_space, open_file_system
from jaxstages.runtime.console import say
from jaxstages.runtime.files import acquire_lock, make_folder, read_json, rename_durably, write_json

VERSION_KEYS = (
    *("generation", "md5Hash", "blob_id", "ETag", "etag", "Content-MD5", "Digest"),
    *("mtime", "Last-Modified", "LastModified", "last_modified"),
)
"""Entries of fsspec's file descriptions that change with the content. The first that a description has is compared."""


def is_remote(name: str) -> bool:
    return re.match(r"(gs|s3|https?|hf)://", name) is not None


class RemoteFile(NamedTuple):
    """A remote file that was downloaded.

    name: name of the copy in this machine's cache folder. version: size and version of the remote file.
    """

    address: str
    name: str
    version: dict[str, str]

    @property
    def copy(self) -> Path:
        return cache_base() / "data" / self.name

    def fetch(self) -> Path:
        """Return the copy. It is downloaded again on a machine that has another version or none, such as a worker of a
        pipeline.

        Raises:
            ValueError: the remote file has changed since it was first downloaded.
            OSError: the local disk has too little space.
        """
        if not _has_version(self.copy, self.version):
            fs = open_file_system(self.address.partition("://")[0])
            info = fs.info(self.address)
            if _version(info) != self.version:
                raise ValueError(f"{self.address} has changed since the start; start again")
            check_free_space(self.copy, info.get("size") or 0, self.address)
            _download(fs, self.address, self.copy, info)
        return self.copy


@contextmanager
def errors_name_addresses(files: Sequence[RemoteFile]) -> Iterator[None]:
    """Raise each ValueError with the addresses of files in place of the paths of their copies."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for file in files:
            text = text.replace(str(file.copy), file.address)
        raise ValueError(text) from error


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

    files, missing = [], []
    for path, info in sorted(remote.items()):
        inner = path.partition("://")[2] if "://" in path else path
        file = RemoteFile(f"{scheme}://{inner}", f"{scheme}/{inner}", _version(info))
        files.append(file)
        if not _is_current(file.copy, info):
            missing.append((file, info))
    check_free_space(cache_base() / "data", sum(info.get("size") or 0 for _, info in missing), name)
    for file, info in missing:
        _download(fs, file.address, file.copy, info)
    return files


def _version(info: dict[str, Any]) -> dict[str, str]:
    """Return the size of a file, if it is known, and the strongest version that its description has."""
    keys = ["size", *[key for key in VERSION_KEYS if info.get(key) is not None][:1]]
    return {key: str(info[key]) for key in keys if info.get(key) is not None}


def _version_file(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.version.json")


def _has_version(copy: Path, version: dict[str, str]) -> bool:
    file = _version_file(copy)
    return copy.is_file() and file.is_file() and read_json(file) == version


def _is_current(copy: Path, info: dict[str, Any]) -> bool:
    """Return whether a copy is that of the remote file now. Without a version nobody can tell."""
    version = _version(info)
    return bool(version.keys() - {"size"}) and _has_version(copy, version)


def _download(fs: Any, address: str, copy: Path, info: dict[str, Any]) -> None:
    make_folder(copy.parent)
    with acquire_lock(copy.with_name(f"{copy.name}.lock"), wait=True):  # another run may be fetching the same file
        if _is_current(copy, info):
            return
        say(f"fetch {address}: {(info.get('size') or 0) / 1e6:.1f} MB")
        part = copy.with_name(f"{copy.name}.part")
        fs.get_file(address, str(part))
        if info.get("size") and part.stat().st_size != info["size"]:
            raise OSError(f"{address} has {info['size']} bytes, and {part.stat().st_size} came; start again")
        rename_durably(part, copy)
        write_json(_version_file(copy), _version(info))
