"""Multiple-choice questions: one row for each choice, the question as context, the choice as the scored tokens.

| a record                                       | is read as                                     |
| ---------------------------------------------- | ---------------------------------------------- |
| {"query", "choices", "gold": 1}                | itself; "question" and "answer" are the same   |
| {"question", "choices", "answer": "B"}         | the letter's number                            |
| {"good", "bad"}                                | no question, two choices, the first is right   |
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxstages.data.packing import lay_out
from jaxstages.data.prepare import subsample_evenly
from jaxstages.data.sources import Record, open_source
from jaxstages.data.tasks import Example
from jaxstages.data.tokenizer import Tokenizer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ChoiceQuestion(NamedTuple):
    query: str
    choices: list[str]
    gold: int


class ChoiceSet(NamedTuple):
    """Questions as rows.

    name: prefix of its metrics, the name of its file.
    rows: int32 [N, 5, L], a row for each choice of each question, see `packing.lay_out`.
    lengths: characters of each row's choice.
    counts: choices of each question, whose rows follow each other. golds: the right choice of each.
    """

    name: str
    rows: np.ndarray
    lengths: np.ndarray
    counts: list[int]
    golds: list[int]


def open_choices(source: str, tokenizer: Tokenizer, context: int, limit: int, data_dir: Path) -> ChoiceSet:
    """Read a source of multiple-choice questions.

    Args:
        source: as `DataConfig.train` names one.
        context: slots of a row. Questions that are too long lose their beginning.
        limit: questions, evenly spaced; 0 takes all.
        data_dir: see `open_source`.

    Raises:
        ValueError: a record is no such question, or a choice does not fit the context.
    """
    opened = open_source(source, data_dir)
    questions = []
    for item in opened.read():
        if item.record is None:
            raise ValueError(f"{item.where}: {item.fault}")
        try:
            questions.append(parse_question(item.record))
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from error
    questions = list(subsample_evenly(questions, limit))
    if not questions:
        raise ValueError(f"{source} has no question; leave it out of evaluation.choice")

    examples = [example for question in questions for example in to_examples(question, tokenizer, context, source)]
    return ChoiceSet(
        name=Path(source).name.partition(".")[0],
        rows=np.stack([lay_out([example], context) for example in examples]),
        lengths=np.array([len(choice) for question in questions for choice in question.choices], np.float64),
        counts=[len(question.choices) for question in questions],
        golds=[question.gold for question in questions],
    )


def parse_question(record: Record) -> ChoiceQuestion:
    """Read a record, see the table above. Raises ValueError if it is none of these."""
    if isinstance(record.get("good"), str) and isinstance(record.get("bad"), str):
        return ChoiceQuestion("", [record["good"], record["bad"]], 0)
    query, choices = record.get("query", record.get("question")), record.get("choices")
    if not isinstance(query, str) or not isinstance(choices, list) or len(choices) < 2:
        raise ValueError('a question needs "query" (or "question"), and "choices", a list of two texts or more')
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError('each of "choices" must be a text that is not empty')
    gold: Any = record.get("gold", record.get("answer"))
    if isinstance(gold, str) and len(gold) == 1 and gold in LETTERS:
        gold = LETTERS.index(gold)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f'"gold" (or "answer") is {gold!r}; the number of a choice from 0, or its letter, is wanted')
    return ChoiceQuestion(query, choices, gold)


def to_examples(question: ChoiceQuestion, tokenizer: Tokenizer, context: int, source: str) -> list[Example]:
    """Tokenize a question with each of its choices; the choice's tokens have weight 1.

    As lm-evaluation-harness does: query and choice are joined by a space and tokenized together, and spaces at the end
    of the query count as the choice's.
    """
    query = question.query.rstrip()
    texts = [f"{query} {choice}" if query else choice for choice in question.choices]
    prompt = tokenizer.encode(query).tolist() if query else []
    start = list(tokenizer.begin) or [tokenizer.specials.end_of_text]
    examples = []
    for ids in tokenizer.encode_batch(texts):
        ids = [*start, *ids.tolist()]
        scored = len(ids) - len(start) - len(prompt)
        if not 0 < scored <= context:
            raise ValueError(
                f"{source}: a choice of {scored} tokens does not fit config.model.context={context}; leave the source "
                "out of evaluation.choice"
            )
        ids = ids[-(context + 1) :]
        weights = np.zeros(len(ids), np.float32)
        weights[-scored:] = 1.0
        examples.append(Example(np.asarray(ids, np.int32), weights))
    return examples


def split_by_question(values: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Split the values of the rows, [N], into those of each question."""
    return np.split(values, np.cumsum(counts)[:-1])
