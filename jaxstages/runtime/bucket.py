"""Buckets: paths such as gs://BUCKET/FOLDER with the methods of `pathlib.Path` that a run needs, through fsspec.

A bucket differs from a disk. An object is written or replaced as a whole, and everyone sees it at once. There is no
rename, no append and no lock; folders are prefixes of names. A group of objects is complete when its last object, the
marker, exists. `create` writes only if the object is absent, and so decides between two writers.

`etils.epath` is not used for a run's own files: its `exists` answers False on any error, and a run that takes an error
of the network for a missing result trains a stage again.
"""

import base64
import contextlib
import fnmatch
import functools
import importlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

SCHEMES = ("gs", "s3")
"""Schemes of buckets that can be a workdir. The others of `PACKAGES` can be read."""

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
"""The package that fsspec needs for a scheme; in the extra `bucket`, and `hf` for the last one."""

GLOB_CHARACTERS = "*?["
"""Characters that fsspec and Orbax take for a pattern anywhere in a path."""

S3_LOGIN = ("ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "TokenRefreshRequired")
"""Codes of S3 for credentials that are wrong or expired."""

REQUEST_SECONDS = 300
"""Time for one request, after which it is sent again. gcsfs would wait forever."""

FREE_SHARE = 0.05
"""Share of a local disk that downloads leave free."""


class BucketPath(PurePosixPath):
    """A path in a bucket. Errors of storage are raised by every method, `exists` included."""

    __slots__ = ()

    def __str__(self) -> str:
        scheme, _, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}"

    def __fspath__(self) -> str:
        return str(self)

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self) -> "BucketPath":
        return self

    def exists(self) -> bool:
        return self._type() is not None

    def is_file(self) -> bool:
        return self._type() == "file"

    def is_dir(self) -> bool:
        return self._type() == "directory"

    def _type(self) -> str | None:
        try:
            return file_system(self).info(str(self))["type"]
        except FileNotFoundError:
            return None

    def iterdir(self) -> Iterator["BucketPath"]:
        """Raises FileNotFoundError if there is no object under this path."""
        names = {name.rstrip("/").rpartition("/")[2] for name in file_system(self).ls(str(self), detail=False)}
        yield from (self / name for name in sorted(names) if name)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Match the names of this folder's entries; a pattern has no slash."""
        try:
            yield from [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern)]
        except FileNotFoundError:
            return

    def read_bytes(self) -> bytes:
        return file_system(self).cat_file(str(self))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes) -> None:
        _write(self, content, "overwrite")

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object. Where there is none, S3 raises nothing."""
        try:
            file_system(self).rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: "BucketPath") -> "BucketPath":
        """Copy an object, then delete the original: a kill in between leaves both."""
        file_system(self).cp_file(str(self), str(target))
        self.unlink(missing_ok=True)
        return target


class Object(NamedTuple):
    """Size in bytes and checksum of an object, as its bucket states them."""

    size: int
    checksum: str


def is_bucket(path: Any) -> bool:
    return isinstance(path, BucketPath)


def bucket_path(address: str) -> BucketPath:
    """Parse gs://BUCKET/PREFIX or s3://BUCKET/PREFIX.

    Raises:
        ValueError: the scheme is not known, the package for it is missing, or there is no prefix.
    """
    scheme, _, rest = address.partition("://")
    if scheme not in SCHEMES or not address.startswith(f"{scheme}://"):
        raise ValueError(
            f"{address} is no local path, and no folder in a bucket that can be written to: those begin with gs:// or "
            "s3://; name one, or a mounted path. Data can also be read from https:// and hf://"
        )
    if not rest.strip("/").partition("/")[2]:
        raise ValueError(f"{address} names no folder in a bucket; write {scheme}://BUCKET/FOLDER")
    if bad := [character for character in GLOB_CHARACTERS if character in rest]:
        raise ValueError(f"{address} has {' '.join(bad)} in its name, which would be taken for a pattern; rename it")
    open_file_system(scheme)
    return BucketPath(f"{scheme}:/{rest.strip('/')}")


def file_system(path: Path | BucketPath | str) -> Any:
    """Return fsspec's file system for a path."""
    return open_file_system(str(path).partition(":")[0])


