"""Chats -> token ids, and which of them are trained on: by our template, or by the one of a tokenizer from elsewhere.

Ours is `<|role|> content <|end|>`: control tokens are ids between encoded texts, so nothing that a user writes can
become one. A template of the field writes text: see `data/answers.py`, where the same is seen to. Trained on are the
assistant's words and the token that ends its turn, so that it learns to stop.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstages.data.chat_spans import Span, make_writer
from jaxstages.data.conversation import INSTRUCTING, Messages, Tools
from jaxstages.data.tokenizer import Specials, Tokenizer, seal

TEMPLATE = "<|endoftext|>(<|role|>content<|end|>)*"
"""Name of our template in a checkpoint's metadata; a stage refuses a parent with another."""


class Draft(NamedTuple):
    """A conversation before it is tokenized.

    texts: of each message, or of each example.
    answers: their letters in each example.
    prompt: what asks for the last answer, with the answers in it, where that is not what stands before it.
    """

    messages: Messages
    texts: list[str]
    answers: list[list[Span]]
    prompt: tuple[str, list[Span]] | None = None


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


class Chatted(NamedTuple):
    """A conversation as token ids. prompt: what is asked for its last answer, to the id as `Chat.prompt` gives it.
    reference: that answer, as decoding its ids gives it."""

    examples: list[Written]
    prompt: list[int]
    reference: str


class Chat(NamedTuple):
    """name: of the template, in a checkpoint's metadata. draft: raises ValueError for a conversation that the template
    can't write. finish: each draft as ids, tokenized together over all cores. prompt: ids up to where the assistant
    has to answer. render: the text of a conversation, or of a prompt, for people."""

    name: str
    draft: Callable[[Messages, Tools], Draft]
    finish: Callable[[Sequence[Draft]], list[Chatted]]
    prompt: Callable[[Messages, Tools], list[int]]
    render: Callable[[Messages, Tools, bool], str]

    def encode(self, messages: Messages, tools: Tools = None) -> list[Written]:
        return self.finish([self.draft(messages, tools)])[0].examples


def make_chat(tokenizer: Tokenizer) -> Chat:
    return _foreign(tokenizer) if tokenizer.template else _ours(tokenizer)


def chat_name(tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256((tokenizer.template + tokenizer.tool_template).encode()).hexdigest()
    return f"jinja:{digest}" if tokenizer.template else TEMPLATE


def only_trained(written: Sequence[Written], trained: Sequence[bool]) -> list[Written]:
    """The examples of a conversation with the answers that are trained on; without those that have none.

    Args:
        trained: for each answer of all examples, in order.
    """
    flags = iter(trained)
    chosen = [one._replace(answers=[span for span in one.answers if next(flags)]) for one in written]
    return [one for one in chosen if one.answers]


def _ours(tokenizer: Tokenizer) -> Chat:
    special = tokenizer.specials

    def draft(messages: Messages, tools: Tools) -> Draft:
        if tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            raise ValueError(
                "our chat template has no tools; take a tokenizer whose template writes them, or remove them from the "
                "record"
            )
        return Draft(messages, [message["content"] for message in messages], [])

    def finish(drafts: Sequence[Draft]) -> list[Chatted]:
        ids = iter(tokenizer.encode_batch([text for draft in drafts for text in draft.texts]))
        return [chatted(draft.messages, [next(ids) for _ in draft.texts]) for draft in drafts]

    def chatted(messages: Messages, contents: list[np.ndarray]) -> Chatted:
        written = write_turns(messages, contents, special)
        return _chatted([written], None, tokenizer)

    def prompt(messages: Messages, tools: Tools) -> list[int]:
        contents = tokenizer.encode_batch([message["content"] for message in messages])
        return [*write_turns(messages, contents, special).ids.tolist(), special.assistant]

    def render(messages: Messages, tools: Tools, answer: bool) -> str:
        turns = [f"<|{message['role']}|>{message['content']}<|end|>" for message in messages]
        return "".join(["<|endoftext|>", *turns, *(["<|assistant|>"] if answer else [])])

    return Chat(TEMPLATE, draft, finish, prompt, render)


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
        role = "system" if message["role"] in INSTRUCTING else message["role"]
        parts += [[getattr(special, role)], content, [special.end_of_turn]]
        start, length = length + 1, length + len(content) + 2
        if message["role"] == "assistant":
            answers.append((start, length))
    return Written(np.concatenate(parts).astype(np.int32), answers)


def _chatted(examples: list[Written], prompt: list[int] | None, tokenizer: Tokenizer) -> Chatted:
    """
    Args:
        prompt: of the last answer, where it is not what stands before it.
    """
    ids, (start, stop) = examples[-1].ids.tolist(), examples[-1].answers[-1]
    said = itertools.takewhile(lambda token: token not in tokenizer.stops, ids[start:stop])
    return Chatted(examples, ids[:start] if prompt is None else prompt, tokenizer.decode([*said]))


def _foreign(tokenizer: Tokenizer) -> Chat:
    sealed = seal(tokenizer)
    writer = make_writer(tokenizer, sealed)

    def draft(messages: Messages, tools: Tools) -> Draft:
        return Draft(messages, *writer.examples(messages, tools))

    def finish(drafts: Sequence[Draft]) -> list[Chatted]:
        texts = [text for draft in drafts for text in draft.texts]
        spans = [answers for draft in drafts for answers in draft.answers]
        prompts = [draft.prompt for draft in drafts if draft.prompt is not None]
        written = tokenized(texts + [text for text, _ in prompts], spans + [answers for _, answers in prompts])
        examples = [[next(written) for _ in draft.texts] for draft in drafts]
        asked = [None if draft.prompt is None else next(written).ids.tolist() for draft in drafts]
        return [_chatted(*pair, tokenizer) for pair in zip(examples, asked, strict=True)]

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

    return Chat(chat_name(tokenizer), draft, finish, prompt, writer.render)


def _straddled(table: np.ndarray, letter: int) -> bool:
    before = np.searchsorted(table[1], letter)
    return bool(before and table[2, before - 1] > letter)


def _cut(text: str, cuts: list[int], cut: str) -> str:
    return cut.join(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
