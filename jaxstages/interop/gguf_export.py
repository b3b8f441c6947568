"""Export of a checkpoint to one GGUF file for llama.cpp, with a `Modelfile` for Ollama beside it.

The container is written by the library `gguf`. An export verifies itself: the file is read back and compared, tensor by
tensor, before it gets its name.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxstages.checkpoint.fingerprint import named_leaves, params_sha256
from jaxstages.config import Recipe, builtin_model
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.interop.config_json import read_config
from jaxstages.interop.gguf_layout import choose_arch, hyperparameters, tensors
from jaxstages.interop.gguf_tokenizer import vocabulary
from jaxstages.interop.hf_export import (
    chat_template,
    exported_rows,
    keep_rows,
    our_template,
    special_ids,
    tokenizer_json,
)
from jaxstages.interop.hf_import import source_folder
from jaxstages.interop.model_card import licence_field
from jaxstages.runtime import multihost
from jaxstages.runtime.console import Progress, say
from jaxstages.runtime.files import make_folder, read_json, rename_durably, sync, write_text
from jaxstages.runtime.workdir import tokenizer_file
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import StageSetup, setup_stage

SUFFIX = ".gguf"

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""Name of each dtype in GGUF. Q8_0: blocks of 32 numbers of 8 bits with a float16 scale."""

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""Values of `general.file_type`."""

LARGEST_FLOAT16 = 65_504.0

ALWAYS_FLOAT32 = ("position_embd.weight", "rope_freqs.weight", "ffn_gate_inp.weight")
"""Endings of the names of tensors that llama.cpp wants in float32, beside vectors."""

OUR_TEMPLATE_IN_GO = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"
"""The built-in chat template (`our_template`) for Ollama, without the token that begins a chat."""


def export_gguf(
    recipe: Recipe, workdir: Path, stage: str, to: Path, dtype: str, chosen: dict[str, Any] | None = None
) -> None:
    """Export a checkpoint of a stage to the file `to`, and a `Modelfile` beside it.

    Args:
        dtype: key of `DTYPES`.
        chosen: the result of the checkpoint; None takes the best one.

    Raises:
        ValueError: llama.cpp cannot express the model or its tokenizer, or a file is there already.
        OSError: the file, read back, has other tensors. `to` is not created then.
    """
    gguf, modelfile = _library(), to.with_name("Modelfile")
    for path in (to, modelfile):
        if path.exists():
            raise ValueError(f"{path} is there already; export into another folder")

    own = builtin_model(recipe, "export")
    setup = setup_stage(recipe, stage, workdir, with_data=False)
    rows, longest = exported_rows(setup, stage), _context(setup)
    arch, model, context = choose_arch(dataclasses.replace(own, vocab_size=rows), longest)
    if context < longest:
        say(f"export: {arch.name} of llama.cpp has no windows; the context is that of the window, {context}", "yellow")
    template = chat_template(setup, stage)
    keys = _general(setup, dtype) | hyperparameters(arch, model, context) | _tokenizer(setup, stage, rows, template)

    params, lineage = read_parent(setup.folder, setup.program, setup.contract, chosen)
    params = keep_rows(params, rows)
    digest = params_sha256(params)
    keys |= {"jaxstages.params_sha256": digest, "jaxstages.stage": stage, "jaxstages.step": lineage["step"]}
    leaves = {path: multihost.gather_to_host(leaf) for path, leaf in named_leaves(params).items()}

    make_folder(to.parent)
    fresh = to.with_name(f"{to.name}.tmp")
    try:
        types = _write(gguf, fresh, arch.name, keys, lambda: tensors(arch, model, leaves), DTYPES[dtype])
        largest = _verify(gguf, fresh, keys, lambda: tensors(arch, model, leaves), types)
        rename_durably(fresh, to)
    finally:
        fresh.unlink(missing_ok=True)
    write_text(modelfile, _modelfile(setup, to, template, context))
    sync(to.absolute().parent)

    wider = sum(kind == "F16" for kind in types.values()) if dtype == "q8_0" else 0
    say(
        f"export: {stage} at step {lineage['step']} as {arch.name} of llama.cpp, {dtype}, in {to}; read back: "
        f"{len(types)} tensors, params_sha256 {digest[:12]}…, values differ by {largest:g}"
        + (f"; {wider} tensors are float16, since their rows are no multiple of 32" if wider else ""),
        "bold",
    )


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError("GGUF files need the library gguf; install it: pip install '.[gguf]'") from error


# Metadata ---------------------------------------------------------------------------------------------------------


def _context(setup: StageSetup) -> int:
    """Return the longest context: that of the recipe, or the one that an imported model was trained for."""
    model, file = builtin_model(setup.recipe, "export"), source_folder(setup.workdir) / "config.json"
    if model.attention.position == "learned" or not file.is_file():
        return model.context
    return max(model.context, read_config(read_json(file), str(file)).positions)


def _general(setup: StageSetup, dtype: str) -> dict[str, Any]:
    licence = licence_field(source_folder(setup.workdir))
    keys = {
        "general.name": setup.recipe.name,
        "general.type": "model",
        "general.file_type": FILE_TYPES[DTYPES[dtype]],
        "general.quantization_version": 2,
    }
    return keys | ({} if licence == "other" else {"general.license": licence})


def _tokenizer(setup: StageSetup, stage: str, rows: int, template: Any) -> dict[str, Any]:
    """Return the tokenizer's metadata: its vocabulary, special tokens, and chat template."""
    tokenizer, content, file = setup.data.tokenizer, tokenizer_json(setup, stage), tokenizer_file(setup.workdir)
    if len(tokenizer.begin) > 1:
        raise ValueError(f"{file} begins a text with {len(tokenizer.begin)} tokens; llama.cpp adds at most one")
    keys = vocabulary(content, rows, str(file))
    if (content["normalizer"] or {}).get("type") == "NFC":
        say("export: llama.cpp does not apply the tokenizer's NFC, so decomposed characters differ there", "yellow")

    ids = special_ids(setup, stage)
    ends = ids.get("eos_token_id", tokenizer.stops)
    ends = [i for i in (ends if isinstance(ends, list | tuple) else [ends]) if i is not None and i < rows]
    ends.sort(key=lambda i: i != tokenizer.specials.end_of_text)  # the first one ends a text, the others a turn
    named = dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False))
    if len(ends) > len(named):
        left_out = [str(tokenizer.backend.id_to_token(i)) for i in ends[len(named) :]]
        say(f"export: a GGUF file names three tokens that end a text; not named: {', '.join(left_out)}", "yellow")

    begin = next(iter(tokenizer.begin), ids.get("bos_token_id"))
    begin = named.get("eos_token_id") if begin is None else begin  # else llama.cpp takes token 11
    named |= {"bos_token_id": begin, "padding_token_id": ids.get("pad_token_id")}
    keys |= {f"tokenizer.ggml.{name}": i for name, i in named.items() if i is not None}
    # llama.cpp adds the token that begins a text to a chat too. Ours may begin with another one, as in the template.
    is_chat = setup.config.data.task == "chat" and template == our_template(tokenizer)
    adds_begin = bool(tokenizer.begin) and (not is_chat or _begins_as_text(tokenizer))
    keys |= {"tokenizer.ggml.add_bos_token": adds_begin, "tokenizer.ggml.add_eos_token": False}

    match template:
        case "":
            return keys
        case str():
            return keys | {"tokenizer.chat_template": template}
        case _:
            named_templates = {entry["name"]: entry["template"] for entry in template}
            default = named_templates.pop("default", None)
            keys |= {"tokenizer.chat_template": default} if default else {}
            keys |= {"tokenizer.chat_templates": list(named_templates)} if named_templates else {}
            return keys | {f"tokenizer.chat_template.{name}": text for name, text in named_templates.items()}


