"""Chats -> token ids, and which of them are trained on: the assistant's words and the token that ends its turn.

A chat is written by the built-in template or by a tokenizer's own Jinja template. The built-in one is
`<|role|> content <|end|>`: control tokens are ids between encoded texts, so nothing that a user writes can become one.
A Jinja template writes text; `control_tokens.py` gives the same guarantee there.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstages.data.chat_spans import Span, make_template_writer
from jaxstages.data.control_tokens import alias_control_tokens
from jaxstages.data.conversation import INSTRUCTING, Messages, Tools
from jaxstages.data.tokenizer import Specials, Tokenizer

TEMPLATE = "<|endoftext|>(<|role|>content<|end|>)*"
"""Name of the built-in template in a checkpoint's metadata; a stage refuses a parent with another."""


class Draft(NamedTuple):
    """A conversation before it is tokenized.

    texts: one for each message (built-in template), or for each example (Jinja template).
    answers: spans of the answers in each example, in characters.
    prompt: the prompt of the last answer with the answers in it; None if it is a prefix of the last example.
    """

    messages: Messages
    texts: list[str]
    answers: list[list[Span]]
    prompt: tuple[str, list[Span]] | None = None


class ChatExample(NamedTuple):
    """ids int32 [n], and the spans of the answers in them, which are trained on. It may be cut after each answer."""

    ids: np.ndarray
    answers: list[Span]

    @property
    def weights(self) -> np.ndarray:
        """float32 [n]: 1 in answers, else 0."""
        weights = np.zeros(len(self.ids), np.float32)
        for start, stop in self.answers:
            weights[start:stop] = 1
        return weights


class EncodedChat(NamedTuple):
    """A conversation as token ids.

    prompt: ids of the prompt of the last answer, exactly as `Chat.prompt` returns them.
    reference: the last answer, decoded from its ids.
    """

    examples: list[ChatExample]
    prompt: list[int]
    reference: str


class Chat(NamedTuple):
    """A chat template with its tokenizer.

    name: name of the template in a checkpoint's metadata.
    draft: renders a conversation; raises ValueError for one that the template can't write.
    finish: tokenizes drafts together, on all cores.
    prompt: ids up to where the assistant has to answer.
    render: text of a conversation, or of a prompt, for people.
    """

    name: str
    draft: Callable[[Messages, Tools], Draft]
    finish: Callable[[Sequence[Draft]], list[EncodedChat]]
    prompt: Callable[[Messages, Tools], list[int]]
    render: Callable[[Messages, Tools, bool], str]

    def encode(self, messages: Messages, tools: Tools = None) -> list[ChatExample]:
        return self.finish([self.draft(messages, tools)])[0].examples


def make_chat(tokenizer: Tokenizer) -> Chat:
    return _jinja_template(tokenizer) if tokenizer.template else _builtin_template(tokenizer)


