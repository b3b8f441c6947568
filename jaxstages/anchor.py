"""The anchor: rows that a stage's parent generates, on which the stage is kept close to it.

For weights whose training data are not at hand, text that the model itself generates stands in for them: a penalty on
KL(parent || model) over such rows forgets as little as replay of the real ones (Marek et al. 2026).
"""

from typing import NamedTuple

import numpy as np

from jaxstages import hosts
from jaxstages.console import say
from jaxstages.data.prepare import Prepared, generated_folder, open_prepared, write_generated
from jaxstages.data.tasks import Example
from jaxstages.decode.generate import make_answers
from jaxstages.decode.sampling import Sampling
from jaxstages.types import Params
from jaxstages.workbench import Workbench, cache_folder


class Anchor(NamedTuple):
    """rows: what the parent generated. reference: the parent's parameters, with adapters their base."""

    rows: Prepared
    reference: Params


def open_anchor(bench: Workbench, parent: Params, parent_sha256: str) -> Prepared:
    """The rows that a stage is anchored on, from the cache; generated on first use by all processes together.

    Args:
        parent: its parameters.
        parent_sha256: their digest, by which the rows are found again.
    """
    config, context, seed = bench.stage.anchor, bench.recipe.model.context, bench.recipe.seed
    key = [parent_sha256, bench.tokenizer.sha256, context, config.texts, seed]
    folder = generated_folder(cache_folder(bench.recipe, bench.workdir), key)
    if not hosts.from_leader(int(hosts.leads() and open_prepared(folder) is not None)):
        say(f"{bench.name}: the parent generates {config.texts} texts of up to {context} tokens, to anchor on", "cyan")
        examples = generate_texts(bench, parent)
        if hosts.leads():
            write_generated(folder, f"{bench.name}/anchor", examples, bench.tokenizer, context)
        hosts.meet("the anchor's rows are written")
    prepared = open_prepared(folder)
    assert prepared is not None
    return prepared


def generate_texts(bench: Workbench, params: Params) -> list[Example]:
    """Texts sampled at temperature 1 from the token that a text begins with, up to the end of the text or of a row.

    A model whose texts begin with no token of their own starts from the end of a text, as between two documents.
    """
    end = bench.tokenizer.specials.end_of_text
    start = list(bench.tokenizer.begin) or [end]
    room = bench.recipe.model.context - len(start)
    answers = make_answers(
        bench.model,
        Sampling(max_new_tokens=room, temperature=1.0, stop=(end,)),
        context=bench.recipe.model.context,
        batch_size=bench.stage.evaluation.batch_size,
        rows=bench.rows,
        seed=bench.recipe.seed,
    )
    examples = []
    for batch in answers(params, [start] * bench.stage.anchor.texts, 0):
        for tokens in batch:
            ids = np.asarray([*start, *tokens, *([end] if len(tokens) < room else [])], np.int32)
            examples.append(Example(ids, (np.arange(len(ids)) > 0).astype(np.float32)))
    return examples
