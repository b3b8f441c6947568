"""Import of a Hugging Face checkpoint folder into `WORKDIR/import/`, which is then a finished stage like any other.

Only data is read: config.json, safetensors, tokenizer.json and the files beside it. Code that a folder names
(`auto_map`) is never loaded, and pickles are never opened.
"""

import copy
import dataclasses
import hashlib
import importlib
import math
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
from jaxstages.interop.config_json import RECIPE_FIELDS, ModelDescription, read_config, text_config
from jaxstages.interop.families import FAMILIES, WRAPPERS
from jaxstages.interop.layout import TensorSlot, by_plain_names, match, read_parameter, tensor_slots
from jaxstages.interop.peft_import import is_adapter, model_folder, read_adapter
from jaxstages.interop.tensors import StoredTensor, open_folder, unread_weights
from jaxstages.models import lora
from jaxstages.runtime.console import Progress, say
from jaxstages.runtime.files import copy_file, make_folder, read_json, remove_tree, sync, write_json
from jaxstages.runtime.workdir import result_file, tokenizer_file
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.saved_items import to_items
from jaxstages.training.setup import StageSetup, setup_stage
from jaxstages.training.step import init_state
from jaxstages.types import Params

SCHEME = "hf:"
COPIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md")
"""Files to copy into `WORKDIR/import/source/`, beside the config of the text model."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files among them that belong to the tokenizer."""

DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md")
"""Patterns of the files to download from the hub."""


def source_of(recipe: Recipe) -> str | None:
    """Return PATH of the stages' `init_from="hf:PATH"`, None if there is none. Raises ValueError if there are two."""
    paths = {stage.init_from for stage in recipes.stages(recipe).values() if stage.init_from.startswith(SCHEME)}
    if len(paths) > 1:
        raise ValueError(f"init_from names {' and '.join(sorted(paths))}; a workdir has one import: name one of them")
    return paths.pop().removeprefix(SCHEME) if paths else None


def source_folder(workdir: Path) -> Path:
    """Return the folder for copies of the imported model's config and tokenizer files."""
    return workdir / IMPORT / "source"


def find_folder(source: str) -> Path:
    """Return a local folder, or a snapshot of a repository on the hub if huggingface_hub is installed.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source} is no folder; name one with config.json and safetensors")
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ValueError(
            f"{source} is no folder here; for a name on the hub, install the extra: pip install '.[hf]'"
        ) from error
    try:
        return Path(hub.snapshot_download(source, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # has many types: no network, no such repository, no access
        raise ValueError(f"{source} is no folder here, and the hub does not give it: {str(error)[:200]}") from error


def tokenizer_of(folder: Path) -> Path:
    """Return the path of `tokenizer.json`, else of SentencePiece's `tokenizer.model`. Adapters without a tokenizer use
    that of their base."""
    for candidate in dict.fromkeys((folder, model_folder(folder))):
        for name in ("tokenizer.json", "tokenizer.model"):
            if (candidate / name).is_file():
                return candidate / name
    return model_folder(folder) / "tokenizer.json"


def describe(folder: Path) -> ModelDescription:
    """Read a folder's config.json; for adapters, that of their base."""
    return read_config(*_text_config(model_folder(folder)))


def _text_config(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the config of the text model, which may be a part of config.json, and its location for messages."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; name a Hugging Face checkpoint folder")
    return text_config(read_json(file), str(file), lambda: any("lm_head." in name for name in open_folder(folder)))


def with_model_of(recipe: Recipe, description: ModelDescription, tokenizer: Path) -> Recipe:
    """Return the recipe with an imported model and tokenizer; context, dtype, dropout and unroll stay the recipe's.

    Raises:
        ValueError: the recipe sets other fields differently; the message names them.
    """
    model = copy.deepcopy(description.model)
    for name in RECIPE_FIELDS[:-1]:
        setattr(model, name, getattr(recipe.model, name))
    tokenizer_config = TokenizerConfig(kind="file", path=str(tokenizer))

    lines = recipes.differences(recipe.model, model, "config.model")
    set_by_recipe = recipes.differences(recipes.ModelConfig(), recipe.model, "config.model")
    paths = {line.split(":")[0] for line in set_by_recipe}
    conflicts = [line for line in lines if line.split(":")[0] in paths]
    if recipe.tokenizer != TokenizerConfig():
        conflicts += recipes.differences(recipe.tokenizer, tokenizer_config, "config.tokenizer")
    if conflicts:
        raise ValueError(
            f"the recipe is not that of the imported {description.family.model_type}: {'; '.join(conflicts)}; leave "
            "these out"
        )
    if model.context > description.reach:
        raise ValueError(
            f"config.model.context={model.context} must be at most {description.reach}: up to there, its positions "
            "are the same in each text"
        )
    return dataclasses.replace(recipe, model=model, tokenizer=tokenizer_config)


