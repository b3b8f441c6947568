"""Evaluation on held-out data: the loss over packed rows, and the task's own metrics from generated answers."""

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
from jaxstages.generation.decode import make_answers
from jaxstages.generation.eval_step import make_eval_step
from jaxstages.generation.label_scores import make_likeliest
from jaxstages.generation.metrics import from_sums, score_labels, score_text
from jaxstages.generation.sampling import Sampling
from jaxstages.generation.text_stream import TextStream
from jaxstages.models.sharding import local_row_range, place_batch
from jaxstages.types import LossFn, Metrics, Model, Params, Report, Sample, Sums

SAMPLES, SAMPLE_CHARACTERS = 3, 2000
"""Answers of each held-out set in a `Report`, and their largest length."""


class TextModel(NamedTuple):
    """A model with its tokenizer, context length, and the sharding of its batches."""

    model: Model
    tokenizer: Tokenizer
    context: int
    row_sharding: NamedSharding
    loss: LossFn | None = None
    """Of the stage, if it has a loss of its own; else held-out data are measured by cross-entropy."""


Evaluate = Callable[[Params, bool], Report]


def make_evaluate(
    text_model: TextModel,
    sets: Sequence[EvaluationSet],
    config: EvaluationConfig,
    loss_tile: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluate:
    """Make `evaluate(params, scores)`: the loss over held-out rows and, with `scores`, the recipe's metrics of answers
    to held-out questions, on any number of devices and hosts.

    If a set has several sources, the loss of each is `loss/SOURCE`. Watched stages are always scored.

    Args:
        sets: held-out sets, each with its own metrics and limits.
        config: the stage's own settings, for `batch_size`.
        loss_tile: see `LoopConfig`.
        before_batch: called before each batch; an exception in it ends the evaluation.
    """
    token_bytes_V = jnp.asarray(text_model.tokenizer.token_bytes())
    row_sums = make_eval_step(text_model.model.outputs, token_bytes_V, loss_tile, text_model.loss)
    eval_step = jax.jit(lambda params, batch: sum_rows(row_sums(params, batch)))

    @functools.cache  # sets with answers of the same length share compiled functions
    def answer_with(max_new_tokens: int) -> Callable[[Params, Sequence[Sequence[int]]], list[str]]:
        return make_answer(text_model, max_new_tokens, config.batch_size, before_batch=before_batch)

    scorers = [make_scorer(text_model, each, config.batch_size, answer_with, before_batch) for each in sets]
    size, sharding = config.batch_size, text_model.row_sharding

    def loss_sums(params: Params, each: EvaluationSet) -> list[tuple[str, Sums]]:
        """Return name and sums of each source that has rows in the subsample."""
        all_rows = [(number, row) for number, source in enumerate(each.held_out) for row in range(source.index["rows"])]
        sample = subsample_evenly(all_rows, each.config.max_rows)

        totals: list[tuple[str, Sums]] = []
        for number, source in enumerate(each.held_out):
            rows = [row for owner, row in sample if owner == number]
            total: Sums = {}
            for batch in batches_once(source, rows, batch_size=size, local_rows=local_row_range(size, sharding)):
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
        samples: list[Sample] = []
        for each, scorer in zip(sets, scorers, strict=True):
            totals = [(name, jax.device_get(total)) for name, total in loss_sums(params, each)]
            values = from_sums(jax.tree.map(lambda *parts: sum(parts), *(total for _, total in totals)))
            if len(totals) > 1:
                values |= {f"loss/{name}": from_sums(total)["loss"] for name, total in totals}
            if scorer is not None and (scores or each.is_watched):
                scored = scorer(params)
                values |= scored.metrics
                signatures += [text for text in scored.signatures if text not in signatures]
                samples += () if each.is_watched else scored.samples
            metrics |= {f"{each.prefix}{name}": value for name, value in values.items()}
        return Report(metrics, signatures, samples)

    return evaluate


def sum_rows(rows: Sums) -> Sums:
    """Add up the sums of each row [B].

    For the standard errors of `from_sums`, the result also has the number of "rows", and the sums of the products
    "nll*nll", "nll*weight", ... of the rows' sums.
    """
    sums = {name: jnp.sum(values) for name, values in rows.items()}
    sums["rows"] = jnp.sum(rows["weight"] > 0).astype(jnp.float32)
    pairs = [(name, other) for name in ("nll", "correct") if name in rows for other in (name, "weight")] + [
        ("weight", "weight")
    ]
    return sums | {f"{name}*{other}": jnp.sum(rows[name] * rows[other]) for name, other in pairs}


def make_scorer(
    text_model: TextModel,
    each: EvaluationSet,
    batch_size: int,
    answer_with: Callable[[int], Callable[[Params, Sequence[Sequence[int]]], list[str]]],
    before_batch: Callable[[], None],
) -> Callable[[Params], Report] | None:
    """Make `scorer(params)`: the metrics of a set from answers to its held-out questions, with a few of the answers.

    Returns None if the recipe has no metrics.

    Args:
        answer_with: `answer_with(max_new_tokens)` returns a function that answers prompts.

    Raises:
        ValueError: there are metrics, and the set has no questions.
    """
    if not each.config.metrics:
        return None
    questions = held_out_questions(each.held_out, each.config.max_examples)
    if not questions:
        raise ValueError(
            f"{each.prefix}evaluation.metrics needs answers, and the held-out records have no questions; return "
            "Encoded(question=...) in a task of your own, or leave the metrics out"
        )
    references = [question.reference for question in questions]
    prompts = [question.prompt for question in questions]

    def samples_of(answers: Sequence[str]) -> list[Sample]:
        numbers = subsample_evenly(range(len(questions)), SAMPLES)
        texts = [(text_model.tokenizer.show(prompts[i]), answers[i], references[i]) for i in numbers]
        return [Sample(each.prefix.strip("/"), *(text[:SAMPLE_CHARACTERS] for text in triple)) for triple in texts]

    if each.task == "classify":
        labels = labels_of([*each.train, *each.held_out])
        classify = make_classify(text_model, labels, batch_size, before_batch)
        own = [metric for metric in each.config.metrics if not isinstance(metric, str)]

        def score_classes(params: Params) -> Report:
            predictions = classify(params, prompts)
            metrics = score_labels(predictions, references) | score_text(own, predictions, references)[0]
            return Report(metrics, [], samples_of(predictions))

        return score_classes
    answer = answer_with(each.config.max_new_tokens)

    def scorer(params: Params) -> Report:
        answers = answer(params, prompts)
        metrics, signatures = score_text(each.config.metrics, answers, references)
        if "exact_match" in each.config.metrics:
            metrics |= _by_kind(questions, answers)
        return Report(metrics, signatures, samples_of(answers))

    return scorer


def held_out_questions(held_out: Sequence[Prepared], limit: int) -> Sequence[Question]:
    """Return the questions that a held-out set is scored on, evenly spaced; all of them if `limit` is 0."""
    return subsample_evenly([question for source in held_out for question in source.questions()], limit)


def labels_of(sources: Sequence[Prepared]) -> list[str]:
    """List the labels of a task `classify`, which are those of its training and held-out records."""
    return sorted({question.reference for source in sources for question in source.questions()})


def make_texts(
    text_model: TextModel,
    sampling: Sampling,
    batch_size: int,
    *,
    stops: Sequence[str] = (),
    seed: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]], int], Iterator[list[TextStream]]]:
    """Make `texts(params, prompts, first)`: yields the generated texts, a batch at a time; see `make_answers`.

    Args:
        stops: stop strings, before which an answer ends.
    """
    decode = text_model.tokenizer.decode
    answers = make_answers(
        text_model.model,
        sampling,
        context=text_model.context,
        batch_size=batch_size,
        rows=text_model.row_sharding,
        seed=seed,
        before_batch=before_batch,
        is_done=(lambda tokens: any(stop in decode(tokens) for stop in stops)) if stops else None,
    )

    def to_text(tokens: list[int]) -> TextStream:
        stream = TextStream(decode, stops)
        for new_tokens in [[token] for token in tokens] if stops else [tokens]:
            stream.feed(new_tokens)
        stream.feed([], last=True)
        return stream

    def texts(params: Params, prompts: Sequence[Sequence[int]], first: int) -> Iterator[list[TextStream]]:
        for batch in answers(params, prompts, first):
            yield [to_text(tokens) for tokens in batch]

    return texts