@functools.cache
def open_file_system(scheme: str) -> Any:
    """Return fsspec's file system of a scheme. Raises ValueError if a package is missing."""
    # gcsfs asks for the kind of each bucket, which needs rights that a run does not have to have.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("EPATH_USE_TF", "false")  # Orbax's paths: fsspec, also where TensorFlow is installed
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    if importlib.util.find_spec(PACKAGES[scheme]) is None or importlib.util.find_spec("fsspec") is None:
        extra = "hf" if scheme == "hf" else "bucket"
        raise ValueError(f"{scheme}:// needs {PACKAGES[scheme]}: pip install '.[{extra}]'")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises too, with a traceback
    fsspec = importlib.import_module("fsspec")
    # Listings that are kept would hide what another process, or Orbax, has written. Orbax's own file system is another
    # instance, so the default is changed.
    fsspec.config.conf.setdefault({"gs": "gcs"}.get(scheme, scheme), {})["use_listings_cache"] = False
    options = {"gs": {"requests_timeout": REQUEST_SECONDS}}.get(scheme, {})
    return fsspec.filesystem(scheme, use_listings_cache=False, **options)


def create(path: Path, content: bytes) -> bool:
    """Write an object only if there is none. Returns whether this call has written it.

    A request whose answer was lost is sent again, and then finds its own object: that counts as written.
    """
    try:
        _write(path, content, "create")
    except FileExistsError:
        return path.read_bytes() == content
    return True


def _write(path: Path | BucketPath, content: bytes, mode: str) -> None:
    with _not_found_is_no_bucket(path):
        file_system(path).pipe_file(str(path), content, mode=mode)


@contextlib.contextmanager
def _not_found_is_no_bucket(path: Path | BucketPath) -> Iterator[None]:
    """Name the bucket where only its absence can be the reason for a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError as error:
        name = "/".join(path.parts[:2]).replace(":/", "://")
        raise OSError(f"there is no bucket {name}; create the bucket, or correct its name") from error


def list_objects(folder: Path) -> dict[str, Object]:
    """Map the name of each object under a folder, relative to it, to its size and checksum. Empty if there is none."""
    prefix = str(folder).partition("://")[2] + "/"
    with _not_found_is_no_bucket(folder):
        entries = file_system(folder).find(str(folder), detail=True)
    return {
        name.removeprefix(prefix): Object(int(entry["size"]), _checksum(entry))
        for name, entry in entries.items()
        if name.startswith(prefix) and entry["type"] == "file"
    }


def _checksum(entry: dict[str, Any]) -> str:
    kinds = [("crc32c", "crc32c"), ("md5Hash", "md5"), ("ETag", "etag")]
    return next((f"{kind}:{entry[key]}" for key, kind in kinds if entry.get(key)), "")


def has_checksum(content: bytes, checksum: str) -> bool:
    """Return whether the content matches the checksum; True if this kind can't be computed here."""
    kind, _, value = checksum.partition(":")
    if kind != "crc32c":
        return True
    crc32c = importlib.import_module("google_crc32c")
    return base64.b64encode(crc32c.value(content).to_bytes(4, "big")).decode() == value


