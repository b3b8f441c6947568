"""Records -> examples: the token ids of each task, and which of them are trained on.

| task              | ids                                                  | trained on          |
| ----------------- | ---------------------------------------------------- | ------------------- |
| lm                | <|endoftext|> text <|endoftext|>                     | all but the first   |
| seq2seq, classify | <|endoftext|> prompt <|sep|> target <|endoftext|>    | target and the end  |
| chat              | see `data/chat.py`                                   | assistant, its end  |

With a tokenizer that has its own chat template, examples begin with its `begin` (possibly nothing) and end with its
eos.
"""

import hashlib
import json
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstages.config import DataConfig
from jaxstages.data.chat import Chat, Draft, EncodedChat, keep_trained_answers, make_chat
from jaxstages.data.conversation import Conversation, read_conversation, unread_keys
from jaxstages.data.sources import Record
from jaxstages.data.tokenizer import Tokenizer, needed_tokens


class Example(NamedTuple):
    """ids int32 [n], and loss weights float32 [n]: weights[i] weighs the prediction of ids[i]. weights[0] is 0, since
    nothing predicts the first token."""

    ids: np.ndarray
    weights: np.ndarray


class Question(NamedTuple):
    """A held-out question, answered by generation or by scoring labels.

    prompt: token ids.
    reference: the right answer.
    kind: the record's field "kind", or "". The stage matrix groups questions by it.
    """

    prompt: list[int]
    reference: str
    kind: str


class Encoded(NamedTuple):
    """The examples of one record.

    examples: token ids with weights, each of which fits the context.
    question: the held-out question, except for the task lm.
    lost_tokens: number of tokens that did not fit the context.
    unread_keys: keys of messages that nothing reads.
    """

    examples: list[Example]
    question: Question | None
    lost_tokens: int
    unread_keys: Sequence[str] = ()


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
    # Not str.format, which would evaluate {text.__class__}.
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
    """Look up a field of a record; dots lead into nested records."""
    value: Any = record
    for part in [name] if name in record else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def holdout_key(record: Record, config: DataConfig) -> str:
    """Return the text by which a record is held out. Records with the same question are never split.

    Raises:
        ValueError: the record does not fit the task.
    """
    if config.own is not None:
        return config.own.texts(record)[0]
    if config.task == "chat":
        messages = read_conversation(record).messages
        return next((message["content"] for message in messages if message["role"] == "user"), json.dumps(messages))
    return render(config.text if config.task == "lm" else config.prompt, record)


