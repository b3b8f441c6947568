"""`generate`: answer prompts with a checkpoint, and write the answers as JSON lines."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxstages.cli.loaded_model import LoadedModel, load_model
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.config import Recipe
from jaxstages.data.sources import open_source
from jaxstages.generation.evaluate import make_texts
from jaxstages.runtime.console import Progress
from jaxstages.runtime.files import local_path, make_folder, rename_durably


class Request(NamedTuple):
    """The flags of `generate`."""

    prompt: str | None
    prompts: str | None
    out: str | None
    sampling: SamplingFlags
    step: int | None = None


def generate(recipe: Recipe, workdir: Path, stage: str | None, request: Request) -> None:
    """Write {"prompt", "text", "tokens"} per line to `--out` or to standard output; tokens counts the generated ones.

    Finished answers are appended to `OUT.part`, which is renamed to OUT at the end. Started again with the same flags,
    the command continues after the answers in it.

    Raises:
        ValueError: a flag has a wrong value, a prompt is not text or is too long, or OUT exists.
    """
    prompts = _prompts(request)
    out = None if request.out is None else local_path(request.out, "--out")
    if out is not None and out.exists():
        raise ValueError(f"--out={request.out} is there already; remove it, or name another file")

    loaded = load_model(recipe, workdir, stage, request.sampling, request.step)
    ids = loaded.encode(prompts)
    if out is None:
        for line in _answers(loaded, request.sampling.seed, prompts, ids, 0):
            print(line, flush=True)
        return

    part = out.with_name(f"{out.name}.part")
    make_folder(out.parent)
    done = _resume(part, json.dumps(_header(loaded, request.sampling)), prompts)
    with part.open("a", encoding="utf-8") as file:
        for line in _answers(loaded, request.sampling.seed, prompts, ids, done):
            file.write(line + "\n")
            file.flush()

    _, answers = part.read_text(encoding="utf-8").split("\n", 1)
    fresh = out.with_name(f"{out.name}.tmp")
    fresh.write_text(answers, encoding="utf-8")
    rename_durably(fresh, out)
    part.unlink()


def _prompts(request: Request) -> list[str]:
    """Return the prompts of --prompt or --prompts. Raises ValueError unless one of them is given, and valid."""
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
    return prompts


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


# The unfinished file ----------------------------------------------------------------------------------------------


def _header(loaded: LoadedModel, flags: SamplingFlags) -> dict[str, Any]:
    """Return what answers depend on besides the prompts. It is the first line of `OUT.part`."""
    identity = {"stage": loaded.setup.name, "params_sha256": loaded.params_sha256, "seed": flags.seed}
    return identity | loaded.sampling._asdict() | {"stop_texts": loaded.stops}


def _resume(part: Path, header: str, prompts: list[str]) -> int:
    """Return the number of prompts that `part` already answers. A file that was written with other flags is
    overwritten."""
    # A line without its newline was cut off when the process was killed.
    lines = part.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if part.exists() else []
    done = 0
    if lines[:1] == [header]:
        answered = [_prompt_of(line) for line in lines[1:]]
        while done < min(len(answered), len(prompts)) and answered[done] == prompts[done]:
            done += 1
    part.write_text("".join(f"{line}\n" for line in [header, *lines[1 : 1 + done]]), encoding="utf-8")
    return done


def _prompt_of(line: str) -> str | None:
    try:
        return json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        return None


# Answers ----------------------------------------------------------------------------------------------------------


def _answers(loaded: LoadedModel, seed: int, prompts: list[str], ids: list[list[int]], done: int) -> Iterator[str]:
    """Yield a line for each prompt after the first `done`. An answer does not depend on where the command continues."""
    rows = _batch_rows(loaded, len(prompts) - done)
    texts = make_texts(loaded.setup.text_model, loaded.sampling, rows, stops=loaded.stops, seed=seed)
    progress = Progress("generate", len(prompts), done, to=sys.stderr) if len(prompts) > rows else None
    for batch in texts(loaded.params, ids[done:], done):
        for answer in batch:
            line = {"prompt": prompts[done], "text": answer.text, "tokens": len(answer.ids)}
            yield json.dumps(line, ensure_ascii=False)
            done += 1
        if progress is not None:
            progress.update(done)


def _batch_rows(loaded: LoadedModel, prompts: int) -> int:
    """Return the batch size: the recipe's, or for fewer prompts the next power of two that the mesh can split."""
    mesh, limit = loaded.setup.program.mesh, loaded.setup.config.evaluation.batch_size
    rows = math.prod(mesh.shape[axis] for axis in loaded.setup.recipe.mesh.rules.rows)
    while rows < min(prompts, limit):
        rows *= 2
    return min(rows, limit)
