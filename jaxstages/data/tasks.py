"""Records -> examples: what each task shows the model, and which of its tokens are trained on.

| task              | ids                                                  | trained on          |
| ----------------- | ---------------------------------------------------- | ------------------- |
| lm                | <|endoftext|> text <|endoftext|>                     | all but the first   |
| seq2seq, classify | <|endoftext|> prompt <|sep|> target <|endoftext|>    | target and the end  |
| chat              | see `data/chat.py`                                   | assistant, its end  |
"""

import hashlib
import string
from typing import NamedTuple

import numpy as np

from jaxstages.config import DataConfig
from jaxstages.data.chat import chat_prompt, check_messages, encode_chat
from jaxstages.data.sources import Record
from jaxstages.data.tokenizer import Specials


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
    """examples: pieces that fit the context. question: held-out tasks only. lost: tokens that did not fit."""

    examples: list[Example]
    question: Question | None
    lost: int


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
    match config.task:
        case "lm":
            return render(config.text, record)
        case "seq2seq" | "classify":
            return render(config.prompt, record)
        case "chat":
            return next(m["content"] for m in check_messages(record) if m["role"] == "user")
        case _:
            raise ValueError(f"data.task={config.task!r}; known: lm, seq2seq, classify, chat")


def is_held_out(question: str, share: float) -> bool:
    """A fixed choice of about `share` of all questions, by hash."""
    digest = hashlib.sha256(question.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def texts(record: Record, config: DataConfig) -> list[str]:
    """What has to be tokenized of a record, so that many records can be tokenized at once.

    Raises:
        ValueError: the record does not fit the task.
    """
    match config.task:
        case "lm":
            found = [render(config.text, record)]
        case "seq2seq" | "classify":
            found = [render(config.prompt, record), render(config.target, record)]
        case "chat":
            found = [message["content"] for message in check_messages(record)]
        case _:
            raise ValueError(f"data.task={config.task!r}; known: lm, seq2seq, classify, chat")
    for text in (*found, _kind(record)):
        text.encode()  # JSON can hold half a surrogate pair, which is no text: UnicodeEncodeError is a ValueError
    return found


def _kind(record: Record) -> str:
    """By which the stage matrix groups questions."""
    kind = record.get("kind", "")
    if isinstance(kind, dict | list):
        raise ValueError(f'field "kind" is a {type(kind).__name__}; it must be text')
    return str(kind)


def assemble(
    record: Record, found: list[str], ids: list[np.ndarray], task: str, special: Specials, context: int
) -> Encoded:
    """A record's `texts` and their ids as examples of at most `context` + 1 ids (that many fill `context` slots).

    Text is cut into pieces that overlap by one token, so that each token is predicted once. A pair that does not fit
    is left out; a chat is cut after the last whole answer that fits.
    """
    most = context + 1
    if task == "lm":
        document = np.concatenate([[special.end_of_text], ids[0], [special.end_of_text]]).astype(np.int32)
        pieces = [document[start : start + most] for start in range(0, len(document) - 1, context)]
        return Encoded([Example(piece, _scored_after(1, len(piece))) for piece in pieces], None, 0)
    if task == "chat":
        return _assemble_chat(record, ids, special, most)
    start = pair_prompt(ids[0], special)
    pair = np.concatenate([start, ids[1], [special.end_of_text]]).astype(np.int32)
    question = Question(start, found[1], _kind(record))
    if len(pair) > most:
        return Encoded([], question, len(pair))
    return Encoded([Example(pair, _scored_after(len(start), len(pair)))], question, 0)


def pair_prompt(prompt: np.ndarray, special: Specials) -> list[int]:
    """Ids of what is given, up to where the target has to come."""
    return [special.end_of_text, *prompt.tolist(), special.separator]


def _scored_after(start: int, length: int) -> np.ndarray:
    return (np.arange(length) >= start).astype(np.float32)


def _assemble_chat(record: Record, contents: list[np.ndarray], special: Specials, most: int) -> Encoded:
    messages = record["messages"]
    ids, weights = encode_chat(messages, contents, special)
    ends = np.cumsum([len(turn) for turn in ids])
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    last = answers[-1]
    question = Question(chat_prompt(ids[:last], special), messages[last]["content"], _kind(record))
    fitting = [n for n in answers if ends[n] <= most]
    if not fitting:
        return Encoded([], question, int(ends[-1]))
    kept = fitting[-1] + 1
    example = Example(np.concatenate(ids[:kept]), np.concatenate(weights[:kept]))
    return Encoded([example], question, int(ends[last] - ends[kept - 1]))
