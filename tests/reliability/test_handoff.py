"""A stage that does not fit its parent never starts: each mismatch is refused with the field and both values, or, where
something is missing or damaged, with its path and the remedy."""

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import META, RESULT
from jaxstages.cli.train import train
from jaxstages.config import ModelConfig, Recipe
from jaxstages.data.tokenizer import Specials
from jaxstages.runtime import manifest
from jaxstages.runtime.files import read_json, write_json
from jaxstages.runtime.workdir import checkpoint_folder, quarantine_folder, result_file, tokenizer_file
from jaxstages.training.handoff import OVERRIDABLE_MODEL_FIELDS, check_lineage, read_parent
from jaxstages.training.setup import StageSetup, setup_stage
from tests.reliability.harness import Home


class Pair:
    """A finished parent in a folder of its own, and the recipe and contract of the child that starts from it."""

    def __init__(self, recipe: Recipe, setup: StageSetup, work: Path) -> None:
        self.recipe, self.setup, self.work = recipe, setup, work
        self.contract = copy.deepcopy(setup.contract)
        self.parent = work / "pretrain"
        self.result = result_file(self.parent)

    @property
    def best(self) -> Path:
        return checkpoint_folder(self.parent, read_json(self.result)["best_step"])

    def read(self) -> None:
        read_parent(self.parent, self.setup.program, self.contract)

    def train(self) -> None:
        train(self.recipe, self.work, "finetune")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A finished stage of two steps; each case works on a copy."""
    home = Home(tmp_path_factory.mktemp("handoff"), command=("pretrain",), more=("--config.pretrain.loop.steps=2",))
    assert home.run(home.folder / "work") == 0
    recipe = recipes.from_dict(read_json(home.folder / "work" / "recipe.json")["recipe"])
    return Pair(recipe, setup_stage(recipe, "finetune", home.folder / "work"), home.folder / "work")


@pytest.fixture
def pair(original: Pair, tmp_path: Path) -> Pair:
    shutil.copytree(original.work, tmp_path / "work", ignore=shutil.ignore_patterns("tensorboard"))
    return Pair(copy.deepcopy(original.recipe), original.setup, tmp_path / "work")


Change = Callable[[Pair], Any]


class Case(NamedTuple):
    """change: made to the pair. words: pattern of the refusal. start: how the child then asks for its parent."""

    name: str
    change: Change
    words: str
    start: Callable[[Pair], None] = Pair.read


# Changes of the contract, of result.json, of the metadata, and of folders.


def contract(name: str, value: Any) -> Change:
    return lambda pair: pair.contract.update({name: value})


def special_id(index: int) -> Change:
    return lambda pair: pair.contract["special_ids"].__setitem__(index, 77)


def model_field(path: tuple[str, ...]) -> Change:
    def change(pair: Pair) -> None:
        owner = pair.contract["model"]
        for name in path[:-1]:
            owner = owner[name]
        owner[path[-1]] = another(owner[path[-1]])

    return change


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 3
        case _:
            return f"not {value}"


def init_from(path: Callable[[Pair], Path]) -> Change:
    return lambda pair: setattr(pair.recipe.finetune, "init_from", str(path(pair)))


def result_is(content: bytes) -> Change:
    return lambda pair: pair.result.write_bytes(content)


def result_has(name: str, value: Any) -> Change:
    return lambda pair: write_json(pair.result, read_json(pair.result) | {name: value})


def result_lacks(name: str) -> Change:
    return lambda pair: write_json(pair.result, without(read_json(pair.result), name))


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def meta(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """The metadata that `edit` returns, under a manifest that fits, as if it had been saved so."""

    def change(pair: Pair) -> None:
        best = pair.best
        write_json(best / "meta" / "metadata", edit(read_json(best / "meta" / "metadata")))
        manifest.write_manifest(best)

    return change


def saved_as(edit: Callable[[dict[str, str]], dict[str, Any]]) -> Change:
    """The shapes, dtypes and digests of the checkpoint's arrays, as `edit` returns them."""
    return meta(lambda values: values | {"fingerprint": edit(values["fingerprint"])})


def embedding_as(old: str, new: str) -> Change:
    name = "params/embedding"
    return saved_as(lambda prints: prints | {name: prints[name].replace(old, new)})


def removed(path: Callable[[Pair], Path], seal: bool = True) -> Change:
    def change(pair: Pair) -> None:
        best, target = pair.best, path(pair)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        if seal:
            manifest.write_manifest(best)

    return change


