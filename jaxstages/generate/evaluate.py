"""Held-out scores of parameters: the loss over packed rows, and the task's own metrics from generated answers."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxstages.config import EvaluationConfig
from jaxstages.data.batches import batches_once
from jaxstages.data.prepare import Prepared, subsample_evenly
from jaxstages.data.stage_data import EvaluationSet
from jaxstages.data.tasks import Question
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.generate.decode import make_answers
from jaxstages.generate.eval_step import make_eval_step
from jaxstages.generate.label_scores import make_likeliest
from jaxstages.generate.metrics import from_sums, score_labels, score_text
from jaxstages.generate.sampling import Sampling
from jaxstages.generate.text_stream import TextStream
from jaxstages.models.sharding import place_batch, rows_here
from jaxstages.types import Metrics, Model, Params, Report, Sums


class TextModel(NamedTuple):
    """A model with its tokenizer, the longest row that it takes, and the sharding of its batches."""

    model: Model
    tokenizer: Tokenizer
    context: int
    row_sharding: NamedSharding


Evaluate = Callable[[Params, bool], Report]


def make_evaluate(
    text_model: TextModel,
    sets: Sequence[EvaluationSet],
    config: EvaluationConfig,
    loss_tile: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluate:
    """`evaluate(params, scores)`: the loss over held-out rows and, with `scores`, the recipe's metrics of answers to
    held-out questions, on any number of devices and hosts.

    Where the stage's own held-out data have several sources, the loss of each is `loss/SOURCE`. A watched stage is
    always scored.

    Args:
        sets: the held-out sets, each with its own metrics and limits.
        config: the stage's own, for `batch_size`.
        loss_tile: see `LoopConfig`.
        before_batch: called before each batch; what it raises ends the evaluation.
    """
    token_bytes_V = jnp.asarray(text_model.tokenizer.token_bytes())
    row_sums = make_eval_step(text_model.model.outputs, token_bytes_V, loss_tile)
    eval_step = jax.jit(lambda params, batch: with_spread(row_sums(params, batch)))

    @functools.cache  # sets with answers of the same length share what is compiled
    def answer_with(max_new_tokens: int) -> Callable[[Params, Sequence[Sequence[int]]], list[str]]:
        return make_answer(text_model, max_new_tokens, config.batch_size, before_batch=before_batch)

    scorers = [make_scorer(text_model, each, config.batch_size, answer_with, before_batch) for each in sets]
    size, sharding = config.batch_size, text_model.row_sharding

    def loss_sums(params: Params, each: EvaluationSet) -> list[tuple[str, Sums]]:
        """Name and sums of each source that has rows among those measured."""
        sources = [range(source.index["rows"]) for source in each.held_out]
        rows = subsample_evenly(
            [(number, row) for number, source in enumerate(sources) for row in source], each.config.max_rows
        )
        totals: list[tuple[str, Sums]] = []
        for number, source in enumerate(each.held_out):
            chosen = [row for owner, row in rows if owner == number]
            total: Sums = {}
            for batch in batches_once(source, chosen, batch_size=size, local_rows=rows_here(size, sharding)):
                before_batch()
                sums = eval_step(params, place_batch(batch, size, sharding))
                # Sums stay on the device, so that no batch waits for the one before.
                total = sums if not total else jax.tree.map(jnp.add, total, sums)
            if total:
                totals.append((source.index["source"], total))
        return totals

    def evaluate(params: Params, scores: bool) -> Report:
        metrics: Metrics = {}
        signatures: list[str] = []
        for each, scorer in zip(sets, scorers, strict=True):
            totals = [(name, jax.device_get(total)) for name, total in loss_sums(params, each)]
            values = from_sums(jax.tree.map(lambda *parts: sum(parts), *(total for _, total in totals)))
            if len(totals) > 1:
                values |= {f"loss/{name}": from_sums(total)["loss"] for name, total in totals}
            if scorer is not None and (scores or each.is_watched):
                scored, signed = scorer(params)
                values |= scored
                signatures += [text for text in signed if text not in signatures]
            metrics |= {f"{each.prefix}{name}": value for name, value in values.items()}
        return Report(metrics, signatures)

    return evaluate


def with_spread(rows: Sums) -> Sums:
    """Sums of each row [B] as sums over the batch, and beside them what the standard errors of `from_sums` are made
    from: "rows", and the sums of products "nll*nll", "nll*weight", ... of the rows' own sums."""
    sums = {name: jnp.sum(values) for name, values in rows.items()}
    sums["rows"] = jnp.sum(rows["weight"] > 0).astype(jnp.float32)
    pairs = [(name, other) for name in ("nll", "correct") for other in (name, "weight")] + [("weight", "weight")]
    return sums | {f"{name}*{other}": jnp.sum(rows[name] * rows[other]) for name, other in pairs}


