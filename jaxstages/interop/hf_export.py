"""Export of a checkpoint to a Hugging Face checkpoint folder.

An export verifies itself: the folder is read back, and must give the same parameters and the same logits.
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
from jaxstages.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from jaxstages.interop.config_json import choose_family, key_of, plain_model, read_config
from jaxstages.interop.families import Family
from jaxstages.interop.hf_import import Plan, load, source_folder
from jaxstages.interop.layout import TOKEN_ROWS, entries_of, match, tensor_slots
from jaxstages.interop.model_card import licence_field, write_card
from jaxstages.interop.tensors import open_folder, write_shards
from jaxstages.models.transformer import make_model
from jaxstages.runtime import multihost
from jaxstages.runtime.console import Progress, say
from jaxstages.runtime.files import make_folder, read_json, sync, write_json, write_text
from jaxstages.runtime.workdir import result_file, tokenizer_file
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import StageSetup, setup_stage
from jaxstages.types import Batch, Params

MAX_SHARD_BYTES = 5 * 10**9
"""Largest file, in bytes."""

DTYPES = {"float32": "F32", "bfloat16": "BF16"}

DROPPED = ("auto_map", "_name_or_path", "dtype", "torch_dtype")
"""Keys of an imported config.json that an export leaves out."""

ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

CHECKED_TOKENS = 64
"""Tokens in the row that the logits are compared on."""

OUR_TEMPLATE = (
    "{{ BEGIN }}{% for message in messages %}"
    "{% set role = 'system' if message['role'] == 'developer' else message['role'] %}"
    "{% if role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the chat template has no role ' + role) }}{% endif %}"
    "{{ '<|' + role + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The built-in chat template (`data/chat.py`) in Jinja. BEGIN stands for the token that ends a text, in quotes."""


