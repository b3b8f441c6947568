"""A stage that does not fit its parent never starts: each mismatch is refused in words that name both values, or, where
something is missing or damaged, its path and what to do."""

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import META, RESULT
from jaxstages.cli.train import train
from jaxstages.config import ModelConfig, Recipe
from jaxstages.data.tokenizer import Specials
from jaxstages.runtime import manifest
from jaxstages.runtime.files import read_json, write_json
from jaxstages.runtime.workdir import checkpoint_folder, quarantine_folder, result_file, tokenizer_file
from jaxstages.train.handoff import OVERRIDABLE_MODEL_FIELDS, check_lineage, read_parent
from jaxstages.train.setup import StageSetup, setup_stage
from tests.reliability.harness import Home


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change its metadata in place, or take what `change` returns, as if it had been saved so: its manifest fits."""
    meta = read_json(checkpoint / "meta" / "metadata")
    changed = change(meta)
    write_json(checkpoint / "meta" / "metadata", meta if changed is None else changed)
    manifest.write_manifest(checkpoint)


class Pair:
    """A finished stage as it lies in a case's own copy, and the recipe and contract of the child that asks for it."""

    def __init__(self, recipe: Recipe, setup: StageSetup, work: Path) -> None:
        self.recipe, self.setup, self.work = recipe, setup, work
        self.contract = copy.deepcopy(setup.contract)
        self.parent = work / "pretrain"

    @property
    def best(self) -> Path:
        return checkpoint_folder(self.parent, read_json(result_file(self.parent))["best_step"])

    def change_result(self, name: str, value: Any) -> None:
        write_json(result_file(self.parent), read_json(result_file(self.parent)) | {name: value})

    def lose_result(self, name: str) -> None:
        result = read_json(result_file(self.parent))
        del result[name]
        write_json(result_file(self.parent), result)

    def change_meta(self, change: Callable[[dict[str, Any]], Any]) -> None:
        rewrite(self.best, change)

    def read(self) -> None:
        read_parent(self.parent, self.setup.program, self.contract)

    def train(self) -> None:
        train(self.recipe, self.work, "finetune")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A finished stage of two steps, made once; each case works on a copy."""
    home = Home(tmp_path_factory.mktemp("handoff"), command=("pretrain",), more=("--config.pretrain.loop.steps=2",))
    assert home.run(home.folder / "work") == 0
    recipe = recipes.from_dict(read_json(home.folder / "work" / "recipe.json")["recipe"])
    return Pair(recipe, setup_stage(recipe, "finetune", home.folder / "work"), home.folder / "work")


@pytest.fixture
def pair(made: Pair, tmp_path: Path) -> Pair:
    shutil.copytree(made.work, tmp_path / "work", ignore=shutil.ignore_patterns("tensorboard"))
    return Pair(copy.deepcopy(made.recipe), made.setup, tmp_path / "work")


Case = Callable[[Pair], Any]
CASES: dict[str, tuple[Case, str]] = {}
"""Name -> what is changed and then asked, and a regular expression of the words that it is refused with."""


def case(name: str, words: str) -> Callable[[Case], Case]:
    def keep(function: Case) -> Case:
        assert name not in CASES
        CASES[name] = (function, words)
        return function

    return keep


# The tokenizer.


@case("tokenizer: one byte more", r"tokenizer_sha256 is '\w{64}' there, '\w{64}' here; use the recipe that")
def _(pair: Pair) -> None:
    file = tokenizer_file(pair.work)
    file.write_text(file.read_text() + "\n")
    pair.train()


@case("tokenizer: of the same size, other merges", r"tokenizer_sha256 is '\w{64}' there, '\w{64}' here")
def _(pair: Pair) -> None:
    pair.contract["tokenizer_sha256"] = "0" * 64
    pair.read()


@case("vocabulary size", r"vocab_size is 300 there, 301 here")
def _(pair: Pair) -> None:
    pair.contract["vocab_size"] = 301
    pair.read()


def _special(place: int) -> Case:
    def run(pair: Pair) -> None:
        pair.contract["special_ids"][place] = 77
        pair.read()

    return run


for place, special in enumerate(Specials._fields):
    there = ", ".join(map(str, range(6)))
    here = ", ".join("77" if i == place else str(i) for i in range(6))
    words = rf"special_ids is \[{there}\] there, \[{here}\] here"
    case(f"special id: {special}", words)(_special(place))


@case("chat template", r"chat_template is '.*' there, 'ChatML' here")
def _(pair: Pair) -> None:
    pair.contract["chat_template"] = "ChatML"
    pair.read()


# The model: every field that config.model has, so a new one is tested from its first day.


def _other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 3
        case _:
            return f"not {value}"


def _field(names: tuple[str, ...]) -> Case:
    def run(pair: Pair) -> None:
        inner = pair.contract["model"]
        for name in names[:-1]:
            inner = inner[name]
        old, inner[names[-1]] = inner[names[-1]], _other(inner[names[-1]])
        words = (
            f"pretrain does not fit this recipe: model differs: {'.'.join(names)} {old!r} there, {_other(old)!r} here;"
        )
        with pytest.raises(ValueError, match=re.escape(words)) as info:
            pair.read()
        raise info.value

    return run


def _fields(config: Any, names: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Names from the outside in, of each field that holds no others."""
    found = [((*names, field.name), getattr(config, field.name)) for field in dataclasses.fields(config)]
    return [path for name, value in found for path in (_fields(value, name) if _holds(value) else [name])]


