"""The tokenizer of a run: trained on the recipe's sources, adopted from a file, or taken over from the parent's run."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxstages import config as recipes
from jaxstages.config import DataConfig, Recipe
from jaxstages.data.prepare import Engine, find_near_duplicates
from jaxstages.data.shards import items_of
from jaxstages.data.sources import open_source
from jaxstages.data.tasks import texts
from jaxstages.data.tokenizer import SEPARATOR, Tokenizer, load_tokenizer, needed_tokens
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.runtime.console import say
from jaxstages.runtime.files import local_path, make_folder, read_json, write_json, write_text
from jaxstages.runtime.workdir import has_begun, tokenizer_file


def cache_folder(recipe: Recipe, workdir: Path) -> Path:
    return local_path(recipe.cache, "config.cache") if recipe.cache else workdir / "cache"


def open_tokenizer(recipe: Recipe, workdir: Path, engine: Engine | None = None) -> Tokenizer:
    """The run's tokenizer: trained, or taken over, on first use; afterwards the one in the workdir. As long as nothing
    was trained with it, it is made again when what it was made from has changed."""
    path = tokenizer_file(workdir)
    origin = path.with_name("made_from.json")
    if path.exists() and (
        any(has_begun(workdir / name) for name in recipes.CHECKPOINTED_STAGES) or not origin.exists()
    ):
        return load_tokenizer(path)
    taken = _taken_over(recipe)
    made_from = {"inputs": _tokenizer_inputs(recipe, workdir, taken)}
    if path.exists():
        if read_json(origin) == made_from:
            return load_tokenizer(path)
        say(f"tokenizer: made again, what {path} was made from has changed", "yellow")
        path.unlink()
    if taken is not None:
        _copy_tokenizer(taken, path)
        write_json(origin, made_from)
        tokenizer = load_tokenizer(path)
        say(f"tokenizer: that of the run which this one starts from, {tokenizer.vocab_size} tokens, from {taken}")
        return tokenizer
    write_json(origin, made_from)
    tasks = {data.task for data in _all_data(recipe)}
    tokenizer = make_tokenizer(recipe.tokenizer, _tokenizer_texts(recipe, workdir, engine), path, tasks)
    how = "its own chat template" if tokenizer.template else "our chat template"
    pairs = tokenizer.template and needed_tokens(tasks, template=True)
    how += f", {SEPARATOR} for pairs" if pairs else ""
    say(f"tokenizer: {recipe.tokenizer.kind}, {tokenizer.vocab_size} tokens, {how}, {path}")
    return tokenizer


def _taken_over(recipe: Recipe) -> Path | None:
    """The tokenizer of the other run that a stage of this one starts from; None where none does, or it has none."""
    for stage in recipes.stages(recipe).values():
        if stage.init_from not in ("parent", "scratch") and not stage.init_from.startswith("hf:"):
            file = tokenizer_file(local_path(stage.init_from, "init_from").parent)
            if file.is_file():
                return file
    return None


def _copy_tokenizer(source: Path, path: Path) -> None:
    make_folder(path.parent)
    beside = "tokenizer_config.json"
    (path.parent / beside).unlink(missing_ok=True)
    for name in (beside, source.name):  # the tokenizer last: where it is, what belongs to it is
        if (source.parent / name).is_file():
            write_text(path.parent / name, (source.parent / name).read_text(encoding="utf-8"))


def _tokenizer_inputs(recipe: Recipe, workdir: Path, taken: Path | None) -> str:
    """SHA-256 of all that a tokenizer is made from: settings, and the bytes of files and sources."""
    config = recipe.tokenizer
    parts: list[Any] = [recipes.to_dict(config), sorted({data.task for data in _all_data(recipe)})]
    file = taken or (Path(config.path) if config.kind == "file" else None)
    if file is not None:
        names = (file.name, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
        names += ("config.json", "generation_config.json", "additional_chat_templates/tool_use.jinja")
        files = [file.parent / name for name in names if (file.parent / name).is_file()]
        parts += [hashlib.sha256(each.read_bytes()).hexdigest() for each in files]
    else:
        cache = cache_folder(recipe, workdir)
        parts += [
            [open_source(name, cache).fingerprint, recipes.to_dict(data)]
            for name, data in _tokenizer_sources(recipe).items()
        ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _all_data(recipe: Recipe) -> list[DataConfig]:
    """All data sets of a recipe."""
    stages = recipes.stages(recipe).values()
    return [data for stage in stages for data in (stage.data, *(part.data for part in stage.mixture.values()))]


def _tokenizer_sources(recipe: Recipe) -> dict[str, DataConfig]:
    """The sources that a tokenizer is trained on, each with how its records are read."""
    chosen = {source: data for data in _all_data(recipe) for source in data.train}
    if recipe.tokenizer.sources:
        unknown = [name for name in recipe.tokenizer.sources if name not in chosen]
        if unknown:
            raise ValueError(
                f"config.tokenizer.sources: {unknown[0]!r} is no stage's training source; known: {[*chosen]}"
            )
        chosen = {name: chosen[name] for name in recipe.tokenizer.sources}
    return chosen


def _tokenizer_texts(recipe: Recipe, workdir: Path, engine: Engine | None) -> Iterator[str]:
    """An equal share of `max_bytes` from each source. Held-out and removed records are left out by the same rule as in
    training.

    Raises:
        ValueError: no record of any source gives a text.
    """
    chosen, faults, read = _tokenizer_sources(recipe), [], 0
    for name, data in chosen.items():
        left = recipe.tokenizer.max_bytes // len(chosen)
        cache = cache_folder(recipe, workdir)
        source = open_source(name, cache)
        for item in items_of(source, "train", data, find_near_duplicates(source, data, cache, engine)):
            fault, found = item.fault, []
            if item.record is not None:
                try:
                    found = texts(item.record, data)
                except ValueError as error:
                    fault = str(error)
            if not found:  # counted and named when the source is prepared
                faults = faults or ([f"{item.where}: {fault}"] if fault else [])
                continue
            read += 1
            yield from found
            left -= sum(len(text.encode()) for text in found)
            if left <= 0:
                break
    if faults and not read:
        raise ValueError(f"no record has a text to make a tokenizer from; the first: {faults[0]}")
