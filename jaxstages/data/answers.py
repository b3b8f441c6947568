"""A conversation by a template of the field -> texts, and where in them stand the answers that are trained on.

Control tokens that somebody wrote are hidden while the template is at work, each behind a letter that nobody uses; in
what it then wrote, control tokens are its own, and get their secret names (`tokenizer.Sealed`); at last what was
hidden is put back, as plain text. Where the answers are is found by

1. the template's own marks, `{% generation %}`, if there is one for each answer; else
2. what it writes before an answer, as a prompt, and after it: the rest is the answer.

| prompt of "hi"                   | <user>hi<end><assistant>        |
| the same, answered with "yo"     | <user>hi<end><assistant>yo<end> |
| the answer, up to its end token  |                         yo<end> |

A template that writes earlier turns in another way once more follow (Qwen3 leaves out what was thought) gives an
example for each answer: its prompt and that answer, which is how the model is used. Likewise one that ends answers
with no control token: there the end of text is put after each, so that the model learns to stop.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jaxstages.data.template import MARKS, make_render
from jaxstages.data.tokenizer import Sealed, Tokenizer

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]

LETTERS = range(0xF0000, 0x10FFFE)
"""Of Unicode's private use: from these are taken the ones that stand for what is hidden."""

ANY_LETTER = f"[{chr(LETTERS[0])}-{chr(LETTERS[-1])}]"


class Answered(NamedTuple):
    """texts: of the examples. answers: their first letters and last + 1 in each. reference: the last of them, without
    its end token."""

    texts: list[str]
    answers: list[list[Span]]
    reference: str


class Writer(NamedTuple):
    """examples: sealed. prompt: sealed, with the answers that stand in it. render: as people may read it."""

    examples: Callable[[Messages, Tools], Answered]
    prompt: Callable[[Messages, Tools], tuple[str, list[Span]]]
    render: Callable[[Messages, Tools, bool], str]


