"""The model that `generate` and `chat` use: a checkpoint with its sampling parameters."""

import json
from pathlib import Path
from typing import NamedTuple

from jaxstages.cli.resolve import check_stage
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.cli.select_checkpoint import choose, last_finished
from jaxstages.config import Recipe
from jaxstages.data.prompts import encode_prompts
from jaxstages.generation.sampling import Sampling, check_sampling
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import StageSetup, setup_stage
from jaxstages.types import Params


class LoadedModel(NamedTuple):
    """A stage with the parameters of a checkpoint.

    sampling: sampling parameters, from the flags and the recipe.
    stops: stop strings; those that are control tokens are in `sampling.stop`.
    """

    setup: StageSetup
    params: Params
    params_sha256: str
    sampling: Sampling
    stops: tuple[str, ...]

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Tokenize prompts in the format of the stage's task.

        Raises:
            ValueError: a prompt leaves too little room for an answer.
        """
        context, max_new_tokens = self.setup.recipe.model.context, self.sampling.max_new_tokens
        ids = encode_prompts(self.setup.config.data.task, self.setup.data.tokenizer, prompts)
        for number, prompt in enumerate(ids, start=1):
            if len(prompt) > context - max_new_tokens:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} a context of "
                    f"{context} has room for {context - max_new_tokens}: shorten it, or set max_new_tokens lower"
                )
        return ids


def check_sampling_flags(flags: SamplingFlags) -> tuple[Sampling, tuple[str, ...]]:
    """Return the sampling parameters, without stop tokens, and the stop strings.

    Raises:
        ValueError: a flag has a wrong value; the message names the flag.
    """
    if not 0 <= flags.seed < 2**32:
        raise ValueError(f"--seed={flags.seed} must be between 0 and {2**32 - 1}")
    sampling = Sampling(
        max_new_tokens=1 if flags.max_new_tokens is None else flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        repetition_penalty=flags.repetition_penalty,
    )
    try:
        check_sampling(sampling)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    return sampling, tuple(text for value in flags.stop for text in _stop_strings(value))


def _stop_strings(value: str) -> list[str]:
    """Parse one --stop: a string, or a JSON list of strings."""
    try:
        strings = json.loads(value) if value.startswith("[") else [value]
    except ValueError:
        strings = [value]  # a plain string that begins with a bracket
    if not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"--stop={value!r} must be a text, or a JSON list of texts, none of them empty")
    return strings


def load_model(
    recipe: Recipe, workdir: Path, stage: str | None, flags: SamplingFlags, step: int | None = None
) -> LoadedModel:
    """Load a checkpoint for generation.

    Args:
        stage: by default the last finished one.
        step: by default the best one.

    Raises:
        ValueError: a flag has a wrong value, or there is no such checkpoint.
    """
    check_stage(stage, recipe)
    sampling, stops = check_sampling_flags(flags)
    name = stage or last_finished(recipe, workdir)
    chosen = choose(recipe, workdir / name, step)
    setup = setup_stage(recipe, name, workdir, with_data=False)

    context = recipe.model.context
    max_new_tokens = flags.max_new_tokens or setup.config.evaluation.max_new_tokens
    if max_new_tokens >= context:
        raise ValueError(f"--max_new_tokens={max_new_tokens} must be less than the context, {context}")

    params, lineage = read_parent(setup.folder, setup.program, setup.contract, chosen)
    tokenizer = setup.data.tokenizer
    # Control tokens are never decoded to text, so a stop string cannot match them.
    stop_ids = {text: tokenizer.backend.token_to_id(text) for text in stops if text in tokenizer.control}
    return LoadedModel(
        setup,
        params,
        lineage["params_sha256"],
        sampling._replace(max_new_tokens=max_new_tokens, stop=(*tokenizer.stops, *stop_ids.values())),
        tuple(text for text in stops if text not in stop_ids),
    )
