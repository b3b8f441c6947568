"""A finished stage -> a folder of Hugging Face's form, which checks itself: what was written is read back, and gives
the same parameters and the same logits.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import named_leaves, params_sha256
from jaxstages.config import Recipe, builtin_model
from jaxstages.data.tokenizer import SPECIAL_TOKENS
from jaxstages.interop.config_json import choose_family, key_of, plain_model, read_config
from jaxstages.interop.families import Family
from jaxstages.interop.hf_import import Plan, kept_source, load
from jaxstages.interop.layout import entries_of, match, places_of
from jaxstages.interop.model_card import licence_of, write_card
from jaxstages.interop.tensors import open_folder, write_shards
from jaxstages.models.transformer import make_model
from jaxstages.runtime import multihost
from jaxstages.runtime.console import Progress, say
from jaxstages.runtime.files import make_folder, read_json, sync, write_json, write_text
from jaxstages.runtime.workdir import tokenizer_file
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import StageSetup, setup_stage
from jaxstages.types import Batch, Params

SHARD = 5 * 10**9
"""Bytes of a file, at most."""

DTYPES = {"float32": "F32", "bfloat16": "BF16"}

DROPPED = ("auto_map", "_name_or_path", "dtype", "torch_dtype")
"""Keys of an imported config.json that do not go into an export."""

CHECKED = 64
"""Tokens that the check runs the model on."""

OUR_TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""What `data/chat.py` writes, for those that read Jinja."""


def export(
    recipe: Recipe,
    workdir: Path,
    stage: str,
    to: Path,
    dtype: str,
    most_bytes: int = SHARD,
    chosen: dict[str, Any] | None = None,
) -> None:
    """Write the best checkpoint of `stage` into the folder `to`, which must not be there yet, or be empty.

    Raises:
        ValueError: no family of transformers can express the model, or `to` is in use.
        OSError: what was written is not what is there; `to` is not made.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to={to} is there already, and not empty; name another folder")
    setup = setup_stage(recipe, stage, workdir, with_data=False)
    rows = setup.program.abstract_params["embedding"].shape[0]
    family, config = choose_family(dataclasses.replace(builtin_model(recipe, "export"), vocab_size=rows))
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(setup.program.abstract_params).items()}
    places = places_of(family, shapes)
    params, lineage = read_parent(setup.folder, setup.program, setup.contract, chosen)
    if dtype == "bfloat16":
        params = _rounded(params)
    logits_of = _make_logits(setup)
    digest, logits = params_sha256(params), logits_of(params)
    fresh = to.with_name(f"{to.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    make_folder(fresh)
    config = _kept_config(config, family, rows, setup) | {"dtype": dtype, "torch_dtype": dtype}
    config |= _ids(setup, stage)
    write_json(fresh / "config.json", config)
    total = sum(math.prod(shape) for shape in shapes.values()) * (2 if dtype == "bfloat16" else 4)
    progress, megabytes = Progress("MB written", max(total // 10**6, 1)), 0

    def told(done: int) -> None:
        nonlocal megabytes
        if done // 10**6 > megabytes:
            megabytes = done // 10**6
            progress.update(megabytes)

    leaves = {path: multihost.gather_to_host(leaf) for path, leaf in named_leaves(params).items()}
    files = write_shards(fresh, entries_of(places, leaves, shapes), DTYPES[dtype], most_bytes, told)
    _write_tokenizer(setup, stage, fresh)
    _write_generation(setup, stage, fresh, config)
    facts = {
        "model type": family.model_type,
        "parameters": f"{sum(math.prod(shape) for shape in shapes.values()):,}",
        "dtype": dtype,
        "params_sha256": f"`{digest}`",
        "recipe": f"`{json.dumps(recipes.to_dict(builtin_model(recipe, 'export')))}`",
    }
    write_text(fresh / "README.md", write_card(recipe, setup.folder, facts, licence_of(kept_source(workdir)), chosen))
    leaves.clear()
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    worst = _check(setup, fresh, shapes, digest, logits, logits_of)
    if to.exists():
        to.rmdir()
    fresh.replace(to)
    sync(to.absolute().parent)
    say(
        f"export: {stage} at step {lineage['step']} as {family.model_type}, {dtype}, {len(files)} file"
        f"{'s' * (len(files) > 1)}, in {to}; read back: params_sha256 {digest[:12]}…, logits differ by {worst:g}",
        "bold",
    )


def _rounded(params: Params) -> Params:
    """bfloat16's values, a leaf after the other."""

    def one(leaf: jax.Array) -> jax.Array:
        found = leaf.astype(jnp.bfloat16).astype(jnp.float32)
        leaf.delete()
        return found

    return jax.tree.map(one, params)


def _make_logits(setup: StageSetup) -> Callable[[Params], np.ndarray]:
    """`logits_of(params)`: those of a fixed row of tokens, in float32."""
    model = make_model(
        dataclasses.replace(builtin_model(setup.recipe, "export"), dtype="float32"), setup.data.tokenizer.vocab_size
    )
    length = min(CHECKED, setup.recipe.model.context)
    tokens = np.random.default_rng(0).integers(0, setup.data.tokenizer.vocab_size, (1, length)).astype(np.int32)
    ones = jnp.ones((1, length), jnp.int32)
    batch = Batch(jnp.asarray(tokens), ones, ones.astype(jnp.float32), ones, jnp.arange(length, dtype=jnp.int32)[None])
    apply = jax.jit(lambda params, batch: model.apply(params, batch, None))
    return lambda params: np.asarray(multihost.gather_to_host(apply(params, batch)))