def with_imported_model(recipe: Recipe, workdir: Path) -> Recipe:
    """Return the recipe with the model that is imported in the workdir, or will be; else unchanged."""
    source, copies = source_of(recipe), source_folder(workdir)
    if result_file(workdir / IMPORT).exists():
        return with_model_of(
            recipe, describe(copies), Path(read_json(copies / "where.json", {"tokenizer": (str,)})["tokenizer"])
        )
    if source is None:
        return recipe
    folder = find_folder(source)
    return with_model_of(recipe, describe(folder), tokenizer_of(folder))


def import_folder(recipe: Recipe, workdir: Path, source: str) -> dict[str, Any]:
    """Import a folder if the workdir has not imported it yet, and return the result of the stage.

    Args:
        recipe: from `with_imported_model`. The caller holds the run's lock.

    Raises:
        ValueError: the folder cannot be imported, or differs from the one that was imported before.
    """
    stage_dir = workdir / IMPORT
    if result_file(stage_dir).exists():
        result = read_json(result_file(stage_dir), {"source": (dict,), "params_sha256": (str,)})
        _check_source(source, result["source"], stage_dir)
        say(f"import: already there, from {result['source']['folder']}", "cyan")
        return result

    start = time.monotonic()
    folder = find_folder(source)
    base, description = model_folder(folder), describe(folder)
    stored = open_folder(base)
    if unread := unread_weights(base):
        say(f"import: {base} has two sets of weights; not read, as by transformers: {', '.join(unread)}", "yellow")
    if "auto_map" in read_json(base / "config.json"):
        say("import: config.json names code of its own (auto_map), which is not used", "yellow")
    _copy_source(folder, workdir)
    remove_tree(stage_dir / "checkpoints")  # left by an import that was killed
    if not tokenizer_of(folder).is_file() and not tokenizer_file(workdir).exists():
        raise ValueError(
            f"{folder} has no tokenizer.json and no tokenizer.model; "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), of transformers, makes the first"
        )
    setup = setup_stage(recipe, IMPORT, workdir, with_data=False)
    plan = make_plan(setup, description, stored, base)
    new_tokens = _tokens_without_row(setup, plan.rows)
    adapters = read_adapter(folder, plan.slots, plan.shapes) if is_adapter(folder) else None
    params = load(plan, setup.program.abstract_params)
    if adapters is not None:
        params = _merge_adapters(params, *adapters)
        say(f"import: adapters of {folder}, merged into their base {base}", "yellow")
    files = file_digests(folder)
    source_meta = {
        "folder": str(folder),
        "model_type": description.family.model_type,
        "wrapper": wrapper_of(base),
        "positions": description.positions,
        "files": files,
        "new_tokens": new_tokens,
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
        "seconds": time.monotonic() - start,
        "params_sha256": digest,
        "last_params_sha256": digest,
        "parent": None,
        "source": source_meta,
    }
    write_json(result_file(stage_dir), result)
    say(
        f"import: {description.family.model_type}, {sum(x.size for x in jax.tree.leaves(params)) / 1e6:.2f}M "
        f"parameters from {folder}; params_sha256 {digest[:12]}…",
        "bold",
    )
    return result


def wrapper_of(folder: Path) -> str:
    """Return the model type of a multimodal model, "" for a model of text alone."""
    kind = read_json(folder / "config.json").get("model_type")
    return kind if kind in WRAPPERS else ""


def _copy_source(folder: Path, workdir: Path) -> None:
    """Copy the config and the tokenizer files of a folder, which exports need."""
    copies = source_folder(workdir)
    remove_tree(copies)  # left by an import of another folder that failed
    make_folder(copies)
    write_json(copies / "where.json", {"tokenizer": str(tokenizer_of(folder))})
    base, tokenizer_folder = model_folder(folder), tokenizer_of(folder).parent
    for name in COPIED_FILES:
        source = (tokenizer_folder if name in TOKENIZER_FILES else base) / name
        if source.is_file():
            copy_file(source, copies / name)
    write_json(copies / "config.json", _text_config(base)[0])  # last: if it exists, so do the others
    sync(copies)


