"""A full disk ends the run with code 74 and costs nothing that was saved; with room it goes on to the same bits."""

import errno
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import jaxstages.training.loop as loop
from jaxstages import config as recipes
from jaxstages.cli.train import train
from jaxstages.data.prepare import subsample_evenly
from jaxstages.runtime import manifest
from jaxstages.runtime.workdir import checkpoint_folder, steps_of
from tests.reliability.harness import Home, garbage, make_recipe, outcome, print_table, unlike


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """One stage, for there are many runs."""
    return Home(tmp_path_factory.mktemp("home"), command=("pretrain",))


@pytest.fixture(scope="module")
def whole(home: Home) -> dict[str, Any]:
    assert home.run(home.folder / "whole") == 0
    return outcome(home.folder / "whole")


def assert_whole(work: Path) -> None:
    """What is there under a checkpoint's name is a checkpoint."""
    for stage in recipes.STAGES:
        for step in steps_of(work / stage):
            manifest.check(checkpoint_folder(work / stage, step))


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not installed")
def test_no_file_may_grow(home: Home, whole: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """RLIMIT_FSIZE fails each write beyond a size: which file is the first to fail depends on the size."""
    sizes = sorted({int(2000 * 1.12**i) for i in range(32)})
    chosen = sizes[:: max(1, len(sizes) // request.config.getoption("--native"))]
    ends = Counter()
    for size in chosen:
        work = tmp_path / str(size)
        child = home.start(work, ("prlimit", f"--fsize={size}", "--"), log=Path("/dev/null"))
        ends[code := child.wait()] += 1
        assert code in (0, 74), child.log()
        assert_whole(work)
        if code:
            assert home.run(work) == 0
        assert unlike(outcome(work), whole) == []
        assert garbage(work) == []
    print_table(f"file sizes limited to {chosen} bytes", dict(ends))
    assert ends[74]


def test_a_disk_that_fills_up(
    home: Home, whole: dict[str, Any], small_disk: Path, request: pytest.FixtureRequest
) -> None:
    """From too small for the recipe to large enough for one checkpoint but not for three."""
    ends = []
    sizes = (16, 80, 240, 420, 600, 720, 860, 1000)
    for kilobytes in subsample_evenly(sizes, request.config.getoption("disks")):
        work = small_disk / str(kilobytes)
        for old in small_disk.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(small_disk)], check=True)
        child = home.start(work, more=(f"--config.cache={home.folder / 'cache'}",), log=home.folder / "full.log")
        ends.append(code := child.wait())
        assert code in (0, 74), child.log()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        assert_whole(work)
        if code:
            assert home.start(work, log=home.folder / "full.log").wait() == 0
        assert unlike(outcome(work), whole) == []
        assert garbage(work) == []
    print_table("tmpfs of 16 .. 1000 kB", {"codes": ends})
    assert 74 in ends


@pytest.mark.parametrize("step", [3, 12])
def test_an_error_of_the_background_save_ends_the_run_within_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also that of the last save: without its checkpoint the stage has no result."""
    recipe = make_recipe(tmp_path)
    failed: list[int] = []
    read_since: list[int] = []
    seal, read = manifest.write_manifest, loop.Loop._read_sums

    def full(folder: Path) -> None:
        if folder.name.startswith(f"{step}."):
            failed.append(step)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        seal(folder)

    def noted(self: Any, number: int, sums: Any) -> None:
        read_since.extend([number] * bool(failed))
        read(self, number, sums)

    monkeypatch.setattr(manifest, "write_manifest", full)
    monkeypatch.setattr(loop.Loop, "_read_sums", noted)
    with pytest.raises(OSError, match=rf"saving step {step} failed"):
        train(recipe, tmp_path / "work", "pretrain")
    assert failed and len(read_since) <= 2, "the step under way, and the one that was begun already"
    assert not (tmp_path / "work" / "pretrain" / "result.json").exists()
    assert step not in steps_of(tmp_path / "work" / "pretrain")
    assert_whole(tmp_path / "work")
