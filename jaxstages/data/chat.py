"""Chats -> token ids, and which of them are trained on: by our template, or by the one of a tokenizer from elsewhere.

Ours is `<|role|> content <|end|>`: control tokens are ids between encoded texts, so nothing that a user writes can
become one. A template of the field writes text: see `data/answers.py`, where the same is seen to. Trained on are the
assistant's words and the token that ends its turn, so that it learns to stop.
"""

import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstages.data.answers import Messages, Span, Tools, make_writer
from jaxstages.data.sources import Record
from jaxstages.data.tokenizer import Specials, Tokenizer, seal

TEMPLATE = "<|endoftext|>(<|role|>content<|end|>)*"
"""Name of our template in a checkpoint's metadata; a stage refuses a parent with another."""

ROLES = ("system", "user", "assistant")

OF_SHAREGPT = {"system": "system", "human": "user", "gpt": "assistant", "function_call": "assistant"}
OF_SHAREGPT |= {"observation": "tool"}
"""Roles of records with "conversations"."""


READ = ("role", "content", "weight", "train", "name", "tool_calls", "tool_call_id")
"""Keys of a message that mean something here."""


class Draft(NamedTuple):
    """A conversation before it is tokenized. texts: of each message, or of each example. answers: their letters in
    each example. reference: what the last answer should be."""

    messages: Messages
    texts: list[str]
    answers: list[list[Span]]
    reference: str


class Written(NamedTuple):
    """ids int32 [n]. answers: the places, first and last + 1, that are trained on; it may be cut after each of them."""

    ids: np.ndarray
    answers: list[Span]

    @property
    def weights(self) -> np.ndarray:
        """float32 [n]."""
        weights = np.zeros(len(self.ids), np.float32)
        for start, end in self.answers:
            weights[start:end] = 1
        return weights


class Chat(NamedTuple):
    """name: of the template, in a checkpoint's metadata. draft: raises ValueError for a conversation that the template
    can't write. finish: the examples of each draft, tokenized together over all cores. prompt: ids up to where the
    assistant has to answer. render: the text of a conversation, or of a prompt, for people."""

    name: str
    draft: Callable[[Messages, Tools], Draft]
    finish: Callable[[Sequence[Draft]], list[list[Written]]]
    prompt: Callable[[Messages, Tools], list[int]]
    render: Callable[[Messages, Tools, bool], str]
    uses_tools: bool

    def encode(self, messages: Messages, tools: Tools = None) -> list[Written]:
        return self.finish([self.draft(messages, tools)])[0]


def make_chat(tokenizer: Tokenizer) -> Chat:
    return _foreign(tokenizer) if tokenizer.template else _ours(tokenizer)


def chat_name(tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.template.encode()).hexdigest()
    return f"jinja:{digest}" if tokenizer.template else TEMPLATE


def check_messages(record: Record, tools: bool = False) -> Messages:
    """The messages of a record.

    Args:
        tools: whether messages may call tools, and be of the role "tool".

    Raises:
        ValueError: what is wrong: no messages, an unknown role, empty content, turns out of order, no answer.
    """
    messages = _of_sharegpt(record["conversations"]) if "conversations" in record else record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('no "messages", a list of {"role", "content"}')
    roles, expected = (*ROLES, "tool") if tools else ROLES, ("user",)
    for place, message in enumerate(messages):
        calls = tools and isinstance(message, dict) and bool(message.get("tool_calls"))
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(message, dict) or not (isinstance(content, str) or (calls and content is None)):
            raise ValueError(f'message {place + 1} is no {{"role", "content"}} with a text')
        role = message.get("role")
        if role not in roles:
            raise ValueError(f"message {place + 1} has role {reprlib.repr(role)}; known: {', '.join(roles)}")
        if not calls and role != "tool" and content is not None and not content.strip():
            raise ValueError(f"message {place + 1} ({role}) is empty")
        if role == "system" and place == 0:
            continue
        if role not in expected:
            raise ValueError(f"message {place + 1} is of {role}, where {expected[0]} has the turn")
        after = {"user": ("assistant",), "tool": ("assistant", "tool"), "assistant": ("tool",) if calls else ("user",)}
        expected = after[message["role"]]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no assistant message to learn from")
    return messages


def is_trained_on(message: dict[str, Any]) -> bool:
    """Is an assistant's message trained on? Not where it says `"weight": 0` (OpenAI's format) or `"train": false`.

    Raises:
        ValueError: another weight than 0 and 1, or both keys.
    """
    flags = [message[key] for key in ("weight", "train") if message.get(key) is not None]
    if len(flags) > 1:
        raise ValueError('a message has both "weight" and "train"; keep one of them')
    if flags and flags[0] not in (0, 1):
        raise ValueError(f'a message\'s "weight" or "train" is {reprlib.repr(flags[0])}; it must be 0 or 1')
    return bool(flags[0]) if flags else True


def trained_turns(messages: Messages) -> tuple[Messages, list[bool]]:
    """The messages up to the last one that is trained on, and for each answer among them whether it is.

    Raises:
        ValueError: none is trained on, or a weight is neither 0 nor 1.
    """
    flags = [message["role"] == "assistant" and is_trained_on(message) for message in messages]
    if not any(flags):
        raise ValueError('no assistant message is trained on: each has "weight": 0; leave the record out')
    last = max(place for place, flag in enumerate(flags) if flag)
    kept = [{key: value for key, value in m.items() if key not in ("weight", "train")} for m in messages[: last + 1]]
    answers = [flag for message, flag in zip(kept, flags, strict=False) if message["role"] == "assistant"]
    return kept, answers


