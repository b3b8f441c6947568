"""A run that lives in a bucket ends in the same bits as on a disk, whatever the network and the machine do."""

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxstages.runtime import bucket
from jaxstages.runtime.bucket import cache_base, local_copy
from jaxstages.runtime.manifest import UNLISTED
from jaxstages.runtime.workdir import checkpoint_folder, checkpoints_folder, quarantine_folder
from tests import emulator
from tests.compiled import QUICK
from tests.reliability.harness import (
    SAVE_EVERY,
    Home,
    Tally,
    free_port,
    garbage,
    outcome,
    print_table,
    torment,
    unlike,
)
from tests.reliability.test_corruption import KINDS, Kept
from tests.reliability.test_hosts_lost import assert_close

LEASE_SECONDS = "3"

# Orbax's event loops are closed before the last futures of gcsfs are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _quick_leases() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        emulator.start()
        patch.setenv("JAXSTAGES_LEASE_SECONDS", LEASE_SECONDS)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The rows are in the workdir, and so in the bucket."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
        yield Home(folder, more=("--config.cache=",))


@pytest.fixture(scope="module")
def short(home: Home, request: pytest.FixtureRequest) -> Home:
    """All three stages in `make soak`; the first alone costs a third."""
    return home if request.config.getoption("--kills") >= 100 else Home(home.folder, ("pretrain",), home.more)


@pytest.fixture(scope="module")
def whole_of_short(home: Home, short: Home, whole: dict[str, Any]) -> dict[str, Any]:
    return whole if short is home else {"pretrain": whole["pretrain"]}


@pytest.fixture(scope="module")
def whole(home: Home) -> dict[str, Any]:
    """What the run ends in on a disk."""
    assert home.run(home.folder / "whole") == 0
    return outcome(home.folder / "whole")


def in_bucket(path: Path) -> Any:
    return emulator.folder(path)


def test_three_stages_end_in_the_same_bits_as_on_a_disk(home: Home, whole: dict[str, Any], tmp_path: Path) -> None:
    """Also from another machine, with nothing on its disk, after an interruption."""
    work, proxy = in_bucket(tmp_path), emulator.start()
    proxy.counts.clear()
    proxy.sent = proxy.received = 0
    child = home.start(work, more=("--config.finetune.loop.stop_after=5",), XDG_CACHE_HOME=str(tmp_path / "first"))
    assert child.wait() == 0, child.log()
    child = home.start(work, XDG_CACHE_HOME=str(tmp_path / "second"))
    assert child.wait() == 0, child.log()
    assert unlike(outcome(work), whole) == []
    assert garbage(work) == []
    assert (work / "stage_matrix.json").exists() and (work / "report.html").exists()
    assert any((work / "pretrain" / "tensorboard").iterdir())
    print_table("a run in a bucket", {**proxy.counts, "MB sent": proxy.sent / 1e6, "MB received": proxy.received / 1e6})


def test_an_s3_bucket_is_published_to(short: Home, whole_of_short: dict[str, Any], tmp_path: Path) -> None:
    """Orbax writes to a local folder, which another machine lacks; nothing is left there."""
    work, dice, tally = emulator.folder(tmp_path, "s3"), random.Random(3), Tally()
    child = short.start(work, more=("--config.pretrain.loop.stop_after=7",), XDG_CACHE_HOME=str(tmp_path / "first"))
    assert child.wait() == 0, child.log()
    assert torment(short, work, signal.SIGKILL, dice, tally, 1) == 1
    assert unlike(outcome(work), whole_of_short) == [] and garbage(work) == []
    assert max(tally.unsaved, default=0) <= SAVE_EVERY
    assert not local_copy(checkpoints_folder(work / "pretrain")).exists()
    assert not [*(cache_base() / "reading").iterdir()]

    child = short.start(work, more=("--coordinator=127.0.0.1:1", "--process_count=2", "--process_id=0"))
    assert child.wait() == 2 and "2 processes can't write a checkpoint there together" in child.log()


