"""`generate`: prompts in, a JSON object a line out, by the best checkpoint of a stage."""

import glob
import json
import sys
from pathlib import Path
from typing import NamedTuple

from jaxstages.config import Recipe
from jaxstages.data.sources import open_source
from jaxstages.evaluate import make_answer
from jaxstages.report.matrix import prompt_ids
from jaxstages.start import contract_of, finished, last_finished, read_parent
from jaxstages.workbench import open_workbench


class Request(NamedTuple):
    """What `generate` is asked; max_new_tokens 0 means the recipe's."""

    prompt: str | None
    prompts: str | None
    max_new_tokens: int
    temperature: float
    seed: int
    out: str | None


def generate(recipe: Recipe, workdir: Path, stage: str | None, request: Request) -> None:
    """Write {"prompt", "text", "tokens"} a line, tokens being those of the text, to `--out` or the standard output."""
    if (request.prompt is None) == (request.prompts is None):
        raise ValueError("generate needs --prompt=TEXT or --prompts=FILE.jsonl, one of them")
    if request.temperature and not 1e-3 <= request.temperature <= 1e3:
        raise ValueError(f"--temperature={request.temperature} must not be negative: 0, or from 0.001 to 1000")
    if request.max_new_tokens < 0:
        raise ValueError(f"--max_new_tokens={request.max_new_tokens} must be at least 1")
    if not 0 <= request.seed < 2**32:
        raise ValueError(f"--seed={request.seed} must be between 0 and {2**32 - 1}")
    prompts = [request.prompt] if request.prompt is not None else _read_prompts(Path(request.prompts or ""))
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {prompt[:50]!r} is no text: {error}") from error
    name = stage or last_finished(recipe, workdir)
    finished(workdir / name)
    bench = open_workbench(recipe, name, workdir, with_data=False)
    params, _ = read_parent(bench.stage_dir, bench, contract_of(bench))
    answer = make_answer(
        bench, max_new_tokens=request.max_new_tokens, temperature=request.temperature, seed=request.seed
    )
    texts = answer(params, prompt_ids(bench, prompts))
    lines = [
        json.dumps({"prompt": prompt, "text": text, "tokens": len(bench.tokenizer.encode(text))}, ensure_ascii=False)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    if request.out:
        Path(request.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        sys.stdout.write("\n".join(lines) + "\n")


def _read_prompts(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"--prompts={file}: no such file")
    prompts, wanted = [], 'wanted is {"prompt": "text"}'
    for item in open_source(glob.escape(str(file)), file.parent).read():
        prompt = item.record.get("prompt") if item.record is not None else None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{item.where}: {item.fault or wanted}")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--prompts={file} has no line")
    return prompts