def emptied(path: Callable[[Pair], Path]) -> Change:
    def change(pair: Pair) -> None:
        target = path(pair)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        target.mkdir()

    return change


def replace_text(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new, 1))


def parent_is_a_file(pair: Pair) -> None:
    shutil.rmtree(pair.parent)
    pair.parent.write_text("")


def checkpoint_is_a_link(pair: Pair) -> None:
    best = pair.best
    best.rename(pair.work / "elsewhere")
    best.symlink_to(pair.work / "elsewhere")


def starts_from_a_later_stage(pair: Pair) -> None:
    shutil.copytree(pair.parent, pair.work / "instruct")
    pair.recipe.finetune.init_from = str(pair.work / "instruct")


def leaves(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of each field that is no dataclass itself."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, field.name))
        else:
            yield (*path, field.name), value


SHA = r"'\w{64}'"
TRAIN_AGAIN = r".*remove it, and run `jaxstages pretrain` again"
REMOVE_STAGE = r".*put a good copy there, or remove \S+/pretrain"
GIVE = r".*give config.model\b"
NOT_FINISHED = r"parent {} is no finished stage.*name WORKDIR/STAGE"

CASES = [
    # The contract. Every field of config.model is tested, a new one from its first day.
    Case(
        "tokenizer: one byte more",
        lambda pair: replace_text(tokenizer_file(pair.work), "{", "{ "),
        rf"tokenizer_sha256 is {SHA} there, {SHA} here.*use the recipe that",
        Pair.train,
    ),
    Case(
        "tokenizer: same size, other merges",
        contract("tokenizer_sha256", "0" * 64),
        rf"tokenizer_sha256 is {SHA} there, '0+' here",
    ),
    Case("vocabulary size", contract("vocab_size", 301), r"vocab_size is 300 there, 301 here"),
    *(
        Case(
            f"special id: {name}", special_id(index), rf"special_ids is \[.*\b{index}\b.*\] there, \[.*\b77\b.*\] here"
        )
        for index, name in enumerate(Specials._fields)
    ),
    Case("chat template", contract("chat_template", "ChatML"), r"chat_template is '.*' there, 'ChatML' here"),
    *(
        Case(f"config.model.{'.'.join(path)}", model_field(path), rf"{re.escape('.'.join(path))} .+ there, .+ here")
        for path, _ in leaves(ModelConfig())
        if path[0] not in OVERRIDABLE_MODEL_FIELDS  # these make no other parameters
    ),
    Case(
        "config.model.context, by the recipe",
        lambda pair: setattr(pair.recipe.model, "context", 32),
        r"context 64 there, 32 here; use the recipe that",
        Pair.train,
    ),
    Case(
        "a field of the model that this version does not have",
        meta(lambda values: values | {"model": values["model"] | {"experts": 8}}),
        r"experts 8 there, None here",
    ),
    # The parent's folder.
    Case(
        "never trained",
        removed(lambda pair: pair.parent, seal=False),
        r"parent \S+/pretrain was not trained; run `jaxstages pretrain` with --workdir=\S+/work",
        Pair.train,
    ),
    Case(
        "not finished",
        lambda pair: pair.result.unlink(),
        r"parent \S+/pretrain is not finished; run `jaxstages pretrain` with --workdir=\S+/work",
        Pair.train,
    ),
    Case(
        "an empty folder", emptied(lambda pair: pair.parent), r"\S+/pretrain was not trained; run `jaxstages pretrain`"
    ),
    Case("a file", parent_is_a_file, r"parent \S+/pretrain is no folder; name WORKDIR/STAGE", Pair.train),
    Case("init_from: nowhere", init_from(lambda _: Path("/no/where")), NOT_FINISHED.format("/no/where"), Pair.train),
    Case("init_from: a workdir", init_from(lambda pair: pair.work), NOT_FINISHED.format(r"\S+/work"), Pair.train),
    Case("init_from: a step", init_from(lambda pair: pair.best), NOT_FINISHED.format(r"\S+/checkpoints/2"), Pair.train),
    Case(
        "init_from: the stage itself",
        init_from(lambda pair: pair.parent / ".." / "finetune"),
        r"finetune.init_from='\S+/finetune' is finetune itself",
        Pair.train,
    ),
    Case(
        "init_from: a later stage",
        starts_from_a_later_stage,
        r"finetune.init_from='\S+/instruct' is .* a later stage",
        Pair.train,
    ),
    # result.json.
    *(
        Case(f"result.json: {name}", result_is(content), rf"result.json is damaged{TRAIN_AGAIN}", Pair.train)
        for name, content in {
            "empty": b"",
            "cut short": b'{"stage": "pre',
            "a list": b"[1, 2]",
            "null": b"null",
            "nested too deeply": b"[" * 100_000,
            "no UTF-8": b'{"stage": "\xff"}',
        }.items()
    ),
    Case("result.json: a folder", emptied(lambda pair: pair.result), rf"pretrain/result.json{TRAIN_AGAIN}"),
    *(
        Case(f"result.json: lacks {name}", result_lacks(name), rf"result.json is damaged.*lacks {name}{TRAIN_AGAIN}")
        for name in RESULT
    ),
    *(
        Case(
            f"result.json: {name} is {value!r}",
            result_has(name, value),
            rf"result.json is damaged.*lacks {name}, or has{TRAIN_AGAIN}",
        )
        for name, value in (
            *(("best_step", "2"), ("best_step", True), ("best_step", 2.0), ("best_step", None), ("best_step", [2])),
            *(("params_sha256", 7), ("params_sha256", None), ("parent", "pretrain"), ("steps", "many")),
            ("status", None),
        )
    ),
    *(
        Case(
            f"result.json: best_step is {step}, which has no checkpoint",
            result_has("best_step", step),
            rf"checkpoints/{step} is damaged, or no checkpoint{REMOVE_STAGE}",
        )
        for step in (99, -1)
    ),
    Case(
        "result.json: another params_sha256",
        result_has("params_sha256", "123456789abcdef"),
        rf"params_sha256 is \w{{12}}.*result.json says 123456789abc{REMOVE_STAGE}",
    ),
    # The checkpoint.
    Case(
        "checkpoint: in quarantine",
        lambda pair: manifest.quarantine(pair.best, quarantine_folder(pair.parent), "a bit has flipped"),
        rf"checkpoints/2 is damaged.*moved to \S+/quarantine/2{REMOVE_STAGE}",
        Pair.train,
    ),
    Case("checkpoint: a link", checkpoint_is_a_link, rf"checkpoints/2 is no folder{REMOVE_STAGE}"),
    Case("checkpoint: an empty folder", emptied(lambda pair: pair.best), rf"checkpoints/2 .*is missing{REMOVE_STAGE}"),
    Case(
        "checkpoint: without meta, as of another program",
        removed(lambda pair: pair.best / "meta"),
        rf"checkpoints/2 is damaged, or no checkpoint of jaxstages{REMOVE_STAGE}",
    ),
    Case(
        "checkpoint: without params",
        removed(lambda pair: pair.best / "params"),
        rf"checkpoints/2/params is damaged{REMOVE_STAGE}",
    ),
    Case(
        "checkpoint: no manifest",
        removed(lambda pair: pair.best / manifest.MANIFEST, seal=False),
        rf"checkpoints/2 has no readable MANIFEST.json{REMOVE_STAGE}",
    ),
    Case(
        "checkpoint: a file that its manifest does not list",
        lambda pair: (pair.best / "params" / "more").write_text(""),
        rf"unlisted are params/more{REMOVE_STAGE}",
    ),
    Case(
        "checkpoint: its metadata changed in place",
        lambda pair: replace_text(pair.best / "meta" / "metadata", '"pretrain"', '"pretraim"'),
        rf"meta/metadata is damaged{REMOVE_STAGE}",
    ),
    # Its metadata.
    Case(
        "meta: of a newer format",
        meta(lambda values: values | {"format": 2}),
        r"checkpoints/2 has format 2, .* 1; install a newer jaxstages",
        Pair.train,
    ),
    Case("meta: a list", meta(lambda values: [values]), rf"checkpoints/2 .*no checkpoint of jaxstages{REMOVE_STAGE}"),
    Case(
        "meta: of another program",
        meta(lambda _: {"format": 1, "iteration": 2, "model_args": {"n_layer": 2}}),
        rf"no checkpoint of jaxstages.* lacks .*tokenizer_sha256{REMOVE_STAGE}",
    ),
    *(
        Case(
            f"meta: lacks {name}",
            meta(lambda values, name=name: without(values, name)),
            rf"checkpoints/2 is damaged.* lacks {name}\b{REMOVE_STAGE}",
        )
        for name in META
    ),
    *(
        Case(
            f"meta: {name} is {value!r}",
            meta(lambda values, name=name, value=value: values | {name: value}),
            rf"metadata is damaged.* lacks {name}, or has it in another form{REMOVE_STAGE}",
        )
        for name, value in (("model", "gpt2"), ("special_ids", 7), ("fingerprint", []), ("vocab_size", True))
    ),
    Case(
        "meta: of another step",
        meta(lambda values: values | {"step": 1}),
        rf"checkpoints/2 is damaged.*step 1, not 2{REMOVE_STAGE}",
    ),
    # Shapes, dtypes and digests of its parameters.
    Case(
        "params: shape",
        embedding_as("[300", "[301"),
        rf"embedding: checkpoint .*\[301, 16\], recipe .*\[300, 16\]{GIVE}",
    ),
    Case(
        "params: dtype", embedding_as("float32", "bfloat16"), rf"embedding: checkpoint bfloat16.*, recipe float32{GIVE}"
    ),
    Case(
        "params: one more",
        saved_as(lambda prints: prints | {"params/lm": "00 float32[2]"}),
        rf"params/lm: only in the checkpoint{GIVE}",
    ),
    Case(
        "params: one less",
        saved_as(lambda prints: without(prints, "params/embedding")),
        rf"params/embedding: only in the recipe{GIVE}",
    ),
    Case(
        "params: other values",
        saved_as(lambda prints: prints | {"params/embedding": "00 float32[300, 16]"}),
        rf"checkpoints/2 is damaged: its parameters are not what was saved{REMOVE_STAGE}",
    ),
    *(
        Case(
            f"params: fingerprint {value!r}",
            saved_as(lambda prints, value=value: prints | {"params/embedding": value}),
            rf"checkpoints/2 .*fingerprint has another form{REMOVE_STAGE}",
        )
        for value in ("float32", "", "00 float32[300", 7, None)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_parent_that_does_not_fit_is_refused(pair: Pair, case: Case) -> None:
    case.change(pair)
    with pytest.raises(ValueError, match=case.words):
        case.start(pair)
    assert not (pair.work / "finetune" / "result.json").exists()


def test_the_parent_as_it_was_left_is_taken(pair: Pair) -> None:
    """Else the cases above could all be refused for one wrong reason."""
    pair.read()
    meta(lambda values: values)(pair)
    pair.read()
    assert json.dumps(pair.contract) == json.dumps(pair.setup.contract)


def test_a_refusal_names_both_values_of_a_model_field(pair: Pair) -> None:
    before = pair.contract["model"]["attention"]["heads"]
    pair.contract["model"]["attention"]["heads"] = before + 3
    with pytest.raises(ValueError, match=rf"model differs: attention.heads {before} there, {before + 3} here; use"):
        pair.read()


def test_a_child_may_have_a_dropout_a_dtype_and_an_unrolling_of_its_own(pair: Pair) -> None:
    """An earlier version refused them, as if they made other parameters."""
    assert set(OVERRIDABLE_MODEL_FIELDS) == {"dropout", "dtype", "unroll"}
    pair.contract["model"] |= {"dropout": 0.3, "dtype": "bfloat16", "unroll": True}
    pair.read()


# A parent that was trained anew after its child had begun.


@pytest.mark.parametrize("recorded", ["as it is", "/gone/pretrain"], ids=["in place", "in a run that was moved"])
def test_a_child_of_a_parent_that_was_trained_anew_is_refused(pair: Pair, recorded: str) -> None:
    path = str(pair.parent) if recorded == "as it is" else recorded
    lineage = {"path": path, "step": 2, "params_sha256": "abcdefabcdef" + "0" * 52}
    words = rf"finetune began from {path} with params_sha256 abcdefabcdef…, which is now \w{{12}}.*remove \S+/finetune"
    with pytest.raises(ValueError, match=words):
        check_lineage(pair.work / "finetune", lineage)


def test_a_stage_whose_parent_was_trained_anew_does_not_go_on(pair: Pair) -> None:
    shutil.copytree(pair.parent, pair.work / "other")
    parent = {"path": str(pair.work / "other"), "step": 2, "params_sha256": "123456789abc"}
    meta(lambda values: values | {"parent": parent})(pair)
    pair.result.unlink()
    with pytest.raises(ValueError, match=r"pretrain began from \S+/other with .* remove \S+/pretrain to"):
        train(pair.recipe, pair.work, "pretrain")