def _begins_as_text(tokenizer: Tokenizer) -> bool:
    """Return whether a chat of the built-in template begins with the token that begins a text."""
    return tokenizer.begin == (tokenizer.specials.end_of_text,)


# The file ---------------------------------------------------------------------------------------------------------


def _type_of(name: str, values: np.ndarray, kind: str) -> str:
    """Return the type of a tensor in a file of type `kind`."""
    if values.ndim == 1 or name.endswith(ALWAYS_FLOAT32):
        return "F32"
    if kind == "Q8_0" and values.shape[-1] % 32:
        return "F16"
    return kind


def _write(
    gguf: Any, path: Path, arch: str, keys: dict[str, Any], items: Callable[[], Any], kind: str
) -> dict[str, str]:
    """Write the file, one tensor at a time, and return the type of each tensor.

    Args:
        items: returns the tensors with their names, in order.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)

    types, sizes = {}, {}
    for name, values in items():
        types[name] = _type_of(name, values, kind)
        quantized = gguf.GGMLQuantizationType[types[name]]
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantized]
        sizes[name] = values.size // block * block_bytes
        writer.add_tensor_info(name, values.shape, np.dtype(np.float32), sizes[name], raw_dtype=quantized)

    writer.write_header_to_file()
    try:
        _write_values(gguf, writer, items, types, sizes)
    finally:
        writer.close()
    sync(path)
    return types


def _write_values(
    gguf: Any, writer: Any, items: Callable[[], Any], types: dict[str, str], sizes: dict[str, int]
) -> None:
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    progress, done = Progress("MB written", max(sum(sizes.values()) // 10**6, 1)), 0
    for name, values in items():
        if types[name] == "F16" and (largest := float(np.max(np.abs(values)))) > LARGEST_FLOAT16:
            raise ValueError(f"{name} has a value of {largest:g}, too large for float16; take --dtype=bfloat16")
        values = np.ascontiguousarray(values, np.float32)
        writer.write_tensor_data(gguf.quants.quantize(values, gguf.GGMLQuantizationType[types[name]]))
        done += sizes[name]
        progress.update(done // 10**6)


def _verify(gguf: Any, path: Path, keys: dict[str, Any], items: Callable[[], Any], types: dict[str, str]) -> float:
    """Read the file back, and return the largest difference to the values that were to be written.

    Raises OSError unless metadata and tensors are those, up to the rounding of their type.
    """
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    wrong = [key for key, value in keys.items() if not _same(reader.fields[key].contents(), value)]
    wrong += sorted(stored.keys() ^ types.keys())

    largest = 0.0
    for name, values in items():
        if name not in stored:
            continue
        tensor = stored[name]
        read_back = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        values = np.ascontiguousarray(values, np.float32).reshape(-1)
        shape_differs = len(read_back) != len(values) or tensor.tensor_type.name != types[name]
        if shape_differs or np.any(np.abs(read_back - values) > _rounding(values, types[name])):
            wrong.append(name)
        elif len(values):
            largest = max(largest, float(np.max(np.abs(read_back - values))))
    if wrong:
        raise OSError(f"{path} is not what was to be written: {', '.join(wrong[:5])} differ; is the disk in order?")
    return largest


def _same(stored: Any, value: Any) -> bool:
    if isinstance(value, float):
        return bool(np.float32(value) == np.float32(stored))
    if isinstance(value, list) and value and isinstance(value[0], float):
        return bool(np.array_equal(np.asarray(stored, np.float32), np.asarray(value, np.float32)))
    return stored == value


def _rounding(values: np.ndarray, kind: str) -> Any:
    """Return the largest error of each value in a type.

    Q8_0 has 127 steps from 0 to the largest number of a block, whose size is rounded to float16 (11 bits).
    """
    match kind:
        case "F32":
            return 0.0
        case "F16":
            return np.abs(values) * 2.0**-11 + 2.0**-25
        case "BF16":
            return np.abs(values) * 2.0**-8
        case _:
            largest = np.max(np.abs(values.reshape(-1, 32)), axis=1, keepdims=True)
            return np.broadcast_to(largest * (0.501 / 127 + 2.0**-11) + 127 * 2.0**-25, (len(largest), 32)).reshape(-1)


# Ollama -----------------------------------------------------------------------------------------------------------


def _modelfile(setup: StageSetup, to: Path, template: Any, context: int) -> str:
    """Return the `Modelfile` with which `ollama create NAME -f Modelfile` makes a model of the file."""
    tokenizer = setup.data.tokenizer
    lines = [f"# ollama create {setup.recipe.name} -f Modelfile", f"FROM ./{to.name}", ""]
    if template == our_template(tokenizer):
        end = tokenizer.backend.id_to_token(tokenizer.specials.end_of_text)
        begin = "" if _begins_as_text(tokenizer) else end  # else Ollama adds it
        lines += [f'TEMPLATE """{begin}{OUR_TEMPLATE_IN_GO}"""', ""]
    elif template:
        lines += [
            "# No TEMPLATE: the model's own is in Jinja, and Ollama's are in Go. Ollama knows those of well-known",
            "# models by the one in the GGUF file; for another model, write it here.",
            "",
        ]
    else:
        lines += ["# The model has no chat template: it continues texts.", 'TEMPLATE """{{ .Prompt }}"""', ""]
    stops = [tokenizer.backend.id_to_token(i) for i in tokenizer.stops]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops if stop]
    lines += [f"PARAMETER num_ctx {context}"]
    return "\n".join([*lines, ""])
