"""A damaged checkpoint is never believed: what is restored is what was saved, at this step or an older one."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest

from jaxstages.checkpoint.fingerprint import fingerprint, params_sha256
from jaxstages.checkpoint.manager import Checkpoints
from jaxstages.checkpoint.metadata import read_meta
from jaxstages.cli.train import train
from jaxstages.runtime import manifest
from jaxstages.runtime.files import read_json, write_json
from jaxstages.runtime.manifest import UNLISTED
from jaxstages.runtime.workdir import checkpoint_folder, checkpoints_folder, quarantine_folder, steps_of
from jaxstages.training import program
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.handoff import read_parent
from jaxstages.training.saved_items import to_items
from jaxstages.training.setup import StageSetup, setup_stage
from tests.reliability.harness import damage, make_recipe, print_table
from tests.reliability.test_nonfinite import small_model

KINDS = ("flip", "truncate", "zero", "delete", "swap")


class Kept:
    """A finished stage with three checkpoints, and what each of them must give."""

    def __init__(self, folder: Path, min_delta: float = 0.0, work: Path | None = None) -> None:
        recipe = make_recipe(folder)
        recipe.pretrain.loop.keep = 3
        recipe.pretrain.early_stopping.min_delta = min_delta
        self.work = work or folder / "work"
        train(recipe, self.work, "pretrain")
        self.stage_dir = self.work / "pretrain"
        self.setup: StageSetup = setup_stage(recipe, "pretrain", self.work)
        self.steps = steps_of(self.stage_dir)
        self.metas = {step: read_meta(checkpoint_folder(self.stage_dir, step)) for step in self.steps}
        self.stopping = early_stopping().init()

    def files(self, step: int) -> list[Path]:
        folder = checkpoint_folder(self.stage_dir, step)
        return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())

    def copy(self, into: Path) -> Path:
        shutil.rmtree(into, ignore_errors=True)
        shutil.copytree(self.stage_dir, into / "pretrain", ignore=shutil.ignore_patterns("tensorboard"))
        return into / "pretrain"

    def restored(self, stage_dir: Path) -> int:
        """The step that is restored; fails if it is not, bit for bit, what was saved at that step."""
        with Checkpoints(stage_dir, 3) as checkpoints:
            restored = checkpoints.restore_newest(to_items(self.setup.program.abstract_state, self.stopping))
        assert restored is not None, "checkpoints were there, and a fresh start would follow"
        step = restored.meta["step"]
        assert restored.meta == self.metas[step], "silently wrong metadata"
        assert fingerprint(restored.items).digests == self.metas[step]["fingerprint"], "silently wrong"
        return step


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """Of a model of few parameters, which is restored hundreds of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_model", lambda config, vocab, **_: small_model(vocab, lambda x, batch, key: x))
        yield Kept(tmp_path_factory.mktemp("kept"))


def harm(kept: Kept, stage_dir: Path, step: int, file: Path, kind: str, dice: random.Random) -> bool:
    """Damage one file of a step; False if that left its bytes as they were."""
    path = checkpoint_folder(stage_dir, step) / file
    before = path.read_bytes()
    other = checkpoint_folder(stage_dir, next(s for s in kept.steps if s != step)) / file
    if kind == "swap" and not other.is_file():  # array files are named by chance
        others = [file for file in other.parent.iterdir() if file.is_file()] if other.parent.is_dir() else []
        if not others:
            return False
        other = dice.choice(others)
    damage(path, kind, dice, other if kind == "swap" else None)
    return not path.exists() or path.read_bytes() != before


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_of_the_newest_checkpoint(kept: Kept, tmp_path: Path, kind: str) -> None:
    dice, ends = random.Random(1), Counter()
    newest = kept.steps[-1]
    for file in kept.files(newest):
        stage_dir = kept.copy(tmp_path / "copy")
        if not harm(kept, stage_dir, newest, file, kind, dice):
            continue
        step = kept.restored(stage_dir)
        ends["benign" if step == newest else "fell back"] += 1
        if step == newest:  # Orbax's marker files, written after the seal, are read by nobody
            assert str(file) in UNLISTED[2:], f"{file} was damaged, and the checkpoint believed"
        else:
            assert any(quarantine_folder(stage_dir).glob(f"{newest}.*.reason"))
    print_table(f"{kind}: each file", dict(ends))
    assert ends["fell back"] > 10


@pytest.mark.parametrize("name", ["best_step", "fingerprint", "carried"])
def test_metadata_of_another_form_under_a_manifest_that_fits(kept: Kept, tmp_path: Path, name: str) -> None:
    stage_dir, newest = kept.copy(tmp_path / "copy"), kept.steps[-1]
    meta = dict(kept.metas[newest])
    del meta[name]
    write_json(checkpoint_folder(stage_dir, newest) / "meta" / "metadata", meta)
    manifest.write_manifest(checkpoint_folder(stage_dir, newest))
    assert kept.restored(stage_dir) == kept.steps[-2]
    (reason,) = quarantine_folder(stage_dir).glob(f"{newest}.*.reason")
    assert f"it lacks {name}" in reason.read_text()