def read_objects(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Read several objects at once."""
    paths = [str(folder / name) for name in names]
    contents = file_system(folder).cat(paths) if paths else {}
    return {name: contents[path.partition("://")[2]] for name, path in zip(names, paths, strict=True)}


def remove(folder: Path, first: Sequence[str] = ()) -> None:
    """Delete all objects under a folder; those named `first`, such as a marker, before the others."""
    for name in first:
        (folder / name).unlink(missing_ok=True)
    names = [str(folder / name) for name in list_objects(folder)]
    if names:
        try:
            file_system(folder).rm(names)
        except FileNotFoundError:  # a request that was sent again finds them gone
            if list_objects(folder):
                raise


def copy(folder: Path, target: Path) -> None:
    """Copy all objects under a folder, within the bucket."""
    names = list_objects(folder)
    if names:
        file_system(folder).copy([str(folder / name) for name in names], [str(target / name) for name in names])


def move(folder: Path, target: Path, first: Sequence[str] = ()) -> None:
    """Copy all objects under a folder, then delete the originals, those named `first` before the others."""
    copy(folder, target)
    remove(folder, first)


def upload(local: Path, folder: Path, last: str, skip_same_size: bool = False) -> None:
    """Copy a local folder's files into a bucket. The file named `last` follows when all others are there.

    Args:
        skip_same_size: leave an object alone that is there with the size of the file.
    """
    present = list_objects(folder) if skip_same_size else {}
    files = sorted(path for path in local.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(local)): path.stat().st_size for path in files}
    names = [
        name for name, size in sizes.items() if name != last and (name not in present or present[name].size != size)
    ]
    if names:
        file_system(folder).put([str(local / name) for name in names], [str(folder / name) for name in names])
    (folder / last).write_bytes((local / last).read_bytes())


def download(folder: Path, local: Path, last: str = "") -> None:
    """Copy the objects under a folder into a local one. The object named `last`, if any, follows when all others are
    there.

    Raises:
        OSError: the local disk has too little space. Nothing is downloaded then.
    """
    objects = list_objects(folder)
    check_free_space(local, sum(entry.size for entry in objects.values()), str(folder))
    names = [name for name in objects if name != last]
    for name in names:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
    if names:
        file_system(folder).get([str(folder / name) for name in names], [str(local / name) for name in names])
    local.mkdir(parents=True, exist_ok=True)
    if last:
        temporary = local / f"{last}.tmp"
        temporary.write_bytes((folder / last).read_bytes())
        temporary.replace(local / last)


def check_free_space(local: Path, size: int, name: str) -> None:
    """Raises OSError if `size` bytes do not fit on the disk of a local folder."""
    existing = next(path for path in (local, *local.parents) if path.exists())
    disk = shutil.disk_usage(existing)
    if size > disk.free - FREE_SHARE * disk.total:
        raise OSError(
            f"{name} has {size / 1e9:.1f} GB, and {existing} has {disk.free / 1e9:.1f} GB free, of which "
            f"{FREE_SHARE * disk.total / 1e9:.1f} GB stay free; set XDG_CACHE_HOME to a larger disk"
        )


def local_copy(path: Path) -> Path:
    """Return the local folder that mirrors a path of a bucket, in the user's cache folder; a local path is its own."""
    if not is_bucket(path):
        return path
    return cache_base() / "buckets" / str(path).replace("://", "/")


def cache_base() -> Path:
    """Return the folder for copies of remote files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxstages"


def explain(error: BaseException) -> str:
    """Return one line about an error of storage, with a remedy; "" for any other error."""
    # s3fs raises built-in errors, such as FileNotFoundError for a missing bucket, with botocore's as the cause.
    cause = error.__cause__
    origin = cause if cause is not None and _package(cause) == "botocore" else error
    package = _package(origin)
    forbidden = type(error) is OSError and str(error).startswith("Forbidden: ")  # by gcsfs, for code 403
    package = "gcsfs" if forbidden else package
    if package not in {"gcsfs", "s3fs", "fsspec", "google", "aiohttp", "botocore", "aiobotocore", "requests"}:
        return ""
    text = " ".join(str(origin).split())[:300] or type(origin).__name__
    response = getattr(origin, "response", None)  # of S3, a dict; other packages have their own, or None
    code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    code = "403" if forbidden else str(getattr(origin, "code", None) or code)
    remedy = "check the network, and start again"
    unreachable = type(origin).__name__ == "TransportError"  # of google.auth
    if (package == "google" and not unreachable) or code in S3_LOGIN or code == "401" or "redentials" in text:
        login = "aws sso login" if package == "botocore" else "gcloud auth application-default login"
        remedy = f"the credentials are missing or expired; run `{login}`, or give the machine an account"
    elif code in ("403", "AccessDenied"):
        remedy = "the account may not use this bucket; let it read, write, list and delete objects there"
    elif code in ("404", "NoSuchBucket"):
        remedy = "create the bucket, or correct its name"
    elif code in ("429", "SlowDown") or code.startswith("5"):
        remedy = "the storage is overloaded or down; wait, and start again"
    return f"storage failed: {text}; {remedy}"


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]
