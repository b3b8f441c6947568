"""`prepare` as an Apache Beam pipeline leaves the bytes of the local path, whoever does the work."""

import functools
import gzip
import json
from pathlib import Path

import pytest

from jaxstages.cli.prepare import prepare_all
from jaxstages.config import DataConfig, Recipe
from jaxstages.config.data import CleanConfig, DuplicatesConfig
from jaxstages.data import prepare as preparing
from jaxstages.data import sources
from jaxstages.data.sources import Source
from jaxstages.runtime.bucket import local_copy
from tests import emulator
from tests.test_clean import words
from tests.tiny import recipe as tiny_recipe

pytest.importorskip("apache_beam", reason="Apache Beam is not installed; pip install '.[beam]'")

from jaxstages.data import beam

pytestmark = pytest.mark.filterwarnings("default")  # Beam warns of its own matters

ONE = "--runner=DirectRunner --direct_num_workers=1"
FOUR = "--runner=DirectRunner --direct_num_workers=4 --direct_running_mode=multi_processing"
THREADS = "--runner=DirectRunner --direct_num_workers=4 --direct_running_mode=multi_threading"


def texts() -> list[str]:
    """Documents, some of them near-duplicates, some malformed, one too short."""
    base = [" ".join(words(seed, 40)) for seed in range(60)]
    near = [f"{text} {place}" for place, text in enumerate(base[::3])]
    lines = [json.dumps({"text": text}) for text in (*base, *near, *base[:5], "tiny", "nul\0 and e\u0301")]
    return [*lines, '{"text": "half a pair \\ud83d"}', "no JSON"]


def recipe_of(folder: Path) -> Recipe:
    recipe = tiny_recipe(folder)
    recipe.finetune = recipe.instruct = None
    recipe.prompts = ()
    for number in range(3):
        (folder / f"{number}.jsonl").write_text("\n".join(texts()[number::3]) + "\n")
    data = recipe.pretrain.data
    data.train, data.validation, data.holdout, data.max_bad_share = (str(folder / "*.jsonl"),), (), 0.2, 0.1
    data.clean = CleanConfig(control_characters="remove", unicode="nfc", min_characters=5)
    data.duplicates = DuplicatesConfig(threshold=0.7)
    return recipe


def files(workdir: Path) -> dict[str, bytes]:
    """All that was prepared, but for the locks, which name their process."""
    actual = (path for path in workdir.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(workdir)): path.read_bytes() for path in actual if path.name != "lock"}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "BLOCK_RECORDS", 15)


@pytest.mark.parametrize("options", [ONE, FOUR, THREADS], ids=["one", "four processes", "four threads"])
def test_the_bytes_are_those_of_the_local_path(tmp_path: Path, small_shards: None, options: str, capfd) -> None:
    recipe = recipe_of(tmp_path)
    prepare_all(recipe, tmp_path / "local", None)
    prepare_all(recipe, tmp_path / "beam", options)
    local, beam = files(tmp_path / "local"), files(tmp_path / "beam")
    assert local.keys() == beam.keys()
    assert [name for name in local if local[name] != beam[name]] == []
    indices = [json.loads(content) for name, content in local.items() if name.endswith("index.json")]
    train = next(index for index in indices if index.get("part") == "train")
    assert train["shards"] > 3 and train["removed"]["too_short"] == 1 and train["bad"] == 2
    assert next(index for index in indices if "near_duplicates" in index)["near_duplicates"] == 25
    said = capfd.readouterr().out
    assert "an Apache Beam pipeline on DirectRunner" in said and said.count("near-duplicates") >= 2


def test_workers_that_write_elsewhere_end_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty list of near-duplicates would be taken for a complete one."""
    recipe = recipe_of(tmp_path)
    monkeypatch.setattr(beam, "_write", lambda *_: None)
    with pytest.raises(ValueError, match=r"written.json is missing, so the workers wrote elsewhere; set --workdir"):
        prepare_all(recipe, tmp_path / "work", ONE)
    assert not [*(tmp_path / "work").rglob("MANIFEST.json")]


def test_workers_share_nothing_but_a_bucket(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = emulator.folder(tmp_path)
    recipe = recipe_of(tmp_path)
    for file in tmp_path.glob("*.jsonl"):
        (bucket / "data" / file.name).write_bytes(file.read_bytes())
    recipe.pretrain.data.train = (f"{bucket}/data/*.jsonl",)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    prepare_all(recipe, tmp_path / "local", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    prepare_all(recipe, bucket / "beam", FOUR)
    rows = {path.name for path in (tmp_path / "local" / "cache").iterdir() if path.is_dir()}
    assert len(rows) == 3
    for name in rows:
        written = {path.name: path.read_bytes() for path in (bucket / "beam" / "cache" / name).iterdir()}
        for copy in (tmp_path / "local" / "cache", local_copy(bucket / "beam" / "cache")):
            assert {path.name: path.read_bytes() for path in (copy / name).iterdir()} == written


def test_shards_that_are_there_are_not_made_again(tmp_path: Path, small_shards: None) -> None:
    recipe = recipe_of(tmp_path)
    prepare_all(recipe, tmp_path / "work", ONE)
    whole = files(tmp_path / "work")
    kept = next((tmp_path / "work").rglob("shard-00003.json")).parent / "shard-00000.json"
    stamp = kept.stat().st_mtime_ns
    for name in ("MANIFEST.json", "index.json", "shard-00001.json", "rows-00002.array_record", "shard-00002.json"):
        (kept.parent / name).unlink()
    (kept.parent / "rows-00001.array_record").write_bytes(b"half")
    left = kept.parent.with_suffix(".beam")
    left.mkdir()
    (left / "begins.json").write_text("[1, 2, 3]")
    prepare_all(recipe, tmp_path / "work", ONE)
    assert files(tmp_path / "work") == whole
    assert kept.stat().st_mtime_ns == stamp


def test_what_fails_in_a_worker_is_said_in_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    engine, config = beam.make_engine(ONE), DataConfig(duplicates=DuplicatesConfig(threshold=0.7))
    for name, kind in (("cut.jsonl.gz", ValueError), ("missing.jsonl", OSError)):
        source = Source("a source", (functools.partial(sources._read_file, tmp_path / name),), "0", 1)
        with pytest.raises(kind, match=f"near-duplicates of a source: the Beam pipeline failed: .*{name}") as caught:
            engine.find_near_duplicates(source, config, tmp_path / "gone")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    ["--runner='Direct", "--direct_num_workers=many"],
)
def test_options_that_cannot_be_read_are_refused(options: str) -> None:
    with pytest.raises(ValueError, match="can't be read"):
        beam.make_engine(options)
