"""Held-out scores of parameters: the loss over packed rows, and the task's own metrics from generated answers."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstages.data.pipeline import batches_once
from jaxstages.data.prepare import Prepared, evenly
from jaxstages.data.tasks import Question
from jaxstages.decode.generate import make_answers
from jaxstages.decode.label import make_likeliest
from jaxstages.decode.sampling import Sampling
from jaxstages.decode.text import TextStream
from jaxstages.metrics import from_sums, score_labels, score_text
from jaxstages.sharding import place_batch, rows_here
from jaxstages.step import make_eval_step
from jaxstages.types import Metrics, Params, Sums
from jaxstages.workbench import Workbench


class Report(NamedTuple):
    """metrics: plain numbers. signatures: sacreBLEU's, of the scores that have one."""

    metrics: Metrics
    signatures: list[str]


def make_evaluate(bench: Workbench, between: Callable[[], None] = lambda: None) -> Callable[[Params, bool], Report]:
    """`evaluate(params, scores)`: every held-out row once, on any number of devices and hosts; with `scores` also the
    metrics of the recipe, for which every held-out question is answered once.

    Args:
        between: called before each batch; what it raises ends the evaluation.
    """
    stage, config = bench.stage, bench.stage.evaluation
    token_bytes_V = jnp.asarray(bench.tokenizer.token_bytes())
    eval_step = jax.jit(make_eval_step(bench.model.headless, token_bytes_V, stage.loop.loss_tile))
    questions = evenly([q for source in bench.held_out for q in source.questions()], config.max_examples)
    scored = bool(config.metrics and questions)
    classify = make_classify(bench, between) if scored and stage.data.task == "classify" else None
    answer = make_answer(bench, between=between) if scored and classify is None else None

    def loss_sums(params: Params) -> Sums:
        total: Sums = {}
        size, rows = config.batch_size, bench.rows
        for batch in batches_once(bench.held_out, batch_size=size, most=config.max_rows, here=rows_here(size, rows)):
            between()
            sums = eval_step(params, place_batch(batch, size, rows))
            # Sums stay on the device, so that no batch waits for the one before.
            total = sums if not total else jax.tree.map(jnp.add, total, sums)
        return total

    def evaluate(params: Params, scores: bool) -> Report:
        metrics = from_sums(jax.device_get(loss_sums(params)))
        if scores and classify is not None:
            return Report(metrics | classify(params, questions), [])
        if not scores or answer is None:
            return Report(metrics, [])
        answers = answer(params, [question.prompt for question in questions])
        references = [question.reference for question in questions]
        found, signatures = score_text(config.metrics, answers, references)
        if "exact_match" in config.metrics:
            found |= _by_kind(questions, answers)
        return Report(metrics | found, signatures)

    return evaluate


def recipe_sampling(bench: Workbench) -> Sampling:
    """Greedy, as many tokens as the recipe says, up to the end of the text or of the turn."""
    special, most = bench.tokenizer.specials, bench.stage.evaluation.max_new_tokens
    return Sampling(max_new_tokens=most, stop=(special.end_of_text, special.end_of_turn))


def make_texts(
    bench: Workbench,
    sampling: Sampling,
    *,
    stops: Sequence[str] = (),
    batch_size: int = 0,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]], int], Iterator[list[TextStream]]]:
    """`texts(params, prompts, first)`: what is generated for each, a batch at a time; see `make_answers`.

    Args:
        stops: texts that end an answer, before them.
        batch_size: 0 takes the recipe's.
    """
    decode = bench.tokenizer.decode
    answers = make_answers(
        bench.model,
        sampling,
        context=bench.recipe.model.context,
        batch_size=batch_size or bench.stage.evaluation.batch_size,
        rows=bench.rows,
        seed=seed,
        between=between,
        done=(lambda tokens: any(stop in decode(tokens) for stop in stops)) if stops else None,
    )

    def spoken(tokens: list[int]) -> TextStream:
        stream = TextStream(decode, stops)
        for piece in [[token] for token in tokens] if stops else [tokens]:
            stream.feed(piece)
        stream.feed([], last=True)
        return stream

    def texts(params: Params, prompts: Sequence[Sequence[int]], first: int) -> Iterator[list[TextStream]]:
        for batch in answers(params, prompts, first):
            yield [spoken(tokens) for tokens in batch]

    return texts


def make_answer(
    bench: Workbench, between: Callable[[], None] = lambda: None
) -> Callable[[Params, Sequence[Sequence[int]]], list[str]]:
    """`answer(params, prompts)`: what the recipe's way of sampling gives for each."""
    texts = make_texts(bench, recipe_sampling(bench), between=between)
    return lambda params, prompts: [found.text for batch in texts(params, prompts, 0) for found in batch]


def make_classify(
    bench: Workbench, between: Callable[[], None] = lambda: None
) -> Callable[[Params, Sequence[Question]], Metrics]:
    """`classify(params, questions)`: accuracy and macro-F1 among all labels that the stage's data has."""
    labels = sorted({q.reference for source in (*bench.train, *bench.held_out) for q in source.questions()})
    ids = [[*tokens.tolist(), bench.tokenizer.specials.end_of_text] for tokens in bench.tokenizer.encode_batch(labels)]
    context, size = bench.recipe.model.context, bench.stage.evaluation.batch_size
    likeliest = make_likeliest(bench.model, ids, context=context, batch_size=size, between=between)

    def classify(params: Params, questions: Sequence[Question]) -> Metrics:
        chosen = likeliest(params, [question.prompt for question in questions])
        return score_labels([labels[i] for i in chosen], [question.reference for question in questions])

    return classify


def _by_kind(questions: Sequence[Question], answers: list[str]) -> Metrics:
    """Exact match of each kind of question, where records name theirs in a field "kind"."""
    hits = defaultdict(list)
    for question, text in zip(questions, answers, strict=True):
        if question.kind:
            hits[question.kind].append(text.strip() == question.reference.strip())
    return {f"exact_match/{kind}": 100.0 * sum(found) / len(found) for kind, found in sorted(hits.items())}


def unigram_perplexity(train: list[Prepared], held_out: list[Prepared]) -> float:
    """Perplexity on the held-out targets of a model that knows only how often each token is a training target (with
    one added to each count): the yardstick that a language model has to beat by far."""
    counts = np.sum([source.target_counts() for source in train], axis=0) + 1.0
    seen = np.sum([source.target_counts() for source in held_out], axis=0)
    return float(np.exp(-np.sum(seen * np.log(counts / counts.sum())) / seen.sum()))