def export(
    recipe: Recipe,
    workdir: Path,
    stage: str,
    to: Path,
    dtype: str,
    max_bytes: int = MAX_SHARD_BYTES,
    chosen: dict[str, Any] | None = None,
) -> None:
    """Export a checkpoint of a stage into the folder `to`, which must be empty or not exist.

    Args:
        max_bytes: size of a shard.
        chosen: the result of the checkpoint; None takes the best one.

    Raises:
        ValueError: no family of transformers can express the model, or `to` is in use.
        OSError: the folder, read back, is not the same model. `to` is not created then.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to={to} is there already, and not empty; name another folder")
    model = builtin_model(recipe, "export")
    setup = setup_stage(recipe, stage, workdir, with_data=False)
    rows = exported_rows(setup, stage)
    family, config = choose_family(dataclasses.replace(model, vocab_size=rows))
    abstract_params = keep_rows(setup.program.abstract_params, rows)
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(abstract_params).items()}
    slots = tensor_slots(family, shapes)
    params, lineage = read_parent(setup.folder, setup.program, setup.contract, chosen)
    params = keep_rows(params, rows)
    if dtype == "bfloat16":
        params = _round_to_bfloat16(params)
    logits_of = _make_logits(setup, rows)
    digest, logits = params_sha256(params), logits_of(params)

    fresh = to.with_name(f"{to.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    make_folder(fresh)
    config = _config_json(config, family, rows, setup) | {"dtype": dtype, "torch_dtype": dtype}
    config |= special_ids(setup, stage)
    write_json(fresh / "config.json", config)
    total = sum(math.prod(shape) for shape in shapes.values()) * (2 if dtype == "bfloat16" else 4)
    progress, megabytes = Progress("MB written", max(total // 10**6, 1)), 0

    def report(done: int) -> None:
        nonlocal megabytes
        if done // 10**6 > megabytes:
            megabytes = done // 10**6
            progress.update(megabytes)

    leaves = {path: multihost.gather_to_host(leaf) for path, leaf in named_leaves(params).items()}
    files = write_shards(fresh, entries_of(slots, leaves, shapes), DTYPES[dtype], max_bytes, report)
    write_tokenizer(setup, stage, fresh)
    _write_generation(setup, stage, fresh, config)
    facts = {
        "model type": family.model_type,
        "parameters": f"{sum(math.prod(shape) for shape in shapes.values()):,}",
        "dtype": dtype,
        "params_sha256": f"`{digest}`",
        "recipe": f"`{json.dumps(recipes.to_dict(builtin_model(recipe, 'export')))}`",
    }
    licence = licence_field(source_folder(workdir))
    write_text(fresh / "README.md", write_card(recipe, setup.folder, facts, licence, chosen))

    leaves.clear()
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    difference = _verify(abstract_params, fresh, shapes, digest, logits, logits_of)
    if to.exists():
        to.rmdir()
    fresh.replace(to)
    sync(to.absolute().parent)
    say(
        f"export: {stage} at step {lineage['step']} as {family.model_type}, {dtype}, {len(files)} file"
        f"{'s' * (len(files) > 1)}, in {to}; read back: params_sha256 {digest[:12]}…, logits differ by {difference:g}",
        "bold",
    )


def exported_rows(setup: StageSetup, stage: str) -> int:
    """Return the rows of the embedding to export. Those that an import added for tokens of later stages stay here."""
    rows = setup.program.abstract_params["embedding"].shape[0]
    if stage != recipes.IMPORT:
        return rows
    return rows - len(read_json(result_file(setup.folder))["source"]["new_tokens"])


def keep_rows(params: Params, rows: int) -> Params:
    """Return the parameters with the first rows of embedding and head; arrays or abstract ones."""

    def keep(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
        return jax.device_put(np.asarray(multihost.gather_to_host(leaf))[:rows], leaf.sharding)

    if params["embedding"].shape[0] == rows:
        return params
    return params | {name: keep(params[name]) for name in TOKEN_ROWS if name in params}


def _round_to_bfloat16(params: Params) -> Params:
    """Round to the values of bfloat16, leaf by leaf, and free the originals."""

    def round_leaf(leaf: jax.Array) -> jax.Array:
        rounded = leaf.astype(jnp.bfloat16).astype(jnp.float32)
        leaf.delete()
        return rounded

    return jax.tree.map(round_leaf, params)


def _make_logits(setup: StageSetup, rows: int) -> Callable[[Params], np.ndarray]:
    """Return `logits_of(params)`, the logits of a fixed row of random tokens, in float32."""
    config = dataclasses.replace(builtin_model(setup.recipe, "export"), dtype="float32", vocab_size=rows)
    model, tokens_in_rows = make_model(config, rows), min(setup.data.tokenizer.vocab_size, rows)
    length = min(CHECKED_TOKENS, setup.recipe.model.context)
    tokens = np.random.default_rng(0).integers(0, tokens_in_rows, (1, length)).astype(np.int32)
    ones = jnp.ones((1, length), jnp.int32)
    batch = Batch(jnp.asarray(tokens), ones, ones.astype(jnp.float32), ones, jnp.arange(length, dtype=jnp.int32)[None])
    apply = jax.jit(lambda params, batch: model.apply(params, batch, None))
    return lambda params: np.asarray(multihost.gather_to_host(apply(params, batch)))


def _verify(
    abstract_params: Params,
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    digest: str,
    logits: np.ndarray,
    logits_of: Callable[[Params], np.ndarray],
) -> float:
    """Read the folder back like any other, and return the largest difference of logits. Raises OSError unless it is the
    same model."""
    description = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    slots, rows = tensor_slots(description.family, shapes), description.model.vocab_size
    stored = match(slots, shapes, open_folder(folder), rows, str(folder))
    params = load(Plan(slots, shapes, stored, rows), abstract_params)
    read_digest = params_sha256(params)
    difference = float(np.max(np.abs(logits_of(params) - logits)))
    if read_digest != digest or difference > 1e-5 * max(1.0, float(np.max(np.abs(logits)))):
        raise OSError(
            f"{folder} is not what was to be written: params_sha256 {read_digest[:12]}… for {digest[:12]}…, logits "
            f"differ by {difference:g}; is the disk in order?"
        )
    return difference


def _config_json(config: dict[str, Any], family: Family, rows: int, setup: StageSetup) -> dict[str, Any]:
    """Return the imported config.json if it still describes the model, apart from its rows. Else return ours, with the
    context that the imported model had, even if rows were shorter here."""
    file, model = source_folder(setup.workdir) / "config.json", builtin_model(setup.recipe, "export")
    if not file.is_file():
        return config | {"use_cache": True}
    imported = read_json(file)
    description, learned = read_config(imported, str(file)), model.attention.position == "learned"
    positions = key_of(family, "context")

    models = (dataclasses.replace(item, vocab_size=rows) for item in (description.model, model))
    before, after = map(plain_model, models)
    if before == after and imported["model_type"] == family.model_type:
        ours = ("architectures", key_of(family, "vocab_size"), *([positions] if learned else []))
        return {k: v for k, v in imported.items() if k not in DROPPED} | {key: config[key] for key in ours}
    if not learned:
        config[positions] = max(config[positions], description.positions)
    return config | {"use_cache": True}


def special_ids(setup: StageSetup, stage: str) -> dict[str, Any]:
    """Return the ids of the tokens that begin, end and pad a text: the imported model's, and those of training if there
    was any."""
    tokenizer = setup.data.tokenizer
    file = source_folder(setup.workdir) / "config.json"
    imported = read_json(file) if file.is_file() else {}
    ids = {name: imported[name] for name in ID_KEYS if name in imported}
    if stage == recipes.IMPORT:
        return ids

    ends = ids.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if wrong := [i for i in ends if type(i) is not int]:
        raise ValueError(f"{file}: eos_token_id has {wrong[0]!r}, which is no id; correct it")
    ends = [*dict.fromkeys([*ends, *tokenizer.stops])]

    start = ids.get("bos_token_id")
    start = next(iter(tokenizer.begin), None) if start is None else start
    padding = ids.get("pad_token_id")
    padding = tokenizer.specials.end_of_text if padding is None and not tokenizer.eos else padding
    ids = {"bos_token_id": start, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return ids if padding is None else ids | {"pad_token_id": padding}


def write_tokenizer(setup: StageSetup, stage: str, folder: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template that the stages are trained with."""
    tokenizer, trained = setup.data.tokenizer, stage != recipes.IMPORT
    file, source = tokenizer_file(setup.workdir), source_folder(setup.workdir)
    content = tokenizer_json(setup, stage)
    if trained and list(tokenizer.begin) != tokenizer.backend.encode("").ids:
        content["post_processor"] = _with_begin_tokens(content["post_processor"], setup)
    write_json(folder / "tokenizer.json", content)

    imported, own = (
        read_json(path) if path.is_file() else {}
        for path in (source / "tokenizer_config.json", file.with_name("tokenizer_config.json"))
    )
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= imported | {key: value for key, value in own.items() if value}  # an empty token means none
    # tokenizer.json has a longer list of added tokens; the last two keys are ours alone.
    for name in ("added_tokens_decoder", "auto_map", "chat_template", "tool_template", "stop_tokens"):
        config.pop(name, None)
    if trained and not tokenizer.eos:
        config = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS[0]) | config

    template = chat_template(setup, stage)
    write_json(folder / "tokenizer_config.json", config | ({"chat_template": template} if template else {}))