def chat_name(tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256((tokenizer.template + tokenizer.tool_template).encode()).hexdigest()
    return f"jinja:{digest}" if tokenizer.template else TEMPLATE


def keep_trained_answers(examples: Sequence[ChatExample], trained: Sequence[bool]) -> list[ChatExample]:
    """Drop the answers that are not trained on, and the examples that are left without any.

    Args:
        trained: whether to train on each answer of all examples, in order.
    """
    flags = iter(trained)
    filtered = [example._replace(answers=[span for span in example.answers if next(flags)]) for example in examples]
    return [example for example in filtered if example.answers]


def _builtin_template(tokenizer: Tokenizer) -> Chat:
    special = tokenizer.specials

    def check(messages: Messages, tools: Tools) -> None:
        if tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            raise ValueError(
                "the built-in chat template has no tools; leave them out, or take a tokenizer with its own template"
            )

    def draft(messages: Messages, tools: Tools) -> Draft:
        check(messages, tools)
        return Draft(messages, [message["content"] for message in messages], [])

    def finish(drafts: Sequence[Draft]) -> list[EncodedChat]:
        ids = iter(tokenizer.encode_batch([text for draft in drafts for text in draft.texts]))
        examples = [write_turns(draft.messages, [next(ids) for _ in draft.texts], special) for draft in drafts]
        return [_encoded_chat([example], None, tokenizer) for example in examples]

    def prompt(messages: Messages, tools: Tools) -> list[int]:
        check(messages, tools)
        contents = tokenizer.encode_batch([message["content"] for message in messages])
        return [*write_turns(messages, contents, special).ids.tolist(), special.assistant]

    def render(messages: Messages, tools: Tools, answer: bool) -> str:
        turns = [f"<|{message['role']}|>{message['content']}<|end|>" for message in messages]
        return "".join(["<|endoftext|>", *turns, *(["<|assistant|>"] if answer else [])])

    return Chat(TEMPLATE, draft, finish, prompt, render)


def write_turns(messages: Messages, contents: list[np.ndarray], special: Specials) -> ChatExample:
    """Write a conversation by the built-in template.

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
    return ChatExample(np.concatenate(parts).astype(np.int32), answers)


def _encoded_chat(examples: list[ChatExample], prompt: list[int] | None, tokenizer: Tokenizer) -> EncodedChat:
    """
    Args:
        prompt: ids of the prompt of the last answer; None if it is a prefix of the last example.
    """
    ids, (start, stop) = examples[-1].ids.tolist(), examples[-1].answers[-1]
    answer = itertools.takewhile(lambda token: token not in tokenizer.stops, ids[start:stop])
    return EncodedChat(examples, ids[:start] if prompt is None else prompt, tokenizer.decode([*answer]))


def _jinja_template(tokenizer: Tokenizer) -> Chat:
    aliased = alias_control_tokens(tokenizer)
    writer = make_template_writer(tokenizer, aliased)

    def draft(messages: Messages, tools: Tools) -> Draft:
        return Draft(messages, *writer.examples(messages, tools))

    def finish(drafts: Sequence[Draft]) -> list[EncodedChat]:
        texts = [text for draft in drafts for text in draft.texts]
        spans = [answers for draft in drafts for answers in draft.answers]
        prompts = [draft.prompt for draft in drafts if draft.prompt is not None]
        tokenized = tokenize(texts + [text for text, _ in prompts], spans + [answers for _, answers in prompts])

        examples = [[next(tokenized) for _ in draft.texts] for draft in drafts]
        prompt_ids = [None if draft.prompt is None else next(tokenized).ids.tolist() for draft in drafts]
        return [_encoded_chat(*pair, tokenizer) for pair in zip(examples, prompt_ids, strict=True)]

    def tokenize(texts: list[str], answers: list[list[Span]]) -> Iterator[ChatExample]:
        """Tokenize texts so that the ids of each prompt are those that it has alone.

        No token may cross from a prompt into its answer, nor may the answer change how the prompt is split ("\\n\\n" is
        one token of GPT-2's, but not before a word). So texts are cut where answers begin, unless the cut itself would
        change what follows (SentencePiece): there only where a token does cross.
        """
        cuts = [[start for start, _ in spans if aliased.seamless] for spans in answers]
        tables = aliased.encode_batch([_cut(*pair, aliased.cut) for pair in zip(texts, cuts, strict=True)])
        for text, spans, starts, table in zip(texts, answers, cuts, tables, strict=True):
            if not starts:
                starts = [start for start, _ in spans if _is_crossed(table, start)]
                if starts:
                    [table] = aliased.encode_batch([_cut(text, starts, aliased.cut)])
            yield example_of(table, spans, starts)

    def example_of(table: np.ndarray, answers: list[Span], cuts: list[int]) -> ChatExample:
        def token_index(character: int) -> int:
            moved = character + len(aliased.cut) * sum(cut <= character for cut in cuts)
            return int(np.searchsorted(table[1], moved))

        return ChatExample(table[0], [(token_index(start), token_index(stop)) for start, stop in answers])

    def prompt(messages: Messages, tools: Tools) -> list[int]:
        text, answers = writer.prompt(messages, tools)
        return next(tokenize([text], [answers])).ids.tolist()

    return Chat(chat_name(tokenizer), draft, finish, prompt, writer.render)


def _is_crossed(table: np.ndarray, character: int) -> bool:
    """Return whether a token stands for characters on both sides of the beginning of `character`."""
    before = np.searchsorted(table[1], character)
    return bool(before and table[2, before - 1] > character)


def _cut(text: str, cuts: list[int], cut: str) -> str:
    return cut.join(text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True))