def test_killed_at_random_instants(
    short: Home, whole_of_short: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count, dice, tally, sent, runs = request.config.getoption("--kills"), random.Random(1), Tally(), 0, 0
    while sent < count:
        work = in_bucket(tmp_path / f"kill{runs}")
        sent += torment(short, work, signal.SIGKILL, dice, tally, min(count - sent, dice.randint(3, 12)))
        assert unlike(outcome(work), whole_of_short) == [] and garbage(work) == []
        runs += 1
    print_table(f"{sent} kills of runs in a bucket", {"phases": dict(tally.hits), "steps redone": max(tally.redone)})
    since = [redone - unsaved for redone, unsaved in zip(tally.redone, tally.unsaved, strict=True)]
    assert max(tally.unsaved, default=0) <= SAVE_EVERY and max(since, default=0) <= SAVE_EVERY


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_requests_that_fail(
    short: Home, whole_of_short: dict[str, Any], tmp_path: Path, rate: float, request: pytest.FixtureRequest
) -> None:
    """The run ends in the same bits; or with code 74, and when started again in the same bits. If every second request
    fails, more of them fail in a row than are tried again, and the run may need healthy storage to finish."""
    if rate > 0.02 and request.config.getoption("--faults") < 100:
        pytest.skip("each retry waits for seconds; `make soak` has it")
    work, proxy, codes = in_bucket(tmp_path / f"rate{rate}"), emulator.start(), Counter()
    with emulator.failing(proxy, rate, seed=round(100 * rate)):
        for _ in range(20):
            # A renewal may take several tries with a pause between them: 3 s are too short for that.
            child = short.start(work, JAXSTAGES_LEASE_SECONDS="60")
            code = child.wait(600)
            codes[code] += 1
            if code == 0:
                break
            assert code == 74 and "Traceback" not in child.log(), child.log()
            if rate == 0.5 and codes[74] == 5:
                break
        faults = {kind: proxy.counts[kind] for kind in emulator.FAULTS}
    print_table(f"faults at a rate of {rate}", {"codes": dict(codes), **faults})
    assert sum(faults.values()) > 100 * rate
    if rate == 0.5 and code == 74:
        code = short.run(work)
    assert code == 0 and unlike(outcome(work), whole_of_short) == [] and garbage(work) == []


def test_of_two_runs_at_once_one_is_refused(
    short: Home, whole_of_short: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for race in range(request.config.getoption("--races")):
        work = in_bucket(tmp_path / f"race{race}")
        pair = [short.start(work, log=tmp_path / f"{race}.{number}.log") for number in range(2)]
        codes = [child.wait() for child in pair]
        assert sorted(codes) == [0, 2], [child.log() for child in pair]
        winner, loser = pair[codes.index(0)], pair[codes.index(2)]
        assert re.search(rf"in use by \S+ pid {winner.process.pid}; wait for it", loser.log())
        assert unlike(outcome(work), whole_of_short) == []


def test_hosts_without_a_shared_disk(home: Home, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each has a cache folder of its own; rows, tokenizer and checkpoints come from the bucket."""
    count = request.config.getoption("--hosts")
    first = Home(home.folder, command=("pretrain",), more=home.more)
    expected = tmp_path / "whole"
    assert first.run(expected, XLA_FLAGS=f"{QUICK} --xla_force_host_platform_device_count={count}") == 0
    work, port = in_bucket(tmp_path), free_port()
    hosts = [
        first.start(
            work,
            more=(f"--coordinator=127.0.0.1:{port}", f"--process_count={count}", f"--process_id={number}"),
            log=tmp_path / f"{number}.log",
            XDG_CACHE_HOME=str(tmp_path / f"host{number}"),
        )
        for number in range(count)
    ]
    assert [host.wait() for host in hosts] == [0] * count, [host.log() for host in hosts]
    if count == 2:
        assert unlike(outcome(work), outcome(expected)) == []
    else:  # a sum over more has several orders
        assert_close(outcome(work), outcome(expected))


class KeptInBucket(Kept):
    """A finished stage in a bucket, and copies of it, whose objects can be damaged."""

    def files(self, step: int) -> list[Path]:
        return [Path(name) for name in sorted(bucket.list_objects(checkpoint_folder(self.stage_dir, step)))]

    def copy(self, into: Any) -> Any:
        bucket.copy(checkpoints_folder(self.stage_dir), checkpoints_folder(into / "pretrain"))
        return into / "pretrain"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> KeptInBucket:
    folder = tmp_path_factory.mktemp("kept")
    return KeptInBucket(folder, work=in_bucket(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_each_object_of_the_newest_checkpoint(
    kept: KeptInBucket, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    every = 1 if request.config.getoption("--faults") >= 100 else 5
    if kind not in ("flip", "delete") and every > 1:
        pytest.skip("half a minute each; `make soak` has them")
    dice, ends, newest = random.Random(2), Counter(), kept.steps[-1]
    for number, file in enumerate(kept.files(newest)[::every]):
        stage_dir = kept.copy(in_bucket(tmp_path / f"{kind}{number}"))
        path = checkpoint_folder(stage_dir, newest) / file
        content = bytearray(path.read_bytes())
        before = bytes(content)
        match kind:
            case "flip" if content:
                content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            case "truncate" if content:
                content = content[: dice.randrange(len(content))]
            case "zero":
                content = bytearray(len(content))
            case "swap":
                other = dice.choice(
                    [name for name in kept.files(kept.steps[0]) if name.parent == file.parent] or [file]
                )
                content = bytearray((checkpoint_folder(stage_dir, kept.steps[0]) / other).read_bytes())
        if kind == "delete":
            path.unlink()
        elif bytes(content) == before:
            continue
        else:
            path.write_bytes(bytes(content))
        step = kept.restored(stage_dir)
        ends["benign" if step == newest else "fell back"] += 1
        if step == newest:  # Orbax's marker files, whose content is read by nobody
            assert str(file) in UNLISTED[2:], f"{file} was damaged, and the checkpoint believed"
        elif not (kind == "delete" and file.name in UNLISTED[2:]):
            assert any(quarantine_folder(stage_dir).glob(f"{newest}.*.reason")), file
    print_table(f"{kind}: each object in a bucket", dict(ends))
    assert ends["fell back"] >= 20 // every


def test_a_save_takes_few_requests(kept: KeptInBucket, tmp_path: Path) -> None:
    """Requests and bytes of one save and one restore, beside the bytes of the state."""
    proxy = emulator.start()
    stage_dir = kept.copy(in_bucket(tmp_path))
    size = sum(entry.size for entry in bucket.list_objects(checkpoint_folder(stage_dir, kept.steps[-1])).values())
    proxy.counts.clear()
    proxy.sent = proxy.received = 0
    began = time.monotonic()
    kept.restored(stage_dir)
    figures = {"requests": sum(proxy.counts[method] for method in ("GET", "POST", "PUT", "DELETE"))}
    figures |= {"bytes received over bytes of the checkpoint": round(proxy.received / size, 2)}
    print_table("a restore from a bucket", figures | {"seconds": round(time.monotonic() - began, 2)})
    assert figures["requests"] < 300