def _holds(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


for names in _fields(ModelConfig()):
    if names[0] in OVERRIDABLE_MODEL_FIELDS:  # these make no other parameters: see below
        continue
    case(f"config.model.{'.'.join(names)}", r"model differs: \S+ .* there, .* here; use")(_field(names))


@case("config.model.context, by way of the recipe", r"model differs: context 64 there, 32 here; use the recipe that")
def _(pair: Pair) -> None:
    pair.recipe.model.context = 32
    pair.train()


@case("a field of the model that this version does not know", r"model differs: experts 8 there, None here; use")
def _(pair: Pair) -> None:
    pair.change_meta(lambda meta: meta["model"].update(experts=8))
    pair.read()


# The folder.


@case(
    "never trained", r"the parent \S+/work/pretrain was not trained; run `jaxstages pretrain` with --workdir=\S+/work"
)
def _(pair: Pair) -> None:
    shutil.rmtree(pair.parent)
    pair.train()


@case("not finished", r"the parent \S+/work/pretrain is not finished; run `jaxstages pretrain` with --workdir=\S+/work")
def _(pair: Pair) -> None:
    result_file(pair.parent).unlink()
    pair.train()


@case("an empty folder", r"the parent \S+/work/pretrain was not trained; run `jaxstages pretrain`")
def _(pair: Pair) -> None:
    shutil.rmtree(pair.parent)
    pair.parent.mkdir()
    pair.read()


@case("a file in place of the folder", r"the parent \S+/work/pretrain is no folder; name WORKDIR/STAGE of a run")
def _(pair: Pair) -> None:
    shutil.rmtree(pair.parent)
    pair.parent.write_text("")
    pair.train()


@case("init_from: nowhere", r"the parent /no/where is no finished stage, it has no result.json; name WORKDIR/STAGE")
def _(pair: Pair) -> None:
    pair.recipe.finetune.init_from = "/no/where"
    pair.train()


@case(
    "init_from: a workdir, not a stage", r"the parent \S+/work is no finished stage, it has no result.json; name WORK"
)
def _(pair: Pair) -> None:
    pair.recipe.finetune.init_from = str(pair.work)
    pair.train()


@case("init_from: a step, not a stage", r"the parent \S+/checkpoints/2 is no finished stage, .* name WORKDIR/STAGE")
def _(pair: Pair) -> None:
    pair.recipe.finetune.init_from = str(pair.best)
    pair.train()


@case(
    "init_from: the stage itself", r"config.finetune.init_from='\S+/finetune' is finetune itself, or .*; name a stage"
)
def _(pair: Pair) -> None:
    pair.recipe.finetune.init_from = str(pair.work / "pretrain" / ".." / "finetune")
    pair.train()


@case(
    "init_from: a later stage",
    r"config.finetune.init_from='\S+/instruct' is finetune itself, or a stage after it; name",
)
def _(pair: Pair) -> None:
    shutil.copytree(pair.parent, pair.work / "instruct")
    pair.recipe.finetune.init_from = str(pair.work / "instruct")
    pair.train()


# result.json.


def _result(content: str) -> Case:
    def run(pair: Pair) -> None:
        result_file(pair.parent).write_text(content)
        pair.train()

    return run


AGAIN = r"; remove it, and run `jaxstages pretrain` again"
for name, content in {
    "empty": "",
    "cut short": '{"stage": "pre',
    "a list": "[1, 2]",
    "null": "null",
    "nested too deeply": "[" * 100_000,
    "no UTF-8": "\udcff",
}.items():
    run = _result(content)
    if name == "no UTF-8":

        def run(pair: Pair) -> None:
            result_file(pair.parent).write_bytes(b'{"stage": "\xff"}')
            pair.train()

    case(f"result.json: {name}", r"pretrain/result.json is damaged.*" + AGAIN)(run)


@case("result.json: a folder", r"pretrain/result.json.*" + AGAIN)
def _(pair: Pair) -> None:
    result_file(pair.parent).unlink()
    result_file(pair.parent).mkdir()
    pair.read()


def _without(name: str) -> Case:
    def run(pair: Pair) -> None:
        pair.lose_result(name)
        pair.read()

    return run


for name in RESULT:
    case(f"result.json: lacks {name}", rf"result.json is damaged, it lacks {name}, or .*{AGAIN}")(_without(name))


def _wrong_result(name: str, value: Any) -> Case:
    def run(pair: Pair) -> None:
        pair.change_result(name, value)
        pair.read()

    return run


for name, value in (
    *(("best_step", "2"), ("best_step", True), ("best_step", 2.0), ("best_step", None), ("best_step", [2])),
    *(("params_sha256", 7), ("params_sha256", None), ("parent", "pretrain"), ("steps", "many"), ("status", None)),
):
    case(f"result.json: {name} is {value!r}", rf"result.json is damaged, it lacks {name}, or has .*{AGAIN}")(
        _wrong_result(name, value)
    )

ANEW = r"; put a good copy there, or remove \S+/pretrain to train that stage anew"
case("result.json: a step that is not there", r"pretrain/checkpoints/99 is damaged, or no checkpoint.*" + ANEW)(
    _wrong_result("best_step", 99)
)
case("result.json: a step below zero", r"pretrain/checkpoints/-1 is damaged, or no checkpoint.*" + ANEW)(
    _wrong_result("best_step", -1)
)
case("result.json: another params_sha256", r"params_sha256 is \w{12}…, its result.json says 123456789abc….*" + ANEW)(
    _wrong_result("params_sha256", "123456789abcdef")
)


# The checkpoint.


@case("checkpoint: in quarantine", r"checkpoints/2 is damaged, .* \(it was moved to \S+/quarantine/2.\d+\)" + ANEW)
def _(pair: Pair) -> None:
    manifest.quarantine(pair.best, quarantine_folder(pair.parent), "a bit has flipped")
    pair.train()


@case("checkpoint: a link to one", r"pretrain/checkpoints/2 is no folder" + ANEW)
def _(pair: Pair) -> None:
    place = pair.best
    place.rename(pair.work / "elsewhere")
    place.symlink_to(pair.work / "elsewhere")
    pair.read()


@case("checkpoint: an empty folder", r"checkpoints/2 is damaged, or no checkpoint of jaxstages: .* is missing" + ANEW)
def _(pair: Pair) -> None:
    shutil.rmtree(pair.best)
    checkpoint_folder(pair.parent, 2).mkdir()
    pair.read()


@case(
    "checkpoint: of another program, without meta", r"checkpoints/2 is damaged, or no checkpoint of jaxstages.*" + ANEW
)
def _(pair: Pair) -> None:
    shutil.rmtree(pair.best / "meta")
    manifest.write_manifest(pair.best)
    pair.read()


@case("checkpoint: no params in it", r"checkpoints/2/params is damaged, Orbax can't read it.*" + ANEW)
def _(pair: Pair) -> None:
    shutil.rmtree(pair.best / "params")
    manifest.write_manifest(pair.best)
    pair.read()


@case("checkpoint: no manifest", r"checkpoints/2 has no readable MANIFEST.json.*" + ANEW)
def _(pair: Pair) -> None:
    (pair.best / manifest.MANIFEST).unlink()
    pair.read()


@case("checkpoint: a file more than its manifest lists", r"missing or unlisted are params/more" + ANEW)
def _(pair: Pair) -> None:
    (pair.best / "params" / "more").write_text("")
    pair.read()


@case("checkpoint: a bit of its meta flipped", r"meta/metadata is damaged: it is not the file of \d+ bytes.*" + ANEW)
def _(pair: Pair) -> None:
    file = pair.best / "meta" / "metadata"
    file.write_text(file.read_text().replace('"pretrain"', '"pretraim"', 1))
    pair.read()


# The metadata.


@case("meta: of a newer format", r"checkpoints/2 has format 2, this version reads up to 1; install a newer jaxstages")
def _(pair: Pair) -> None:
    pair.change_meta(lambda meta: meta.update(format=2))
    pair.train()


@case("meta: a list", r"checkpoints/2 is damaged, or no checkpoint of jaxstages.*" + ANEW)
def _(pair: Pair) -> None:
    pair.change_meta(lambda meta: [meta])
    pair.read()


@case("meta: of another program", r"no checkpoint of jaxstages: .* lacks .*tokenizer_sha256, .*" + ANEW)
def _(pair: Pair) -> None:
    pair.change_meta(lambda meta: {"format": 1, "iteration": 2, "model_args": {"n_layer": 2}})
    pair.read()


def _meta(name: str, value: Any) -> Case:
    """Without that name, or, where there is a value, with it."""

    def run(pair: Pair) -> None:
        rest = [] if value is None else [(name, value)]
        pair.change_meta(lambda meta: dict([*((key, meta[key]) for key in meta if key != name), *rest]))
        pair.read()

    return run


for name in META:
    words = (
        rf"checkpoints/2 is damaged, or no checkpoint of jaxstages: .*metadata is damaged, it lacks {name}, or .*{ANEW}"
    )
    case(f"meta: lacks {name}", words)(_meta(name, None))
for name, value in (("model", "gpt2"), ("special_ids", 7), ("fingerprint", []), ("vocab_size", True)):
    words = rf"no checkpoint of jaxstages: .*metadata is damaged, it lacks {name}, or has it in another form{ANEW}"
    case(f"meta: {name} is {value!r}", words)(_meta(name, value))
case("meta: of another step", r"checkpoints/2 is damaged: it says that it is of step 1, not 2" + ANEW)(_meta("step", 1))


def _fingerprint(change: Callable[[dict[str, Any]], Any]) -> Case:
    def run(pair: Pair) -> None:
        pair.change_meta(lambda meta: change(meta["fingerprint"]))
        pair.read()

    return run


def _as(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """embedding/... written with another dtype or shape."""

    def change(prints: dict[str, Any]) -> None:
        prints["params/embedding"] = prints["params/embedding"].replace(old, new)

    return change


FIT = r"checkpoints/2 does not fit the recipe's model \({}\); give config.model the values"
for name, change, words in (
    ("shape", _as("[300", "[301"), r"embedding: checkpoint float32\[301, 16\], recipe float32\[300, 16\]"),
    ("dtype", _as("float32", "bfloat16"), r"embedding: checkpoint bfloat16\[300, 16\], recipe float32\[300, 16\]"),
    ("one more", lambda prints: prints.update({"params/lm": "00 float32[2]"}), "params/lm: only in the checkpoint"),
    ("one less", lambda prints: prints.pop("params/embedding") and None, "params/embedding: only in the recipe"),
):
    case(f"params: {name}", FIT.format(f"(params/)?{words}"))(_fingerprint(change))


@case("params: other values", r"checkpoints/2 is damaged: its parameters are not what was saved" + ANEW)
def _(pair: Pair) -> None:
    pair.change_meta(lambda meta: meta["fingerprint"].update({"params/embedding": "00 float32[300, 16]"}))
    pair.read()


for value in ("float32", "", "00 float32[300", 7, None):
    words = r"checkpoints/2 is no checkpoint of jaxstages: its fingerprint has another form" + ANEW
    case(f"params: fingerprint {value!r}", words)(
        _fingerprint(lambda prints, value=value: prints.update({"params/embedding": value}))
    )


# A parent that was trained anew after its child had begun.


@case(
    "the parent was trained anew",
    r"work/finetune began from \S+/pretrain with params_sha256 abcdefabcdef…, which is now",
)
def _(pair: Pair) -> None:
    check_lineage(
        pair.work / "finetune", {"path": str(pair.parent), "step": 2, "params_sha256": "abcdefabcdef" + "0" * 52}
    )


@case(
    "the parent was trained anew, in a run that was moved",
    r"work/finetune began from /gone/pretrain with params_sha256 abcdefabcdef…, which is now",
)
def _(pair: Pair) -> None:
    check_lineage(
        pair.work / "finetune", {"path": "/gone/pretrain", "step": 2, "params_sha256": "abcdefabcdef" + "0" * 52}
    )


@case(
    "the parent was trained anew, and the child goes on",
    r"pretrain began from \S+/other with .* remove \S+/pretrain to",
)
def _(pair: Pair) -> None:
    shutil.copytree(pair.parent, pair.work / "other")
    parent = {"path": str(pair.work / "other"), "step": 2, "params_sha256": "123456789abc"}
    pair.change_meta(lambda meta: meta.update(parent=parent))
    result_file(pair.parent).unlink()
    train(pair.recipe, pair.work, "pretrain")


@pytest.mark.parametrize("name", CASES)
def test_a_parent_that_does_not_fit_is_refused(pair: Pair, name: str) -> None:
    change, words = CASES[name]
    with pytest.raises(ValueError, match=words):
        change(pair)
    assert not (pair.work / "finetune" / "result.json").exists()


def test_a_child_may_have_a_dropout_a_dtype_and_an_unrolling_of_its_own(pair: Pair) -> None:
    """An earlier version refused them, as if they made other parameters."""
    assert set(OVERRIDABLE_MODEL_FIELDS) == {"dropout", "dtype", "unroll"}
    pair.contract["model"] |= {"dropout": 0.3, "dtype": "bfloat16", "unroll": True}
    pair.read()


def test_the_parent_as_it_was_left_is_taken(pair: Pair) -> None:
    """Else the cases above could all be refused for one wrong reason."""
    pair.read()
    pair.change_meta(lambda meta: None)
    pair.read()
    assert len(CASES) >= 30 and json.dumps(pair.contract) == json.dumps(pair.setup.contract)
