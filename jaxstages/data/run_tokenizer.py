"""The tokenizer of a run: trained on the recipe's sources, adopted from a file, or copied from the parent's run."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxstages import config as recipes
from jaxstages.config import DataConfig, Recipe
from jaxstages.data.prepare import Engine, find_near_duplicates
from jaxstages.data.shards import items_of
from jaxstages.data.sources import open_source
from jaxstages.data.tasks import texts
from jaxstages.data.tokenizer import SEPARATOR, Tokenizer, load_tokenizer, needed_tokens, settings_file
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.runtime.console import say
from jaxstages.runtime.files import make_folder, parse_path, read_json, write_json, write_text
from jaxstages.runtime.workdir import begun_stages, tokenizer_file


def cache_folder(recipe: Recipe, workdir: Path) -> Path:
    return parse_path(recipe.cache, "config.cache") if recipe.cache else workdir / "cache"


def open_tokenizer(recipe: Recipe, workdir: Path, engine: Engine | None = None) -> Tokenizer:
    """Open the run's tokenizer: the one in the workdir, which is made on first use.

    It is made again when its inputs have changed, as long as no stage was trained with it.
    """
    path = tokenizer_file(workdir)
    inputs_file = path.with_name("made_from.json")
    is_used = bool(begun_stages(workdir))
    if path.exists() and (is_used or not inputs_file.exists()):
        return load_tokenizer(path)

    parent = _parent_tokenizer(recipe)
    inputs = {"inputs": _tokenizer_inputs(recipe, workdir, parent)}
    if path.exists():
        if read_json(inputs_file) == inputs:
            return load_tokenizer(path)
        say(f"tokenizer: made again, what {path} was made from has changed", "yellow")
        path.unlink()

    if parent is not None:
        _copy_tokenizer(parent, path)
        write_json(inputs_file, inputs)
        tokenizer = load_tokenizer(path)
        say(f"tokenizer: that of the run which this one starts from, {tokenizer.vocab_size} tokens, from {parent}")
        return tokenizer

    write_json(inputs_file, inputs)
    tasks = {data.task for data in _all_data(recipe)}
    tokenizer = make_tokenizer(recipe.tokenizer, _tokenizer_texts(recipe, workdir, engine), path, tasks)
    notes = "its own chat template" if tokenizer.template else "our chat template"
    if tokenizer.template and needed_tokens(tasks, template=True):
        notes += f", {SEPARATOR} for pairs"
    say(f"tokenizer: {recipe.tokenizer.kind}, {tokenizer.vocab_size} tokens, {notes}, {path}")
    return tokenizer


def _parent_tokenizer(recipe: Recipe) -> Path | None:
    """Return the tokenizer of the other run that a stage starts from; None if there is no such run, or it has none."""
    own = ("parent", "scratch", *recipes.stages(recipe))
    for stage in recipes.stages(recipe).values():
        if stage.init_from not in own and not stage.init_from.startswith("hf:"):
            file = tokenizer_file(parse_path(stage.init_from, "init_from").parent)
            if file.is_file():
                return file
    return None


def _copy_tokenizer(source: Path, path: Path) -> None:
    make_folder(path.parent)
    settings = settings_file(source).name
    (path.parent / settings).unlink(missing_ok=True)
    for name in (settings, source.name):  # the tokenizer.json last: its presence promises that its settings are there
        if (source.parent / name).is_file():
            write_text(path.parent / name, (source.parent / name).read_text(encoding="utf-8"))


def _tokenizer_inputs(recipe: Recipe, workdir: Path, parent: Path | None) -> str:
    """Return the SHA-256 of everything that a tokenizer is made from: settings, and the bytes of files and sources."""
    config = recipe.tokenizer
    parts: list[Any] = [recipes.to_dict(config), sorted({data.task for data in _all_data(recipe)})]
    file = parent or (Path(config.path) if config.kind == "file" else None)
    if file is not None:
        names = (file.name, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
        names += ("config.json", "generation_config.json", "additional_chat_templates/tool_use.jinja")
        names += ("added_tokens.json",) if file.suffix == ".model" else ()
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
    """List the data sets of all stages."""
    stages = recipes.stages(recipe).values()
    return [data for stage in stages for data in (stage.data, *(part.data for part in stage.mixture.values()))]


def _tokenizer_sources(recipe: Recipe) -> dict[str | Callable, DataConfig]:
    """Map each source that a tokenizer is trained on to its data set."""
    sources: dict[str | Callable, DataConfig] = {source: data for data in _all_data(recipe) for source in data.train}
    if recipe.tokenizer.sources:
        unknown = [name for name in recipe.tokenizer.sources if name not in sources]
        if unknown:
            raise ValueError(
                f"config.tokenizer.sources: {unknown[0]!r} is no stage's training source; known: {[*sources]}"
            )
        sources = {name: sources[name] for name in recipe.tokenizer.sources}
    return sources


def _tokenizer_texts(recipe: Recipe, workdir: Path, engine: Engine | None) -> Iterator[str]:
    """Yield an equal share of `max_bytes` from each source, without the records that are held out of training or
    removed.

    Raises:
        ValueError: no record of any source has a text.
    """
    sources, cache = _tokenizer_sources(recipe), cache_folder(recipe, workdir)
    first_fault, records = "", 0
    for name, data in sources.items():
        remaining_bytes = recipe.tokenizer.max_bytes // len(sources)
        source = open_source(name, cache)
        for item in items_of(source, "train", data, find_near_duplicates(source, data, cache, engine)):
            fault, record_texts = item.fault, []
            if item.record is not None:
                try:
                    record_texts = texts(item.record, data)
                except ValueError as error:
                    fault = str(error)

            if not record_texts:  # preparing the source counts and reports it
                if fault and not first_fault:
                    first_fault = f"{item.where}: {fault}"
                continue

            records += 1
            yield from record_texts
            remaining_bytes -= sum(len(text.encode()) for text in record_texts)
            if remaining_bytes <= 0:
                break
    if first_fault and not records:
        raise ValueError(f"no record has a text to make a tokenizer from; the first: {first_fault}")
