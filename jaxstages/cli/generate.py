"""`generate`: prompts in, a JSON object a line out, by the best checkpoint of a stage."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxstages.cli.loaded_model import LoadedModel, load_model
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.config import Recipe
from jaxstages.data.sources import open_source
from jaxstages.experiments.stage_matrix import prompt_ids
from jaxstages.generate.evaluate import make_texts
from jaxstages.runtime.console import Progress
from jaxstages.runtime.files import local_path, make_folder, put


class Request(NamedTuple):
    """What `generate` is asked."""

    prompt: str | None
    prompts: str | None
    out: str | None
    manner: SamplingFlags
    step: int | None = None


def generate(recipe: Recipe, workdir: Path, stage: str | None, request: Request) -> None:
    """Write {"prompt", "text", "tokens"} a line to `--out` or the standard output; tokens are those that were made.

    Answers are written as they are done, to `OUT.part`, which becomes OUT when all are there; started again with the
    same flags, what is in it is not done again.

    Raises:
        ValueError: a flag's value; a prompt that is no text, or is too long; OUT is there already.
    """
    if (request.prompt is None) == (request.prompts is None):
        raise ValueError("generate needs --prompt=TEXT or --prompts=FILE.jsonl, one of them")
    if request.prompts is None:
        prompts = [request.prompt or ""]
    else:
        prompts = _read_prompts(local_path(request.prompts, "--prompts"))
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {prompt[:50]!r} is no text: {error}") from error
    out = None if request.out is None else local_path(request.out, "--out")
    if out is not None and out.exists():
        raise ValueError(f"--out={request.out} is there already; remove it, or name another file")
    answering = load_model(recipe, workdir, stage, request.manner, request.step)
    ids = _fitting(answering, prompts)
    if out is None:
        for line in _answers(answering, request.manner.seed, prompts, ids, 0):
            print(line, flush=True)
        return
    part = out.with_name(f"{out.name}.part")
    head = json.dumps(_head(answering, request.manner))
    make_folder(out.parent)
    done = _resume(part, head, prompts)
    with part.open("a", encoding="utf-8") as file:
        for line in _answers(answering, request.manner.seed, prompts, ids, done):
            file.write(line + "\n")
            file.flush()
    lines = part.read_text(encoding="utf-8").split("\n", 1)[1]
    fresh = out.with_name(f"{out.name}.tmp")
    fresh.write_text(lines, encoding="utf-8")
    put(fresh, out)
    part.unlink()


def _head(answering: LoadedModel, manner: SamplingFlags) -> dict[str, Any]:
    """What the answers of a file depend on beside the prompts."""
    sampling, setup = answering.sampling._asdict(), answering.setup
    return {"stage": setup.name, "params_sha256": answering.params_sha256, "seed": manner.seed} | {
        **sampling,
        "stop_texts": answering.stops,
    }


def _resume(part: Path, head: str, prompts: list[str]) -> int:
    """How many prompts the part has answers to; of another command's part, or none, a new one is begun."""
    # What follows the last new line is nothing, or was cut off by a kill.
    lines = part.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if part.exists() else []
    if lines[:1] == [head]:
        answered = [_prompt_of(line) for line in lines[1:]]
        done = next((n for n, (a, p) in enumerate(zip(answered, prompts, strict=False)) if a != p), len(answered))
        kept = lines[: 1 + min(done, len(prompts))]
    else:
        kept = [head]
    part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return len(kept) - 1


def _prompt_of(line: str) -> str | None:
    try:
        return json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        return None


def _fitting(answering: LoadedModel, prompts: list[str]) -> list[list[int]]:
    """The prompts' tokens. Raises ValueError for one that leaves too little room in the context."""
    setup, most = answering.setup, answering.sampling.max_new_tokens
    room, ids = setup.recipe.model.context - most, prompt_ids(setup, prompts)
    for number, prompt in enumerate(ids, start=1):
        if len(prompt) > room:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens={most} a context of "
                f"{setup.recipe.model.context} has room for {room}: shorten it, or give a smaller --max_new_tokens"
            )
    return ids


def _answers(answering: LoadedModel, seed: int, prompts: list[str], ids: list[list[int]], done: int) -> Iterator[str]:
    """A line for each prompt but the first `done`; each has the same answer wherever one begins."""
    setup = answering.setup
    rows = _rows(answering, len(prompts) - done)
    texts = make_texts(setup.text_model, answering.sampling, rows, stops=answering.stops, seed=seed)
    progress = Progress("generate", len(prompts), done, to=sys.stderr) if len(prompts) > rows else None
    for batch in texts(answering.params, ids[done:], done):
        for found in batch:
            line = {"prompt": prompts[done], "text": found.text, "tokens": len(found.ids)}
            yield json.dumps(line, ensure_ascii=False)
            done += 1
        if progress is not None:
            progress.update(done)


def _rows(answering: LoadedModel, prompts: int) -> int:
    """Of a batch: the recipe's, or for fewer prompts the next power of two that the mesh can take."""
    mesh, most = answering.setup.program.mesh, answering.setup.config.evaluation.batch_size
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    while rows < min(prompts, most):
        rows *= 2
    return min(rows, most)


def _read_prompts(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"--prompts={file}: no such file")
    prompts, wanted = [], 'wanted is {"prompt": "text"}'
    for item in open_source(str(file), file.parent).read():
        prompt = item.record.get("prompt") if item.record is not None else None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{item.where}: {item.fault or wanted}")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--prompts={file} has no line")
    return prompts