def _check(
    setup: StageSetup,
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    digest: str,
    logits: np.ndarray,
    logits_of: Callable[[Params], np.ndarray],
) -> float:
    """Read the folder as any other; the largest difference of logits. Raises OSError unless it is the same model."""
    found = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    places = places_of(found.family, shapes)
    stored = match(places, shapes, open_folder(folder), found.model.vocab_size, str(folder))
    params = load(Plan(places, shapes, stored, found.model.vocab_size), setup.program.abstract_params)
    again = params_sha256(params)
    worst = float(np.max(np.abs(logits_of(params) - logits)))
    if again != digest or worst > 1e-5 * max(1.0, float(np.max(np.abs(logits)))):
        raise OSError(
            f"{folder} is not what was to be written: params_sha256 {again[:12]}… for {digest[:12]}…, logits differ by "
            f"{worst:g}; is the disk in order?"
        )
    return worst


def _kept_config(config: dict[str, Any], family: Family, rows: int, setup: StageSetup) -> dict[str, Any]:
    """The config.json that was imported, where it is that of the model still, but for its rows; else ours, in which
    rope reaches as far as it was made to, even where rows were shorter here."""
    file, model = kept_source(setup.workdir) / "config.json", builtin_model(setup.recipe, "export")
    if not file.is_file():
        return config | {"use_cache": True}
    kept = read_json(file)
    described, learned = read_config(kept, str(file)), model.attention.position == "learned"
    positions = key_of(family, "context")
    same = plain_model(dataclasses.replace(described.model, vocab_size=rows)) == plain_model(
        dataclasses.replace(model, vocab_size=rows)
    )
    if same and kept["model_type"] == family.model_type:
        ours = ("architectures", key_of(family, "vocab_size"), *([positions] if learned else []))
        return {k: v for k, v in kept.items() if k not in DROPPED} | {key: config[key] for key in ours}
    if not learned:
        config[positions] = max(config[positions], described.positions)
    return config | {"use_cache": True}


def _ids(setup: StageSetup, stage: str) -> dict[str, Any]:
    """Ids of the tokens that begin and end a text: those of what was imported, and those that were trained on."""
    file = kept_source(setup.workdir) / "config.json"
    kept = read_json(file) if file.is_file() else {}
    named = {name: kept[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in kept}
    if stage == recipes.IMPORT and named.get("eos_token_id") is not None:
        return named
    theirs = kept.get("eos_token_id")
    theirs = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    if wrong := [i for i in theirs if type(i) is not int]:
        raise ValueError(f"{file}: eos_token_id has {wrong[0]!r}, which is no id; mend it")
    ends = [*dict.fromkeys([*theirs, *setup.data.tokenizer.stops])]
    start = kept.get("bos_token_id")
    start = next(iter(setup.data.tokenizer.begin), None) if start is None else start
    padding = named.get("pad_token_id")
    padding = setup.data.tokenizer.specials.end_of_text if padding is None and not setup.data.tokenizer.eos else padding
    found = {"bos_token_id": start, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return found if padding is None else found | {"pad_token_id": padding}


def _write_tokenizer(setup: StageSetup, stage: str, folder: Path) -> None:
    """tokenizer.json, and beside it what transformers wants to know of it; with the chat template that the stages are
    trained with."""
    own, kept = tokenizer_file(setup.workdir), kept_source(setup.workdir)
    content = read_json(own)
    if stage != recipes.IMPORT and list(setup.data.tokenizer.begin) != setup.data.tokenizer.backend.encode("").ids:
        content["post_processor"] = _beginning(content["post_processor"], setup)
    write_json(folder / "tokenizer.json", content)
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    theirs, ours = (
        read_json(file) if file.is_file() else {}
        for file in (kept / "tokenizer_config.json", own.with_name("tokenizer_config.json"))
    )
    found |= theirs | {key: value for key, value in ours.items() if value}  # an empty token is none
    for name in ("added_tokens_decoder", "auto_map", "chat_template", "tool_template", "stop_tokens"):
        found.pop(name, None)  # the first is in tokenizer.json, which has more of them; the last are our own words
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS[0])
    found = (ends if stage != recipes.IMPORT and not setup.data.tokenizer.eos else {}) | found
    template: Any = setup.data.tokenizer.template or (OUR_TEMPLATE if stage != recipes.IMPORT else "")
    if setup.data.tokenizer.tool_template:
        named = {"default": template, "tool_use": setup.data.tokenizer.tool_template}
        template = [{"name": name, "template": text} for name, text in named.items()]
    if stage == recipes.IMPORT and not (kept / "chat_template.jinja").is_file():
        template = theirs.get("chat_template") or template
    write_json(folder / "tokenizer_config.json", found | ({"chat_template": template} if template else {}))


def _beginning(before: dict[str, Any] | None, setup: StageSetup) -> dict[str, Any]:
    """A post-processor that puts what the stages' texts begin with in front of a text."""
    begin = setup.data.tokenizer.begin
    names = [setup.data.tokenizer.backend.id_to_token(i) for i in begin]

    def template(*letters: str) -> list[dict[str, Any]]:
        front = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
        return front + [{"Sequence": {"id": letter, "type_id": n}} for n, letter in enumerate(letters)]

    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in zip(names, begin, strict=True)}
    ours = {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"), "special_tokens": tokens}
    return ours if before is None else {"type": "Sequence", "processors": [before, ours]}


def _write_generation(setup: StageSetup, stage: str, folder: Path, config: dict[str, Any]) -> None:
    kept = kept_source(setup.workdir) / "generation_config.json"
    found = read_json(kept) if kept.is_file() else {}
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    write_json(folder / "generation_config.json", (ids | found) if stage == recipes.IMPORT else (found | ids))
