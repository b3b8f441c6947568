"""Records -> examples: what each task shows the model, and which of its tokens are trained on.

| task              | ids                                                  | trained on          |
| ----------------- | ---------------------------------------------------- | ------------------- |
| lm                | <|endoftext|> text <|endoftext|>                     | all but the first   |
| seq2seq, classify | <|endoftext|> prompt <|sep|> target <|endoftext|>    | target and the end  |
| chat              | see `data/chat.py`                                   | assistant, its end  |

A tokenizer with a chat template of its own begins with its `begin` (it may be nothing), and ends with its eos.
"""

import hashlib
import json
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstages.config import DataConfig
from jaxstages.data.chat import Chat, Chatted, Draft, make_chat, only_trained
from jaxstages.data.conversation import Conversation, read_conversation, unread_keys
from jaxstages.data.sources import Record
from jaxstages.data.tokenizer import Tokenizer, needed_tokens


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
    | `translation.en`  | {"translation": {"en": "dog"}} | dog  |
    | `spam`            | {"spam": true}             | true     |

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
        value = _field(record, name)
        if not isinstance(value, str | int | float):
            raise ValueError(f"field {name!r} is missing or no text; it has {', '.join(map(repr, record)) or 'none'}")
        parts.append(json.dumps(value) if isinstance(value, bool) else str(value))
    text = "".join(parts)
    if not text.strip():
        raise ValueError(f"{template} is empty")
    return text


def _field(record: Record, name: str) -> Any:
    """A field of a record; dots lead into records within it."""
    value: Any = record
    for part in [name] if name in record else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def asks(record: Record, config: DataConfig) -> str:
    """What a record asks, by which it is held out: two records that ask the same never fall on two sides.

    Raises:
        ValueError: the record does not fit the task.
    """
    if config.task == "chat":
        messages = read_conversation(record).messages
        return next((message["content"] for message in messages if message["role"] == "user"), json.dumps(messages))
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
        found = [message.get("content", "") for message in read_conversation(record, config.answers).messages]
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
    check_tokens(tokenizer, config.task)
    if config.task == "chat":
        return _chat_task(make_chat(tokenizer), tokenizer, context + 1, config.answers)
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
        question = Question(start, tokenizer.decode(ids[1]), kind)
        if len(pair) > context + 1:
            return Encoded([], question, len(pair))
        return Encoded([Example(pair, _scored_after(len(start), len(pair)))], question, 0)

    return Task(draft, finish)


def pair_prompt(prompt: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """Ids of what is given, up to where the target has to come."""
    check_tokens(tokenizer, "seq2seq")
    return [*tokenizer.begin, *prompt.tolist(), tokenizer.specials.separator]


def check_tokens(tokenizer: Tokenizer, task: str) -> None:
    """Raises ValueError where the tokenizer lacks a control token that the task needs."""
    needed = needed_tokens([task], template=bool(tokenizer.template))
    missing = [token for token in needed if tokenizer.backend.token_to_id(token) is None]
    if missing:
        raise ValueError(
            f"this run's tokenizer has no {' '.join(missing)}, which {task} needs: it was taken over when no stage "
            "did; take another --workdir"
        )


def _scored_after(start: int, length: int) -> np.ndarray:
    return (np.arange(length) >= start).astype(np.float32)


class _Drafted(NamedTuple):
    """A chat before it is tokenized."""

    conversation: Conversation
    draft: Draft
    kind: str


def _chat_task(chat: Chat, tokenizer: Tokenizer, most: int, answers: str) -> Task:
    template = tokenizer.template + tokenizer.tool_template

    def draft(record: Record) -> _Drafted:
        conversation, kind = read_conversation(record, answers), _kind(record)
        drafted = chat.draft(conversation.messages, conversation.tools)
        _check_text(*drafted.texts, kind)
        return _Drafted(conversation, drafted, kind)

    def finish(drafts: Sequence[_Drafted]) -> list[Encoded]:
        chats = chat.finish([drafted.draft for drafted in drafts])
        return [encode(*pair) for pair in zip(drafts, chats, strict=True)]

    def encode(drafted: _Drafted, chatted: Chatted) -> Encoded:
        examples, lost = [], 0
        for written in only_trained(chatted.examples, drafted.conversation.trained):
            kept = max((stop for _, stop in written.answers if stop <= most), default=0)
            lost += written.answers[-1][1] - kept
            examples += [Example(written.ids[:kept], written.weights[:kept])] if kept else []
        question = Question(chatted.prompt, chatted.reference, drafted.kind)
        return Encoded(examples, question, lost, unread_keys(drafted.conversation, template))

    return Task(draft, finish)
