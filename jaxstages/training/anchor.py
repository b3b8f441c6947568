"""The anchor: a penalty that keeps a stage close to its parent, on rows that the parent generates.

If the training data of the parent are not available, text that the parent itself generates replaces them: a penalty on
KL(parent || model) over such rows prevents forgetting as well as replay of the real rows (Marek et al. 2026).
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
    """Data of the penalty.

    rows: prepared rows of generated text.
    reference: parameters of the parent; for a stage with adapters, their base.
    """

    rows: Prepared
    reference: Params


def open_anchor(setup: StageSetup, parent: Params, parent_sha256: str) -> Prepared:
    """Return the anchor rows of a stage from the cache. On first use all processes generate them together.

    Args:
        parent: parameters of the parent.
        parent_sha256: their digest, part of the cache key.
    """
    config, context, seed = setup.config.anchor, setup.recipe.model.context, setup.recipe.seed
    # The attention was chosen for rows with so many segments.
    max_examples = max(rows.max_segments() for rows in setup.data.all_rows)
    key = [parent_sha256, setup.data.tokenizer.sha256, context, config.texts, seed, max_examples]
    folder = generated_folder(cache_folder(setup.recipe, setup.workdir), key)
    if not multihost.broadcast_from_zero(int(multihost.is_process_zero() and open_prepared(folder) is not None)):
        say(f"{setup.name}: the parent generates {config.texts} texts of up to {context} tokens for the anchor", "cyan")
        examples = generate_texts(setup, parent)
        if multihost.is_process_zero():
            write_generated(folder, f"{setup.name}/anchor", examples, setup.data.tokenizer, context, max_examples)
        multihost.barrier("the anchor's rows are written")
    prepared = open_prepared(folder)
    assert prepared is not None
    return prepared


def generate_texts(setup: StageSetup, params: Params) -> list[Example]:
    """Sample texts at temperature 1 from the begin token, each up to the end of the text or of a row.

    If the tokenizer has no begin token, sampling starts from the end-of-text token, as between two documents.
    """
    end = setup.data.tokenizer.specials.end_of_text
    start = list(setup.data.tokenizer.begin) or [end]
    max_new_tokens = setup.recipe.model.context - len(start)
    answers = make_answers(
        setup.program.model,
        Sampling(max_new_tokens=max_new_tokens, temperature=1.0, stop=(end,)),
        context=setup.recipe.model.context,
        batch_size=setup.config.evaluation.batch_size,
        rows=setup.program.row_sharding,
        seed=setup.recipe.seed,
    )
    examples = []
    for batch in answers(params, [start] * setup.config.anchor.texts, 0):
        for tokens in batch:
            ids = np.asarray([*start, *tokens, *([end] if len(tokens) < max_new_tokens else [])], np.int32)
            examples.append(Example(ids, (np.arange(len(ids)) > 0).astype(np.float32)))
    return examples