def make_writer(tokenizer: Tokenizer, sealed: Sealed) -> Writer:
    """Raises ValueError for a template that is none; so do its functions for a conversation that it can't write."""
    write = make_render(tokenizer.template, tokenizer.bos, tokenizer.eos)
    hide = _make_hide(sealed, tokenizer.template)
    end = tokenizer.backend.id_to_token(tokenizer.specials.end_of_turn)
    special = _any_of(sealed.special)
    tail = re.compile(rf"(?:(?:{special})\s*)+\Z")
    names, letters = re.compile(f"{_any_of(sealed.names)}|{ANY_LETTER}"), re.compile(ANY_LETTER)

    def end_of(text: str) -> int:
        """Letters up to the token that ends the turn, with it: among the last tokens the one that ends turns, else the
        first of them; 0 if there is none."""
        found = tail.search(text)
        tokens = list(re.finditer(special, text[found.start() :])) if found else []
        chosen = [token for token in tokens if token.group() == end] or tokens
        return found.start() + chosen[0].end() if found else 0

    def by_marks(text: str, marks: list[Span], count: int) -> list[Span]:
        joined: list[Span] = []
        for start, stop in marks:
            begin = joined.pop()[0] if joined and joined[-1][1] == start else start
            joined.append((begin, stop))
        spans = []
        for start, stop in joined:
            if not (length := end_of(text[start:stop])):
                after = re.match(rf"\s*(?:{special})", text[stop:])
                length = stop - start + after.end() if after else 0
            spans += [(start, start + length)] if length else []
        return spans if len(spans) == count == len(joined) else []

    def by_prompt(messages: Messages, place: int, tools: Tools) -> tuple[str, str]:
        """The prompt and the answer of one turn."""
        asked = write(messages[:place], tools, True).text
        begins = [0, *(i for i in range(place) if messages[i]["role"] == "user")]
        for begin in (0, begins[-1]):  # the second is for templates that put something into the last question only
            before = write(messages[begin:place], tools, True).text
            whole = write(messages[begin : place + 1], tools, False).text
            if whole.startswith(before):
                answer = whole[len(before) :]
                length = end_of(answer)
                return asked, answer[:length] if length else answer.rstrip() + without_end(place)
        raise ValueError(
            f"the chat template writes what stands before message {place + 1} in another way once that is there, so "
            "the answer can't be told from it; put {% generation %} and {% endgeneration %} around answers in it"
        )

    def without_end(place: int) -> str:
        if tokenizer.specials.end_of_turn != tokenizer.specials.end_of_text:
            raise ValueError(
                f"the chat template writes no token that ends message {place + 1}, as it does for others, and the "
                "model would not learn to stop there; mend the template"
            )
        return tokenizer.eos

    def find(messages: Messages, tools: Tools) -> list[tuple[str, list[Span]]]:
        full, marks = write(messages, tools, False)
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = by_marks(full, marks, len(places))
        if not spans:
            pairs = [by_prompt(messages, i, tools) for i in places]
            spans = [(len(asked), len(asked) + len(answer)) for asked, answer in pairs]
            if not all(full.startswith(asked + answer) for asked, answer in pairs):
                return [("".join(pair), [span]) for pair, span in zip(pairs, spans, strict=True)]
        return [(full[: spans[-1][1]], spans)]

    def seal(text: str, hidden: dict[str, str]) -> str:
        return names.sub(lambda found: (sealed.names | hidden).get(found.group(), found.group()), text)

    def sealed_text(text: str, spans: list[Span], hidden: dict[str, str]) -> tuple[str, list[Span]]:
        whole, before, moved = "", 0, []
        for start, stop in spans:
            asked = whole + seal(text[before:start], hidden)
            whole, before = asked + seal(text[start:stop], hidden), stop
            moved.append((len(asked), len(whole)))
        return whole + seal(text[before:], hidden), moved

    def examples(messages: Messages, tools: Tools) -> Answered:
        hidden, messages, tools = hide(messages, tools)
        found = find(messages, tools)
        sealed_texts = [sealed_text(text, spans, hidden) for text, spans in found]
        text, spans = found[-1]
        said = re.sub(rf"(?:{special})\Z", "", text[spans[-1][0] :])
        reference = letters.sub(lambda letter: hidden.get(letter.group(), letter.group()), said)
        return Answered([text for text, _ in sealed_texts], [spans for _, spans in sealed_texts], reference.strip())

    def prompt(messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        hidden, messages, tools = hide(messages, tools)
        asked = write(messages, tools, True).text
        earlier = find(messages, tools) if any(message["role"] == "assistant" for message in messages) else []
        same = len(earlier) == 1 and asked.startswith(earlier[0][0])
        return sealed_text(asked, earlier[0][1] if same else [], hidden)

    def render(messages: Messages, tools: Tools, answer: bool) -> str:
        return write(messages, tools, answer).text

    return Writer(examples, prompt, render)


def _any_of(words: Iterable[str]) -> str:
    """A pattern; longer words first, for one may begin another."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def _make_hide(sealed: Sealed, template: str) -> Callable[[Messages, Tools], tuple[dict[str, str], Messages, Tools]]:
    """`hide(messages, tools)`: both without control tokens, and what the letters stand for that are there instead.

    Also a part of one at either end of a text is hidden, of which the template might make a whole. An assistant may
    write those tokens that are not special (`<think>`): they are words of its own.
    """

    def cover(words: list[str]) -> Callable[[str, Callable[[str], str]], str]:
        whole, longest = re.compile(_any_of([*words, *MARKS])), max(map(len, words))
        heads = {word[:n] for word in words for n in range(1, len(word))}
        tails = {word[n:] for word in words for n in range(1, len(word))}

        def covered(text: str, letter: Callable[[str], str]) -> str:
            text = whole.sub(lambda found: letter(found.group()), text)
            first, last = len(text) - len(text.lstrip()), len(text.rstrip())
            for n in range(min(longest, last - first), 0, -1):
                if text[last - n : last] in heads:
                    text = text[: last - n] + letter(text[last - n : last]) + text[last:]
                    last = last - n
                    break
            for n in range(min(longest, last - first), 0, -1):
                if text[first : first + n] in tails:
                    return text[:first] + letter(text[first : first + n]) + text[first + n :]
            return text

        return covered

    others, assistants = cover([*sealed.names]), cover([*sealed.special])

    def hide(messages: Messages, tools: Tools) -> tuple[dict[str, str], Messages, Tools]:
        hidden: dict[str, str] = {}
        free = _unused(messages, tools, template)

        def letter(wrote: str) -> str:
            known = [one for one, other in hidden.items() if other == wrote]
            one = known[0] if known else next(free)
            hidden[one] = wrote
            return one

        def walk(value: Any, covered: Callable[[str, Callable[[str], str]], str]) -> Any:
            match value:
                case str():
                    return covered(value, letter)
                case dict():
                    return {walk(name, covered): walk(one, covered) for name, one in value.items()}
                case list():
                    return [walk(one, covered) for one in value]
                case _:
                    return value

        shown = [
            walk(message, assistants if message["role"] == "assistant" else others) | {"role": message["role"]}
            for message in messages
        ]
        return hidden, shown, walk(tools, others)

    return hide


def _unused(*values: Any) -> Iterator[str]:
    """Letters that are nowhere in the values, which are looked at only when the first one is needed."""
    used = {letter for letter in json.dumps(values, ensure_ascii=False, default=str) if ord(letter) in LETTERS}
    yield from (letter for letter in map(chr, LETTERS) if letter not in used)
