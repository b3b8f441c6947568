"""What `generate` and `chat` have in common: the flags of sampling, and the stage that answers."""

import json
from pathlib import Path
from typing import NamedTuple

from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.cli.select_checkpoint import choose, last_finished
from jaxstages.config import Recipe
from jaxstages.generate.sampling import Sampling, check_sampling
from jaxstages.train.handoff import read_parent
from jaxstages.train.setup import StageSetup, setup_stage
from jaxstages.types import Params


class LoadedModel(NamedTuple):
    """sampling: what the flags and the recipe say. stops: texts that end an answer. params_sha256: of `params`."""

    setup: StageSetup
    params: Params
    params_sha256: str
    sampling: Sampling
    stops: tuple[str, ...]


def check_manner(manner: SamplingFlags) -> tuple[Sampling, tuple[str, ...]]:
    """The flags of sampling, without stop tokens yet, and the stop strings.

    Raises:
        ValueError: a flag's value; it names the flag.
    """
    if not 0 <= manner.seed < 2**32:
        raise ValueError(f"--seed={manner.seed} must be between 0 and {2**32 - 1}")
    sampling = Sampling(
        max_new_tokens=1 if manner.max_new_tokens is None else manner.max_new_tokens,
        temperature=manner.temperature,
        top_k=manner.top_k,
        top_p=manner.top_p,
        min_p=manner.min_p,
        repetition_penalty=manner.repetition_penalty,
    )
    try:
        check_sampling(sampling)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    return sampling, tuple(text for word in manner.stop for text in _stop_texts(word))


def _stop_texts(word: str) -> list[str]:
    try:
        found = json.loads(word) if word.startswith("[") else [word]
    except ValueError:
        found = [word]  # a text that begins with a bracket
    if not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"--stop={word!r} must be a text, or a JSON list of texts, none of them empty")
    return found


def load_model(
    recipe: Recipe, workdir: Path, stage: str | None, manner: SamplingFlags, step: int | None = None
) -> LoadedModel:
    """A checkpoint of a stage, by default of the last one that is finished, ready to answer.

    Args:
        step: by default the best one.

    Raises:
        ValueError: a flag's value, or there is no such stage.
    """
    asked, stops = check_manner(manner)
    name = stage or last_finished(recipe, workdir)
    chosen = choose(recipe, workdir / name, step)
    setup = setup_stage(recipe, name, workdir, with_data=False)
    context = recipe.model.context
    most = manner.max_new_tokens or setup.config.evaluation.max_new_tokens
    if most >= context:
        raise ValueError(f"--max_new_tokens={most} must be less than the context, {context}")
    params, lineage = read_parent(setup.folder, setup.program, setup.contract, chosen)
    tokenizer = setup.data.tokenizer
    ids = {text: tokenizer.backend.token_to_id(text) for text in stops if text in tokenizer.control}
    sampling = asked._replace(max_new_tokens=most, stop=(*tokenizer.stops, *ids.values()))
    stops = tuple(text for text in stops if text not in ids)  # these are no text that is ever decoded
    return LoadedModel(setup, params, lineage["params_sha256"], sampling, stops)
