"""Buckets: paths, manifests, leases, copies of data, and one line for every error of storage."""

import dataclasses
import functools
import http.server
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jaxstages.cli.main import main
from jaxstages.data import remote
from jaxstages.data.sources import open_source
from jaxstages.runtime import bucket, lease, manifest
from jaxstages.runtime.bucket import BucketPath, bucket_path, is_bucket
from jaxstages.runtime.files import copy_file, local_path, parse_path, remove_tree, write_json
from jaxstages.runtime.lease import RELEASED, Lease
from tests import emulator


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketPath:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return emulator.folder(tmp_path)


@pytest.fixture(params=["gs", "s3"])
def either(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder in either kind of bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return emulator.folder(tmp_path, request.param)


def test_a_path_is_local_or_in_a_bucket(folder: BucketPath) -> None:
    path: Any = parse_path("gs://bucket/runs/a/", "--workdir")
    assert str(path / "b.json") == "gs://bucket/runs/a/b.json" == os.fspath(path / "b.json")
    assert is_bucket(path) and is_bucket(path.parent) and is_bucket(path.with_name("c"))
    assert path.absolute() == path == bucket_path("gs://bucket/runs/a") and path.name == "a"
    assert parse_path("~/a", "--workdir") == Path.home() / "a"
    for address, words in {
        "gs://bucket": "names no folder in a bucket",
        "ftp://host/a": "is no local path, and no folder in a bucket",
        "hf://bucket/a": "those begin with gs:// or s3://",
        "gs://bucket/a*": "would be taken for a pattern",
        "https://host/a": "is no local path",
        "file:///a/b": "is no local path",
        "gs:/bucket/a": "is no local path",
    }.items():
        with pytest.raises(ValueError, match=f"--workdir: {address}.*{words}"):
            parse_path(address, "--workdir")
    with pytest.raises(ValueError, match="--out=gs://bucket/a: a local path is wanted"):
        local_path("gs://bucket/a", "--out")


def test_objects(either: Any, tmp_path: Path) -> None:
    assert not either.exists() and not either.is_dir() and [*either.glob("*")] == []
    with pytest.raises(FileNotFoundError):
        [*either.iterdir()]
    write_json(either / "a.json", {"é": 1})
    (either / "inner" / "b.txt").write_text("b")
    assert json.loads((either / "a.json").read_text()) == {"é": 1}
    assert [path.name for path in either.iterdir()] == ["a.json", "inner"]
    assert either.is_dir() and (either / "inner").is_dir() and (either / "a.json").is_file()
    assert [path.name for path in either.glob("*.json")] == ["a.json"]
    assert bucket.list_objects(either).keys() == {"a.json", "inner/b.txt"}
    # A listing by prefix would take the second for a part of the first.
    assert bucket.list_objects(either / "inn") == {}
    assert (either / "a.json").rename(either / "c.json").exists() and not (either / "a.json").exists()
    (tmp_path / "d").write_text("d")
    copy_file(tmp_path / "d", either / "d")
    bucket.move(either / "inner", either / "moved")
    assert bucket.list_objects(either).keys() == {"c.json", "d", "moved/b.txt"}
    remove_tree(either)
    remove_tree(either)
    assert not either.exists()
    if str(either).startswith("gs:"):  # S3 does not tell
        with pytest.raises(FileNotFoundError):
            (either / "d").unlink()


def test_an_error_of_storage_is_no_missing_file(folder: BucketPath) -> None:
    """`fsspec` and `epath` answer False: a stage whose result can't be looked at would be trained again."""
    (folder / "result.json").write_text("{}")
    with emulator.failing(emulator.start(), 1.0, ("403",)), pytest.raises(OSError, match="Forbidden"):
        (folder / "result.json").exists()
    assert (folder / "result.json").exists()


def test_faults_that_pass_are_retried(folder: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_sleep(_: float) -> None: ...

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", no_sleep)
    proxy = emulator.start()
    with emulator.failing(proxy, 0.3, ("429", "500", "503", "reset", "slow")):
        for number in range(40):
            (folder / f"{number}").write_text(str(number))
            assert (folder / f"{number}").read_text() == str(number)
        assert len([*folder.iterdir()]) == 40
    assert sum(proxy.counts[kind] for kind in emulator.FAULTS) > 10


def test_create_decides_between_two_writers(either: Any) -> None:
    path: Any = either / "a"
    written: list[int] = []

    def write(number: int) -> None:
        written.extend([number] * bucket.create(path, b"%d" % number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(written) == 1 and path.read_text() == str(written[0])
    assert bucket.create(path, path.read_bytes()), "its own, sent again"
    assert not bucket.create(path, b"another")


def test_a_manifest_notices_every_change(either: Any) -> None:
    contents = {"meta/metadata": b"{}", "params/d/1": os.urandom(200_000), "params/d/2": b"abc"}
    for name, content in contents.items():
        (either / name).write_bytes(content)
    manifest.write_manifest(either)
    manifest.check(either)
    assert manifest.sizes(either)["params/d/1"] == 200_000
    for name, content in contents.items():
        for other in (content[:-1], b"", bytes(len(content)), contents["meta/metadata"] + b" "):
            (either / name).write_bytes(other)
            with pytest.raises(manifest.Damaged, match=name):
                manifest.check(either)
        (either / name).unlink()
        with pytest.raises(manifest.Damaged, match=f"missing or unlisted are {name}"):
            manifest.check(either)
        (either / name).write_bytes(content)
    (either / "more").write_bytes(b"")
    with pytest.raises(manifest.Damaged, match="more"):
        manifest.check(either)
    moved = manifest.quarantine(either, either.parent / "quarantine", "why")
    assert not either.exists() and manifest.sizes(moved).keys() > contents.keys()
    assert moved.with_name(f"{moved.name}.reason").read_text() == "why\n"


def test_the_content_of_small_objects_is_compared(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a bucket states the checksum that it was given, and hands out something else."""
    (folder / "metadata").write_bytes(b"{}")
    manifest.write_manifest(folder)
    monkeypatch.setattr(bucket, "read_objects", lambda folder, names: dict.fromkeys(names, b"[]"))
    with pytest.raises(manifest.Damaged, match="metadata is damaged: its content has another checksum"):
        manifest.check(folder)


# Leases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.5)
    return 1.5


def test_a_second_run_is_refused_by_name(folder: Any, seconds: float) -> None:
    with Lease(folder):
        time.sleep(seconds)  # it is renewed meanwhile
        began = time.monotonic()
        with pytest.raises(ValueError, match=rf"in use by \S+ pid {os.getpid()}; wait for it, or take another"):
            Lease(folder)
        assert time.monotonic() - began < seconds
    Lease(folder).close()
    assert len([*(folder / "LEASE").iterdir()]) == 1, "old numbers are deleted"


def test_a_dead_lease_is_taken_over_in_its_time(folder: Any, seconds: float, capfd: pytest.CaptureFixture) -> None:
    (folder / "LEASE" / "00000041").write_text(json.dumps({"host": "elsewhere", "pid": 1, "id": "x"}))
    began = time.monotonic()
    with Lease(folder):
        assert seconds <= time.monotonic() - began < 3 * seconds
        assert "the lease of elsewhere pid 1 was not renewed" in capfd.readouterr().out


def test_a_killed_run_of_this_host_need_not_be_waited_for(folder: Any, seconds: float) -> None:
    owner = {"host": "h", "machine": lease.machine(), "pid": 2**22 - 3, "id": "x"}
    (folder / "LEASE" / "00000041").write_text(json.dumps(owner))
    began = time.monotonic()
    Lease(folder).close()
    assert time.monotonic() - began < seconds


def test_a_pid_of_another_container_on_this_host_tells_nothing(folder: Any, seconds: float) -> None:
    owner = {"host": lease.socket.gethostname(), "machine": "another", "pid": 2**22 - 3, "id": "x"}
    (folder / "LEASE" / "00000041").write_text(json.dumps(owner))
    began = time.monotonic()
    Lease(folder).close()
    assert time.monotonic() - began >= seconds


def test_a_sleeper_that_creates_an_old_number_is_not_the_owner(folder: Any, seconds: float) -> None:
    """It has read number 1, and was asleep while others renewed, released and deleted it."""
    first = Lease(folder)
    first.close()
    second = Lease(folder)
    sleeper = object.__new__(Lease)
    sleeper._folder, sleeper._owner = folder / "LEASE", {"host": "h", "pid": 1, "id": "sleeper"}
    for number in range(1, 3):
        assert not sleeper._create(number, sleeper._owner)
    assert json.loads([*(folder / "LEASE").iterdir()][-1].read_text()) == second._owner
    second.close()
    assert json.loads([*(folder / "LEASE").iterdir()][-1].read_text()) == RELEASED


def test_of_many_at_once_one_gets_it(folder: Any, seconds: float) -> None:
    leases: list[Lease] = []
    refusals: list[str] = []

    def acquire() -> None:
        try:
            leases.append(Lease(folder))
        except ValueError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=acquire) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(leases) == 1 and len(refusals) == 5
    leases[0].close()


@pytest.mark.parametrize("lost", ["taken over", "can't be renewed", "in time"])
def test_a_run_without_its_lease_ends(folder: Any, seconds: float, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    ends: list[str] = []
    monkeypatch.setattr(lease, "_end", lambda reason: ends.append(reason))
    mine, hanging = Lease(folder), threading.Event()
    if lost == "taken over":
        (folder / "LEASE" / "00000099").write_text(json.dumps({"host": "elsewhere", "pid": 1, "id": "x"}))
    elif lost == "in time":  # the request hangs
        monkeypatch.setattr(mine, "_create", lambda *_: hanging.wait())
    else:
        monkeypatch.setattr(mine, "_create", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    end = time.monotonic() + 4 * seconds
    while not ends and time.monotonic() < end:
        time.sleep(0.05)
    took = time.monotonic() - mine._renewed
    mine._closed.set()
    hanging.set()
    assert lost in ends[0] and took < seconds, "before another process may take over"


# Data -------------------------------------------------------------------------------------------------------------


def test_a_source_in_a_bucket_is_the_same_source(folder: Any, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(30))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl").write_text(lines)
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(lines)
    local = open_source(str(tmp_path / "*.jsonl"), tmp_path)
    there = open_source(f"{folder}/*.jsonl", tmp_path)
    assert there.fingerprint == local.fingerprint and there.records == 60
    assert [item.record for item in there.read()] == [item.record for item in local.read()]

    with emulator.failing(emulator.start(), 0.0):
        open_source(f"{folder}/*.jsonl", tmp_path)
        assert emulator.start().counts["GET"] <= 2, "nothing is fetched twice"

    copies = remote.fetch(f"{folder}/*.jsonl")
    for file in copies:
        file.copy.unlink()  # as on another machine
    assert [item.where for item in there.read()] == [
        f"{folder}/{name}.jsonl:{i}" for name in "ab" for i in range(1, 31)
    ]
    (folder / "b.jsonl").write_text(lines + lines)
    copies[1].copy.unlink()
    with pytest.raises(ValueError, match="b.jsonl has changed since the start"):
        list(there.read())
    (folder / "b.jsonl").write_text(lines)
    again = open_source(f"{folder}/*.jsonl", tmp_path)
    (folder / "b.jsonl").write_text(lines.replace("text", "word"))
    open_source(f"{folder}/*.jsonl", tmp_path)  # the copy is another version's by now, as one that a worker has kept
    with pytest.raises(ValueError, match="b.jsonl has changed since the start"):
        list(again.read())
    (folder / "b.jsonl").write_text(lines + lines)
    assert open_source(f"{folder}/*.jsonl", tmp_path).records == 90
    with pytest.raises(ValueError, match=r"no file matches 'gs://.*none\*'"):
        open_source(f"{folder}/none*", tmp_path)


def test_errors_about_a_file_name_its_address(folder: Any, tmp_path: Path) -> None:
    (folder / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=f"^{folder}/a.jsonl is empty"):
        open_source(f"{folder}/*.jsonl", tmp_path)


def test_the_strongest_version_is_compared_and_none_is_not_current(tmp_path: Path) -> None:
    head = {"name": "a", "size": 3, "type": "file", "ETag": "e", "LastModified": "10:00:00"}
    assert (
        remote._version(head) == remote._version(head | {"LastModified": "10:00:00.123"}) == {"size": "3", "ETag": "e"}
    )
    assert remote._version({"size": 3, "Last-Modified": "10:00"}) != remote._version(
        {"size": 3, "Last-Modified": "10:01"}
    )
    (tmp_path / "a").write_text("abc")
    for info in ({"size": 3}, {}):
        (tmp_path / "a.version.json").write_text(json.dumps(remote._version(info)))
        assert not remote._is_current(tmp_path / "a", info)


def test_a_source_at_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert [item.record for item in open_source(f"{address}/a.jsonl", tmp_path).read()] == [{"text": "a"}]
        with pytest.raises(ValueError, match="no file matches 'http://.*/b.jsonl'"):
            open_source(f"{address}/b.jsonl", tmp_path)
        server.shutdown()
    assert remote.is_remote("hf://datasets/a/b/c.parquet") and not remote.is_remote("hf:a/b:train")


def test_a_full_disk_is_noticed_before_a_download(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(bucket, "FREE_SHARE", 1.0)
    with pytest.raises(OSError, match="GB free.*set XDG_CACHE_HOME to a larger disk"):
        open_source(f"{folder}/a.jsonl", tmp_path)
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        bucket.download(folder, tmp_path / "copy", "a.jsonl")
    assert not (tmp_path / "copy").exists()


# Errors -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Failure:
    error: Exception
    words: str


def failures() -> list[Failure]:
    from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError

    gcsfs, botocore = pytest.importorskip("gcsfs.retry"), pytest.importorskip("botocore.exceptions")

    def of_s3(code: str, kind: type[OSError]) -> OSError:
        """What s3fs makes of an error of S3."""
        error = kind("as it says")
        error.__cause__ = botocore.ClientError({"Error": {"Code": code, "Message": "no"}}, "PutObject")
        return error

    requests = pytest.importorskip("requests.exceptions")
    return [
        Failure(botocore.ReadTimeoutError(endpoint_url="https://s3"), "check the network"),
        Failure(botocore.ConnectionClosedError(endpoint_url="https://s3"), "check the network"),
        Failure(requests.ProxyError(), "check the network"),
        Failure(TransportError("no name"), "check the network"),
        Failure(OSError("Forbidden: https://storage"), "let it read, write, list and delete objects"),
        Failure(botocore.NoCredentialsError(), "aws sso login"),
        Failure(of_s3("ExpiredToken", PermissionError), "aws sso login"),
        Failure(of_s3("AccessDenied", PermissionError), "let it read, write, list and delete objects"),
        Failure(of_s3("NoSuchBucket", FileNotFoundError), "create the bucket"),
        Failure(of_s3("SlowDown", OSError), "overloaded or down"),
        Failure(gcsfs.HttpError({"code": 401, "message": "Invalid Credentials"}), "gcloud auth"),
        Failure(DefaultCredentialsError("none"), "gcloud auth"),
        Failure(RefreshError("expired"), "gcloud auth"),
        Failure(gcsfs.HttpError({"code": 403, "message": "no"}), "let it read, write, list and delete objects"),
        Failure(gcsfs.HttpError({"code": 404, "message": "no"}), "create the bucket"),
        Failure(gcsfs.HttpError({"code": 503, "message": "busy"}), "overloaded or down"),
        Failure(gcsfs.HttpError({"code": 429, "message": "slow down"}), "overloaded or down"),
        Failure(gcsfs.HttpError({"code": 418, "message": "teapot"}), "check the network"),
    ]


def test_errors_of_storage_name_a_remedy() -> None:
    for failure in failures():
        line = bucket.explain(failure.error)
        assert failure.words in line and "\n" not in line, failure
    assert bucket.explain(KeyError("a")) == ""


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_missing_bucket(
    scheme: str, capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.folder(tmp_path, scheme)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["jaxstages", "prepare", "--config=demo", f"--workdir={scheme}://no-such-bucket/runs/a"]) == 74
    assert f"no bucket {scheme}://no-such-bucket; create the bucket, or correct its name" in capfd.readouterr().err