def make_scorer(
    text_model: TextModel,
    each: EvaluationSet,
    batch_size: int,
    answer_with: Callable[[int], Callable[[Params, Sequence[Sequence[int]]], list[str]]],
    before_batch: Callable[[], None],
) -> Callable[[Params], tuple[Metrics, list[str]]] | None:
    """`scorer(params)`: the metrics of a set from answers to its held-out questions, and sacreBLEU's signatures; None
    where the recipe has no metrics, or the set no questions.

    Args:
        answer_with: `answer_with(max_new_tokens)`, what answers prompts with at most so many tokens.
    """
    questions = subsample_evenly([q for source in each.held_out for q in source.questions()], each.config.max_examples)
    if not each.config.metrics or not questions:
        return None
    references = [question.reference for question in questions]
    prompts = [question.prompt for question in questions]
    if each.task == "classify":
        labels = sorted({q.reference for source in (*each.train, *each.held_out) for q in source.questions()})
        classify = make_classify(text_model, labels, batch_size, before_batch)
        own = [metric for metric in each.config.metrics if not isinstance(metric, str)]

        def score_classes(params: Params) -> tuple[Metrics, list[str]]:
            predictions = classify(params, prompts)
            return score_labels(predictions, references) | score_text(own, predictions, references)[0], []

        return score_classes
    answer = answer_with(each.config.max_new_tokens)

    def scorer(params: Params) -> tuple[Metrics, list[str]]:
        answers = answer(params, prompts)
        metrics, signatures = score_text(each.config.metrics, answers, references)
        if "exact_match" in each.config.metrics:
            metrics |= _by_kind(questions, answers)
        return metrics, signatures

    return scorer


def make_texts(
    text_model: TextModel,
    sampling: Sampling,
    batch_size: int,
    *,
    stops: Sequence[str] = (),
    seed: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]], int], Iterator[list[TextStream]]]:
    """`texts(params, prompts, first)`: what is generated for each, a batch at a time; see `make_answers`.

    Args:
        stops: texts that end an answer, before them.
    """
    decode = text_model.tokenizer.decode
    answers = make_answers(
        text_model.model,
        sampling,
        context=text_model.context,
        batch_size=batch_size,
        rows=text_model.row_sharding,
        seed=seed,
        between=before_batch,
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
    text_model: TextModel,
    max_new_tokens: int,
    batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]]], list[str]]:
    """`answer(params, prompts)`: the greedy answer to each prompt, up to the end of the text or of the turn."""
    sampling = Sampling(max_new_tokens=max_new_tokens, stop=text_model.tokenizer.stops)
    texts = make_texts(text_model, sampling, batch_size, before_batch=before_batch)
    return lambda params, prompts: [stream.text for batch in texts(params, prompts, 0) for stream in batch]


def make_classify(
    text_model: TextModel,
    labels: Sequence[str],
    batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]]], list[str]]:
    """`classify(params, prompts)`: the likeliest of the labels for each."""
    tokenizer = text_model.tokenizer
    ids = [[*tokens.tolist(), tokenizer.specials.end_of_text] for tokens in tokenizer.encode_batch([*labels])]
    likeliest = make_likeliest(
        text_model.model, ids, context=text_model.context, batch_size=batch_size, between=before_batch
    )
    return lambda params, prompts: [labels[i] for i in likeliest(params, prompts)]


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