def make_answer(
    text_model: TextModel,
    max_new_tokens: int,
    batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]]], list[str]]:
    """Make `answer(params, prompts)`: the greedy answer to each prompt, up to the end of the text or of the turn."""
    sampling = Sampling(max_new_tokens=max_new_tokens, stop=text_model.tokenizer.stops)
    texts = make_texts(text_model, sampling, batch_size, before_batch=before_batch)
    return lambda params, prompts: [stream.text for batch in texts(params, prompts, 0) for stream in batch]


def make_classify(
    text_model: TextModel,
    labels: Sequence[str],
    batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]]], list[str]]:
    """Make `classify(params, prompts)`: the likeliest of the labels for each prompt."""
    tokenizer = text_model.tokenizer
    ids = [[*tokens.tolist(), tokenizer.specials.end_of_text] for tokens in tokenizer.encode_batch([*labels])]
    likeliest = make_likeliest(
        text_model.model, ids, context=text_model.context, batch_size=batch_size, before_batch=before_batch
    )
    return lambda params, prompts: [labels[i] for i in likeliest(params, prompts)]


def _by_kind(questions: Sequence[Question], answers: list[str]) -> Metrics:
    """Exact match for each kind of question, if records have a field "kind"."""
    hits = defaultdict(list)
    for question, text in zip(questions, answers, strict=True):
        if question.kind:
            hits[question.kind].append(text.strip() == question.reference.strip())
    return {f"exact_match/{kind}": 100.0 * sum(of_kind) / len(of_kind) for kind, of_kind in sorted(hits.items())}


def unigram_perplexity(train: list[Prepared], held_out: list[Prepared]) -> float:
    """Compute the held-out perplexity of a unigram model of the training targets, with add-one smoothing: the baseline
    that a language model has to beat by far."""
    train_counts = np.sum([source.target_counts() for source in train], axis=0) + 1.0
    held_out_counts = np.sum([source.target_counts() for source in held_out], axis=0)
    log_probs = np.log(train_counts / train_counts.sum())
    return float(np.exp(-np.sum(held_out_counts * log_probs) / held_out_counts.sum()))
