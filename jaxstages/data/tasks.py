"""Records -> examples: what each task shows the model, and which of its tokens are trained on.

| task              | ids                                                  | trained on          |
| ----------------- | ---------------------------------------------------- | ------------------- |
| lm                | <|endoftext|> text <|endoftext|>                     | all but the first   |
| seq2seq, classify | <|endoftext|> prompt <|sep|> target <|endoftext|>    | target and the end  |
| chat              | see `data/chat.py`                                   | assistant, its end  |

A tokenizer with a chat template of its own begins with its `begin` (it may be nothing), and ends with its eos.
"""

import hashlib
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstages.config import DataConfig
from jaxstages.data.chat import (
    Chat,
    Draft,
    Written,
    check_messages,
    make_chat,
    only_trained,
    tools_of,
    trained_turns,
    unread_keys,
)
from jaxstages.data.sources import Record
from jaxstages.data.tokenizer import SEPARATOR, Tokenizer


class Example(NamedTuple):
    """ids int32 [n], weights float32 [n]: how much predicting ids[i] counts; weights[0] is 0, nothing predicts it."""

    ids: np.ndarray
    weights: np.ndarray


class Question(NamedTuple):
    """What is generated from, or scored by label: prompt ids, the right answer, the record's "kind" or ""."""

    prompt: list[int]
    reference: str
    kind: str


class Encoded(NamedTuple):
    """examples: pieces that fit the context. question: held-out tasks only. lost: tokens that did not fit. unread: keys
    of messages that nothing reads."""

    examples: list[Example]
    question: Question | None
    lost: int
    unread: Sequence[str] = ()


def render(template: str, record: Record) -> str:
    """Fill a format string from a record's fields; a template without braces is a field's name.

    | template          | record                     | result   |
    | `{en} => {fr}`    | {"en": "dog", "fr": "chien"} | dog => chien |
    | `en`              |                            | dog      |

    Raises:
        ValueError: the record lacks a field, or it is neither text nor a number.
    """
    if "{" not in template:
        template = f"{{{template}}}"
    parts = []
    # Not str.format: a field such as {text.__class__} has no business here.
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        value = record.get(name)
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"field {name!r} is missing or no text; it has {', '.join(map(repr, record)) or 'none'}")
        parts.append(str(value))
    text = "".join(parts)
    if not text.strip():
        raise ValueError(f"{template} is empty")
    return text


def asks(record: Record, config: DataConfig) -> str:
    """What a record asks, by which it is held out: two records that ask the same never fall on two sides.

    Raises:
        ValueError: the record does not fit the task.
    """
    if config.task == "chat":
        return next(m["content"] for m in check_messages(record, tools=True) if m["role"] == "user")
    return render(config.text if config.task == "lm" else config.prompt, record)


def is_held_out(question: str, share: float) -> bool:
    """A fixed choice of about `share` of all questions, by hash."""
    digest = hashlib.sha256(question.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def texts(record: Record, config: DataConfig) -> list[str]:
    """The text of a record, as it stands there: what a tokenizer learns from.

    Raises:
        ValueError: the record does not fit the task.
    """
    if config.task == "chat":
        found = [message["content"] or "" for message in check_messages(record, tools=True)]
    else:
        found = [render(t, record) for t in ((config.text,) if config.task == "lm" else (config.prompt, config.target))]
    _check_text(*found, _kind(record))
    return found


def _check_text(*found: str) -> None:
    "".join(found).encode()  # JSON can hold half a surrogate pair, which is no text: UnicodeEncodeError is a ValueError


def _kind(record: Record) -> str:
    """By which the stage matrix groups questions."""
    kind = record.get("kind", "")
    if isinstance(kind, dict | list):
        raise ValueError(f'field "kind" is a {type(kind).__name__}; it must be text')
    return str(kind)


class Task(NamedTuple):
    """What becomes of records. draft: all of it but the tokens; raises ValueError for a record that does not fit.
    finish: tokenizes many drafts at once, over all cores."""

    draft: Callable[[Record], Any]
    finish: Callable[[Sequence[Any]], list[Encoded]]


def make_task(config: DataConfig, tokenizer: Tokenizer, context: int) -> Task:
    """Records as examples of at most `context` + 1 ids (that many fill `context` slots).

    Text is cut into pieces that overlap by one token, so that each token is predicted once. A pair that does not fit
    is left out; a chat is cut after the last whole answer that fits.
    """
    if config.task == "chat":
        return _chat_task(make_chat(tokenizer), tokenizer.template, context + 1)
    end = tokenizer.specials.end_of_text

    def draft(record: Record) -> tuple[list[str], str]:
        return texts(record, config), _kind(record)

    def finish(drafts: Sequence[tuple[list[str], str]]) -> list[Encoded]:
        ids = iter(tokenizer.encode_batch([text for found, _ in drafts for text in found]))
        return [encode(found, [next(ids) for _ in found], kind) for found, kind in drafts]

    def encode(found: list[str], ids: list[np.ndarray], kind: str) -> Encoded:
        if config.task == "lm":
            document = np.concatenate([tokenizer.begin, ids[0], [end]]).astype(np.int32)
            pieces = [document[start : start + context + 1] for start in range(0, len(document) - 1, context)]
            return Encoded([Example(piece, _scored_after(1, len(piece))) for piece in pieces], None, 0)
        start = pair_prompt(ids[0], tokenizer)
        pair = np.concatenate([start, ids[1], [end]]).astype(np.int32)
        question = Question(start, found[1], kind)
        if len(pair) > context + 1:
            return Encoded([], question, len(pair))
        return Encoded([Example(pair, _scored_after(len(start), len(pair)))], question, 0)

    return Task(draft, finish)


def pair_prompt(prompt: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """Ids of what is given, up to where the target has to come."""
    if tokenizer.specials.separator < 0:
        raise ValueError(
            f"this run's tokenizer has no {SEPARATOR}, which pairs need: it was taken over when no stage had any; take "
            "another --workdir"
        )
    return [*tokenizer.begin, *prompt.tolist(), tokenizer.specials.separator]


def _scored_after(start: int, length: int) -> np.ndarray:
    return (np.arange(length) >= start).astype(np.float32)


class _Conversation(NamedTuple):
    """A chat before it is tokenized. trained: for each answer, whether it is trained on."""

    draft: Draft
    kind: str
    trained: list[bool]
    unread: list[str]


def _chat_task(chat: Chat, template: str, most: int) -> Task:
    def draft(record: Record) -> _Conversation:
        every = check_messages(record, chat.uses_tools)
        messages, trained = trained_turns(every)
        drafted, kind = chat.draft(messages, tools_of(record) if chat.uses_tools else None), _kind(record)
        _check_text(*drafted.texts, kind)
        return _Conversation(drafted, kind, trained, sorted(unread_keys(every, template)))

    def finish(drafts: Sequence[_Conversation]) -> list[Encoded]:
        written = chat.finish([conversation.draft for conversation in drafts])
        return [encode(*pair) for pair in zip(drafts, written, strict=True)]

    def encode(conversation: _Conversation, written: list[Written]) -> Encoded:
        prompt = written[-1].ids[: written[-1].answers[-1][0]].tolist()
        examples, lost = [], 0
        for one in only_trained(written, conversation.trained):
            kept = max((stop for _, stop in one.answers if stop <= most), default=0)
            lost += one.answers[-1][1] - kept
            examples += [Example(one.ids[:kept], one.weights[:kept])] if kept else []
        question = Question(prompt, conversation.draft.reference, conversation.kind)
        return Encoded(examples, question, lost, conversation.unread)

    return Task(draft, finish)
