"""A folder of Hugging Face's form -> `WORKDIR/import/`, a finished stage like any other.

Only data is read: config.json, safetensors, tokenizer.json and what stands beside it. Code that a folder names
(`auto_map`) is never loaded, pickles are never opened.
"""

import copy
import dataclasses
import hashlib
import importlib
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import named_leaves, params_sha256, tree_of
from jaxstages.checkpoint.manager import Checkpoints
from jaxstages.config import IMPORT, LoraConfig, Recipe, TokenizerConfig
from jaxstages.interop.config_json import OURS, Described, read_config, text_config
from jaxstages.interop.families import FAMILIES, WRAPPERS
from jaxstages.interop.layout import Place, by_plain_names, match, places_of, read_parameter
from jaxstages.interop.peft_import import is_adapter, model_folder, read_adapter
from jaxstages.interop.tensors import Stored, open_folder, unread_of
from jaxstages.models import lora
from jaxstages.runtime.console import Progress, say
from jaxstages.runtime.files import make_folder, read_json, sync, write_json
from jaxstages.runtime.workdir import result_file, tokenizer_file
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.saved_items import to_items
from jaxstages.training.setup import StageSetup, setup_stage
from jaxstages.training.step import init_state
from jaxstages.types import Params

SCHEME = "hf:"
KEPT = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "README.md")
"""Files of the source that stay in `WORKDIR/import/source/`, beside the config of its text."""

OF_TOKENIZER = ("tokenizer_config.json", "chat_template.jinja")
"""Those that belong to the tokenizer."""

READ = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md")
"""Files that a folder may be read by."""


def source_of(recipe: Recipe) -> str | None:
    """PATH of the stages' `init_from="hf:PATH"`; None if none has one. Raises ValueError for two of them."""
    named = {stage.init_from for stage in recipes.stages(recipe).values() if stage.init_from.startswith(SCHEME)}
    if len(named) > 1:
        raise ValueError(f"init_from names {' and '.join(sorted(named))}; a workdir has one import: name one of them")
    return named.pop().removeprefix(SCHEME) if named else None


def kept_source(workdir: Path) -> Path:
    return workdir / IMPORT / "source"


def find_folder(source: str) -> Path:
    """A local folder; or, where there is none and the library is there, a snapshot of the hub's repository.

    Raises:
        ValueError: neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder.absolute()
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source} is no folder; name one with config.json and safetensors")
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ValueError(
            f"{source} is no folder here; for a name on the hub, install the extra: pip install 'jaxstages[hf]'"
        ) from error
    try:
        return Path(hub.snapshot_download(source, allow_patterns=list(READ)))
    except Exception as error:  # of many types: no network, no such name, no right to it
        raise ValueError(f"{source} is no folder here, and the hub does not give it: {str(error)[:200]}") from error


def tokenizer_of(folder: Path) -> Path:
    """`tokenizer.json`, or SentencePiece's `tokenizer.model` where that is all there is; of adapters, that of their
    base where they have none."""
    for place in dict.fromkeys((folder, model_folder(folder))):
        for name in ("tokenizer.json", "tokenizer.model"):
            if (place / name).is_file():
                return place / name
    return model_folder(folder) / "tokenizer.json"


def describe(folder: Path) -> Described:
    """What a folder's config.json says; of adapters, that of their base."""
    return read_config(*_text_config(model_folder(folder)))