def _check_source(source: str, before: dict[str, Any], stage_dir: Path) -> None:
    """Raise ValueError if the imported folder has changed. It may be gone."""
    folder = Path(source).expanduser()
    folder = folder if folder.is_dir() else Path(before["folder"])
    try:
        now = file_digests(folder)
    except ValueError:  # the base of adapters is gone
        return
    if not folder.is_dir():
        return
    changed = sorted(name for name in now.keys() | before["files"] if now.get(name) != before["files"].get(name))
    if changed:
        raise ValueError(
            f"{folder} is not what was imported into {stage_dir}: {', '.join(changed[:5])} differ; put it back, or "
            "use another --workdir"
        )


def file_digests(folder: Path) -> dict[str, list[Any]]:
    """Return size and SHA-256 of the model's files by name; those of the base of adapters are named by their path."""
    base, files = model_folder(folder), {}
    paths = {path for parent in (folder, base) for pattern in DOWNLOADED[:3] for path in parent.glob(pattern)}
    for path in sorted(path for path in paths | {tokenizer_of(folder)} if path.is_file()):
        name = path.name if path.parent == folder else str(path)
        with path.open("rb") as file:
            files[name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    return files


def _merge_adapters(params: Params, adapters: Params, config: LoraConfig) -> Params:
    """Merge adapters into the parameters, which keep their shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.tree.map(jax.device_put, lora.merge(params, adapters, config), shardings)


class Plan(NamedTuple):
    """How to read the parameters from a folder.

    shapes: of our parameters, by path.
    stored: tensors by the names of the table.
    rows: rows of the folder's embedding.
    """

    slots: list[TensorSlot]
    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, StoredTensor]
    rows: int


def make_plan(setup: StageSetup, description: ModelDescription, stored: dict[str, StoredTensor], folder: Path) -> Plan:
    """Match tensors and parameters, by names and shapes, before any value is read."""
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(setup.program.abstract_params).items()}
    full = dict(shapes)
    if "position_embedding" in full:
        full["position_embedding"] = (description.positions, *full["position_embedding"][1:])
    slots = tensor_slots(FAMILIES[description.family.model_type], full)
    parts = bool(wrapper_of(folder))
    stored = match(slots, full, by_plain_names(stored, str(folder)), description.model.vocab_size, str(folder), parts)
    if ignored := sorted(stored.keys() - {slot.name for slot in slots}) if parts else []:
        names = dict.fromkeys(".".join(name.removeprefix("model.").split(".")[:1]) for name in ignored)
        say(f"import: of more parts than text; left out are {len(ignored)} tensors of {', '.join(names)}", "yellow")
    if full != shapes:
        say(
            f"import: of {description.positions} learned positions the first {setup.recipe.model.context} are kept, "
            "which is config.model.context",
            "yellow",
        )
    return Plan(
        tensor_slots(FAMILIES[description.family.model_type], shapes), shapes, stored, description.model.vocab_size
    )


def _tokens_without_row(setup: StageSetup, rows: int) -> list[str]:
    """Return the tokens without a row in the folder's embedding."""
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
    """Load the parameters, leaf by leaf, with the shardings of `target` (an abstract tree)."""
    total = sum(math.prod(shape) for shape in plan.shapes.values())
    progress, done = Progress("parameters read (millions)", max(total // 10**6, 1)), 0

    def report(values: int) -> None:
        nonlocal done
        before, done = done // 10**6, done + values
        if done // 10**6 > before:
            progress.update(done // 10**6)

    leaves: dict[str, jax.Array] = {}
    for path, leaf in named_leaves(target).items():
        values = _aligned(plan.shapes[path])
        read_parameter(path, values, plan.slots, plan.shapes, plan.stored, report)
        leaves[path] = jax.make_array_from_callback(
            values.shape, leaf.sharding, lambda index, values=values: values[index]
        )
        del values
    return tree_of(leaves)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Allocate float32 zeros, aligned so that a CPU device can use them without a copy."""
    size = math.prod(shape)
    raw = np.zeros(size + 16, np.float32)
    first = (-raw.ctypes.data % 64) // 4
    return raw[first : first + size].reshape(shape)