def is_held_out(key: str, share: float) -> bool:
    """Choose about `share` of all keys by their hash, always the same ones."""
    digest = hashlib.sha256(key.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def texts(record: Record, config: DataConfig) -> list[str]:
    """Return the texts of a record as they stand there, for tokenizer training and length limits.

    Raises:
        ValueError: the record does not fit the task.
    """
    if config.own is not None:
        fields = list(config.own.texts(record))
    elif config.task == "chat":
        fields = [message.get("content", "") for message in read_conversation(record, config.answers).messages]
    else:
        templates = (config.text,) if config.task == "lm" else (config.prompt, config.target)
        fields = [render(template, record) for template in templates]
    _check_encodable(*fields, _kind(record))
    return fields


def _check_encodable(*parts: str) -> None:
    """Raises UnicodeEncodeError, a ValueError, for half a surrogate pair, which JSON can hold."""
    "".join(parts).encode()


def _kind(record: Record) -> str:
    kind = record.get("kind", "")
    if isinstance(kind, dict | list):
        raise ValueError(f'field "kind" is a {type(kind).__name__}; it must be text')
    return str(kind)


class Task(NamedTuple):
    """How records become examples.

    draft: everything but tokenization; raises ValueError for a record that does not fit the task.
    finish: tokenizes many drafts at once, on all cores.
    """

    draft: Callable[[Record], Any]
    finish: Callable[[Sequence[Any]], list[Encoded]]


def make_task(config: DataConfig, tokenizer: Tokenizer, context: int) -> Task:
    """Make the task of a data set; its examples have at most `context` + 1 ids, which fill `context` slots.

    Text is cut into pieces that overlap by one token, so that each token is predicted once. A pair that does not fit
    is left out. A chat is cut after the last whole answer that fits.
    """
    check_tokens(tokenizer, config.task)
    if config.own is not None:
        encode_record = config.own.make(tokenizer, context)
        return Task(lambda record: _checked(encode_record(record), context), list)
    if config.task == "chat":
        return _chat_task(make_chat(tokenizer), tokenizer, context + 1, config.answers)
    end = tokenizer.specials.end_of_text

    def draft(record: Record) -> tuple[list[str], str]:
        return texts(record, config), _kind(record)

    def finish(drafts: Sequence[tuple[list[str], str]]) -> list[Encoded]:
        ids = iter(tokenizer.encode_batch([text for fields, _ in drafts for text in fields]))
        return [encode([next(ids) for _ in fields], kind) for fields, kind in drafts]

    def encode(ids: list[np.ndarray], kind: str) -> Encoded:
        if config.task == "lm":
            document = np.concatenate([tokenizer.begin, ids[0], [end]]).astype(np.int32)
            pieces = [document[start : start + context + 1] for start in range(0, len(document) - 1, context)]
            return Encoded([Example(piece, _weights_from(1, len(piece))) for piece in pieces], None, 0)

        prompt = pair_prompt(ids[0], tokenizer)
        pair = np.concatenate([prompt, ids[1], [end]]).astype(np.int32)
        question = Question(prompt, tokenizer.decode(ids[1]), kind)
        if len(pair) > context + 1:
            return Encoded([], question, len(pair))
        return Encoded([Example(pair, _weights_from(len(prompt), len(pair)))], question, 0)

    return Task(draft, finish)


def _checked(encoded: Encoded, context: int) -> Encoded:
    """Raises ValueError where an own task returns an example of a wrong form or length."""
    for example in encoded.examples:
        ids, weights = np.asarray(example.ids), np.asarray(example.weights)
        if ids.ndim != 1 or ids.shape != weights.shape or not len(ids) or weights[0]:
            raise ValueError(
                f"an own task returned ids of shape {ids.shape} and weights of shape {weights.shape}; both must be "
                "[n], and weights[0] must be 0, because nothing predicts the first token"
            )
        if not 2 <= len(ids) <= context + 1:
            raise ValueError(f"an own task returned {len(ids)} ids; an example has 2 to {context + 1}, for the context")
    return encoded


def pair_prompt(prompt: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a pair up to where its target begins."""
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


def _weights_from(start: int, length: int) -> np.ndarray:
    """float32 [length]: 0 before `start`, then 1."""
    return (np.arange(length) >= start).astype(np.float32)


class _ChatDraft(NamedTuple):
    """A chat before it is tokenized."""

    conversation: Conversation
    draft: Draft
    kind: str


def _chat_task(chat: Chat, tokenizer: Tokenizer, max_ids: int, answers: str) -> Task:
    template = tokenizer.template + tokenizer.tool_template

    def draft(record: Record) -> _ChatDraft:
        conversation, kind = read_conversation(record, answers), _kind(record)
        chat_draft = chat.draft(conversation.messages, conversation.tools)
        _check_encodable(*chat_draft.texts, kind)
        return _ChatDraft(conversation, chat_draft, kind)

    def finish(drafts: Sequence[_ChatDraft]) -> list[Encoded]:
        chats = chat.finish([each.draft for each in drafts])
        return [encode(*pair) for pair in zip(drafts, chats, strict=True)]

    def encode(draft: _ChatDraft, encoded: EncodedChat) -> Encoded:
        examples, lost_tokens = [], 0
        for example in keep_trained_answers(encoded.examples, draft.conversation.trained):
            length = max((stop for _, stop in example.answers if stop <= max_ids), default=0)
            lost_tokens += example.answers[-1][1] - length
            if length:
                examples.append(Example(example.ids[:length], example.weights[:length]))
        question = Question(encoded.prompt, encoded.reference, draft.kind)
        return Encoded(examples, question, lost_tokens, unread_keys(draft.conversation, template))

    return Task(draft, finish)