def _text_config(folder: Path) -> tuple[dict[str, Any], str]:
    """Of its config.json, or of the text part in it; and where that is."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; name the folder of a model in Hugging Face's form")
    return text_config(read_json(file), str(file), lambda: any("lm_head." in name for name in open_folder(folder)))


def adopt(recipe: Recipe, found: Described, tokenizer: Path) -> Recipe:
    """The recipe with the folder's model and tokenizer; context, dtype, dropout and unroll stay the recipe's.

    Raises:
        ValueError: the recipe says otherwise: it names the fields.
    """
    theirs, default = copy.deepcopy(found.model), recipes.ModelConfig()
    for name in OURS[:-1]:
        setattr(theirs, name, getattr(recipe.model, name))
    lines = recipes.differences(recipe.model, theirs, "config.model")
    changed = {line.split(":")[0] for line in recipes.differences(default, recipe.model, "config.model")}
    against = [line for line in lines if line.split(":")[0] in changed]
    wanted = TokenizerConfig(kind="file", path=str(tokenizer))
    plain = recipe.tokenizer == TokenizerConfig()
    if not plain:
        against += recipes.differences(recipe.tokenizer, wanted, "config.tokenizer")
    if against:
        raise ValueError(
            f"the recipe is not that of the imported {found.family.model_type}: {'; '.join(against)}; leave these out"
        )
    if theirs.context > found.reach:
        raise ValueError(
            f"config.model.context={theirs.context} must be at most {found.reach}: up to there, its positions are the "
            "same in each text"
        )
    return dataclasses.replace(recipe, model=theirs, tokenizer=wanted)


def adopted(recipe: Recipe, workdir: Path) -> Recipe:
    """The recipe as it is run: with the model of what is imported here, or is to be; else unchanged."""
    source, kept = source_of(recipe), kept_source(workdir)
    if result_file(workdir / IMPORT).exists():
        return adopt(recipe, describe(kept), Path(read_json(kept / "where.json", {"tokenizer": (str,)})["tokenizer"]))
    if source is None:
        return recipe
    folder = find_folder(source)
    return adopt(recipe, describe(folder), tokenizer_of(folder))


def bring(recipe: Recipe, workdir: Path, source: str) -> dict[str, Any]:
    """Import, if that is not done; the run's lock must be held, and the recipe be `adopted`. The stage's result.

    Raises:
        ValueError: the folder is not one that can be imported, or is not the one that was imported before.
    """
    stage_dir = workdir / IMPORT
    if result_file(stage_dir).exists():
        result = read_json(result_file(stage_dir), {"source": (dict,), "params_sha256": (str,)})
        _check_source(source, result["source"], stage_dir)
        say(f"import: already there, from {result['source']['folder']}", "cyan")
        return result
    began = time.monotonic()
    folder = find_folder(source)
    base, found = model_folder(folder), describe(folder)
    stored = open_folder(base)
    if unread := unread_of(base):
        say(f"import: {base} has two sets of weights; not read, as by transformers: {', '.join(unread)}", "yellow")
    if "auto_map" in read_json(base / "config.json"):
        say("import: config.json names code of its own (auto_map), which is not used", "yellow")
    _keep_source(folder, workdir)
    shutil.rmtree(stage_dir / "checkpoints", ignore_errors=True)  # of an import that was killed
    if not tokenizer_of(folder).is_file() and not tokenizer_file(workdir).exists():
        raise ValueError(
            f"{folder} has no tokenizer.json and no tokenizer.model; "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), of transformers, makes the first"
        )
    setup = setup_stage(recipe, IMPORT, workdir, with_data=False)
    plan = make_plan(setup, found, stored, base)
    grown = _grown(setup, plan.rows)
    adapters = read_adapter(folder, plan.places, plan.shapes) if is_adapter(folder) else None
    params = load(plan, setup.program.abstract_params)
    if adapters is not None:
        params = _merged(params, *adapters)
        say(f"import: adapters of {folder}, merged into their base {base}", "yellow")
    files = digests(folder)
    source_meta = {
        "folder": str(folder),
        "model_type": found.family.model_type,
        "positions": found.positions,
        "files": files,
        "new_tokens": grown,
        "adapters": adapters is not None,
    }
    state = init_state(params, optax.identity())
    meta = setup.contract | {
        "stage": IMPORT,
        "parent": None,
        "data": {},
        "jax": jax.__version__,
        "lora": None,
        "carried": {"tokens": 0, "seconds": 0.0, "best": {}},
    }
    with Checkpoints(stage_dir, 1) as checkpoints:
        checkpoints.save(0, to_items(state, early_stopping().init()), meta, 0)
        checkpoints.check_last(0)
    digest = params_sha256(params)
    result = {
        "stage": IMPORT,
        "status": "imported",
        "steps": 0,
        "best_step": 0,
        "best": {},
        "tokens": 0,
        "seconds": time.monotonic() - began,
        "params_sha256": digest,
        "last_params_sha256": digest,
        "parent": None,
        "source": source_meta,
    }
    write_json(result_file(stage_dir), result)
    say(
        f"import: {found.family.model_type}, {sum(x.size for x in jax.tree.leaves(params)) / 1e6:.2f}M parameters from "
        f"{folder}; params_sha256 {digest[:12]}…",
        "bold",
    )
    return result


def _keep_source(folder: Path, workdir: Path) -> None:
    kept = kept_source(workdir)
    make_folder(kept)
    write_json(kept / "where.json", {"tokenizer": str(tokenizer_of(folder))})
    base, beside = model_folder(folder), tokenizer_of(folder).parent
    for name in KEPT:
        source = (beside if name in OF_TOKENIZER else base) / name
        if source.is_file():
            shutil.copyfile(source, kept / f"{name}.tmp")
            (kept / f"{name}.tmp").replace(kept / name)
    write_json(kept / "config.json", _text_config(base)[0])  # last: where it is, the others are
    sync(kept)


def _check_source(source: str, before: dict[str, Any], stage_dir: Path) -> None:
    """Raises ValueError if the folder that was imported is another one now. A folder that is gone is not missed."""
    folder = Path(source) if Path(source).is_dir() else Path(before["folder"])
    try:
        now = digests(folder)
    except ValueError:  # the base of adapters is gone
        return
    if not folder.is_dir():
        return
    changed = sorted(name for name in now.keys() | before["files"] if now.get(name) != before["files"].get(name))
    if changed:
        raise ValueError(
            f"{folder} is not what was imported into {stage_dir}: {', '.join(changed[:5])} differ; put it back, or "
            "take another --workdir"
        )


def digests(folder: Path) -> dict[str, list[Any]]:
    """Name -> size and SHA-256 of the files that make the model; those of the base of adapters by their paths."""
    base, found = model_folder(folder), {}
    names = {path for place in (folder, base) for pattern in READ[:3] for path in place.glob(pattern)}
    for path in sorted(path for path in names | {tokenizer_of(folder)} if path.is_file()):
        name = path.name if path.parent == folder else str(path)
        with path.open("rb") as file:
            found[name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    return found


def _merged(params: Params, adapters: Params, config: LoraConfig) -> Params:
    """The parameters with adapters in them, each placed as before."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.tree.map(jax.device_put, lora.merge(params, adapters, config), placed)


