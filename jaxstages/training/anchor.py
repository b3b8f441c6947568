"""The anchor: rows that a stage's parent generates, on which the stage is kept close to it.

For weights whose training data are not at hand, text that the model itself generates stands in for them: a penalty on
KL(parent || model) over such rows forgets as little as replay of the real ones (Marek et al. 2026).
"""

from typing import NamedTuple

import numpy as np

from jaxstages.data.prepare import Prepared, generated_folder, open_prepared, write_generated
from jaxstages.data.run_tokenizer import cache_folder
from jaxstages.data.tasks import Example
from jaxstages.generation.decode import make_answers
from jaxstages.generation.sampling import Sampling
from jaxstages.runtime import multihost
from jaxstages.runtime.console import say
from jaxstages.training.setup import StageSetup
from jaxstages.types import Params


class Anchor(NamedTuple):
    """rows: what the parent generated. reference: the parent's parameters, with adapters their base."""

    rows: Prepared
    reference: Params


def open_anchor(setup: StageSetup, parent: Params, parent_sha256: str) -> Prepared:
    """The rows that a stage is anchored on, from the cache; generated on first use by all processes together.

    Args:
        parent: its parameters.
        parent_sha256: their digest, by which the rows are found again.
    """
    config, context, seed = setup.config.anchor, setup.recipe.model.context, setup.recipe.seed
    key = [parent_sha256, setup.data.tokenizer.sha256, context, config.texts, seed]
    folder = generated_folder(cache_folder(setup.recipe, setup.workdir), key)
    if not multihost.broadcast_from_zero(int(multihost.is_process_zero() and open_prepared(folder) is not None)):
        say(f"{setup.name}: the parent generates {config.texts} texts of up to {context} tokens, to anchor on", "cyan")
        examples = generate_texts(setup, parent)
        if multihost.is_process_zero():
            write_generated(folder, f"{setup.name}/anchor", examples, setup.data.tokenizer, context)
        multihost.barrier("the anchor's rows are written")
    prepared = open_prepared(folder)
    assert prepared is not None
    return prepared


def generate_texts(setup: StageSetup, params: Params) -> list[Example]:
    """Texts sampled at temperature 1 from the token that a text begins with, up to the end of the text or of a row.

    A model whose texts begin with no token of their own starts from the end of a text, as between two documents.
    """
    end = setup.data.tokenizer.specials.end_of_text
    start = list(setup.data.tokenizer.begin) or [end]
    room = setup.recipe.model.context - len(start)
    answers = make_answers(
        setup.program.model,
        Sampling(max_new_tokens=room, temperature=1.0, stop=(end,)),
        context=setup.recipe.model.context,
        batch_size=setup.config.evaluation.batch_size,
        rows=setup.program.row_sharding,
        seed=setup.recipe.seed,
    )
    examples = []
    for batch in answers(params, [start] * setup.config.anchor.texts, 0):
        for tokens in batch:
            ids = np.asarray([*start, *tokens, *([end] if len(tokens) < room else [])], np.int32)
            examples.append(Example(ids, (np.arange(len(ids)) > 0).astype(np.float32)))
    return examples