def only_trained(written: Sequence[Written], trained: Sequence[bool]) -> list[Written]:
    """The examples of a conversation with the answers that are trained on; without those that have none.

    Args:
        trained: for each answer of all examples, in order.
    """
    flags = iter(trained)
    chosen = [one._replace(answers=[span for span in one.answers if next(flags)]) for one in written]
    return [one for one in chosen if one.answers]


def unread_keys(messages: Messages, template: str) -> set[str]:
    """Keys of messages that neither this project nor the tokenizer's chat template reads."""
    return {key for message in messages for key in message if key not in READ and key not in template}


def tools_of(record: Record) -> Tools:
    """The tools that a record offers: a list of functions, or its JSON."""
    tools = record.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f'"tools" is no list of functions: {reprlib.repr(tools)}')
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or []] or None


def _of_sharegpt(turns: Any) -> Messages:
    """{"from": "human", "value": ...} -> {"role": "user", "content": ...}; calls get ids, and results those of their
    calls."""
    messages: Messages = []
    for place, turn in enumerate(turns if isinstance(turns, list) else []):
        if not isinstance(turn, dict) or turn.get("from") not in OF_SHAREGPT or not isinstance(turn.get("value"), str):
            raise ValueError(f'turn {place + 1} is no {{"from", "value"}}; known in "from": {", ".join(OF_SHAREGPT)}')
        message: dict[str, Any] = {"role": OF_SHAREGPT[turn["from"]], "content": turn["value"]}
        if turn["from"] == "function_call":
            call = json.loads(turn["value"])
            calls = [{"id": f"call{place:05}", "type": "function", "function": call}]
            message |= {"content": "", "tool_calls": calls}
        if turn["from"] == "observation":
            message["tool_call_id"] = f"call{place - 1:05}"
        messages.append(message)
    return messages


def _ours(tokenizer: Tokenizer) -> Chat:
    special = tokenizer.specials

    def draft(messages: Messages, tools: Tools) -> Draft:
        contents = [message["content"] for message in messages]
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        return Draft(messages, contents, [], contents[last])

    def finish(drafts: Sequence[Draft]) -> list[list[Written]]:
        ids = iter(tokenizer.encode_batch([text for one in drafts for text in one.texts]))
        return [[write_turns(one.messages, [next(ids) for _ in one.texts], special)] for one in drafts]

    def prompt(messages: Messages, tools: Tools) -> list[int]:
        return [*finish([draft(messages, tools)])[0][0].ids.tolist(), special.assistant]

    def render(messages: Messages, tools: Tools, answer: bool) -> str:
        turns = [f"<|{message['role']}|>{message['content']}<|end|>" for message in messages]
        return "".join(["<|endoftext|>", *turns, *(["<|assistant|>"] if answer else [])])

    return Chat(TEMPLATE, draft, finish, prompt, render, uses_tools=False)


def write_turns(messages: Messages, contents: list[np.ndarray], special: Specials) -> Written:
    """A conversation by our template.

    Args:
        contents: token ids of each message's content.

    | user "hi", assistant "yo"  | <|endoftext|> <|user|> hi <|end|> <|assistant|> yo <|end|> |
    | weights                    |      0           0     0     0         0         1     1    |
    """
    parts: list[Any] = [[special.end_of_text]]
    answers, length = [], 1
    for message, content in zip(messages, contents, strict=True):
        parts += [[getattr(special, message["role"])], content, [special.end_of_turn]]
        start, length = length + 1, length + len(content) + 2
        if message["role"] == "assistant":
            answers.append((start, length))
    return Written(np.concatenate(parts).astype(np.int32), answers)


def _foreign(tokenizer: Tokenizer) -> Chat:
    sealed = seal(tokenizer)
    writer = make_writer(tokenizer, sealed)

    def draft(messages: Messages, tools: Tools) -> Draft:
        return Draft(messages, *writer.examples(messages, tools))

    def finish(drafts: Sequence[Draft]) -> list[list[Written]]:
        written = tokenized([text for one in drafts for text in one.texts], [a for one in drafts for a in one.answers])
        return [[next(written) for _ in one.texts] for one in drafts]

    def tokenized(texts: list[str], answers: list[list[Span]]) -> Iterator[Written]:
        """The ids of a prompt are what it has alone: no token may have letters of it and of its answer, nor may the
        answer change how it is split ("\n\n" is one token of GPT-2's, but not before a word)."""
        cuts = [[start for start, _ in spans if sealed.seamless] for spans in answers]
        tables = sealed.encode_batch([_cut(*pair, sealed.cut) for pair in zip(texts, cuts, strict=True)])
        for text, spans, found, table in zip(texts, answers, cuts, tables, strict=True):
            if not found and (found := [start for start, _ in spans if _straddled(table, start)]):
                [table] = sealed.encode_batch([_cut(text, found, sealed.cut)])
            yield written_of(table, spans, found)

    def written_of(table: np.ndarray, answers: list[Span], cuts: list[int]) -> Written:
        def place(letter: int) -> int:
            moved = letter + len(sealed.cut) * sum(cut <= letter for cut in cuts)
            return int(np.searchsorted(table[1], moved))

        return Written(table[0], [(place(start), place(stop)) for start, stop in answers])

    def prompt(messages: Messages, tools: Tools) -> list[int]:
        text, answers = writer.prompt(messages, tools)
        return next(tokenized([text], [answers])).ids.tolist()

    return Chat(chat_name(tokenizer), draft, finish, prompt, writer.render, uses_tools=True)


def _straddled(table: np.ndarray, letter: int) -> bool:
    before = np.searchsorted(table[1], letter)
    return bool(before and table[2, before - 1] > letter)


def _cut(text: str, cuts: list[int], cut: str) -> str:
    return cut.join(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