class Plan(NamedTuple):
    """rows: tokens that the folder's embedding has."""

    places: list[Place]
    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, Stored]
    rows: int


def make_plan(setup: StageSetup, found: Described, stored: dict[str, Stored], folder: Path) -> Plan:
    """What is read into which parameter, checked by names and shapes before anything is read."""
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(setup.program.abstract_params).items()}
    full = dict(shapes)
    if "position_embedding" in full:
        full["position_embedding"] = (found.positions, *full["position_embedding"][1:])
    places = places_of(FAMILIES[found.family.model_type], full)
    parts = read_json(folder / "config.json").get("model_type") in WRAPPERS
    stored = match(places, full, by_plain_names(stored, str(folder)), found.model.vocab_size, str(folder), parts)
    if rest := sorted(stored.keys() - {place.name for place in places}) if parts else []:
        names = dict.fromkeys(".".join(name.removeprefix("model.").split(".")[:1]) for name in rest)
        say(f"import: of more parts than text; left out are {len(rest)} tensors of {', '.join(names)}", "yellow")
    if full != shapes:
        say(
            f"import: of {found.positions} learned positions the first {setup.recipe.model.context} are kept, which is "
            "config.model.context",
            "yellow",
        )
    return Plan(places_of(FAMILIES[found.family.model_type], shapes), shapes, stored, found.model.vocab_size)


def _grown(setup: StageSetup, rows: int) -> list[str]:
    """Tokens that the folder has no row for."""
    size = setup.data.tokenizer.vocab_size
    names = [setup.data.tokenizer.show([i]) for i in range(rows, size)]
    if names:
        say(
            f"import: the tokenizer has {len(names)} tokens more than the folder has rows ({rows}): "
            f"{', '.join(names[:10])}; the rows of these begin as the mean of the others",
            "yellow",
        )
    return names


def load(plan: Plan, target: Params) -> Params:
    """The parameters, a leaf after the other, placed as `target` (shapes with shardings) says."""
    total = sum(math.prod(shape) for shape in plan.shapes.values())
    progress, done = Progress("parameters read (millions)", max(total // 10**6, 1)), 0

    def told(values: int) -> None:
        nonlocal done
        before, done = done // 10**6, done + values
        if done // 10**6 > before:
            progress.update(done // 10**6)

    found: dict[str, jax.Array] = {}
    for path, leaf in named_leaves(target).items():
        values = _aligned(plan.shapes[path])
        read_parameter(path, values, plan.places, plan.shapes, plan.stored, told)
        found[path] = jax.make_array_from_callback(
            values.shape, leaf.sharding, lambda index, values=values: values[index]
        )
        del values
    return tree_of(found)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """float32 that begins where a CPU device can take it as it is, without a copy."""
    size = math.prod(shape)
    raw = np.zeros(size + 16, np.float32)
    first = (-raw.ctypes.data % 64) // 4
    return raw[first : first + size].reshape(shape)