def test_random_damage(kept: Kept, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One to three faults in any steps: also strays, such as an empty folder that Orbax would take for the latest."""
    count = request.config.getoption("--faults")
    dice, ends = random.Random(request.config.getoption("--seed")), Counter()
    for _ in range(count):
        stage_dir, harmed = kept.copy(tmp_path / "copy"), False
        for _ in range(dice.randint(1, 3)):
            step = dice.choice(kept.steps)
            kind = dice.choice((*KINDS, *KINDS, "stray"))
            if kind == "stray":
                harmed |= stray(stage_dir, dice)
            elif (checkpoint_folder(stage_dir, step) / (file := dice.choice(kept.files(step)))).is_file():
                harmed |= harm(kept, stage_dir, step, file, kind, dice)
        try:
            step = kept.restored(stage_dir)
            ends["untouched" if not harmed else "newest" if step == kept.steps[-1] else "fell back"] += 1
        except ValueError as error:
            assert "no checkpoint that can be trusted" in str(error)
            ends["refused"] += 1
    print_table(f"{count} random faults, silently wrong 0", dict(ends))
    assert ends["fell back"] and ends["fell back"] + ends["refused"] > count // 4
    if count >= 1000:  # of fewer, a quarter is broken by chance: 28 % of 2,000 fell back
        assert ends["fell back"] > count // 4


def stray(stage_dir: Path, dice: random.Random) -> bool:
    folder = checkpoints_folder(stage_dir)
    match dice.randrange(5):
        case 0:
            (folder / "900").mkdir(exist_ok=True)
        case 1:
            if not (folder / "800").exists():
                (folder / "800").symlink_to(sorted(folder.iterdir())[0].name)
        case 2:
            whole = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]
            shutil.copytree(next(p for p in whole if p.name != "007"), folder / "007", dirs_exist_ok=True)
        case 3:
            (folder / str(10**30)).mkdir(exist_ok=True)
        case _:
            step = dice.choice(steps_of(stage_dir))
            if (folder / str(step)).is_dir():
                (folder / str(step) / "extra").write_text("not listed")
    return True


def test_all_bad_is_refused_and_never_begun_afresh(kept: Kept, tmp_path: Path) -> None:
    dice = random.Random(2)
    stage_dir = kept.copy(tmp_path / "copy")
    for step in kept.steps:
        assert harm(kept, stage_dir, step, Path("params/_METADATA"), "flip", dice)
    for _ in range(2):  # the second start finds them in quarantine, and refuses too
        with pytest.raises(ValueError, match=r"has no checkpoint that can be trusted, see the reasons in .*quarantine"):
            kept.restored(stage_dir)
    assert len(list(quarantine_folder(stage_dir).glob("*.reason"))) == len(kept.steps)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), RuntimeError),
        (ValueError("UNAVAILABLE: no route"), OSError),
        (MemoryError(), MemoryError),
    ],
)
def test_what_is_no_fault_of_the_files_moves_nothing(
    kept: Kept, tmp_path: Path, error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore(*_: Any, **__: Any) -> Any:
        raise error

    stage_dir = kept.copy(tmp_path / "copy")
    with monkeypatch.context() as patch, pytest.raises(raised):
        patch.setattr(ocp.Checkpointer, "restore", restore)
        kept.restored(stage_dir)
    assert not quarantine_folder(stage_dir).exists() and kept.restored(stage_dir) == kept.steps[-1]


def test_a_damaged_best_does_not_condemn_the_checkpoints_beside_it(
    kept: Kept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is lost, which is said, and the best is chosen anew; an earlier version moved all others aside with it."""
    kept = Kept(tmp_path, min_delta=1e6)  # the first evaluation stays the best
    best = kept.metas[kept.steps[-1]]["best_step"]
    assert best == kept.steps[0] < kept.steps[-1]
    stage_dir = kept.copy(tmp_path / "copy")
    harm(kept, stage_dir, best, Path("params/_METADATA"), "flip", random.Random(3))
    assert kept.restored(stage_dir) == kept.steps[-1]
    (reason,) = quarantine_folder(stage_dir).glob("*.reason")
    assert f"/{best}/params/_METADATA is damaged" in reason.read_text()
    assert f"its best step so far, {best}, is lost" in capsys.readouterr().out.replace("\n", " ")


def test_a_damaged_parent_is_refused(kept: Kept, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """It never falls back: the contract names step and digest."""
    count = request.config.getoption("--faults") // 4
    dice, ends = random.Random(4), Counter()
    result: dict[str, Any] = read_json(kept.stage_dir / "result.json")
    for _ in range(count):
        stage_dir = kept.copy(tmp_path / "copy")
        if dice.random() < 0.2:
            damage(stage_dir / "result.json", dice.choice(KINDS[:3]), dice)
            harmed = (stage_dir / "result.json").read_text(errors="replace") != json.dumps(result)
        else:
            file = dice.choice(kept.files(result["best_step"]))
            harmed = harm(kept, stage_dir, result["best_step"], file, dice.choice(KINDS), dice)
        try:
            params, lineage = read_parent(stage_dir, kept.setup.program, kept.setup.contract)
        except ValueError:
            ends["refused"] += 1
        else:
            assert params_sha256(params) == result["params_sha256"] == lineage["params_sha256"], "silently wrong"
            ends["benign" if harmed else "untouched"] += 1
    print_table(f"{count} damaged parents, silently wrong 0", dict(ends))
    assert ends["refused"] > count // 2