def tokenizer_json(setup: StageSetup, stage: str) -> dict[str, Any]:
    """Return the tokenizer.json of the run, or of the imported folder without the tokens that later stages need."""
    file = tokenizer_file(setup.workdir)
    imported = source_folder(setup.workdir) / file.name
    if stage != recipes.IMPORT or imported.is_file():
        return read_json(imported if stage == recipes.IMPORT else file)
    content, rows = read_json(file), exported_rows(setup, stage)  # made of a SentencePiece file
    return content | {"added_tokens": [token for token in content["added_tokens"] if token["id"] < rows]}


def chat_template(setup: StageSetup, stage: str) -> Any:
    """Return the chat template that the stages are trained with, or named ones; "" if there is none."""
    tokenizer, trained, source = setup.data.tokenizer, stage != recipes.IMPORT, source_folder(setup.workdir)
    if not trained and not (source / "chat_template.jinja").is_file():
        file = source / "tokenizer_config.json"
        if imported := (read_json(file) if file.is_file() else {}).get("chat_template"):
            return imported
    template = tokenizer.template or (our_template(tokenizer) if trained else "")
    if tokenizer.tool_template:
        named = {"default": template, "tool_use": tokenizer.tool_template}
        return [{"name": name, "template": text} for name, text in named.items()]
    return template


def our_template(tokenizer: Tokenizer) -> str:
    """Return the built-in chat template for a tokenizer, whose own end-of-text token begins a chat."""
    begin = tokenizer.backend.id_to_token(tokenizer.specials.end_of_text)
    return OUR_TEMPLATE.replace("BEGIN", json.dumps(begin, ensure_ascii=False))


def _with_begin_tokens(before: dict[str, Any] | None, setup: StageSetup) -> dict[str, Any]:
    """Return a post-processor that also prepends the begin tokens of training."""
    begin = setup.data.tokenizer.begin
    names = [setup.data.tokenizer.backend.id_to_token(i) for i in begin]

    def template(*sequences: str) -> list[dict[str, Any]]:
        front = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
        return front + [{"Sequence": {"id": sequence, "type_id": n}} for n, sequence in enumerate(sequences)]

    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in zip(names, begin, strict=True)}
    ours = {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"), "special_tokens": tokens}
    return ours if before is None else {"type": "Sequence", "processors": [before, ours]}


def _write_generation(setup: StageSetup, stage: str, folder: Path, config: dict[str, Any]) -> None:
    file = source_folder(setup.workdir) / "generation_config.json"
    imported = read_json(file) if file.is_file() else {}
    ids = {name: config[name] for name in ID_KEYS if name in config}
    write_json(folder / "generation_config.json", (ids | imported) if stage == recipes.IMPORT else (imported | ids))
